"""Do weights fit a model? One line about the first that does not; nothing is filled in or left out in silence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

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
