"""`doctor`: what this machine can do, and what is wrong in the registry."""

from dataclasses import asdict
from typing import Annotated

import typer

from adapterhub_lite.cli.output import HomeOption, JsonOption, print_json, print_table, say


def doctor(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the database anew from the manifests.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what works on this machine, how to get what does not, and what is wrong in the registry.

    Exits with 1 when the registry has a problem. Example: `adapterhub-lite doctor --rebuild`
    """
    from adapterhub_lite.diagnosis import diagnose
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    rebuilt = registry.rebuild() if rebuild else None
    findings, report = diagnose(home), registry.examine()
    if as_json:
        print_json(
            {
                "machine": [finding.model_dump(mode="json") for finding in findings],
                "registry": asdict(report),
                "rebuilt": asdict(rebuilt) if rebuilt else None,
            }
        )
    else:
        print_table(
            "This machine",
            ("what", "works", "detail", "to get it"),
            [(f.what, "yes" if f.works else "no", f.detail, f.remedy or "-") for f in findings],
        )
        if rebuilt:
            say(f"The database was made anew: {rebuilt.versions} versions, {rebuilt.aliases} aliases.")
            for line in rebuilt.skipped:
                say(f"  left out: {line}")
        say(f"Registry: {report.versions} versions, {report.objects} files, {len(report.problems)} problems.")
        for line in (*report.problems, *report.notes):
            say(f"  {line}")
    if not report.healthy:
        raise typer.Exit(1)
