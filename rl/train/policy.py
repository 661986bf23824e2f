"""The policy as DeepSpeed sees it: rows in, log-probs of their decisions out."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from rl.estimators.base import Rows, Scores

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


class Policy(nn.Module):
    """Wraps a denoiser so that every training forward goes through one `forward`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, rows: Rows) -> Scores:
        return rows.score(self.model)
