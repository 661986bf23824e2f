"""Weights in safetensors folders: read without a copy too many, checked first, written in shards.

Do they fit the model? One line about the first that does not; nothing is filled in or left out in silence.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def check_weights(
    wanted: Shapes,
    found: Shapes,
    where: str,
    optional: Collection[str] = (),
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Compare what a model needs with what a file holds.

    Args:
        where: what the message begins with.
        optional: wanted names that may be missing.
        ignored: found names that may be left over.

    Raises:
        ValueError: see `refuse`.
    """
    refuse(
        where,
        [name for name in wanted if name not in found and name not in optional],
        [name for name in found if name not in wanted and not ignored(name)],
        [(name, found[name], wanted[name]) for name in wanted if name in found and found[name] != wanted[name]],
    )


def refuse(
    where: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    misshapen: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise ValueError about the first weight that is misshapen (name, found, wanted), missing or left over."""
    if misshapen:
        name, found, wanted = misshapen[0]
        raise ValueError(f"{where} does not fit its config: {name} has shape {list(found)} instead of {list(wanted)}")
    if missing:
        raise ValueError(f"{where} is incomplete: {len(missing)} weights are missing, {missing[0]} first")
    if unexpected:
        raise ValueError(
            f"{where} does not fit its config: {len(unexpected)} weights belong to no such model, {unexpected[0]} first"
        )


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Folder:
    """The safetensors of a folder, sharded or not; tensors are read one at a time.

    Attributes:
        shapes: of every tensor, by its name in the files.
        dtype: the narrowest type that holds all of them.
    """

    def __init__(self, path: Path):
        """
        Raises:
            ValueError: a shard of the index is missing, or a name appears twice.
            SafetensorError, OSError: a file is damaged.
        """
        from safetensors import safe_open

        index = path / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = sorted(file.name for file in path.glob("*.safetensors"))
        self.shapes: dict[str, tuple[int, ...]] = {}
        dtypes = set()
        self._files = [path / name for name in files]
        for file in self._files:
            if not file.is_file():
                raise ValueError(f"cannot be loaded: shard {file.name} is missing")
            with safe_open(file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    if name in self.shapes:
                        raise ValueError(f"cannot be loaded: {name} is in two files, {file.name} is the second")
                    part = handle.get_slice(name)
                    self.shapes[name] = tuple(part.get_shape())
                    kind = part.get_dtype()
                    if kind not in _DTYPES:
                        raise ValueError(f"cannot be loaded: {name} has type {kind}, only floating point is read")
                    dtypes.add(_DTYPES[kind])
        if not self.shapes:
            raise ValueError("cannot be loaded: it holds no tensors")
        self.dtype = functools.reduce(torch.promote_types, dtypes)

    @torch.no_grad()
    def copy_into(self, model: nn.Module, names: Mapping[str, str]) -> None:
        """Fill the model's weights, which must fit (see `check_weights`).

        Args:
            names: the model's name of every tensor that is to be read.
        """
        from safetensors import safe_open

        targets = model.state_dict()
        for file in self._files:
            with safe_open(file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    if name in names:
                        targets[names[name]].copy_(handle.get_tensor(name))


def write_weights(
    weights: Mapping[str, torch.Tensor], path: str | os.PathLike[str], shard_size: str | int = "5GB"
) -> None:
    """Write safetensors, with an index when there are several shards."""
    from huggingface_hub import save_torch_state_dict

    tensors: dict[str, Any] = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_torch_state_dict(tensors, str(path), max_shard_size=shard_size, metadata={"format": "pt"})
