"""The preference loss of direct preference optimisation on pairs of decisions."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from rl.batch import DecisionBatch, LossOutput


def preference_loss(batch: DecisionBatch, beta: float) -> LossOutput:
    """-log sigmoid(beta (s_w - s_l)) with s = logprob - ref_logprob (DPO, Rafailov et al. 2023, arXiv 2305.18290).

    Decisions 2i and 2i + 1 are a pair, of which the one with advantage 1 is preferred. Both get the pair's loss, so
    weights that add up to 1 give the mean over pairs. Example: scores 0.3 and -0.1, the first preferred, beta 1:
    -log sigmoid(0.4) for both.

    Returns:
        per-decision loss and metrics `margin` (beta (s_w - s_l)), `preferred` (1 where it is above 0), `logprob`.
    """
    assert batch.ref_logprob is not None, "a preference is held against a reference"
    whole = len(batch.advantage) // 2 * 2
    assert not batch.advantage[:whole].view(-1, 2).sum(1).any(), "decisions of a pair are not side by side"
    score = (batch.logprob - batch.ref_logprob) * batch.advantage.sign()
    if len(score) % 2:
        # Something that a rank runs because others have more pairs; its weight is 0.
        score = torch.cat([score, score.new_zeros(1)])
    margin = beta * score.view(-1, 2).sum(1).repeat_interleave(2)[: len(batch.logprob)]
    metrics = {"margin": margin, "preferred": (margin > 0).to(margin.dtype), "logprob": batch.logprob}
    return LossOutput(-logsigmoid(margin), {name: value.detach() for name, value in metrics.items()})
