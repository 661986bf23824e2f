"""What an estimator hands to the learner: something to forward, and the decisions it scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class Scores(NamedTuple):
    """The numbers of U decisions under one model's weights, all with gradient.

    A named tuple, because DeepSpeed's ZeRO 3 looks for the tensors of a forward in tuples and not in other records.

    Attributes:
        logprob: [U].
        entropy: [U], of the distribution that was drawn from, nats.
        kl: [U], exact KL to another policy, where the estimator knows it.
        value: [U], expected outcome, of a policy that carries a value head.
        negative: [U], as `logprob`, of the prediction that DiffusionNFT moves away from.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor | None = None
    value: torch.Tensor | None = None
    negative: torch.Tensor | None = None


class Rows(Protocol):
    """Inputs of some forwards, and U decisions read off them.

    A decision is what a ratio, a clip and an advantage apply to: a revealed token of a trace, a whole response
    of a sequence-level estimator, one denoising step of a Gaussian sampler.

    Attributes:
        trajectory: int64 [U], index of the decision's trajectory among those given, in order.
        step: int64 [U], its (merged) denoising step within the trajectory.
        sampler_logprob: float64 [U], the sampler's log-prob of the very decision, None where the estimator scores
            something that the sampler did not.
        weight_factor: float64 [U], factor on the decision's weight in the loss, None for 1.
    """

    trajectory: torch.Tensor
    step: torch.Tensor
    sampler_logprob: torch.Tensor | None
    weight_factor: torch.Tensor | None

    @property
    def num_rows(self) -> int:
        """Sequences (or latents) forwarded."""
        ...

    @property
    def num_tokens(self) -> int: ...

    def to(self, device: torch.device | str) -> Rows: ...

    def distinct(self) -> Rows:
        """The same decisions with equal inputs forwarded once, where that can happen."""
        ...

    def score(self, model: Any) -> Scores:
        """The numbers of every decision under the model's weights."""
        ...


@dataclass
class Verdicts:
    """What an advantage is computed from; M rollouts of all ranks.

    Attributes:
        reward: float64 [M], NaN where there is no score.
        group: int64 [M], index of the prompt.
        steps: float64 [M, T], the reward of every step's full fill, NaN behind a trajectory's last step; None when the
            recipe did not ask for it (`Recipe.needs_step_rewards`).
        summaries: [M], what `Recipe.summary` says of each trajectory; empty without it.
        log_ratio: float64 [M], sum over a trajectory's decisions of sampler log-prob - reference log-prob; its mean is
            the KL along the path. None when the recipe did not ask for it (`Recipe.needs_log_ratio`).
        rl_step: index of the RL step they were sampled in.
        memory: what the recipe remembers of earlier steps (`Recipe.memory`).
    """

    reward: torch.Tensor
    group: torch.Tensor
    steps: torch.Tensor | None = None
    summaries: Sequence[Any] = ()
    log_ratio: torch.Tensor | None = None
    rl_step: int = 0
    memory: Any = None
