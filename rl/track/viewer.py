"""A trajectory as the denoising viewer of the report shows it: the canvas after every step, as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rollouts.trajectory import TokenTrajectory


def trajectory_view(
    trajectory: TokenTrajectory,
    texts: Callable[[Sequence[int | None]], Sequence[str]],
    correct: bool,
    givens: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Replay a trajectory into plain JSON values.

    Example: a response of two cells, the second decided at the first step, the first at the second::

        {"steps": [{"tokens": ["", ""], "confidence": [None, None], "changed": []},
                   {"tokens": ["", "b"], "confidence": [None, 0.9], "changed": [1]},
                   {"tokens": ["a", "b"], "confidence": [0.5, 0.9], "changed": [0]}],
         "correct": True, "givens": ["", ""], "stop_length": 2}

    Args:
        trajectory: the rollout; remasking and token edits are replayed like any other edit.
        texts: token ids -> their texts, None -> "" (`rl.track.pieces.Pieces.texts`).
        correct: the verifier's verdict on the finished response.
        givens: what the problem prescribes per response cell, "" where it prescribes nothing.

    Returns:
        "steps": T + 1 canvases, the first before any decision; "tokens" is "" and "confidence" None where the cell is
        masked; "changed" lists the response cells edited by that step. Cells count from the first response position. A
        response that ended before the last prescribed cell (in an earlier block) has masked cells up to there.
    """
    start = trajectory.prompt_length
    prescribed = list(givens or [])
    num_cells = max(trajectory.length - start, len(prescribed))
    unreached = [trajectory.mask_token_id] * (num_cells - trajectory.length + start)
    prescribed += [""] * (num_cells - len(prescribed))

    confidence: list[float | None] = [None] * num_cells
    steps = []
    for step in range(-1, trajectory.num_steps):
        edits = trajectory.step == step
        changed = [int(position) - start for position in trajectory.position[edits]]
        for cell, value in zip(changed, trajectory.confidence[edits], strict=True):
            confidence[cell] = round(float(value), 4)
        canvas = [int(token) for token in trajectory.canvas_at(step + 1)[start:]] + unreached
        masked = [token == trajectory.mask_token_id for token in canvas]
        steps.append(
            {
                "tokens": texts([None if hidden else t for t, hidden in zip(canvas, masked, strict=True)]),
                "confidence": [None if hidden else c for c, hidden in zip(confidence, masked, strict=True)],
                "changed": sorted(changed),
            }
        )
    return {"steps": steps, "correct": bool(correct), "givens": prescribed, "stop_length": int(trajectory.stop_length)}
