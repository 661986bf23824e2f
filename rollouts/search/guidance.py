"""Classifier guidance: every step is drawn from log p + scale * gradient of the reward, to first order.

Of tokens the gradient is taken at the predicted probabilities. (Taken at log-probabilities fed to a reward that expects
one-hots, as one published baseline does, it is the gradient of another function.) With scale = 1 / alpha, a reward that
is linear in the one-hots and independent positions the samples follow p(x) exp(r(x) / alpha) exactly; otherwise TDS
(`smc.py`) corrects what the expansion leaves out.

Of latents it is taken at the model's prediction of the data and goes through the network; the mean of a step moves by
std^2 scale times it (`rollouts.search.latents`).
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from rollouts.search.protocol import Search, SearchProblem, SearchResult


class Guidance(Search):
    guided = True
    scale: float = Field(1.0, ge=0, description="Factor of the reward gradient in the log-probabilities of a step.")

    def run(self, problem: SearchProblem, row: np.ndarray, seed: np.ndarray) -> SearchResult:
        """One sample per request. Cost: T denoiser and T + 1 reward evaluations (T gradients, one verdict)."""
        states = problem.sampler.start(row, seed)
        while not np.all(states.done):
            states, _ = problem.sampler.guided_step(states, problem.gradient, self.scale)
        return SearchResult(states, np.arange(len(row)), problem.judge(states), problem.budget)
