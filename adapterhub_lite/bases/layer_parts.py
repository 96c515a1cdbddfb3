"""What a decoder's layers and their parts are, read off the modules themselves: norms, gated MLPs, attention.

One description for whoever runs these parts in another way, in training and in serving. Families differ in names and
constants, not in kind: a part is described by what it holds, never by its class, and whoever uses a description compares
with the module's own forward. A layer is, for the states x of its tokens,

    x += m * after_attention(O attend(turn(Q y), turn(K y), V y))     y = before_attention(x)
    x += m * after_mlp(D (act(G z) * U z))                            z = before_mlp(x)

with the parts that it lacks left out.
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

    `rotates` is False in layers without positions; `window` is how many tokens a query sees, None for all before it;
    scores are capped at `softcap` where there is one.
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
    softcap: float | None


@dataclass(frozen=True)
class LayerParts:
    """A layer by the paths of its parts within it, "" for one that it lacks.

    Several paths are products of one input. A norm of queries or keys is one of each head, or of all heads together, as
    its weight is long.
    """

    query_key_value: tuple[str, ...]
    attention_output: str
    gate_up: tuple[str, ...]
    mlp_output: str
    activation: Activation
    before_attention: str
    after_attention: str
    before_mlp: str
    after_mlp: str
    query_norm: str
    key_norm: str

    @property
    def roles(self) -> tuple[tuple[str, ...], ...]:
        """The linear layers, those with one input together, in the order in which a layer computes them."""
        return self.query_key_value, (self.attention_output,), self.gate_up, (self.mlp_output,)

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that there are."""
        named = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(filter(None, (*named, self.query_norm, self.key_norm)))


# The four places of norms, by the names of those that a layer has.
FOUR = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
PLACES: dict[frozenset[str], tuple[str, str, str, str]] = {
    frozenset(FOUR[:2]): (FOUR[0], "", FOUR[1], ""),
    frozenset(FOUR): FOUR,
    frozenset({FOUR[1], FOUR[3]}): ("", FOUR[1], "", FOUR[3]),
}


def layer_parts(layer: nn.Module) -> LayerParts | None:
    """The parts of a layer that is one attention and one gated MLP with RMSNorms, None of any other."""
    children = dict(layer.named_children())
    attention = attention_parts(children["self_attn"]) if "self_attn" in children else None
    gate = gate_parts(children["mlp"]) if "mlp" in children else None
    if attention is None or gate is None:
        return None
    norms = frozenset(name for name, child in children.items() if norm_parts(child) is not None)
    paths = {id(module): name for name, module in layer.named_modules()}
    inner = [one for one in (attention.query_norm, attention.key_norm) if one is not None]
    if norms not in PLACES or any(norm_parts(one) is None for one in inner):
        return None
    before_attention, after_attention, before_mlp, after_mlp = PLACES[norms]

    def named(*modules: nn.Module | None) -> tuple[str, ...]:
        return tuple(paths[id(module)] for module in modules if module is not None)

    found = LayerParts(
        query_key_value=named(attention.joined, attention.queries, attention.keys, attention.values),
        attention_output=paths[id(attention.out)],
        gate_up=named(gate.joined, gate.gate, gate.up),
        mlp_output=paths[id(gate.down)],
        activation=gate.activation,
        before_attention=before_attention,
        after_attention=after_attention,
        before_mlp=before_mlp,
        after_mlp=after_mlp,
        query_norm="".join(named(attention.query_norm)),
        key_norm="".join(named(attention.key_norm)),
    )
    described = {*found.norms, *(path for role in found.roles for path in role)}
    # A weight that the description leaves out would be left out of the answers.
    return found if {name.rpartition(".")[0] for name, _ in layer.named_parameters()} == described else None


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
    if not getattr(module, "is_causal", True):
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
        softcap=getattr(module, "attn_logit_softcapping", None),
    )


def depends_on_length(config: Any) -> bool:  # a config of transformers
    """Whether rotary frequencies depend on how long a row is: rows of one step would then change each other's."""

    def kinds(value: object) -> set[str]:
        if not isinstance(value, dict):
            return set()
        own = {str(value.get("rope_type"))}
        return own.union(*map(kinds, value.values()))

    text = config.get_text_config()
    return bool(kinds(getattr(text, "rope_parameters", None)) & {"dynamic", "longrope"})


def window_of(module: nn.Module) -> int | None:
    """How many tokens a query of this attention sees, None for all before it."""
    held: Any = module
    window = held.sliding_window if hasattr(held, "sliding_window") else None
    if window is None and not hasattr(held, "sliding_window"):
        config = getattr(held, "config", None)
        uses = getattr(config, "use_sliding_window", True) and getattr(config, "layer_types", None) is None
        window = getattr(config, "sliding_window", None) if uses else None
    return window
