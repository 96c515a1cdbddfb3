"""Xet transfers need a package of their own; where it is missing, tests say what `doctor` says."""

import pytest

from adapterhub_lite.diagnosis import diagnose


def need_xet() -> None:
    """Skip the test where Xet does not work, for the reason that `doctor` reports."""
    finding = next(finding for finding in diagnose() if finding.what == "hf_xet")
    if not finding.works:
        pytest.skip(f"hf_xet {finding.detail}. {finding.remedy}")
