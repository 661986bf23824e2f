"""Weights in safetensors folders: checked first, read tensor by tensor, written shard by shard.

One line names the first weight that does not fit the model; nothing is filled in or left out in silence.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rl.models.families.family import Family, Part
from rl.models.rotary import EXACT

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


class Piece(NamedTuple):
    """A tensor of a file, or one of those that it joins along its first axis: part `at` of a tensor in memory."""

    name: str
    at: Any
    shape: tuple[int, ...]
    num_bytes: int


# Name in the file -> its pieces, in order.
Layout = Mapping[str, Sequence[Piece]]


def lay_out(weights: Mapping[str, torch.Tensor], family: Family | None) -> dict[str, list[Piece]]:
    """The layout of the files of a model with these weights; values do not matter.

    Args:
        family: None for our own layout, in which every tensor stands under its name.

    Raises:
        ValueError: the family has no place for a tensor or a part of one, or leaves a piece of a file out.
    """
    found: dict[str, dict[int, Piece]] = {}
    for name, tensor in weights.items():
        places = {name: Part()} if family is None else family.places(name, tuple(tensor.shape))
        parts = {theirs: tensor[part.at] for theirs, part in places.items()}
        # Two parts that begin at the same number overlap.
        distinct = {part.storage_offset(): part.numel() for part in parts.values()}
        if len(distinct) < len(parts) or sum(distinct.values()) != tensor.numel() or not parts:
            what = f"all of {name} {list(tensor.shape)}" if parts else name
            raise ValueError(f"the {family.name if family else 'own'} layout has no place for {what}")
        for theirs, (at, number) in places.items():
            part = parts[theirs]
            found.setdefault(theirs, {})[number] = Piece(name, at, tuple(part.shape), part.nbytes)
    for theirs, pieces in found.items():
        if sorted(pieces) != list(range(len(pieces))):
            raise ValueError(f"the layout of {theirs} has pieces {sorted(pieces)}: they must be numbered from 0")
    return {theirs: [pieces[i] for i in range(len(pieces))] for theirs, pieces in found.items()}


def shapes_in_file(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shapes of the file's tensors. Example: pieces [16, 8], [4, 8] and [4, 8] -> [24, 8]."""
    return {
        name: pieces[0].shape if len(pieces) == 1 else (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
        for name, pieces in layout.items()
    }


class Folder:
    """The safetensors of a folder, sharded or not; tensors are read one at a time.

    Attributes:
        shapes: of every tensor, by its name in the files.
        dtype: the narrowest type that holds all of them but those that stay in float32 (`rl.models.rotary.EXACT`).
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
                    if not name.endswith((*EXACT, "expert_bias")):
                        dtypes.add(_DTYPES[kind])
        if not self.shapes:
            raise ValueError("cannot be loaded: it holds no tensors")
        self.dtype = functools.reduce(torch.promote_types, dtypes)

    @torch.no_grad()
    def copy_into(self, model: nn.Module, layout: Layout) -> None:
        """Fill the model's weights, which must fit (see `check_weights`)."""
        from safetensors import safe_open

        targets = model.state_dict()
        for file in self._files:
            with safe_open(file, "pt") as handle:
                for name in layout.keys() & handle.keys():
                    pieces, tensor = layout[name], handle.get_tensor(name)
                    chunks = [tensor] if len(pieces) == 1 else tensor.split([piece.shape[0] for piece in pieces])
                    for piece, chunk in zip(pieces, chunks, strict=True):
                        targets[piece.name][piece.at].copy_(chunk)


def write_weights(
    weights: Mapping[str, torch.Tensor],
    layout: Layout,
    path: str | os.PathLike[str],
    shard_size: str | int = "5GB",
) -> None:
    """Write safetensors, with an index when there are several shards. At most one shard is copied at a time.

    Args:
        weights: in memory; may compute a tensor when asked for it.
        layout: of the file.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    sizes = {name: sum(piece.num_bytes for piece in pieces) for name, pieces in layout.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    Path(path).mkdir(parents=True, exist_ok=True)
    for file, names in split.filename_to_tensors.items():
        # Without a name for the shard, it is gone before the next is computed.
        save_file({n: _gathered(weights, layout[n]) for n in names}, Path(path) / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (Path(path) / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _gathered(weights: Mapping[str, torch.Tensor], pieces: Sequence[Piece]) -> torch.Tensor:
    """One tensor of the file. No two share memory, which safetensors refuses."""
    first = pieces[0]
    if len(pieces) > 1:
        return torch.cat([weights[piece.name][piece.at] for piece in pieces])
    whole = weights[first.name]
    part = whole[first.at]
    return part.contiguous() if part.shape == whole.shape else part.clone()
