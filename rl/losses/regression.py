"""A policy's change regressed on the advantage."""

from __future__ import annotations

import math

from rl.batch import DecisionBatch, LossOutput
from rl.losses.kl import kl_term


def regression_loss(
    batch: DecisionBatch,
    *,
    psi: float,
    clip_low: float,
    clip_high: float,
    kl_coef: float = 0.0,
    kl_estimator: str = "k2",
    kl_to: str = "none",
) -> LossOutput:
    """GDSD (arXiv 2605.29398): (clamp(logprob - old, log(1 - clip_low), log(1 + clip_high)) - psi A)^2, plus KL.

    The smallest loss is where a decision's log-prob has moved by psi times its advantage; outside the clamp it has no
    gradient.

    Returns:
        per-decision loss and metrics `log_ratio`, `clip_fraction`, `kl`, `entropy`, `logprob`.
    """
    change = batch.logprob - batch.old_logprob
    clamped = change.clamp(math.log(1 - clip_low), math.log(1 + clip_high))
    loss = (clamped - psi * batch.advantage) ** 2
    kl = kl_term(batch, kl_estimator, kl_to)
    if kl_to != "none":
        loss = loss + kl_coef * kl
    metrics = {
        "log_ratio": change,
        "clip_fraction": (clamped != change).to(change.dtype),
        "kl": kl,
        "entropy": batch.entropy,
        "logprob": batch.logprob,
    }
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})
