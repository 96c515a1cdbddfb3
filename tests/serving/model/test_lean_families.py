"""The lean pass is the model's own forward, for every family that is described: in pieces, in a batch, in both dtypes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapterhub_lite.bases import load_base_model
from adapterhub_lite.native import find_compiler
from adapterhub_lite.serving.model.lean_families import LEAN_FAMILIES, can_fuse
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.runner import ForwardKind, ModelRunner
from tests.serving.model.families import FAMILIES as BUILT
from tests.serving.model.families import build

FAMILIES = (
    "llama", "llama3rope", "qwen2", "qwen2_swa", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2",
    "olmo3", "granite", "smollm3", "seed_oss",
)  # fmt: skip
# Across a window of 16, and not.
LENGTHS = (40, 9, 23)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(290, (length,), generator=generator).tolist() for length in LENGTHS]


def logits_of(runner: ModelRunner) -> torch.Tensor:
    """The logits of the last seven tokens of each row, (rows, 7, vocabulary); all that comes before in two pieces."""
    rows = prompts()
    first, rest = [2] * len(rows), [len(ids) - 7 for ids in rows]
    runner.forward(pack([RowSlice(row, 0, ids[: first[row]]) for row, ids in enumerate(rows)]))
    for row, ids in enumerate(rows):
        if rest[row] > first[row]:
            runner.forward(pack([RowSlice(row, first[row], ids[first[row] : rest[row]])]))
    steps = []
    for at in range(7):
        slices = [RowSlice(row, rest[row] + at, ids[rest[row] + at :][:1]) for row, ids in enumerate(rows)]
        steps.append(runner.forward(pack(slices)))
    return torch.stack(steps, 1)


def own_logits(model: Any) -> torch.Tensor:
    """The same by the model's own forward, each row whole and alone."""
    return torch.stack([model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -7:] for ids in prompts()])


@pytest.fixture(params=["compiled", "torch"])
def native(request: pytest.FixtureRequest) -> bool:
    if request.param == "compiled" and find_compiler() is None:
        pytest.skip("no C compiler on this machine")
    return bool(request.param == "compiled")


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_models_own_forward(family: str, native: bool, tmp_path: Path, byte_tokenizer: Any) -> None:
    base = build(family, tmp_path, byte_tokenizer)
    own = load_base_model(base, dtype=torch.float32)
    exact, rounded = (load_base_model(base, dtype=torch.bfloat16) for _ in range(2))
    runner = ModelRunner(load_base_model(base, dtype=torch.float32), rows=3, native=native)
    assert runner.kind == ForwardKind.LEAN
    torch.testing.assert_close(logits_of(runner), own_logits(own), atol=1e-4, rtol=1e-4)
    # In bfloat16, no further from what the rounded weights give in float64 than the model itself.
    truth = own_logits(exact.double())
    theirs = (own_logits(rounded).double() - truth).square().mean().sqrt()
    found = ModelRunner(load_base_model(base, dtype=torch.bfloat16), rows=3, native=native)
    ours = (logits_of(found).double() - truth).square().mean().sqrt()
    assert ours <= 1.1 * theirs, (float(ours), float(theirs))


def test_every_lean_family_is_tried() -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    kinds = [type(AutoConfig.for_model(BUILT[name][0], **BUILT[name][1])) for name in FAMILIES]
    assert {MODEL_FOR_CAUSAL_LM_MAPPING[kind].__name__ for kind in kinds} == LEAN_FAMILIES


def test_a_layer_with_a_weight_that_the_description_leaves_out_is_not_lean(tiny_base: Path) -> None:
    model: Any = load_base_model(tiny_base)
    assert can_fuse(model)
    model.model.layers[1].self_attn.gate = nn.Linear(4, 4)
    assert not can_fuse(model)


def test_the_model_has_its_weights_back(tiny_base: Path) -> None:
    model = load_base_model(tiny_base, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ModelRunner(model, rows=1).close()
    assert before.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
