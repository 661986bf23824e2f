"""Rotary frequencies that no cast of the weights rounds, and rotation in float32 where a checkpoint asks for it.

transformers keeps these in a buffer, and `model.to(torch.bfloat16)` or DeepSpeed's bf16 mode rounds it with the
weights: at position 1000 an angle is then wrong by whole radians, in the learner only, and no error says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Buffers that keep float32. The bias decides between experts whose scores are close to each other.
EXACT = ("inv_freq", "e_score_correction_bias")


class ExactRotary(nn.Module):
    """Mix-in: the buffers `EXACT` follow the module to its device and keep their dtype."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        exact = {name: buffer for name, buffer in self.named_buffers() if name.endswith(EXACT)}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, leaf, buffer.to(getattr(module, leaf).device))
        return self


def rotate_in_float32(rotary: nn.Module) -> None:
    """Keep the cosines and sines of a transformers rotary embedding in float32 when the weights are in bfloat16.

    Queries and keys are then turned in float32, and rounded where attention and cache take them.
    """
    rotary.register_forward_pre_hook(_in_float32)


def _in_float32(rotary: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Of the hidden states the embedding takes device and dtype alone."""
    hidden, *rest = arguments
    return (hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32)), *rest)
