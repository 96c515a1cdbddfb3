"""The lean forward pass in compiled code (compiled/step.c): a step of all layers in one call, on a CPU.

The same arithmetic of the same families as `forward_lean`, which is what it is held against: `bases/layer_parts` says what the
layers are made of. Weights lie in panels that a thread reads from end to end (`compiled/packed_weights`), as they are or as int8 or
int4; states are in float32. Knows nothing of requests.
"""

import ctypes
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adapterhub_lite.bases.layer_parts import attention_parts, norm_parts, window_of
from adapterhub_lite.serving.model.activations import SIGMOID_FORMS
from adapterhub_lite.serving.model.cache.kv_cache import KVCache
from adapterhub_lite.serving.model.compiled.library import StepFunctions
from adapterhub_lite.serving.model.compiled.packed_weights import PackedLinear, PanelStore, Precision, Product
from adapterhub_lite.serving.model.lean_families import find_parts
from adapterhub_lite.serving.model.lora.pairs_native import KINDS, NativeLora
from adapterhub_lite.serving.model.packed_step import Step

ROLES = 4
NORMS = 6
# A row that computes more tokens at once is a prompt being read: laying out keys and values as weights pays then.
MOST_QUERIES = 8
POINTER = ctypes.c_void_p


def _fields(kind: Any, *names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names)


class _Layer(ctypes.Structure):  # all of these as in step.c
    _fields_ = (
        ("linears", Product * ROLES),
        ("norms", POINTER * NORMS),
        *_fields(POINTER, "cos", "sin", "keys", "values", "places"),
        ("epsilons", ctypes.c_float * NORMS),
        *_fields(ctypes.c_float, "scaling", "softcap"),
        *_fields(ctypes.c_int32, "heads", "kv_heads", "dim", "rotary", "query_together", "key_together", "window"),
    )


class _Routing(ctypes.Structure):
    _fields_ = (*_fields(POINTER, "entries", "blocks"), *_fields(ctypes.c_int32, "count", "widest"))


class _Span(ctypes.Structure):
    _fields_ = _fields(ctypes.c_int32, "token", "count", "begin", "start")


class _Step(ctypes.Structure):
    _fields_ = (
        *_fields(POINTER, "layers", "routing", "token_ids", "positions", "embedding", "spans", "wanted", "norm"),
        *_fields(POINTER, "logits", "scratch"),
        ("head", Product),
        *_fields(ctypes.c_int32, "layer_count", "tokens", "width", "span_count", "wanted_count", "kind", "threads"),
        *_fields(ctypes.c_int32, "most_queries"),
        *_fields(ctypes.c_float, "embedding_multiplier", "residual", "epsilon", "gate_factor", "gate_cubic"),
    )


class _Turns:
    """Cosines and sines (positions, rotary) of one kind of rotary frequencies, for as many positions as were met."""

    def __init__(self, rotary: Any, name: str) -> None:
        self._rotary, self._name = rotary, name
        self.cos = self.sin = torch.empty(0, 0)

    def reach(self, positions: int) -> None:
        """Have the first `positions`."""
        if self.cos.shape[0] < positions:
            count = max(512, 1 << (positions - 1).bit_length())
            named = [self._name] if self._name else []
            cos, sin = self._rotary(torch.empty(0), torch.arange(count)[None], *named)
            self.cos, self.sin = cos[0].float().contiguous(), sin[0].float().contiguous()


def embedding_multiplier(inner: Any) -> float:
    """What a model multiplies its embeddings by; Gemma's factor is rounded to the dtype of the weights."""
    own = torch.as_tensor(getattr(inner.embed_tokens, "embed_scale", 1.0)).to(inner.embed_tokens.weight.dtype)
    return float(own) * float(getattr(inner, "embedding_multiplier", 1.0))


