"""Causal attention in bf16 on a CPU: blocks of queries, each against the keys that it may see.

torch's fused attention for CPUs runs at an eighth of the speed of a matrix product in bf16. Batched
products over blocks of queries take about half of its time, and transformers lets a model name its
own attention.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sae_ray_blocks"
"""What transformers knows it by, once `register` was called."""


def register() -> str:
    """Make the attention known to transformers, and return its name."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def block_attention(
    query: Float[Tensor, "batch heads seq d_head"],
    key: Float[Tensor, "batch kv_heads seq d_head"],
    value: Float[Tensor, "batch kv_heads seq d_value"],
    scaling: float,
) -> Float[Tensor, "batch seq heads d_value"]:
    """Return softmax(scaling q kᵀ) v, every query over its own and earlier positions."""
    batch, heads, seq, _ = query.shape
    repeats = heads // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    q = (query * scaling).reshape(batch * heads, seq, -1)
    k = key.reshape(batch * heads, seq, -1).transpose(1, 2)
    v = value.reshape(batch * heads, seq, -1)
    out = torch.empty(batch, seq, heads, v.shape[-1], dtype=q.dtype, device=q.device)
    # Small blocks waste little above the diagonal; large ones are fewer and faster products.
    size = min(64 if seq <= 256 else 128, seq)
    later = torch.full((size, size), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    for start in range(0, seq, size):
        end = min(start + size, seq)
        scores = torch.bmm(q[:, start:end], k[:, :, :end])
        scores[:, :, start:] += later[: end - start, : end - start]
        block = torch.bmm(scores.softmax(-1), v[:, :end])
        out[:, start:end] = block.view(batch, heads, end - start, -1).transpose(1, 2)
    return out


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_more: object,  # positions and the like, which are in query, key and mask already
) -> tuple[Tensor, None]:
    if attention_mask is not None or query.shape[2] != key.shape[2]:  # windows, caches
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return block_attention(query, key, value, scale), None
