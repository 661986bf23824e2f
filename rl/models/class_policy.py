"""The built-in image policy: a small class-conditional denoiser on pixels, with the scheduler it was trained on.

A folder of it is laid out as diffusers lays out a pipeline: `unet/` (any network called like a class-conditional
`UNet2DModel`; `UNet2DModel.from_pretrained(folder, subfolder="unet")` reads it), `scheduler/`, and `model_index.json`,
which also names the classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rl.models.pipelines import CACHED, CLASS_NAME, INDEX
from rollouts.model_protocol import Conditioning

_FLOW = "FlowMatchEulerDiscreteScheduler"


class ClassPolicy(nn.Module):
    """An `ImagePolicy` whose prompts are class names, or words spelled with them where the network has `num_letters`.

    Attributes:
        classes: names in the order of their labels; the label after the last is the null label of guidance. It also
            fills up words that are shorter than the network's places.
    """

    def __init__(self, unet: nn.Module, scheduler: Any, classes: Sequence[str]):
        super().__init__()
        self.unet, self.scheduler, self.classes = unet, scheduler, list(classes)
        config: Any = unet.config
        size = config.sample_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        self.latent_shape = (int(config.in_channels), int(height), int(width))
        if config.num_class_embeds != len(self.classes) + 1:
            raise ValueError(
                f"model.backbone num_class_embeds is {config.num_class_embeds}: {len(self.classes)} classes and the "
                f"null label need {len(self.classes) + 1}"
            )

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.get("prediction_type", "flow")

    @property
    def null_label(self) -> int:
        return len(self.classes)

    null_prompt = ""

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    @property
    def caches(self) -> tuple[str, ...]:
        """Values of `sampler.cache` `name` that the network can have."""
        return CACHED.get(type(self.unet).__name__, ())

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.latent_shape[1:]

    @property
    def image_channels(self) -> int:
        return self.latent_shape[0]

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        return {"num_inference_steps": num_inference_steps}

    def class_table(self) -> nn.Embedding:
        """The embedding of the classes, the null label in its last row.

        Raises:
            ValueError: a network that embeds its classes in another way.
        """
        tables = [
            m for m in self.unet.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == self.null_label + 1
        ]
        if len(tables) != 1:
            raise ValueError(
                "model.conditions and algorithm.name class_tokens need one embedding of the classes: "
                f"{type(self.unet).__name__} has {len(tables)}"
            )
        return tables[0]

    @torch.no_grad()
    def add_classes(self, conditions: Mapping[str, str]) -> None:
        """`model.conditions`: new class -> the class whose embedding it starts with. Classes that are there stay.

        Raises:
            ValueError: a class is to start as one that the model does not have.
        """
        new = {name: like for name, like in conditions.items() if name not in self.classes}
        wrong = next((name for name, like in new.items() if like not in self.classes), None)
        if wrong is not None:
            like = new[wrong]
            raise ValueError(f"model.conditions: {wrong!r} is to start as {like!r}, which is no class of the model")
        table = self.class_table()
        # The null label stays the last.
        rows = [*range(self.null_label), *(self.classes.index(like) for like in new.values()), self.null_label]
        table.weight, table.num_embeddings = nn.Parameter(table.weight[rows]), len(rows)
        self.classes += new
        unet: Any = self.unet
        unet.register_to_config(num_class_embeds=len(rows))

    def encode(self, prompts: Sequence[Any]) -> dict[str, torch.Tensor]:
        """`label`: int64 [B] of class names, or [B, num_letters] of words; "" is the null label everywhere.

        Example with the letters "act", 4 places and null label 3: "cat" -> [1, 0, 2, 3].

        Raises:
            ValueError: a prompt is not one of the classes, or not spelled with them.
        """
        config: Any = self.unet.config
        places = config.get("num_letters")
        if places is not None:
            for prompt in prompts:
                if len(prompt) > places or not set(prompt) <= set(self.classes):
                    letters = "".join(self.classes)
                    raise ValueError(f"prompt {prompt!r} is no word of at most {places} of the letters {letters}")
            rows = [[self.classes.index(c) for c in prompt] for prompt in prompts]
            return {"label": torch.tensor([row + [self.null_label] * (places - len(row)) for row in rows])}
        known = {name: label for label, name in enumerate(self.classes)} | {self.null_prompt: self.null_label}
        for prompt in prompts:
            if prompt not in known:
                raise ValueError(f"prompt {prompt!r} is not a class of the model: {', '.join(self.classes)}")
        return {"label": torch.tensor([known[prompt] for prompt in prompts], dtype=torch.int64)}

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        label = conditioning["label"]
        timesteps = timesteps.to(latents.dtype)
        if guidance_scale == 1:
            return self.unet(latents, timesteps, class_labels=label).sample
        return self.join(*self.halves(latents, timesteps, conditioning), guidance_scale)

    def join(self, without: torch.Tensor, given: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """See `GuidedPolicy`."""
        return without + guidance_scale * (given - without)

    def halves(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GuidedPolicy`."""
        label = conditioning["label"]
        both = torch.cat([torch.full_like(label, self.null_label), label])
        times = timesteps.to(latents.dtype).repeat(2)
        without, given = self.unet(latents.repeat(2, 1, 1, 1), times, class_labels=both).sample.chunk(2)
        return without, given

    def num_evaluations(self, guidance_scale: float) -> int:
        return 1 if guidance_scale == 1 else 2

    def latents_of(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """float32 [B, C, H, W] of uint8 images [H, W] or [H, W, C]."""
        stacked = torch.from_numpy(np.stack([image.reshape(*image.shape[:2], -1) for image in images]))
        return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents / 2 + 0.5).clamp(0, 1)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the folder that `from_pretrained` reads back with equal outputs."""
        root = Path(path)
        root.mkdir(parents=True, exist_ok=True)
        unet: Any = self.unet
        unet.save_pretrained(root / "unet")
        self.scheduler.save_pretrained(root / "scheduler")
        index = {
            "_class_name": CLASS_NAME,
            "unet": ["diffusers", type(unet).__name__],
            "scheduler": ["diffusers", type(self.scheduler).__name__],
            "classes": self.classes,
        }
        (root / INDEX).write_text(json.dumps(index, indent=2))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> ClassPolicy:
        """Read a folder of `save_pretrained`, in eval mode.

        Raises:
            ValueError: the folder is incomplete.
        """
        root = Path(path)
        index = json.loads((root / INDEX).read_text())
        for part in ("unet", "scheduler"):
            if not (root / part).is_dir():
                raise ValueError(f"model.path {str(path)!r} is incomplete: it has no folder {part!r}")
        if not any((root / "unet").glob("*.safetensors")):
            raise ValueError(f"model.path {str(path)!r} is incomplete: unet has no .safetensors weights")
        unet = network_class(index["unet"][1]).from_pretrained(root / "unet")
        scheduler = _diffusers_class(index["scheduler"][1]).from_pretrained(root / "scheduler")
        return cls(unet.eval(), scheduler, index["classes"])


def new_policy(
    backbone: Mapping[str, Any], scheduler: Mapping[str, Any], classes: Sequence[str], seed: int
) -> ClassPolicy:
    """A policy with weights drawn from `seed`.

    Args:
        backbone: `model_type` (mlp_denoiser, word_denoiser, or a diffusers class such as UNet2DModel) and arguments of
            that network.
        scheduler: `name` of a diffusers scheduler and its arguments; DDIM on a linear schedule by default, with an
            offset of 1 so that its last step keeps a density.

    Raises:
        ValueError: there is no such network or scheduler.
    """
    settings = dict(backbone)
    network = network_class(settings.pop("model_type", "mlp_denoiser"))
    name = scheduler.get("name", "DDIMScheduler")
    kind = _diffusers_class(name)
    given = {key: value for key, value in scheduler.items() if key != "name"}
    defaults: dict[str, Any] = (
        {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False} if name == "DDIMScheduler" else {}
    )
    torch.manual_seed(seed)
    unet = network(**{"num_class_embeds": len(classes) + 1, **settings})
    return ClassPolicy(unet.eval(), kind(**{**defaults, **given}), classes)


def network_class(name: str) -> Any:
    if name in ("mlp_denoiser", "MlpDenoiser"):
        from rl.models.mlp_denoiser import MlpDenoiser

        return MlpDenoiser
    if name in ("word_denoiser", "WordDenoiser"):
        from rl.models.word_denoiser import WordDenoiser

        return WordDenoiser
    return _diffusers_class(name)


def _diffusers_class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None:
        raise ValueError(f"diffusers has no class {name!r}: check model.backbone model_type and model.scheduler name")
    return found
