"""Adapters on their way to a device: whole when they are handed over, whatever the size of the buffer, and one at a time."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.adapter_format.changes import Change, Target
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.adapters.copies import AdapterCopies
from adapterhub_lite.serving.adapters.weights import AdapterWeights, FamilyWeights


class LateLane:
    """A device that copies nothing before somebody waits for it: who reads too early reads what is not a number."""

    def __init__(self, nbytes: int) -> None:
        self.staging = torch.zeros(nbytes, dtype=torch.uint8)
        self.begun: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.waits = 0

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, math.nan, dtype=dtype)

    def copy(self, target: torch.Tensor, staged: torch.Tensor) -> None:
        assert staged.untyped_storage().data_ptr() == self.staging.untyped_storage().data_ptr(), "not pinned"
        self.begun.append((target, staged))

    def wait(self) -> None:
        self.waits += 1
        for target, staged in self.begun:
            target.copy_(staged)
        self.begun.clear()


def weights(seed: int) -> AdapterWeights:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    families = {
        "q": FamilyWeights((0, 2), random(2, 4, 9), random(2, 4, 7).transpose(1, 2), random(2, 1, 1)),
        "v": FamilyWeights((1,), random(1, 2, 9, dtype=torch.bfloat16), random(1, 2, 5).half(), random(1, 1, 1)),
    }
    target = Target("norm.weight", "saved", "norm", (11,))
    return AdapterWeights(families, 4, 4, extras=(Change(target, value=random(11)),))


@pytest.mark.parametrize("staging", [1, 7, 64, 1000, 1 << 20])
def test_what_is_handed_over_is_all_there(staging: int) -> None:
    lane = LateLane(staging)
    copies = AdapterCopies("cpu", lane)
    for seed in range(3):
        own = weights(seed)
        found = copies.copied(own)
        assert not lane.begun, "a copy has not ended"
        assert found.load_id == own.load_id and found.checksum() == own.checksum()
        assert all(ours is not theirs for ours, theirs in zip(found.tensors(), own.tensors(), strict=True))
    assert len(lane.staging) == staging


def test_two_at_once_do_not_share_the_buffer() -> None:
    copies = AdapterCopies("cpu", LateLane(40))
    own = [weights(seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(copies.copied, own))
    assert [one.checksum() for one in found] == [one.checksum() for one in own]


def test_a_copy_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    lane = LateLane(50)
    copies, own = AdapterCopies("cpu", lane), weights(1)
    real = lane.empty

    def short(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.bfloat16:
            raise torch.OutOfMemoryError("out of memory")
        return real(shape, dtype)

    monkeypatch.setattr(lane, "empty", short)
    with pytest.raises(torch.OutOfMemoryError):
        copies.copied(own)
    monkeypatch.undo()
    assert not lane.begun
    assert copies.copied(own).checksum() == own.checksum()


def test_the_engine_hands_its_adapters_over_by_it(
    tiny_base: Path, adapters: dict[str, Path], alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = LateLane(1 << 12)
    monkeypatch.setattr(AdapterCopies, "to", classmethod(lambda cls, device: cls(device, lane)))
    with InferenceEngine.from_base(tiny_base, dtype="float32", native=False) as engine:
        assert engine.load(adapters["wide"]).nbytes > 1 << 12
        assert lane.waits > 1 and not lane.begun
        answer = engine.generate(GenerationRequest(prompt="Once", adapter=adapters["wide"], max_new_tokens=8))
    assert answer.token_ids == alone.tokens("Once", adapters["wide"], new=8)
