"""A vision tower in front of a diffusion decoder: the embeddings of images in prompts.

The form is LLaVA's (Liu et al. 2023, arXiv 2310.03744), which LLaDA-V, SDAR-VL and DiffusionVL have too: a vision model
of transformers (SigLIP, CLIP, ViT), a projector of two linear layers, and its outputs in place of the embeddings of the
image's tokens. The decoder sees them as any other tokens of the prompt. `rl/tasks/prompt_images.py` says how a token
id stands for a place of an image.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModel

from rl.models.folder import new_vision
from rl.tasks.prompt_images import FIRST_IMAGE_ID, key_and_place, pixels_of


class Vision(nn.Module):
    """Tower and projector.

    Attributes:
        settings: `DiffusionLMConfig.vision`: `tower` (its transformers config), `placeholder`, `num_tokens`, `layer`
            (of the tower's hidden states that is projected, -1 for the last), and `mean`, `std` of the pixels.
    """

    def __init__(self, settings: dict[str, Any], width: int):
        """
        Args:
            width: of the decoder.
        """
        super().__init__()
        self.settings = settings
        described = {**settings["tower"], "vision_use_head": False}
        config = AutoConfig.for_model(**described)
        self.tower = AutoModel.from_config(config, attn_implementation="sdpa")
        if getattr(self.tower, "pooler", None) is not None:
            self.tower.pooler = None
        self.size = int(config.image_size)
        self.channels = int(config.num_channels)
        self.projector = nn.Sequential(nn.Linear(config.hidden_size, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[U, P, D] of U images [U, C, S, S], normalised."""
        layer = self.settings["layer"]
        output = self.tower(pixel_values=pixels, output_hidden_states=layer != -1)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        # A class token stands before the patches.
        return self.projector(states[:, -self.settings["num_tokens"] :])

    def embed(self, input_ids: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """[B, Q, D]: the embeddings of tokens, and the tower's outputs where an id stands for a place of an image."""
        pictured = input_ids >= FIRST_IMAGE_ID
        embeds = embedding(input_ids.masked_fill(pictured, 0))
        key, place = key_and_place(input_ids[pictured])
        if not len(key):
            if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
                # Every rank's backward reaches the tower's weights, also of a micro-batch without images.
                embeds = embeds + 0 * self(self.normalised([np.zeros((1, 1, 3), np.uint8)])).sum()
            return embeds
        distinct, index = key.unique(return_inverse=True)
        states = self(self.normalised([pixels_of(own) for own in distinct.tolist()]))
        return embeds.index_put((pictured,), states[index, place].to(embeds.dtype))

    def normalised(self, images: list[np.ndarray]) -> torch.Tensor:
        """Images uint8 [H, W, 3] as the tower takes them: of its size, grey for one channel, mean 0."""
        shape = (self.size, self.size)
        pictures = [Image.fromarray(image) for image in images]
        if self.channels == 1:
            pictures = [picture.convert("L") for picture in pictures]
        scaled = [
            picture if picture.size == shape else picture.resize(shape, Image.Resampling.BICUBIC)
            for picture in pictures
        ]
        weight = next(self.parameters())
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in scaled])).to(weight) / 255
        pixels = pixels.reshape(len(images), *shape, self.channels).movedim(3, 1)
        mean, std = (torch.tensor(self.settings[name]).to(weight).reshape(-1, 1, 1) for name in ("mean", "std"))
        return (pixels - mean) / std


def add_vision(model: Any, options: Any, seed: int) -> None:
    """Put a tower, new or from a folder, and a new projector in front of a decoder; one that has them keeps them.

    Raises:
        ValueError: the model cannot have one, or has another one; or the folder holds none.
    """
    if not hasattr(model, "vision"):
        raise ValueError(f"model.vision is for decoders, and model.path is a {type(model).__name__}: leave it out")
    settings = new_vision(options)
    if model.vision is not None:
        if json.loads(json.dumps(settings["tower"])) != json.loads(json.dumps(model.vision.settings["tower"])):
            raise ValueError("model.vision: the model in model.path has another vision tower than this: leave it out")
        return
    torch.manual_seed(seed)
    model.vision = Vision(settings, model.hidden_size).to(model.dtype).eval()
    model.config.vision = settings
    if options.path is not None:
        trained = AutoModel.from_pretrained(options.path, dtype=model.dtype)
        trained = getattr(trained, "vision_model", trained)
        wanted, found = model.vision.tower.state_dict(), trained.state_dict()
        missing = next((name for name in wanted if name not in found), None)
        if missing is not None:
            raise ValueError(f"model.vision.path {options.path!r} has no {missing}: name the folder of a vision tower")
        model.vision.tower.load_state_dict({name: found[name] for name in wanted})
