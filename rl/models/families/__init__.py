"""Published model families, one short file each: how their config.json and their tensors translate into ours.

A family is a class with a few attributes; docs/models.md says how to add one. No torch at import.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rl.models.families.family import Family
from rl.registry import FAMILIES


def open_family(name: Any, key: str = FAMILIES.key) -> Family:
    """A family by its name or address.

    Args:
        key: the option that names it, for messages.

    Raises:
        ValueError: there is none, or the address leads to something else.
    """
    found = dataclasses.replace(FAMILIES, key=key).resolve(name)
    if not (isinstance(found, type) and issubclass(found, Family)):
        raise ValueError(f"{key} {name!r} is no subclass of rl.models.families.family.Family")
    return found()


def family_of(described: Mapping[str, Any], name: Any = None) -> Family | None:
    """The family that reads a config.json; None for a folder that we saved, and for any that no family reads.

    Args:
        name: `model.family`; None finds the family by the file's model_type.

    Raises:
        ValueError: see `open_family`.
    """
    if described.get("model_type") == "diffusion_lm":
        return None
    if name is not None:
        return open_family(name)
    return next((f for f in map(open_family, FAMILIES.names()) if f.reads(described)), None)
