"""What the layers of each family are made of, as the lean pass computes them: one description per family.

A layer of any of them is, for the states x of its tokens,

    x += m * after_attention(O attend(turn(Q y), turn(K y), V y))     y = before_attention(x)
    x += m * after_mlp(D (act(G z) * U z))                            z = before_mlp(x)

with the parts a family lacks left out. A description says where they are. What a configuration decides is read from the
model's own modules when the pass is made: widths, multipliers, windows, activation, rotary frequencies, soft caps.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerParts:
    """Where the parts of a family's layers are, as paths within a layer; "" for a part that it lacks.

    Several paths are products of one input, computed as one. A norm of queries or keys is one of each head, or of all
    heads together, as its weight is long.
    """

    query_key_value: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_output: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    query_norm: str = ""
    key_norm: str = ""
    # Norms multiply by 1 + weight.
    norms_less_one: bool = False
    # Whose `sliding_window` counts: each attention's own, the configuration's for all layers, or nobody's.
    window: Literal["attention", "config", ""] = ""
    # Whether scores are capped by the attention's `attn_logit_softcapping`.
    capped: bool = False

    @property
    def roles(self) -> tuple[tuple[str, ...], ...]:
        """The linear layers, those with one input together, in the order in which a layer computes them."""
        return self.query_key_value, (self.attention_output,), self.gate_up, (self.mlp_output,)

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that there are."""
        named = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(filter(None, (*named, self.query_norm, self.key_norm)))


LLAMA = LayerParts()
QWEN3 = LayerParts(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", window="attention")
GEMMA = LayerParts(norms_less_one=True)
GEMMA2 = replace(
    GEMMA, after_attention="post_attention_layernorm", before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm", window="attention", capped=True,
)  # fmt: skip
OLMO2 = replace(
    QWEN3, before_attention="", after_attention="post_attention_layernorm", before_mlp="",
    after_mlp="post_feedforward_layernorm", window="",
)  # fmt: skip
FAMILIES: dict[str, LayerParts] = {
    "LlamaForCausalLM": LLAMA,
    "GraniteForCausalLM": LLAMA,
    "SeedOssForCausalLM": LLAMA,
    "MistralForCausalLM": replace(LLAMA, window="config"),
    "Qwen2ForCausalLM": replace(LLAMA, window="attention"),
    "SmolLM3ForCausalLM": replace(LLAMA, window="attention"),
    "Phi3ForCausalLM": replace(
        LLAMA, query_key_value=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",),
        activation="mlp.activation_fn", window="config",
    ),
    "Qwen3ForCausalLM": QWEN3,
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": replace(GEMMA2, query_norm=QWEN3.query_norm, key_norm=QWEN3.key_norm, capped=False),
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": replace(OLMO2, window="attention"),
}  # fmt: skip


def find_parts(model: PreTrainedModel) -> LayerParts | None:
    """The description of a model's layers; None where there is none, or where it leaves out any of their weights."""
    parts = FAMILIES.get(type(model).__name__)
    if parts is None or not type(model).__module__.startswith("transformers.") or depends_on_length(model):
        return None
    paths = {path for role in parts.roles for path in role}
    for layer in model.model.layers:
        modules = dict(layer.named_modules())
        linears = [modules.get(path) for path in paths]
        # Not a quantised one, nor one of somebody's own.
        if not all(type(linear) is nn.Linear and linear.weight.is_floating_point() for linear in linears):
            return None
        if {name.rpartition(".")[0] for name, _ in layer.named_parameters()} != paths | set(parts.norms):
            return None
    return parts


def depends_on_length(model: PreTrainedModel) -> bool:
    """Whether rotary frequencies depend on how long a row is: rows of one step would then change each other's."""

    def kinds(value: object) -> set[str]:
        if not isinstance(value, dict):
            return set()
        own = {str(value.get("rope_type"))}
        return own.union(*map(kinds, value.values()))

    config = model.config.get_text_config()
    return bool(kinds(getattr(config, "rope_parameters", None)) & {"dynamic", "longrope"})
