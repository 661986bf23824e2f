"""The exact trace estimator: every token is scored in the very state in which it was chosen.

TraceRL (Wang et al. 2025, arXiv 2509.06949) scores the tokens revealed at a step given the canvas before
that step. Neighbouring steps may be merged by the shrink parameter s: the canvas before the first of s
steps then predicts what all of them revealed; s = 1 is exact, larger s is cheaper and approximate.

Tokens that were taken back or replaced are decisions like the others: a position counts once for every token it
took, each in its own state, and remasking is no decision of its own. With classifier-free guidance a decision is
scored on two canvases, with and without the prompt, and their logits are combined as the sampler did.

The positions a step reveals are taken as given. That is exact when their order does not depend on the draws
(left-most, random, scores "max_probability", "margin" and "neg_entropy"). With score "probability" the discarded draws
had a say, their log-probs are left out as in the paper, and the policy gradient has a bias (measured in
tests/test_exact_toy.py). docs/decoders.md lists which decoder is which.

Two layouts give the same numbers:

* `remask`: one copy of the canvas per (merged) step. Any model.
* `packed`: block-causal models only. One sequence `[clean | noisy copies of blocks]` scores every step of
  every block at once, because a block never sees what comes after it.

Either is a list of documents, and several documents may share a row (`pack_to`).

Departures from the published code: the block grid is the trajectory's own (anchored at position 0), the
terminal block is complete, ids are never re-tokenised, and temperature and filters are the sampler's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from rl.estimators.rows import (
    Document,
    Reads,
    TokenRows,
    assemble,
    block_document,
    canvas_document,
    check_sampled,
    whole_blocks,
)
from rollouts.model_protocol import DenoisingModel
from rollouts.trajectory import TokenTrajectory


def merged_steps(step: np.ndarray, shrink: int, segments: int | None = None) -> np.ndarray:
    """Index of the merged step of every reveal: distinct steps in order, grouped in runs of `shrink`.

    Args:
        segments: cut the distinct steps into this many runs of like length instead (StepMerge of d2, arXiv
            2509.21474: 1 is the estimate from the first canvas alone, as many as there are steps is exact).
    """
    distinct, rank = np.unique(step, return_inverse=True)
    if segments is None:
        return rank // shrink
    return rank * min(segments, len(distinct)) // max(len(distinct), 1)


def _states(
    trajectory: TokenTrajectory, edits: np.ndarray, shrink: int, segments: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Replay some edits: for every merged step that reveals, the canvas before it and its reveals.

    Args:
        edits: int64, indices of the edits to replay, ascending.

    Yields:
        a copy of the canvas, and int64 indices of reveals.
    """
    canvas = trajectory.canvas_at(0)
    reveals = edits[trajectory.is_reveal[edits]]
    group = merged_steps(trajectory.step[reveals], shrink, segments)
    bounds = np.searchsorted(group, np.arange(group[-1] + 2 if len(group) else 1))
    done = 0
    for start, stop in itertools.pairwise(bounds):
        before = np.searchsorted(trajectory.step[edits], trajectory.step[reveals[start]])
        new = edits[done:before]
        canvas[trajectory.position[new]] = trajectory.token[new]
        done = before
        yield canvas.copy(), reveals[start:stop]


def _check(trajectories: Sequence[TokenTrajectory], shrink: int, segments: int | None = None) -> None:
    if shrink < 1:
        raise ValueError(f"algorithm.shrink must be at least 1, got {shrink}")
    check_sampled(trajectories)
    if any(t.detail == "sample" for t in trajectories):
        raise ValueError(
            "the trace of a trajectory without its steps is unknown (its engine returns finished samples): set "
            "algorithm.name to a recipe on masked copies, such as diffu_grpo or espo"
        )
    # A position that was remasked or edited was decided more than once.
    kept = all(t.is_reveal.all() and len(np.unique(t.position)) == len(t.position) for t in trajectories)
    if kept:
        return
    needs = "needs trajectories without remasking or token editing"
    if shrink > 1:
        raise ValueError(f"algorithm.shrink > 1 {needs}: set algorithm.shrink to 1")
    if segments is not None:
        raise ValueError(f"algorithm.segments {needs}: use tracerl or mdpo on these")


