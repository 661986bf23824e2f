"""Log-prob and entropy of decisions from their logits, with one [N, V] tensor kept for backward.

Autograd would keep four of them for the separate operations; at a vocabulary of 150 thousand they limit the batch.
"""

from __future__ import annotations

from typing import Any

import torch

from rollouts.samplers.distribution import sampling_logprobs


class _LogprobAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, temperature: float, top_p: float, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = sampling_logprobs(logits, temperature, top_p, top_k, keep=target)
        logprob = logprobs.gather(-1, target[:, None]).squeeze(-1)
        # -p log p, and 0 for a token outside the filtered support.
        entropy = torch.special.entr(logprobs.exp()).sum(-1)
        ctx.save_for_backward(logprobs, target, entropy)
        ctx.temperature = temperature
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d log p_t = (1[v = t] - p_v) / T and dH = -p_v (log p_v + H) / T; outside the support both are 0."""
        logprobs, target, entropy = ctx.saved_tensors
        for_logprob, for_entropy = (grad[:, None] for grad in grads)
        probs = logprobs.exp()
        if bool((for_entropy != 0).any()):
            inside = (logprobs + entropy[:, None]).masked_fill_(logprobs == -torch.inf, 0.0)
            grad = probs.mul_(inside.mul_(-for_entropy).sub_(for_logprob))
        else:
            grad = probs.mul_(-for_logprob)
        grad.scatter_add_(-1, target[:, None], for_logprob)
        return grad.div_(ctx.temperature), None, None, None, None


def logprob_and_entropy(
    logits: torch.Tensor, target: torch.Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy under the sampling distribution (`rollouts/samplers/distribution.py`).

    Every target is in its support, whatever the filters say.

    Args:
        logits: [N, V].
        target: int64 [N], the recorded tokens.

    Returns:
        logprob [N] and entropy [N] (nats), both with gradient.
    """
    return _LogprobAndEntropy.apply(logits, target, temperature, top_p, top_k)
