"""Likelihood estimates from artificial masks: copies of a finished answer with some tokens hidden again.

The answer is scored in states that the sampler never visited, so none of these is the log-prob of the rollout. What
each estimates instead, and how far off it is, stands in docs/algorithms.md and is measured in
tests/test_masked_copies.py.

The masks of a trajectory are a function of its own seed (which comes from run seed, RL step, prompt and sample) and of
the pass over the rollouts (`iteration`): old, new and reference policy see the same ones, however an update is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from rl.estimators.combine import CombinedRows, SandwichRows, per_token, per_trajectory
from rl.estimators.rows import Document, Reads, TokenRows, assemble, check_sampled, noisy_document, whole_blocks
from rollouts.model_protocol import DenoisingModel
from rollouts.trajectory import TokenTrajectory

Scope = Literal["answer", "canvas"]


@dataclass
class Copy:
    """One masked copy of a trajectory's final canvas.

    Attributes:
        hidden: int64 positions that carry the mask token.
        read: int64 positions whose token is scored, all of them hidden.
        weight: factor of their log-probs.
    """

    hidden: np.ndarray
    read: np.ndarray
    weight: float = 1.0


# The copies of one trajectory: (positions to estimate, its random numbers, its level) -> copies that hide some of them.
# The level, in [0, 1), stands for the mask ratio; over the passes it is spread evenly (a golden-ratio sequence).
Draw = Callable[[np.ndarray, np.random.Generator, float], list[Copy]]
_GOLDEN = (5**0.5 - 1) / 2


def scope_positions(trajectory: TokenTrajectory, scope: Scope) -> np.ndarray:
    """int64: the answer up to and including the end token (published by most), or all that was decoded."""
    start = trajectory.prompt_length
    if scope == "answer":
        return np.arange(start, start + trajectory.stop_length)
    # Blocks behind the one with the end token were never decoded and are still masked.
    return start + np.flatnonzero(trajectory.final_canvas()[start:] != trajectory.mask_token_id)


def copy_rows(
    trajectories: Sequence[TokenTrajectory],
    model: DenoisingModel,
    draw: Draw,
    scope: Scope = "answer",
    prompt_mask: float = 0.0,
    iteration: int = 0,
    block: int | None = None,
) -> tuple[TokenRows, torch.Tensor]:
    """Draw the copies of every trajectory and say where to read them.

    Response positions outside the scope are hidden in every copy and never read: the answer is scored as if what
    follows it had not been decided yet. A block-causal model gets `[clean | noisy copy of every block]` instead of
    the noisy canvas, as in its supervised training (`masking.py`): what a copy hides in a block is hidden from that
    block alone, and the blocks before it are clean.

    Args:
        draw: gives the copies; it is handed the scope's positions.
        prompt_mask: hide each prompt token of each copy with this probability (d1).
        iteration: pass over the rollouts; each has masks of its own.
        block: training block length of a block-causal model, None for its own.

    Returns:
        rows (`step` is the index of the copy), and the weight float64 [N] of every read.

    Raises:
        ValueError: a prompt is to be hidden from a block-causal model.
    """
    check_sampled(trajectories)
    causal = model.attention == "block_causal"
    if causal and prompt_mask:
        raise ValueError(
            f"algorithm.prompt_mask is {prompt_mask}, but a block-causal model sees clean blocks before its own and so "
            "the prompt: set it to 0"
        )
    documents: list[Document] = []
    reads, weights = [], []
    size = block or model.block_length if causal else None
    for trajectory, padded in zip(trajectories, whole_blocks(trajectories, size), strict=True):
        if scope == "canvas" and trajectory.detail == "sample":
            raise ValueError(
                "algorithm.scope canvas scores what was decoded behind the answer, which this trajectory's engine does "
                "not return: set algorithm.scope to answer"
            )
        final, places = padded.final_canvas(), scope_positions(trajectory, scope)
        rng = np.random.default_rng([trajectory.seed, iteration])
        level = (np.random.default_rng(trajectory.seed).random() + iteration * _GOLDEN) % 1.0
        response = np.arange(trajectory.prompt_length, padded.length)
        outside = np.setdiff1d(response, places)
        own = []
        for index, copy in enumerate(draw(places, rng, level)):
            noisy = final.copy()
            noisy[outside] = noisy[copy.hidden] = trajectory.mask_token_id
            forgotten = rng.random(trajectory.prompt_length) < prompt_mask
            noisy[: trajectory.prompt_length][forgotten] = trajectory.mask_token_id
            document, shift = noisy_document(final, noisy, size)
            number, step = np.full((len(copy.read), 2), [len(documents), index]).T
            own.append((number, copy.read + shift, final[copy.read], step))
            documents.append(document)
            weights.append(np.full(len(copy.read), copy.weight))
        reads.append(Reads(*(np.concatenate(parts) for parts in zip(*own, strict=True))))
    rows = assemble(documents, reads, trajectories, logit_shift=model.logit_shift)
    return rows, torch.from_numpy(np.concatenate(weights))


# --- draws ------------------------------------------------------------------------------------------------------------


def everything_hidden(places: np.ndarray, rng: np.random.Generator, level: float) -> list[Copy]:
    """One copy without any answer token: the mean-field estimate of d1 (Zhao et al. 2025, arXiv 2504.12216)."""
    return [Copy(places, places)]


def random_ratio(
    places: np.ndarray, rng: np.random.Generator, level: float, low: float = 0.0, high: float = 1.0
) -> list[Copy]:
    """One copy at a uniform mask ratio (UniGRPO; Yang et al. 2025, arXiv 2505.15809).

    Args:
        low, high: range of the ratio; the number hidden is that share rounded up, at least 1.
    """
    count = int(np.ceil((low + (high - low) * level) * len(places)))
    hidden = _some(places, max(1, count), rng)
    return [Copy(hidden, hidden)]


def coupled(
    places: np.ndarray, rng: np.random.Generator, level: float, low: float = 0.2, high: float = 0.8
) -> list[Copy]:
    """A random mask, its complement and the fully hidden canvas (coupled-GRPO; Gong et al. 2025, arXiv 2506.20639).

    Each token is hidden with probability t in the first copy, and in the second when it is not. The published
    estimate of a token is half the sum of its log-prob in the full copy and of 1/t (or 1/(1-t)) times the other one.
    """
    ratio = low + (high - low) * level
    hidden = rng.random(len(places)) < ratio
    halves = ((places[hidden], ratio), (places[~hidden], 1 - ratio))
    return [Copy(places, places, 0.5), *(Copy(part, part, 0.5 / share) for part, share in halves if len(part))]


def coupled_counts(
    places: np.ndarray, rng: np.random.Generator, level: float, draws: int = 1, weighted: bool = True
) -> list[Copy]:
    """`draws` pairs of complementary masks, the number hidden uniform on 0..L, stratified over the draws.

    With the weights (L+1)/l and (L+1)/(L-l), halved, the sum over reads is an unbiased estimate of the evidence lower
    bound (ESPO; Ou et al. 2025, arXiv 2512.03759). Without them (GDSD, arXiv 2605.29398) every token counts 1/2 in
    the one copy that hides it.
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

    Wang et al. 2025 (arXiv 2510.09541). Block and number of hidden tokens are uniform, the latter stratified over the
    draws. The weight makes the mean over draws of the sum over reads an unbiased estimate of the (block by block)
    lower bound, and the mean weight of any token 1.
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


