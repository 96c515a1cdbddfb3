"""What rows and passes hold beside the base is counted, refused where it does not fit, and given back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases import load_base_model, resolve_base
from adapterhub_lite.errors import ConfigurationError, ResourceError
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.adapters.sources import FolderSource
from adapterhub_lite.serving.adapters.weights import Part, read_adapter_weights
from adapterhub_lite.serving.model import runner as runner_module
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.runner import ForwardKind, ModelRunner
from tests.serving.model.families import build
from tests.serving.model.test_kinds import KINDS, made

IDS = [5, 70, 80, 90]


def rows_of(runner: ModelRunner, length: int) -> int:
    return max(count for count in range(runner.rows + 1) if runner.fits([length] * count))


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
def test_states_beside_keys_are_part_of_the_budget(family: str, tmp_path: Path, byte_tokenizer: Any) -> None:
    base = build(family, tmp_path, byte_tokenizer)
    runner = ModelRunner(load_base_model(base), rows=4, kind=ForwardKind.STACKED)
    runner.set_cache_budget(1 << 20)
    states = runner.state_bytes - runner.cache.nbytes
    assert states > 0 and runner.cache.budget == (1 << 20) - states
    most = rows_of(runner, 256)
    runner.set_cache_budget((1 << 20) + states)
    assert rows_of(runner, 256) >= most > 0
    for row in range(rows_of(runner, 16)):
        runner.admit(row, (), 16)
        runner.forward(pack([RowSlice(row, 0, IDS)], runner.device))
    assert runner.state_bytes <= (1 << 20) + states
    runner.close()
    with pytest.raises(ConfigurationError, match="not enough for 64 tokens"):
        InferenceEngine.from_base(base, dtype="float32", device="cpu", max_rows=4, cache_memory=states)


@pytest.fixture
def lean(tmp_path: Path, byte_tokenizer: Any) -> tuple[ModelRunner, Part]:
    """A lean runner in bf16, and an adapter that is computed apart."""
    base = build("qwen2", tmp_path / "base", byte_tokenizer)
    runner = ModelRunner(load_base_model(base, dtype=torch.bfloat16), rows=2, kind=ForwardKind.LEAN)
    files = FolderSource(resolve_base(base)).locate(made(base, tmp_path / "dora", KINDS["dora"]))
    weights = read_adapter_weights(
        files.weights, runner.families, files.scaling_of, max_rank=8, subject="a", config=files.config,
        structure=runner.structure,
    )  # fmt: skip
    return runner, Part(weights)


def answered(runner: ModelRunner, part: Part) -> torch.Tensor:
    runner.admit(0, (part,), 8)
    logits = runner.forward(pack([RowSlice(0, 0, IDS)], runner.device))
    runner.leave(0)
    return logits


def test_plain_weights_are_held_only_while_somebody_needs_them(lean: tuple[ModelRunner, Part]) -> None:
    runner, part = lean
    module: Any = runner.model.get_submodule("model.layers.0.mlp.down_proj")
    digest = runner.base_digest()
    assert module.weight.numel() == 0
    first = answered(runner, part)
    assert module.weight.numel() > 0
    runner.idle()
    assert module.weight.numel() == 0 and runner.base_digest() == digest
    torch.testing.assert_close(answered(runner, part), first, rtol=0, atol=0)
    runner.close()


def test_an_adapter_whose_copy_of_the_base_does_not_fit_is_refused_and_others_go_on(
    lean: tuple[ModelRunner, Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, part = lean
    monkeypatch.setattr(runner._pass, "_linears", [_Large()])
    monkeypatch.setattr(runner_module, "free_memory", lambda _: 1000)
    with pytest.raises(ResourceError, match=r"copy takes 1,001 bytes, and 1,000 are free"):
        runner.admit(0, (part,), 8)


class _Large:
    copied_bytes = dense_bytes = 1001


def test_the_reason_reaches_whoever_asked(tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("qwen2", tmp_path / "base", byte_tokenizer)
    folder = made(base, tmp_path / "dora", KINDS["dora"])
    with InferenceEngine.from_base(base, dtype="float32", device="cpu", max_rows=2) as engine:
        monkeypatch.setattr(type(engine._runner._pass), "copied_bytes", 1 << 50)
        with pytest.raises(ResourceError, match="a smaller --cache-memory"):
            engine.generate(GenerationRequest("a", adapter=folder, max_new_tokens=1))
        assert engine.generate(GenerationRequest("a", max_new_tokens=1)).token_ids
