"""What a step of a model keeps in memory, found by running the first of its layers on fake tensors. Knows transformers, PEFT.

From a config alone: no weights are read and nothing is allocated. The model is built whole, and as many of its first
layers are run as it takes to see one of each kind: all layers of a Llama are alike, but a hybrid has layers with
attention and others with a state, and some layers have experts or take the keys and values of another layer.
"""

import copy
import itertools
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

from adapterhub_lite.bases.broken import read_by_transformers
from adapterhub_lite.bases.structure import check_causal
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory.stand_ins import (
    SHORT_TOKENS,
    put_attention,
    put_lean_blocks,
    put_lora,
    put_peft,
    put_rank_one,
)


@dataclass(frozen=True)
class ModelShape:
    """Numbers of a model that memory depends on; parameters are counts, not bytes.

    `linear_parameters` are those that a quantisation packs.
    """

    layers: int
    hidden: int
    vocabulary: int
    linear_parameters: int
    other_parameters: int
    head_parameters: int
    tied: bool
    largest_linear: int

    @property
    def parameters(self) -> int:
        """All parameters of the base, a tied head counted once."""
        return self.linear_parameters + self.other_parameters


@dataclass(frozen=True)
class StepBytes:
    """Bytes of the trunk's forward and backward pass, without parameters and their gradients.

    `fixed` and each of `layers` are kept for backward at the end of forward, and so are the `copies` that a layer has of
    its adapter in the base's dtype, or of its experts with their adapter; `temporary` and `unpacked` are what the worst
    moment has on top. All but `copies` and `unpacked` grow with the rows.
    """

    fixed: int
    layers: tuple[int, ...]
    copies: tuple[int, ...]
    temporary: int
    layer_input: int
    unpacked: int = 0

    def of_rows(self, rows: int) -> "StepBytes":
        """The same for `rows` rows, where this is for one."""
        return replace(
            self,
            fixed=self.fixed * rows,
            layers=tuple(size * rows for size in self.layers),
            temporary=self.temporary * rows,
            layer_input=self.layer_input * rows,
        )

    def saved(self, *, checkpointing: bool) -> int:
        """Activations held until backward: of all layers, or with checkpointing only what goes into each."""
        if checkpointing:
            # And what comes out of the last one.
            return self.fixed + (len(self.layers) + 1) * self.layer_input
        return self.fixed + sum(self.layers) + sum(self.copies)

    def working(self, *, checkpointing: bool) -> int:
        """What comes and goes while one layer is at work; with checkpointing that is the recomputed layer."""
        largest = max(size + copies for size, copies in zip(self.layers, self.copies, strict=True))
        return self.temporary + self.unpacked + (largest if checkpointing else 0)


@dataclass(frozen=True)
class TracedStep:
    """What a trace depends on: a row of `sequence_length` tokens, what is trained, and how the trainer runs it.

    `packed` weights are dequantised for each pass; `lean` says whether the trainer's leaner blocks may be used, `remade`
    whether linear layers then keep no input that these can make again, and `end_to_end` whether rows may be laid out
    without padding.
    """

    sequence_length: int
    dtype: torch.dtype
    trains: str
    rank: int
    target_modules: Any  # as in PEFT's LoraConfig: a name, a pattern or a tuple of names
    packed: bool
    lean: bool
    remade: bool
    end_to_end: bool
    device: str


@dataclass(frozen=True)
class LoraShape:
    """A LoRA of some rank as PEFT makes it: its parameters, and the columns (its rank) of the one on the head, 0 for none.

    Rows of tokens on the head are a column each.
    """

    parameters: int
    head_columns: int


def model_shape(config: Any) -> ModelShape:
    """Count a model's parameters on the meta device.

    Raises:
        ConfigurationError: the model has no output head, or no list of layers.
    """
    with torch.device("meta"):
        model = build_model(config, dtype=torch.float32)
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigurationError(f"{type(model).__name__} has no output head: a causal language model is needed.")
    packable = [weight for module in model.modules() if module is not head and (weight := packable_weight(module))]
    return ModelShape(
        layers=len(decoder_layers(model)),
        hidden=int(head.weight.shape[1]),
        vocabulary=int(head.weight.shape[0]),
        linear_parameters=sum(packable),
        other_parameters=sum(p.numel() for p in model.parameters()) - sum(packable),
        head_parameters=head.weight.numel(),
        tied=head.weight is model.get_input_embeddings().weight,
        largest_linear=max(packable, default=0),
    )


