"""Images before a run: how many forwards a rollout takes, and what memory it needs. No torch at import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rl.errors import about
from rl.modalities.base import Modality
from rl.models.pipelines import check_cache, check_folder
from rollouts.samplers.latent_options import LatentSamplerOptions

if TYPE_CHECKING:
    from rl.config import Config
    from rl.modalities.memory import ModelMemory
    from rl.tasks.base import Example, Task


class ImagesPlan(Modality):
    """What is known of an image run without a model; `rl.modalities.images.ImagesModality` runs it."""

    name = "images"
    Options = LatentSamplerOptions
    runner = "rl.modalities.images:ImagesModality"

    @classmethod
    def check(cls, config: Config, task: Task, rows: Sequence[Example]) -> None:
        super().check(config, task, rows)
        if config.model.path is not None:
            with about(f"model.path {config.model.path!r}"):
                check_folder(config.model.path, config.sampler.kind, config.sampler.cache)
        else:
            check_cache(config.model.backbone.get("model_type", "mlp_denoiser"), config.sampler.cache)

    @classmethod
    def forwards(cls, config: Config) -> tuple[float, bool]:
        return config.sampler.num_inference_steps, config.sampler.guidance_scale != 1

    @classmethod
    def memory(cls, config: Config, ranks: int, prompt_length: int, half: bool) -> ModelMemory:
        from rl.modalities.image_memory import image_memory

        return image_memory(config, ranks, half)
