"""Gradients against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


def slopes(value: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor]) -> tuple[float, float]:
    """The length of the gradient of `value`, and its central difference along the gradient: equal where both are right.

    Parameters are as before afterwards, up to rounding.
    """
    gradient = torch.autograd.grad(value(), parameters)
    size = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for p, g in zip(parameters, gradient, strict=True):
                p.add_(g, alpha=sign * 1e-5 / size)
            values.append(float(value()))
    return size, (values[0] - values[1]) / 2e-5
