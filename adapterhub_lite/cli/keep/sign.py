"""`keygen`, `sign`, `verify` and `trust`: who vouches for a version, and whose word is wanted."""

from typing import Annotated

import typer

from adapterhub_lite.cli.output import (
    DryRunOption,
    HomeOption,
    JsonOption,
    print_json,
    print_table,
    say,
    waiting,
    would,
)

KeyOption = Annotated[str, typer.Option(help="The key's name in the home folder.")]
ReferenceArgument = Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")]


def keygen(
    key: KeyOption = "default", dry_run: DryRunOption = False, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Make an Ed25519 key, readable by you alone, and print its public half for others to trust.

    Example: `adapterhub-lite keygen --key release`
    """
    from adapterhub_lite.home import adapterhub_home
    from adapterhub_lite.registry.operations.sign import generate_key

    if dry_run:
        return would(f"make the key {key!r} in {adapterhub_home(home)}", as_json, key=key)
    public_key = generate_key(adapterhub_home(home), key)
    if as_json:
        return print_json({"key": key, "public_key": public_key})
    say(f"Key {key!r} is made. Others trust it with `adapterhub-lite trust NAME PUBLIC_KEY`; its public half is:")
    typer.echo(public_key)


def sign(
    reference: ReferenceArgument,
    key: KeyOption = "default",
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a version; the signature travels with it through push and pull.

    Example: `adapterhub-lite sign sql:3 --key release`
    """
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    manifest = registry.resolve(reference)
    if dry_run:
        return would(f"sign {manifest.reference} with {key!r}", as_json, reference=manifest.reference, key=key)
    signature = registry.sign(manifest.reference, key=key)
    if as_json:
        return print_json({"reference": manifest.reference, "digest": manifest.digest, **signature.model_dump()})
    say(f"{manifest.reference} is signed with {key!r}, public key {signature.public_key}.")


def verify(
    reference: ReferenceArgument,
    probes: Annotated[
        bool, typer.Option("--probes", help="Check its behaviour instead: load the base and ask the recorded probes.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Where its base is; looked for in the home when not given.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a version's signature against every byte of it, or with `--probes` that it still behaves as recorded.

    Example: `adapterhub-lite verify sql:3`
    """
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    manifest = registry.resolve(reference)
    if probes:
        from adapterhub_lite.bases import resolve_base
        from adapterhub_lite.registry.check.replay import check_stored

        resolved = resolve_base(base, home=home) if base else None
        with waiting(f"asking {manifest.reference} its probes"):
            found = check_stored(registry.store, manifest, base=resolved)
        if as_json:
            return print_json({"reference": manifest.reference, "max_abs_difference": found.max_abs_difference,
                               "tolerance": found.tolerance})  # fmt: skip
        return say(f"{manifest.reference} behaves as recorded: logits differ by {found.max_abs_difference:.2e} at most, "
                   f"{found.tolerance:.2e} is rounding.")  # fmt: skip
    signer = registry.verify(manifest.reference)
    if as_json:
        return print_json({"reference": manifest.reference, "digest": manifest.digest, "signer": signer})
    known = f"by {signer}" if signer else "by a key that is not trusted here"
    say(f"{manifest.reference} is signed {known}, and every byte is what was signed.")


def trust(
    name: Annotated[str | None, typer.Argument(help="What to call the key.")] = None,
    public_key: Annotated[str | None, typer.Argument(help="64 hex digits, as keygen printed them.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="No longer trust the key of that name.")] = False,
    required: Annotated[
        bool | None, typer.Option("--required/--optional", help="Refuse pulls without a trusted signature, or not.")
    ] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show whose signatures count here, add or remove a key, or require a signature of everything that is pulled.

    Example: `adapterhub-lite trust release 3f0c...e1 --required`
    """
    from adapterhub_lite.errors import UsageError
    from adapterhub_lite.registry import AdapterRegistry

    policy = AdapterRegistry(home).trust
    if dry_run:
        act = f"{'no longer trust' if remove else 'trust'} {name}" if name else "change whether signatures are required"
        return would(act, as_json, name=name, required=required)
    if remove and name is not None:
        policy.distrust(name)
    elif name is not None:
        if public_key is None:
            raise UsageError(f"Which key is {name!r}? Give its 64 hex digits after the name.")
        policy.trust(name, public_key)
    elif remove:
        raise UsageError("Which key is no longer trusted? Give its name.")
    if required is not None:
        policy.require(required)
    found = policy.read()
    if as_json:
        return print_json(found.model_dump(mode="json"))
    print_table("Trusted keys", ("name", "public key"), list(found.keys.items()))
    say("A trusted signature is required of what comes in." if found.required else "Signatures are optional.")
