"""The folder of a run, read: its checkpoints, and the model that stands for it. No torch at import."""

from __future__ import annotations

import json
import os
from pathlib import Path

FOLDER = "checkpoints"


def find_checkpoint(run_dir: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and a line about every one that was passed over."""
    root = Path(run_dir) / FOLDER
    notes: list[str] = []
    for step in reversed(checkpoint_steps(root)):
        folder = root / f"step_{step}"
        problem = incomplete(folder)
        if problem is None:
            return folder, notes
        notes.append(f"checkpoint {folder} is passed over: {problem}")
    return None, notes


def incomplete(folder: Path) -> str | None:
    """What is missing from a checkpoint folder, or None when it is whole."""
    manifest = folder / "complete.json"
    if not manifest.is_file():
        return "complete.json is missing, so writing it was interrupted"
    try:
        files = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError, TypeError):
        return "complete.json is damaged"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def model_folder(path: str) -> str:
    """The model folder that a path stands for.

    A run folder stands for its newest complete checkpoint, and without checkpoints for the model of its supervised
    stage; a checkpoint folder stands for the policy in it. Any other path is returned as it is.

    Raises:
        ValueError: a run or checkpoint folder without a whole model.
    """
    folder = Path(path)
    if (folder / "complete.json").is_file() and (folder / "hf").is_dir():
        problem = incomplete(folder)
        if problem:
            raise ValueError(f"checkpoint {folder} is incomplete: {problem}")
        return str(folder / "hf")
    if not (folder / "config.yaml").is_file() and not (folder / FOLDER).is_dir():
        return path
    newest, notes = find_checkpoint(folder)
    if newest is not None:
        return str(newest / "hf")
    for name in ("model", "warm_start"):
        if (folder / name).is_dir() and not notes:
            return str(folder / name)
    raise ValueError(f"{path} holds no complete checkpoint" + "".join(f"; {note}" for note in notes))


def checkpoint_steps(root: Path) -> list[int]:
    """Steps that have a folder below `checkpoints`, ascending; whether they are complete is not looked at."""
    names = [path.name for path in root.glob("step_*") if path.is_dir()]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())
