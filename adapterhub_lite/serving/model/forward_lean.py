"""The lean forward pass: the arithmetic of a family's layers, as `bases/layer_parts` describes them, with fewer operations.

Linear layers with one input are one product, for the base and for the LoRA; on a CPU that has it, bfloat16 weights are
kept in the layout that its matrix units read. What lies between the products is in `elementwise`. On a CPU with a C
compiler `forward_native` computes the same. Knows nothing of requests; the plain way is `forward_hf`.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from adapterhub_lite.bases.layer_parts import attention_parts, norm_parts, window_of
from adapterhub_lite.serving.adapters.weights import Family
from adapterhub_lite.serving.model.cache.kv_cache import KVCache
from adapterhub_lite.serving.model.elementwise import Elementwise, Heads, Norm, Turn
from adapterhub_lite.serving.model.lean_families import find_parts
from adapterhub_lite.serving.model.lora.pairs_torch import LoraBank
from adapterhub_lite.serving.model.packed_step import Step


class FusedLinear:
    """Frozen linear layers with one input as one product; x (T, in) -> (T, sum of outs), side by side.

    All or none of them have a bias. `release` takes the weights out of the modules they came from, so that they are held
    once; `give_back` puts them there again.
    """

    def __init__(self, modules: dict[str, nn.Linear], *, release: bool = True) -> None:
        self._modules, self._released = modules, release
        linears = list(modules.values())
        weights = [linear.weight.detach() for linear in linears]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self._sizes = [linear.out_features for linear in linears]
        biases = [linear.bias for linear in linears]
        self._bias = torch.cat([bias.detach() for bias in biases]) if biases[0] is not None else None
        # Only the processor's own layout lets its matrix units read bf16 without rearranging it at each call.
        self._packed = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _mkldnn_has_bfloat16()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 16) if self._packed else weight
        # What `tensors` allocates: weights in the processor's own layout are no plain ones.
        self.copied_bytes = weight.nbytes if self._packed else 0
        if release:
            for linear in linears:
                linear.weight.data = weight.new_empty(0)

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
        found = dict(zip((f"{name}.weight" for name in self._modules), dense.split(self._sizes), strict=True))
        if self._bias is not None:
            found |= zip((f"{name}.bias" for name in self._modules), self._bias.split(self._sizes), strict=True)
        return found

    def take_again(self) -> None:
        """Take the weights out of the modules once more, where others have put them back meanwhile."""
        if self._released:
            for linear in self._modules.values():
                linear.weight.data = torch.empty(0, dtype=linear.weight.dtype)

    def give_back(self) -> None:
        """Put the weights back into the modules they came from; this object cannot be called any more."""
        if self._released:
            dense = self.tensors()
            for name, linear in self._modules.items():
                linear.weight.data = dense[f"{name}.weight"].clone()
            self._weight = self._weight.new_empty(0)


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
    linears: tuple[FusedLinear, ...]  # in the order of `LayerParts.roles`
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    heads: Heads
    scaling: float
    softcap: float | None
    # Whose window counts now: the proof at start narrows it for a while.
    attention: nn.Module
    turn: str | None  # the type of its rotary frequencies, "" where there is only one, None for none


def fused_groups(model: PreTrainedModel, families: tuple[Family, ...]) -> tuple[tuple[Family, ...], ...]:
    """Return the families that share an input together, in the order in which layers compute them."""
    parts = find_parts(model)
    assert parts is not None
    by_role = {re.sub(r"^.*\{\}\.", "", family.name): family for family in families}
    return tuple(tuple(by_role[path] for path in role) for role in parts.roles)


class LeanForward:
    """Computes steps with the weights of `model`, which it takes: the model itself cannot be called until `close`."""

    def __init__(self, model: PreTrainedModel, lora: LoraBank, cache: KVCache) -> None:
        inner: Any = model.model
        parts = find_parts(model)
        assert parts is not None
        self._model, self._parts = model, parts
        self._lora, self._cache, self._activation = lora, cache, parts.activation
        self._elementwise = Elementwise()
        self._embed: nn.Module = inner.embed_tokens
        self._embedding_multiplier: float = getattr(inner, "embedding_multiplier", 1.0)
        self._rotary = inner.rotary_emb
        self._norm = self._norm_at(inner, "norm")
        self._factor: float = getattr(inner.layers[0], "residual_multiplier", 1.0)
        self._logits_scaling: float = getattr(model.config, "logits_scaling", None) or 1.0
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self._linears: list[FusedLinear] = []
        try:
            self._layers = [self._take(f"model.layers.{i}", layer) for i, layer in enumerate(inner.layers)]
            # A tied head shares the embedding's tensor, which is still needed row by row.
            self._tied: bool = model.config.tie_word_embeddings
            self._head = self._fused({"lm_head": model.lm_head}, release=not self._tied)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the model its weights back."""
        for linear in self._linears:
            linear.give_back()

    @property
    def copied_bytes(self) -> int:
        """Bytes that `tensors` allocates."""
        return sum(linear.copied_bytes for linear in self._linears)

    def take_again(self) -> None:
        """Take the weights out of the modules once more."""
        for linear in self._linears:
            linear.take_again()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fused weights by their names in the model, as they are used now."""
        found: dict[str, torch.Tensor] = {}
        for linear in self._linears:
            own = linear.tensors()
            if linear is self._head and self._tied and torch.equal(own["lm_head.weight"], self._embed.weight):  # type: ignore[arg-type]
                continue
            found |= own
        return found

    def forward(self, step: Step) -> torch.Tensor:
        """Return the logits (tokens that want them, vocabulary)."""
        between = self._elementwise
        x = self._embed(step.token_ids)
        x = x * self._embedding_multiplier if self._embedding_multiplier != 1.0 else x
        turns = self._turns(step.positions)
        following = [*(layer.before_attention for layer in self._layers[1:]), None]
        y = between.add_and_norm(x, None, None, 1.0, self._layers[0].before_attention)
        for index, (layer, norm) in enumerate(zip(self._layers, following, strict=True)):
            qkv = self._linear(0, index, layer, y).view(x.shape[0], -1, layer.heads.dim)
            seen = self._attend(index, layer, qkv, turns)
            out = self._linear(1, index, layer, seen.flatten(1))
            z = between.add_and_norm(x, out, layer.after_attention, self._factor, layer.before_mlp)
            gated = between.gate(self._linear(2, index, layer, z), self._activation)
            y = between.add_and_norm(x, self._linear(3, index, layer, gated), layer.after_mlp, self._factor, norm)
        logits = self._head(self._norm(x[step.wanted]))
        if self._logits_scaling != 1.0:
            logits = logits / self._logits_scaling
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _attend(self, index: int, layer: _Layer, qkv: torch.Tensor, turns: dict[str, Turn]) -> torch.Tensor:
        heads = layer.heads
        room = self._cache.room(index, (heads.kv, heads.dim), (heads.kv, heads.dim), qkv.dtype)
        turn = None if layer.turn is None else turns[layer.turn]
        query = self._elementwise.turn_and_store(qkv, heads, turn, room)
        return self._cache.look(query, room, layer.scaling, window_of(layer.attention), softcap=layer.softcap)

    def _turns(self, positions: torch.Tensor) -> dict[str, Turn]:
        """The rotary positions of a step, for each type of layer."""
        like = torch.empty(0, dtype=self._model.dtype, device=positions.device)
        found = {}
        for name in {layer.turn for layer in self._layers if layer.turn is not None}:
            cos, sin = self._rotary(like, positions[None], *([name] if name else []))
            found[name] = Turn(cos[0], sin[0])
        return found

    def _take(self, path: str, layer: nn.Module) -> _Layer:
        parts = self._parts
        attention: Any = layer.get_submodule("self_attn")
        index, config = attention.layer_idx, self._model.config
        typed = isinstance(self._rotary.rope_type, dict)
        own = attention_parts(attention)
        assert own is not None
        dim = own.head_width
        query_norm, key_norm = self._norm_of(layer, parts.query_norm), self._norm_of(layer, parts.key_norm)
        return _Layer(
            linears=tuple(
                self._fused({f"{path}.{role}": layer.get_submodule(role) for role in roles})  # type: ignore[misc]
                for roles in parts.roles
            ),
            before_attention=self._norm_of(layer, parts.before_attention),
            after_attention=self._norm_of(layer, parts.after_attention),
            before_mlp=self._norm_of(layer, parts.before_mlp),
            after_mlp=self._norm_of(layer, parts.after_mlp),
            heads=Heads(config.num_attention_heads, config.num_key_value_heads, dim, query_norm, key_norm),
            scaling=attention.scaling,
            softcap=own.softcap,
            attention=attention,
            # SmolLM3 turns nothing in some layers.
            turn=(config.layer_types[index] if typed else "") if own.rotates else None,
        )

    def _fused(self, modules: dict[str, nn.Linear], *, release: bool = True) -> FusedLinear:
        self._linears.append(FusedLinear(modules, release=release))
        return self._linears[-1]

    def _norm_of(self, layer: nn.Module, path: str) -> Norm | None:
        return self._norm_at(layer, path) if path else None

    def _norm_at(self, within: nn.Module, path: str) -> Norm:
        norm = norm_parts(within.get_submodule(path))
        assert norm is not None
        return Norm(norm.weight, norm.epsilon, less_one=norm.offset == 1.0)

    def _linear(self, role: int, index: int, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        return self._lora.add(role, index, x, layer.linears[role](x))
