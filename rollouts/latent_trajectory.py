"""The contract between sampler and learner for continuous diffusion: latents, and the Gaussian of every step.

Step i draws `latents[i + 1]` from N(mean[i], std[i]^2) given `latents[i]`. Its mean is a fixed function of
the latent and of the model's output (`rollouts/samplers/gaussian.py`), whose coefficients the record carries:
a replay needs today's weights and nothing else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rollouts.npz_file import read_records, write_records

FORMAT_VERSION = 1
_KIND = "latent trajectories"
_ARRAYS = ("latents", "timestep", "coefficients", "mean", "std", "logprob", "seed")
_ITEMS = ("branch_steps", "clip", "sampler", "policy_version", "initial_logprob", "guidance", "failed", "exact")


@dataclass
class LatentTrajectory:
    """One rollout of a Gaussian sampler.

    Example: two steps on a latent of one entry; the last step is deterministic::

        LatentTrajectory(
            latents=np.array([[1.2], [0.5], [0.3]], np.float32), timestep=np.array([500.0, 0.0]),
            coefficients=..., mean=np.array([[0.4], [0.3]], np.float32), std=np.array([0.2, 0.0]),
            logprob=np.array([0.56, 0.0]), conditioning={"label": np.array(3)}, seed=np.array([7, 7, 7]),
        )

    Attributes:
        latents: float32 [T+1, ...], the state before every step and the final sample; never rounded further.
        timestep: float64 [T], what the model was told.
        coefficients: float64 [T, 5], see `GaussianSteps`.
        mean: float32 [T, ...], of every step's Gaussian under the weights that sampled.
        std: float64 [T], one number per step; 0 where the step is deterministic.
        logprob: float64 [T], log-density of the drawn latent, summed over its entries (0 where std is 0).
        conditioning: name -> array, this sample's row of what the model was given.
        seed: int64 [T+1]; entry 0 drew the initial noise, entry i + 1 the noise of step i. Trajectories of one
            call that agree in seed[:i + 1] are one rollout up to latents[i].
        branch_steps: steps before which rollouts of this call branched, ascending.
        clip: bound on the predicted x0, None when it is not clipped.
        sampler: settings that define the steps (scheduler, eta, guidance_scale, min_std, ...).
        policy_version: optimizer steps taken by the weights that sampled this.
        initial_logprob: log-density of latents[0], summed over its entries, where the policy decides what it starts
            from (`LearnedNoise`); None where that is standard noise.
        guidance: [T], the scale of guidance at every step, where a rollout drops its unconditional half on the way
            (`sampler.guidance_cosine`); None where it is the sampler's at all of them.
        exact: False where a cache of the denoiser changed outputs (`sampler.cache`): a replay then differs.
        failed: a latent was not finite. Latents, means and log-probs then are all 0, and the sample is no image.
    """

    latents: np.ndarray
    timestep: np.ndarray
    coefficients: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    logprob: np.ndarray
    conditioning: Mapping[str, np.ndarray]
    seed: np.ndarray
    branch_steps: tuple[int, ...] = ()
    clip: float | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    policy_version: int = 0
    initial_logprob: float | None = None
    guidance: list[float] | None = None
    failed: bool = False
    exact: bool = True

    @property
    def num_steps(self) -> int:
        return len(self.timestep)

    @property
    def num_entries(self) -> int:
        """D, numbers in one latent."""
        return int(np.prod(self.latents.shape[1:]))

    @property
    def is_decision(self) -> np.ndarray:
        """bool [T]: steps whose density a learner may use (std above the sampler's min_std)."""
        return self.std > self.sampler.get("min_std", 0.0)

    def node(self, depth: int) -> tuple[int, ...]:
        """Identity of the rollout up to latents[depth]: equal for trajectories that share it."""
        return tuple(self.seed[: depth + 1].tolist())

    def prompt_digest(self) -> bytes:
        """Equal for trajectories with equal conditioning."""
        digest = hashlib.sha256()
        for name in sorted(self.conditioning):
            digest.update(self.conditioning[name].tobytes())
        return digest.digest()[:8]

    def checked(self) -> LatentTrajectory:
        """Itself, or a failed sample where a latent is not finite: what is NaN must reach no loss and no file."""
        if np.isfinite(self.latents).all():
            return self
        empty = {name: np.zeros_like(getattr(self, name)) for name in ("latents", "mean", "logprob")}
        return replace(self, **empty, initial_logprob=None if self.initial_logprob is None else 0.0, failed=True)

    def validate(self) -> None:
        """Raise ValueError, naming the field, when the record contradicts itself."""
        steps = self.num_steps
        lengths = {"latents": steps + 1, "coefficients": steps, "mean": steps, "std": steps, "logprob": steps}
        for name, length in {**lengths, "seed": steps + 1}.items():
            if len(getattr(self, name)) != length:
                raise ValueError(
                    f"trajectory field {name!r} has {len(getattr(self, name))} entries, {steps} steps need {length}"
                )
        if self.latents.dtype not in (np.float32, np.float64):
            raise ValueError(f"trajectory field 'latents' is {self.latents.dtype}: half precision changes log-probs")
        if self.mean.shape[1:] != self.latents.shape[1:]:
            raise ValueError("trajectory field 'mean' has another latent shape than 'latents'")
        for name in ("latents", "coefficients", "mean", "std", "logprob"):
            if not np.all(np.isfinite(getattr(self, name))):
                raise ValueError(f"trajectory field {name!r} holds a value that is not finite")
        if np.any(self.std < 0):
            raise ValueError("trajectory field 'std' must not be negative")
        branches = list(self.branch_steps)
        if branches != sorted(set(branches)) or any(not 0 <= step < steps for step in branches):
            raise ValueError("trajectory field 'branch_steps' must ascend and lie in [0, T)")


def save_latents(path: str | os.PathLike[str], trajectories: Sequence[LatentTrajectory]) -> None:
    """Write trajectories to one `.npz` file (no pickle). The file appears only when it is complete."""
    arrays: dict[str, np.ndarray] = {}
    items = []
    for index, trajectory in enumerate(trajectories):
        arrays |= {f"{index}/{name}": getattr(trajectory, name) for name in _ARRAYS}
        arrays |= {f"{index}/conditioning/{name}": value for name, value in trajectory.conditioning.items()}
        item = {name: getattr(trajectory, name) for name in _ITEMS}
        items.append(item | {"conditioning": list(trajectory.conditioning)})
    write_records(path, _KIND, FORMAT_VERSION, items, arrays)


def load_latents(path: str | os.PathLike[str]) -> list[LatentTrajectory]:
    """Read what `save_latents` wrote, validating every record.

    Raises:
        ValueError: the file is not a file of latent trajectories, or a record is inconsistent.
    """
    items, arrays = read_records(path, _KIND, FORMAT_VERSION)
    trajectories = []
    for index, item in enumerate(items):
        names = item.pop("conditioning")
        # Their name in files before it was the field's.
        steps = item.pop("splits", None) or item.get("branch_steps", ())
        trajectory = LatentTrajectory(
            **{name: arrays[f"{index}/{name}"] for name in _ARRAYS},
            conditioning={name: arrays[f"{index}/conditioning/{name}"] for name in names},
            **(item | {"branch_steps": tuple(steps)}),
        )
        trajectory.validate()
        trajectories.append(trajectory)
    return trajectories
