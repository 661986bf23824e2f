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
from dataclasses import replace

import numpy as np
import torch

from rl.estimators.rows import TokenRows
from rollouts.model_protocol import DenoisingModel
from rollouts.trajectory import TokenTrajectory

# Token ids, absolute positions, segments and blocks of one document, int64 of one length.
Document = tuple[np.ndarray, ...]


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
    trajectory: TokenTrajectory, edits: np.ndarray, reveal: np.ndarray, shrink: int, segments: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Replay some edits: for every merged step that reveals, the canvas before it and its reveals.

    Args:
        edits: int64, indices of the edits to replay, ascending.
        reveal: bool [E], `trajectory.is_reveal`.

    Yields:
        the canvas (the same array, edited in place) and int64 indices of reveals.
    """
    canvas = trajectory.canvas_at(0)
    reveals = edits[reveal[edits]]
    group = merged_steps(trajectory.step[reveals], shrink, segments)
    bounds = np.searchsorted(group, np.arange(group[-1] + 2 if len(group) else 1))
    done = 0
    for start, stop in itertools.pairwise(bounds):
        before = np.searchsorted(trajectory.step[edits], trajectory.step[reveals[start]])
        new = edits[done:before]
        canvas[trajectory.position[new]] = trajectory.token[new]
        done = before
        yield canvas, reveals[start:stop]


def check_sampled(trajectories: Sequence[TokenTrajectory]) -> None:
    """Raise ValueError unless the trajectories were sampled, all from one kind of distribution."""
    for index, trajectory in enumerate(trajectories):
        if trajectory.sampler.get("temperature", 0) == 0:
            raise ValueError(f"trajectory {index} was decoded greedily: set sampler.temperature > 0 to train on it")
    if len({tuple(sorted(t.sampler.items())) for t in trajectories}) > 1:
        raise ValueError("trajectories of one batch must share their sampler settings")


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


def covered(trajectories: Sequence[TokenTrajectory], block: int | None) -> Sequence[TokenTrajectory]:
    """Trajectories whose canvas ends where a training block does; what is added was never revealed."""
    if block is None:
        return trajectories
    return [replace(t, length=-(-t.length // block) * block) for t in trajectories]


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
        return packed_rows(covered(trajectories, block), shrink, block, pack_to, segments)
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
    places = []
    for trajectory in trajectories:
        reveal = trajectory.is_reveal
        positions = np.arange(trajectory.length)
        segment = np.zeros_like(positions)
        block = positions // block_length if block_length else segment
        document, step = np.empty((2, len(reveal)), dtype=np.int64)
        for index, (canvas, reveals) in enumerate(
            _states(trajectory, np.arange(len(reveal)), reveal, shrink, segments)
        ):
            document[reveals], step[reveals] = len(documents), index
            documents.append((canvas.copy(), positions, segment, block))
        places.append(np.stack([document, trajectory.position, step]))
    return _rows_of_reveals(trajectories, documents, places, shrink, segments, pack_to, logit_shift)


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
    places = []
    for index, trajectory in enumerate(trajectories):
        size = block_length or trajectory.block_length
        if size is None or trajectory.block_origin != 0 or trajectory.length % size:
            raise ValueError("the packed layout needs a block grid anchored at position 0 that covers the canvas")
        block = trajectory.position // size
        if np.any(np.diff(block) < 0):
            raise ValueError("the packed layout needs blocks that are finished one after the other")
        final = trajectory.final_canvas()
        clean = (trajectory.length // size - 1) * size
        ids, positions = [final[:clean]], [np.arange(clean)]
        copies, blocks = [np.zeros(clean, dtype=np.int64)], [np.arange(clean) // size]
        column, step = np.empty((2, len(trajectory.step)), dtype=np.int64)
        width, segment = clean, 0
        reveal = trajectory.is_reveal
        for b in np.unique(block):
            inside = np.arange(b * size, (b + 1) * size)
            # Before a block's first edit it holds what the initial canvas does: prompt and masks.
            for canvas, reveals in _states(trajectory, np.flatnonzero(block == b), reveal, shrink, segments):
                step[reveals] = segment
                segment += 1
                ids.append(canvas[inside].copy())
                positions.append(inside)
                copies.append(np.full(size, segment))
                blocks.append(np.full(size, b))
                column[reveals] = width + trajectory.position[reveals] - b * size
                width += size
        documents.append(tuple(np.concatenate(x) for x in (ids, positions, copies, blocks)))
        places.append(np.stack([np.full_like(column, index), column, step]))
    return _rows_of_reveals(trajectories, documents, places, shrink, segments, pack_to)


def _rows_of_reveals(
    trajectories: Sequence[TokenTrajectory],
    documents: Sequence[Document],
    places: Sequence[np.ndarray],
    shrink: int,
    segments: int | None,
    pack_to: int | None,
    logit_shift: int = 0,
) -> TokenRows:
    """Rows that score every token a trajectory revealed.

    Args:
        places: int64 [3, E] per trajectory: document of each edit, column in it, merged step; read at reveals alone.

    Returns:
        rows that know the sampler's log-probs, unless merged steps score other states than it sampled in, or it gave
        none.
    """
    reveals = [t.is_reveal for t in trajectories]
    owners, columns, steps = (
        [place[i][reveal] for place, reveal in zip(places, reveals, strict=True)] for i in range(3)
    )
    targets, recorded = (
        [getattr(t, name)[reveal] for t, reveal in zip(trajectories, reveals, strict=True)]
        for name in ("token", "logprob")
    )
    exact = shrink == 1 and segments is None and all(t.detail == "logprobs" for t in trajectories)
    return assemble(
        trajectories, documents, owners, columns, targets, steps, pack_to, logit_shift,
        sampler_logprob=np.concatenate(recorded) if exact else None,
    )  # fmt: skip


def first_fit(lengths: Sequence[int], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Place documents into rows: the longest first, each into the first row that has room.

    Returns:
        int64 row and offset of every document. One longer than the capacity has a row of its own.
    """
    row, offset = np.zeros((2, len(lengths)), dtype=np.int64)
    used = np.zeros(0, dtype=np.int64)
    for index in np.argsort(-np.asarray(lengths), kind="stable"):
        fits = np.flatnonzero(used + lengths[index] <= capacity)
        if not len(fits):
            fits = np.array([len(used)])
            used = np.append(used, 0)
        row[index], offset[index] = fits[0], used[fits[0]]
        used[fits[0]] += lengths[index]
    return row, offset


