"""The choice of masked copies of an answer: one function per paper. No torch at import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rollouts.trajectory import TokenTrajectory

Scope = Literal["answer", "canvas"]


@dataclass
class Copy:
    """One masked copy of a trajectory's final canvas.

    Example: `Copy(hidden=[5, 6, 7], read=[5], weight=3.0)` masks positions 5 to 7 and scores the token at 5.

    Attributes:
        hidden: int64, the positions that carry the mask token.
        read: int64, the positions whose token is scored, all of them hidden.
        weight: factor of their log-probs, or one for each.
    """

    hidden: np.ndarray
    read: np.ndarray
    weight: float | np.ndarray = 1.0


# The copies of one trajectory: (positions to estimate, its random numbers, its level) -> copies that hide some of them.
# The level, in [0, 1), stands for the mask ratio; over the passes it is spread evenly (a golden-ratio sequence).
Draw = Callable[[np.ndarray, np.random.Generator, float], list[Copy]]


def scope_positions(trajectory: TokenTrajectory, scope: Scope) -> np.ndarray:
    """int64: the positions of the answer with its end token (most papers), or of everything that was decoded.

    What a constraint placed before the first step was not decoded.
    """
    start = trajectory.prompt_length
    places = np.arange(start, start + trajectory.stop_length)
    if scope == "canvas":
        # Blocks behind the one with the end token were never decoded and are still masked.
        places = start + np.flatnonzero(trajectory.final_canvas()[start:] != trajectory.mask_token_id)
    return np.setdiff1d(places, trajectory.placed)


def everything_hidden(places: np.ndarray, rng: np.random.Generator, level: float) -> list[Copy]:
    """One copy without any answer token: the mean-field estimate of d1 (Zhao et al. 2025, arXiv 2504.12216)."""
    return [Copy(places, places)]


def random_ratio(
    places: np.ndarray, rng: np.random.Generator, level: float, low: float = 0.0, high: float = 1.0
) -> list[Copy]:
    """One copy at a uniform mask ratio (UniGRPO; Yang et al. 2025, arXiv 2505.15809).

    Args:
        low, high: range of the ratio; the number of hidden tokens is ratio x answer length rounded up, at least 1.
    """
    count = int(np.ceil((low + (high - low) * level) * len(places)))
    hidden = _some(places, max(1, count), rng)
    return [Copy(hidden, hidden)]


def coupled(
    places: np.ndarray, rng: np.random.Generator, level: float, low: float = 0.2, high: float = 0.8
) -> list[Copy]:
    """A random mask, its complement and the fully hidden canvas (coupled-GRPO; Gong et al. 2025, arXiv 2506.20639).

    The first copy hides each token with probability t, the second one the other tokens, the third all. The published
    estimate of a token is the mean of two: its log-prob in the full copy, and 1/t or 1/(1-t) times the other log-prob.
    """
    ratio = low + (high - low) * level
    hidden = rng.random(len(places)) < ratio
    halves = ((places[hidden], ratio), (places[~hidden], 1 - ratio))
    return [Copy(places, places, 0.5), *(Copy(part, part, 0.5 / share) for part, share in halves if len(part))]


def coupled_counts(
    places: np.ndarray, rng: np.random.Generator, level: float, draws: int = 1, weighted: bool = True
) -> list[Copy]:
    """`draws` pairs of complementary masks; the number l of hidden tokens is uniform on 0..L, stratified over draws.

    The weights of a pair are (L+1)/l and (L+1)/(L-l), halved. With them the sum over reads is an unbiased estimate of
    the evidence lower bound (ESPO; Ou et al. 2025, arXiv 2512.03759). Without them (GDSD, arXiv 2605.29398) every token
    counts 1/2 in the one copy that hides it.
    """
    length, copies = len(places), []
    for index in range(draws):
        hidden = _some(places, int((index + level) / draws * (length + 1)), rng)
        for part in (hidden, np.setdiff1d(places, hidden)):
            if len(part):
                weight = (length + 1) / len(part) if weighted else 1.0
                copies.append(Copy(part, part, 0.5 * weight / draws))
    return copies


def block_masks(
    places: np.ndarray, rng: np.random.Generator, level: float, draws: int = 2, block_length: int | None = None
) -> list[Copy]:
    """Copies with one random block partly hidden, the blocks before it clean, those behind it hidden (SPG).

    Wang et al. 2025 (arXiv 2510.09541). The block is uniform; the number of hidden tokens is uniform and stratified
    over the draws. With the weights, the mean over draws of the sum over reads is an unbiased estimate of the (block
    by block) lower bound, and the mean weight of any token is 1.
    """
    size, copies = block_length or len(places), []
    num_blocks = -(-len(places) // size)
    for index in range(draws):
        start = int(rng.integers(num_blocks)) * size
        block, behind = places[start : start + size], places[start + size :]
        count = 1 + int((index + level) / draws * len(block))
        read = _some(block, count, rng)
        copies.append(Copy(np.concatenate([read, behind]), read, num_blocks * len(block) / count))
    return copies


def every_block(
    places: np.ndarray, rng: np.random.Generator, level: float, draws: int, block_length: int | None = None
) -> list[Copy]:
    """Copies in which every block of the grid hides some of its tokens, all of them at one level (EBPO).

    The number of hidden tokens of a block is uniform on 1..its length, stratified over the draws. With the weights, the
    mean over draws of the sum over reads is an unbiased estimate of the sum of the blocks' evidence lower bounds.
    """
    blocks = np.split(places, np.flatnonzero(np.diff(places // (block_length or np.iinfo(np.int64).max))) + 1)
    copies = []
    for index in range(draws):
        counts = [1 + int((index + level) / draws * len(block)) for block in blocks]
        hidden = [_some(block, count, rng) for block, count in zip(blocks, counts, strict=True)]
        weights = [np.full(count, len(block) / count) for block, count in zip(blocks, counts, strict=True)]
        copies.append(Copy(np.concatenate(hidden), np.concatenate(hidden), np.concatenate(weights)))
    return copies


def _some(places: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.permutation(places)[:count])


def check_prompt_mask(attention: str, prompt_mask: float) -> None:
    """Raise ValueError where a prompt is to be hidden from a block-causal model."""
    if attention == "block_causal" and prompt_mask:
        raise ValueError(
            f"algorithm.prompt_mask is {prompt_mask}, but a block-causal model sees clean blocks before its own and so "
            "the prompt: set it to 0"
        )
