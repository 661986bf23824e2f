"""SVDD, soft value-based decoding (Li et al. 2024, arXiv 2408.08252).

Every request is one chain. At each step k next states are drawn from the policy and one is taken with probability
proportional to exp(value / alpha); alpha = 0 takes the best, which is what the paper's experiments run. With the exact
soft value and k growing the chain samples p(x) exp(r(x) / alpha). No gradient is needed.

The paper's Monte-Carlo variant fits a network to the rewards of rollouts beforehand; ours samples the rollouts on
the spot, and takes a fitted value through `value`.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from rollouts.search.protocol import SearchProblem, SearchResult, fan, split, uniform
from rollouts.search.values import Value, ValuedSearch, choice


class Svdd(ValuedSearch):
    num_candidates: int = Field(10, ge=1, description="Next states drawn at every step, of which one is taken.")
    alpha: float = Field(
        0.0, ge=0, description="Temperature of the choice among candidates; 0 takes the one of highest value."
    )

    def run(
        self, problem: SearchProblem, row: np.ndarray, seed: np.ndarray, value: Value | None = None
    ) -> SearchResult:
        """One sample per request.

        Cost with the posterior mean: T + k (T - 1) denoiser and k T reward evaluations; the candidates of the last step
        are finished and need no look ahead.
        """
        value = value or self.of(problem, self.alpha)
        count = self.num_candidates
        states = problem.sampler.start(row, seed)
        reward = np.empty(len(row))
        step = 0
        while not np.all(states.done):
            active = np.flatnonzero(~states.done)
            noises = fan(split(seed[active], step), count)
            candidates = problem.sampler.candidates(states.select(active), noises)
            values = value(candidates, split(noises, 0).reshape(-1)).reshape(-1, count)
            u = uniform(seed[active], step)
            chosen = choice(values / self.alpha, u) if self.alpha > 0 else values.argmax(1)
            index = np.arange(len(active))
            reward[active] = values[index, chosen]
            # The chosen candidates take the places of their parents.
            place = np.arange(len(states))
            place[active] = len(states) + index
            states = problem.sampler.join([states, candidates.select(index * count + chosen)]).select(place)
            step += 1
        return SearchResult(states, np.arange(len(row)), reward, problem.budget)