def assemble(
    trajectories: Sequence[TokenTrajectory],
    documents: Sequence[Document],
    owners: list[np.ndarray],
    columns: list[np.ndarray],
    targets: list[np.ndarray],
    steps: list[np.ndarray],
    pack_to: int | None,
    logit_shift: int = 0,
    sampler_logprob: np.ndarray | None = None,
    weight_factor: np.ndarray | None = None,
) -> TokenRows:
    """Lay documents out in rows and put the per-trajectory pieces together as tensors.

    Args:
        owners, columns: document of each decision, and its place inside it.
        sampler_logprob, weight_factor: [N], see `TokenRows`.
    """

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))

    lengths = [len(document[0]) for document in documents]
    if pack_to is None:
        row, offset = np.arange(len(lengths)), np.zeros(len(lengths), dtype=np.int64)
    else:
        row, offset = first_fit(lengths, pack_to)
    shape = (int(row.max()) + 1, int((offset + lengths).max()))
    ids, positions, segment, block = layout = [np.zeros(shape, dtype=np.int64) for _ in range(4)]
    # Padding sees padding of its own row only (document -1), never nothing: no row of the softmax is empty.
    document = np.full(shape, -1, dtype=np.int64)
    prompt = np.zeros(shape, dtype=np.int64)
    prompt_lengths = np.zeros(len(documents), dtype=np.int64)
    for trajectory, own in zip(trajectories, owners, strict=True):
        prompt_lengths[own] = trajectory.prompt_length
    in_row = np.zeros(shape[0], dtype=np.int64)
    for index in np.argsort(offset, kind="stable"):
        place = (row[index], slice(offset[index], offset[index] + lengths[index]))
        for into, values in zip(layout, documents[index], strict=True):
            into[place] = values
        document[place] = in_row[row[index]]
        prompt[place] = prompt_lengths[index]
        in_row[row[index]] += 1
    owner = np.concatenate(owners)
    counts = [len(target) for target in targets]
    cfg_scale = trajectories[0].sampler.get("cfg_scale", 0.0)
    unprompted = np.where(positions < prompt, trajectories[0].mask_token_id, ids) if cfg_scale else None
    return TokenRows(
        input_ids=tensor(ids),
        position_ids=tensor(positions),
        document=tensor(document),
        segment=tensor(segment),
        block=tensor(block),
        row=tensor(row[owner]),
        column=tensor(offset[owner] + np.concatenate(columns)),
        target=tensor(np.concatenate(targets)),
        trajectory=tensor(np.repeat(np.arange(len(counts)), counts)),
        step=tensor(np.concatenate(steps)),
        sampler_logprob=None if sampler_logprob is None else torch.from_numpy(sampler_logprob.astype(np.float64)),
        weight_factor=None if weight_factor is None else torch.from_numpy(weight_factor.astype(np.float64)),
        unprompted=None if unprompted is None else tensor(unprompted),
        cfg_scale=cfg_scale,
        logit_shift=logit_shift,
        **{k: trajectories[0].sampler[k] for k in ("temperature", "top_p", "top_k")},
    )
