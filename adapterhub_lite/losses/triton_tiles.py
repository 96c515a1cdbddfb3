"""The passes of `passes` over tiles that never leave the GPU's registers, in Triton. Imported only where they are used.

The formulas are those of `passes`; only the order of the work is another (Cut Cross-Entropy, arXiv:2411.09009, has the
idea). A program owns some tokens, or some rows of the head, and walks over the others one tile of logits at a time, so that
what it sums is its own: nothing is added atomically, and the same tokens give the same bits. Where only the hidden states
are trained, loss and gradient come from one walk, two products instead of the three of a forward and a backward pass.

If `LossOptions.gradient_filter` is not 0, the gradient's products are left out for tiles in which no probability reaches
it, so that the gradient by any logit is off by less than it. The rows of a block are then taken in the order of their mean
logit, so that such tiles come together.

`TRITON_INTERPRET=1` runs all of it on a CPU, as the tests do.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from adapterhub_lite import devices
from adapterhub_lite.losses.problem import Block, Gradients, Problem, TokenStatistics
from adapterhub_lite.losses.tiles import HALF_LIFT

MOST_PARTIAL = 2**28
"""Elements of partial gradients that splitting the vocabulary may take: 1 GiB in fp32."""


ROOMY = 160 * 2**10
"""Bytes of shared memory to a block from which a step of a product takes `Tile.roomy_columns`."""


@dataclass(frozen=True)
class Tile:
    """Sides of a tile: tokens, rows of the head, and the columns of a product's step; warps to a program, and stages.

    Compiled for capabilities 8.0, 8.9 and 9.0 it needs no more registers than there are; see the tests."""

    tokens: int = 128
    rows: int = 128
    columns: int = 32
    roomy_columns: int = 64
    warps: int = 8
    stages: int = 3


TILE = Tile()


@triton.jit
def _logits(
    hidden: tl.tensor, rows: tl.tensor, bias: tl.tensor, n: tl.tensor, v: tl.tensor, has_n: tl.tensor,
    has_v: tl.tensor, COLUMNS: tl.tensor, hidden_stride: tl.tensor, rows_stride: tl.tensor, scale: tl.tensor,
    cap: tl.tensor, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, WIDEN: tl.constexpr, STEP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Scaled, capped logits of tokens n against rows v, in fp32."""
    tile = tl.zeros((n.shape[0], v.shape[0]), tl.float32)
    for start in range(0, COLUMNS, STEP):
        d = start + tl.arange(0, STEP)
        has_d = d < COLUMNS
        left = tl.load(
            hidden + n[:, None] * hidden_stride + d[None, :], mask=has_n[:, None] & has_d[None, :], other=0.0
        )
        right = tl.load(rows + v[None, :] * rows_stride + d[:, None], mask=has_v[None, :] & has_d[:, None], other=0.0)
        tile = _product(left, right, tile, WIDEN)
    if HAS_BIAS:
        tile += tl.load(bias + v, mask=has_v, other=0.0).to(tl.float32)[None, :]
    tile *= scale
    if HAS_CAP:
        tile = cap * (2.0 * tl.sigmoid(2.0 * tile / cap) - 1.0)
    return tile


