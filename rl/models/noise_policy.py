"""A frozen image model with a learned Gaussian over the initial noise for every prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rl.models.pipelines import NOISE_INDEX
from rollouts.model_protocol import Conditioning

WEIGHTS = "initial_noise.safetensors"


class _Shared:
    """The model itself. Copies of a policy share it, since it is never trained."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class NoisePolicy(nn.Module):
    """An `ImagePolicy` and `LearnedNoise`. It begins as the model itself: means of 0, deviations of 1.

    Its only parameters are the Gaussians', so that a copy, a checkpoint or a ZeRO partition holds nothing else. A
    prompt that is not in the list starts from standard noise.
    """

    def __init__(self, model: Any, prompts: Sequence[str], source: str):
        """
        Args:
            model: an `ImagePolicy`; it is frozen.
            source: the folder or name it was loaded from, and will be loaded from again.
        """
        super().__init__()
        self.shared = _Shared(model.requires_grad_(False))
        self.prompts, self.source = list(prompts), source
        self.latent_shape, self.scheduler = model.latent_shape, model.scheduler
        self.mean = nn.Parameter(torch.zeros(len(self.prompts), *self.latent_shape))
        self.log_std = nn.Parameter(torch.zeros_like(self.mean))

    @property
    def prediction_type(self) -> str:
        return self.shared.model.prediction_type

    @property
    def denoiser(self) -> nn.Module:
        return self.shared.model.denoiser

    @property
    def caches(self) -> tuple[str, ...]:
        return self.shared.model.caches

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        return self.shared.model.schedule_options(num_inference_steps)

    def encode(self, prompts: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The model's conditioning, and each prompt's row in the table of Gaussians, -1 for none."""
        known = {prompt: row for row, prompt in enumerate(self.prompts)}
        rows = torch.tensor([known.get(prompt, -1) for prompt in prompts], dtype=torch.int64)
        return {**self._model(self.mean.device).encode(prompts), "noise_row": rows}

    def initial_noise(self, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LearnedNoise`; with gradient to the Gaussians."""
        row = conditioning["noise_row"]
        known = (row >= 0).reshape(-1, *[1] * len(self.latent_shape))
        mean, log_std = (table[row.clamp(min=0)] for table in (self.mean, self.log_std))
        zeros = torch.zeros_like(mean)
        return torch.where(known, mean, zeros), torch.where(known, log_std, zeros).exp()

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        given = {name: rows for name, rows in conditioning.items() if name != "noise_row"}
        return self._model(latents.device).predict(latents, timesteps, given, guidance_scale)

    def num_evaluations(self, guidance_scale: float) -> int:
        return self.shared.model.num_evaluations(guidance_scale)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._model(latents.device).decode(latents)

    def _model(self, device: torch.device) -> Any:
        return self.shared.model.to(device)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the Gaussians and the name of the model they belong to."""
        from safetensors.torch import save_file

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tables = {name: table.detach().cpu().float().contiguous() for name, table in self.named_parameters()}
        save_file(tables, folder / WEIGHTS)
        (folder / NOISE_INDEX).write_text(json.dumps({"base": self.source, "prompts": self.prompts}, indent=2))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], load: Callable[[str], Any]) -> NoisePolicy:
        """Read a folder of `save_pretrained`, in eval mode.

        Args:
            load: loads the model itself by its name.

        Raises:
            ValueError: the folder is incomplete.
        """
        from safetensors.torch import load_file

        index = json.loads((Path(path) / NOISE_INDEX).read_text())
        weights = Path(path) / WEIGHTS
        if not weights.is_file():
            raise ValueError(f"model.path {str(path)!r} is incomplete: {WEIGHTS} is missing")
        policy = cls(load(index["base"]), index["prompts"], index["base"])
        policy.load_state_dict(load_file(weights))
        return policy.eval()
