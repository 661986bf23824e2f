"""Searches over continuous latents: the Gaussian samplers as a `SearchSampler`.

A state is a latent between two steps and the record of how it came there. Its noise is a hash of (seed, step, entry),
as in `LatentEngine`, so that a search that only starts and finishes draws the engine's own samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rollouts.engines.latent import LatentEngine
from rollouts.latent_trajectory import LatentTrajectory
from rollouts.model_protocol import LearnedNoise
from rollouts.samplers.first_jump import levels
from rollouts.samplers.gaussian import gaussian_step, log_density, predicted_x0
from rollouts.search.protocol import ArrayStates, Budget


@dataclass(frozen=True)
class LatentStates(ArrayStates):
    """B states.

    Attributes:
        latents: [B, T+1, ...], up to entry `at`; zeros after it.
        mean: [B, T, ...], of the steps taken.
        seeds: int64 [B, T+1], the seed that drew each latent.
    """

    latents: np.ndarray
    mean: np.ndarray
    seeds: np.ndarray

    @property
    def latent(self) -> np.ndarray:
        """[B, ...], as the states stand."""
        return self.latents[np.arange(len(self)), self.at]


class LatentSampler:
    """A `GuidedSampler` on an engine's model, steps and guidance."""

    random_start = True

    def __init__(self, engine: LatentEngine, prompts: Sequence[Any]):
        """
        Raises:
            ValueError: the policy learned its initial noise, which a search would choose itself.
        """
        if isinstance(engine.model, LearnedNoise):
            raise ValueError(
                "--search chooses the initial noise itself: set model.path to the model without learned noise"
            )
        if engine.options.guidance_cosine is not None:
            raise ValueError("a search guides every step: set sampler.guidance_cosine to null")
        if engine.options.cache is not None:
            raise ValueError("a search stops and resumes, and a cache cannot: set sampler.cache to null")
        if engine.steps.mean_previous is not None:
            raise ValueError("sampler.kind dpm_solver looks back: a search needs ddim, ddpm or a flow kind of sampler")
        if engine.options.first_jump is not None:
            raise ValueError("a search chooses and changes standard noise: set sampler.first_jump to null")
        self.engine, self.budget = engine, Budget()
        self.given = engine.encode(list(prompts))
        self.evaluations = engine.model.num_evaluations(engine.options.guidance_scale)
        self.signal, self.noise_level = levels(engine.model.scheduler, engine.steps.timestep)

    # --- states ---------------------------------------------------------------------------------------------------

    def start(self, row: np.ndarray, seed: np.ndarray) -> LatentStates:
        steps, count = len(self.engine.steps), len(row)
        first = self._noise(seed, 0) * self.engine.steps.initial_std
        latents = np.zeros((count, steps + 1, *first.shape[1:]), dtype=_numpy(self.engine.dtype))
        latents[:, 0] = first.to(self.engine.dtype).cpu().numpy()
        seeds = np.zeros((count, steps + 1), dtype=np.int64)
        seeds[:, 0] = seed
        return LatentStates(
            row=np.asarray(row),
            at=np.zeros(count, dtype=np.int64),
            seed=np.asarray(seed),
            latents=latents,
            mean=np.zeros_like(latents[:, 1:]),
            logprob=np.zeros((count, steps)),
            seeds=seeds,
        )

    def join(self, parts: Sequence[LatentStates]) -> LatentStates:
        return LatentStates.join(parts)

    def keys(self, states: LatentStates) -> list[None]:
        return [None] * len(states)

    def reseed(self, states: LatentStates, seed: np.ndarray) -> LatentStates:
        return replace(states, seed=np.asarray(seed))

    def perturb(self, states: LatentStates, share: float, seed: np.ndarray) -> LatentStates:
        """Neighbours of initial states: sqrt(1 - share) z + sqrt(share) z', again standard noise.

        The noise of later steps stays as it is.
        """
        assert not np.any(states.at), "neighbours are those of initial noise"
        unit = self.engine.steps.initial_std
        fresh = self._noise(seed, 0).cpu().numpy() * unit
        latents = states.latents.copy()
        latents[:, 0] = (1 - share) ** 0.5 * latents[:, 0] + share**0.5 * fresh
        seeds = states.seeds.copy()
        seeds[:, 0] = seed
        return replace(states, latents=latents, seeds=seeds)

    def noise_of(self, states: LatentStates) -> np.ndarray:
        """[B, ...]: the standard noise that states began with."""
        return states.latents[:, 0] / self.engine.steps.initial_std

    def with_noise(self, states: LatentStates, noise: np.ndarray) -> LatentStates:
        """The initial states with this noise [B, ...]; that of later steps stays as it is."""
        latents = states.latents.copy()
        latents[:, 0] = noise * self.engine.steps.initial_std
        return replace(states, latents=latents)

    def noise_gradient(self, states: LatentStates, gradient: Callable[[torch.Tensor, Any], torch.Tensor]) -> np.ndarray:
        """[B, ...]: d reward / d noise of initial states, through every step under their own further noise."""
        assert not np.any(states.at), "the noise is that of initial states"
        steps, seed = self.engine.steps, self._put(states.seed)
        given = {name: values[torch.from_numpy(states.row)] for name, values in self.given.items()}
        noise = self._put(self.noise_of(states)).requires_grad_(True)
        with torch.enable_grad():
            latent = noise * steps.initial_std
            for index in range(len(steps)):
                std = torch.full((len(states),), steps.std[index], dtype=torch.float64, device=latent.device)
                output = self.engine.predict(latent, index, given)
                table = self._table(index, len(states))
                latent, _, _ = gaussian_step(table, std, steps.clip, output, latent, self.engine.noise(seed, index + 1))
        slope = gradient(latent.detach(), states)
        (found,) = torch.autograd.grad(latent, noise, slope.to(latent.dtype))
        self.budget.denoiser_evaluations += len(states) * len(steps) * self.evaluations
        return found.cpu().numpy()

    def renoise(self, states: LatentStates, num_steps: int, seed: np.ndarray) -> LatentStates:
        """Back by `num_steps` steps (at most to the start), by the forward process of the model's schedule.

        The record of the latent there is its log-density under the policy's own step to it.
        """
        back = np.maximum(states.at - num_steps, 0)
        keep = self.signal[back] / self.signal[states.at]
        added = np.sqrt(np.maximum(self.noise_level[back] ** 2 - (keep * self.noise_level[states.at]) ** 2, 0.0))
        shape = (-1, *[1] * (states.latents.ndim - 2))
        fresh = self._noise(seed, 0).cpu().numpy()
        noised = keep.reshape(shape) * states.latent + added.reshape(shape) * fresh
        latents, seeds, logprob = states.latents.copy(), states.seeds.copy(), states.logprob.copy()
        rows = np.arange(len(states))
        latents[rows, back], seeds[rows, back] = noised, seed
        ahead = np.arange(latents.shape[1]) > back[:, None]
        latents[ahead] = 0
        logprob[ahead[:, 1:]] = 0
        for place in np.flatnonzero(back > 0):
            step = back[place] - 1
            there, mean = (torch.from_numpy(x[None]) for x in (latents[place, back[place]], states.mean[place, step]))
            logprob[place, step] = float(log_density(there, mean, torch.tensor([self.engine.steps.std[step]])))
        return replace(states, at=back, seed=np.asarray(seed), latents=latents, seeds=seeds, logprob=logprob)

    # --- denoising ------------------------------------------------------------------------------------------------

    def step(self, states: LatentStates) -> LatentStates:
        return self._branch(states, states.seed[:, None])

    def candidates(self, states: LatentStates, seed: np.ndarray) -> LatentStates:
        return self._branch(states, np.asarray(seed))

    def x0_hat(self, states: LatentStates) -> LatentStates:
        """The model's prediction of the data; the steps between are not in the record."""
        latents, at = states.latents.copy(), states.at.copy()
        for index, place, output, _ in self._outputs(states):
            table = self._table(index, len(place))
            x0 = predicted_x0(table, self.engine.steps.clip, output.double(), self._put(states.latent[place]).double())
            latents[place, -1] = x0.cpu().numpy()
            at[place] = states.mean.shape[1]
        return replace(states, latents=latents, at=at)

    def trajectories(self, states: LatentStates) -> list[LatentTrajectory]:
        engine = self.engine
        return [
            LatentTrajectory(
                latents=states.latents[i],
                timestep=engine.steps.timestep,
                coefficients=engine.steps.coefficients,
                mean=states.mean[i],
                std=engine.steps.std,
                logprob=states.logprob[i],
                conditioning={name: values[states.row[i]].cpu().numpy() for name, values in self.given.items()},
                seed=states.seeds[i],
                clip=engine.steps.clip,
                sampler=engine.options.record(),
            ).checked()
            for i in range(len(states))
        ]

    def guided_step(
        self, states: LatentStates, gradient: Callable[[torch.Tensor, Any], torch.Tensor], scale: float
    ) -> tuple[LatentStates, np.ndarray]:
        """One step whose mean is moved by std^2 scale d reward(x0) / d latent, x0 the model's prediction at the latent.

        The gradient goes through the network. Steps without noise are the policy's own; means and log-probs of the
        record are the policy's at all steps.
        """
        engine, ratio = self.engine, np.zeros(len(states))
        latents, mean, logprob = states.latents.copy(), states.mean.copy(), states.logprob.copy()
        drawn, at = states.seeds.copy(), states.at.copy()
        for index, place, output, latent in self._outputs(states, with_gradient=True):
            table = self._table(index, len(place))
            std = torch.full((len(place),), engine.steps.std[index], dtype=torch.float64, device=latent.device)
            with torch.enable_grad():
                x0 = predicted_x0(table, engine.steps.clip, output, latent)
            slope = gradient(x0.detach().to(engine.dtype), states.select(place))
            (tilt,) = torch.autograd.grad(x0, latent, slope.to(x0.dtype))
            shift = engine.steps.std[index] ** 2 * scale * tilt.double()
            noise = self._noise(states.seed[place], index + 1)
            after, moved, density = gaussian_step(
                table, std, engine.steps.clip, output.detach(), latent.detach(), noise, shift
            )
            own = log_density(after, moved - shift, std)
            ratio[place] = (own - density).cpu().numpy()
            latents[place, index + 1], mean[place, index] = after.cpu().numpy(), (moved - shift).cpu().numpy()
            logprob[place, index], drawn[place, index + 1] = own.cpu().numpy(), states.seed[place]
            at[place] = index + 1
        return replace(states, at=at, latents=latents, mean=mean, logprob=logprob, seeds=drawn), ratio

    def _branch(self, states: LatentStates, seed: np.ndarray) -> LatentStates:
        """k next states of each, one for every column of seeds [B, k], from one forward; candidates together."""
        count = seed.shape[1]
        moved = states.select(np.repeat(np.arange(len(states)), count))
        seeds = np.where(moved.done, moved.seed, seed.reshape(-1))
        latents, mean, logprob = moved.latents.copy(), moved.mean.copy(), moved.logprob.copy()
        drawn, at = moved.seeds.copy(), moved.at.copy()
        for index, place, output, _ in self._outputs(states):
            rows = (place[:, None] * count + np.arange(count)).reshape(-1)
            after, center, density = gaussian_step(
                self._table(index, len(rows)),
                torch.full((len(rows),), self.engine.steps.std[index], dtype=torch.float64, device=output.device),
                self.engine.steps.clip,
                output.repeat_interleave(count, 0),
                self._put(moved.latent[rows]),
                self._noise(seeds[rows], index + 1),
            )
            latents[rows, index + 1], mean[rows, index] = after.cpu().numpy(), center.cpu().numpy()
            logprob[rows, index], drawn[rows, index + 1] = density.cpu().numpy(), seeds[rows]
            at[rows] = index + 1
        return LatentStates(moved.row, at, seeds, logprob, latents, mean, drawn)

    def _outputs(
        self, states: LatentStates, with_gradient: bool = False
    ) -> list[tuple[int, np.ndarray, torch.Tensor, torch.Tensor]]:
        """Index of a step, the unfinished states that stand before it, the model's output for each, their latents."""
        found = []
        for index in np.unique(states.at[~states.done]):
            place = np.flatnonzero(states.at == index)
            given = {name: values[torch.from_numpy(states.row[place])] for name, values in self.given.items()}
            latent = self._put(states.latent[place]).requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                output = self.engine.predict(latent, int(index), given)
            found.append((int(index), place, output, latent))
            self.budget.denoiser_evaluations += len(place) * self.evaluations
        return found

    def _table(self, index: int, count: int) -> torch.Tensor:
        return torch.from_numpy(self.engine.steps.coefficients[index]).to(self.engine.device).expand(count, -1)

    def _noise(self, seed: np.ndarray, step: int) -> torch.Tensor:
        return self.engine.noise(self._put(np.asarray(seed)), step)

    def _put(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.engine.device)


def _numpy(dtype: torch.dtype) -> type:
    return np.float64 if dtype == torch.float64 else np.float32
