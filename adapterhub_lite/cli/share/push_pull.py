"""`push` and `pull`: between the local registry and a hub."""

from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, megabytes, print_json, say, short, would
from adapterhub_lite.cli.share.lock import bring_locked
from adapterhub_lite.registry.hub.receipts import PullReceipt

EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        help="The hub's address; huggingface.co if not given. A token goes only to the hub in HF_ENDPOINT.",
        envvar="HF_ENDPOINT",
    ),
]
SOURCES = {
    "hub": "fetched from the hub",
    "store": "already in the registry, as the hub confirmed; no weights were fetched",
    "offline": "as an earlier pull stored it; the hub was not asked",
}


def push(
    reference: Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")],
    repo_id: Annotated[str, typer.Argument(help="The repository on the hub, org/name.")],
    endpoint: EndpointOption = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    alias: Annotated[str | None, typer.Option(help="Also point this alias on the hub at the version.")] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish one version, exactly once, with its manifest and card. The token comes from HF_TOKEN or `hf auth login`.

    Example: `adapterhub-lite push sql:3 my-org/sql-lora --alias prod`
    """
    from dataclasses import asdict

    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.registry.hub.client import push_alias

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
        f"{reference} is {where}."
        if receipt.uploaded
        else f"{reference} was already published: {where}. Nothing was sent."
    )
    if alias:
        say(f"{repo_id}@{alias} points to {receipt.tag}.")


def report_pull(receipt: PullReceipt, alias: str | None, as_json: bool) -> None:
    """Say what was pulled, and which alias points to it now."""
    manifest = receipt.manifest
    if as_json:
        return print_json(
            {"manifest": manifest.model_dump(mode="json"), "commit": receipt.commit, "source": receipt.source}
        )
    if alias:
        say(f"{manifest.name}@{alias} points to version {manifest.version}.")
    say(f"{manifest.reference} ({short(manifest.digest)}), commit {receipt.commit[:12]}: {SOURCES[receipt.source]}.")


def pull(
    repo_id: Annotated[
        str | None, typer.Argument(help="The repository on the hub, org/name; omitted with --locked.")
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="A tag such as v3, an alias as @prod, a branch or a commit; the newest if not given."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Its local name; the repository's if not given.")] = None,
    alias: Annotated[str | None, typer.Option(help="Then point this local alias at it.")] = None,
    endpoint: EndpointOption = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what an earlier pull stored.")] = False,
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt", help="Accept an adapter without a manifest, made by plain PEFT: measure it and write one."
        ),
    ] = False,
    subfolder: Annotated[str | None, typer.Option(help="With --adopt, the folder of the repository it is in.")] = None,
    locked: Annotated[bool, typer.Option("--locked", help="Pull everything in the lock that is missing here.")] = False,
    file: Annotated[Path, typer.Option("--file", help="The lock file, for --locked.")] = Path("adapters.lock"),
    probes: Annotated[
        bool, typer.Option("--probes", help="Also load the base and check that the adapter behaves as recorded.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Its base; searched for in the home if not given.")] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch an adapter, verify every byte and check it before it enters the registry.

    It becomes the next version of its name here, whatever its publisher calls it, and moves no alias but `--alias`.
    Example: `adapterhub-lite pull my-org/sql-lora --revision v3 --name sql --alias prod`, or `adapterhub-lite pull --locked`
    """
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.errors import ConfigurationError
    from adapterhub_lite.registry import AdapterRegistry

    if locked:
        if repo_id or revision or name or alias or offline or adopt or subfolder or probes or base:
            raise ConfigurationError("--locked takes everything from the lock: only --file and --endpoint go with it.")
        return bring_locked(file, endpoint, home, as_json, dry_run)
    if repo_id is None:
        raise ConfigurationError(
            "The repository is missing: give org/name, or --locked to pull what adapters.lock names."
        )
    registry = AdapterRegistry(home)
    if dry_run:
        there, label = endpoint or "https://huggingface.co", name or repo_id.rpartition("/")[2]
        return would(
            f"fetch {repo_id} at {revision or 'its newest version'} from {there} and add it as {label}", as_json
        )
    receipt = registry.pull(
        repo_id, revision=revision, name=name, alias=alias, endpoint=endpoint,  offline=offline, adopt=adopt, subfolder=subfolder,
        verify="probes" if probes else "files", base=resolve_base(base, home=home) if base else None, progress=say,
    )  # fmt: skip
    report_pull(receipt, alias, as_json)
