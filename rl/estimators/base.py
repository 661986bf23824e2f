"""The records between an estimator, the learner and an advantage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    import torch


class Scores(NamedTuple):
    """The numbers of U decisions under one model's weights, all with gradient.

    A named tuple, because DeepSpeed's ZeRO 3 looks for the tensors of a forward in tuples and not in other records.

    Attributes:
        logprob: [U].
        entropy: [U], of the distribution that was drawn from, nats.
        kl: [U], exact KL to the anchor, where the estimator knows it.
        value: [U], expected outcome, of a policy that carries a value head.
        negative: [U], like `logprob`, for the prediction that DiffusionNFT moves away from.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor | None = None
    value: torch.Tensor | None = None
    negative: torch.Tensor | None = None


@dataclass(kw_only=True)
class Rows:
    """Inputs of some forwards, and the U decisions that are read off them. Every estimator returns a subclass.

    A decision is the thing that a ratio, a clip and an advantage apply to. Examples: a revealed token of a trace, a
    whole response, one denoising step of a Gaussian sampler.

    Attributes:
        trajectory: int64 [U], index of the decision's trajectory among those given, in order.
        step: int64 [U], its (merged) denoising step within the trajectory.
        sampler_logprob: float64 [U], the sampler's log-prob of the same decision, None where the estimator scores
            something that the sampler did not.
        weight_factor: float64 [U], multiplies the decision's weight in the loss, None for 1.
    """

    trajectory: torch.Tensor
    step: torch.Tensor
    sampler_logprob: torch.Tensor | None = None
    weight_factor: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Sequences (or latents) that are forwarded."""
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{name: _moved(value, device) for name, value in vars(self).items()})

    def distinct(self) -> Self:
        """The same decisions with equal inputs forwarded once, where that can happen."""
        return self

    def set_anchor(self, model: Any) -> None:
        """Keep what `score` needs of another policy; asked of an estimator whose recipe names one (`Recipe.anchor`)."""
        raise NotImplementedError

    def set_reference(self, model: Any) -> None:
        """Keep what `score` needs of the frozen reference, where the recipe's anchor is the old policy."""
        raise NotImplementedError

    def score(self, model: Any) -> Scores:
        """The numbers of every decision under the model's weights."""
        raise NotImplementedError


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    return value.to(device) if hasattr(value, "to") else value


@dataclass
class Verdicts:
    """The input of an advantage: M rollouts of all ranks.

    Attributes:
        reward: float64 [M], NaN where there is no score.
        group: int64 [M], index of the prompt.
        steps: float64 [M, T], the reward of every step's x0 prediction, NaN behind a trajectory's last step; None
            when the recipe did not ask for it (`Recipe.needs_step_rewards`).
        summaries: [M], `Recipe.summary` of each trajectory.
        log_ratio: float64 [M], sum over a trajectory's decisions of sampler log-prob - reference log-prob; its mean is
            the KL along the path. None when the recipe did not ask for it (`Recipe.needs_log_ratio`).
        rl_step: index of the RL step they were sampled in.
        memory: the recipe's memory of earlier steps (`Recipe.memory`).
    """

    reward: torch.Tensor
    group: torch.Tensor
    steps: torch.Tensor | None = None
    summaries: Sequence[Any] = ()
    log_ratio: torch.Tensor | None = None
    rl_step: int = 0
    memory: Any = None
