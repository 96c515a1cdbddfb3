"""Where the rows of a head come from: plain, partitioned over processes, or quantised. Knows torch; others by shape.

`open_rows(weight)` gathers or dequantises as little as it can, for one pass, and yields a reader of row blocks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adapterhub_lite.errors import ConfigurationError

RowReader = Callable[[slice], Tensor]
"""Rows of the head: slice of the vocabulary -> (v, D) tensor, any floating dtype."""


def is_zero3(weight: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the parameter in parts (outside its module it is empty)."""
    return hasattr(weight, "ds_id") and hasattr(weight, "ds_shape")


def is_sharded(weight: Tensor) -> bool:
    """Whether the parameter is a DTensor, as FSDP2 leaves it outside its module."""
    return callable(getattr(weight, "full_tensor", None))


def is_quantised(weight: Tensor) -> bool:
    """Whether bitsandbytes holds the parameter in 4 or 8 bits."""
    return getattr(weight, "quant_state", None) is not None or getattr(weight, "SCB", None) is not None


def rows_shape(weight: Tensor) -> tuple[int, int]:
    """The (V, D) of a head's weight, however it is held."""
    shape = weight.shape
    if is_zero3(weight):
        shape = weight.ds_shape  # type: ignore[attr-defined]
    elif getattr(weight, "quant_state", None) is not None:
        shape = weight.quant_state.shape  # type: ignore[attr-defined]
    if len(shape) != 2:
        raise ConfigurationError(f"A head's weight must be (vocabulary, hidden), not {tuple(shape)}.")
    return int(shape[0]), int(shape[1])


@contextmanager
def open_rows(weight: Tensor) -> Iterator[RowReader]:
    """Yield a reader of row blocks. Partitioned weights are gathered here, once per pass, and freed at the end.

    Every process of the group must enter, because gathering is collective.
    """
    if is_zero3(weight):
        with held_whole([weight]):
            yield _reader(weight.detach())
    elif is_sharded(weight):
        yield _reader(weight.detach().full_tensor())  # type: ignore[attr-defined]
    elif getattr(weight, "quant_state", None) is not None:
        yield _four_bit(weight)
    elif getattr(weight, "SCB", None) is not None:
        # LLM.int8 (arXiv:2208.07339): one scale per row, the largest value of the row over 127.
        int8: Any = weight  # a parameter of bitsandbytes, which has no types
        codes = int8.CB if getattr(int8, "CB", None) is not None else int8.data
        scales = int8.SCB.float() / 127.0
        yield lambda part: codes[part].float() * scales[part, None]
    else:
        yield _reader(weight.detach())


@contextmanager
def held_whole(parameters: list[Tensor]) -> Iterator[None]:
    """While inside, parameters that ZeRO-3 holds in parts are whole. Every process of the group must enter."""
    parts = [parameter for parameter in parameters if is_zero3(parameter) and not parameter.numel()]
    if not parts:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    # Those that are whole already are left out: gathering them again would free them too early.
    with GatheredParameters(parts):
        yield


def whole(parameter: Tensor) -> Tensor:
    """All of a small parameter, such as a bias or a LoRA matrix. A DTensor is gathered, and its gradient goes back averaged
    over the processes, as FSDP2 does it; what ZeRO-3 holds in parts is copied, and gets no gradient."""
    if is_zero3(parameter):
        with held_whole([parameter]):
            return parameter.detach().clone()
    if is_sharded(parameter):
        from torch.distributed.tensor import DTensor, Partial

        assert isinstance(parameter, DTensor)
        return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return parameter


def _reader(weight: Tensor) -> RowReader:
    return lambda part: weight[part]


def _four_bit(weight: Any) -> RowReader:  # a parameter of bitsandbytes, which has no types
    """Blocks of bitsandbytes' nf4 or fp4. The scales, themselves quantised, are dequantised once, the weights in parts."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    vocabulary, columns = state.shape
    packed = weight.data.view(torch.uint8).reshape(-1)
    per_row = max(1, state.blocksize // columns) if columns % state.blocksize else 1
    if (columns * per_row) % state.blocksize:
        return _reader(dequantize_4bit(weight.data, state))

    def read(part: slice) -> Tensor:
        start = part.start - part.start % per_row
        stop = min(vocabulary, -(-part.stop // per_row) * per_row)
        first, last = start * columns, stop * columns
        shape = torch.Size((stop - start, columns))
        local = QuantState(
            absmax=scales[first // state.blocksize : -(-last // state.blocksize)],
            shape=shape,
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        rows = dequantize_4bit(packed[first // 2 : -(-last // 2)].reshape(-1, 1), local)
        return rows.reshape(shape)[part.start - start : part.stop - start]

    return read
