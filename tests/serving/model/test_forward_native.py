"""The compiled step against the lean pass in PyTorch: odd heads and widths, prompts and single tokens mixed, adapters."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from adapterhub_lite.native import find_compiler
from adapterhub_lite.serving.adapters.weights import Part
from adapterhub_lite.serving.model.forward_native import NativeForward
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.proof import random_adapter
from adapterhub_lite.serving.model.runner import ForwardKind, ModelRunner

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")
VOCABULARY = 97


def runner_of(
    native: bool, *, dtype: torch.dtype = torch.float32, window: int | None = None, **sizes: Any
) -> ModelRunner:
    torch.manual_seed(3)
    common: Any = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 4096, **sizes}
    model: Any
    if window is None:
        model = LlamaForCausalLM(LlamaConfig(**common))
    else:
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=window))
    runner = ModelRunner(model.to(dtype).eval(), rows=4, kind=ForwardKind.LEAN, native=native)
    assert isinstance(runner._pass, NativeForward) == native
    return runner


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@settings(deadline=None, max_examples=40)
@given(heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (5, 5)]), dim=st.sampled_from([2, 6, 16, 34, 64]),
       width=st.sampled_from([7, 12]), inner=st.integers(3, 70), tied=st.booleans(), bias=st.booleans(),
       window=st.sampled_from([None, 5, 40]), lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
       pieces=st.integers(1, 50), adapters=st.booleans(), threads=st.sampled_from([1, 2]))  # fmt: skip
@torch.inference_mode()
def test_steps_of_any_shape_are_those_of_the_plain_pass(
    heads: tuple[int, int], dim: int, width: int, inner: int, tied: bool, bias: bool, window: int | None,
    lengths: list[int], pieces: int, adapters: bool, threads: int,
) -> None:  # fmt: skip
    """Each row reads its prompt in pieces of its own; rows that are done write a token in every step meanwhile."""
    sizes: Any = {
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": dim, "hidden_size": width * heads[0],
        "intermediate_size": inner, "tie_word_embeddings": tied,
    }  # fmt: skip
    if window is None:
        sizes["attention_bias"] = bias
    runners = [runner_of(native, window=window, **sizes) for native in (True, False)]
    parts = [(), (), (), ()]
    if adapters:
        generator = torch.Generator().manual_seed(1)
        parts[0] = (Part(random_adapter(runners[0].families, runners[0].model, generator)),)
        if len(lengths) > 2:
            parts[2] = (*parts[0], Part(random_adapter(runners[0].families, runners[0].model, generator), 0.5))
    known = [tokens(length + 12, length) for length in lengths]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for runner in runners:
            for row in range(len(lengths)):
                runner.admit(row, parts[row], 128)
        computed = [0] * len(lengths)
        for _ in range(8):
            slices = []
            for row, ids in enumerate(known):
                left = lengths[row] - computed[row]
                count = min(left, pieces + row) if left > 0 else 1
                slices.append(RowSlice(row, computed[row], ids[computed[row] : computed[row] + count], min(count, 2)))
                computed[row] += count
            found, plain = (runner.forward(pack(slices)) for runner in runners)
            scale = float(plain.abs().max())
            torch.testing.assert_close(found, plain, atol=2e-5 * scale + 1e-6, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_a_long_prompt_of_bfloat16_is_no_further_from_the_truth() -> None:
    sizes: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96}
    ids = tokens(700, 1)
    native, plain = (runner_of(way, dtype=torch.bfloat16, **sizes) for way in (True, False))
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=4096, **sizes)
    ).to(torch.bfloat16)
    truth = model.double()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -5:]
    errors = []
    for runner in (native, plain):
        runner.admit(0, (), 700)
        runner.forward(pack([RowSlice(0, 0, ids[:300])]))
        found = runner.forward(pack([RowSlice(0, 300, ids[300:], 5)]))
        errors.append(float((found.double() - truth).square().mean().sqrt()))
    assert errors[0] <= 1.05 * errors[1]


@torch.inference_mode()
def test_rows_keep_to_themselves() -> None:
    """A row's logits are the same, bit for bit, whatever its neighbours are, where it computes as many tokens."""
    runner = runner_of(True, dtype=torch.bfloat16, num_attention_heads=4, hidden_size=64, intermediate_size=96)
    ids = tokens(60, 2)
    for row in range(3):
        runner.admit(row, (), 128)
    alone = runner.forward(pack([RowSlice(0, 0, ids)]))
    runner.cache.spoil(0)
    beside = runner.forward(pack([RowSlice(0, 0, ids), RowSlice(1, 0, tokens(33, 4)), RowSlice(2, 0, [5])]))
    assert torch.equal(alone[0], beside[0])


@torch.inference_mode()
def test_a_token_that_overflows_is_seen_in_its_row() -> None:
    runner = runner_of(True, dtype=torch.bfloat16, num_attention_heads=4, hidden_size=64, intermediate_size=96)
    runner.model.get_input_embeddings().weight[13] = float("inf")  # type: ignore[operator, index]
    for row in range(2):
        runner.admit(row, (), 64)
    found = runner.forward(pack([RowSlice(0, 0, [13, 4]), RowSlice(1, 0, [5, 6, 7])]))
    assert not found[0].isfinite().all() and found[1].isfinite().all()
