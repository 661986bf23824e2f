"""The attention function that every backbone runs: the mask decides the kernel.

A tensor goes to PyTorch's scaled dot-product attention, a FlexAttention `BlockMask` to FlexAttention. With
`Pieces` attention is computed document by document. Nothing is causal
by default. transformers' own mask building is not used: it takes position ids that start again for packed sequences,
and a missing mask for a causal one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rollouts.visibility import Pieces

NAME = "diffusion"


def diffusion_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface: [B, H, Q, D/H] queries, [B, H', K, D/H] keys -> [B, Q, H, D/H].

    Args:
        kwargs: what transformers hands through; `pieces` comes from `DiffusionLM.hidden_states`, with their mask.
    """
    # Rotation in float32 (`rl/models/rotary.py`) leaves queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    pieces = kwargs.pop("pieces", None)
    if pieces is not None:
        return _by_document(module, query, key, value, attention_mask, pieces, **kwargs), None
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)
    special = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if query.device.type == "cpu" and not special:
        # transformers copies shared key-value heads out to every query head; the CPU kernel needs no copy.
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=kwargs.get("dropout", 0.0),
            scale=kwargs.get("scaling"),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2).contiguous(), None
    kwargs["is_causal"] = False
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _by_document(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | BlockMask | None,
    pieces: Pieces,
    **kwargs: Any,
) -> torch.Tensor:
    """[B, H, W, D/H] rows of documents, and a mask [documents, 1, Q, K] -> [B, W, H, D/H]."""

    def gathered(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """[B, H, W, D/H] -> [documents, H, tokens of one, D/H]."""
        flat = states.transpose(1, 2).flatten(0, 1).index_select(0, places.flatten())
        return flat.view(*places.shape, *flat.shape[1:]).transpose(1, 2)

    own = gathered(query, pieces.query), gathered(key, pieces.key), gathered(value, pieces.key)
    output, _ = diffusion_attention(module, *own, mask, **kwargs)
    batch, heads, width, size = query.shape
    return output.flatten(0, 1).index_select(0, pieces.back).view(batch, width, heads, size)


AttentionInterface.register(NAME, diffusion_attention)


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, Q, K] mask for attention from boolean [B, Q or 1, K].

    On the CPU it is additive (0 or -inf): the kernel would otherwise convert it again in every layer.
    """
    mask = visible[:, None]
    if visible.device.type != "cpu":
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
