"""Versions of the weights as folders on a disk that servers see: `version_7`, and `current`, a link to the newest."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from rollouts.engines.base import WeightPushError, WeightSource


def version_folder(weights_dir: Path, version: int) -> Path:
    return weights_dir.absolute() / f"version_{version}"


def current_folder(weights_dir: Path) -> Path:
    """The link that servers load when they are started anew."""
    return weights_dir.absolute() / "current"


def write_version(weights_dir: Path, version: int, source: WeightSource) -> None:
    """Write a version, link `current` to it and remove older ones; both appear whole or not at all.

    Raises:
        WeightPushError: `current` is a folder of somebody's.
    """
    folder, current = version_folder(weights_dir, version), current_folder(weights_dir)
    partial = folder.with_name(folder.name + ".partial")
    if current.exists() and not current.is_symlink():
        raise WeightPushError(f"{current} is in the way: it must be a link to a folder, not one itself")
    for left in (partial, folder):
        shutil.rmtree(left, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    source.save(partial)
    partial.rename(folder)
    link = folder.with_name("current.partial")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.rename(current)
    for old in weights_dir.iterdir():
        if re.fullmatch(r"version_\d+(\.partial)?", old.name) and old.name != folder.name:
            shutil.rmtree(old)
