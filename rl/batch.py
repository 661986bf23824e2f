"""The input and output of a loss, flat over decisions.

Shape legend: N decisions of a micro-batch (see `rl.estimators.base.Rows`), M trajectories of the whole update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

# For annotations in modules that are imported without torch.
Tensor: TypeAlias = "torch.Tensor"


@dataclass
class DecisionBatch:
    """The decisions of some trajectories, scored under today's weights.

    Example: two trajectories, the first revealed two tokens and was right, the second one and was wrong::

        DecisionBatch(
            logprob=tensor([-0.5, -0.1, -2.0], requires_grad=True), entropy=tensor([0.9, 0.3, 1.2]),
            old_logprob=tensor([-0.5, -0.1, -2.0]), ref_logprob=None,
            advantage=tensor([0.5, 0.5, -0.5]), weight=tensor([1/3, 1/3, 1/3]),
            trajectory=tensor([0, 0, 1]), step=tensor([0, 1, 0]),
        )

    Attributes:
        logprob: [N], with gradient, log pi_theta(token | recorded state) under the sampling distribution.
        entropy: [N], with gradient, entropy of that distribution, nats.
        old_logprob: [N], no gradient, the denominator of the ratio.
        ref_logprob: [N] under a frozen reference, or None when no reference is kept.
        advantage: [N], no gradient.
        weight: [N], share of each decision in the loss of the whole update. Weights are made once per
            update over all micro-batches and ranks (`losses/aggregate.py`), so sums simply add up.
        trajectory: int64 [N], index of its trajectory in this micro-batch, or None.
        step: int64 [N], its denoising step, or None.
        kl, negative: [N], with gradient, see `rl.estimators.base.Scores`.
        reward: [N], no gradient, of its trajectory; None unless the recipe asks for it (`Recipe.needs_reward`).
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    old_logprob: torch.Tensor
    ref_logprob: torch.Tensor | None
    advantage: torch.Tensor
    weight: torch.Tensor
    trajectory: torch.Tensor | None = None
    step: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    negative: torch.Tensor | None = None
    reward: torch.Tensor | None = None

    def check(self) -> None:
        for name, value in vars(self).items():
            assert value is None or value.shape == self.logprob.shape, f"{name} has shape {value.shape}"


@dataclass
class LossOutput:
    """A loss before aggregation.

    Attributes:
        loss: [N], per decision, with gradient.
        metrics: name -> [N] per decision, no gradient; logged as means over all decisions.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
