"""What samples with a gradient gives: rollouts in segments that are back-propagated one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rl.tasks.base import Example

# Inputs with `score(model)` -> what they score, under one model's weights.
Forward = Callable[[Any], Any]


@dataclass
class GradientSegment:
    """A part of the rollouts of B rows, ready to be back-propagated.

    Attributes:
        kl: [B], this part's share of the path KL to the reference, with gradient.
        reward: [B], with gradient; None in every segment but the last.
        completions: what rewards and people see; empty in every segment but the last.
        metrics: name -> mean over the rows.
        forwards: times all rows went, or will go in the backward pass, through policy or reference.
        tokens: positions of all rows in one of these forwards.
    """

    kl: torch.Tensor
    forwards: int
    tokens: int
    reward: torch.Tensor | None = None
    completions: Sequence[Any] = ()
    metrics: dict[str, float] = field(default_factory=dict)


class GradientSampler(Protocol):
    """What samples with a gradient. A modality and its relaxation write one.

    Attributes:
        num_segments: segments of every rollout.
    """

    num_segments: int

    def segments(
        self, policy: Forward, reference: Forward | None, rows: Sequence[Example], seeds: list[int]
    ) -> Iterator[GradientSegment]:
        """Sample one rollout per row.

        Args:
            policy: runs the learner.
            reference: the same through the frozen policy, None without a KL term.
            seeds: one per row; with the weights they determine the rollout.
        """
        ...