@triton.jit
def _product(left: tl.tensor, right: tl.tensor, total: tl.tensor, WIDEN: tl.constexpr) -> tl.tensor:
    """total + left @ right; the interpreter multiplies bf16 as integers, so that there both are widened."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _add_product(
    total: tl.tensor, narrow: tl.tensor, factor: tl.tensor, source: tl.tensor, own: tl.tensor, other: tl.tensor,
    has_own: tl.tensor, has_other: tl.tensor, COLUMNS: tl.tensor, total_stride: tl.tensor,
    source_stride: tl.tensor, SCALED: tl.constexpr, WIDEN: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """total[own] = total[own] * factor + narrow @ source[other], in steps over the columns."""
    for start in range(0, COLUMNS, STEP):
        d = start + tl.arange(0, STEP)
        has_d = d < COLUMNS
        values = tl.load(
            source + other[:, None] * source_stride + d[None, :], mask=has_other[:, None] & has_d[None, :], other=0.0
        )
        place = total + own[:, None] * total_stride + d[None, :]
        mask = has_own[:, None] & has_d[None, :]
        before = tl.load(place, mask=mask, other=0.0)
        if SCALED:
            before *= factor[:, None]
        tl.store(place, _product(narrow, values, before, WIDEN), mask=mask)


@triton.jit
def _first(
    hidden: tl.tensor, rows: tl.tensor, bias: tl.tensor, order: tl.tensor, targets: tl.tensor,
    largest: tl.tensor, exponentials: tl.tensor, logits: tl.tensor, gradient: tl.tensor, N: tl.tensor,
    V: tl.tensor, COLUMNS: tl.tensor, hidden_stride: tl.tensor, rows_stride: tl.tensor, scale: tl.tensor,
    cap: tl.tensor, lift: tl.tensor, least: tl.tensor, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    ORDERED: tl.constexpr, SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """Add a block of the head to the sums of the first pass. Grid: (tokens, shares of the block)."""
    n = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    has_n = n < N
    mine = tl.program_id(1).to(tl.int64) * N + n
    target = tl.load(targets + n, mask=has_n, other=-1)
    top = tl.load(largest + mine, mask=has_n, other=0.0)
    sums = tl.load(exponentials + mine, mask=has_n, other=0.0)
    for start in range(tl.program_id(1) * ROWS, V, tl.num_programs(1) * ROWS):
        v = (start + tl.arange(0, ROWS)).to(tl.int64)
        has_v = v < V
        if ORDERED:
            v = tl.load(order + v, mask=has_v, other=0)
        tile = _logits(
            hidden, rows, bias, n, v, has_n, has_v, COLUMNS, hidden_stride, rows_stride,
            scale, cap, HAS_BIAS, HAS_CAP, WIDEN, STEP,
        )  # fmt: skip
        if SMOOTHED:
            sum_of_logits = tl.sum(tl.where(has_v[None, :], tile, 0.0), 1)
            tl.store(logits + mine, tl.load(logits + mine, mask=has_n, other=0.0) + sum_of_logits, mask=has_n)
        counted = has_v[None, :] & (v[None, :] != target[:, None])
        raised = tl.maximum(top, tl.max(tl.where(counted, tile, float("-inf")), 1))
        shrink = tl.exp(top - raised)
        top = raised
        powers = tl.where(counted, tl.exp(tile - top[:, None]), 0.0)
        sums = sums * shrink + tl.sum(powers, 1)
        if GRADIENT:
            # A probability is at most its power over the sum so far.
            share = tl.max(powers, 1) / tl.maximum(sums, 1e-30)
            if tl.max(tl.where(has_n, share, 0.0)) >= least:
                if HAS_CAP:
                    powers *= 1.0 - (tile / cap) * (tile / cap)
                narrow = (powers * lift).to(rows.dtype.element_ty)
                _add_product(
                    gradient, narrow, shrink, rows, mine, v, has_n, has_v, COLUMNS, COLUMNS, rows_stride,
                    True, WIDEN, STEP,
                )  # fmt: skip
    tl.store(largest + mine, top, mask=has_n)
    tl.store(exponentials + mine, sums, mask=has_n)


@triton.jit
def _gradient_tile(
    tile: tl.tensor, counted: tl.tensor, factor: tl.tensor, logsumexp: tl.tensor, upstream: tl.tensor,
    cap: tl.tensor, even: tl.tensor, HAS_CAP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """upstream slope_j dloss/dl_j of a tile of logits, 0 for the targets."""
    of_tile = factor[:, None] * tl.exp(tile - logsumexp[:, None]) - even
    if HAS_CAP:
        of_tile *= 1.0 - (tile / cap) * (tile / cap)
    return tl.where(counted, of_tile * upstream[:, None], 0.0)


@triton.jit
def _second_hidden(
    hidden: tl.tensor, rows: tl.tensor, bias: tl.tensor, order: tl.tensor, targets: tl.tensor,
    logsumexp: tl.tensor, factor: tl.tensor, upstream: tl.tensor, gradient: tl.tensor, N: tl.tensor,
    V: tl.tensor, COLUMNS: tl.tensor, hidden_stride: tl.tensor, rows_stride: tl.tensor, scale: tl.tensor,
    cap: tl.tensor, even: tl.tensor, least: tl.tensor, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    ORDERED: tl.constexpr, WIDEN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """Add a block of the head to the gradient of the hidden states. Grid: (tokens, shares of the block)."""
    n = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    has_n = n < N
    mine = tl.program_id(1).to(tl.int64) * N + n
    target = tl.load(targets + n, mask=has_n, other=-1)
    lse = tl.load(logsumexp + n, mask=has_n, other=0.0)
    weight = tl.load(upstream + n, mask=has_n, other=0.0)
    of_lse = tl.load(factor + n, mask=has_n, other=0.0)
    for start in range(tl.program_id(1) * ROWS, V, tl.num_programs(1) * ROWS):
        v = (start + tl.arange(0, ROWS)).to(tl.int64)
        has_v = v < V
        if ORDERED:
            v = tl.load(order + v, mask=has_v, other=0)
        tile = _logits(
            hidden, rows, bias, n, v, has_n, has_v, COLUMNS, hidden_stride, rows_stride,
            scale, cap, HAS_BIAS, HAS_CAP, WIDEN, STEP,
        )  # fmt: skip
        counted = has_n[:, None] & has_v[None, :] & (v[None, :] != target[:, None])
        if tl.max(tl.where(counted, tl.exp(tile - lse[:, None]), 0.0)) >= least:
            tile = _gradient_tile(tile, counted, of_lse, lse, weight, cap, even, HAS_CAP)
            narrow = tile.to(rows.dtype.element_ty)
            _add_product(
                gradient, narrow, lse, rows, mine, v, has_n, has_v, COLUMNS, COLUMNS, rows_stride, False, WIDEN, STEP
            )


@triton.jit
def _second_rows(
    hidden: tl.tensor, rows: tl.tensor, bias: tl.tensor, inputs: tl.tensor, targets: tl.tensor,
    logsumexp: tl.tensor, factor: tl.tensor, upstream: tl.tensor, gradient: tl.tensor, bias_gradient: tl.tensor,
    N: tl.tensor, V: tl.tensor, COLUMNS: tl.tensor, hidden_stride: tl.tensor, rows_stride: tl.tensor,
    WIDTH: tl.tensor, inputs_stride: tl.tensor, scale: tl.tensor, cap: tl.tensor, even: tl.tensor,
    least: tl.tensor, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, OF_ROWS: tl.constexpr,
    OF_BIAS: tl.constexpr, WIDEN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """The gradients of a block of the head, of its rows by `inputs` (N, WIDTH) and of its bias. Grid: (rows,)."""
    v = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    has_v = v < V
    of_bias = tl.zeros((ROWS,), tl.float32)
    for start in range(0, N, TOKENS):
        n = (start + tl.arange(0, TOKENS)).to(tl.int64)
        has_n = n < N
        target = tl.load(targets + n, mask=has_n, other=-1)
        lse = tl.load(logsumexp + n, mask=has_n, other=0.0)
        weight = tl.load(upstream + n, mask=has_n, other=0.0)
        of_lse = tl.load(factor + n, mask=has_n, other=0.0)
        tile = _logits(
            hidden, rows, bias, n, v, has_n, has_v, COLUMNS, hidden_stride, rows_stride,
            scale, cap, HAS_BIAS, HAS_CAP, WIDEN, STEP,
        )  # fmt: skip
        counted = has_n[:, None] & has_v[None, :] & (v[None, :] != target[:, None])
        if tl.max(tl.where(counted, tl.exp(tile - lse[:, None]), 0.0)) >= least:
            tile = _gradient_tile(tile, counted, of_lse, lse, weight, cap, even, HAS_CAP)
            of_bias += tl.sum(tile, 0)
            if OF_ROWS:
                narrow = tl.trans(tile).to(rows.dtype.element_ty)
                _add_product(
                    gradient,
                    narrow,
                    of_bias,
                    inputs,
                    v,
                    n,
                    has_v,
                    has_n,
                    WIDTH,
                    WIDTH,
                    inputs_stride,
                    False,
                    WIDEN,
                    STEP,
                )
    if OF_BIAS:
        tl.store(bias_gradient + v, of_bias, mask=has_v)


class SharedSums:
    """The sums of the first pass by kernels, each program's share of the vocabulary apart until `joined`.

    The gradient of the hidden states is summed into `hidden_gradient` (n, D), which begins as zeros, unless it is None."""

    def __init__(self, problem: Problem, hidden_gradient: Tensor | None) -> None:
        self.problem, self.hidden_gradient = problem, hidden_gradient
        tokens, columns = problem.hidden.shape
        self.shares = share_count(tokens, columns, problem.device)
        self.largest = problem.zeros(self.shares, tokens).fill_(torch.finfo(problem.wide).min)
        self.exponentials = problem.zeros(self.shares, tokens)
        self.logits = problem.zeros(self.shares, tokens)
        apart = hidden_gradient is not None and self.shares > 1
        self.gradients = problem.zeros(self.shares, tokens, columns) if apart else hidden_gradient

    def add(self, block: Block) -> None:
        """Add all tokens against the block."""
        problem, options = self.problem, self.problem.options
        wanted = self.gradients is not None
        call = _Call(problem, block, filtered=wanted)
        _first[call.grid(len(problem.hidden), TILE.tokens, self.shares)](
            *call.head, call.order, call.targets, self.largest, self.exponentials, self.logits,
            self.gradients if wanted else self.largest,
            *call.sizes, options.logit_scale, call.cap, call.lift, call.least,
            SMOOTHED=bool(options.label_smoothing), GRADIENT=wanted, ORDERED=call.ordered, **call.constants,
        )  # fmt: skip

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """The largest logits, the sums of exponentials relative to them, and the sums of logits, (n,) each."""
        largest = self.largest.amax(0)
        factors = torch.exp(self.largest - largest)
        if self.hidden_gradient is not None and self.gradients is not None and self.shares > 1:
            for share, factor in zip(self.gradients, factors, strict=True):
                self.hidden_gradient.addcmul_(share, factor[:, None])
        return largest, (self.exponentials * factors).sum(0), self.logits.sum(0)


class BlockGradients:
    """The second pass by kernels: gradients of all but the targets, weighted by `upstream` (n,)."""

    def __init__(self, problem: Problem, statistics: TokenStatistics, upstream: Tensor) -> None:
        options = problem.options
        self.problem = problem
        self.tokens = (
            statistics.logsumexp,
            (1 + 2 * options.z_loss * statistics.logsumexp).contiguous(),
            (upstream * options.logit_scale).contiguous(),
        )
        self.even = options.label_smoothing / problem.vocabulary

    def add(self, block: Block, found: Gradients, inputs: Tensor) -> None:
        """Add a block's part to what is asked for; `inputs` (n, d) are the columns by which its rows are trained."""
        if found.hidden is not None:
            self._add_hidden(block, found.hidden)
        if found.rows is not None or found.bias is not None:
            self._set_rows(block, inputs, found.rows, found.bias)

    def _add_hidden(self, block: Block, gradient: Tensor) -> None:
        problem, call = self.problem, _Call(self.problem, block, filtered=True)
        shares = share_count(len(gradient), gradient.shape[1], problem.device)
        partial = problem.zeros(shares, *gradient.shape) if shares > 1 else gradient
        _second_hidden[call.grid(len(problem.hidden), TILE.tokens, shares)](
            *call.head, call.order, call.targets, *self.tokens, partial,
            *call.sizes, problem.options.logit_scale, call.cap, self.even, call.least, ORDERED=call.ordered, **call.constants,
        )  # fmt: skip
        if shares > 1:
            gradient += partial.sum(0)

    def _set_rows(self, block: Block, inputs: Tensor, rows: Tensor | None, bias: Tensor | None) -> None:
        problem, call = self.problem, _Call(self.problem, block, filtered=True)
        unused = self.tokens[0]
        _second_rows[call.grid(len(block.weight), TILE.rows)](
            *call.head, inputs, call.targets, *self.tokens, unused if rows is None else rows, unused if bias is None else bias,
            *call.sizes, inputs.shape[1], inputs.stride(0), problem.options.logit_scale, call.cap, self.even, call.least,
            OF_ROWS=rows is not None, OF_BIAS=bias is not None, **call.constants,
        )  # fmt: skip


