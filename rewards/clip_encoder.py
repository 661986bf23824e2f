"""Image and text embeddings of a CLIP model, shared by the rewards built on one. Imports torch when constructed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewards.hf_tokenizer import load_tokenizer
from rewards.image import to_pil
from rewards.weights import load_error

if TYPE_CHECKING:
    import torch


class ClipEncoder:
    """A `CLIPModel` in Hugging Face layout, with L2-normalised embeddings.

    Args:
        reward: name of the reward, for messages.
        model: folder or hub name of the weights.
        processor: folder or hub name of tokenizer and image processor; by default the model's.
        batch_size: images or texts per forward.
        device: torch device; by default the GPU when there is one.
        dtype: torch dtype name of the weights.

    Raises:
        ValueError: when it cannot be loaded, or is no CLIP model.
    """

    def __init__(
        self,
        reward: str,
        model: str,
        processor: str | None = None,
        batch_size: int = 32,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoImageProcessor, CLIPModel

        try:
            config = AutoConfig.from_pretrained(model)
            if config.model_type != "clip":
                raise ValueError(f"reward '{reward}': {model!r} is a {config.model_type} model, not a CLIP model")
            loaded: Any = CLIPModel.from_pretrained(model, dtype=getattr(torch, dtype))
            self.tokenizer = load_tokenizer(processor or model)
            # Pillow's resizing: the same on every machine, whether or not torchvision is installed.
            self.processor = AutoImageProcessor.from_pretrained(processor or model, backend="pil")
        except OSError as error:
            raise load_error(reward, f"model '{model}'", error) from error
        self.torch = torch
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = loaded.to(self.device).eval().requires_grad_(False)
        self.batch_size = batch_size
        self.max_length = self.model.config.text_config.max_position_embeddings

    @property
    def logit_scale(self) -> float:
        """The factor on cosines that the model was trained with (about 100)."""
        return float(self.model.logit_scale.exp())

    def images(self, images: Sequence[Any]) -> torch.Tensor:
        """Embeddings of images, float32 [B, D] of length 1, on the CPU."""
        parts = []
        for start in range(0, len(images), self.batch_size):
            pictures = [to_pil(image).convert("RGB") for image in images[start : start + self.batch_size]]
            pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
            with self.torch.inference_mode():
                parts.append(self._embed(pixels).cpu())
        return self.torch.cat(parts)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings of float images [B, 1 or 3, H, W] in [0, 1], with gradients to them.

        Resizing is torch's antialiased one, so that values differ from `images` by the rounding to 8 bits.
        """
        from torch.nn import functional

        size, settings = self.processor.size, self.processor
        height, width = images.shape[-2:]
        if size.get("shortest_edge"):
            factor = size["shortest_edge"] / min(height, width)
            target = [int(height * factor), int(width * factor)]
        else:
            target = [size["height"], size["width"]]
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if target != [height, width]:
            images = functional.interpolate(images, target, mode="bicubic", antialias=True).clamp(0, 1)
        if settings.do_center_crop:
            rows, columns = settings.crop_size["height"], settings.crop_size["width"]
            top, left = (target[0] - rows) // 2, (target[1] - columns) // 2
            images = images[..., top : top + rows, left : left + columns]
        mean, std = (images.new_tensor(v)[:, None, None] for v in (settings.image_mean, settings.image_std))
        return self._embed((images - mean) / std)

    def texts(self, texts: Sequence[str]) -> tuple[torch.Tensor, list[bool]]:
        """Embeddings of texts, float32 [B, D] of length 1, on the CPU; and which texts were cut to fit the model."""
        cut = [len(ids) > self.max_length for ids in self.tokenizer(list(texts)).input_ids] if texts else []
        parts = []
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                list(texts[start : start + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            with self.torch.inference_mode():
                found = self.model.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
            parts.append(_normalised(found).cpu())
        return self.torch.cat(parts), cut

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return _normalised(self.model.get_image_features(pixels.to(self.device, self.model.dtype)))


def _normalised(found: Any) -> torch.Tensor:
    features = found if hasattr(found, "norm") else found.pooler_output
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)
