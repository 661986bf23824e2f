"""The clipped policy-gradient loss on trace log-probs."""

from __future__ import annotations

import torch

from rl.batch import DecisionBatch, LossOutput
from rl.losses.kl import kl_term


def clipped_policy_loss(
    batch: DecisionBatch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    log_ratio_clamp: float = 10.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_to: str = "none",
    entropy_coef: float = 0.0,
    linear_gain: bool = False,
) -> LossOutput:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7) plus KL and entropy terms.

    loss_j = -min(rho_j A_j, clip(rho_j, 1 - clip_low, 1 + clip_high) A_j) + kl_coef kl_j - entropy_coef H_j
    with rho_j = exp(clamp(logprob_j - old_logprob_j)).

    Args:
        batch: see `DecisionBatch`.
        log_ratio_clamp: bound on |log rho|.
        linear_gain: put 1 + log rho in place of rho where A > 0, a lower bound that touches it at rho = 1 (BGPO).
        kl_to: "none", "old" (the policy that is being improved) or "reference" (frozen).

    Returns:
        per-decision loss and metrics `ratio`, `log_ratio`, `clip_fraction`, `kl`, `entropy`.
    """
    log_ratio = (batch.logprob - batch.old_logprob).clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = log_ratio.exp()
    if linear_gain:
        ratio = (1 + log_ratio).where(batch.advantage > 0, ratio)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
    loss = -surrogate - entropy_coef * batch.entropy
    kl = kl_term(batch, kl_estimator, kl_to)
    if kl_to != "none":
        loss = loss + kl_coef * kl
    with torch.no_grad():
        metrics = {
            "ratio": ratio,
            "log_ratio": log_ratio,
            "log_ratio_abs": log_ratio.abs(),
            # A decision is clipped when the clip, and not the ratio, sets its gradient to zero.
            "clip_fraction": (clipped * batch.advantage < ratio * batch.advantage).to(ratio.dtype),
            "kl": kl,
            "entropy": batch.entropy,
            "logprob": batch.logprob,
        }
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})
