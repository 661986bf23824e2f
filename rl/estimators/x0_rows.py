"""Rows of a rollout's own steps whose targets are the full fill: what MDPO rewards and trains.

At step i the sampler drew a token for every masked position of the canvas x_i, committed or not; together with the
canvas they are the fill that the verifier judged. The learner scores these very draws in that very canvas, so its
log-probs equal the sampler's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rl.estimators.rows import Document, Reads, TokenRows, assemble, canvas_document, check_sampled
from rollouts.model_protocol import DenoisingModel
from rollouts.trajectory import TokenTrajectory

Targets = Literal["masked", "committed"]


@dataclass
class StepSummary:
    """What the choice and the comparison of steps need to know of a trajectory.

    Attributes:
        seed: the trajectory's own.
        canvas: int64 [T], a digest of the canvas of each step: equal digests, equal canvases.
        surprisal: float64 [T], mean -log p of what the step committed; 0 where it committed nothing.
        masked: int64 [T], masked positions of the canvas.
    """

    seed: int
    canvas: np.ndarray
    surprisal: np.ndarray
    masked: np.ndarray


def step_summary(trajectory: TokenTrajectory) -> StepSummary:
    digests = np.zeros(trajectory.num_steps, dtype=np.int64)
    masked = np.zeros(trajectory.num_steps, dtype=np.int64)
    for step in range(trajectory.num_steps):
        canvas = trajectory.canvas_at(step)
        masked[step] = (canvas == trajectory.mask_token_id).sum()
        digests[step] = int.from_bytes(hashlib.blake2b(canvas.tobytes(), digest_size=7).digest(), "big")
    reveal = trajectory.is_reveal
    count = np.bincount(trajectory.step[reveal], minlength=trajectory.num_steps)
    total = np.bincount(trajectory.step[reveal], -trajectory.logprob[reveal], minlength=trajectory.num_steps)
    return StepSummary(trajectory.seed, digests, total / np.maximum(count, 1), masked)


def x0_targets(trajectory: TokenTrajectory, step: int, targets: Targets) -> np.ndarray:
    """int64: the positions whose draw at a step is trained, all of them or those it committed.

    Raises:
        ValueError: the trajectory did not record its fills.
    """
    if trajectory.x0_logprob is None:
        raise ValueError("a trajectory has no recorded fills: set sampler.record_x0=true")
    if targets == "masked":
        return np.flatnonzero(~np.isnan(trajectory.x0_logprob[step]))
    return trajectory.position[(trajectory.step == step) & trajectory.is_reveal]


def num_x0_targets(trajectory: TokenTrajectory, steps: np.ndarray | None, targets: Targets) -> int:
    """Targets of the chosen steps, of all without a choice."""
    return sum(len(x0_targets(trajectory, int(step), targets)) for step in _chosen(trajectory, steps))


def _chosen(trajectory: TokenTrajectory, steps: np.ndarray | None) -> np.ndarray:
    return np.arange(trajectory.num_steps) if steps is None else np.flatnonzero(steps[: trajectory.num_steps])


def x0_rows(
    trajectories: Sequence[TokenTrajectory],
    model: DenoisingModel,
    steps: Sequence[np.ndarray] | None,
    targets: Targets = "masked",
    confidence: bool = True,
    num_steps: int | None = None,
) -> TokenRows:
    """One row per chosen step: its canvas; decisions are the draws of its targets.

    Args:
        steps: bool [T] per trajectory; None takes the first `num_steps`, which are the longest to score.
        confidence: weigh each draw by the confidence the sampler had in it.
        num_steps: S, of which the chosen steps are a part: every step counts 1/min(S, T), also when fewer are chosen
            (a step without advantage adds nothing, and leaving it out must not make the others count more). None
            takes the number chosen.

    Returns:
        rows with weight factors: with weights 1/decisions (aggregation trajectory_mean), a decision counts
        confidence / (min(S, T) x targets of its step) of its trajectory.
    """
    check_sampled(trajectories)
    if steps is None:
        steps = [np.arange(t.num_steps) < (num_steps or t.num_steps) for t in trajectories]
    documents: list[Document] = []
    reads = []
    for trajectory, chosen in zip(trajectories, steps, strict=True):
        assert trajectory.x0_hat is not None and trajectory.x0_logprob is not None
        assert trajectory.x0_confidence is not None
        wanted = _chosen(trajectory, chosen)
        at = [x0_targets(trajectory, int(step), targets) for step in wanted]
        sizes = np.array([len(a) for a in at])
        step, column = np.repeat(wanted, sizes), np.concatenate([*at, np.zeros(0, dtype=np.int64)])
        document = np.repeat(len(documents) + np.arange(len(wanted)), sizes)
        documents += [canvas_document(trajectory.canvas_at(int(s))) for s in wanted]
        factor = sizes.sum() / (np.repeat(sizes, sizes) * min(num_steps or len(wanted), trajectory.num_steps))
        if confidence:
            factor = factor * trajectory.x0_confidence[step, column]
        token, logprob = trajectory.x0_hat[step, column], trajectory.x0_logprob[step, column]
        reads.append(Reads(document, column, token, step, logprob, factor))
    return assemble(documents, reads, trajectories, logit_shift=model.logit_shift)
