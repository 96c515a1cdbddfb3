"""Products with packed weights against the plain product in float64: odd sizes, few rows and many, threads, each precision."""

import ctypes
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapterhub_lite.native import find_compiler, load_compiled
from adapterhub_lite.serving.model.compiled.library import SOURCES, StepFunctions
from adapterhub_lite.serving.model.compiled.packed_weights import (
    QUANTISED,
    TOGETHER,
    PackedLinear,
    pack_weight,
    unpack_weight,
)

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")
PRECISIONS = st.sampled_from(["float32", "bfloat16", "int8", "int4"])


@cache
def functions(*flags: str) -> StepFunctions:
    """The compiled code; `-DPORTABLE` leaves out what only some processors have."""
    library = load_compiled(SOURCES, *flags)
    assert library is not None
    return StepFunctions(library)


def linear(outputs: int, inputs: int, precision: str, *, bias: bool, seed: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    made = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float32 if precision == "float32" else torch.bfloat16)
    made.weight.data = torch.randn(outputs, inputs, generator=generator).to(made.weight.dtype)
    if bias:
        made.bias.data = torch.randn(outputs, generator=generator).to(made.weight.dtype)
    return made.requires_grad_(False)


def met(x: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as the weights are met with, in float64: rounded to bfloat16, or to whole numbers of a group's scale.

    And how far another rounding may be off: a number half-way between two may become either.
    """
    if precision not in QUANTISED:
        exact = (x if precision == "float32" else x.bfloat16()).double()
        return exact, torch.zeros_like(exact)
    group = TOGETHER[precision]
    padded = nn.functional.pad(x, (0, -x.shape[1] % group)).view(x.shape[0], -1, group)
    scales = padded.abs().amax(-1, keepdim=True) / 127
    numbers = padded * torch.where(scales > 0, 127 / padded.abs().amax(-1, keepdim=True), 0)
    half_way = ((numbers - numbers.floor()) - 0.5).abs() < 1e-4
    both = numbers.round().double() * scales.double(), half_way * scales.double()
    return both[0].view(x.shape[0], -1)[:, : x.shape[1]], both[1].view(x.shape[0], -1)[:, : x.shape[1]]


@settings(deadline=None, max_examples=120)
@given(rows=st.integers(1, 40), inputs=st.integers(1, 200), outputs=st.integers(1, 130), precision=PRECISIONS,
       bias=st.booleans(), threads=st.sampled_from([1, 2]), portable=st.booleans())  # fmt: skip
def test_a_product_is_the_plain_one(
    rows: int, inputs: int, outputs: int, precision: str, bias: bool, threads: int, portable: bool
) -> None:
    own = linear(outputs, inputs, precision, bias=bias, seed=inputs * outputs)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
    x[0, : inputs // 2] = 0
    packed = PackedLinear({"l": own}, precision=precision if precision in QUANTISED else None, release=False)  # type: ignore[arg-type]
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = packed.multiply(x, functions(*(["-DPORTABLE"] if portable else [])))
    finally:
        torch.set_num_threads(threads_before)
    weight = own.weight.double()
    if precision in QUANTISED:
        weight = unpack_weight(pack_weight(own.weight, precision), precision, outputs, inputs, torch.float64)
    rows_met, doubt = met(x, precision)
    truth = rows_met @ weight.T + (own.bias.double() if bias else 0)
    allowed = 2e-5 * inputs**0.5 * 4 + 1e-5 * truth.abs() + doubt @ weight.abs().T
    assert (found.double() - truth).abs().le(allowed).all()


@settings(deadline=None, max_examples=60)
@given(inputs=st.integers(1, 200), outputs=st.integers(1, 130), precision=PRECISIONS)
def test_packed_weights_are_the_weights(inputs: int, outputs: int, precision: str) -> None:
    own = linear(outputs, inputs, precision, bias=False, seed=inputs + outputs).weight
    back = unpack_weight(pack_weight(own, precision), precision, outputs, inputs, own.dtype)
    if precision not in QUANTISED:
        assert torch.equal(back, own)
        return
    group = TOGETHER[precision]
    padded = nn.functional.pad(own.float(), (0, -inputs % group)).view(outputs, -1, group)
    top, low = padded.amax(-1, keepdim=True), padded.amin(-1, keepdim=True)
    step = torch.maximum(top, -low) / 127 if precision == "int8" else (top - low) / 15
    errors = (nn.functional.pad(back.float(), (0, -inputs % group)).view_as(padded) - padded).square().mean(-1).sqrt()
    # A plain grid of that step is off by half a step at most; the scale's own rounding and bfloat16's come on top.
    assert (errors <= step[..., 0] * 0.52 + padded.abs().amax(-1) * 2**-8 + 1e-7).all()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_that_lie_on_a_grid_are_kept(precision: str) -> None:
    """A base that was made from a quantised file comes back to its numbers."""
    generator = torch.Generator().manual_seed(0)
    shape = (40, 128 // TOGETHER[precision], TOGETHER[precision])
    scales = torch.rand(*shape[:2], 1, generator=generator).half().float() + 0.5
    if precision == "int8":
        numbers = torch.randint(-127, 128, shape, generator=generator)
        numbers[..., 0] = 127
        weight = numbers * scales
    else:
        numbers = torch.randint(0, 16, shape, generator=generator)
        numbers[..., 0], numbers[..., 1] = 0, 15
        weight = numbers * scales.half() - torch.rand(*shape[:2], 1, generator=generator).half() * 8
    weight = weight.float().view(40, -1)
    back = unpack_weight(pack_weight(weight, precision), precision, 40, 128, torch.float32)
    torch.testing.assert_close(back, weight, atol=2e-2 if precision == "int4" else 1e-1, rtol=1e-3)


def test_weights_of_nothing_and_rows_of_nothing() -> None:
    own = nn.Linear(70, 40, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    own.weight.data.zero_()
    for precision in QUANTISED:
        packed = PackedLinear({"l": own}, precision=precision, release=False)  # type: ignore[arg-type]
        assert torch.equal(packed.multiply(torch.randn(3, 70), functions()), torch.zeros(3, 40))
    some = PackedLinear({"l": linear(40, 70, "int8", bias=False, seed=1)}, precision="int8", release=False)
    assert torch.equal(some.multiply(torch.zeros(3, 70), functions()), torch.zeros(3, 40))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_in_its_row_alone(precision: str, odd: float) -> None:
    packed = PackedLinear({"l": linear(33, 20, precision, bias=False, seed=2)}, release=False)
    x = torch.ones(6, 20)
    x[4, 3] = odd
    found = packed.multiply(x, functions())
    assert not found[4].isfinite().any() and found[[0, 1, 2, 3, 5]].isfinite().all()


def test_the_modules_have_their_weights_back() -> None:
    layers = {name: linear(outputs, 48, "bfloat16", bias=True, seed=outputs) for name, outputs in (("a", 5), ("b", 40))}
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    packed = PackedLinear(layers)
    assert all(layer.weight.numel() == 0 for layer in layers.values())
    packed.give_back()
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())


def test_layers_of_which_only_some_have_a_bias() -> None:
    layers = {
        name: linear(outputs, 48, "float32", bias=name != "b", seed=outputs)
        for name, outputs in (("a", 33), ("b", 7), ("c", 40))
    }
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([layer(x) for layer in layers.values()], 1)
    packed = PackedLinear(layers)
    torch.testing.assert_close(packed.multiply(x, functions()), expected)
    assert {name for name in packed.tensors() if name.endswith("bias")} == {"a.bias", "c.bias"}


def test_structures_are_as_long_as_in_c() -> None:
    from adapterhub_lite.serving.model import forward_native

    library = load_compiled(SOURCES)
    assert library is not None
    sizes = (ctypes.c_size_t * 4).in_dll(library, "structure_sizes")
    own = (forward_native._Layer, forward_native._Routing, forward_native._Span, forward_native._Step)
    assert list(sizes) == [ctypes.sizeof(one) for one in own]
