"""The engine of continuous diffusion: requests are denoised together, and branches share what they have in common."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rollouts.engines.base import EngineStats, SampleRequest, SharedModelEngine
from rollouts.engines.latent_cache import LatentCache
from rollouts.engines.record import NonFiniteError
from rollouts.latent_trajectory import LatentTrajectory
from rollouts.model_protocol import Conditioning, GuidedPolicy, ImagePolicy, LearnedNoise
from rollouts.samplers.first_jump import DataGaussian, levels
from rollouts.samplers.gaussian import diagonal_log_density, gaussian_step, make_steps, predicted_x0
from rollouts.samplers.latent_options import LatentSamplerOptions
from rollouts.samplers.noise import LATENT_STREAM, branch_seed, normal


class LatentEngine(SharedModelEngine):
    """Samples trajectories of one set of options.

    A request's noise is a function of its seed, so its rollout does not depend on what shares its batch; the
    model's rounding may.
    """

    def __init__(
        self,
        model: ImagePolicy,
        options: LatentSamplerOptions,
        max_batch_size: int = 256,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        branch_points: Sequence[tuple[int, int]] = (),
    ):
        """
        Args:
            dtype: of the latents, float32 or float64; trajectories are never kept in less.
            branch_points: (step, branches): before this step every rollout goes on as this many, which share all that
                came before it and draw different noise after it. Branch 0 is the rollout that would have been without.
        """
        self.model, self.options = model, options
        self.max_batch_size, self.device, self.dtype = max_batch_size, torch.device(device), dtype
        self.steps = make_steps(model.scheduler, options, model.schedule_options(options.num_inference_steps))
        if options.guidance_cosine is not None and not (
            isinstance(model, GuidedPolicy) and model.num_evaluations(options.guidance_scale) == 2
        ):
            raise ValueError(
                f"sampler.guidance_cosine drops the unconditional half of guidance, which {type(model).__name__} does "
                "not show: set it to null"
            )
        self.cache: LatentCache | None = None
        if options.cache is not None:
            known = getattr(model, "caches", ())
            if options.cache["name"] not in known:
                raise ValueError(
                    f"sampler.cache {options.cache['name']} is not for {type(model).__name__} on this denoiser, which "
                    f"can have {', '.join(known) or 'none'}"
                )
            evaluations = model.num_evaluations(options.guidance_scale)
            self.cache = LatentCache(options.cache, len(self.steps), evaluations)
        self.data = None
        if options.first_jump is not None:
            if isinstance(model, LearnedNoise):
                raise ValueError("sampler.first_jump begins without the learned noise: set it to null")
            self.data = DataGaussian.load(options.first_jump, tuple(model.latent_shape))
        self.branch_points = tuple(branch_points)
        self.stats = EngineStats()

    @property
    def leaves(self) -> int:
        """Rollouts that one tree ends in."""
        return math.prod(branches for _, branches in self.branch_points)

    def generate(self, requests: Sequence[SampleRequest], policy_version: int = 0) -> list[LatentTrajectory]:
        """Denoise every request; see `_generate`.

        With a cache a batch stays together for all steps, since the cache lives on it, and the first rollout is also
        sampled without: `stats.image_gap` is the mean absolute difference of their pixels.
        """
        if self.cache is None or not requests:
            return self._generate(requests, policy_version)
        if self.branch_points:
            raise ValueError("sampler.cache needs one batch for all steps, and this recipe's rollouts branch: drop it")
        denoiser, started, total = self.model.denoiser, time.perf_counter(), EngineStats()  # type: ignore[attr-defined]
        found: list[LatentTrajectory] = []
        with self.cache.on(denoiser, calibrate=True):
            (plain,) = self._generate(requests[:1], policy_version)
        total.add(self.stats)
        for start in range(0, len(requests), self.max_batch_size):
            with self.cache.on(denoiser):
                found += self._generate(requests[start : start + self.max_batch_size], policy_version)
            total.add(self.stats)
        ends = torch.from_numpy(np.stack([plain.latents[-1], found[0].latents[-1]])).to(self.device)
        with torch.no_grad():
            one, other = self.model.decode(ends)
        total.image_gap, total.image_probes = float((one - other).abs().mean()), 1
        total.seconds = time.perf_counter() - started
        self.stats = total
        return [replace(trajectory, exact=False) for trajectory in found]

    @torch.no_grad()
    def _generate(self, requests: Sequence[SampleRequest], policy_version: int) -> list[LatentTrajectory]:
        """Denoise every request.

        With branch points, every `leaves` requests in a row are the leaves of one tree: they must share their prompt,
        and the first one's seed is the tree's. A branch's leaves stand together.

        Raises:
            ValueError: branch points are out of order or range, or requests do not fill up trees of one prompt.
            NonFiniteError: no rollout is finite. One that is not, among others that are, is a failed sample.
        """
        at = [step for step, _ in self.branch_points]
        if at != sorted(set(at)) or any(not 0 <= step < len(self.steps) for step in at):
            raise ValueError(f"branch_points must ascend and lie in [0, {len(self.steps)}), got {at}")
        roots = requests[:: self.leaves]
        if any(request.prompt != roots[i // self.leaves].prompt for i, request in enumerate(requests)) or (
            len(roots) * self.leaves != len(requests)
        ):
            raise ValueError(
                f"the {self.leaves} branches of a rollout share a prompt: train.group_size must be a multiple of them"
            )
        self.stats = EngineStats()
        if not roots:
            return []
        started = time.perf_counter()
        branches = dict(self.branch_points)
        given = self.encode([request.prompt for request in roots])
        # `root` is the tree of every rollout, `origin` its place in the population before the last branch point.
        root = torch.arange(len(roots), device=self.device)
        seed = torch.tensor([request.seed for request in roots], dtype=torch.int64, device=self.device)
        latent, initial = self._start(seed, given)
        record = [{"latent": latent, "seed": seed}]
        origins = [root]
        previous: Any = 0.0
        adaptive = self.options.guidance_cosine is not None
        scale = torch.full((len(roots),), self.options.guidance_scale, dtype=torch.float64, device=self.device)
        for index in range(len(self.steps)):
            origin = torch.arange(len(root), device=self.device)
            if index in branches:
                count = branches[index]
                origin = origin.repeat_interleave(count)
                branch = torch.arange(count, device=self.device).repeat(len(root))
                root, latent = root[origin], latent[origin]
                seed = branch_seed(seed[origin], torch.tensor(index, device=self.device), branch)
            origins.append(origin)
            conditions = {name: rows[root] for name, rows in given.items()}
            used = scale = scale[origin]
            if adaptive:
                output, scale = self._adaptive(latent, index, conditions, scale)
            else:
                output = self.predict(latent, index, conditions)
            rows, shift = len(latent), 0.0
            table = torch.from_numpy(self.steps.coefficients[index]).to(self.device).expand(rows, -1)
            if self.steps.mean_previous is not None:
                shift = float(self.steps.mean_previous[index]) * (previous[origin] if index else previous)
                previous = predicted_x0(table, self.steps.clip, output.double(), latent.double())
            latent, mean, logprob = gaussian_step(
                table,
                torch.full((rows,), self.steps.std[index], dtype=torch.float64, device=self.device),
                self.steps.clip,
                output,
                latent,
                self.noise(seed, index + 1),
                shift,
            )
            state = {"latent": latent, "seed": seed, "mean": mean.to(self.dtype), "logprob": logprob}
            record.append(state | ({"guidance": used} if adaptive else {}))
        if not torch.isfinite(latent).flatten(1).all(1).any():
            raise NonFiniteError("the model's output is not finite: its weights are damaged or training diverged")
        self.stats.seconds = time.perf_counter() - started
        trajectories = self._trajectories(record, origins, root, given, tuple(at), policy_version)
        if initial is not None:
            for trajectory, value in zip(trajectories, initial[root].tolist(), strict=True):
                trajectory.initial_logprob = 0.0 if trajectory.failed else value
        return trajectories

    def _start(self, seed: torch.Tensor, given: Conditioning) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The initial latents [N, ...], and their log-density [N] where the policy decides about them."""
        if not isinstance(self.model, LearnedNoise):
            return self.start(seed), None
        assert self.steps.initial_std == 1, "the samplers of this package start from unit noise"
        mean, std = self.model.initial_noise(given)
        latent = (mean.double() + std.double() * self.noise(seed, 0)).to(self.dtype)
        return latent, diagonal_log_density(latent, mean, std)

    def start(self, seed: torch.Tensor) -> torch.Tensor:
        """Initial latents [N, ...] that no policy decides about: noise, or where `sampler.first_jump` ends."""
        noise = self.noise(seed, 0)
        if self.data is None:
            return noise.mul_(self.steps.initial_std).to(self.dtype)
        signal, level = levels(self.model.scheduler, self.steps.timestep)
        return self.data.jump(noise, signal[0], level[0]).to(self.dtype)

    def encode(self, prompts: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Conditioning of every prompt; equal ones go through the text encoder once."""
        place = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        encoded = self.model.encode(list(place))
        where = torch.tensor([place[prompt] for prompt in prompts])
        return {name: rows.cpu()[where].to(self.device) for name, rows in encoded.items()}

    def noise(self, seed: torch.Tensor, step: int) -> torch.Tensor:
        """float64 [N, ...] standard normal; 0 draws the initial noise, i + 1 that of step i."""
        shape = self.model.latent_shape
        position = torch.arange(int(np.prod(shape)), device=self.device)
        at = torch.tensor(step, device=self.device)
        return normal(seed[:, None], at, position, LATENT_STREAM).reshape(-1, *shape)

    def _adaptive(
        self, latent: torch.Tensor, index: int, conditioning: Conditioning, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [N, ...] at the scales [N] of guidance that rollouts have reached, and the scales of the next step.

        Castillo et al. 2023, "Adaptive Guidance" (arXiv 2312.12487, abstract): a rollout whose halves point the same
        way, by their cosine, goes on with the conditional one.
        """
        assert self.options.guidance_cosine is not None
        output, after = torch.empty_like(latent), scale.clone()
        for guided in (False, True):
            chosen = (scale != 1).nonzero()[:, 0] if guided else (scale == 1).nonzero()[:, 0]
            for part in chosen.split(self.max_batch_size) if len(chosen) else ():
                rows = {name: values[part] for name, values in conditioning.items()}
                timestep = torch.full((len(part),), self.steps.timestep[index], device=self.device)
                if guided:
                    without, given = self.model.halves(latent[part], timestep, rows)  # type: ignore[attr-defined]
                    cosine = torch.cosine_similarity(without.double().flatten(1), given.double().flatten(1))
                    after[part] = torch.where(cosine > self.options.guidance_cosine, 1.0, scale[part])
                    output[part] = self.model.join(without, given, self.options.guidance_scale)  # type: ignore[attr-defined]
                else:
                    output[part] = self.model.predict(latent[part], timestep, rows, 1.0)
                self._count(len(part) * (2 if guided else 1), latent)
        self.stats.generated_tokens += latent.numel()
        return output, after

    def _count(self, evaluations: int, latent: torch.Tensor) -> None:
        self.stats.forwards += 1
        self.stats.sequence_forwards += evaluations
        self.stats.rows_asked += evaluations
        self.stats.query_tokens += evaluations * latent[0].numel()

    def predict(self, latent: torch.Tensor, index: int, conditioning: Conditioning) -> torch.Tensor:
        """The model's guided output [N, ...] before step `index`, at most `max_batch_size` latents at a time."""
        outputs = []
        if self.cache is not None:
            self.cache.timestep = self.steps.timestep[index] if index else math.inf
        for start in range(0, len(latent), self.max_batch_size):
            part = slice(start, start + self.max_batch_size)
            timestep = torch.full((len(latent[part]),), self.steps.timestep[index], device=self.device)
            rows = {name: values[part] for name, values in conditioning.items()}
            outputs.append(self.model.predict(latent[part], timestep, rows, self.options.guidance_scale))
            self._count(len(latent[part]) * self.model.num_evaluations(self.options.guidance_scale), latent)
        self.stats.generated_tokens += latent.numel()
        return torch.cat(outputs)

    def _trajectories(
        self,
        record: list[dict[str, torch.Tensor]],
        origins: list[torch.Tensor],
        root: torch.Tensor,
        conditioning: Conditioning,
        branch_steps: tuple[int, ...],
        policy_version: int,
    ) -> list[LatentTrajectory]:
        """Follow every finished rollout back to its request."""
        columns: dict[str, list[np.ndarray]] = {name: [] for name in record[-1]}
        place = torch.arange(len(root), device=self.device)
        for state, origin in zip(reversed(record), reversed(origins), strict=True):
            for name, values in state.items():
                columns[name].append(values[place].cpu().numpy())
            place = origin[place]
        latents, seed, mean, logprob, *guidance = (np.stack(parts[::-1], axis=1) for parts in columns.values())
        kept = {name: rows[root].cpu().numpy() for name, rows in conditioning.items()}
        return [
            LatentTrajectory(
                latents=latents[i],
                timestep=self.steps.timestep,
                coefficients=self.steps.coefficients,
                mean=mean[i],
                std=self.steps.std,
                logprob=logprob[i],
                conditioning={name: rows[i] for name, rows in kept.items()},
                seed=seed[i],
                branch_steps=branch_steps,
                clip=self.steps.clip,
                sampler=self.options.record(),
                policy_version=policy_version,
                guidance=guidance[0][i].tolist() if guidance else None,
            ).checked()
            for i in range(len(root))
        ]
