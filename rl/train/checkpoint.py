"""Checkpoints: a folder a step, never half there.

    checkpoints/step_12/hf/          the policy in Hugging Face format
                       /policy/     DeepSpeed's weights, optimizer and schedule, every rank's part
                       /complete.json   written when everything else is on disk
    checkpoints/latest              written last of all

Nothing random has state of its own here: data, masks and rollouts are functions of (seed, step), so a
step number is all the bookkeeping a bit-exact resume needs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl.train import distributed
from rl.train.learner import Learner

FOLDER = "checkpoints"


def save_checkpoint(
    run_dir: str | os.PathLike[str],
    step: int,
    learners: Mapping[str, Learner],
    save_model: Any,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `step_N` and drop the oldest beyond `keep`. Every rank must call this.

    Args:
        learners: name -> learner; each saves its DeepSpeed state in a sub-folder of that name.
        save_model: called on rank 0 with the path of the Hugging Face folder.
        state: JSON values to get back from `load_checkpoint`.
    """
    root = Path(run_dir) / FOLDER
    folder = root / f"step_{step}"
    if distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_model(folder / "hf")
    distributed.barrier()
    for name, learner in learners.items():
        learner.engine.save_checkpoint(str(folder / name), tag="state", client_state={"updates": learner.updates})
    distributed.barrier()
    if distributed.rank() == 0:
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        _write(folder / "complete.json", json.dumps({"step": step, "state": state, "files": files}, indent=1))
        _write(root / "latest", folder.name)
        for old in _steps(root)[:-keep]:
            if old != step:
                shutil.rmtree(root / f"step_{old}")
    distributed.barrier()
    return folder


def find_checkpoint(run_dir: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and a line about every one that was passed over."""
    root = Path(run_dir) / FOLDER
    notes: list[str] = []
    for step in reversed(_steps(root)):
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


def load_checkpoint(folder: Path, learners: Mapping[str, Learner]) -> tuple[int, dict[str, Any]]:
    """Put every learner back where it was.

    Returns:
        the step and the state given to `save_checkpoint`.

    Raises:
        ValueError: the folder is incomplete, or was written by another number of ranks.
    """
    problem = incomplete(folder)
    if problem:
        raise ValueError(f"checkpoint {folder} is incomplete: {problem}")
    manifest = json.loads((folder / "complete.json").read_text())
    saved = manifest["state"].get("world_size")
    if saved is not None and saved != distributed.world_size():
        raise ValueError(
            f"checkpoint {folder} was written by {saved} ranks and this run has {distributed.world_size()}: "
            "start as many ranks"
        )
    for name, learner in learners.items():
        path, client = learner.engine.load_checkpoint(str(folder / name), tag="state")
        assert path is not None, f"DeepSpeed found no state in {folder / name}"
        learner.updates = client["updates"]
    return manifest["step"], manifest["state"]


def export_policy(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Copy the Hugging Face folder of a checkpoint, or of a run's newest one.

    Raises:
        ValueError: there is no complete checkpoint, or the output exists.
    """
    folder: Path | None = Path(source)
    if not (Path(source) / "complete.json").exists():
        folder, notes = find_checkpoint(source)
        if folder is None:
            raise ValueError(f"{source} holds no complete checkpoint" + "".join(f"; {note}" for note in notes))
    assert folder is not None
    problem = incomplete(folder)
    if problem:
        raise ValueError(f"checkpoint {folder} is incomplete: {problem}")
    target = Path(output)
    if target.exists():
        raise ValueError(f"{target} exists: name a new folder")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder / "hf", partial)
    os.replace(partial, target)
    return target


def _steps(root: Path) -> list[int]:
    names = [path.name for path in root.glob("step_*") if path.is_dir()]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
