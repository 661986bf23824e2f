"""A small diffusion transformer that writes the letters it is told, in diffusers' format.

Patches of the image and the letters of the prompt are one sequence (DiT's in-context conditioning, Peebles and Xie
2023, arXiv 2212.09748, section 3.2); the time is added to all of it.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn


class WordDenoiser(ModelMixin, ConfigMixin):
    """Called like a class-conditional `UNet2DModel`, with `num_letters` labels per image: (sample, timestep,
    class_labels) -> `.sample`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: tuple[int, int] = (16, 32),
        in_channels: int = 1,
        patch_size: int = 8,
        width: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        num_letters: int = 4,
        num_class_embeds: int = 13,
    ):
        """
        Args:
            sample_size: height and width, multiples of `patch_size`.
            num_letters: places of a word; a shorter one ends with null labels.
            num_class_embeds: letters, and the null label.
        """
        super().__init__()
        self.grid = (sample_size[0] // patch_size, sample_size[1] // patch_size)
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.letters = nn.Embedding(num_class_embeds, width)
        self.place = nn.Parameter(0.1 * torch.randn(self.grid[0] * self.grid[1] + num_letters, width))
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(width, num_heads, width // num_heads, activation_fn="gelu") for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, in_channels * patch_size**2)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> UNet2DOutput:
        """
        Args:
            sample: [B, C, H, W].
            timestep: [B], in 0..1000.
            class_labels: int64 [B, num_letters].
        """
        (rows, columns), patch = self.grid, self.config["patch_size"]
        seen = self.patches(sample).flatten(2).transpose(1, 2)
        hidden = torch.cat([seen, self.letters(class_labels)], dim=1) + self.place
        hidden = hidden + self.time(get_timestep_embedding(timestep, 64).to(sample.dtype))[:, None]
        for block in self.transformer_blocks:
            hidden = block(hidden)
        pixels = self.out(self.norm(hidden[:, : rows * columns]))
        pixels = pixels.reshape(len(sample), rows, columns, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
        return UNet2DOutput(sample=pixels.reshape(sample.shape))
