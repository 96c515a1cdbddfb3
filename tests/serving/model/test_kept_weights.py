"""Quantised weights on disk: read instead of made at the next start, and never where they are not what was written."""

from pathlib import Path

import pytest
import torch

from adapterhub_lite.native import find_compiler
from adapterhub_lite.serving import InferenceEngine
from adapterhub_lite.serving.model.compiled import kept_weights, packed_weights
from adapterhub_lite.serving.model.compiled.packed_weights import QUANTISED, Precision

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")


def weights(base: Path, precision: Precision) -> dict[str, torch.Tensor]:
    """What an engine started now computes with."""
    with InferenceEngine.from_base(base, quantization=precision, device="cpu") as engine:
        return {name: tensor.clone() for name, tensor in engine._runner._pass.tensors().items()}


def forbid_quantising(monkeypatch: pytest.MonkeyPatch) -> None:
    for quantise in ("quantise_int8", "quantise_int4"):
        monkeypatch.setattr(packed_weights, quantise, lambda _: pytest.fail("quantised again"))


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("precision", QUANTISED)
def test_the_second_start_quantises_nothing(
    tiny_base: Path, home: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = weights(tiny_base, precision)
    forbid_quantising(monkeypatch)
    assert equal(weights(tiny_base, precision), first)
    assert len(list((home / "quantised").iterdir())) == 1


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("harm", ["a byte", "an end", "everything"])
def test_a_damaged_file_is_written_anew(
    tiny_base: Path, home: Path, precision: Precision, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = weights(tiny_base, precision)
    (file,) = (home / "quantised").iterdir()
    whole = file.read_bytes()
    middle = len(whole) * 2 // 3
    harmed = {"a byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "an end": whole[:middle]}
    file.write_bytes(harmed.get(harm, b""))
    assert equal(weights(tiny_base, precision), first)
    forbid_quantising(monkeypatch)
    assert equal(weights(tiny_base, precision), first)


def test_another_layout_or_precision_is_another_file(
    tiny_base: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = weights(tiny_base, "int8")
    weights(tiny_base, "int4")
    before = {file.name for file in (home / "quantised").iterdir()}
    assert len(before) == 2
    changed = tmp_path / "packed_weights.py"
    changed.write_text("another layout")
    monkeypatch.setattr(kept_weights.packed_weights, "__file__", str(changed))
    assert equal(weights(tiny_base, "int8"), first)
    after = {file.name for file in (home / "quantised").iterdir()}
    # The old layout's file of int8 is gone, that of int4, which nobody has started since, is left.
    assert len(after) == 2 and len(before & after) == 1


def test_a_home_that_cannot_be_written_serves_all_the_same(tiny_base: Path, home: Path) -> None:
    (home / "quantised").write_text("a file where the folder should be")
    assert weights(tiny_base, "int8")
