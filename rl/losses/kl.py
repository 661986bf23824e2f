"""Per-decision estimates of KL(pi_theta || pi_other) from log-probs of sampled tokens.

J. Schulman, "Approximating KL divergence" (2020), with r = pi_other / pi_theta and samples from pi_theta:
k1 = -log r is unbiased, k2 = (log r)^2 / 2 has low variance, k3 = r - 1 - log r is unbiased and >= 0.

As a loss term on fixed samples they minimise different things: k2's expected gradient is that of
KL(pi_theta || pi_other), k3's that of KL(pi_other || pi_theta), and k1's is zero, so k1 is for logging.
"""

from __future__ import annotations

import torch

from rl.batch import DecisionBatch


def kl_estimate(kind: str, logprob: torch.Tensor, other_logprob: torch.Tensor, clamp: float = 10.0) -> torch.Tensor:
    """[N] estimate; the log-ratio is clamped to +-clamp so that one outlier cannot overflow k3."""
    log_r = (other_logprob - logprob).clamp(-clamp, clamp)
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return 0.5 * log_r**2
    if kind == "k3":
        return log_r.exp() - 1 - log_r
    raise ValueError(f"algorithm.kl_estimator must be k1, k2 or k3, got {kind!r}")


def kl_term(batch: DecisionBatch, kind: str, to: str) -> torch.Tensor:
    """[N]: the KL to the policy that `kl_to` names; to the old one, for the log, where it names none."""
    if kind == "exact" and to != "none":
        assert batch.kl is not None, "an exact KL needs an estimator that gives it"
        return batch.kl
    other = batch.ref_logprob if to == "reference" else batch.old_logprob
    assert other is not None, "kl_to=reference needs ref_logprob"
    return kl_estimate("k3" if kind == "exact" else kind, batch.logprob, other)
