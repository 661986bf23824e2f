"""Copies of a model that share its frozen weights."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

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
