"""Self-attention of short rows laid end to end, from the projections to what goes into the last one, in few passes.

transformers' way turns queries and keys, transposes, gathers and casts one after the other, each a pass over memory that
autograd keeps something of. Here the projections' own results are all that is kept: they are turned and laid out for the
products in one pass, and so are the gradients on their way back. Scores are made again in the backward pass.

A module is taken only after it was found to give what its own forward gives, on the model's own states and positions.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapterhub_lite.bases.layer_parts import AttentionParts
from adapterhub_lite.bases.layer_parts import attention_parts as every_attention
from adapterhub_lite.training.model.lean_blocks import Heads, LeanBlocks, blocks_for
from adapterhub_lite.training.model.lean_modules import put_before, take_away
from adapterhub_lite.training.model.segments import Group, Segments, WatchedSegments, segment_inputs

# Of the norm of the result: what another order of rounding may make of it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What one attention is asked: (tokens, heads * width) of queries, and of keys and values with fewer heads."""

    segments: Segments
    heads: int
    kv_heads: int
    width: int
    scaling: float
    window: int | None
    # fp32, (tokens, rotated); of no width where positions do not matter.
    cosine: Tensor
    sine: Tensor

    def laid_out(self, group: Group, *, queries: bool) -> Heads:
        """The heads of queries, or those of keys and values, for the segments of `group`."""
        return Heads(group.count, group.length, self.heads if queries else self.kv_heads, self.kv_heads, self.width)

    def split(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Queries, keys and values, as views where one tensor holds them all."""
        sizes = [self.heads * self.width, *[self.kv_heads * self.width] * 2]
        return tensors if len(tensors) == 3 else tensors[0].split(sizes, -1)


class SegmentAttention(torch.autograd.Function):
    """softmax(turned q . turned k * scaling) v within each segment, in fp32, also under autocast, which would narrow the
    products; keeps what it is given alone."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, call: AttentionCall, blocks: LeanBlocks, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.call, ctx.blocks = call, blocks
        q, k, v = call.split(tensors)
        made = torch.empty(q.shape, dtype=q.dtype)
        still = call.cosine[:, :0]
        for group in call.segments.groups:
            asked, held = call.laid_out(group, queries=True), call.laid_out(group, queries=False)
            folded = blocks.fold(q, call.cosine, call.sine, group.places, asked)
            keys = blocks.fold(k, call.cosine, call.sine, group.places, held)
            values = blocks.fold(v, still, still, group.places, held)
            weights = blocks.softmax(torch.bmm(folded, keys.transpose(1, 2)), call.window, call.scaling)
            blocks.unfold(torch.bmm(weights, values), still, still, group.places, asked, made)
        return made

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        call, blocks = ctx.call, ctx.blocks
        # Read once: what gradient checkpointing makes again, it hands out once.
        saved = ctx.saved_tensors
        q, k, v = call.split(saved)
        grads = tuple(torch.empty_like(tensor) for tensor in saved)
        to_q, to_k, to_v = call.split(grads)
        grad, still = grad.contiguous(), call.cosine[:, :0]
        for group in call.segments.groups:
            asked, held = call.laid_out(group, queries=True), call.laid_out(group, queries=False)
            folded = blocks.fold(q, call.cosine, call.sine, group.places, asked)
            keys = blocks.fold(k, call.cosine, call.sine, group.places, held)
            values = blocks.fold(v, still, still, group.places, held)
            outer = blocks.fold(grad, still, still, group.places, asked)
            weights = blocks.softmax(torch.bmm(folded, keys.transpose(1, 2)), call.window, call.scaling)
            blocks.unfold(torch.bmm(weights.transpose(1, 2), outer), still, still, group.places, held, to_v)
            inner = torch.bmm(outer, values.transpose(1, 2))
            scores = blocks.softmax_backward(weights, inner, call.scaling)
            blocks.unfold(torch.bmm(scores, keys), call.cosine, call.sine, group.places, asked, to_q)
            blocks.unfold(torch.bmm(scores.transpose(1, 2), folded), call.cosine, call.sine, group.places, held, to_k)
        return None, None, *grads


def attend(
    module: nn.Module,
    parts: AttentionParts,
    hidden_states: Tensor,
    position_embeddings: Any,
    segments: Segments,
    blocks: LeanBlocks,
) -> Tensor:
    """What the self-attention `module` makes of hidden_states (1, tokens, D), whose rows are `segments`."""
    tokens, width = hidden_states.shape[1], parts.head_width
    if parts.joined is not None:
        tensors: tuple[Tensor, ...] = (parts.joined(hidden_states)[0].contiguous(),)
        out_features = cast(int, cast(Any, parts.out).in_features)
        heads = out_features // width
        kv_heads = (tensors[0].shape[-1] // width - heads) // 2
    else:
        assert parts.queries is not None and parts.keys is not None and parts.values is not None
        projected = [layer(hidden_states)[0] for layer in (parts.queries, parts.keys, parts.values)]
        heads, kv_heads = projected[0].shape[-1] // width, projected[1].shape[-1] // width
        for place, norm in enumerate((parts.query_norm, parts.key_norm)):
            if norm is not None:
                projected[place] = norm(projected[place].view(tokens, -1, width)).flatten(1)
        tensors = tuple(tensor.contiguous() for tensor in projected)
    cosine, sine = (x[0].float().contiguous() if parts.rotates else x.new_empty(tokens, 0) for x in position_embeddings)
    scaling = float(cast(Any, module).scaling)
    call = AttentionCall(segments, heads, kv_heads, width, scaling, parts.window, cosine, sine)
    return cast(Tensor, parts.out(SegmentAttention.apply(call, blocks, *tensors)[None]))


def attention_parts(module: nn.Module) -> AttentionParts | None:
    """The parts of an attention that the lean way computes: one that caps no scores."""
    parts = every_attention(module)
    return parts if parts is not None and parts.softcap is None else None


class _Attention(nn.Module):
    """Stands before a module's own class: same state, other `forward` for short rows laid end to end."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> Any:
        module = cast(Any, self)
        blocks = blocks_for(hidden_states) if segments is not None and segments.short else None
        parts = attention_parts(module) if blocks is not None else None
        dropped = module.training and getattr(module, "attention_dropout", 0.0)
        if blocks is None or parts is None or segments is None or past_key_values is not None or dropped:
            if segments is not None:
                kwargs["segments"] = segments
            return super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return attend(module, parts, hidden_states, position_embeddings, segments, blocks), None


@torch.no_grad()
def install_lean_attention(model: Any) -> int:
    """Let every attention of `model`, which takes rows laid end to end, take the lean way where it gives the same."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(model.parameters()).device
    found: list[nn.Module] = []
    hooks = []
    segments = WatchedSegments((7, 11), device)

    def compare(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        states, parts = kwargs.get("hidden_states"), attention_parts(module)
        blocks = blocks_for(states) if isinstance(states, Tensor) else None
        if states is None or parts is None or blocks is None or args:
            return
        if parts.window != segments.windows.get(module, -1):
            return
        try:
            ours = attend(module, parts, states, kwargs["position_embeddings"], segments, blocks).float()
        except (RuntimeError, KeyError, TypeError):
            # It is given something else than states and positions.
            return
        theirs = output[0].float()
        if (ours - theirs).norm() <= TOLERANCE[states.dtype] * theirs.norm():
            found.append(module)

    for module in inner.modules():
        if attention_parts(module) is not None and not isinstance(module, _Attention):
            hooks.append(module.register_forward_hook(compare, with_kwargs=True))
    was_training = model.training
    model.eval()
    ids = torch.arange(5, 23, device=device)[None] % inner.config.get_text_config().vocab_size
    positions = torch.cat([torch.arange(length, device=device) for length in segments.lengths])[None]
    try:
        if hooks:
            inputs = {"input_ids": ids, "position_ids": positions, "segments": segments}
            inner.get_decoder()(**segment_inputs(inputs), use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    for module in found:
        put_before(module, _Attention, {})
    return len(found)


def remove_lean_attention(model: nn.Module) -> None:
    """Give every attention its own class back."""
    for module in model.modules():
        if isinstance(module, _Attention):
            take_away(module)
