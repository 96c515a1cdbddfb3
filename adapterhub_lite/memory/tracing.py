"""What a step of a model keeps in memory, found by running one or two of its layers on fake tensors.

From a config alone: no weights are read and nothing is allocated. Layers of one model are alike, so two depths give
the line: what does not depend on depth, and what each layer adds. Knows transformers, never data.
"""

import copy
import logging
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory.stand_ins import SHORT_TOKENS, is_target, put_attention, put_lean_blocks, put_lora


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
    attentions: frozenset[str] = frozenset({"sdpa", "flash_attention_2"})

    @property
    def parameters(self) -> int:
        """All parameters of the base, a tied head counted once."""
        return self.layer_linear_parameters + self.other_parameters


@dataclass(frozen=True)
class StepBytes:
    """Bytes of the trunk's forward and backward pass, without parameters and their gradients.

    `fixed` and `per_layer` are kept for backward at the end of forward, and so are each layer's `copies` of its adapter
    in the base's dtype; `temporary` is what the worst moment has on top. All but the copies grow with the rows.
    """

    fixed: int
    per_layer: int
    copies: int
    temporary: int
    layer_input: int

    def of_rows(self, rows: int) -> "StepBytes":
        """The same for `rows` rows, where this is for one."""
        scaled = (self.fixed * rows, self.per_layer * rows, self.copies, self.temporary * rows, self.layer_input * rows)
        return StepBytes(*scaled)

    def saved(self, layers: int, *, checkpointing: bool) -> int:
        """Activations held until backward: of all layers, or with checkpointing only what goes into each."""
        if checkpointing:
            # And what comes out of the last one.
            return self.fixed + (layers + 1) * self.layer_input
        return self.fixed + layers * (self.per_layer + self.copies)

    def working(self, *, checkpointing: bool) -> int:
        """What comes and goes while one layer is at work; with checkpointing that is the layer made again."""
        return self.temporary + (self.per_layer + self.copies if checkpointing else 0)


def model_shape(config: Any, target_modules: Any = "all-linear") -> ModelShape:
    """Count a model's parameters on the meta device; `target_modules` as in PEFT's LoraConfig."""
    with torch.device("meta"):
        model = build_model(config, depth=None, dtype=torch.float32)
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    in_layers = sum(m.weight.numel() for m in linears.values())
    everything = sum(p.numel() for p in model.parameters())
    targets = [m for name, m in linears.items() if is_target(name, target_modules)]
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
        attentions=_attentions(model),
    )


@dataclass(frozen=True)
class TracedStep:
    """What a trace depends on: a row of `sequence_length` tokens, what is trained, and how the trainer runs it.

    `packed` weights are unpacked for each pass; `lean` says whether the trainer's leaner blocks may be used, and
    `end_to_end` whether rows may be laid out without padding.
    """

    sequence_length: int
    dtype: torch.dtype
    trains: str
    rank: int
    target_modules: Any
    packed: bool
    lean: bool
    end_to_end: bool
    device: str


def _attentions(model: Any) -> frozenset[str]:
    """The implementations besides `eager`, by transformers' names, that this model says it can take."""
    able = {"sdpa": model._supports_sdpa, "flash_attention_2": model._supports_flash_attn}
    return frozenset(name for name, supported in able.items() if supported)


def trace_step(config: Any, step: TracedStep) -> StepBytes:
    """Measure the trunk's forward and backward at two depths, for one row.

    Raises:
        ConfigurationError: the model cannot be run on fake tensors.
    """
    first, second = (_trace(config, depth, step) for depth in (1, 2))
    copies = second.copies - first.copies
    per_layer = second.saved - first.saved - copies
    return StepBytes(
        fixed=max(0, first.saved - per_layer - copies),
        per_layer=per_layer,
        copies=copies,
        temporary=max(first.peak - first.saved, second.peak - second.saved),
        layer_input=step.sequence_length * int(config.get_text_config().hidden_size) * step.dtype.itemsize,
    )


@dataclass(frozen=True)
class _Traced:
    """Bytes saved for backward, those of them that are copies of the adapter, and the peak without whole gradients."""

    saved: int
    copies: int
    peak: int


def _trace(config: Any, depth: int, step: TracedStep) -> _Traced:
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with without_chatter(), FakeTensorMode(allow_non_fake_inputs=True):
            model = build_model(config, depth=depth, dtype=step.dtype)
            _as_kept(model, step)
            ids = torch.zeros((1, step.sequence_length), dtype=torch.long)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            live = LiveBytes([*model.parameters(), *model.buffers()])
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(live.forget_gradient)
            with live:
                states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                saved = live.now
                if states.requires_grad:
                    states.backward(torch.zeros_like(states))
            wide = sum(parameter.numel() for parameter in trained if parameter.dtype != step.dtype)
            return _Traced(saved, wide * step.dtype.itemsize, live.peak)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"The memory of {config.model_type!r} cannot be estimated from its config, because its layers do not run "
            f"on fake tensors: {first}. Give a preset by name."
        ) from error


@contextmanager
def without_chatter() -> Iterator[None]:
    """While inside, torch's own log of an operation that fake tensors cannot run, and warnings, are not shown."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _as_kept(model: Any, step: TracedStep) -> None:
    """As `as_trained`, for what is kept alone: the gradients of whole weights do not grow with rows, and are left out.

    A linear layer keeps its input for a LoRA as for its own weight. A tied head is the embedding, and all layers pass
    its gradient on; they keep nothing for one that is not tied.
    """
    if step.trains == "all":
        as_trained(model, replace(step, trains="lora", rank=1), norms=True)
        model.enable_input_require_grads()
    else:
        as_trained(model, step)
    if step.trains == "head":
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.requires_grad_(False)
        if tied:
            model.enable_input_require_grads()


def as_trained(model: Any, step: TracedStep, *, norms: bool = False) -> None:
    """Make `model` what the trainer makes of a base, as far as memory goes: what is trained, and its leaner blocks.

    `norms` says that the norms are trained beside a LoRA.
    """
    model.requires_grad_(step.trains == "all")
    if norms:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("norm.weight"))
    if step.trains == "lora":
        put_lora(model, step.rank, step.target_modules, packed=step.packed)
    elif step.trains == "head":
        # A tied one is the embedding, and all layers pass its gradient on.
        model.get_output_embeddings().requires_grad_(True)
    if step.lean:
        put_lean_blocks(model)
    special = has_special_attention(model.config.get_text_config())
    if step.end_to_end and model._supports_attention_backend and not special:
        put_attention(model, short=step.device == "cpu" and step.sequence_length <= SHORT_TOKENS)
    model.train()


def has_special_attention(config: Any) -> bool:
    """Whether some layer does more than full causal attention: such models are trained on padded rows."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    softcap = getattr(config, "attn_logit_softcapping", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return kinds != {"full_attention"} or softcap is not None or window is not None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation made and that still lives; `known` ones are left out."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Any = weakref.WeakSet(t.untyped_storage() for t in known)
        self._finalizers: Any = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return made

    def forget_gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient is whole: from now on it is not counted."""
        assert parameter.grad is not None
        finalizer = self._finalizers.get(parameter.grad.untyped_storage())
        if finalizer is not None:
            finalizer()

    def leave_out(self, known: list[Tensor]) -> None:
        """Do not count these tensors either."""
        self._known.update(t.untyped_storage() for t in known)

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self._finalizers[storage] = weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.now -= size


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
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
