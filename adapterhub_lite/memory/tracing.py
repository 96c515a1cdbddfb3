"""What a step of a model keeps in memory, found by running one or two of its layers on fake tensors.

From a config alone: no weights are read and nothing is allocated. Layers of one model are alike, so two depths give
the line: what does not depend on depth, and what each layer adds. Knows transformers, never data.
"""

import copy
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from adapterhub_lite.errors import ConfigurationError


@dataclass(frozen=True)
class ModelShape:
    """Numbers of a model that memory depends on; parameters are counts, not bytes."""

    layers: int
    hidden: int
    vocabulary: int
    layer_linear_parameters: int
    other_parameters: int
    head_parameters: int
    tied: bool
    lora_inputs_outputs: int
    largest_linear: int
    quantized: bool
    heads: int = 0
    full_attention: bool = True

    @property
    def parameters(self) -> int:
        """All parameters of the base, a tied head counted once."""
        return self.layer_linear_parameters + self.other_parameters


@dataclass(frozen=True)
class StepBytes:
    """Bytes of the trunk's forward and backward pass, without parameters.

    `saved` is kept for backward at the end of forward; `temporary` is what the worst moment has on top of it.
    """

    fixed: int
    per_layer: int
    temporary: int
    layer_input: int

    def saved(self, layers: int, *, checkpointing: bool) -> int:
        """Activations held until backward: of all layers, or with checkpointing only what goes into each."""
        return self.fixed + layers * (self.layer_input if checkpointing else self.per_layer)

    def working(self, *, checkpointing: bool) -> int:
        """What comes and goes while one layer is at work; with checkpointing that is the layer made again."""
        return self.temporary + (self.per_layer if checkpointing else 0)


def model_shape(config: Any, target_modules: Any = "all-linear") -> ModelShape:
    """Count a model's parameters on the meta device; `target_modules` as in PEFT's LoraConfig."""
    with torch.device("meta"):
        model = build_model(config, depth=None, dtype=torch.float32)
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    in_layers = sum(m.weight.numel() for m in linears.values())
    everything = sum(p.numel() for p in model.parameters())
    targets = [m for name, m in linears.items() if _is_target(name, target_modules)]
    if not targets:
        raise ConfigurationError(f"No linear layer of {type(model).__name__} is called like {target_modules!r}.")
    text = config.get_text_config()
    return ModelShape(
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        layer_linear_parameters=in_layers,
        other_parameters=everything - in_layers,
        head_parameters=head.weight.numel(),
        tied=head.weight is model.get_input_embeddings().weight,
        lora_inputs_outputs=sum(m.in_features + m.out_features for m in targets),
        largest_linear=max(m.weight.numel() for m in linears.values()),
        quantized=getattr(config, "quantization_config", None) is not None,
        heads=int(getattr(text, "num_attention_heads", 0)),
        full_attention=set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"},
    )


def trace_step(
    config: Any, *, batch_size: int, sequence_length: int, dtype: torch.dtype, rank: int, target_modules: Any
) -> StepBytes:
    """Measure the trunk's forward and backward at two depths, with a LoRA of `rank` on `target_modules`.

    With rank 0 the head alone is trained: a tied one is the embedding, and all layers pass its gradient on.

    Raises:
        ConfigurationError: the model cannot be run on fake tensors.
    """
    shape = batch_size, sequence_length
    layers = [_trace(config, depth, shape, dtype, rank, target_modules) for depth in (1, 2)]
    (first_saved, first_peak), (second_saved, second_peak) = layers
    per_layer = second_saved - first_saved
    return StepBytes(
        fixed=max(0, first_saved - per_layer),
        per_layer=per_layer,
        temporary=max(first_peak - first_saved, second_peak - second_saved),
        layer_input=batch_size * sequence_length * int(config.get_text_config().hidden_size) * dtype.itemsize,
    )


def _trace(
    config: Any, depth: int, shape: tuple[int, int], dtype: torch.dtype, rank: int, target_modules: Any
) -> tuple[int, int]:
    """(bytes saved for backward, peak bytes) of `depth` layers on fake tensors of the CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
            warnings.simplefilter("ignore")
            model = build_model(config, depth=depth, dtype=dtype)
            model.requires_grad_(False)
            if rank:
                put_lora(model, rank, dtype, target_modules)
            else:
                model.get_output_embeddings().requires_grad_(True)
            model.train()
            ids = torch.zeros(shape, dtype=torch.long)
            live = LiveBytes([*model.parameters(), *model.buffers()])
            with live:
                states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                saved = live.now
                if states.requires_grad:
                    states.backward(torch.zeros_like(states))
            return saved, live.peak
    except (RuntimeError, NotImplementedError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"The memory of {config.model_type!r} cannot be estimated from its config, because its layers do not run "
            f"on fake tensors: {first}. Give a preset by name."
        ) from error


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation made and that still lives; `known` ones are left out."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Any = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return made

    def leave_out(self, known: list[Tensor]) -> None:
        """Do not count these tensors either."""
        self._known.update(t.untyped_storage() for t in known)

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.now -= size


class _LoraShape(nn.Module):
    """A linear layer with a LoRA, as far as memory goes: PEFT's own cannot be made under fake tensors."""

    def __init__(self, linear: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, dtype=dtype))
        self.up = nn.Parameter(torch.empty(linear.out_features, rank, dtype=dtype))

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight, self.bias).add_(F.linear(F.linear(states, self.down), self.up))


def put_lora(model: nn.Module, rank: int, dtype: torch.dtype, target_modules: Any) -> None:
    """Replace the linear layers that `target_modules` names by stand-ins with a LoRA; the head is left out."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not head and _is_target(name, target_modules):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _LoraShape(linear, rank, dtype))


def _is_target(name: str, target_modules: Any) -> bool:
    if target_modules == "all-linear":
        return True
    wanted = TARGETS.get(target_modules, (target_modules,)) if isinstance(target_modules, str) else target_modules
    return name.rpartition(".")[2] in wanted


TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "query_key_value", "dense"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"),
}
"""Names of linear layers behind the two short names that `target_modules` may be besides PEFT's `all-linear`."""


def build_model(config: Any, *, depth: int | None, dtype: torch.dtype) -> Any:
    """A causal language model with `depth` layers (None: all), on the device of the context it is called in."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    text = config.get_text_config()
    if depth is not None:
        text.num_hidden_layers = depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:depth]
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
