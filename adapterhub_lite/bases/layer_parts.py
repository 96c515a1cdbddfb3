"""What the parts of a decoder's layers are, read off the modules themselves: norms, gated MLPs, attention.

One description for whoever runs these parts in another way. Families differ in names and constants, not in kind: a part is
described by what it holds, never by its class, and whoever uses a description compares with the module's own forward.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class NormParts:
    """RMSNorm: (offset + weight) * x / rms(x). `wide`: multiplied in fp32 and rounded once, as Gemma does."""

    weight: Tensor
    epsilon: float
    offset: float
    wide: bool


@dataclass(frozen=True)
class GateParts:
    """down(act(gate(x)) * up(x)); `joined` projects both at once, gate first, and then `gate` and `up` are None."""

    gate: nn.Module | None
    up: nn.Module | None
    joined: nn.Module | None
    down: nn.Module
    activation: Activation


@dataclass(frozen=True)
class AttentionParts:
    """Projections to queries, keys and values, one by one or `joined` in this order; norms of each head, if any.

    `rotates` is False in layers without positions; `window` is how many tokens a query sees, None for all before it.
    """

    queries: nn.Module | None
    keys: nn.Module | None
    values: nn.Module | None
    joined: nn.Module | None
    out: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    head_width: int
    rotates: bool
    window: int | None


def norm_parts(module: nn.Module) -> NormParts | None:
    """The parts of an RMSNorm, None of anything else."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if not type(module).__name__.endswith("RMSNorm") or own != {"weight"}:
        return None
    weight = cast(Tensor, module.weight)
    if hasattr(module, "variance_epsilon"):
        return NormParts(weight, cast(float, module.variance_epsilon), 0.0, wide=False)
    if hasattr(module, "eps") and hasattr(module, "_norm"):
        return NormParts(weight, cast(float, module.eps), 1.0, wide=True)
    return None


def gate_parts(module: nn.Module) -> GateParts | None:
    """The parts of a gated MLP, None of anything else."""
    children = dict(module.named_children())
    act = children.get("act_fn") or children.get("activation_fn")
    activation = activation_of(act)
    if activation is None or any(True for _ in module.parameters(recurse=False)):
        return None
    names = children.keys() - {"act_fn", "activation_fn"}
    if names == {"gate_proj", "up_proj", "down_proj"}:
        return GateParts(children["gate_proj"], children["up_proj"], None, children["down_proj"], activation)
    if names == {"gate_up_proj", "down_proj"}:
        return GateParts(None, None, children["gate_up_proj"], children["down_proj"], activation)
    return None


def activation_of(act: nn.Module | None) -> Activation | None:
    """Which of the two that gates use an activation is, under any of transformers' names; None of others."""
    name = type(act).__name__
    if name in ("SiLU", "SiLUActivation"):
        return "silu"
    if name in ("GELUTanh", "PytorchGELUTanh"):
        return "gelu_tanh"
    return None


def attention_parts(module: nn.Module) -> AttentionParts | None:
    """The parts of a self-attention with rotary positions, None of anything else."""
    children = dict(module.named_children())
    norms = {"q_norm", "k_norm"} & children.keys()
    separate = {"q_proj", "k_proj", "v_proj", "o_proj"}
    names = children.keys() - norms
    held: Any = module
    if any(True for _ in module.parameters(recurse=False)) or len(norms) == 1 or not hasattr(module, "head_dim"):
        return None
    if names not in (separate, {"qkv_proj", "o_proj"}):
        return None
    if getattr(module, "attn_logit_softcapping", None) is not None or not getattr(module, "is_causal", True):
        return None
    return AttentionParts(
        queries=children.get("q_proj"),
        keys=children.get("k_proj"),
        values=children.get("v_proj"),
        joined=children.get("qkv_proj"),
        out=children["o_proj"],
        query_norm=children.get("q_norm"),
        key_norm=children.get("k_norm"),
        head_width=int(held.head_dim),
        rotates=bool(getattr(module, "use_rope", True)),
        window=window_of(module),
    )


def window_of(module: nn.Module) -> int | None:
    """How many tokens a query of this attention sees, None for all before it."""
    held: Any = module
    window = held.sliding_window if hasattr(held, "sliding_window") else None
    if window is None and not hasattr(held, "sliding_window"):
        config = getattr(held, "config", None)
        uses = getattr(config, "use_sliding_window", True) and getattr(config, "layer_types", None) is None
        window = getattr(config, "sliding_window", None) if uses else None
    return window
