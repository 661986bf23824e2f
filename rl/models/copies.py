"""Copies of a model that share what they need not have of their own."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

M = TypeVar("M", bound=nn.Module)


def trained_copy(module: M) -> M:
    """A copy with trained weights of its own; frozen ones are shared, since they stay equal."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad})


def share_frozen(module: nn.Module, other: nn.Module) -> None:
    """Give `module` the very weights of `other`, of the same shape and values, that are frozen there."""
    for name, parameter in other.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, parameter)


# rollout.quantize -> what a weight is kept as, and the largest number of it.
_KINDS = {"int8": (torch.int8, 127), "fp8": (torch.float8_e4m3fn, 448)}


class LowLinear(nn.Module):
    """A linear layer whose weight has 8 bits: row o is scale[o] times whole numbers from -127 to 127 (`kind` int8), or
    times floating-point numbers of 4 bits of exponent and 3 of mantissa up to 448 (fp8).

    Example: the row [1.27, -0.63] has in int8 the scale 0.01 and the numbers 127 and -63; the row [4.48, 0.165] has in
    fp8 the scale 0.01 and the numbers 448 and 16, the nearest to 16.5. The product is computed in the precision of the
    input.
    """

    numbers: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear | Conv1D, kind: str):
        super().__init__()
        self.kind = kind
        self.bias = linear.bias
        self.register_buffer("numbers", torch.empty(0))
        self.register_buffer("scale", torch.empty(0))
        self.take(linear)

    @torch.no_grad()
    def take(self, linear: nn.Linear | Conv1D) -> None:
        """Round the layer's weights of now."""
        # transformers' Conv1D, the linear layer of GPT-2, holds its weight the other way round.
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        dtype, largest = _KINDS[self.kind]
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
        numbers = weight.float() / scale
        # A float8 is rounded to the nearest when it is made.
        self.numbers = numbers.to(dtype) if dtype.is_floating_point else numbers.round().to(dtype)
        self.scale = scale.squeeze(1).to(weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = functional.linear(x, self.numbers.to(x.dtype)) * self.scale.to(x.dtype)
        return output if self.bias is None else output + self.bias


class LowCopy:
    """A copy of a policy that samples with `LowLinear` in the place of its linear layers, and shares all else.

    Output heads, adapters and what is no plain linear layer (embeddings, convolutions, stacked experts) are the very
    parameters of the policy, and so is its config.

    Attributes:
        model: the copy.
    """

    def __init__(self, policy: nn.Module, kind: str):
        """
        Args:
            kind: int8 or fp8.
        """
        self._pairs = [
            (module, LowLinear(module, kind))
            for name, module in policy.named_modules()
            # A subclass may compute something else.
            if type(module) in (nn.Linear, Conv1D) and "lora_" not in name and name.split(".")[-1] not in _HEADS
        ]
        shared = {id(part): part for part in (*policy.parameters(), getattr(policy, "config", None))}
        self.model = copy.deepcopy(policy, {**shared, **{id(linear): low for linear, low in self._pairs}})

    def refresh(self) -> None:
        """Take over the policy's weights of now."""
        for linear, low in self._pairs:
            low.take(linear)


_HEADS = ("lm_head", "head")
