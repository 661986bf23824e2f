"""The exact law of finished graphs where all states can be listed: cells of an architecture, graphs of three nodes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from rl.models.graph_policy import GraphModel

LARGEST = 20_000
# States [N, S] at time t -> probabilities [N, S, K] of every place's kind at t - 1, places independent of each other.
Step = Callable[[torch.Tensor, int], torch.Tensor]


@torch.no_grad()
def finished_law(model: GraphModel, num_steps: int, step: Step | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """All states int64 [N, S], and the probability float64 [N] with which each of them is the finished graph.

    Args:
        step: one denoising step; by default the model's own, for its first prompt.

    Raises:
        ValueError: there are more than 20,000 states.
    """
    places = [(limit > 0).nonzero().flatten() for limit in model.limit]
    count = math.prod(map(len, places))
    if count > LARGEST:
        raise ValueError(f"there are {count} states, and at most {LARGEST} are listed")
    states = torch.tensor(list(itertools.product(*(kinds.tolist() for kinds in places))), device=model.limit.device)

    def own(state: torch.Tensor, t: int) -> torch.Tensor:
        zeros = torch.zeros(len(state), dtype=torch.int64, device=state.device)
        return model.denoise(state, zeros + t, num_steps, zeros)

    law = model.limit.gather(1, states.T).prod(0)
    half = len(places) // 2
    for t in range(num_steps, 0, -1):
        kinds = (step or own)(states, t)
        # To the state (a, b) leads the sum over states of law p(a) p(b), a product of two matrices.
        first, second = (_product(kinds[:, part], places[part]) for part in (slice(half), slice(half, None)))
        law = ((law[:, None] * first).T @ second).flatten()
    return states, law


def _product(kinds: torch.Tensor, places: list[torch.Tensor]) -> torch.Tensor:
    """[N, n]: probability of every combination of the kinds that the places can have, the last place fastest."""
    found = kinds.new_ones(len(kinds), 1)
    for i, allowed in enumerate(places):
        found = (found[:, :, None] * kinds[:, i, allowed][:, None]).flatten(1)
    return found
