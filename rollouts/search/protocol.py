"""The sampler and the reward as a search sees them, and the base class of searches. No modality is named here.

A search never looks inside a sample. It holds a batch of `States` (half-denoised samples), lets a `SearchSampler`
move them, and has finished ones judged. Everything random is a function of int64 seeds, so that the result for one
request does not depend on which others were searched with it.

Legend: M requests (independent searches), B states, k candidates per state, S samples that come out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from rollouts.samplers import noise


class States(Protocol):
    """B states, each with the noise its further steps will use. Immutable: every operation returns new ones.

    Attributes:
        row: int64 [B], which of the sampler's conditionings (prompts) a state belongs to.
        done: bool [B], nothing is left to denoise.
    """

    row: np.ndarray
    done: np.ndarray

    def __len__(self) -> int: ...

    def select(self, index: np.ndarray) -> Self:
        """The states at these indices, in this order; an index may repeat."""
        ...


@dataclass(frozen=True)
class ArrayStates:
    """`States` whose every field is an array with a row per state.

    Attributes:
        row: int64 [B], see `States`.
        at: int64 [B], steps taken.
        seed: int64 [B], of the noise ahead.
        logprob: float64 [B, T], of the steps taken.
    """

    row: np.ndarray
    at: np.ndarray
    seed: np.ndarray
    logprob: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    @property
    def done(self) -> np.ndarray:
        return self.at == self.logprob.shape[1]

    def select(self, index: np.ndarray) -> Self:
        return type(self)(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})


class SearchSampler(Protocol):
    """A diffusion sampler that can be stopped, branched, looked ahead of, noised again and resumed anywhere.

    Every denoiser evaluation (one state through the network once) is counted in `budget`. A finished state costs
    nothing in any method, and comes back unchanged.

    Attributes:
        budget: where the work is counted.
        random_start: whether two starts differ (Gaussian latents do, a masked canvas does not).
    """

    budget: Budget
    random_start: bool

    def start(self, row: np.ndarray, seed: np.ndarray) -> Any:
        """Initial states of the conditionings `row` [B] with the noise of `seed` [B]."""
        ...

    def join(self, parts: Sequence[Any]) -> Any:
        """Several batches of states as one."""
        ...

    def keys(self, states: Any) -> Sequence[Any]:
        """For every state something hashable that equal states share, None where no two states are ever equal."""
        ...

    def step(self, states: Any) -> Any:
        """One denoising step under the states' own noise."""
        ...

    def candidates(self, states: Any, seed: np.ndarray) -> Any:
        """k draws of the next state under fresh noise `seed` [B, k]: one denoiser evaluation for all k.

        Returns:
            B * k states, the candidates of a state together.
        """
        ...

    def x0_hat(self, states: Any) -> Any:
        """Finished states: the most likely end of each under the model's prediction at this state."""
        ...

    def renoise(self, states: Any, num_steps: int, seed: np.ndarray) -> Any:
        """The forward process over `num_steps` steps (re-masking, added noise), with new noise `seed` [B]."""
        ...

    def reseed(self, states: Any, seed: np.ndarray) -> Any:
        """The same states with the noise of `seed` [B] ahead of them."""
        ...

    def perturb(self, states: Any, share: float, seed: np.ndarray) -> Any:
        """The same states with a share of their noise redrawn from `seed` [B]: neighbours in noise space."""
        ...

    def trajectories(self, states: Any) -> list[Any]:
        """The record of every finished state, which can be trained on.

        Its log-probs are the policy's own: that a search chose it among others is not in them.
        """
        ...


class GuidedSampler(SearchSampler, Protocol):
    """A sampler whose step can follow the gradient of a reward."""

    def guided_step(
        self, states: Any, gradient: Callable[[torch.Tensor, Any], torch.Tensor], scale: float
    ) -> tuple[Any, np.ndarray]:
        """One step of the proposal q, tilted by `scale` times the reward's gradient at the predicted sample.

        Args:
            gradient: (prediction, states) -> d reward / d prediction, both of the prediction's shape.

        Returns:
            next states, and log p - log q of the step, float64 [B].
        """
        ...


# A batch of finished states -> one number each; NaN where there is no verdict.
Reward = Callable[[Any], Sequence[float] | np.ndarray]
# (predicted samples with gradient, their states) -> [B], differentiable in the first argument.
SoftReward = Callable[[torch.Tensor, Any], torch.Tensor]


