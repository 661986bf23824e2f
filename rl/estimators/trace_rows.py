"""The exact trace estimator: every token is scored in the very state in which it was chosen.

TraceRL (Wang et al. 2025, arXiv 2509.06949) scores the tokens of a step given the canvas before that step. The shrink
parameter s merges neighbouring steps: the canvas before the first of s steps predicts the tokens of all of them; s = 1
is exact, a larger s is cheaper and approximate.

Tokens that were taken back or replaced are decisions like the others. A position counts once for every token it took,
each in its own state; remasking is no decision of its own. With classifier-free guidance a decision is scored on two
canvases, with and without the prompt, and their logits are combined as the sampler did.

The positions of a step are taken as given. That is exact when their order does not depend on the draws (left-most,
random, scores "max_probability", "margin" and "neg_entropy"). With score "probability" the discarded draws decide the
order too; their log-probs are left out as in the paper, and the policy gradient has a bias (measured in
tests/test_exact_toy.py). docs/decoders.md says which decoder is which.

Under uniform noise a decision replaces the token at its place, or lets it stay. It is scored by the law of that
transition, with the levels of its step (`rollouts/samplers/uniform.py`). This is exact: the law of a rollout is the
product over its steps and positions.

Three layouts, as documents that may share rows (`pack_to`):

* `remask_rows`: one copy of the canvas per (merged) step. Any model.
* `canvas_trace_rows`: models of canvases, whose steps see the one before (`rl/estimators/canvas_rows.py`).
* `packed_rows`: block-causal models only. One document `[clean | noisy copies of blocks]` scores every step of every
  block at once, because a block never sees what comes after it.

Departures from the published code: the block grid is the trajectory's own (anchored at position 0, where its policy
did not choose the blocks), the terminal block is complete, ids are never re-tokenised, and temperature and filters are
the sampler's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rl.estimators.canvas_rows import canvas_trace_rows
from rl.estimators.documents import Reads, block_document, canvas_document, whole_blocks
from rl.estimators.rows import TokenRows, assemble, readout
from rl.estimators.uniform_rows import ReplacedRows
from rollouts.model_protocol import DenoisingModel
from rollouts.samplers.uniform import step_law
from rollouts.trajectory import TokenTrajectory


def trace_rows(
    trajectories: Sequence[TokenTrajectory],
    model: DenoisingModel,
    block: int | None = None,
    steps: Sequence[np.ndarray] | None = None,
    shrink: int = 1,
    pack_to: int | None = None,
    segments: int | None = None,
    masked: bool = False,
) -> TokenRows:
    """The trace in the layout of the model's attention.

    Args:
        block: training block length, None for the rollout's.
        shrink, segments: see `merged_steps`; pack_to: see `assemble`; masked: see `targets_at`.
    """
    assert steps is None, "the trace trains every step"
    if getattr(model, "canvas_length", None):
        _sampler_states(trajectories, shrink, segments)
        return canvas_trace_rows(trajectories)
    if model.attention == "block_causal":
        whole = whole_blocks(trajectories, block)
        return packed_rows(whole, shrink, block, pack_to, segments, masked=masked, **readout(model))
    return remask_rows(trajectories, shrink, model.logit_shift, pack_to=pack_to, segments=segments, masked=masked)


def remask_rows(
    trajectories: Sequence[TokenTrajectory],
    shrink: int = 1,
    logit_shift: int = 0,
    block_length: int | None = None,
    pack_to: int | None = None,
    segments: int | None = None,
    context_causal: bool = False,
    masked: bool = False,
) -> TokenRows:
    """One document per merged step: the canvas before it.

    Args:
        shrink, segments: see `merged_steps`; pack_to, logit_shift, context_causal: see `assemble`; masked: see
            `targets_at`.
        block_length: None for full attention; a block-causal model's block size otherwise.
    """
    exact = _sampler_states(trajectories, shrink, segments) and not masked
    documents, reads = [], []
    for index, trajectory in enumerate(trajectories):
        everything = np.arange(len(trajectory.step))
        for step, (canvas, reveals) in enumerate(_states(trajectory, everything, shrink, segments)):
            active = trajectory.position[reveals].min() // block_length if context_causal and block_length else None
            documents.append(canvas_document(canvas, block_length, active))
            logprob = trajectory.logprob[reveals] if exact else None
            places, tokens = targets_at(trajectory, canvas, reveals, masked)
            reads.append(
                _and_choices(Reads(index, places, tokens, step, logprob), trajectory, trajectory.step[reveals[0]])
            )
    rows = assemble(documents, reads, trajectories, pack_to, logit_shift, context_causal)
    if trajectories[0].sampler.get("noise") != "uniform":
        return rows
    # Every step of such a trajectory has decisions, so steps were not renumbered.
    sampler, num_steps = trajectories[0].sampler, torch.tensor([t.num_steps for t in trajectories])
    law = step_law(rows.step, num_steps[rows.trajectory], "corrector" in sampler, "transition" in sampler)
    return ReplacedRows(**vars(rows), **law._asdict())


def _and_choices(reads: Reads, trajectory: TokenTrajectory, step: int) -> Reads:
    """The reads of a step, and behind them what the policy chose of its decoder in the same state."""
    if trajectory.choices is None:
        return reads
    _, position, option, logprob = trajectory.choices[trajectory.choices[:, 0] == step].T
    return reads._replace(
        column=np.append(reads.column, position.astype(np.int64)),
        target=np.append(reads.target, option.astype(np.int64)),
        sampler_logprob=None if reads.sampler_logprob is None else np.append(reads.sampler_logprob, logprob),
        is_choice=np.append(np.zeros(len(reads.column), dtype=bool), np.ones(len(position), dtype=bool)),
    )


def packed_rows(
    trajectories: Sequence[TokenTrajectory],
    shrink: int = 1,
    block_length: int | None = None,
    pack_to: int | None = None,
    segments: int | None = None,
    logit_shift: int = 0,
    context_causal: bool = False,
    masked: bool = False,
) -> TokenRows:
    """One document per trajectory: `[clean | noisy block copies]`, absolute positions, absolute grid.

    The clean part stops before the terminal block, which no noisy copy looks at. Steps are merged inside each block. In
    shared rows (`pack_to`) the rollouts of a prompt share its whole blocks, which are the same for all of them.

    Args:
        shrink, segments: see `merged_steps`; pack_to, logit_shift, context_causal: see `assemble`; masked: see
            `targets_at`.
        block_length: training block size; the trajectory's own when None, and where the policy chose its blocks.
    """
    exact = _sampler_states(trajectories, shrink, segments) and not masked
    documents, reads, heads = [], [], []
    for index, trajectory in enumerate(trajectories):
        begins = _block_begins(trajectory, block_length or trajectory.block_length)
        ends = np.append(begins[1:], trajectory.length)
        block = np.searchsorted(begins, trajectory.position, side="right") - 1
        if np.any(np.diff(block) < 0):
            raise ValueError("the packed layout needs blocks that are finished one after the other")
        clean = trajectory.final_canvas()[: begins[-1]]
        copies: list[tuple[int, np.ndarray]] = []
        # What is joined has a part, also where nothing was revealed.
        nothing = np.zeros(0, dtype=np.int64)
        own = [_and_choices(Reads(index, nothing, nothing, nothing, np.zeros(0) if exact else None), trajectory, -1)]
        width = len(clean)
        # Blocks are finished one after the other, and states come in order: so do the reveals.
        for b in np.unique(block):
            for canvas, reveals in _states(trajectory, np.flatnonzero(block == b), shrink, segments):
                places, tokens = targets_at(trajectory, canvas, reveals, masked)
                logprob = trajectory.logprob[reveals] if exact else None
                read = Reads(index, width + places - begins[b], tokens, len(copies), logprob)
                # A choice was made at the clean token before the block, and clean tokens stand at their positions.
                own.append(_and_choices(read, trajectory, trajectory.step[reveals[0]]))
                copies.append((b, canvas[begins[b] : ends[b]]))
                width += ends[b] - begins[b]
        documents.append(block_document(clean, copies, begins))
        # The whole blocks of the prompt see nothing of the answer.
        heads.append(int(begins[begins <= trajectory.prompt_length][-1]))
        reads.append(_joined(own))
    return assemble(documents, reads, trajectories, pack_to, logit_shift, context_causal, heads)


def _joined(reads: Sequence[Reads]) -> Reads:
    """The reads of a document's states, in one."""
    spread = [read._replace(step=np.broadcast_to(read.step, len(read.target))) for read in reads]
    fields: list[Any] = [
        None if parts[0] is None else np.concatenate(parts) for parts in list(zip(*spread, strict=True))[1:]
    ]
    return Reads(reads[0].trajectory, *fields)


