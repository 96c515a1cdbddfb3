"""`keygen`, `sign`, `verify` and `trust`: who published a version, and whose signatures are trusted."""

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
    """Create an Ed25519 key, readable only by you, and print its public half for others to trust.

    Example: `adapterhub-lite keygen --key release`
    """
    from adapterhub_lite.home import adapterhub_home
    from adapterhub_lite.registry.operations.sign import generate_key

    if dry_run:
        return would(f"create the key {key!r} in {adapterhub_home(home)}", as_json, key=key)
    public_key = generate_key(adapterhub_home(home), key)
    if as_json:
        return print_json({"key": key, "public_key": public_key})
    say(f"Created key {key!r}. Others trust it with `adapterhub-lite trust NAME PUBLIC_KEY`; its public half is:")
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
    manifest = registry.store.resolve(reference)
    if dry_run:
        return would(f"sign {manifest.reference} with {key!r}", as_json, reference=manifest.reference, key=key)
    signature = registry.sign(manifest.reference, key=key)
    if as_json:
        return print_json({"reference": manifest.reference, "digest": manifest.digest, **signature.model_dump()})
    say(f"{manifest.reference} is signed with {key!r}, public key {signature.public_key}.")


def verify(
    reference: ReferenceArgument,
    probes: Annotated[
        bool,
        typer.Option("--probes", help="Check its behaviour instead: load the base and replay the recorded probes."),
    ] = False,
    base: Annotated[str | None, typer.Option(help="Where its base is; searched for in the home if not given.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a version's signature against every byte of it, or, with `--probes`, that it still behaves as recorded.

    Example: `adapterhub-lite verify sql:3`
    """
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    manifest = registry.store.resolve(reference)
    if probes:
        from adapterhub_lite.bases import resolve_base
        from adapterhub_lite.registry.operations.replay import check_stored

        resolved = resolve_base(base, home=home) if base else None
        with waiting(f"replaying the probes of {manifest.reference}"):
            found = check_stored(registry.store, manifest, base=resolved)
        if as_json:
            return print_json({"reference": manifest.reference, "max_abs_difference": found.max_abs_difference,
                               "tolerance": found.tolerance})  # fmt: skip
        return say(f"{manifest.reference} behaves as recorded: logits differ by at most {found.max_abs_difference:.2e} "
                   f"(rounding allows {found.tolerance:.2e}).")  # fmt: skip
    signer = registry.verify(manifest.reference)
    if as_json:
        return print_json({"reference": manifest.reference, "digest": manifest.digest, "signer": signer})
    known = f"by {signer}" if signer else "by a key that is not trusted here"
    say(f"{manifest.reference} is signed {known}, and every byte is what was signed.")


def trust(
    name: Annotated[str | None, typer.Argument(help="A name for the key.")] = None,
    public_key: Annotated[str | None, typer.Argument(help="The 64 hex digits that keygen printed.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Stop trusting the key of that name.")] = False,
    required: Annotated[
        bool | None, typer.Option("--required/--optional", help="Refuse what has no trusted signature, or not.")
    ] = None,
    audit: Annotated[bool, typer.Option("--audit", help="List the versions here that --required refuses.")] = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the trusted keys, add or remove one, or require a trusted signature on all that is pulled or served.

    With `--audit`, exits with 1 when there are such versions.
    Example: `adapterhub-lite trust release 3f0c...e1 --required`, or `adapterhub-lite trust --audit`
    """
    from adapterhub_lite.errors import UsageError
    from adapterhub_lite.registry import AdapterRegistry

    policy = AdapterRegistry(home).trust
    if audit:
        if name is not None or remove or required is not None:
            raise UsageError("--audit only looks; give it nothing else.")
        fallen = policy.audit()
        if as_json:
            print_json([{"reference": reference, "reason": reason} for reference, reason in fallen])
        else:
            print_table("Without a trusted signature", ("version", "because"), fallen)
        if fallen:
            raise typer.Exit(1)
        return None if as_json else say("Every version here has a trusted signature.")
    if dry_run:
        act = f"{'stop trusting' if remove else 'trust'} {name}" if name else "change whether signatures are required"
        return would(act, as_json, name=name, required=required)
    if remove and name is not None:
        policy.distrust(name)
    elif name is not None:
        if public_key is None:
            raise UsageError(f"The key of {name!r} is missing: give its 64 hex digits after the name.")
        policy.trust(name, public_key)
    elif remove:
        raise UsageError("--remove needs the name of the key.")
    if required is not None:
        policy.require(required)
    found = policy.read()
    if as_json:
        return print_json(found.model_dump(mode="json"))
    print_table("Trusted keys", ("name", "public key"), list(found.keys.items()))
    say(
        "A trusted signature is required on everything that is pulled, resolved or served."
        if found.required
        else "Signatures are optional."
    )