@dataclass
class Budget:
    """Cost of a search.

    Example: best of 8 with 4 denoising steps, one request: `Budget(denoiser_evaluations=32, reward_evaluations=8)`.

    Attributes:
        denoiser_evaluations: forwards of one state through the network.
        reward_evaluations: samples judged; the gradient of a reward counts as one more.
        unscored: verdicts that did not come. Such a sample is never preferred to one that has a reward.
    """

    denoiser_evaluations: int = 0
    reward_evaluations: int = 0
    unscored: int = 0


@dataclass
class SearchProblem:
    """A sampler, and the reward that its samples should have."""

    sampler: Any
    reward: Reward
    soft_reward: SoftReward | None = None

    @property
    def budget(self) -> Budget:
        return self.sampler.budget

    def judge(self, states: States) -> np.ndarray:
        """Rewards of finished states, float64 [B]; -inf without a verdict."""
        if not len(states):
            return np.zeros(0)
        assert bool(np.all(states.done))
        reward = np.asarray(self.reward(states), dtype=np.float64)
        assert reward.shape == (len(states),), "a reward gives one number per state"
        missing = np.isnan(reward)
        self.budget.reward_evaluations += len(states)
        self.budget.unscored += int(missing.sum())
        return np.where(missing, -np.inf, reward)

    def gradient(self, prediction: torch.Tensor, states: States) -> torch.Tensor:
        """d reward / d prediction, taken at the predicted samples themselves (probabilities, not their logarithms).

        Raises:
            ValueError: the reward has no gradient.
        """
        if self.soft_reward is None:
            raise ValueError("guidance needs a differentiable reward: this one takes finished samples only")
        self.budget.reward_evaluations += len(states)
        with torch.enable_grad():
            leaf = prediction.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.soft_reward(leaf, states).sum(), leaf)
        return gradient

    def finish(self, states: Any) -> Any:
        """Denoise to the end under the states' own noise."""
        while not np.all(states.done):
            states = self.sampler.step(states)
        return states


@dataclass
class SearchResult:
    """S finished samples.

    Attributes:
        states: the sampler's states; `sampler.trajectories(states)` gives their records.
        request: int64 [S], which request each belongs to, ascending.
        reward: float64 [S], NaN without a verdict.
        budget: the cost of all requests.
        weight: float64 [S], weights that sum to 1 within a request; None when all count the same.
        log_z: float64 [M], the estimate of log E_p exp(reward / alpha), where the search makes one.
    """

    states: Any
    request: np.ndarray
    reward: np.ndarray
    budget: Budget
    weight: np.ndarray | None = None
    log_z: np.ndarray | None = None

    def __post_init__(self) -> None:
        # Inside a search a missing verdict is -inf, so that comparisons work.
        self.reward = np.where(np.isneginf(self.reward), np.nan, self.reward)


class Search(BaseModel):
    """A search: its options are its fields, and `run` does it. A new one is a subclass in a file of its own.

    Attributes:
        guided: it takes the gradient of a reward (`SearchProblem.gradient`).
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)
    guided: ClassVar[bool] = False

    def run(self, problem: SearchProblem, row: np.ndarray, seed: np.ndarray) -> SearchResult:
        """M searches.

        Args:
            row: int64 [M], conditioning of the sampler for each request.
            seed: int64 [M], everything random about a request.
        """
        raise NotImplementedError


def split(seed: np.ndarray, *path: int) -> np.ndarray:
    """int64 of the shape of `seed`: independent new seeds, one for every path of counters below it."""
    mixed = torch.from_numpy(np.ascontiguousarray(seed, dtype=np.int64))
    for counter in path:
        mixed = noise.split(mixed, torch.tensor(counter))
    return mixed.numpy()


def fan(seed: np.ndarray, count: int) -> np.ndarray:
    """int64 [B, count]: `count` new seeds below every one."""
    return noise.split(torch.from_numpy(np.ascontiguousarray(seed))[:, None], torch.arange(count)).numpy()


def uniform(seed: np.ndarray, step: int) -> np.ndarray:
    """float64 in (0, 1) of the shape of `seed`, for the choices of a search."""
    zero = torch.tensor(0)
    return noise.uniform(torch.from_numpy(np.ascontiguousarray(seed)), zero + step, zero, noise.CHOICE_STREAM).numpy()
