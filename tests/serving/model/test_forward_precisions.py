"""The compiled step as bf16, int8 and int4 against the plain pass in float32 over the same weights: odd sizes, long prompts, adapters."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub_lite.native import find_compiler
from adapterhub_lite.serving.adapters.weights import AdapterWeights, Family, FamilyWeights, Part, Parts
from adapterhub_lite.serving.model.compiled.packed_weights import QUANTISED, pack_weight, unpack_weight
from adapterhub_lite.serving.model.forward_native import MOST_QUERIES, NativeForward
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.runner import ForwardKind, ModelRunner

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite", "olmo2", "smollm3")
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 24},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
}
WRITTEN = 5
# What rounding rows to whole numbers, group by group, makes of the logits of two layers: relative to their spread.
ROUNDED_ROWS = 0.03


@dataclass(frozen=True)
class Case:
    """A base, what its rows ask, and how it is computed. `rows` are (tokens of the prompt, rank of the adapter or 0)."""

    kind: str
    heads: tuple[int, int]
    dim: int
    width: int
    inner: int
    vocabulary: int
    tied: bool
    window: int
    precision: str
    rows: tuple[tuple[int, int], ...]
    piece: int
    threads: int

    def model(self) -> Any:
        """The base in bfloat16, its biases and norms moved off their neutral values."""
        torch.manual_seed(3)
        heads, kv_heads = self.heads
        width = heads * (self.dim if self.kind in ("olmo2", "granite") else self.width)
        config = AutoConfig.for_model(
            self.kind, vocab_size=self.vocabulary, hidden_size=width, intermediate_size=self.inner, num_hidden_layers=2,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=self.dim, max_position_embeddings=2048,
            tie_word_embeddings=self.tied, initializer_range=0.5 / width**0.5, sliding_window=self.window,
            pad_token_id=None, **OWN.get(self.kind, {}),
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
        return model.to(torch.bfloat16).eval()

    def quantised(self, model: Any) -> Any:
        """The same base with the weights that this precision has of it, in float32."""
        model = copy.deepcopy(model).float()
        for name, module in model.named_modules():
            if self.precision in QUANTISED and isinstance(module, nn.Linear):
                kind = "int8" if name == "lm_head" else self.precision
                weight = module.weight.to(torch.bfloat16)
                # A tied embedding too: it is read from the head.
                module.weight.data = unpack_weight(pack_weight(weight, kind), kind, *weight.shape, torch.float32)
        return model


def adapter(families: tuple[Family, ...], rank: int) -> Parts:
    generator = torch.Generator().manual_seed(rank)

    def pairs(family: Family) -> FamilyWeights:
        count = len(family.paths)
        a = torch.randn(count, rank, family.in_features, generator=generator) / family.in_features**0.5
        b = torch.randn(count, rank, family.out_features, generator=generator) * 0.2 / rank**0.5
        return FamilyWeights(tuple(range(count)), a, b, torch.ones(count, 1, 1))

    made = {family.name: pairs(family) for family in families}
    return (Part(AdapterWeights(made, rank, sum(len(family.paths) for family in families))),)


def answers(runner: ModelRunner, case: Case, alone: int | None = None) -> list[torch.Tensor]:
    """The logits of each row's last tokens: prompts in pieces, then a token at a time; `alone` has one row ask by itself."""
    known = {}
    for row, (length, rank) in enumerate(case.rows):
        generator = torch.Generator().manual_seed(1000 * row + length)
        known[row] = torch.randint(case.vocabulary, (length + WRITTEN,), generator=generator).tolist()
        runner.admit(row, adapter(runner.families, rank) if rank else (), length + WRITTEN)
    if alone is not None:
        known = {alone: known[alone]}
    computed, found = dict.fromkeys(known, 0), {row: [] for row in known}
    while any(at < len(known[row]) for row, at in computed.items()):
        slices = []
        for row, ids in known.items():
            at, prompt = computed[row], case.rows[row][0]
            if at < len(ids):
                slices.append(RowSlice(row, at, ids[at : min(prompt, at + case.piece)] if at < prompt else [ids[at]]))
        for part, logits in zip(slices, runner.forward(pack(slices)), strict=True):
            computed[part.row] += len(part.token_ids)
            if computed[part.row] >= case.rows[part.row][0]:
                found[part.row].append(logits)
    return [torch.stack(found[row]) for row in known]


def error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The root mean square of a token's differences, relative to the spread of the logits: the median of all tokens.

    Not the mean: where two keys of a random model tie, any rounding, ours or torch's, decides what is attended.
    """
    one, other = torch.cat(found).double(), torch.cat(truth).double()
    return float((one - other).square().mean(-1).sqrt().median() / other.std())


def cases(longest: int) -> st.SearchStrategy[Case]:
    heads = st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 3), (5, 5)])
    rows = st.lists(st.tuples(st.integers(1, longest), st.sampled_from([0, 1, 3, 8, 17, 40])), min_size=1, max_size=4)
    return st.builds(
        Case, kind=st.sampled_from(KINDS), heads=heads, dim=st.sampled_from([6, 16, 34, 64, 80]), width=st.integers(3, 40),
        inner=st.integers(3, 200), vocabulary=st.integers(20, 400), tied=st.booleans(), window=st.sampled_from([5, 64, 4096]),
        precision=st.sampled_from(["bfloat16", *QUANTISED]), rows=rows.map(tuple), piece=st.sampled_from([3, 8, 9, 64, 300]),
        threads=st.sampled_from([1, 2]),
    )  # fmt: skip


@torch.inference_mode()
def check(case: Case) -> None:
    """The logits of a case are as near to the truth as its precision allows.

    No row's depend on its neighbours, bit for bit, nor on whether it computes one token at once or eight.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        model = case.model()
        truth = answers(ModelRunner(case.quantised(model), rows=4, kind=ForwardKind.LEAN, native=False), case)
        precision: Any = None if case.precision == "bfloat16" else case.precision
        runner = ModelRunner(copy.deepcopy(model), rows=4, kind=ForwardKind.LEAN, precision=precision)
        assert isinstance(runner._pass, NativeForward)
        found = answers(runner, case)
        for row in range(len(case.rows)):
            assert torch.equal(answers(runner, case, alone=row)[0], found[row])
        if case.piece <= MOST_QUERIES:
            assert all(map(torch.equal, answers(runner, replace(case, piece=1)), found))
        if precision is not None:
            assert error(found, truth) < ROUNDED_ROWS
            return
        plain = answers(ModelRunner(model, rows=4, kind=ForwardKind.LEAN, native=False), case)
        assert error(found, truth) <= 1.1 * error(plain, truth)
    finally:
        torch.set_num_threads(threads)


@settings(deadline=None, max_examples=8)
@given(case=cases(60))
def test_each_precision_is_as_near_to_the_truth_as_it_can_be(case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(case=cases(60), length=st.integers(513, 700), rank=st.sampled_from([0, 5, 24]))
def test_so_are_long_prompts_in_pieces(case: Case, length: int, rank: int) -> None:
    check(replace(case, rows=((length, rank), *case.rows[:3]), piece=max(case.piece, 64)))
