"""Checkpoints: a folder a step, never half there.

    checkpoints/step_12/hf/          the policy in Hugging Face format
                       /policy/     DeepSpeed's weights, optimizer and schedule, every rank's part
                       /complete.json   written when everything else is on disk
    checkpoints/latest              written last of all

Nothing random has state of its own here: data, masks and rollouts are functions of (seed, step), so a
step number is all the bookkeeping a bit-exact resume needs. On another number of ranks the optimizer's
parts are cut anew through a DeepSpeed universal checkpoint, made beside the folders and deleted after.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rl import distributed
from rl.files import write_folder, write_whole, writing
from rl.run_folder import FOLDER, checkpoint_steps, incomplete, model_folder
from rl.train.learner import STATE


class Saved(Protocol):
    """A learner, or anything else that a checkpoint holds a folder of.

    Attributes:
        stage: ZeRO stage its state is cut by; 0 when every number of ranks can read it.
    """

    stage: int

    def save_state(self, folder: Path) -> None: ...

    def load_state(self, folder: Path, universal: bool = False) -> None: ...


def save_checkpoint(
    run_dir: str | os.PathLike[str], step: int, learners: Mapping[str, Saved], save_model: Any, state: Any, keep: int
) -> None:
    """Write `step_N` and drop the oldest beyond `keep`. Every rank must call this.

    Args:
        learners: name -> learner (or other `Saved`); each saves its state in a sub-folder of that name.
        save_model: called on rank 0 with the path of the Hugging Face folder.
        state: JSON values to get back from `load_checkpoint`.
    """
    state = state | {"world_size": distributed.world_size()}
    root = Path(run_dir) / FOLDER
    folder = root / f"step_{step}"
    if distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_model(folder / "hf")
    distributed.barrier()
    for name, learner in learners.items():
        with writing(folder / name):
            learner.save_state(folder / name)
    distributed.barrier()
    if distributed.rank() == 0:
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        write_whole(folder / "complete.json", json.dumps({"step": step, "state": state, "files": files}, indent=1))
        write_whole(root / "latest", folder.name)
        for old in checkpoint_steps(root)[:-keep]:
            if old != step:
                shutil.rmtree(root / f"step_{old}")
    distributed.barrier()


def load_checkpoint(folder: Path, learners: Mapping[str, Saved]) -> tuple[int, dict[str, Any]]:
    """Put every learner back where it was.

    Returns:
        the step and the state given to `save_checkpoint`.

    Raises:
        ValueError: the folder is incomplete, or cannot be cut anew for this number of ranks.
    """
    problem = incomplete(folder)
    if problem:
        raise ValueError(f"checkpoint {folder} is incomplete: {problem}")
    manifest = json.loads((folder / "complete.json").read_text())
    saved = manifest["state"].get("world_size", distributed.world_size())
    cut_anew = [name for name, learner in learners.items() if saved != distributed.world_size() and learner.stage > 0]
    with _universal(folder, cut_anew) as universal:
        for name, learner in learners.items():
            learner.load_state((universal if name in cut_anew else folder) / name, universal=name in cut_anew)
    return manifest["step"], manifest["state"]


@contextlib.contextmanager
def _universal(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder with the named DeepSpeed states of a checkpoint in a form that any number of ranks can load.

    Rank 0 converts, and deletes the folder at the end. Every rank must enter and leave.
    """
    target = folder.with_name("universal.partial")
    problem = ""
    if names and distributed.rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        for name in names:
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            folders = ["--input_folder", str(folder / name / STATE), "--output_folder", str(target / name / STATE)]
            done = subprocess.run([*command, *folders], capture_output=True, text=True)
            if done.returncode:
                problem = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
                break
    problem = distributed.gather_objects(problem)[0]
    if problem:
        raise ValueError(
            f"checkpoint {folder} was written by another number of ranks and is not convertible: {problem}"
        )
    try:
        yield target
    finally:
        distributed.barrier()
        if names and distributed.rank() == 0:
            shutil.rmtree(target)


def export_policy(source: str | os.PathLike[str], output: str | os.PathLike[str], layout: str | None = None) -> Path:
    """Copy the Hugging Face folder of a checkpoint, or of a run's newest one, or convert it; adapters are merged.

    Args:
        source: run folder, checkpoint folder or model folder.
        layout: a published layout (`rl.models.families`); None keeps ours.

    Raises:
        ValueError: there is no complete checkpoint, the output exists, or the model does not fit the layout.
    """
    hf = Path(source)
    if not (hf / "config.json").is_file():
        hf = Path(model_folder(str(source)))
        if not hf.is_relative_to(source) or hf == Path(source):
            raise ValueError(f"{source} holds no model and no complete checkpoint")
    target = Path(output)
    if target.exists():
        raise ValueError(f"{target} exists: name a new folder")
    if layout is None and not (hf / "adapter_config.json").is_file():
        return write_folder(target, lambda partial: shutil.copytree(hf, partial))
    from rl.models.export import convert_folder

    return write_folder(target, lambda partial: convert_folder(hf, partial, layout))
