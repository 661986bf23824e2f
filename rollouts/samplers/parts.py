"""The parts a decoder is assembled from: quota, score, selector. Pure functions on tensors."""

from __future__ import annotations

import math

import torch

# Dream's last time before 0; the last step itself always reveals everything.
_EPS = 1e-3


def even_quota(num_masked: torch.Tensor, num_steps: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Positions to reveal at `step` when `num_masked` are spread evenly, the remainder first (LLaDA).

    Args:
        num_masked: int64 [B], masked positions when the block began.
        num_steps: int64 [B], steps of the block.
        step: int64 [B], step inside the block.
    """
    return num_masked // num_steps + (step < num_masked % num_steps).long()


def step_quota(
    kind: str,
    num_masked: torch.Tensor,
    left: torch.Tensor,
    num_steps: torch.Tensor,
    step: torch.Tensor,
    block: torch.Tensor,
) -> torch.Tensor:
    """int64 [B]: positions to reveal at `step`. The last step reveals all that is left.

    Example: a block of 8 whose first 5 positions are the prompt's, so that 3 are masked, and 4 steps: "even" reveals
    1, 1, 1 (it takes no more steps than there are masks); "block" reveals 2, 1.

    Args:
        kind: "even" (see `even_quota`); "block" (SDAR: the block's length spread evenly, whatever the prompt takes of
            it); "linear" (MDPO: num_masked (1 - x) are left after the share x of the steps, rounded down); "cosine"
            (MaskGIT, Chang et al. 2022: about num_masked cos(pi/2 x) are left, and at least one is revealed at each
            step); "dream" (the share 1 - s/t of what is left, rounded down); "doubling" (1, 2, 4, ..., the ascending
            step sizes of CJ-GRPO).
        num_masked, num_steps, step: see `even_quota`; where time counts (`SamplerOptions.follows_time`) num_steps may
            exceed num_masked, and a step may reveal nothing.
        left: int64 [B], positions that are masked now.
        block: int64 [B], length of the block, with what the prompt takes of it.
    """
    if kind == "even":
        return even_quota(num_masked, num_steps, step)
    last = step >= num_steps - 1
    if kind == "cosine":
        before, after = (_cosine_left(num_masked, num_steps, done) for done in (step, step + 1))
        quota = before - after
    elif kind == "block":
        quota = even_quota(block, num_steps, step).minimum(left)
    elif kind == "linear":
        before, after = (num_masked * (num_steps - done) // num_steps for done in (step, step + 1))
        quota = before - after
    elif kind == "dream":
        t, s = times(num_steps, step)
        quota = (left * (1 - s / t)).long()
    elif kind == "doubling":
        quota = (2 ** step.clamp(max=62)).minimum(left)
    else:
        raise ValueError(f"sampler.quota {kind!r} is unknown")
    return torch.where(last, left, quota)


def _cosine_left(num_masked: torch.Tensor, num_steps: torch.Tensor, done: torch.Tensor) -> torch.Tensor:
    """Masks left after `done` steps. The cosine is flat at first: a step reveals one position at least."""
    curve = (num_masked * torch.cos(math.pi / 2 * done.double() / num_steps)).floor().long()
    return curve.minimum(num_masked - done)


def times(num_steps: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [B]: the mask probabilities t before and s after a step, on Dream's grid from 1 to 1e-3, then 0."""
    t, s = (1 - (1 - _EPS) * i.double() / num_steps for i in (step, step + 1))
    return t, torch.where(step >= num_steps - 1, 0.0, s)


def position_scores(
    kind: str, logprobs: torch.Tensor, tokens: torch.Tensor, random: torch.Tensor | None = None
) -> torch.Tensor:
    """Rank value of every masked position, higher is revealed earlier.

    Args:
        kind: "probability" of the drawn token (LLaDA), "max_probability" of the most likely one, "margin" between
            the two most likely tokens, "neg_entropy" (Dream), or "random" (then `random` holds the values).
        logprobs: [N, V].
        tokens: int64 [N].

    Returns:
        float64 [N]; probabilities and margin lie in [0, 1].
    """
    if kind == "random":
        assert random is not None
        return random
    if kind == "probability":
        return logprobs.gather(-1, tokens[:, None]).squeeze(-1).double().exp()
    if kind == "max_probability":
        return logprobs.amax(-1).double().exp()
    probs = logprobs.double().exp()
    if kind == "margin":
        top = probs.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
    if kind == "neg_entropy":
        return torch.special.xlogy(probs, probs).sum(-1)
    raise ValueError(f"sampler.score {kind!r} is unknown")


def ramp(first: float, num_steps: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """float64 [B]: `first` at step 0, rising linearly to 1 at the last step (EOSER, arXiv 2509.23924)."""
    share = step.double() / (num_steps - 1).clamp(min=1)
    return first + (1 - first) * torch.where(num_steps > 1, share, 1.0).clamp(max=1)


def perturbed(scores: torch.Tensor, temperature: float, u: torch.Tensor) -> torch.Tensor:
    """Scores whose n largest are n draws without replacement from softmax(scores / temperature) (Gumbel top-n)."""
    return scores / temperature - torch.log(-torch.log(u))


def ranks(scores: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    """int64 [B, L]: place of each position among the eligible ones, 0 is the highest score; the others follow.

    Two stable sorts: equal scores keep their left-to-right order.
    """
    # -inf is not the test of eligibility, it only sends the others to the end: callers mask with `eligible` again.
    order = scores.masked_fill(~eligible, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)


def consistent_positions(
    scores: torch.Tensor,
    eligible: torch.Tensor,
    quota: torch.Tensor,
    likely: torch.Tensor,
    before: torch.Tensor,
    memory: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose prediction did not change from the step before to this one (CCD-DS, arXiv 2512.02044).

    A step remembers the most likely tokens of its `memory` best positions that stay masked. The next step reveals all
    of its own `memory` best positions that were remembered with the same token. Where these are fewer than the quota,
    or none of the quota's best positions was remembered, it reveals the quota's best.

    Example: memory 2, quota 1. The step before remembered b at 4 and c at 7. The best two positions are 7 with c and 4
    with b: both are revealed. With 7 and 5 only 7 is; with 5 and 7 the best is new, and 5 alone is revealed.

    Args:
        likely: float64 [B, L], the most likely token at every eligible position.
        before: float64 [B, L], what the step before remembered, negative elsewhere.

    Returns:
        bool [B, L], what is revealed, and float64 [B, L], what this step remembers.
    """
    rank = ranks(scores, eligible)
    first, second = eligible & (rank < quota[:, None]), eligible & (rank < memory)
    same = second & (before == likely)
    agreed = (same.sum(-1) >= quota) & (first & (before >= 0)).any(-1)
    chosen = torch.where(agreed[:, None], same, first)
    left = eligible & ~chosen
    return chosen, torch.where(left & (ranks(scores, left) < memory), likely, -1.0)


def select_positions(
    kind: str,
    scores: torch.Tensor,
    eligible: torch.Tensor,
    quota: torch.Tensor,
    bound: float | torch.Tensor,
) -> torch.Tensor:
    """Which positions to reveal now.

    Eligibility is a mask of its own, never a special score: a saturated score of exactly 1.0 or a
    score of 0.0 cannot make a prompt token or a later block look revealable.

    Args:
        kind: "top_n", "threshold", "dynamic", "left_most", "factor", "entropy_bound" or "entropy_sum"
            (see `SamplerOptions.selector`).
        scores: float64 [B, L].
        eligible: bool [B, L].
        quota: int64 [B].
        bound: the score to exceed, the factor, or the entropy in nats; or float64 [B, 1], of each row.

    Returns:
        bool [B, L], at least one position for every row that has an eligible one and a quota.
    """
    if kind == "left_most":
        return eligible & (eligible.long().cumsum(-1) <= quota[:, None])
    rank = ranks(scores, eligible)
    if kind == "top_n":
        return eligible & (rank < quota[:, None])
    above = eligible & (scores > bound)
    if kind == "threshold":
        return above | (eligible & (rank == 0))
    if kind == "dynamic":
        enough = above.sum(-1) >= quota
        return torch.where(enough[:, None], above, eligible & (rank < quota[:, None]))
    if kind == "factor":
        # The left side grows with the rank, so what passes is a prefix.
        return eligible & (((rank + 2) * (1 - scores) < bound) | (rank == 0))
    if kind in ("entropy_bound", "entropy_sum"):
        entropy = torch.where(eligible, -scores, 0.0)
        total = torch.zeros_like(entropy).scatter(-1, rank, entropy).cumsum(-1).gather(-1, rank)
        # The largest entropy of a prefix is its last: without it the sum is that of the positions before.
        fits = total - entropy <= bound if kind == "entropy_bound" else total < bound
        return eligible & (fits | (rank == 0))
    raise ValueError(f"sampler.selector {kind!r} is unknown")
