"""Attention within each segment of a row of tokens that holds many sequences end to end (no padding anywhere).

Linear layers run on real tokens alone; only here are segments of like length laid beside each other. Registered with
transformers' `AttentionInterface` under `SEGMENTED`; without segments it is transformers' own `sdpa`.
"""

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from adapterhub_lite.memory.stand_ins import SHORT_TOKENS, rounded_tokens
from adapterhub_lite.memory.tracing import has_special_attention
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.distributed.sharded import splits_weights

SEGMENTED = "adapterhub_segmented"
# A group takes shorter segments as long as they fill this share of the longest.
FILL = 0.75


@dataclass(frozen=True, eq=False)
class Group:
    """Segments of like length, laid out as (count, length) with the ends filled up.

    `gather` (count * length,) says which token stands at each place; `keep` lists the places of real tokens and
    `tokens` the same tokens' positions in the row. `places` is `gather` with -1 where there is no token.
    """

    count: int
    length: int
    gather: Tensor
    keep: Tensor
    tokens: Tensor

    @cached_property
    def places(self) -> Tensor:
        """Which token stands at each place (count * length,), -1 where there is none."""
        return torch.full_like(self.gather, -1).index_copy_(0, self.keep, self.tokens)


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each sequence lies in a row: `lengths` in tokens, end to end."""

    lengths: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, position_ids: Tensor) -> "Segments":
        """Read them off `position_ids` (1, tokens), which begin at 0 in each sequence."""
        starts = [*(position_ids[0] == 0).cpu().nonzero()[:, 0].tolist(), position_ids.shape[1]]
        lengths = tuple(end - start for start, end in itertools.pairwise(starts))
        return cls(lengths, position_ids.device)

    @property
    def short(self) -> bool:
        """Whether a score matrix costs less than torch's kernel."""
        return self.device.type == "cpu" and max(self.lengths) <= SHORT_TOKENS

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The segments sorted into groups of like length."""
        starts = torch.tensor((0, *self.lengths)).cumsum(0).tolist()
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        members: list[list[int]] = []
        for index in order:
            if not members or self.lengths[index] < FILL * self.lengths[members[-1][0]]:
                members.append([])
            members[-1].append(index)
        return tuple(self._group([(starts[i], self.lengths[i]) for i in group]) for group in members)

    def _group(self, spans: list[tuple[int, int]]) -> Group:
        length = spans[0][1]
        places = torch.arange(length)
        starts = torch.tensor([start for start, _ in spans])[:, None]
        sizes = torch.tensor([size for _, size in spans])[:, None]
        gather = (starts + torch.minimum(places, sizes - 1)).flatten()
        keep = (places < sizes).flatten().nonzero()[:, 0]
        tokens = gather[keep]
        device = self.device
        return Group(len(spans), length, gather.to(device), keep.to(device), tokens.to(device))

    def seen(self, module: torch.nn.Module, window: int | None) -> None:
        """Called with each attention and its window; here it is nobody's business."""


@dataclass(frozen=True, eq=False)
class WatchedSegments(Segments):
    """Segments that note which attentions they were handed to, and with which window."""

    windows: dict[torch.nn.Module, int | None] = field(default_factory=dict)

    def seen(self, module: torch.nn.Module, window: int | None) -> None:
        """Note it."""
        self.windows[module] = window


