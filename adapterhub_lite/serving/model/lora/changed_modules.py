"""Adapters that change more than a row of a batch can have of its own: applied to the modules, for one call of the model.

A LoRA on linear layers is added row by row beside the base. What changes norms, the head, embeddings, experts or the
length of weights (DoRA) is put into the modules themselves, for a step in which every row has that adapter, and taken
out again. The base's own tensors are never written: a changed one stands in their place for the call. Of an adapter with
tokens of its own, the logits are as much wider.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from adapterhub_lite.adapter_format.changes import Change
from adapterhub_lite.serving.adapters.weights import Family, Part, Parts

# Lengths of rows, a few numbers for each layer, of so many adapters with DoRA.
MOST_KEPT = 64


class ChangedModules:
    """Puts adapters into the modules of `model`, for one call at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._ratios: OrderedDict[tuple[int, str], torch.Tensor] = OrderedDict()

    @contextmanager
    def applied(self, parts: Parts, families: Sequence[Family] = ()) -> Iterator[None]:
        """Answer with the sum of `parts` inside; of their pairs on `families` too, where nothing else adds those."""
        with ExitStack() as undo:
            for part in parts:
                for change in part.weights.extras:
                    self._apply(change, part, undo)
            for family in families:
                for layer, path in enumerate(family.paths):
                    pairs = [part for part in parts if part.weights.has(family.name, layer)]
                    if pairs:
                        self._hook(path, undo, _adding(pairs, family.name, layer))
            yield

    def _hook(self, path: str, undo: ExitStack, hook: Any) -> None:
        undo.callback(self._model.get_submodule(path).register_forward_hook(hook).remove)

    def _apply(self, change: Change, part: Part, undo: ExitStack) -> None:
        target = change.target
        module = self._model.get_submodule(target.module)
        name = target.parameter.rpartition(".")[2]
        if target.kind == "saved":
            assert change.value is not None
            put(module, name, change.value, undo)
        elif target.kind == "parameter":
            changed = _Transient(name, lambda weight: (weight.float() + change.delta() * part.factor).to(weight.dtype))
            undo.callback(module.register_forward_pre_hook(changed.put).remove)
            # Of two on one parameter, the later one is taken out first.
            undo.callback(module.register_forward_hook(changed.take, prepend=True, always_call=True).remove)
        elif target.kind == "tokens":
            if isinstance(module, nn.Embedding):
                looked_up = _Rows(change)
                undo.callback(module.register_forward_pre_hook(looked_up.within).remove)
                self._hook(target.module, undo, looked_up.exchange)
            else:
                self._hook(target.module, undo, _columns(change))
            if target.also_head is not None:
                self._hook(target.also_head, undo, _columns(change))
        elif target.kind == "embedding":
            self._hook(target.module, undo, _looked_up(change, part.factor))
        else:
            ratio = None if change.magnitude is None else self._ratio(change, part.weights.load_id, module)
            self._hook(target.module, undo, _linear(change, part.factor, ratio))

    def _ratio(self, change: Change, load_id: int, module: nn.Module) -> torch.Tensor:
        """DoRA's magnitudes over the lengths of the rows of W0 + scaling * B A: (out,)."""
        key = load_id, change.target.parameter
        if key not in self._ratios:
            assert change.magnitude is not None
            weight = dense_weight(module)
            across = 0 if change.target.transposed else 1
            length = (weight + change.delta()).norm(dim=across)
            self._ratios[key] = change.magnitude.float() / length
            while len({load for load, _ in self._ratios}) > MOST_KEPT:
                self._ratios.popitem(last=False)
        return self._ratios[key]


def put(module: nn.Module, name: str, value: torch.Tensor, undo: ExitStack) -> None:
    """Let `value` stand in place of a module's parameter until `undo` is closed."""
    own = module._parameters[name]
    dtype = own.dtype if own is not None and own.is_floating_point() else value.dtype
    module._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=False)
    undo.callback(module._parameters.__setitem__, name, own)


