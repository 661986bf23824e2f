"""Loading checkpoints, and saying in one line why one cannot be had."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def load_error(reward: str, what: str, error: Exception) -> ValueError:
    """One line for a checkpoint that cannot be had: most often a download where there is no network."""
    return ValueError(
        f"reward '{reward}': cannot load {what}: {first_line(error)} "
        f"(a hub name is downloaded once; without a network give a folder)"
    )


def hub_names(reward: Any, params: Mapping[str, Any]) -> list[str]:
    """What loading a reward downloads, unless the machine has it already: hub names, or a package's checkpoint.

    Args:
        reward: its class. `hub_params` names the parameters that take a folder or a hub name, `checkpoint` what stands
            for those that are None, and `hub_package` the package that has a model of its own where `model` is None.
    """
    if getattr(reward, "hub_package", "") and not params.get("model"):
        return [f"the checkpoint of the package {reward.hub_package}"]
    names = getattr(reward, "hub_params", ())
    published = dict(zip(names, getattr(reward, "checkpoint", ()), strict=False))
    given = [params.get(n) or inspect.signature(reward).parameters[n].default or published.get(n) for n in names]
    return [name for name in given if name and ":" not in name and not Path(name).exists()]


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
