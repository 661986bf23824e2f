"""Decisions that are read in several places: one log-prob from many token log-probs.

A token estimator reads every decision once. A likelihood bound reads each token in several masked copies, and a
sequence-level method makes one decision of a whole answer. Both are this record: `TokenRows` whose N reads
are combined into U decisions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from rl.estimators.base import Scores
from rl.estimators.rows import TokenRows


@dataclass
class CombinedRows:
    """U decisions, each a weighted sum over reads, or over log-mean-exps of reads; a `rl.estimators.base.Rows`.

    Example: the answer "7 8" scored in two copies, the first hiding both tokens, the second the 8 alone. As one
    decision per answer, with the token log-probs averaged over the copies that hide them::

        CombinedRows(rows, part=tensor([0, 0, 0]), weight=tensor([1, 1/2, 1/2]),
                     trajectory=tensor([0]), step=tensor([0]))   # reads: 7 in copy 0, 8 in copy 0, 8 in copy 1

    Attributes:
        rows: the reads, in any order.
        part: int64 [N], decision that each read is part of; -1 when it is part of none.
        weight: float64 [N], its factor.
        trajectory, step, sampler_logprob, weight_factor: see `Rows`.
        power: b of the log-mean-exps below.
        term: int64 [N] or None, the log-mean-exp each read belongs to: term a has the value
            (1/b) log sum over its reads of term_weight p^b.
        term_weight: float64 [N].
        term_part: int64 [A], the decision each term is added to.
        term_scale: float64 [A], times this.
    """

    rows: TokenRows
    part: torch.Tensor
    weight: torch.Tensor
    trajectory: torch.Tensor
    step: torch.Tensor
    power: float = 1.0
    term: torch.Tensor | None = None
    term_weight: torch.Tensor | None = None
    term_part: torch.Tensor | None = None
    term_scale: torch.Tensor | None = None

    # No sampler made these decisions, so there is no log-prob of its to compare with.
    sampler_logprob: torch.Tensor | None = None
    weight_factor: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.rows.num_rows

    @property
    def num_tokens(self) -> int:
        return self.rows.num_tokens

    def to(self, device: torch.device | str) -> CombinedRows:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, rows=self.rows.to(device), **moved)

    def distinct(self) -> CombinedRows:
        return replace(self, rows=self.rows.distinct())

    def score(self, model: Any) -> Scores:
        """The entropy of a decision is the mean over its reads."""
        reads = self.rows.score(model)
        return self.combine(reads.logprob, reads.entropy)

    def combine(self, logprob: torch.Tensor, entropy: torch.Tensor) -> Scores:
        """[N] reads -> [U] decisions, differentiable."""
        zeros = torch.zeros(len(self.trajectory), dtype=logprob.dtype, device=logprob.device)
        linear = self.part >= 0
        part, weight = self.part[linear], self.weight[linear].to(logprob.dtype)
        total = zeros.index_add(0, part, weight * logprob[linear])
        spread = zeros.index_add(0, part, entropy[linear])
        count = zeros.index_add(0, part, torch.ones_like(weight))
        if self.term is not None:
            assert self.term_weight is not None and self.term_part is not None and self.term_scale is not None
            value = log_mean_exp(logprob, self.term, self.term_weight, self.power, len(self.term_part))
            total = total.index_add(0, self.term_part, self.term_scale.to(value.dtype) * value)
            owner = self.term_part[self.term]
            spread = spread.index_add(0, owner, entropy)
            count = count.index_add(0, owner, torch.ones_like(entropy))
        return Scores(total, spread / count.clamp(min=1))


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
    pairs = torch.stack([rows.trajectory, position], dim=1)
    found, part = torch.unique(pairs, dim=0, return_inverse=True)
    return CombinedRows(rows, part, weight, found[:, 0], torch.zeros_like(found[:, 0]))


def per_trajectory(rows: TokenRows, weight: torch.Tensor, count: int) -> CombinedRows:
    """One decision for each of `count` trajectories: the weighted sum of all its reads."""
    index = torch.arange(count)
    return CombinedRows(rows, rows.trajectory, weight, index, torch.zeros_like(index))
