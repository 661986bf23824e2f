"""Holds what the methods of a recipe return against what `rl.recipes.base.Recipe` says of them."""

from __future__ import annotations

from typing import Any

import torch

from rl.batch import LossOutput
from rl.estimators.base import Rows
from rl.recipes.base import Recipe


def checked_rows(recipe: Recipe, rows: Any) -> Rows:
    """
    Raises:
        ValueError: they are no rows.
    """
    if not hasattr(rows, "distinct"):
        raise ValueError(f"algorithm.name {recipe.name}: rows() gave {_kind(rows)}, not rows (rl/estimators)")
    found: Rows = rows
    return found


def checked_advantage(recipe: Recipe, advantage: Any, count: int) -> torch.Tensor:
    """
    Raises:
        ValueError: it is no tensor [count] or [count, T].
    """
    if not isinstance(advantage, torch.Tensor) or advantage.dim() not in (1, 2) or len(advantage) != count:
        raise ValueError(
            f"algorithm.name {recipe.name}: advantage() gave {_kind(advantage)}, not a tensor [M] or [M, T] with a row "
            f"for each of M = {count} rollouts"
        )
    return advantage


def checked_loss(recipe: Recipe, output: Any, count: int) -> LossOutput:
    """
    Raises:
        ValueError: it is not a loss and metrics per decision, or the loss has no gradient.
    """
    said = f"algorithm.name {recipe.name}: loss() gave "
    if not isinstance(output, LossOutput):
        raise ValueError(f"{said}{_kind(output)}, not a rl.batch.LossOutput(loss, metrics)")
    if not isinstance(output.loss, torch.Tensor) or output.loss.shape != (count,):
        # A mean would be broadcast to every decision, and weighted again.
        raise ValueError(f"{said}a loss that is {_kind(output.loss)}, not a tensor [{count}], one number per decision")
    if not output.loss.requires_grad:
        raise ValueError(f"{said}a loss without gradient: use batch.logprob, and detach only what is no loss")
    for name, values in output.metrics.items():
        if not isinstance(values, torch.Tensor) or values.dim() != 1:
            raise ValueError(f"{said}a metric {name!r} that is {_kind(values)}, not a tensor [{count}]")
    return output


def _kind(value: Any) -> str:
    """`a tensor [3]`, `a list`."""
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