def trace_rows(
    trajectories: Sequence[TokenTrajectory],
    model: DenoisingModel,
    block: int | None = None,
    steps: Sequence[np.ndarray] | None = None,
    shrink: int = 1,
    pack_to: int | None = None,
    segments: int | None = None,
) -> TokenRows:
    """The layout of the model's attention.

    Args:
        block: training block length, None for the rollout's.
        shrink, segments: see `merged_steps`; pack_to: see `packed_rows`.
    """
    assert steps is None, "the trace trains every step"
    if model.attention == "block_causal":
        return packed_rows(whole_blocks(trajectories, block), shrink, block, pack_to, segments)
    return remask_rows(trajectories, shrink, model.logit_shift, pack_to=pack_to, segments=segments)


def remask_rows(
    trajectories: Sequence[TokenTrajectory],
    shrink: int = 1,
    logit_shift: int = 0,
    block_length: int | None = None,
    pack_to: int | None = None,
    segments: int | None = None,
) -> TokenRows:
    """One document per merged step: the canvas before it.

    Args:
        segments: see `merged_steps`.
        block_length: None for full attention; a block-causal model's block size otherwise.
        pack_to: see `packed_rows`; None gives every canvas a row, right-padded to the longest.
    """
    _check(trajectories, shrink, segments)
    documents: list[Document] = []
    reads = []
    for trajectory in trajectories:
        document, step = np.empty((2, len(trajectory.step)), dtype=np.int64)
        edits = np.arange(len(trajectory.step))
        for index, (canvas, reveals) in enumerate(_states(trajectory, edits, shrink, segments)):
            document[reveals], step[reveals] = len(documents), index
            documents.append(canvas_document(canvas, block_length))
        reads.append(_reveals(trajectory, document, trajectory.position, step, shrink == 1 and segments is None))
    return assemble(documents, reads, trajectories, pack_to, logit_shift)


def packed_rows(
    trajectories: Sequence[TokenTrajectory],
    shrink: int = 1,
    block_length: int | None = None,
    pack_to: int | None = None,
    segments: int | None = None,
) -> TokenRows:
    """One document per trajectory: `[clean | noisy block copies]`, absolute positions, absolute grid.

    The clean part stops before the terminal block, which no noisy copy looks at. Steps are merged inside
    each block.

    Args:
        block_length: training block size; the trajectory's own when None.
        pack_to: put several documents into one row while they fit into this many tokens; a longer document has a
            row of its own. None gives every document a row.
        segments: see `merged_steps`; of each block.
    """
    _check(trajectories, shrink, segments)
    documents: list[Document] = []
    reads = []
    for index, trajectory in enumerate(trajectories):
        size = block_length or trajectory.block_length
        if size is None or trajectory.block_origin != 0 or trajectory.length % size:
            raise ValueError("the packed layout needs a block grid anchored at position 0 that covers the canvas")
        block = trajectory.position // size
        if np.any(np.diff(block) < 0):
            raise ValueError("the packed layout needs blocks that are finished one after the other")
        clean = trajectory.final_canvas()[:-size]
        copies: list[tuple[int, np.ndarray]] = []
        column, step = np.empty((2, len(block)), dtype=np.int64)
        for b in np.unique(block):
            # Before a block's first edit it holds what the initial canvas does: prompt and masks.
            for canvas, reveals in _states(trajectory, np.flatnonzero(block == b), shrink, segments):
                step[reveals] = len(copies)
                column[reveals] = len(clean) + len(copies) * size + trajectory.position[reveals] - b * size
                copies.append((b, canvas[b * size : (b + 1) * size]))
        documents.append(block_document(clean, copies, size))
        document = np.full(len(block), index)
        reads.append(_reveals(trajectory, document, column, step, shrink == 1 and segments is None))
    return assemble(documents, reads, trajectories, pack_to)


def _reveals(
    trajectory: TokenTrajectory, document: np.ndarray, column: np.ndarray, step: np.ndarray, exact: bool
) -> Reads:
    """The tokens that a trajectory revealed, as decisions.

    Args:
        document, column, step: int64 [E], place and merged step of each edit; read at reveals alone.
        exact: they are scored in the states in which the sampler chose them.
    """
    reveal = trajectory.is_reveal
    logprob = trajectory.logprob[reveal] if exact and trajectory.detail == "logprobs" else None
    return Reads(document[reveal], column[reveal], trajectory.token[reveal], step[reveal], logprob)
