"""HPSv2 and ImageReward: models of which of two images people prefer, through the packages that publish them.

Both packages download their checkpoint on first use, and neither runs here without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.clip_score import ClipScore
from rewards.image import to_pil
from rewards.text import text_of
from rewards.weights import first_line


class Hpsv2(ClipScore):
    """HPSv2 (Wu et al. 2023): cosine of image and prompt under a CLIP-H fine-tuned on preferences.

    Args:
        model: folder or hub name of the weights in Hugging Face's CLIP layout; null uses the package `hpsv2`.
        processor: folder or hub name of tokenizer and image processor; by default the model's.
        version: of the package's checkpoint, "v2.0" or "v2.1".
        batch_size, device, dtype: of a model in CLIP layout.

    Raises:
        ValueError: there is neither a model nor the package.
    """

    name = "hpsv2"
    hub_package = "hpsv2"

    def __init__(
        self,
        model: str | None = None,
        processor: str | None = None,
        version: str = "v2.1",
        batch_size: int = 32,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        self.package: Any = None
        self.version = version
        self.__name__ = self.name
        if model is not None:
            super().__init__(model, processor, 1.0, batch_size, device, dtype)
            return
        self.differentiable = False
        try:
            import hpsv2
        except ImportError as error:
            raise ValueError(
                "reward 'hpsv2' needs its package and a download of its checkpoint (pip install hpsv2), or `model`: "
                f"the weights in Hugging Face's CLIP layout ({error})"
            ) from error
        self.package = hpsv2

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Any]:
        if self.package is None:
            return list(super().__call__(prompts, completions))
        pairs = zip(prompts, completions, strict=True)
        return [
            float(self.package.score([to_pil(image).convert("RGB")], text_of(prompt), hps_version=self.version)[0])
            for prompt, image in pairs
        ]


class ImageReward:
    """ImageReward (Xu et al. 2023): a BLIP fine-tuned on rankings, normalised to mean 0 and deviation 1 on its data.

    Args:
        model: name the package knows, or path of the checkpoint `ImageReward.pt`.
        med_config: path of the checkpoint's `med_config.json`; null downloads it.
        device: torch device; null leaves the choice to the package.

    Raises:
        ValueError: the package is missing or its checkpoint cannot be loaded.
    """

    hub_package = "image-reward"

    def __init__(
        self, model: str = "ImageReward-v1.0", med_config: str | None = None, device: str | None = None
    ) -> None:
        self.__name__ = "image_reward"
        options = {"device": device} if device else {}
        try:
            import ImageReward as package

            self.model = package.load(model, med_config=med_config, **options)
        except (ImportError, OSError, RuntimeError) as error:
            raise ValueError(
                f"reward 'image_reward' needs its package and a download of its checkpoint (pip install image-reward): "
                f"{first_line(error)}"
            ) from error

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [
            float(self.model.score(text_of(prompt), to_pil(image).convert("RGB")))
            for prompt, image in zip(prompts, completions, strict=True)
        ]
