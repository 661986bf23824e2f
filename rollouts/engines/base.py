"""What the training loop may ask of whatever samples: the model of this process, workers elsewhere, a server.

An engine says what its trajectories carry (`Capabilities`) before it is asked for any, and a recipe that needs more is
refused (`require`). Weights reach an engine by version, and an engine samples with exactly the version it is asked
for or not at all: a push that fails half-way leaves it without one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch


class EngineError(RuntimeError):
    """An engine gave no trajectories, or such as must not be used."""


class TransientEngineError(EngineError):
    """The same request may succeed when it is asked again, or elsewhere: a worker died, a connection broke."""


class StaleVersionError(EngineError):
    """An engine, or a trajectory, has other weights than those asked for, or such as lie too far back."""


class WeightPushError(EngineError):
    """Weights did not arrive whole; the engine has no version until a push succeeds."""


@dataclass
class EngineStats:
    """Work done by the last `generate` call.

    Attributes:
        forwards: batched forwards; one counts once whatever its batch size.
        sequence_forwards: rows that went through the network. Equal ones may have shared it (`SharedForwards`).
        rows_asked: rows before equal ones were merged: one for every denoising step of every request.
        query_tokens: of the rows that went through the network.
        retries: requests sent again because a server was down, busy or cut the connection.
        repushes: servers that had lost the weights and got them again.
        workers_lost: workers that were replaced, since the call before.
        requests_reassigned: requests that were given to another worker.
        image_gap, image_probes: rollouts that were sampled a second time without `sampler.cache`, and the sum of the
            mean absolute differences of their pixels, which lie in [0, 1].
        seconds: wall-clock of the call.
    """

    forwards: int = 0
    sequence_forwards: int = 0
    rows_asked: int = 0
    query_tokens: int = 0
    generated_tokens: int = 0
    retries: int = 0
    repushes: int = 0
    workers_lost: int = 0
    requests_reassigned: int = 0
    image_gap: float = 0.0
    image_probes: int = 0
    seconds: float = 0.0

    def add(self, other: EngineStats) -> None:
        """Add work that was done elsewhere at the same time; `seconds` stays the caller's own clock."""
        for name, value in vars(other).items():
            if name != "seconds":
                setattr(self, name, getattr(self, name) + value)


