"""Attention over keys and values that have been found in the cache: head by head, and with soft caps or sinks."""

import torch
from torch.nn.attention.bias import causal_lower_right


def attention_by_heads(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Attend for n rows that read as many tokens q of a prompt each, as the kernels of accelerators want it.

    query (n * q, heads, head_dim), keys and values (n, kv, kv_heads, dim); returns (n * q, heads, value_dim). `mask` None
    is for rows of one length, whose last q tokens these are: causal to the lower right, which kernels compute without a mask
    where there are any. Else it is (n, 1, q, kv), one for all heads. Keys are repeated for the heads that share them; heads
    folded into queries, as on a CPU, would need a mask of each.
    """
    n, kv_length, kv_heads, _ = keys.shape
    heads = query.shape[1]
    q = query.view(n, -1, heads, query.shape[2]).transpose(1, 2)
    k, v = (held.transpose(1, 2).repeat_interleave(heads // kv_heads, dim=1) for held in (keys, values))
    whole = q.shape[2] == kv_length
    seen = causal_lower_right(q.shape[2], kv_length) if mask is None and not whole else mask
    got = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=mask is None and whole, scale=scaling
    )
    return got.transpose(1, 2).reshape(query.shape[0], heads, -1)


def capped_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with soft caps or sinks, which PyTorch's own has not; (n, kv_heads, group * q, head_dim) as query."""
    scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ values
    n, kv_heads, queries, _ = query.shape
    group = sinks.shape[0] // kv_heads
    # Queries lie head by head: (kv_heads, group, q).
    column = sinks.view(kv_heads, group, 1).expand(kv_heads, group, queries // group).reshape(1, kv_heads, queries, 1)
    joined = torch.cat((scores, column.to(scores.dtype).expand(n, -1, -1, -1)), dim=-1)
    return torch.softmax(joined, dim=-1, dtype=torch.float32)[..., :-1].to(query.dtype) @ values