class ShortAttention(torch.autograd.Function):
    """Causal attention in fp32 within each segment: q (heads, tokens, d), k and v (kv_heads, tokens, d).

    The score matrix is built again in backward, so that only q, k and v are kept, as the flash kernel does; on a CPU
    this is several times faster than that kernel's backward for short segments.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float, window: int | None
    ) -> Tensor:
        result = torch.empty_like(query)
        for group in segments.groups:
            q, k, v = (_fold(x.index_select(1, group.gather), group, key.shape[0]) for x in (query, key, value))
            _scatter(result, _probabilities(q, k, scaling, window) @ v, group, key.shape[0])
        ctx.save_for_backward(query, key, value)
        ctx.segments, ctx.scaling, ctx.window = segments, scaling, window
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for group in ctx.segments.groups:
            q, k, v = (_fold(x.index_select(1, group.gather), group, key.shape[0]) for x in (query, key, value))
            outer = grad.new_zeros(grad.shape[0], group.count * group.length, grad.shape[2])
            outer.index_copy_(1, group.keep, grad.index_select(1, group.tokens))
            g = _fold(outer, group, key.shape[0])
            weights = _probabilities(q, k, ctx.scaling, ctx.window)
            inner = g @ v.transpose(1, 2)
            # The softmax's gradient: p * (dp - sum(p * dp)).
            scores = inner.sub_((inner * weights).sum(-1, keepdim=True)).mul_(weights).mul_(ctx.scaling)
            parts = (scores @ k, scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ g)
            for whole, part in zip(grads, parts, strict=True):
                _scatter(whole, part, group, key.shape[0])
        return *grads, None, None, None


def _fold(x: Tensor, group: Group, kv_heads: int) -> Tensor:
    """(heads, count * length, d) to fp32 (kv_heads * count, heads / kv_heads * length, d): one product a kv head."""
    split = x.view(kv_heads, -1, group.count, group.length, x.shape[-1]).transpose(1, 2)
    return split.float().reshape(kv_heads * group.count, -1, x.shape[-1])


def _scatter(whole: Tensor, part: Tensor, group: Group, kv_heads: int) -> None:
    """Undo `_fold` and write the real tokens of `part` into `whole` (heads, tokens, d)."""
    split = part.view(kv_heads, group.count, -1, group.length, part.shape[-1]).transpose(1, 2)
    flat = split.reshape(whole.shape[0], group.count * group.length, -1)
    whole.index_copy_(1, group.tokens, flat.index_select(1, group.keep).to(whole.dtype))


def _probabilities(q: Tensor, k: Tensor, scaling: float, window: int | None) -> Tensor:
    length = k.shape[1]
    later = ~visible(length, window, q.device)
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scaling).view(q.shape[0], -1, length, length)
    return scores.masked_fill_(later, float("-inf")).softmax(-1).view(q.shape[0], -1, length)


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys (columns) each query (row) sees: those up to itself, the last `window` of them."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return seen if window is None or window >= length else seen.triu_(1 - window)


def long_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float, window: int | None
) -> Tensor:
    """The same with torch's kernel, group by group; for long segments and for GPUs."""
    parts, tokens = [], []
    for group in segments.groups:
        q, k, v = (
            x.index_select(1, group.gather).unflatten(1, (group.count, group.length)).transpose(0, 1)
            for x in (query, key, value)
        )
        gqa = q.shape[1] != k.shape[1]
        narrower = window is not None and window < group.length
        mask = visible(group.length, window, q.device) if narrower else None
        part = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
        parts.append(part.transpose(0, 1).flatten(1, 2).index_select(1, group.keep))
        tokens.append(group.tokens)
    return torch.cat(parts, 1).index_select(1, torch.cat(tokens).argsort())


def segmented_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; query (batch, heads, seq, d), result (batch, seq, heads, d)."""
    if segments is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    segments.seen(module, sliding_window)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = ShortAttention.apply if segments.short else long_attention
    result = attend(query[0], key[0], value[0], segments, factor, sliding_window)
    return result.transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(SEGMENTED, segmented_attention)
AttentionMaskInterface.register(SEGMENTED, sdpa_mask)


# Any fourth dimension tells transformers that the mask is made already; segments take its place.
NO_MASK_SHAPE = (1, 1, 1, 1)


@dataclass(frozen=True)
class PackingChoice:
    """Whether batches are laid out without padding, and why (not)."""

    packs: bool
    reason: str


def choose_packing(model: Any, args: AdapterTrainingArguments, rows_read_by: str | None = None) -> PackingChoice:
    """Decide whether `model` can take rows end to end; where it can, its attention is set to respect their borders.

    `rows_read_by` is what expects a batch of one row per sequence, where something does.

    A short row is run beside one neighbour, beside another, and alone: its states must be the same.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    reasons = {
        "padding_free=False": not args.padding_free,
        "pad_to_multiple_of pads each batch": args.pad_to_multiple_of is not None,
        str(rows_read_by): rows_read_by is not None,
        "torch_compile traces batches of one shape": args.torch_compile,
        "the engine splits the weights before it can be tried": splits_weights(args),
        "NEFTune scales its noise by the padded length": args.neftune_noise_alpha is not None,
        f"{type(inner).__name__} does not pass segments to its attention": not inner._supports_attention_backend,
        f"its attention is {inner.config._attn_implementation}, not sdpa": _attention(inner) not in ("sdpa", SEGMENTED),
        "it has other than full and sliding attention": has_special_attention(inner.config.get_text_config()),
    }
    for reason, applies in reasons.items():
        if applies:
            return PackingChoice(False, f"padded: {reason}")
    before = _attention(inner)
    inner.set_attn_implementation(SEGMENTED)
    if not keeps_rows_apart(model):
        inner.set_attn_implementation(before)
        return PackingChoice(False, "padded: rows laid end to end did not give the states that they give alone")
    return PackingChoice(True, "rows end to end, checked against rows alone")


