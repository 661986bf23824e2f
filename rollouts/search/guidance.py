"""Classifier guidance for discrete diffusion: every step is drawn from log p + scale * gradient of the reward.

The gradient is taken at the predicted probabilities, a first-order expansion of the reward around them. (Taken at
log-probabilities fed to a reward that expects one-hots, as one published baseline does, it is the gradient of
another function.) With scale = 1 / alpha, a reward that is linear in the one-hots and independent positions the
samples follow p(x) exp(r(x) / alpha) exactly; otherwise TDS (`smc.py`) corrects what the expansion leaves out.
"""

from __future__ import annotations

import numpy as np

from rollouts.search.options import GuidanceOptions
from rollouts.search.protocol import Problem, SearchResult


def guidance(problem: Problem, row: np.ndarray, seed: np.ndarray, options: GuidanceOptions) -> SearchResult:
    """One sample per request. Cost: T denoiser and T + 1 reward evaluations (T gradients, one verdict)."""
    states = problem.sampler.start(row, seed)
    while not np.all(states.done):
        states, _ = problem.sampler.guided_step(states, problem.gradient, options.scale)
    return SearchResult(states, np.arange(len(row)), problem.judge(states), problem.budget)
