"""The compiled operations between the products against PyTorch's: odd widths, norms of both kinds, threads, odd numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.native import find_compiler
from adapterhub_lite.serving.model.elementwise import (
    ACTIVATIONS,
    Heads,
    NativeElementwise,
    Norm,
    TorchElementwise,
    Turn,
)
from adapterhub_lite.serving.model.kv_cache import Room
from adapterhub_lite.serving.model.native import compiled

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
WIDTHS = st.sampled_from([1, 2, 15, 16, 17, 33, 64, 96])


def native(threads: int) -> NativeElementwise:
    library = compiled()
    assert library is not None
    return NativeElementwise(library, threads=threads)


def no_further(found: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """In float32 equal to PyTorch's, in bfloat16 within one rounding of the truth."""
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(found.double(), truth, atol=1e-2, rtol=2**-7)


def norm_of(width: int, generator: torch.Generator, dtype: torch.dtype, *, less_one: bool) -> Norm:
    return Norm(torch.randn(width, generator=generator).to(dtype), 1e-5, less_one=less_one)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 9), width=WIDTHS, dtype=DTYPES, after=st.booleans(), norm=st.booleans(), delta=st.booleans(),
       less_one=st.booleans(), threads=st.sampled_from([1, 3]))  # fmt: skip
def test_residual_and_norm(
    rows: int, width: int, dtype: torch.dtype, after: bool, norm: bool, delta: bool, less_one: bool, threads: int
) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + width)
    x, d = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    norms = [norm_of(width, generator, dtype, less_one=less_one) if on else None for on in (after and delta, norm)]
    results = []
    for way, kind in (
        (native(threads), dtype),
        (TorchElementwise(dtype), dtype),
        (TorchElementwise(dtype), torch.double),
    ):
        wide = [None if one is None else Norm(one.exact.to(kind), one.epsilon) for one in norms]
        own = norms if kind == dtype else wide
        states = x.to(kind).clone()
        out = way.add_and_norm(states, d.to(kind) if delta else None, own[0], 0.5, own[1])
        results.append((states, out))
    for found, plain, truth in zip(*results, strict=True):
        no_further(found, plain, truth)


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(1, 6), query=st.integers(1, 5), kv=st.integers(1, 3), half=st.sampled_from([1, 5, 8, 16, 24, 32]),
       rest=st.sampled_from([0, 3, 16]), turned=st.booleans(), norms=st.sampled_from(["", "head", "all"]), dtype=DTYPES,
       threads=st.sampled_from([1, 3]))  # fmt: skip
def test_heads_are_normed_turned_and_stored(
    tokens: int, query: int, kv: int, half: int, rest: int, turned: bool, norms: str, dtype: torch.dtype, threads: int
) -> None:
    dim = 2 * half + rest
    generator = torch.Generator().manual_seed(tokens * 1000 + dim)
    qkv = torch.randn(tokens, query + 2 * kv, dim, generator=generator).to(dtype)
    angles = torch.rand(tokens, half, generator=generator).repeat(1, 2) * 6
    widths = {"": None, "head": (dim, dim), "all": (query * dim, kv * dim)}[norms]
    weights = [torch.randn(width, generator=generator).to(dtype) for width in widths or ()]
    results = []
    for way, kind in (
        (native(threads), dtype),
        (TorchElementwise(dtype), dtype),
        (TorchElementwise(dtype), torch.double),
    ):
        pair = [Norm(weight.to(kind), 1e-6) for weight in weights] or [None, None]
        room = Room(
            *torch.zeros(2, 2, 5, kv, dim, dtype=kind),
            *torch.randperm(10, generator=generator.manual_seed(1))[None, :tokens].repeat(2, 1),
        )
        cos, sin = (
            values.float() if kind == dtype else values for values in (angles.double().cos(), angles.double().sin())
        )
        turn = Turn(cos, sin) if turned else None
        queries = way.turn_and_store(qkv.to(kind).clone(), Heads(query, kv, dim, *pair), turn, room)
        results.append((queries, room.keys, room.values))
    for found, plain, truth in zip(*results, strict=True):
        no_further(found, plain, truth)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    width=WIDTHS,
    dtype=DTYPES,
    name=st.sampled_from(sorted(ACTIVATIONS)),
    spread=st.sampled_from([1, 40]),
)
def test_gates(rows: int, width: int, dtype: torch.dtype, name: str, spread: int) -> None:
    generator = torch.Generator().manual_seed(width)
    both = (torch.randn(rows, 2 * width, generator=generator) * spread).to(dtype)
    plain = TorchElementwise(dtype).gate(both.clone(), name)
    truth = TorchElementwise(dtype).gate(both.double(), name)
    no_further(native(2).gate(both, name), plain, truth)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_seen(odd: float, dtype: torch.dtype) -> None:
    """A row that overflowed must not come back as numbers; its neighbours are untouched."""
    way, norm = native(1), Norm(torch.ones(48), 1e-6)
    x = torch.ones(3, 48, dtype=dtype)
    x[1, 5] = odd
    out = way.add_and_norm(x, None, None, 1.0, norm)
    assert not out[1].isfinite().all() and out[[0, 2]].isfinite().all()
    if odd != odd:
        assert not way.gate(x, "silu")[1].isfinite().all()
