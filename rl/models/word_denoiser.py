"""A small diffusion transformer that writes the letters it is told, in diffusers' format.

A patch of the image is one token. The time is added to all of them. What the letters at all places of the word mean for
a patch is added to that patch, from a table. (Letters as tokens of their own, DiT's in-context conditioning, were tried
first: after 1,200 updates of 128 images they were not heeded.)
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
        self.num_patches = self.grid[0] * self.grid[1]
        self.letters = nn.Embedding(num_letters * num_class_embeds, self.num_patches * width)
        nn.init.normal_(self.letters.weight, std=0.3)
        self.place = nn.Parameter(0.3 * torch.randn(self.num_patches, width))
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
        offset = self.config["num_class_embeds"] * torch.arange(self.config["num_letters"], device=class_labels.device)
        word = self.letters(class_labels + offset).sum(1).unflatten(1, (self.num_patches, -1))
        hidden = self.patches(sample).flatten(2).transpose(1, 2) + self.place + word
        hidden = hidden + self.time(get_timestep_embedding(timestep, 64).to(sample.dtype))[:, None]
        for block in self.transformer_blocks:
            hidden = block(hidden)
        pixels = self.out(self.norm(hidden))
        pixels = pixels.reshape(len(sample), rows, columns, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
        return UNet2DOutput(sample=pixels.reshape(sample.shape))
