"""Whether a run can go on in its folder: the same settings, the same data, and nothing that would be lost."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rl.config import Config, load_config
from rl.run_folder import find_checkpoint
from rl.track.jsonl import read_metrics

# The fingerprints that a run began with.
DATA = "data.json"


def check_same_run(config: Config) -> None:
    """A run goes on with the settings and the data it began with; only where and how long it runs may change.

    Raises:
        ValueError: something else has changed, or starting over would delete steps that no checkpoint can continue.
    """
    run = Path(config.run.output_dir)
    _check_what_is_lost(run)
    if (run / DATA).is_file():
        began = json.loads((run / DATA).read_text())
        for option, (path, digest) in fingerprints(config).items():
            if began.get(option, [path, digest])[1] != digest:
                raise ValueError(
                    f"run.resume: {path} ({option}) is not the file that the run in {run} began with: put it back, or "
                    "choose another run.output_dir"
                )
    if not (run / "config.yaml").is_file():
        return
    before = load_config(run / "config.yaml")
    sampling = ("model", "task", "sampler", "rollout")
    corrected = config.rollout.asynchronous or config.rollout.quantize != "none"
    # Of the engine only what the numbers depend on: where rollouts are sampled may change.
    rollout = {"asynchronous", "cache", "quantize"} | ({"max_importance_weight"} if corrected else set())
    for section in (*sampling, "reward", "convert", "sft", "train", "filters", "algorithm"):
        old, now = (getattr(settings, section).model_dump() for settings in (before, config))
        free = set(now) - rollout if section == "rollout" else {"max_seconds", "steps"}
        key = next((name for name in now if name not in free and old.get(name) != now[name]), None)
        if key is not None:
            raise ValueError(
                f"run.resume: {section}.{key} is {now[key]!r} and the run in {config.run.output_dir} began with "
                f"{old.get(key)!r}: set it back, or choose another run.output_dir"
            )
    if before.run.seed != config.run.seed:
        raise ValueError(f"run.resume: run.seed is {config.run.seed} and the run began with {before.run.seed}")


def _check_what_is_lost(run: Path) -> None:
    if find_checkpoint(run)[0] is not None or not (run / "metrics.jsonl").is_file():
        return
    stages = {line["stage"] for line in read_metrics(run)}
    # The stages before RL are over where a warm start is, and have checkpoints of their own.
    latest = next((name for name in ("sft", "convert") if name in stages), None)
    lost = latest and not (run / "before.json").is_file() and find_checkpoint(run / latest)[0] is None
    if "train" in stages or lost:
        raise ValueError(
            f"run.resume: {run} has metrics and no complete checkpoint to go on from: choose another run.output_dir, "
            "or delete the folder"
        )


def fingerprints(config: Config) -> dict[str, tuple[str, str]]:
    """Option -> path and sha256 of the data file that it names; of what is streamed, of its files' names and sizes."""
    named = {
        "task.params": config.task.params,
        "sft.trajectories": config.sft.trajectories,
        "reward.functions": [{"params": part.params} for part in config.reward.functions],
    }
    digests = {}
    for key, value in _leaves(named):
        if key == "task.params.train" and config.task.params.get("streaming"):
            sizes = [(name, os.path.getsize(name)) for name in sorted(glob.glob(os.path.expanduser(str(value))))]
            digests[key] = str(value), hashlib.sha256(repr(sizes).encode()).hexdigest()
            continue
        # A text that is too long for a name is none.
        with contextlib.suppress(OSError):
            if isinstance(value, str) and value and (path := Path(value).expanduser()).is_file():
                with path.open("rb") as file:
                    digests[key] = value, hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """`("a.0.b", 1)` of `{"a": [{"b": 1}]}`."""
    if isinstance(node, dict | list):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, node