def _block_begins(trajectory: TokenTrajectory, block_length: int | None) -> np.ndarray:
    """int64: where each block of a trajectory begins, from position 0 on.

    Example: a prompt of 5 tokens in blocks of 4, and an answer whose policy chose blocks of 2 and 8: 0, 4, 5 and 7.
    """
    if trajectory.choices is not None and "prompt_block" in trajectory.decoder:
        chosen = trajectory.choices[:, 1].astype(np.int64) + 1
        return np.append(np.arange(0, trajectory.prompt_length, trajectory.decoder["prompt_block"]), chosen)
    if block_length is None or trajectory.block_origin != 0 or trajectory.length % block_length:
        raise ValueError("the packed layout needs a block grid anchored at position 0 that covers the canvas")
    return np.arange(0, trajectory.length, block_length)


def merged_steps(step: np.ndarray, shrink: int, segments: int | None = None) -> np.ndarray:
    """Index of the merged step of every reveal. Example: steps [0, 0, 2, 3, 7] with shrink 2 give [0, 0, 0, 1, 1].

    Args:
        step: int64, ascending.
        shrink: distinct steps per merged step.
        segments: number of merged steps of like length, in place of shrink (StepMerge of d2, arXiv 2509.21474). 1 is
            the estimate from the first canvas alone, as many as there are steps is exact.
    """
    distinct, rank = np.unique(step, return_inverse=True)
    if segments is None:
        return rank // shrink
    return rank * min(segments, len(distinct)) // max(len(distinct), 1)


