"""The only place that divides: how much each decision counts in the loss of one optimizer update.

Weights are computed once over the whole update, before it is cut into micro-batches and ranks. The loss
of a micro-batch is then a plain weighted sum, and sums over any cut give the same update.
"""

from __future__ import annotations

import torch


def decision_weights(
    mode: str, trace_length: torch.Tensor, total_decisions: float, total_trajectories: float, constant: float
) -> torch.Tensor:
    """Weight of every decision of each trajectory.

    The totals count the whole update over all ranks, also trajectories that are skipped because their
    advantage is zero: skipping work must not change the weights.

    Args:
        mode: "token_mean" (1 / all decisions of the update; DAPO), "trajectory_mean" (1 / |trace| within
            each trajectory, then the mean over trajectories; the form in the TraceRL paper), or
            "constant" (1 / constant, then the mean over trajectories; Dr. GRPO). "step_mean" and "trajectory_step_mean"
            are the first two with a factor by which the tokens of a step share one weight (`with_equal_steps`); for
            step_mean a step is what is counted.
        trace_length: int64 [M], decisions of the trajectories to weight.
        constant: the divisor of mode "constant", usually the generation length.

    Returns:
        float64 [M], the weight of one decision of trajectory m.
    """
    length = trace_length.double()
    if mode in ("token_mean", "step_mean"):
        return torch.full_like(length, 1.0 / total_decisions)
    if mode in ("trajectory_mean", "trajectory_step_mean"):
        return 1.0 / (length * total_trajectories)
    if mode == "constant":
        return torch.full_like(length, 1.0 / (constant * total_trajectories))
    raise ValueError(f"algorithm.aggregation must be token_mean, trajectory_mean or constant, got {mode!r}")


def weighted_sum(per_decision: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Scalar: the micro-batch's share of the loss."""
    return (per_decision * weight.to(per_decision.dtype)).sum()
