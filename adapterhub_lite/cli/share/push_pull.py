"""`push` and `pull`: between the local registry and a hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, megabytes, print_json, say, short, would

if TYPE_CHECKING:
    from adapterhub_lite.registry import AdapterRegistry

EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        help="The hub's address; huggingface.co when not given. A token goes only to the hub in HF_ENDPOINT.",
        envvar="HF_ENDPOINT",
    ),
]
SOURCES = {
    "hub": "fetched from the hub",
    "store": "was here already, as the hub confirmed; no weights were fetched",
    "offline": "as an earlier pull left it; the hub was not asked",
}


def push(
    reference: Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")],
    repo_id: Annotated[str, typer.Argument(help="The repository on the hub, org/name.")],
    endpoint: EndpointOption = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    alias: Annotated[str | None, typer.Option(help="Then point this alias on the hub at the version.")] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish one version, exactly once, with its manifest and card. The token comes from HF_TOKEN or `hf auth login`.

    Example: `adapterhub-lite push sql:3 my-org/sql-lora --alias prod`
    """
    from dataclasses import asdict

    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.registry.hub.aliases import push_alias

    registry = AdapterRegistry(home)
    if dry_run:
        manifest, where = registry.resolve(reference), endpoint or "https://huggingface.co"
        size = sum(file.size for file in manifest.files.values())
        act = f"publish {manifest.reference} ({megabytes(size)}) as {repo_id} v{manifest.version} on {where}"
        return would(act, as_json, reference=manifest.reference, repo_id=repo_id, endpoint=where, bytes=size)
    receipt = registry.push(reference, repo_id, endpoint=endpoint, private=private, progress=say)
    aliases = push_alias(repo_id, alias, int(receipt.tag[1:]), endpoint=endpoint) if alias else {}
    if as_json:
        return print_json({**asdict(receipt), "aliases": aliases})
    where = f"{repo_id} at {receipt.tag} (commit {receipt.commit[:12]})"
    say(
        f"{reference} is {where}." if receipt.uploaded else f"{reference} was there already: {where}. Nothing was sent."
    )
    if alias:
        say(f"{repo_id}@{alias} points to {receipt.tag}.")


def pull(
    repo_id: Annotated[
        str | None, typer.Argument(help="The repository on the hub, org/name; none with --locked.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="A tag such as v3, an alias as @prod, a branch or a commit; newest if not given.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Its name here; the name in its manifest if not given.")] = None,
    endpoint: EndpointOption = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what an earlier pull left here.")] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Take an adapter without manifest, made by plain PEFT: measure and record.")
    ] = False,
    locked: Annotated[bool, typer.Option("--locked", help="Bring whatever of the lock is missing here.")] = False,
    file: Annotated[Path, typer.Option("--file", help="The lock, for --locked.")] = Path("adapters.lock"),
    probes: Annotated[
        bool, typer.Option("--probes", help="Also load the base and check that the adapter behaves as recorded.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Its base; looked for in the home when not given.")] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch an adapter, verify every byte and check it before it enters the registry; says where it came from.

    Example: `adapterhub-lite pull my-org/sql-lora --revision v3 --name sql`, or `adapterhub-lite pull --locked`
    """
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.errors import ConfigurationError
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    if locked:
        if repo_id or revision or name or offline or adopt or probes or base:
            raise ConfigurationError(
                "--locked takes everything from the lock: besides, give only --file or --endpoint."
            )
        return _pull_locked(registry, file, endpoint, as_json, dry_run)
    if repo_id is None:
        raise ConfigurationError("Which repository? Give org/name, or --locked for what adapters.lock says.")
    if dry_run:
        there, label = endpoint or "https://huggingface.co", name or "the name in its manifest"
        return would(f"fetch {repo_id} at {revision or 'its newest'} from {there} and keep it as {label}", as_json)
    receipt = registry.pull(
        repo_id, revision=revision, name=name, endpoint=endpoint,  offline=offline, adopt=adopt,
        verify="probes" if probes else "files", base=resolve_base(base, home=home) if base else None, progress=say,
    )  # fmt: skip
    manifest = receipt.manifest
    if as_json:
        return print_json(
            {"manifest": manifest.model_dump(mode="json"), "commit": receipt.commit, "source": receipt.source}
        )
    say(f"{manifest.reference} ({short(manifest.digest)}), commit {receipt.commit[:12]}: {SOURCES[receipt.source]}.")


def _pull_locked(registry: "AdapterRegistry", file: Path, endpoint: str | None, as_json: bool, dry_run: bool) -> None:
    from adapterhub_lite.registry.hub.pull import pull_locked
    from adapterhub_lite.registry.operations.lock import read_lock, verify_lock

    lock = read_lock(file)
    if dry_run:
        problems = verify_lock(registry.store, lock)
        return would(f"bring what is missing of {file}: {'; '.join(problems) or 'nothing'}", as_json, problems=problems)
    came = pull_locked(registry.store, lock, endpoint=endpoint, progress=say)
    references = [manifest.reference for manifest in came]
    if as_json:
        return print_json({"file": str(file), "locked": len(lock.adapters), "pulled": references})
    say(f"{len(lock.adapters)} adapters are locked, {len(came)} were missing: {', '.join(references) or 'none'}.")
