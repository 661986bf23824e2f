"""Best-of-N: draw N samples, keep the one of highest reward.

Over noises this is the random search of Ma et al. 2025 (arXiv 2501.09732). With F the distribution function of
the reward under the policy and no ties, the kept sample x has probability F(r(x))^N - F(r(x)-)^N.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from rollouts.search.protocol import Search, SearchProblem, SearchResult, fan


class BestOfN(Search):
    num_samples: int = Field(16, ge=1, description="Samples drawn for the one that is kept.")

    def run(self, problem: SearchProblem, row: np.ndarray, seed: np.ndarray) -> SearchResult:
        """One sample per request. Cost: N T denoiser and N reward evaluations with T denoising steps."""
        count = self.num_samples
        # Sample j of a request has the same noise whatever N is.
        states = problem.finish(problem.sampler.start(np.repeat(row, count), fan(seed, count).reshape(-1)))
        reward = problem.judge(states).reshape(-1, count)
        best = reward.argmax(1)
        request = np.arange(len(row))
        return SearchResult(states.select(request * count + best), request, reward[request, best], problem.budget)
