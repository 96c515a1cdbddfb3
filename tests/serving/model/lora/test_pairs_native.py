"""The compiled products against the plain ones of `TorchLora`: odd sizes, every dtype, blends, missing layers, threads."""

import logging
from pathlib import Path

import pytest
import torch

from adapterhub_lite.native import find_compiler
from adapterhub_lite.serving.adapters.weights import AdapterWeights, Family, FamilyWeights, Part, Parts
from adapterhub_lite.serving.model.compiled.library import compiled, row_products
from adapterhub_lite.serving.model.lora.pairs_native import NativeLora
from adapterhub_lite.serving.model.lora.pairs_torch import LoraBank, TorchLora
from adapterhub_lite.serving.model.packed_step import RowSlice, Step, pack

LAYERS = 3
# Sizes that no vector width divides; the families of a group share their input.
GROUPS = (
    (Family("q", 37, 51, ("a", "b", "c")), Family("k", 37, 19, ("a", "b", "c"))),
    (Family("o", 51, 37, ("a", "b", "c")),),
    (Family("up", 160, 96, ("a", "b", "c")),),
)
LENGTHS = (1, 1, 6, 3, 1, 2, 9)
products = row_products()
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")


def adapter(
    seed: int, ranks: dict[str, int], dtype: torch.dtype, layers: tuple[int, ...] = (0, 1, 2)
) -> AdapterWeights:
    made, generator = {}, torch.Generator().manual_seed(seed)
    for family in (family for group in GROUPS for family in group if family.name in ranks):
        rank, n = ranks[family.name], len(layers)
        a = torch.randn(n, rank, family.in_features, generator=generator).to(dtype)
        b = torch.randn(n, rank, family.out_features, generator=generator).to(dtype)
        made[family.name] = FamilyWeights(layers, a, b, torch.rand(n, 1, 1, generator=generator))
    return AdapterWeights(made, max(ranks.values()), len(made))


def rows_of(dtype: torch.dtype) -> list[Parts]:
    whole = adapter(1, {"q": 16, "k": 16, "o": 16, "up": 16}, dtype)
    odd = adapter(2, {"q": 3, "up": 7}, dtype)
    gaps = adapter(3, {"k": 5, "o": 1}, dtype, layers=(0, 2))
    return [
        (Part(whole),),
        (),
        (Part(odd),),
        (Part(gaps, 0.5),),
        (Part(whole, 0.7), Part(odd, -1.5), Part(gaps)),
        (Part(whole),),
        (Part(odd), Part(whole, 0.25)),
    ]


def deltas(bank: LoraBank, step: Step, dtype: torch.dtype) -> list[torch.Tensor]:
    made, generator = [], torch.Generator().manual_seed(9)
    bank.begin(step)
    for number, group in enumerate(GROUPS):
        for layer in range(LAYERS):
            x = torch.randn(len(step.token_ids), group[0].in_features, generator=generator).to(dtype)
            y = torch.randn(len(step.token_ids), sum(f.out_features for f in group), generator=generator).to(dtype)
            made.append(bank.add(number, layer, x, y))
    return made


@needs_compiler
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_products_are_the_plain_ones(weights: torch.dtype, dtype: torch.dtype, threads: int) -> None:
    assert products is not None
    step = pack([RowSlice(row, 0, [1] * length) for row, length in enumerate(LENGTHS)])
    banks: list[LoraBank] = [
        TorchLora(GROUPS, len(LENGTHS), dtype=torch.float32),
        NativeLora(GROUPS, len(LENGTHS), products, threads=threads),
    ]
    for bank in banks:
        for row, parts in enumerate(rows_of(weights)):
            bank.place(row, parts)
    truth, got = (deltas(bank, step, dtype) for bank in banks)
    # In bf16 both round the same sum once, so they differ by no more than its last place.
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2**-7}
    for one, other in zip(got, truth, strict=True):
        torch.testing.assert_close(one, other, **close)


@needs_compiler
def test_a_row_that_changes_or_leaves_is_seen_by_the_next_step() -> None:
    assert products is not None
    bank, step = NativeLora(GROUPS, 2, products), pack([RowSlice(0, 0, [1]), RowSlice(1, 0, [1])])
    first, second = (adapter(seed, {"o": 4}, torch.float32) for seed in (1, 2))
    seen = []
    for parts in ((Part(first),), (Part(second),), (), (Part(first),)):
        bank.place(0, parts)
        seen.append(torch.stack([y for y in deltas(bank, step, torch.float32) if y.shape[1] == 37]))
    bank.leave(0)
    seen.append(torch.stack([y for y in deltas(bank, step, torch.float32) if y.shape[1] == 37]))
    assert torch.equal(seen[0], seen[3]) and torch.equal(seen[2], seen[4])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert all(torch.equal(one[:, 1], seen[2][:, 1]) for one in seen), "the row of the base changed"


@pytest.mark.parametrize("way", ["no", "false", "garbage"])
def test_without_a_compiler_there_are_the_plain_products(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if way == "no":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        fake = tmp_path / "cc"
        garbage = '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho garbage > "$2"\n'
        fake.write_text("#!/bin/sh\nexit 1\n" if way == "false" else garbage)
        fake.chmod(0o755)
        monkeypatch.setenv("CC", str(fake))
    caplog.set_level(logging.INFO)
    assert compiled.__wrapped__() is None
    assert "PyTorch" in caplog.text
    monkeypatch.setenv("ADAPTERHUB_NATIVE", "0")
    assert compiled.__wrapped__() is None
