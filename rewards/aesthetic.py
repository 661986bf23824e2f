"""The LAION aesthetic predictor: a linear head on CLIP ViT-L/14 image embeddings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.clip_encoder import ClipEncoder
from rewards.weights import load_weights

if TYPE_CHECKING:
    import torch

HEAD = "sac+logos+ava1-l14-linearMSE.pth"


class Aesthetic:
    """Predicted rating, about 1 to 10, of the image alone; the prompt plays no part.

    The published head is a chain of linear layers without activations (768, 1024, 128, 64, 16, 1), trained with dropout
    on L2-normalised embeddings; any chain of that kind is read.

    Args:
        head: path of the head's weights (`.pth` or `.safetensors`); the published one is called
            sac+logos+ava1-l14-linearMSE.pth (christophschuhmann/improved-aesthetic-predictor, 3.7 MB).
        model: folder or hub name of the CLIP model the head was trained on.
        processor: folder or hub name of its image processor; by default the model's.
        batch_size: images per forward.
        device: torch device; by default the GPU when there is one.
        dtype: torch dtype name of the CLIP weights.

    Raises:
        ValueError: when head or model cannot be loaded, or do not fit together.
    """

    differentiable = True
    hub_params = ("model", "processor")

    def __init__(
        self,
        head: str,
        model: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        batch_size: int = 32,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        self.layers = _read_head(head)
        self.clip = ClipEncoder("aesthetic", model, processor, batch_size, device, dtype)
        width, wanted = self.clip.model.config.projection_dim, self.layers[0][0].shape[1]
        if width != wanted:
            raise ValueError(
                f"reward 'aesthetic': the head takes embeddings of {wanted}, model '{model}' gives {width}"
            )
        self.__name__ = "aesthetic"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return self._rate(self.clip.images(completions)).tolist()

    def on_tensors(self, prompts: Sequence[Any], images: torch.Tensor, **columns: Any) -> torch.Tensor:
        """Rewards [B] of float images [B, C, H, W] in [0, 1], with gradients to them."""
        return self._rate(self.clip.pixels(images))

    def _rate(self, features: torch.Tensor) -> torch.Tensor:
        for weight, bias in self.layers:
            features = features @ weight.T.to(features.device) + bias.to(features.device)
        return features[:, 0]


def _read_head(path: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if not Path(path).is_file():
        raise ValueError(f"reward 'aesthetic': no file {path}: download {HEAD} and set `head` to its path")
    state = load_weights("aesthetic", path)
    names = [name for name in state if name.endswith(".weight")]
    names.sort(key=lambda name: int("".join(filter(str.isdigit, name)) or -1))
    layers = [(state[name].float(), state[name.replace(".weight", ".bias")].float()) for name in names]
    shapes = [tuple(weight.shape) for weight, _ in layers]
    if not layers or shapes[-1][0] != 1 or any(a[0] != b[1] for a, b in itertools.pairwise(shapes)):
        raise ValueError(f"reward 'aesthetic': {path} is no chain of linear layers that ends in one output: {shapes}")
    return layers
