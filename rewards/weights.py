"""Loading checkpoints, and saying in one line why one cannot be had."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def load_error(reward: str, what: str, error: Exception) -> ValueError:
    """One line for a checkpoint that cannot be had: most often a download where there is no network."""
    return ValueError(
        f"reward '{reward}': cannot load {what}: {first_line(error)} "
        f"(a hub name is downloaded once; without a network give a folder)"
    )


def load_weights(reward: str, path: str) -> dict[str, torch.Tensor]:
    """A state dict from `.safetensors`, or from a torch file without running code in it.

    Raises:
        ValueError: the file is missing or unreadable.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        import torch

        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, ValueError) as error:
        raise ValueError(f"reward '{reward}': cannot read weights {path}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of a message, or the kind of error where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")
