"""A lean forward pass for models of the Llama kind: the same arithmetic with fewer and larger products.

q, k and v are one product, and so are gate and up, for the base and for the lora; on a CPU that has it, bfloat16
weights are kept in the layout that its matrix units read. Knows nothing of requests; the plain way is `hosted`.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from adapterhub_lite.serving.adapters.weights import Family
from adapterhub_lite.serving.model.kv_cache import KVCache, Step
from adapterhub_lite.serving.model.lora_torch import LoraBank

ATTENTION_INPUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUTPUT = ("self_attn.o_proj",)
MLP_INPUT = ("mlp.gate_proj", "mlp.up_proj")
MLP_OUTPUT = ("mlp.down_proj",)
ROLES = (ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_OUTPUT)
CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


class FusedLinear:
    """Frozen linear layers with one input as one product; x (T, in) -> (T, sum of outs), side by side.

    All or none of them have a bias. `release` takes the weights out of the modules they came from, so that they are held once.
    """

    def __init__(self, modules: dict[str, nn.Linear], *, release: bool = True) -> None:
        linears = list(modules.values())
        weights = [linear.weight.detach() for linear in linears]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self._names = list(modules)
        self._sizes = [linear.out_features for linear in linears]
        biases = [linear.bias for linear in linears]
        self._bias = torch.cat([bias.detach() for bias in biases]) if biases[0] is not None else None
        # Only the processor's own layout lets its matrix units read bf16 without rearranging it at each call.
        self._packed = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _mkldnn_has_bfloat16()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 16) if self._packed else weight
        if release:
            for linear in linears:
                linear.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ W.T + bias."""
        if self._packed:
            tokens = x.shape[0]
            more = filled_tokens(tokens) - tokens
            filled = functional.pad(x, (0, 0, 0, more)) if more else x
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(filled, self._weight, self._bias, "none", [], "")
            return out[:tokens]
        return functional.linear(x, self._weight, self._bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights as they are used, in the layout of the modules they came from."""
        dense = self._weight.to_dense() if self._packed else self._weight
        found = dict(zip((f"{name}.weight" for name in self._names), dense.split(self._sizes), strict=True))
        if self._bias is not None:
            found |= zip((f"{name}.bias" for name in self._names), self._bias.split(self._sizes), strict=True)
        return found


def filled_tokens(tokens: int) -> int:
    """To how many rows a product of `tokens` rows is filled up: of a few sizes, because each one is compiled.

    oneDNN keeps the code it made for a number of rows for good, about 2 MB over the products of a layer; with every
    number of tokens that a step can have, a server would grow for hours. And a wide product of one or two rows takes
    six times as long as one of three.
    """
    step = 2 if tokens <= 16 else 8 if tokens <= 64 else 32
    return max(4, -(-tokens // step) * step)


def _mkldnn_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class _Layer:
    norm_in: torch.Tensor
    norm_mlp: torch.Tensor
    linears: tuple[FusedLinear, ...]  # in the order of ROLES


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether `LlamaForward` computes what `model` does: a known class with plain layers and nothing unusual set."""
    config = model.config
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return (
        type(model).__name__ in CLASSES
        and all(type(linear) is nn.Linear and linear.weight.is_floating_point() for linear in linears)
        and config.hidden_act == "silu"
        and getattr(config, "sliding_window", None) is None
        and not getattr(config, "use_sliding_window", False)
        # Frequencies by the length of a row would be one for all the rows of a step.
        and config.rope_parameters["rope_type"] not in ("dynamic", "longrope")
    )


def fused_groups(families: tuple[Family, ...]) -> tuple[tuple[Family, ...], ...]:
    """Return the families that share an input together, in the order in which layers compute them."""
    by_role = {re.sub(r"^.*\{\}\.", "", family.name): family for family in families}
    return tuple(tuple(by_role[role] for role in roles) for roles in ROLES)


class LlamaForward:
    """Computes steps with the weights of `model`, which it takes over: the model itself cannot be called any more."""

    def __init__(self, model: PreTrainedModel, lora: LoraBank, cache: KVCache) -> None:
        config, inner = model.config, model.model
        self._lora, self._cache = lora, cache
        self._embedding: torch.Tensor = inner.embed_tokens.weight.detach()
        self._rotary = inner.rotary_emb
        self._norm: torch.Tensor = inner.norm.weight.detach()
        self._epsilon: float = config.rms_norm_eps
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._layers = [self._take(f"model.layers.{i}", layer) for i, layer in enumerate(inner.layers)]
        # A tied head shares the embedding's tensor, which is still needed row by row.
        self._head = FusedLinear({"lm_head": model.lm_head}, release=not config.tie_word_embeddings)
        self._tied: bool = config.tie_word_embeddings

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fused weights by their names in the model, as they are used now."""
        found = self._head.tensors()
        if self._tied and torch.equal(found["lm_head.weight"], self._embedding):
            found = {}
        for layer in self._layers:
            for linear in layer.linears:
                found |= linear.tensors()
        return found

    def forward(self, step: Step) -> torch.Tensor:
        """Return the logits (tokens that want them, vocabulary)."""
        x = self._embedding[step.token_ids]
        cos, sin = self._rotary(x[None], step.positions[None])
        half = self._head_dim // 2
        # Signs in the sines: rotating a head is then a roll, a product and a product-sum.
        signed = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)[:, None]
        for index, layer in enumerate(self._layers):
            x = self._layer(index, layer, x, cos[0][:, None], signed)
        return self._head(self._rms(x[step.wanted], self._norm))

    def _take(self, path: str, layer: nn.Module) -> _Layer:
        def fused(roles: tuple[str, ...]) -> FusedLinear:
            return FusedLinear({f"{path}.{role}": layer.get_submodule(role) for role in roles})  # type: ignore[misc]

        norm_in, norm_mlp = layer.get_submodule("input_layernorm"), layer.get_submodule("post_attention_layernorm")
        return _Layer(
            norm_in.weight.detach(),  # type: ignore[operator]
            norm_mlp.weight.detach(),  # type: ignore[operator]
            tuple(fused(roles) for roles in ROLES),
        )

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._epsilon)

    def _linear(self, role: int, index: int, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        return self._lora.add(role, index, x, layer.linears[role](x))

    def _layer(self, index: int, layer: _Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        qkv = self._linear(0, index, layer, self._rms(x, layer.norm_in)).view(x.shape[0], -1, self._head_dim)
        turned = self._heads + self._kv_heads
        qk = qkv[:, :turned]
        qk = torch.addcmul(qk * cos, qk.roll(self._head_dim // 2, -1), sin)
        seen = self._cache.attend(index, qk[:, : self._heads], qk[:, self._heads :], qkv[:, turned:], None)
        x = x + self._linear(1, index, layer, seen.flatten(1))
        gate, up = self._linear(2, index, layer, self._rms(x, layer.norm_mlp)).chunk(2, -1)
        return x.add_(self._linear(3, index, layer, functional.silu(gate).mul_(up)))
