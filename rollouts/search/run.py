"""Run a search by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rollouts.search.best_of_n import best_of_n
from rollouts.search.guidance import guidance
from rollouts.search.noise_search import noise_paths, noise_zero_order
from rollouts.search.options import SEARCHES, SearchOptions
from rollouts.search.protocol import Problem, SearchResult
from rollouts.search.smc import smc
from rollouts.search.svdd import svdd
from rollouts.search.tree import dts, dts_star

_FUNCTIONS: dict[str, Callable[..., SearchResult]] = {
    "best_of_n": best_of_n,
    "svdd": svdd,
    "smc": smc,
    "tds": smc,
    "guidance": guidance,
    "dts": dts,
    "dts_star": dts_star,
    "noise_random": best_of_n,
    "noise_zero_order": noise_zero_order,
    "noise_paths": noise_paths,
}
assert _FUNCTIONS.keys() == SEARCHES.keys()


def search(name: str, problem: Problem, row: Any, seed: Any, options: SearchOptions) -> SearchResult:
    """M searches of one kind.

    Args:
        name: one of `SEARCHES`.
        row: int [M], conditioning of the sampler for each request.
        seed: int64 [M], everything random about a request.
        options: what `parse_search` made for this name.
    """
    return _FUNCTIONS[name](problem, np.asarray(row, dtype=np.int64), np.asarray(seed, dtype=np.int64), options)
