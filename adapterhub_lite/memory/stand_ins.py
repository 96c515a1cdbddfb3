"""What the trainer puts into a model, as far as memory goes: stand-ins that keep and allocate the same on fake tensors.

The real ones belong to the training room, which this one does not know; a test there compares the two. PEFT's own layers
stay where the trainer leaves them: on experts, on GPT-2's Conv1D, on embeddings.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterhub_lite.bases.layer_parts import GateParts, gate_parts, norm_parts
from adapterhub_lite.errors import ConfigurationError

# Rows up to this length have their score matrices computed on a CPU; longer ones take torch's kernel, which needs none: then
# the matrix costs more than the kernel's slow backward. The trainer uses this limit too.
SHORT_TOKENS = 128

# Up to this rank an adapter's products with bf16 activations are compiled ones on a CPU, as fast as oneDNN's; beyond it they
# are slower. The trainer uses this limit too.
MOST_COMPILED_RANK = 8

TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "query_key_value", "dense"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"),
}
"""Names of linear layers behind the two short names that `target_modules` may be besides PEFT's `all-linear`."""


def rounded_tokens(tokens: int, rows: int = 1) -> int:
    """The least length, at least `tokens`, that batches of `rows` rows are given for products with 16-bit weights on a CPU.

    oneDNN makes code for each number of rows of a product, which is that of all tokens, and keeps it, about half a megabyte
    for each product of a layer's parts: with every batch a length of its own, a run would grow by 10 MB a step. So does torch's
    attention for each length of padded rows.
    """
    grain = next(grain for beyond, grain in ((1024, 64), (256, 32), (0, 16)) if rows * tokens > beyond)
    step = grain if rows == 1 else max(8, -(-grain // rows))
    return -(-tokens // step) * step


@dataclass(frozen=True)
class GivenAdapter:
    """A configuration of PEFT's that came with a run, as JSON: it says more than rank and target modules."""

    content: str

    @classmethod
    def of(cls, config: Any) -> "GivenAdapter":
        """Take over what `config` (a PeftConfig) says."""
        return cls(
            json.dumps(config.to_dict(), sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
        )

    def config(self) -> Any:
        """The configuration, with tensors that begin anyhow: there are no weights to begin from."""
        from peft import get_peft_config

        found = json.loads(self.content)
        if "init_lora_weights" in found:
            found["init_lora_weights"] = True
        return get_peft_config({**found, "task_type": "CAUSAL_LM", "inference_mode": False})


class KeepsInputs(torch.autograd.Function):
    """`step(*inputs)`, of which the inputs alone are kept; the backward pass recomputes it."""

    @staticmethod
    def forward(ctx: Any, step: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(*inputs)
        return step(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        wanted = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            made = ctx.step(*inputs)
        found = iter(torch.autograd.grad(made, [x for x in inputs if x.requires_grad], grad))
        return None, *(next(found) if w else None for w in wanted)


class KeepsParts(torch.autograd.Function):
    """`step(states, *others)`, of which the others are kept, and the `count` parts that `make` makes the states of."""

    @staticmethod
    def forward(
        ctx: Any, step: Callable[..., Tensor], make: Callable[..., Tensor], count: int, states: Tensor, *kept: Tensor
    ) -> Tensor:
        ctx.step, ctx.make, ctx.count = step, make, count
        ctx.save_for_backward(*kept)
        return step(states, *kept[count:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # Read once: what gradient checkpointing makes again, it hands out once.
        saved = ctx.saved_tensors
        parts, others = saved[: ctx.count], saved[ctx.count :]
        wanted = [ctx.needs_input_grad[3], *ctx.needs_input_grad[4 + ctx.count :]]
        inputs = [x.detach().requires_grad_(w) for x, w in zip((ctx.make(*parts), *others), wanted, strict=True)]
        with torch.enable_grad():
            made = ctx.step(*inputs)
        found = iter(torch.autograd.grad(made, [x for x in inputs if x.requires_grad], grad))
        to_states, *to_others = (next(found) if w else None for w in wanted)
        return None, None, None, to_states, *[None] * ctx.count, *to_others


def keeping(step: Callable[..., Tensor], states: Tensor, *others: Tensor) -> Tensor:
    """`step(states, *others)`, for which `states` are kept, or what they can be made of again."""
    make, parts = getattr(states, "made_of", (None, ()))
    if make is None:
        return cast(Tensor, KeepsInputs.apply(step, states, *others))
    return cast(Tensor, KeepsParts.apply(step, make, len(parts), states, *parts, *others))


def made_of(step: Callable[..., Tensor], *parts: Tensor, remade: bool) -> Tensor:
    """`step(*parts)`, of which the parts alone are kept; with `remade` also by what reads it as `keeping` does."""
    made = cast(Tensor, KeepsInputs.apply(step, *parts))
    if remade:
        cast(Any, made).made_of = step, tuple(part.detach() for part in parts)
    return made


class FusedLora(nn.Module):
    """A linear layer with a LoRA in fp32, as the trainer's fused step runs it; `packed` weights are dequantised per pass."""

    def __init__(self, linear: nn.Linear, down: nn.Parameter, up: nn.Parameter, packed: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.packed, self.down, self.up = linear.weight, linear.bias, packed, down, up

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""

        def product(states: Tensor, weight: Tensor) -> Tensor:
            # With a bias it is a view, which autograd would not let anyone add to.
            made = states.new_empty(*states.shape[:-1], len(weight))
            return made.copy_(F.linear(states, weight.clone(), self.bias))

        packed = self.packed
        result = keeping(product, states, self.weight) if packed else F.linear(states, self.weight, self.bias)
        return result.add_(self.update(states))

    def update(self, states: Tensor) -> Tensor:
        """What the adapter adds; on a CPU its products are compiled ones, which keep fp32 beside bf16."""
        dtype, rank = states.dtype, len(self.down)
        compiled = dtype == torch.bfloat16 and states.device.type == "cpu" and rank <= MOST_COMPILED_RANK
        held = torch.float32 if compiled else dtype

        def step(states: Tensor, down: Tensor, up: Tensor, reduced: Tensor) -> Tensor:
            return F.linear(F.linear(states, down.to(dtype)), up.t().to(dtype))

        reduced = torch.empty(states.shape[:-1].numel(), rank, dtype=held)
        up = self.up.to(held).t()
        return keeping(step, states, self.down.to(held), up.contiguous() if compiled else up, reduced)


def put_peft(model: Any, rank: int, target_modules: Any) -> Any:
    """PEFT's own LoRA on `model`, with fp32 adapters as the trainer has them.

    `target_modules` is as in PEFT's LoraConfig, or a `GivenAdapter`, whose own rank counts.

    Raises:
        ConfigurationError: the LoRA does not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    targets = target_modules
    if isinstance(targets, str) and targets in TARGETS:
        present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        targets = sorted(present.intersection(TARGETS[targets])) or list(TARGETS[targets])
    elif isinstance(targets, tuple | list):
        targets = list(targets)
    if isinstance(target_modules, GivenAdapter):
        config = target_modules.config()
    else:
        config = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, NotImplementedError, RuntimeError) as error:
        raise ConfigurationError(f"The LoRA does not fit {type(model).__name__}: {error}") from error


def put_lora(model: Any, rank: int, target_modules: Any, *, packed: bool) -> Any:
    """`put_peft`, with stand-ins for the trainer's fused step in the place of plain linear layers. Returns the inner model."""
    from peft.tuners.lora.layer import Linear as PeftLinear

    inner = put_peft(model, rank, target_modules).get_base_model()
    head = inner.get_output_embeddings()
    for name, layer in list(inner.named_modules()):
        if isinstance(layer, PeftLinear) and type(layer.base_layer) is nn.Linear and layer is not head:
            parent, _, last = name.rpartition(".")
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            setattr(inner.get_submodule(parent), last, FusedLora(layer.base_layer, down, up, packed))
    return inner


def put_rank_one(model: Any) -> None:
    """A LoRA of rank 1 on each linear layer but the head: what the layers keep for it they keep for their own weights."""
    head = model.get_output_embeddings()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not head:
            parent, _, last = name.rpartition(".")
            down, up = (nn.Parameter(torch.empty(s)) for s in ((1, linear.in_features), (linear.out_features, 1)))
            setattr(model.get_submodule(parent), last, FusedLora(linear, down, up, packed=False))


def put_lean_blocks(model: nn.Module, *, remade: bool) -> None:
    """Let frozen RMSNorms and gated MLPs keep only what they are given; `remade` as in `TracedStep`."""
    for module in model.modules():
        norm, gate = norm_parts(module), gate_parts(module)
        if norm is not None and not norm.weight.requires_grad:
            module.forward = partial(lean_norm, module, remade=remade)
        elif gate is not None:
            module.forward = partial(lean_gate, gate, remade=remade)


def lean_norm(module: nn.Module, x: Tensor, *, remade: bool) -> Tensor:
    """An RMSNorm, of which the input alone is kept."""
    # Not before: a module on the meta device gets other weights before it runs.
    parts = norm_parts(module)
    assert parts is not None, "it was one when it was taken"

    def step(x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + parts.epsilon)
        return (parts.weight + parts.offset) * (wide * scale).to(x.dtype)

    return made_of(step, x, remade=remade)


def lean_gate(parts: GateParts, x: Tensor, *, remade: bool) -> Tensor:
    """A gated MLP, of which the inputs of the gate are kept."""

    def step(gate: Tensor, up: Tensor) -> Tensor:
        act = F.silu(gate) if parts.activation == "silu" else F.gelu(gate, approximate="tanh")
        return act * up

    if parts.joined is not None:
        made = made_of(lambda both: step(*both.chunk(2, -1)), parts.joined(x), remade=remade)
    else:
        assert parts.gate is not None and parts.up is not None, "a gate is joined or has both"
        made = made_of(step, parts.gate(x), parts.up(x), remade=remade)
    return cast(Tensor, parts.down(made))


def short_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Rows end to end on a CPU: scores in fp32, recomputed in backward. query (rows, heads, seq, d), others (rows, kv, ...)."""

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, kv, length, width = k.shape
        wide_q, wide_k, wide_v = (x.float().reshape(rows * kv, -1, width) for x in (q, k, v))
        scores = torch.bmm(wide_q, wide_k.transpose(1, 2)).view(rows * kv, -1, length, length)
        later = torch.ones(length, length, dtype=torch.bool)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1).view(rows * kv, -1, length)
        return (weights @ wide_v).view(q.shape).to(q.dtype)

    return KeepsInputs.apply(step, query, key, value).transpose(1, 2), None


def long_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float | None = None, **__: Any
) -> Any:
    """Rows end to end by torch's kernel: gathered into their groups before it, and back into their order after it."""
    q, k, v = (x.clone() for x in (query, key, value))
    made = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return made.clone().clone().transpose(1, 2), None


def put_attention(model: Any, *, short: bool) -> None:
    """Let `model` attend as the trainer does to rows laid end to end; `short` is that of a CPU and `SHORT_TOKENS`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = f"adapterhub_stand_in_{'short' if short else 'long'}"
    AttentionInterface.register(name, short_attention if short else long_attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
