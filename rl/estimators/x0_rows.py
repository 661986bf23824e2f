"""Rows of a rollout's own steps whose decisions are the x0 prediction: the draws that MDPO rewards and trains.

At step i the sampler drew a token for every masked position of the canvas x_i, committed or not. Canvas and draws
together are the x0 prediction that the verifier judged. The learner scores these draws in that canvas, so its log-probs
equal the sampler's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rl.estimators.documents import Reads, canvas_document
from rl.estimators.rows import TokenRows, assemble
from rollouts.model_protocol import DenoisingModel
from rollouts.trajectory import TokenTrajectory

Targets = Literal["masked", "committed"]


@dataclass
class StepSummary:
    """The facts about a trajectory by which its steps are chosen and compared.

    Attributes:
        seed: the trajectory's own.
        canvas: int64 [T], a digest of the canvas of each step: equal digests, equal canvases.
        surprisal: float64 [T], mean -log p of the tokens that the step committed; 0 where it committed none.
        masked: int64 [T], number of masked positions of the canvas.
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
    """int64: the positions whose draw at a step is trained, all of them or those that the step committed.

    Raises:
        ValueError: the trajectory did not record its x0 predictions.
    """
    if trajectory.x0_logprob is None:
        raise ValueError("a trajectory has no recorded x0 predictions: set sampler.record_x0=true")
    if targets == "masked":
        return np.flatnonzero(~np.isnan(trajectory.x0_logprob[step]))
    return trajectory.position[(trajectory.step == step) & trajectory.is_reveal]


def num_x0_targets(trajectory: TokenTrajectory, steps: np.ndarray | None, targets: Targets) -> int:
    """Targets of the chosen steps (bool [T]), of all steps without a choice."""
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
    """One document per chosen step: its canvas; decisions are the draws of its targets.

    With weights 1/decisions (aggregation trajectory_mean), the weight factors make a decision count
    confidence / (min(S, T) x targets of its step) of its trajectory.

    Args:
        steps: bool [T] per trajectory; None takes the first `num_steps`, which are the longest to score.
        confidence: multiply by the sampler's confidence in each draw.
        num_steps: S, the number of steps that a recipe chooses; None takes the number chosen here. A step without
            advantage may be missing from `steps`; the others must not count more for it.
    """
    documents, reads = [], []
    for index, trajectory in enumerate(trajectories):
        chosen = (
            np.arange(trajectory.num_steps) < (num_steps or trajectory.num_steps) if steps is None else steps[index]
        )
        wanted = _chosen(trajectory, chosen)
        at = [x0_targets(trajectory, int(step), targets) for step in wanted]
        x0, logprob, certainty = trajectory.x0_hat, trajectory.x0_logprob, trajectory.x0_confidence
        assert x0 is not None and logprob is not None and certainty is not None
        total, share = sum(len(column) for column in at), min(num_steps or len(wanted), trajectory.num_steps)
        for step, column in zip(wanted, at, strict=True):
            factor = np.full(len(column), total / (len(column) * share)) if len(column) else np.zeros(0)
            if confidence:
                factor = factor * certainty[step, column]
            documents.append(canvas_document(trajectory.canvas_at(int(step))))
            reads.append(Reads(index, column, x0[step, column], int(step), logprob[step, column], factor))
    return assemble(documents, reads, trajectories, logit_shift=model.logit_shift)
