"""Counter-based random numbers: a draw depends on (seed, step, position) and on nothing else.

A request therefore gets the same draws alone, in any batch, on any number of workers and after a
resume. The generator is SplitMix64's finaliser (Steele, Lea & Flood 2014), applied once per counter.
"""

from __future__ import annotations

import torch

# 64-bit odd constants of SplitMix64 as signed integers (torch has no uint64 arithmetic; int64 wraps).
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685

TOKEN_STREAM = 1
ORDER_STREAM = 2
SEED_STREAM = 3
REMASK_STREAM = 4
CHOICE_STREAM = 5
LATENT_STREAM = 6
GUMBEL_STREAM = 7
REVISE_STREAM = 8
START_STREAM = 9
ACCEPT_STREAM = 10


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(seed: torch.Tensor, step: torch.Tensor, position: torch.Tensor, stream: int) -> torch.Tensor:
    """float64 in the open interval (0, 1), one per entry.

    Args:
        seed, step, position: int64, broadcastable to one shape.
        stream: separates independent uses of the same counter.
    """
    state = _mix(seed * _GOLDEN + stream)
    state = _mix(state + step * _GOLDEN)
    state = _mix(state + (position + 1) * _GOLDEN)
    return (_shift_right(state, 11).double() + 0.5) * 2.0**-53


def split(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """New seeds, non-negative int64: one per entry of (seed, counter), broadcast to one shape."""
    state = _mix(_mix(seed * _GOLDEN + SEED_STREAM) + (counter + 1) * _GOLDEN)
    return _shift_right(state, 1)


def branch_seed(seed: torch.Tensor, step: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """int64 seed of a branch that leaves a rollout before `step`; branch 0 is the rollout itself going on.

    Args:
        seed, step, branch: int64, broadcastable to one shape.
    """
    return torch.where(branch == 0, seed, split(split(seed, step), branch))


def normal(seed: torch.Tensor, step: torch.Tensor, position: torch.Tensor, stream: int) -> torch.Tensor:
    """float64 standard normal, one per entry, by inversion of `uniform` (same arguments)."""
    return torch.special.ndtri(uniform(seed, step, position, stream))
