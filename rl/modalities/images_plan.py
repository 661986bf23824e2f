"""Images before a run: how many forwards a rollout takes, and what memory it needs. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl.modalities.base import Modality
from rollouts.samplers.latent_options import LatentSamplerOptions

if TYPE_CHECKING:
    from rl.config import Config
    from rl.modalities.memory import ModelMemory


class ImagesPlan(Modality):
    """What is known of an image run without a model; `rl.modalities.images.ImagesModality` runs it."""

    name = "images"
    Options = LatentSamplerOptions
    runner = "rl.modalities.images:ImagesModality"

    @classmethod
    def forwards(cls, config: Config) -> tuple[float, bool]:
        return config.sampler.num_inference_steps, config.sampler.guidance_scale != 1

    @classmethod
    def memory(cls, config: Config, ranks: int, prompt_length: int, half: bool) -> ModelMemory:
        from rl.modalities.image_memory import image_memory

        return image_memory(config, ranks, half)
