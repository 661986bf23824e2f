"""The value of a half-denoised state: an estimate of the reward of its finished samples.

The soft value alpha log E[exp(r(x0) / alpha) | x_t] makes every search exact (Uehara et al. 2024, arXiv
2408.08252). It is not known; these are two estimates of it. Any callable of the same form may be used instead, for
example a network fitted to rewards of rollouts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import Field

from rollouts.search.protocol import Search, SearchProblem, States, fan

# (states, seed [B]) -> float64 [B]. Of a finished state it is the reward.
Value = Callable[[States, np.ndarray], np.ndarray]


def posterior_mean(problem: SearchProblem) -> Value:
    """Reward of the most likely end: one denoiser evaluation per unfinished state."""

    def value(states: States, seed: np.ndarray) -> np.ndarray:
        return problem.judge(problem.sampler.x0_hat(states))

    return value


def monte_carlo(problem: SearchProblem, num_rollouts: int, alpha: float) -> Value:
    """Soft mean (alpha > 0) or mean (alpha = 0) of the rewards of ends sampled from the state."""

    def value(states: States, seed: np.ndarray) -> np.ndarray:
        result = np.empty(len(states))
        ended, open_ = np.flatnonzero(states.done), np.flatnonzero(~states.done)
        result[ended] = problem.judge(states.select(ended))
        if len(open_):
            copies = states.select(np.repeat(open_, num_rollouts))
            ends = problem.finish(problem.sampler.reseed(copies, fan(seed[open_], num_rollouts).reshape(-1)))
            reward = problem.judge(ends).reshape(-1, num_rollouts)
            result[open_] = soft_mean(reward, alpha) if alpha > 0 else reward.mean(1)
        return result

    return value


class ValuedSearch(Search):
    """A search that values half-denoised states."""

    value: Literal["posterior_mean", "monte_carlo"] = Field(
        "posterior_mean",
        description="Reward of the most likely end (one forward), or of ends sampled from the state.",
    )
    num_rollouts: int = Field(1, ge=1, description="Ends sampled per state by the value monte_carlo.")

    def of(self, problem: SearchProblem, alpha: float) -> Value:
        """The value that the options name."""
        return (
            posterior_mean(problem)
            if self.value == "posterior_mean"
            else monte_carlo(problem, self.num_rollouts, alpha)
        )


def soft_mean(values: np.ndarray, alpha: float) -> np.ndarray:
    """alpha log mean exp(values / alpha) over the last axis; -inf where all are."""
    top = values.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return alpha * np.log(np.exp((values - top) / alpha).mean(-1)) + top[..., 0]


def choice(logits: np.ndarray, u: np.ndarray) -> np.ndarray:
    """One index per row of `logits` [B, k], drawn from their softmax by `u` [B] in (0, 1)."""
    top = logits.max(-1, keepdims=True)
    weight = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    # Where no candidate has a verdict, all are alike.
    weight[~np.isfinite(top[:, 0])] = 1.0
    cdf = weight.cumsum(-1)
    return np.minimum((cdf <= (u * cdf[:, -1])[:, None]).sum(-1), logits.shape[-1] - 1)