class NativeForward:
    """Computes steps with the weights of `model`, which it takes: the model itself cannot be called until `close`."""

    def __init__(
        self,
        model: PreTrainedModel,
        lora: NativeLora,
        cache: KVCache,
        functions: StepFunctions,
        *,
        precision: Precision | None = None,
        store: PanelStore | None = None,
        threads: int | None = None,
    ) -> None:
        inner: Any = model.model
        parts = find_parts(model)
        assert parts is not None
        self._parts, self._model, self._lora, self._cache, self._functions = parts, model, lora, cache, functions
        self._precision, self._store, self._threads = precision, store, threads
        self._embed: Any = inner.embed_tokens
        self._kept: list[torch.Tensor] = []  # what the compiled code reads
        self._linears: list[PackedLinear] = []
        self._turns: dict[str, _Turns] = {}
        self._turn_of: list[str | None] = []
        self._attentions: list[nn.Module] = []
        self._scratch = torch.empty(0, dtype=torch.uint8)
        config = model.config
        self._logits_scaling: float = getattr(config, "logits_scaling", None) or 1.0
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        try:
            self._layers = (_Layer * len(inner.layers))()
            for index, layer in enumerate(inner.layers):
                self._take(self._layers[index], f"model.layers.{index}", layer)
            width = self._embed.weight.shape[1]
            # One tensor for both, which is then held once: rows of the embedding are read from the head.
            self._tied: bool = model.lm_head.weight is self._embed.weight
            self._head = self._packed({"lm_head": model.lm_head})
            self._leave_the_file(model)
            norm, epsilon = self._norm(inner, "norm")
        except BaseException:
            self.close()
            raise
        gate_factor, gate_cubic = SIGMOID_FORMS[parts.activation]
        self._routing = (_Routing * ROLES)()
        self._step = _Step(
            layers=ctypes.addressof(self._layers), routing=ctypes.addressof(self._routing), head=self._head.product,
            embedding=0 if self._tied else self._embed.weight.data_ptr(), norm=norm, epsilon=epsilon, layer_count=len(self._layers),
            width=width, kind=KINDS[model.dtype], most_queries=MOST_QUERIES,
            embedding_multiplier=embedding_multiplier(inner),
            residual=getattr(inner.layers[0], "residual_multiplier", 1.0),
            gate_factor=gate_factor, gate_cubic=gate_cubic,
        )  # fmt: skip

    def close(self) -> None:
        """Give the model its weights back."""
        for linear in self._linears:
            linear.give_back()

    @property
    def copied_bytes(self) -> int:
        """Bytes that `tensors` allocates."""
        return sum(linear.dense_bytes for linear in self._linears)

    def take_again(self) -> None:
        """Take the weights out of the modules once more, where others have put them back meanwhile."""
        for linear in self._linears:
            linear.take_again()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights that were taken, by their names in the model, as they are used now."""
        found: dict[str, torch.Tensor] = {}
        for linear in self._linears:
            own = linear.tensors()
            if linear is self._head and self._tied:
                own["model.embed_tokens.weight"] = own.pop("lm_head.weight")
            found |= own
        return found

    def forward(self, step: Step) -> torch.Tensor:
        """Return the logits (tokens that want them, vocabulary) in float32."""
        most = max(run.kv_length for run in step.runs)
        kept = [self._fill(index, layer, most) for index, layer in enumerate(self._layers)]
        spans, held = self._spans(step), self._step
        for role in range(ROLES):
            self._routing[role] = _Routing(*self._lora.routing(role))
        logits = torch.empty(step.wanted.shape[0], self._step.head.outputs)
        held.token_ids, held.positions = step.token_ids.data_ptr(), step.positions.data_ptr()
        held.wanted, held.wanted_count = step.wanted.data_ptr(), logits.shape[0]
        held.spans, held.span_count = ctypes.addressof(spans), len(spans)
        held.tokens, held.logits = step.token_ids.shape[0], logits.data_ptr()
        held.threads = self._threads or torch.get_num_threads()
        address = ctypes.addressof(held)
        needed = self._functions.scratch_bytes(address)
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        held.scratch = self._scratch.data_ptr()
        self._functions.compute(address)
        del kept
        if self._logits_scaling != 1.0:
            logits /= self._logits_scaling
        return logits if self._softcap is None else logits.div_(self._softcap).tanh_().mul_(self._softcap)

    def _leave_the_file(self, model: PreTrainedModel) -> None:
        """Copy what is left of the model, so that nothing keeps the mapped file it was loaded from in memory."""
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.numel():
                tensor.data = tensor.data.clone()

    def _spans(self, step: Step) -> "ctypes.Array[_Span]":
        found = []
        for run in step.runs:
            for at, (row, start) in enumerate(zip(range(run.rows.start, run.rows.stop), run.starts, strict=True)):
                begin = self._cache.region(row).begin
                found.append(_Span(run.tokens.start + at * run.query_length, run.query_length, begin, start))
        return (_Span * len(found))(*found)

    def _fill(self, index: int, layer: _Layer, positions: int) -> object:
        """Say where a layer finds and puts what belongs to this step; returns what has to be kept meanwhile."""
        shape = (layer.kv_heads, layer.dim)
        room = self._cache.room(index, shape, shape, self._model.dtype)
        layer.keys, layer.values = room.keys.data_ptr(), room.values.data_ptr()
        layer.places = room.places.data_ptr()
        layer.window = window_of(self._attentions[index]) or 0
        name = self._turn_of[index]
        if name is not None:
            turns = self._turns[name]
            turns.reach(positions)
            layer.cos, layer.sin, layer.rotary = turns.cos.data_ptr(), turns.sin.data_ptr(), turns.cos.shape[1]
        return room

    def _take(self, to: _Layer, path: str, layer: nn.Module) -> None:
        parts, config = self._parts, self._model.config
        attention: Any = layer.get_submodule("self_attn")
        own = attention_parts(attention)
        assert own is not None
        named = (parts.before_attention, parts.after_attention, parts.before_mlp, parts.after_mlp)
        for at, name in enumerate((*named, parts.query_norm, parts.key_norm)):
            if name:
                to.norms[at], to.epsilons[at] = self._norm(layer, name)
        to.heads, to.kv_heads, to.dim = config.num_attention_heads, config.num_key_value_heads, own.head_width
        for field, name in (("query_together", parts.query_norm), ("key_together", parts.key_norm)):
            if name:
                norm: Any = layer.get_submodule(name)
                setattr(to, field, norm.weight.shape[0] // to.dim)
        to.scaling = attention.scaling
        to.softcap = own.softcap or 0.0
        self._attentions.append(attention)
        rotary: Any = self._model.model.rotary_emb
        # SmolLM3 turns nothing in some layers.
        turn = None
        if own.rotates:
            turn = config.layer_types[attention.layer_idx] if isinstance(rotary.rope_type, dict) else ""
            self._turns.setdefault(turn, _Turns(rotary, turn))
        self._turn_of.append(turn)
        for role, paths in enumerate(parts.roles):
            modules: Any = {f"{path}.{one}": layer.get_submodule(one) for one in paths}
            to.linears[role] = self._packed(modules).product

    def _packed(self, modules: dict[str, nn.Linear], *, release: bool = True) -> PackedLinear:
        precision: Precision | None = "int8" if self._precision and "lm_head" in modules else self._precision
        self._linears.append(PackedLinear(modules, precision=precision, store=self._store, release=release))
        return self._linears[-1]

    def _norm(self, within: nn.Module, path: str) -> tuple[int, float]:
        """Address of a norm's weight in float32, and its epsilon."""
        norm = norm_parts(within.get_submodule(path))
        assert norm is not None
        weight = norm.weight.detach().float()
        # A copy even where it is in float32 already: the proof widens a model's tensors for a while.
        self._kept.append(weight + norm.offset)
        return self._kept[-1].data_ptr(), norm.epsilon
