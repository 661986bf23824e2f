"""The distribution a token is drawn from, shared by the sampler and by the learner that scores it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Low enough to underflow to probability 0 in every dtype, high enough to survive a division by a temperature.
_NEVER = -1e9

# Half-open ranges of token ids. Example: [[0, 4], [126349, 126464]].
Ranges = Sequence[Sequence[int]]


def exclude_(logits: torch.Tensor, mask_token_id: int, excluded: Ranges) -> torch.Tensor:
    """Logits [..., V] in at least float32 in which the mask token and the excluded ranges cannot win.

    The argument is changed in place if it is float32 already: nobody else holds a head's output, and it is the largest
    tensor of a forward.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    never = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    if mask_token_id < len(never):
        never[mask_token_id] = _NEVER
    for start, stop in excluded:
        never[start:stop] = _NEVER
    return logits.add_(never)


def can_be_predicted(logits: torch.Tensor) -> torch.Tensor:
    """bool [..., V]: the tokens that `exclude_` has left in reach."""
    return logits > _NEVER / 2


def sampling_logprobs(
    logits: torch.Tensor,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities after temperature, then top-k, then nucleus (top-p) filtering.

    Args:
        logits: [N, V].
        temperature: > 0. Greedy decoding (0) has no density; callers handle it.
        top_p: keep the smallest set of most likely tokens whose mass reaches top_p; 1 keeps all.
        top_k: keep the k most likely tokens; 0 keeps all.
        keep: int64 [N], tokens that stay in the support whatever the filters say. A learner passes
            the recorded tokens: under the sampling weights they are in the support anyway, under
            later weights the ratio stays finite.

    Returns:
        [N, V] log-probabilities, -inf outside the support.
    """
    if not temperature > 0:
        raise ValueError(f"sampler.temperature must be > 0 to score tokens, got {temperature}")
    scores = logits / temperature
    # With both filters off this is the plain tempered softmax, and no sort is paid for.
    if top_k <= 0 and top_p >= 1.0:
        return torch.log_softmax(scores, dim=-1)
    drop = torch.zeros_like(scores, dtype=torch.bool)
    if 0 < top_k < scores.shape[-1]:
        kth = scores.topk(top_k, dim=-1).values[..., -1:]
        drop |= scores < kth
    if top_p < 1.0:
        probs = torch.softmax(scores.masked_fill(drop, -torch.inf), dim=-1)
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        # A token is dropped when the mass in front of it already reaches top_p; the first never is.
        drop_sorted = sorted_probs.cumsum(dim=-1) - sorted_probs >= top_p
        drop |= torch.zeros_like(drop).scatter(-1, order, drop_sorted)
    if keep is not None:
        drop = drop.scatter(-1, keep[:, None], False)
    return torch.log_softmax(scores.masked_fill(drop, -torch.inf), dim=-1)


def draw(logprobs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF sampling in float64.

    Args:
        logprobs: [N, V] log-probabilities, -inf allowed.
        u: float64 [N] in (0, 1).

    Returns:
        int64 [N].
    """
    cdf = logprobs.double().exp().cumsum(dim=-1)
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None]).squeeze(-1)
    return token.clamp_(max=logprobs.shape[-1] - 1)


def guided_logits(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance as LLaDA applies it: u + (scale + 1)(c - u); scale 0 is the conditional model.

    Args:
        conditional: [N, V], c, logits given the prompt.
        unconditional: [N, V], u, logits with every prompt token masked.
    """
    return unconditional + (scale + 1) * (conditional - unconditional)
