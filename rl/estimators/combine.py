"""Decisions that are read in several places: one log-prob from many token log-probs.

A likelihood bound reads each token in several masked copies; a sequence-level method makes one decision of a whole
answer. Both combine the N reads of `TokenRows` into U decisions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from rl.estimators.base import Rows, Scores
from rl.estimators.rows import TokenRows


@dataclass(kw_only=True)
class CombinedRows(Rows):
    """U decisions, each a weighted sum over reads; its entropy is the mean over them.

    Example: the answer "7 8" scored in two copies, the first hiding both tokens, the second the 8 alone. One decision
    per answer, with the token log-probs averaged over the copies that hide them::

        CombinedRows(rows=rows, part=tensor([0, 0, 0]), weight=tensor([1, 1/2, 1/2]),
                     trajectory=tensor([0]), step=tensor([0]))   # reads: 7 in copy 0, 8 in copy 0, 8 in copy 1

    Attributes:
        rows: the reads, in any order.
        part: int64 [N], the decision that each read is part of.
        weight: float64 [N], its factor there.
    """

    rows: TokenRows
    part: torch.Tensor
    weight: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.rows.num_rows

    @property
    def num_tokens(self) -> int:
        return self.rows.num_tokens

    def distinct(self) -> Self:
        return replace(self, rows=self.rows.distinct())

    def score(self, model: Any) -> Scores:
        return self.combine(self.rows.score(model))

    def combine(self, reads: Scores) -> Scores:
        """[N] reads -> [U] decisions, differentiable."""
        zeros = reads.logprob.new_zeros(len(self.trajectory))
        total = zeros.index_add(0, self.part, self.weight.to(zeros.dtype) * reads.logprob)
        entropy = zeros.index_add(0, self.part, reads.entropy)
        count = zeros.index_add(0, self.part, torch.ones_like(reads.entropy))
        return Scores(total, entropy / count.clamp(min=1))


def whole_trajectories(rows: TokenRows, count: int) -> CombinedRows:
    """One decision per trajectory: the log-prob of everything that is read of it, the sampler's likewise."""
    total = None
    if rows.sampler_logprob is not None:
        total = torch.zeros(count, dtype=torch.float64).index_add(0, rows.trajectory, rows.sampler_logprob)
    index = torch.arange(count)
    ones = torch.ones(len(rows.trajectory), dtype=torch.float64)
    return CombinedRows(
        rows=rows, part=rows.trajectory, weight=ones, trajectory=index, step=0 * index, sampler_logprob=total
    )


def step_means(rows: TokenRows) -> CombinedRows:
    """One decision per trajectory and step: the mean log-prob of what is read there, the sampler's likewise."""
    found, part = torch.unique(torch.stack([rows.trajectory, rows.step], dim=1), dim=0, return_inverse=True)
    weight, total = 1.0 / part.bincount()[part].double(), None
    if rows.sampler_logprob is not None:
        total = torch.zeros(len(found), dtype=torch.float64).index_add(0, part, weight * rows.sampler_logprob)
    return CombinedRows(
        rows=rows, part=part, weight=weight, trajectory=found[:, 0], step=found[:, 1], sampler_logprob=total
    )


@dataclass(kw_only=True)
class SandwichRows(CombinedRows):
    """Two decisions per answer: first the lower bounds of all answers (step 0), then the upper ones (step 1).

    Lower bounds are weighted sums of reads. An upper bound is the sum over the answer's tokens of
    scale * (1/b) log sum over the token's reads of token_weight p^b.

    Attributes:
        power: b.
        token: int64 [N], the token that is read, 0..A-1.
        token_weight: float64 [N].
        answer: int64 [A], the answer of each token.
        scale: float64 [A].
    """

    power: float
    token: torch.Tensor
    token_weight: torch.Tensor
    answer: torch.Tensor
    scale: torch.Tensor

    def combine(self, reads: Scores) -> Scores:
        lower = super().combine(reads)
        value = log_mean_exp(reads.logprob, self.token, self.token_weight, self.power, len(self.answer))
        count = len(self.trajectory) // 2
        both = lower.logprob.index_add(0, count + self.answer, self.scale.to(value.dtype) * value)
        return Scores(both, lower.entropy[:count].repeat(2))


def log_mean_exp(
    logprob: torch.Tensor, term: torch.Tensor, weight: torch.Tensor, power: float, num_terms: int
) -> torch.Tensor:
    """[A]: (1/b) log sum over the reads n of term a of weight_n exp(b logprob_n), stable for small probabilities.

    Every term must have a read.
    """
    scaled = power * logprob + weight.to(logprob.dtype).log()
    low = torch.full((num_terms,), -torch.inf, dtype=logprob.dtype, device=logprob.device)
    top = low.scatter_reduce(0, term, scaled.detach(), "amax")
    return (torch.zeros_like(low).index_add(0, term, (scaled - top[term]).exp()).log() + top) / power


def per_token(rows: TokenRows, weight: torch.Tensor) -> CombinedRows:
    """One decision per (trajectory, position) that is read: the weighted sum of its reads."""
    position = rows.position_ids[rows.row, rows.column]
    found, part = torch.unique(torch.stack([rows.trajectory, position], dim=1), dim=0, return_inverse=True)
    step = torch.zeros_like(found[:, 0])
    return CombinedRows(rows=rows, part=part, weight=weight, trajectory=found[:, 0], step=step)