def lora_shape(config: Any, target_modules: Any, rank: int) -> LoraShape:
    """Count a LoRA on the meta device; `target_modules` as in PEFT's LoraConfig.

    Raises:
        ConfigurationError: the LoRA does not fit the model.
    """
    with torch.device("meta"):
        adapted = put_peft(build_model(config, dtype=torch.float32), rank, target_modules)
    head = adapted.get_base_model().get_output_embeddings()
    columns = sum(up.weight.shape[1] for up in getattr(head, "lora_B", {}).values())
    columns += sum(
        len(numbers) for numbers in getattr(getattr(head, "token_adapter", None), "token_indices", {}).values()
    )
    parts = ("lora_", "trainable_tokens_")
    if any(p.requires_grad and p.dim() == 2 and not any(x in n for x in parts) for n, p in head.named_parameters()):
        columns = head.weight.shape[1]  # trained whole
    return LoraShape(parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad), head_columns=columns)


def packable_weight(module: nn.Module) -> int:
    """The number of weights that bitsandbytes would pack in `module` itself: those of a linear layer or of GPT-2's Conv1D."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.numel()
    return 0


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of a model's layers: of the lists of modules in the trunk, that with the most parameters.

    Raises:
        ConfigurationError: the trunk has no such list.
    """
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ConfigurationError(f"{type(model).__name__} has no list of layers.")
    # A list within a layer, as of experts, is a part of the list of layers.
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def kind_of(layer: nn.Module) -> tuple[object, ...]:
    """What two layers that keep equally much have in common: their modules, the shapes of their weights, their switches."""
    found: list[object] = []
    for name, module in layer.named_modules():
        switches = [(key, value) for key, value in vars(module).items() if isinstance(value, bool | str)]
        shapes = [(key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)]
        found.append((name, type(module).__name__, tuple(sorted(switches)), tuple(shapes)))
    return tuple(found)


def trace_step(config: Any, step: TracedStep) -> StepBytes:
    """Measure the trunk's forward and backward for one row, layer by layer.

    Raises:
        ConfigurationError: the model cannot be run on fake tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with without_chatter(), torch.device("meta"):
            model, kinds = _shortened(build_model(config, dtype=step.dtype), step)
        with without_chatter(), FakeTensorMode(allow_non_fake_inputs=True):
            return _trace(put_on_cpu(model), kinds, step)
    except ConfigurationError:
        raise
    except Exception as error:  # a model's own code may fail in any way on tensors without values
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"the memory of {config.model_type!r} cannot be foreseen from its config, because its layers do not run on "
            f"fake tensors: {first.rstrip('.')}"
        ) from error


def _shortened(model: Any, step: TracedStep) -> tuple[Any, list[int]]:
    """The model as it is trained, with as many of its layers as are needed, and for each layer that which stands for it.

    The first layer stands for itself: under a LoRA its input needs no gradient. Each kind behind it has to be seen once.
    """
    layers = decoder_layers(model)
    kinds = [kind_of(layer) for layer in layers]
    places = [0, *(kinds.index(kind, 1) for kind in kinds[1:])]
    del layers[max(2, max(places) + 1) :]
    model.config.get_text_config().num_hidden_layers = len(layers)
    head_is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    # What is kept alone: the gradients of whole weights do not grow with rows, and are left out. A linear layer keeps its
    # input for a LoRA as for its own weight. A tied head is the embedding, and all layers pass its gradient on.
    if step.trains == "all":
        put_rank_one(model)
    model = as_trained(model, step)
    if step.trains == "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith((".down", ".up", "norm.weight")))
        model.enable_input_require_grads()
    if step.trains == "head":
        model.requires_grad_(False)
        if head_is_tied:
            model.enable_input_require_grads()
    return model, places


def _trace(model: Any, places: list[int], step: TracedStep) -> StepBytes:
    one = _Row.of(model, step.sequence_length, rows=1)
    # What does not grow with the rows are copies of the adapter in the dtype of the base. PEFT adds a LoRA on experts to
    # their weights, whole: how much of a layer that is, is found by a second row.
    if holds_experts(model):
        two = _Row.of(model, step.sequence_length, rows=2)
        grown = [b - a for a, b in zip(one.layers, two.layers, strict=True)]
        copies = [a - b for a, b in zip(one.layers, grown, strict=True)]
        temporary = two.temporary - one.temporary
    else:
        copies = [_copied_bytes(layer, step.dtype) for layer in decoder_layers(model)]
        grown = [a - b for a, b in zip(one.layers, copies, strict=True)]
        temporary = one.temporary
    return StepBytes(
        fixed=one.fixed,
        layers=tuple(max(0, grown[place]) for place in places),
        copies=tuple(max(0, copies[place]) for place in places),
        temporary=max(0, temporary),
        layer_input=one.output,
        unpacked=one.temporary - max(0, temporary),
    )


@dataclass(frozen=True)
class _Row:
    """Bytes of a pass of some rows: what is kept outside the layers and in each, what comes and goes, what comes out."""

    fixed: int
    layers: tuple[int, ...]
    temporary: int
    output: int

    @classmethod
    def of(cls, model: Any, tokens: int, rows: int) -> "_Row":
        """Run forward and backward on fake tensors."""
        layers = decoder_layers(model)
        live = LiveBytes([*model.parameters(), *model.buffers()])
        marks: list[int] = []
        hooks = [layers[0].register_forward_pre_hook(lambda *_: marks.append(live.now))]
        hooks += [layer.register_forward_hook(lambda *_: marks.append(live.now)) for layer in layers]
        trained = [p for p in model.parameters() if p.requires_grad]
        hooks += [p.register_post_accumulate_grad_hook(live.forget_gradient) for p in trained]
        with live:
            ids = torch.zeros((rows, tokens), dtype=torch.long)
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            saved = live.now
            if states.requires_grad:
                states.backward(torch.zeros_like(states))
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
        if len(marks) != len(layers) + 1:
            raise ConfigurationError(f"the layers of {type(model).__name__} do not run once each")
        grown = tuple(after - before for before, after in itertools.pairwise(marks))
        size = states.numel() * states.element_size()
        return cls(max(0, saved - sum(grown)), grown, live.peak - saved, size)


def holds_experts(model: nn.Module) -> bool:
    """Whether PEFT has put a LoRA on a parameter that belongs to no linear layer."""
    return any(type(module).__name__ == "ParamWrapper" for module in model.modules())


def _copied_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the copies that a module's trained parameters have in the dtype of the base, where theirs is another."""
    return sum(p.numel() * dtype.itemsize for p in module.parameters() if p.requires_grad and p.dtype != dtype)


