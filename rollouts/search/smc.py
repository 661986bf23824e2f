"""Sequential Monte Carlo: a population of particles, weighted on its way and resampled.

The target is p(x) exp(r(x) / alpha) / Z. A particle that moves from x_t to x_s is weighted by
exp((v(x_s) - v(x_t)) / alpha) with any value v that is the reward at the end and 0 at the start: the values on the way
cancel, so that the final weights are right whatever v is, and a good v keeps them even. TDS (Wu et al. 2023, arXiv
2306.17775) moves particles by the reward gradient as well, and multiplies the weight by p / q of each step.

The product of the mean weights is an unbiased estimate of Z = E_p exp(r / alpha) for any number of particles (Del Moral
2004); `log_z` is its logarithm. As the number of particles grows, their weighted law goes to the target.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from rollouts.search.protocol import SearchProblem, SearchResult, fan, split, uniform
from rollouts.search.values import Value, ValuedSearch, choice, soft_mean


class Smc(ValuedSearch):
    value: Literal["posterior_mean", "monte_carlo", "none"] = Field(  # type: ignore[assignment]
        "posterior_mean",
        description="Weight of a particle on its way: as in the other searches, or none until it is finished.",
    )
    num_particles: int = Field(16, ge=1, description="Particles of a population; each request has its own.")
    alpha: float = Field(1.0, gt=0, description="The target is p(x) exp(reward / alpha).")
    resample_below: float = Field(
        0.5, ge=0, le=1, description="Resample when the effective share of particles falls below this; 1 always does."
    )
    keep: Literal["one", "all"] = Field(
        "one", description="Return one particle drawn by weight, or the whole population with its weights."
    )

    def _guidance(self) -> float | None:
        """Factor of the reward gradient in the proposal; None moves particles by the policy alone."""
        return None

    def run(
        self, problem: SearchProblem, row: np.ndarray, seed: np.ndarray, value: Value | None = None
    ) -> SearchResult:
        """A population per request; see `keep` for what is returned of it.

        Cost with P particles and the posterior mean: P (2 T - 1) denoiser and P T reward evaluations.
        """
        if value is None and self.value != "none":
            value = self.of(problem, self.alpha)
        scale = self._guidance()
        requests, count = len(row), self.num_particles
        states = problem.sampler.start(np.repeat(row, count), fan(seed, count).reshape(-1))
        values, log_weight, log_z = np.zeros(requests * count), np.zeros((requests, count)), np.zeros(requests)
        step = 0
        while not np.all(states.done):
            active = np.flatnonzero(~states.done)
            noises = fan(split(seed, step), count).reshape(-1)
            states = problem.sampler.reseed(states, noises)
            before = values.copy()
            ratio = np.zeros(len(states))
            if scale is None:
                states = problem.sampler.step(states)
            else:
                states, ratio = problem.sampler.guided_step(states, problem.gradient, scale)
            # Without a value on the way only finished particles are judged.
            judged = active if value is not None else active[states.done[active]]
            moved = states.select(judged)
            found = problem.judge(moved) if value is None else value(moved, split(noises[judged], 0))
            # A verdict that is missing on the way leaves the weight alone: the next value makes up for it.
            values[judged] = np.where(np.isneginf(found) & ~moved.done, before[judged], found)
            with np.errstate(invalid="ignore"):
                gain = np.where(np.isneginf(values), -np.inf, (values - before) / self.alpha)
            log_weight += (gain + ratio).reshape(requests, count)
            step += 1
            share = _effective(log_weight) / count
            # After the last step of a population its weights are the result.
            moving = ~states.done.reshape(requests, count).all(1)
            again = np.flatnonzero(moving & ((share < self.resample_below) | (self.resample_below == 1.0)))
            if len(again):
                index = np.arange(requests * count).reshape(requests, count)
                index[again] = again[:, None] * count + systematic(log_weight[again], uniform(seed[again], step))
                states, values = states.select(index.reshape(-1)), values[index.reshape(-1)]
                log_z[again] += soft_mean(log_weight[again], 1.0)
                log_weight[again] = 0.0
        log_z += soft_mean(log_weight, 1.0)
        if self.keep == "one":
            chosen = np.arange(requests) * count + choice(log_weight, uniform(split(seed, step), 0))
            return SearchResult(states.select(chosen), np.arange(requests), values[chosen], problem.budget, log_z=log_z)
        weight = _normalised(log_weight).reshape(-1)
        request = np.repeat(np.arange(requests), count)
        return SearchResult(states, request, values, problem.budget, weight=weight, log_z=log_z)


class Tds(Smc):
    guided = True
    scale: float | None = Field(
        None, ge=0, description="Factor of the reward gradient in the proposal; null takes 1 / alpha."
    )

    def _guidance(self) -> float | None:
        return 1.0 / self.alpha if self.scale is None else self.scale


def _normalised(log_weight: np.ndarray) -> np.ndarray:
    """Weights that sum to 1 over the last axis; even where all are 0."""
    top = log_weight.max(-1, keepdims=True)
    weight = np.exp(log_weight - np.where(np.isfinite(top), top, 0.0))
    weight[~np.isfinite(top[..., 0])] = 1.0
    return weight / weight.sum(-1, keepdims=True)


def _effective(log_weight: np.ndarray) -> np.ndarray:
    """Effective number of particles, 1 / sum of squared weights."""
    return 1.0 / np.square(_normalised(log_weight)).sum(-1)


def systematic(log_weight: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Systematic resampling: particle i is taken floor or ceil of P w_i times, P w_i on average over u.

    Args:
        log_weight: [R, P].
        u: [R] in (0, 1).

    Returns:
        int64 [R, P], the particles that take the places 0..P-1, ascending.
    """
    cdf = _normalised(log_weight).cumsum(-1)
    count = log_weight.shape[-1]
    points = (np.arange(count) + u[:, None]) / count
    index = (cdf[:, None, :] <= points[:, :, None]).sum(-1)
    return np.minimum(index, count - 1)