# What a recipe or an option can need of an engine, and how messages call it.
NEEDS = {
    "step_maps": "the step of every token, the complete terminal block included",
    "sampled_logprobs": "log-probs of the sampling distribution at the step that chose the token",
    "remasking": "tokens that were taken back or replaced",
    "images": "answers to prompts with images",
    "constraints": "answers that match a constraint, and the tokens that it left to each choice",
    "guides": "tokens that an autoregressive model guides",
    "choices": "what the policy chose of its decoder, or its joint head says",
    "x0": "the x0 prediction of every step",
    "request_steps": "a number of denoising steps of each request's own",
    "branches": "rollouts that branch",
    "gradients": "samples with a gradient",
    "asynchronous": "sampling beside the learner",
}


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do; see `NEEDS` for the flags.

    Attributes:
        policy_version: its trajectories carry the version of the weights that sampled them.
        push: how it takes weights: "shared" (it samples the caller's own module), "tensors" (name -> tensor), "folder"
            (a Hugging Face folder).
    """

    step_maps: bool = False
    sampled_logprobs: bool = False
    remasking: bool = False
    images: bool = False
    constraints: bool = False
    guides: bool = False
    choices: bool = False
    x0: bool = False
    request_steps: bool = False
    branches: bool = False
    gradients: bool = False
    asynchronous: bool = False
    policy_version: bool = False
    push: Literal["shared", "tensors", "folder"] = "folder"


# What samples in the learner's own process, and in workers under Ray.
IN_PROCESS = Capabilities(
    step_maps=True,
    sampled_logprobs=True,
    remasking=True,
    images=True,
    constraints=True,
    guides=True,
    choices=True,
    x0=True,
    request_steps=True,
    branches=True,
    gradients=True,
    policy_version=True,
    push="shared",
)
RAY_WORKERS = replace(IN_PROCESS, push="tensors", gradients=False, images=False, choices=False, asynchronous=True)


def require(engine: str, capabilities: Capabilities, needs: Mapping[str, str]) -> None:
    """Refuse an engine that cannot do what a run needs.

    Args:
        engine: its name, the value of `rollout.engine`.
        needs: key of `NEEDS` -> the option that needs it ("algorithm.name tracerl").

    Raises:
        ValueError: one line about the first need that is not met.
    """
    if not capabilities.policy_version:
        raise ValueError(
            f"rollout.engine {engine} does not say which weights sampled a trajectory: nothing can learn from it, set "
            "rollout.engine to in_process"
        )
    for name, why in needs.items():
        if not getattr(capabilities, name):
            raise ValueError(
                f"rollout.engine {engine} cannot give {NEEDS[name]} ({name}), which {why} needs: set rollout.engine to "
                "one that can, or change that option"
            )


def check_versions(trajectories: Sequence[Any], policy_version: int) -> None:
    """Raise StaleVersionError when a trajectory was sampled with other weights than those asked for."""
    for trajectory in trajectories:
        if trajectory.policy_version != policy_version:
            raise StaleVersionError(
                f"a trajectory was sampled with the weights of version {trajectory.policy_version} instead of "
                f"{policy_version}"
            )


class WeightSource(Protocol):
    """The policy's weights as they are now, in the form an engine takes them."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> parameter, on any device."""
        ...

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder."""
        ...


@dataclass(frozen=True)
class SampleRequest:
    """One rollout to sample.

    Attributes:
        prompt: what the model takes.
        seed: the rollout depends on this and on the weights alone.
    """

    prompt: Any
    seed: int


@dataclass
class Request:
    """One rollout of tokens to sample.

    Attributes:
        prompt_ids: token ids of the conditioning, at least one.
        seed: the draws depend on this, the step and the position only.
        num_inference_steps: overrides the sampler's step count for this request.
    """

    prompt_ids: Sequence[int]
    seed: int
    num_inference_steps: int | None = None


class SharedModelEngine:
    """The common part of engines that sample the caller's own module, whose weights are always today's."""

    branch_points: tuple[tuple[int, int], ...] = ()

    def capabilities(self) -> Capabilities:
        return IN_PROCESS

    def push_weights(self, version: int, source: WeightSource) -> None:
        """Nothing to do: the module that is sampled is the caller's, and so are its weights."""

    def close(self) -> None:
        """Nothing to give back."""


class BatchedEngine(SharedModelEngine):
    """Samples at most `max_batch_size` requests together. A subclass samples some of them, and adds to `stats`."""

    max_batch_size: int
    stats: EngineStats

    def generate(self, requests: Sequence[Any], policy_version: int = 0) -> list[Any]:
        started, self.stats = time.perf_counter(), EngineStats()
        found: list[Any] = []
        for start in range(0, len(requests), self.max_batch_size):
            found += self._together(requests[start : start + self.max_batch_size], policy_version)
        self.stats.seconds = time.perf_counter() - started
        return found

    def _together(self, requests: Sequence[Any], policy_version: int) -> list[Any]:
        raise NotImplementedError(f"{type(self).__name__} has no _together()")


class Engine(Protocol):
    """What samples: requests in, trajectories out.

    Attributes:
        options: the decoder; it may be set between two calls of `generate`.
        branch_points: where rollouts branch (`LatentEngine`); empty for modalities without branches.
        stats: the work of the last call.
    """

    options: Any
    branch_points: tuple[tuple[int, int], ...]
    stats: EngineStats

    def capabilities(self) -> Capabilities: ...

    def generate(self, requests: Sequence[Any], policy_version: int = 0) -> list[Any]:
        """One trajectory per request, in the requests' order, each with the version that sampled it.

        Args:
            policy_version: version to sample with.

        Raises:
            ValueError: a request cannot be served as it is.
            StaleVersionError: the engine has other weights.
            EngineError: anything else that kept a trajectory from being complete; never fewer or repaired ones.
        """
        ...

    def push_weights(self, version: int, source: WeightSource) -> None:
        """Sample with these weights from now on.

        Raises:
            WeightPushError: they did not arrive; the engine then has no version.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds. A `generate` that runs in another thread ends with an EngineError."""
        ...