def _states(
    trajectory: TokenTrajectory, edits: np.ndarray, shrink: int, segments: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For every merged step of some edits (ascending indices): the canvas before it, and indices of its reveals."""
    reveals = edits[trajectory.is_reveal[edits]]
    group = merged_steps(trajectory.step[reveals], shrink, segments)
    for own in np.split(reveals, np.flatnonzero(np.diff(group)) + 1):
        if len(own):
            yield trajectory.canvas_at(trajectory.step[own[0]]), own


def targets_at(
    trajectory: TokenTrajectory, canvas: np.ndarray, reveals: np.ndarray, masked: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """int64 positions and tokens that are read in the state from which some reveals were made.

    Args:
        masked: instead of the reveals alone, all that is still masked in their blocks of the decoding grid, with the
            tokens it holds in the end. Example: a block of [M, b, M] of which the step revealed the first; both M.
    """
    if not masked:
        return trajectory.position[reveals], trajectory.token[reveals]
    final, mask = trajectory.final_canvas(), trajectory.mask_token_id
    places = np.flatnonzero((canvas == mask) & (final != mask))
    active = trajectory.block_of(trajectory.position[reveals])
    places = places[np.isin(trajectory.block_of(places), active)]
    return places, final[places]


def _sampler_states(trajectories: Sequence[TokenTrajectory], shrink: int, segments: int | None) -> bool:
    """Whether tokens are scored in the states in which a sampler that gave its log-probs chose them.

    Raises:
        ValueError: these trajectories have no trace, or none whose steps can be merged.
    """
    if shrink < 1:
        raise ValueError(f"algorithm.shrink must be at least 1, got {shrink}")
    if any(t.detail == "sample" for t in trajectories):
        raise ValueError(
            "the trace of a trajectory without its steps is unknown (its engine returns finished samples): set "
            "algorithm.name to a recipe on masked copies, such as diffu_grpo or espo"
        )
    if shrink == 1 and segments is None:
        return all(t.detail == "logprobs" for t in trajectories)
    # A position that was remasked or edited was decided more than once.
    if not all(
        (t.token != t.mask_token_id).all() and len(np.unique(t.position)) == len(t.position) for t in trajectories
    ):
        needs = "needs trajectories without remasking or token editing"
        if shrink > 1:
            raise ValueError(f"algorithm.shrink > 1 {needs}: set algorithm.shrink to 1")
        raise ValueError(f"algorithm.segments {needs}: use tracerl or mdpo on these")
    return False


def trained_steps(
    trajectory: TokenTrajectory, shrink: int = 1, segments: int | None = None, answer: bool = False
) -> np.ndarray:
    """int64 [U]: the step of every decision, merged over the whole rollout (`merged_steps`).

    Args:
        answer: leave out what was revealed behind the answer's end token.
    """
    reveal = trajectory.is_reveal
    step, position = trajectory.step[reveal], trajectory.position[reveal]
    if trajectory.choices is not None:
        # Behind the tokens of their steps, as in `remask_rows`.
        step, position = (np.append(a, b) for a, b in zip((step, position), trajectory.choices[:, :2].T, strict=True))
        order = np.argsort(step, kind="stable")
        step, position = step[order].astype(np.int64), position[order]
    merged = merged_steps(step, shrink, segments)
    return merged[position < trajectory.prompt_length + trajectory.stop_length] if answer else merged


def masked_steps(trajectory: TokenTrajectory, answer: bool = False) -> np.ndarray:
    """int64 [U]: `trained_steps` where all that is masked is read (`targets_at`)."""
    steps, end = [np.zeros(0, dtype=np.int64)], trajectory.prompt_length + trajectory.stop_length
    for index, (canvas, reveals) in enumerate(_states(trajectory, np.arange(len(trajectory.step)), 1, None)):
        places, _ = targets_at(trajectory, canvas, reveals, masked=True)
        steps.append(np.full((places < end).sum() if answer else len(places), index))
    return np.concatenate(steps)


def answer_only(rows: TokenRows, trajectories: Sequence[TokenTrajectory]) -> TokenRows:
    """Without the decisions behind an answer's end token; these tokens stay in the canvas where they were seen."""
    end = torch.tensor([t.prompt_length + t.stop_length for t in trajectories])
    kept = rows.position_ids[rows.row, rows.column] < end[rows.trajectory]
    return rows.some(kept)


def with_equal_steps(rows: TokenRows, steps: Sequence[np.ndarray], within: bool) -> TokenRows:
    """With weight factors by which the tokens of a step share one weight.

    Args:
        steps: of each trajectory, the step of every decision (`trained_steps`).
        within: the steps of a trajectory share what its tokens would have: factors tokens / (steps x tokens of the
            step). Otherwise 1 / tokens of the step.
    """
    factors = []
    for own in steps:
        distinct, place, size = np.unique(own, return_inverse=True, return_counts=True)
        factors.append((len(own) if within else 1) / ((len(distinct) if within else 1) * size[place]))
    return replace(rows, weight_factor=torch.from_numpy(np.concatenate(factors).astype(np.float64)))
