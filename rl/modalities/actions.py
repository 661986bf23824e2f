"""Actions: a diffusion model chooses chunks of actions in a gymnasium environment. One sample is one episode.

DPPO (Ren et al. 2024, arXiv 2409.00588): every denoising step of every chunk is a decision with a Gaussian density, in
one long chain of denoising and environment steps. `rl/recipes/dppo.py` trains `rl/models/action_policy.py`.

Shape legend: B episodes that share a forward, C chunks of an episode, T denoising steps, H actions of a chunk, A
entries of an action, O entries of an observation, U scored steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rl.estimators.base import Scores
from rl.estimators.latent_rows import LatentRows
from rl.modalities.actions_plan import ActionOptions, ActionsPlan
from rl.models.action_policy import ActionModel, signal
from rollouts.engines.base import BatchedEngine, EngineStats, SampleRequest
from rollouts.samplers.noise import LATENT_STREAM, normal


@dataclass
class Episode:
    """One rollout: C chunks, of T denoising steps each.

    Attributes:
        observations: float32 [C, O], before each chunk.
        chunks: float32 [C, T + 1, H, A], noise first.
        logprob: float64 [C T], of every denoising step.
        rewards: float64 [C], what the environment gave during each chunk.
        min_std: of the sampler.
        actions: actions done.
        error: what the environment raised, "" where it did not.
    """

    observations: np.ndarray
    chunks: np.ndarray
    logprob: np.ndarray
    rewards: np.ndarray
    min_std: float
    actions: int = 0
    error: str = ""
    policy_version: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.logprob)


@dataclass
class Play:
    """An episode that goes on, and its chunks so far: what was observed, the states of the chunk, their log-probs."""

    env: Any
    observation: Any = None
    over: bool = False
    error: str = ""
    actions: int = 0
    rewards: list[float] = field(default_factory=list)
    chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def start(self, seed: int) -> None:
        try:
            self.observation, _ = self.env.reset(seed=seed)
        except Exception as error:
            self.fail(error)

    def act(self, actions: Sequence[Any], most: int) -> None:
        """Do the actions of a chunk; those behind the end of the episode are left out."""
        self.rewards.append(0.0)
        for action in actions:
            if self.over:
                return
            try:
                self.observation, reward, ended, cut, _ = self.env.step(action)
                if not (np.isfinite(self.observation).all() and math.isfinite(reward)):
                    raise ValueError("an observation or reward is not finite")
            except Exception as error:
                return self.fail(error)
            self.rewards[-1] += float(reward)
            self.actions += 1
            self.over = bool(ended or cut or self.actions == most)

    def fail(self, error: Exception) -> None:
        self.over, self.error = True, f"{type(error).__name__}: {error}"


class ActionEngine(BatchedEngine):
    """A chunk's noise depends on the seed, the chunk and the denoising step alone, whatever shares the batch."""

    def __init__(
        self, model: ActionModel, options: ActionOptions, device: torch.device, task: Any, max_batch_size: int = 256
    ):
        self.model, self.options, self.device, self.task = model, options, device, task
        self.space, self.max_batch_size = task.space(options.bins), max_batch_size
        self.stats = EngineStats()

    @torch.no_grad()
    def _together(self, requests: Sequence[SampleRequest], policy_version: int) -> list[Episode]:
        """Episodes side by side, in an environment each."""
        envs = self.task.environments(len(requests))
        plays = [Play(env) for env in envs]
        for play, request in zip(plays, requests, strict=True):
            play.start(int(request.prompt))
        number = 0
        while going := [i for i, play in enumerate(plays) if not play.over]:
            seen = np.stack([np.asarray(plays[i].observation, dtype=np.float32) for i in going])
            states, logprob = self._chunks(seen, [requests[i].seed for i in going], number)
            for row, i in enumerate(going):
                plays[i].chunks.append((seen[row], states[row], logprob[row]))
                plays[i].act([self.space.to_env(action) for action in states[row, -1]], self.options.max_actions)
            number += 1
        self.task.give_back([play.env for play in plays if not play.error])
        return [self._episode(play, policy_version) for play in plays]

    def _chunks(self, seen: np.ndarray, seeds: list[int], number: int) -> tuple[np.ndarray, np.ndarray]:
        """States [B, T + 1, H, A] and log-probs [B, T] of the chunk that answers what is seen [B, O]."""
        steps, (length, size) = self.options.num_inference_steps, self.model.shape
        observation, seed = torch.from_numpy(seen).to(self.device), torch.tensor(seeds, device=self.device)[:, None]
        place = torch.arange(length * size, device=self.device)

        def noise(step: int) -> torch.Tensor:
            count = torch.tensor(number * (steps + 1) + step, device=self.device)
            return normal(seed, count, place, LATENT_STREAM).unflatten(1, (length, size))

        states, logprobs = [noise(0).float()], []
        for step in range(steps):
            t = torch.full((len(seeds),), steps - step, device=self.device)
            drawn = self.model.denoise(states[-1], t, observation, steps, self.options.min_std)
            # The state is float32, and its density is taken where it lies.
            states.append((drawn.mean + drawn.std * noise(step + 1)).float())
            logprobs.append(drawn.logprob(states[-1]))
        rows, tokens = steps * len(seeds), length * len(seeds)
        self.stats.add(EngineStats(steps, rows, rows, steps * tokens, tokens))
        return torch.stack(states, 1).cpu().numpy(), torch.stack(logprobs, 1).cpu().numpy()

    def _episode(self, play: Play, version: int) -> Episode:
        steps, shape = self.options.num_inference_steps, self.model.shape
        # An environment that raised before the first action leaves an episode of no chunks.
        none = [np.zeros((0, len(self.model.scale)), np.float32), np.zeros((0, steps + 1, *shape), np.float32)]
        parts = [np.stack(part) for part in zip(*play.chunks, strict=True)] or [*none, np.zeros(0)]
        seen, states, logprob = parts
        return Episode(
            observations=seen,
            chunks=states,
            logprob=logprob.ravel(),
            rewards=np.array(play.rewards),
            min_std=self.options.min_std,
            actions=play.actions,
            error=play.error,
            policy_version=version,
        )


