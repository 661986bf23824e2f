"""Images: latent trajectories of diffusers models and of the built-in class-conditional one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewards.image import data_url, thumbnail
from rl.config import Config
from rl.errors import about
from rl.estimators.denoising import DenoisingRows, denoising_rows
from rl.modalities.gradient_images import PixelReward, uint8_images
from rl.modalities.image_metrics import (
    frechet_distance,
    mean_pairwise_distance,
    per_prompt,
    precision_recall,
    vendi_score,
)
from rl.modalities.images_plan import ImagesPlan
from rl.model_section import PipelineConfig
from rl.models.class_policy import ClassPolicy, new_policy
from rl.models.noise_policy import NoisePolicy
from rl.models.pipelines import CLASS_NAME, INDEX, NOISE_INDEX
from rl.tasks.base import Example
from rollouts.engines.latent import LatentEngine
from rollouts.latent_trajectory import LatentTrajectory, load_latents, save_latents
from rollouts.samplers.latent_options import LatentSamplerOptions
from rollouts.search.latents import LatentSampler


class ImagesModality(ImagesPlan):
    """See `rl.modalities.base.Modality`. A completion is a uint8 array [H, W, C], None for a failed sample: one whose
    latents or decoded image are not finite.

    The task may have `features(images)` and `real_images()`; sets of samples are then compared with real ones.
    """

    def __init__(self, config: Config, task: Any):
        super().__init__(config, task)
        # Decoding needs no trained weights, so any copy of the policy serves.
        self._policy: Any = None

    def load_model(self, path: str | None = None) -> Any:
        config = self.config.model
        path = path or config.path
        with about("model.backbone" if path is None else f"model.path {path!r}"):
            if path is not None and (Path(path) / NOISE_INDEX).is_file():
                policy: Any = NoisePolicy.from_pretrained(path, self._load)
            elif config.initial_noise == "learned":
                policy = self._noise_policy(path)
            else:
                policy = self._load(path)
        self._policy = self._policy or policy
        return policy.eval()

    def _load(self, path: str | None) -> Any:
        """The denoiser that `path` names, a new one without a path."""
        config = self.config.model
        if config.conditions and (path is None or not _is_class_policy(path)):
            raise ValueError("model.conditions are added to a trained model of the built-in kind: set model.path")
        if path is not None and not _is_class_policy(path):
            from rl.models.diffusers_load import load_diffusers_policy

            return load_diffusers_policy(path, config.pipeline, config.lora, self.config.run.seed)
        if config.pipeline != PipelineConfig():
            raise ValueError(
                "model.pipeline is for pipelines of diffusers: the built-in image model has no such options"
            )
        if config.lora.rank:
            raise ValueError("model.lora is for pipelines of diffusers: set model.lora.rank to 0")
        if path is not None:
            policy = ClassPolicy.from_pretrained(path)
            if config.conditions:
                policy.add_classes(config.conditions)
            return policy
        classes = getattr(self.task, "classes", None)
        if classes is None:
            raise ValueError("model.path is required: a new image model needs a task with classes")
        return new_policy(config.backbone, config.scheduler, classes, self.config.run.seed)

    def _noise_policy(self, path: str | None) -> NoisePolicy:
        if path is None:
            raise ValueError("model.initial_noise learned freezes the denoiser: set model.path to a trained one")
        prompts = getattr(self.task, "prompts", None) or getattr(self.task, "classes", None)
        if prompts is None:
            raise ValueError("model.initial_noise learned needs a task that lists its prompts (`prompts` or `classes`)")
        # A folder is remembered by its full path: the Gaussians must find it from wherever they are loaded.
        return NoisePolicy(self._load(path), prompts, str(Path(path).resolve()) if Path(path).is_dir() else path)

    def save_model(self, model: Any, path: str | Path) -> None:
        model.save_pretrained(path)

    def engine(self, model: Any, options: LatentSamplerOptions, device: torch.device) -> LatentEngine:
        return LatentEngine(model, options, self.config.rollout.max_batch_size, device)

    def completions(self, trajectories: Sequence[LatentTrajectory]) -> list[np.ndarray | None]:
        images = self._images([t.latents[-1] for t in trajectories])
        return [None if t.failed else image for t, image in zip(trajectories, images, strict=True)]

    def search_sampler(self, engine: LatentEngine, rows: Sequence[Example]) -> Any:
        return LatentSampler(engine, [row["prompt"] for row in rows])

    def soft_reward(self, run: Any) -> Any:
        reward = PixelReward(run)
        return lambda latents, rows: reward(run.model.decode(latents), rows)

    def save_trajectories(self, path: Path, trajectories: Sequence[LatentTrajectory]) -> None:
        save_latents(path, trajectories)

    def load_trajectories(self, path: Path) -> list[LatentTrajectory]:
        return load_latents(path)

    def supervised(
        self, model: Any, rows: Sequence[Example], part: slice, seed: Sequence[int]
    ) -> tuple[DenoisingRows, torch.Tensor]:
        """The simple loss, averaged over the batch."""
        if not hasattr(model, "latents_of"):
            raise ValueError("the sft stage trains the built-in image model alone: set sft.steps=0")
        if any("image" not in row for row in rows):
            raise ValueError("sft needs rows with an image column")
        latents = model.latents_of([row["image"] for row in rows])
        noised = denoising_rows(
            model, latents, [row["prompt"] for row in rows], part, self.config.sft.drop_condition, seed
        )
        return noised, torch.full((noised.num_rows,), 1.0 / len(rows), dtype=torch.float64)

    def measure(
        self, rows: Sequence[Example], completions: Sequence[np.ndarray | None], rewards: Sequence[float]
    ) -> dict[str, float]:
        """Fidelity and diversity in the task's features. Diversity within a prompt counts right images alone."""
        whole = [entry for entry in zip(rows, completions, rewards, strict=True) if entry[1] is not None]
        if not hasattr(self.task, "features") or len(whole) < 4:  # fewer have no manifold of 3 neighbours
            return {}
        rows, completions, rewards = zip(*whole, strict=True)
        images = self.task.real_images()
        # Sets of equal size: Fréchet distances and manifolds depend on it.
        size = min(len(images), len(completions))
        real, made = self.task.features(images[:size]), self.task.features(completions)
        prompts, right = [row["prompt"] for row in rows], [reward >= 1 for reward in rewards]
        manifold = precision_recall(real, made[:size])
        return {
            "precision": manifold.precision,
            "recall": manifold.recall,
            "frechet": frechet_distance(real, made[:size]),
            # As many images of every prompt as the rarest has, so that the scores of a run can be compared.
            "vendi": per_prompt(vendi_score, made, prompts, count=max(2, min(Counter(prompts).values())))[0],
            "vendi_correct": per_prompt(vendi_score, made, prompts, right, count=20)[0],
            "distance_correct": per_prompt(mean_pairwise_distance, made, prompts, right)[0],
        }

    def views(
        self, rows: Sequence[Example], trajectories: Sequence[LatentTrajectory], values: Sequence[float | None]
    ) -> list[dict[str, Any]]:
        """The finished images as data URLs, small: a report of photographs should open."""
        shown = [self.sample_line(image) for image in self.completions(trajectories)]
        return [{"image": i, "correct": (v or 0.0) >= 1.0} for i, v in zip(shown, values, strict=True)]

    def sample_line(self, completion: np.ndarray | None) -> str:
        return "" if completion is None else data_url(thumbnail(completion))

    @torch.no_grad()
    def _images(self, latents: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        """See `uint8_images`."""
        device = next(self._policy.parameters()).device
        images: list[np.ndarray | None] = []
        size = self.config.rollout.max_batch_size
        for start in range(0, len(latents), size):
            part = torch.from_numpy(np.stack(latents[start : start + size])).to(device)
            images += uint8_images(self._policy.decode(part))
        return images


def _is_class_policy(path: str) -> bool:
    index = Path(path) / INDEX
    return index.is_file() and json.loads(index.read_text()).get("_class_name") == CLASS_NAME
