"""How far a batch of images is from real ones: the maximum mean discrepancy of their features, with gradient.

Aiello et al. 2023, "Fast Inference in Denoising Diffusion Models via MMD Finetuning" (arXiv 2301.07969), by its code
(functions/losses.py): with k a kernel on features, x the B images of a batch and y the N real ones,

    MMD^2 = mean_{i != j} k(x_i, x_j) - 2 mean_ij k(x_i, y_j) + mean_{i != j} k(y_i, y_j).

Image i has the reward 2 mean_j k(x_i, y_j) - mean_{j != i} k(x_i, x_j) - mean_{i != j} k(y_i, y_j), so the mean over a
batch is -MMD^2. With recipe `alignprop`, all steps with gradient and few steps, this is the paper's fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rewards.address import load_address
from rewards.image import to_array

if TYPE_CHECKING:
    import torch


class MMD:
    """See the module. Images of a call are one batch, so a reward depends on what it is scored with.

    Args:
        images: real images: a `.npy` file (uint8 [N, H, W] or [N, H, W, C]), or the address of a function that gives
            such arrays (`rewards.digits:real_digits`).
        model: folder or hub name of a CLIP model whose image features are compared; None compares pixels.
        kernel: "rbf" is exp(-gamma |x - y|^2), "polynomial" (gamma x.y + 1)^degree; degree 1 is the paper's linear one.
        gamma: 1 / number of features by default.

    Raises:
        ValueError: fewer than two real images, or they cannot be read.
    """

    differentiable = True
    hub_params = ("model",)

    def __init__(
        self,
        images: str,
        model: str | None = None,
        kernel: Literal["rbf", "polynomial"] = "rbf",
        degree: int = 3,
        gamma: float | None = None,
        device: str | None = None,
    ) -> None:
        import torch

        if kernel not in ("rbf", "polynomial"):
            raise ValueError(f"reward 'mmd': kernel must be rbf or polynomial, got {kernel!r}")
        self.torch, self.kernel, self.degree, self.gamma = torch, kernel, degree, gamma
        self.clip: Any = None
        if model is not None:
            from rewards.clip_encoder import ClipEncoder

            self.clip = ClipEncoder("mmd", model, None, 32, device, "float32")
        real = np.load(images) if Path(images).is_file() else load_address(images, f"images {images!r}")()
        if len(real) < 2:
            raise ValueError(f"reward 'mmd': {images} holds {len(real)} images, it takes two or more")
        with torch.no_grad():
            self.real = self._features(self._tensors(list(real)))
            self.offset = float(self._others(self._gram(self.real, self.real)).mean())
        self.__name__ = "mmd"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        with self.torch.inference_mode():
            return self.on_tensors(prompts, self._tensors(completions)).tolist()

    def on_tensors(self, prompts: Sequence[Any], images: torch.Tensor, **columns: Any) -> torch.Tensor:
        """Rewards [B] of float images [B, C, H, W] in [0, 1], with gradients to them.

        Raises:
            ValueError: one image alone, which has no discrepancy.
        """
        if len(images) < 2:
            raise ValueError("reward 'mmd' compares a batch: raise train.micro_batch_size to 2 or more")
        made = self._features(images)
        return 2 * self._gram(made, self.real.to(made)).mean(1) - self._others(self._gram(made, made)) - self.offset

    def _tensors(self, images: Sequence[Any]) -> torch.Tensor:
        return self.torch.from_numpy(np.stack([to_array(image) for image in images])).permute(0, 3, 1, 2) / 255.0

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) if self.clip is None else self.clip.pixels(images)

    def _gram(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        gamma = 1 / one.shape[1] if self.gamma is None else self.gamma
        if self.kernel == "polynomial":
            return (gamma * one @ other.T + 1) ** self.degree
        square = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T
        return (-gamma * square).exp()

    @staticmethod
    def _others(gram: torch.Tensor) -> torch.Tensor:
        """[B]: mean of every row without its diagonal entry."""
        return (gram.sum(1) - gram.diagonal()) / (len(gram) - 1)