def segment_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Add to a packed batch what keeps its rows apart: their segments, and a mask that says no mask is needed."""
    position_ids: Tensor = inputs["position_ids"]
    mask = torch.ones(NO_MASK_SHAPE, device=position_ids.device)
    return {"segments": Segments.of(position_ids), **inputs, "attention_mask": mask}


def with_filler(inputs: dict[str, Any]) -> dict[str, Any]:
    """Lengthen a batch (rows, tokens) to `rounded_tokens`, where nobody looks at the states.

    Rows laid end to end get one more sequence, padded ones more padding. What holds other tensors is left as it is, and so
    is a batch without a mask: it has no padding, so that its length will hardly change.
    """
    rows, tokens = inputs["input_ids"].shape
    more = rounded_tokens(tokens, rows) - tokens
    packed = inputs.keys() == {"input_ids", "position_ids"}
    mask = inputs.get("attention_mask")
    padded = mask is not None and mask.dim() == 2 and inputs.keys() <= {"input_ids", "position_ids", "attention_mask"}
    if not more or not (packed or padded):
        return inputs
    longer = {name: F.pad(tensor, (0, more)) for name, tensor in inputs.items()}
    # Any token of the vocabulary.
    longer["input_ids"][:, tokens:] = inputs["input_ids"][:1, :1]
    if packed:
        places = longer["position_ids"]
        places[:, tokens:] = torch.arange(more, device=places.device)
    return longer


def _attention(inner: Any) -> str:
    return str(inner.config._attn_implementation)


@torch.no_grad()
def keeps_rows_apart(model: Any) -> bool:
    """Whether a short row has the same states beside one neighbour, beside another, and alone."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = inner.get_decoder()
    first, other, second = (
        torch.arange(start, start + count, device=device) % vocabulary for start, count in ((5, 7), (40, 7), (60, 11))
    )
    positions = torch.cat([torch.arange(7, device=device), torch.arange(11, device=device)])[None]

    watched = WatchedSegments((7, 11), device)

    def states(neighbour: Tensor) -> Tensor:
        ids = torch.cat([neighbour, second])[None]
        inputs = {"input_ids": ids, "position_ids": positions, "segments": watched}
        hidden: Tensor = decoder(**segment_inputs(inputs))[0]
        return hidden[0, 7:].float()

    alone = decoder(input_ids=second[None])[0][0].float()
    beside, beside_other = states(first), states(other)
    model.train(was_training)
    scale = alone.norm().clamp(min=1e-9)
    # Beside another neighbour every product has the same shape, so that nothing may change; alone, kernels may round
    # otherwise, and in bf16 that grows over the layers.
    alike = (beside - beside_other).norm() <= 1e-4 * scale and (beside - alone).norm() <= 0.2 * scale
    return bool(alike) and sorted(window or 0 for window in watched.windows.values()) == windows_of(inner.config)


def windows_of(config: Any) -> list[int]:
    """The windows that a model's layers have by its configuration, 0 for none, from the smallest to the largest.

    These rows are shorter than any window: a model that would keep to it by its mask alone, which segments replace, shows
    itself here.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return sorted((window or 0) if kind == "sliding_attention" else 0 for kind in kinds)
