"""Best-of-N: draw N samples, keep the one of highest reward.

Over noises this is the random search of Ma et al. 2025 (arXiv 2501.09732). With F the distribution function of
the reward under the policy and no ties, the kept sample x has probability F(r(x))^N - F(r(x)-)^N.
"""

from __future__ import annotations

import numpy as np

from rollouts.search.options import BestOfNOptions
from rollouts.search.protocol import Problem, SearchResult, fan


def best_of_n(problem: Problem, row: np.ndarray, seed: np.ndarray, options: BestOfNOptions) -> SearchResult:
    """One sample per request. Cost: N T denoiser and N reward evaluations with T denoising steps."""
    count = options.num_samples
    # Sample j of a request has the same noise whatever N is.
    states = problem.finish(problem.sampler.start(np.repeat(row, count), fan(seed, count).reshape(-1)))
    reward = problem.judge(states).reshape(-1, count)
    best = reward.argmax(1)
    request = np.arange(len(row))
    return SearchResult(states.select(request * count + best), request, reward[request, best], problem.budget)
