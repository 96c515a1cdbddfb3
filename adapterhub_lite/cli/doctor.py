"""`doctor`: what this machine can do, what it cannot and how to get it."""

from adapterhub_lite.cli.output import HomeOption, JsonOption, print_json, print_table


def doctor(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Say what works on this machine and, for what does not, how to get it.

    Example: `adapterhub-lite doctor`
    """
    from adapterhub_lite.diagnosis import diagnose

    findings = diagnose(home)
    if as_json:
        return print_json([finding.model_dump(mode="json") for finding in findings])
    print_table(
        "This machine",
        ("what", "works", "detail", "to get it"),
        [(f.what, "yes" if f.works else "no", f.detail, f.remedy or "-") for f in findings],
    )