class _Transient:
    """A parameter changed while its module runs: made when it is called, gone when it has answered."""

    def __init__(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._name, self._change = name, change
        self._undo = ExitStack()

    def put(self, module: nn.Module, _inputs: object) -> None:
        weight = module._parameters[self._name]
        assert weight is not None
        put(module, self._name, self._change(weight), self._undo)

    def take(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        self._undo.close()


def _adding(parts: Sequence[Part], name: str, layer: int) -> Any:  # torch's own type of a hook
    def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        total = sum(part.weights.product(name, layer, inputs[0]) * part.factor for part in parts)
        return (y + total).to(y.dtype)

    return add


def _linear(change: Change, factor: float, ratio: torch.Tensor | None) -> Any:
    """y + scaling * (B A x + bias); with DoRA, ratio * (W0 x + scaling * B A x) + the layer's own bias."""
    assert change.a is not None and change.b is not None
    a, b = change.a, change.b

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        more = (inputs[0].float() @ a.float().T) @ (b.float().T * (change.scaling * factor))
        total = y.float()
        if ratio is not None:
            own = module.bias.float() if isinstance(module.bias, torch.Tensor) else torch.zeros(1, device=y.device)
            total = (total - own + more) * ratio + own
        else:
            total = total + more
        if change.bias is not None:
            total = total + change.bias.float() * (change.scaling * factor)
        return total.to(y.dtype)

    return add


def _looked_up(change: Change, factor: float) -> Any:
    assert change.a is not None and change.b is not None
    a, b = change.a, change.b

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        more = functional.embedding(inputs[0], a.T.float()) @ (b.float().T * (change.scaling * factor))
        return (y + more * _embed_scale(module)).to(y.dtype)

    return add


class _Rows:
    """The rows of an embedding that a change has, in place of the base's or behind them."""

    def __init__(self, change: Change) -> None:
        assert change.value is not None
        order = sorted(range(len(change.target.tokens)), key=change.target.tokens.__getitem__)
        device = change.value.device
        self._tokens = torch.tensor(change.target.tokens, device=device)[order]
        self._value = change.value[torch.tensor(order, device=device)]
        self._ids = self._tokens[:0]

    def within(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The ids that the base has rows for; those that it has not are looked up as any other."""
        self._ids = inputs[0]
        assert isinstance(module.weight, torch.Tensor)
        return (self._ids.clamp(max=module.weight.shape[0] - 1), *inputs[1:])

    def exchange(self, module: nn.Module, _inputs: object, y: torch.Tensor) -> torch.Tensor:
        """What was looked up, with the rows of the change for its tokens."""
        places = torch.searchsorted(self._tokens, self._ids).clamp(max=len(self._tokens) - 1)
        own = (self._tokens[places] == self._ids)[..., None]
        return torch.where(own, (self._value[places].to(y.dtype) * _embed_scale(module)).to(y.dtype), y)


def _columns(change: Change) -> Any:
    def exchange(_module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        return _exchanged(change, inputs[0], y)

    return exchange


def _exchanged(change: Change, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The outputs y (..., vocabulary) with those of the changed rows of the head computed anew, and of new ones."""
    assert change.value is not None
    changed = functional.pad(y, (0, max(0, change.rows - y.shape[-1])))
    changed = y.clone() if changed is y else changed
    changed[..., list(change.target.tokens)] = functional.linear(x, change.value.to(x.dtype)).to(y.dtype)
    return changed


def _embed_scale(module: nn.Module) -> Any:
    """What an embedding multiplies its rows by: a number or a tensor of one."""
    return getattr(module, "embed_scale", 1.0)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer in float32, unpacked where it is quantised."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if type(module).__module__.startswith("bitsandbytes."):
        from peft.utils.integrations import dequantize_bnb_weight

        weight = dequantize_bnb_weight(weight, state=getattr(module, "state", None))
    return weight.float()
