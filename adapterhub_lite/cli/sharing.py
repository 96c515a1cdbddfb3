"""`push` and `pull`: between the local registry and a hub."""

from typing import Annotated

import typer

from adapterhub_lite.cli.output import HomeOption, JsonOption, print_json, say, short, waiting

EndpointOption = Annotated[
    str | None,
    typer.Option("--endpoint", help="The hub's address; huggingface.co when not given.", envvar="HF_ENDPOINT"),
]
RepositoryArgument = Annotated[str, typer.Argument(help="The repository on the hub, org/name.")]


def push(
    reference: Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")],
    repo_id: RepositoryArgument,
    endpoint: EndpointOption = None,
    private: Annotated[bool, typer.Option(help="Create the repository as private.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish one version, exactly once, with its manifest and card. The token comes from `hf auth login` or HF_TOKEN.

    Example: `adapterhub-lite push sql:3 my-org/sql-lora`
    """
    from dataclasses import asdict

    from adapterhub_lite.registry import AdapterRegistry

    with waiting(f"pushing {reference} to {repo_id}"):
        receipt = AdapterRegistry(home).push(reference, repo_id, endpoint=endpoint, private=private)
    if as_json:
        return print_json(asdict(receipt))
    say(f"{reference} is {repo_id} at {receipt.tag} (commit {receipt.commit[:12]}).")


def pull(
    repo_id: RepositoryArgument,
    revision: Annotated[
        str | None, typer.Option(help="A tag such as v3, a branch or a commit; newest if not given.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Its name here; the name in its manifest if not given.")] = None,
    endpoint: EndpointOption = None,
    offline: Annotated[bool, typer.Option(help="Use only what an earlier pull left here.")] = False,
    adopt: Annotated[bool, typer.Option(help="Accept an adapter without manifest, made by plain PEFT.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch an adapter, verify every byte and check it before it enters the registry.

    Example: `adapterhub-lite pull my-org/sql-lora --revision v3 --name sql`
    """
    from adapterhub_lite.registry import AdapterRegistry

    with waiting(f"pulling {repo_id}"):
        receipt = AdapterRegistry(home).pull(
            repo_id, revision=revision, name=name, endpoint=endpoint, offline=offline, adopt=adopt
        )
    manifest = receipt.manifest
    if as_json:
        return print_json(
            {"manifest": manifest.model_dump(mode="json"), "commit": receipt.commit, "source": receipt.source}
        )
    say(f"{manifest.reference} ({short(manifest.digest)}) from {receipt.source}, commit {receipt.commit[:12]}.")
