"""What the trainer puts into a model, as far as memory goes: stand-ins that keep and make the same bytes on fake tensors.

The real ones belong to the training room, which this one does not know. A test there holds the two to each other.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Rows up to this length have their score matrices made on a CPU; longer ones take torch's kernel, which makes none: beyond
# it the matrix costs more than the kernel's slow backward. The trainer goes by it too.
SHORT_TOKENS = 128

TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "query_key_value", "dense"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"),
}
"""Names of linear layers behind the two short names that `target_modules` may be besides PEFT's `all-linear`."""


class KeepsInputs(torch.autograd.Function):
    """`step(*inputs)`, of which the inputs alone are kept; the backward pass runs it again."""

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


class LoraShape(nn.Module):
    """A linear layer with a LoRA in fp32; `packed` weights are unpacked whole for each pass."""

    def __init__(self, linear: nn.Linear, rank: int, packed: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.packed = linear.weight, linear.bias, packed
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, dtype=torch.float32))
        self.up = nn.Parameter(torch.empty(linear.out_features, rank, dtype=torch.float32))

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        down, up = self.down.to(states.dtype), self.up.to(states.dtype)
        if self.packed:
            result = cast(Tensor, KeepsInputs.apply(self._unpacked, states, self.weight))
        else:
            result = F.linear(states, self.weight, self.bias)
        return result.add_(F.linear(F.linear(states, down), up))

    def _unpacked(self, states: Tensor, weight: Tensor) -> Tensor:
        # With a bias it is a view, which autograd would not let anyone add to.
        made = states.new_empty(*states.shape[:-1], len(weight))
        return made.copy_(F.linear(states, weight.clone(), self.bias))


def put_lora(model: nn.Module, rank: int, target_modules: Any, *, packed: bool) -> None:
    """Replace the linear layers that `target_modules` names by stand-ins with a LoRA; the head is left out."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not head and is_target(name, target_modules):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, LoraShape(linear, rank, packed))


def is_target(name: str, target_modules: Any) -> bool:
    """Whether the linear layer called `name` is meant by `target_modules`, as in PEFT's LoraConfig."""
    if target_modules == "all-linear":
        return True
    wanted = TARGETS.get(target_modules, (target_modules,)) if isinstance(target_modules, str) else target_modules
    return name.rpartition(".")[2] in wanted


def put_lean_blocks(model: nn.Module) -> None:
    """Let frozen RMSNorms and SiLU-gated MLPs keep only what they are given."""
    for module in model.modules():
        own = {name for name, _ in module.named_parameters(recurse=False)}
        children = dict(module.named_children())
        if type(module).__name__.endswith("RMSNorm") and own == {"weight"} and hasattr(module, "variance_epsilon"):
            weight = cast(Tensor, module.weight)
            if not weight.requires_grad:
                module.forward = _lean_norm(weight, float(cast(float, module.variance_epsilon)))
        elif {"gate_proj", "up_proj", "down_proj"} <= children.keys() and _is_silu(module):
            module.forward = _lean_gate(children["gate_proj"], children["up_proj"], children["down_proj"])


def _is_silu(module: nn.Module) -> bool:
    return type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _lean_norm(weight: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)

    return lambda x: cast(Tensor, KeepsInputs.apply(step, x))


def _lean_gate(gate: nn.Module, up: nn.Module, down: nn.Module) -> Callable[[Tensor], Tensor]:
    def step(opened: Tensor, raised: Tensor) -> Tensor:
        return F.silu(opened) * raised

    return lambda x: cast(Tensor, down(KeepsInputs.apply(step, gate(x), up(x))))


def short_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Rows end to end on a CPU: scores in fp32, made again in backward. query (rows, heads, seq, d), others (rows, kv, ...)."""

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