# Learner.


@dataclass(kw_only=True)
class ActionRows(LatentRows):
    """U recorded denoising steps; `latent` [U, H, A] is the chunk before one, `drawn` the one after it."""

    drawn: torch.Tensor
    num_steps: int
    min_std: float

    def score(self, model: ActionModel) -> Scores:
        seen = self.conditioning["observation"]
        step = model.denoise(self.latent, self.timestep, seen, self.num_steps, self.min_std)
        return Scores(step.logprob(self.drawn), step.entropy())


@dataclass(kw_only=True)
class CloningRows(LatentRows):
    """B noised chunks of the expert; see `ActionModel.fit` for their scores."""

    target: torch.Tensor

    def score(self, model: ActionModel) -> Scores:
        fit = model.fit(self.latent, self.timestep, self.conditioning["observation"], self.target)
        return Scores(fit, torch.zeros_like(fit))


def action_rows(episodes: Sequence[Episode], steps: Sequence[np.ndarray] | None = None) -> ActionRows:
    """Every recorded denoising step as a decision, or those of `steps` (bool [at least C T] per episode)."""
    count = episodes[0].chunks.shape[1] - 1
    chosen = [np.ones(e.num_steps, bool) for e in episodes] if steps is None else steps
    wanted = [np.flatnonzero(own[: e.num_steps]) for e, own in zip(episodes, chosen, strict=True)]
    pairs = list(zip(episodes, wanted, strict=True))
    step = torch.from_numpy(np.concatenate(wanted))

    def gathered(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts))

    return ActionRows(
        latent=gathered([e.chunks[w // count, w % count] for e, w in pairs]),
        drawn=gathered([e.chunks[w // count, w % count + 1] for e, w in pairs]),
        timestep=count - step % count,
        conditioning={"observation": gathered([e.observations[w // count] for e, w in pairs])},
        trajectory=torch.from_numpy(np.repeat(np.arange(len(pairs)), [len(w) for w in wanted])),
        step=step,
        num_steps=count,
        min_std=episodes[0].min_std,
        sampler_logprob=gathered([e.logprob[w] for e, w in pairs]),
    )


class Actions(ActionsPlan):
    Trajectory = Episode

    @property
    def horizon(self) -> int:
        return self.config.sampler.max_steps

    def new_model(self) -> ActionModel:
        options, space = self.config.sampler, self.task.space(self.config.sampler.bins)
        return ActionModel(options.chunk_length, space.size, space.scale, space.choices)

    def engine(self, model: Any, options: Any, device: torch.device) -> ActionEngine:
        return ActionEngine(model, options, device, self.task, self.config.rollout.max_batch_size)

    def completions(self, trajectories: Sequence[Episode]) -> list[dict[str, Any] | None]:
        """{"return": -213.5, "actions": 100}; None for an episode whose environment raised."""
        return [None if e.error else {"return": float(e.rewards.sum()), "actions": e.actions} for e in trajectories]

    def supervised(
        self, model: Any, rows: Sequence[Any], part: slice, seed: Sequence[int]
    ) -> tuple[CloningRows, torch.Tensor]:
        """Behaviour cloning: one chunk of each row's demonstration, at a random place and a random noise level."""
        rng = np.random.default_rng(list(seed))
        (length, size), space = model.shape, self.task.space(self.config.sampler.bins)
        observations, chunks = [], []
        for row in rows:
            seen, actions = self.task.demonstration(int(row["prompt"]))
            start = int(rng.integers(max(1, len(actions) - length + 1)))
            own = [space.from_env(action) for action in actions[start : start + length]]
            observations.append(seen[start])
            # An episode that ends within its only chunk goes on with its last action.
            chunks.append(np.stack(own + own[-1:] * (length - len(own))))
        clean = torch.from_numpy(np.stack(chunks)).float()[part]
        level = torch.from_numpy(1 - rng.random(len(rows)))[part]
        noise = torch.from_numpy(rng.standard_normal((len(rows), length, size)))[part]
        share = signal(level)[:, None, None]
        index = torch.arange(len(clean))
        noised = CloningRows(
            latent=(share.sqrt() * clean + (1 - share).sqrt() * noise).float(),
            target=clean,
            timestep=level,
            conditioning={"observation": torch.from_numpy(np.stack(observations)).float()[part]},
            trajectory=index,
            step=torch.zeros_like(index),
        )
        return noised, torch.full((len(clean),), 1.0 / len(rows), dtype=torch.float64)
