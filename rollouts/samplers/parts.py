"""The parts a decoder is assembled from: quota, score, selector. Pure functions on tensors."""

from __future__ import annotations

import torch


def even_quota(num_masked: torch.Tensor, num_steps: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Positions to reveal at `step` when `num_masked` are spread evenly, the remainder first (LLaDA).

    Args:
        num_masked: int64 [B], masked positions when the block began.
        num_steps: int64 [B], steps of the block, at most num_masked.
        step: int64 [B], step inside the block.
    """
    return num_masked // num_steps + (step < num_masked % num_steps).long()


def position_scores(
    kind: str, logprobs: torch.Tensor, tokens: torch.Tensor, random: torch.Tensor | None = None
) -> torch.Tensor:
    """Rank value of every masked position, higher is revealed earlier.

    Args:
        kind: "probability" of the drawn token (LLaDA), "margin" between the two most likely tokens,
            "neg_entropy" (Dream), or "random" (then `random` holds the values).
        logprobs: [N, V].
        tokens: int64 [N].

    Returns:
        float64 [N]; probability and margin lie in [0, 1].
    """
    if kind == "random":
        assert random is not None
        return random
    if kind == "probability":
        return logprobs.gather(-1, tokens[:, None]).squeeze(-1).double().exp()
    probs = logprobs.double().exp()
    if kind == "margin":
        top = probs.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
    if kind == "neg_entropy":
        return torch.special.xlogy(probs, probs).sum(-1)
    raise ValueError(f"sampler.score {kind!r} is unknown")


def select_positions(
    kind: str,
    scores: torch.Tensor,
    eligible: torch.Tensor,
    quota: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """Which positions to reveal now.

    Eligibility is a mask of its own, never a special score: a saturated score of exactly 1.0 or a
    score of 0.0 cannot make a prompt token or a later block look revealable.

    Args:
        kind: "top_n", "threshold", "dynamic" or "left_most" (see `SamplerOptions.selector`).
        scores: float64 [B, L].
        eligible: bool [B, L].
        quota: int64 [B].
        threshold: the score to exceed.

    Returns:
        bool [B, L], at least one position for every row that has an eligible one and a quota.
    """
    if kind == "left_most":
        return eligible & (eligible.long().cumsum(-1) <= quota[:, None])
    ranked = scores.masked_fill(~eligible, -torch.inf)
    # Two stable sorts turn scores into ranks; equal scores keep their left-to-right order.
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    best = eligible & (rank < quota[:, None])
    if kind == "top_n":
        return best
    above = eligible & (scores > threshold)
    if kind == "threshold":
        return above | (eligible & (rank == 0))
    if kind == "dynamic":
        enough = above.sum(-1) >= quota
        return torch.where(enough[:, None], above, best)
    raise ValueError(f"sampler.selector {kind!r} is unknown")