def _some(places: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.permutation(places)[:count])


# --- decisions --------------------------------------------------------------------------------------------------------


def answer_decisions(rows: TokenRows, weight: torch.Tensor, lengths: Sequence[int]) -> CombinedRows:
    """One decision per answer: all weighted reads added up, per token of the answer."""
    share = weight / torch.tensor(lengths, dtype=weight.dtype)[rows.trajectory]
    return per_trajectory(rows, share, len(lengths))


def sandwich_decisions(
    rows: TokenRows, weight: torch.Tensor, lengths: Sequence[int], num_draws: int, power: float
) -> SandwichRows:
    """Two decisions per answer, both per token: step 0 the lower bound, step 1 the upper bound of SPG.

    The lower bound is the mean over the draws of the weighted log-probs. The upper one is the sum over tokens of
    (1/b) log mean over the draws of weight p^b; a token that no draw hid is left out of it (its mean would be 0).
    """
    size = torch.tensor(lengths, dtype=weight.dtype)
    lower = per_trajectory(rows, weight / num_draws / size[rows.trajectory], len(lengths))
    tokens = per_token(rows, weight)
    return SandwichRows(
        rows=rows,
        part=lower.part,
        weight=lower.weight,
        trajectory=lower.trajectory.repeat(2),
        step=torch.arange(2).repeat_interleave(len(lengths)),
        power=power,
        token=tokens.part,
        token_weight=weight / num_draws,
        answer=tokens.trajectory,
        scale=1.0 / size[tokens.trajectory],
    )