def put_on_cpu(model: Any) -> Any:
    """Replace what `model` has on the meta device by tensors on a CPU: fake ones, in the mode this is called in."""
    made: dict[int, Tensor] = {}

    def replaced(tensor: Tensor) -> Tensor:
        # A tied weight stays one tensor.
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            one = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            made[id(tensor)] = one
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = replaced(tensor)
    return model


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


def as_trained(model: Any, step: TracedStep) -> Any:
    """Make of `model` what the trainer makes of a base, as far as memory goes: what is trained, and its leaner blocks.

    Returns the model, inside which layers have changed.
    """
    model.requires_grad_(step.trains == "all")
    if step.trains == "lora":
        model = put_lora(model, step.rank, step.target_modules, packed=step.packed)
    elif step.trains == "head":
        model.get_output_embeddings().requires_grad_(True)
    if step.lean:
        put_lean_blocks(model, remade=step.remade)
    special = has_special_attention(model.config.get_text_config())
    if step.end_to_end and model._supports_attention_backend and not special:
        put_attention(model, short=step.device == "cpu" and step.sequence_length <= SHORT_TOKENS)
    model.train()
    return model


def has_special_attention(config: Any) -> bool:
    """Whether some layer does more than causal attention, to all tokens or to a window: such models train on padded rows."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    softcap = getattr(config, "attn_logit_softcapping", None)
    both_ways = getattr(config, "use_bidirectional_attention", None)
    return not kinds <= {"full_attention", "sliding_attention"} or softcap is not None or bool(both_ways)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation made and that still lives; `known` ones are left out."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Any = weakref.WeakSet(
            t.untyped_storage() for t in known
        )  # torch's storages have no type of their own
        self._finalizers: Any = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # as torch has it
        # The kernel for experts refuses fake tensors in fp32, which it takes when they are real.
        experts = function is torch.ops.aten._grouped_mm.default
        made = grouped_product(*args[:3]) if experts else function(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self.count(value.untyped_storage())
        return made

    def forget_gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient is whole: from now on it is not counted."""
        assert parameter.grad is not None
        finalizer = self._finalizers.get(parameter.grad.untyped_storage())
        if finalizer is not None:
            finalizer()

    def count(self, storage: Any) -> None:
        """Count a storage for as long as it lives, unless it is known."""
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self._finalizers[storage] = weakref.finalize(storage, self.add, -size)

    def add(self, size: int) -> None:
        """Add bytes to what lives now."""
        self.now += size


def grouped_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """What torch's grouped product of experts returns: of (tokens, in) and (experts, in, out), or for the experts' gradient
    of (in, tokens) and (tokens, out). `ends` (experts,) are where the tokens of each expert end."""
    if left.dim() == right.dim() == 2:
        return left.new_empty(len(ends), left.shape[0], right.shape[1])
    if left.dim() == right.dim() == 3:
        return left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return left.new_empty(left.shape[-2], right.shape[-1])


def build_model(config: Any, *, dtype: torch.dtype) -> Any:
    """A causal language model with all its layers, on the device of the context it is called in.

    Raises:
        ConfigurationError: the configuration describes another kind of model.
        BrokenBaseError: no model can be built from it.
    """
    from transformers import AutoModelForCausalLM

    check_causal(config)
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with read_by_transformers("configuration", config.name_or_path):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