def share_count(tokens: int, columns: int, device: torch.device) -> int:
    """Into how many shares the vocabulary is split so that few tokens, too, keep every multiprocessor busy."""
    processors = devices.multiprocessors(device)
    if processors is None:
        return 1
    wanted = 2 * processors
    programs = -(-tokens // TILE.tokens)
    return max(1, min(wanted // programs, MOST_PARTIAL // max(1, tokens * columns)))


class _Call:
    """What the kernels are given of a problem and a block of its head."""

    def __init__(self, problem: Problem, block: Block, *, filtered: bool) -> None:
        options, hidden, rows = problem.options, _rows_in_line(problem.hidden), _rows_in_line(block.weight)
        self.head = (hidden, rows, rows if block.bias is None else block.bias)
        self.targets = problem.targets - block.columns.start
        self.sizes = (len(hidden), len(rows), hidden.shape[1], hidden.stride(0), rows.stride(0))
        # The mean logit is the mean state's. Smoothing gives every logit a gradient: then nothing may be left out.
        self.least = 0.0 if options.label_smoothing or not filtered else options.gradient_filter
        self.ordered = self.least > 0
        self.order = torch.mv(rows, hidden.mean(0)).argsort(descending=True) if self.ordered else self.targets
        self.cap = options.softcap or 1.0
        self.lift = HALF_LIFT if hidden.dtype == torch.float16 else 1.0
        self.constants = {
            "HAS_BIAS": block.bias is not None,
            "HAS_CAP": options.softcap is not None,
            "WIDEN": isinstance(_first, InterpretedFunction),
            "TOKENS": TILE.tokens,
            "ROWS": TILE.rows,
            "STEP": _step(hidden),
            "num_warps": TILE.warps,
            "num_stages": TILE.stages,
        }

    def grid(self, length: int, step: int, shares: int = 1) -> tuple[int, int]:
        """Programs for `length` in steps, by shares."""
        return -(-length // step), shares


def _step(hidden: Tensor) -> int:
    shared = devices.shared_memory_bytes(hidden.device) if hidden.dtype != torch.float32 else None
    return TILE.roomy_columns if shared is not None and shared >= ROOMY else TILE.columns


def _rows_in_line(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
