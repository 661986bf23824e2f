"""Kill the trainer with SIGKILL at random points, again and again, and compare with a run that nobody disturbs.

Every life of the trainer is killed a random time (drawn from --seed) after it has reached the RL stage, and is followed
by one that resumes; the last one runs to its end. Then metrics, samples and weights must equal the
undisturbed run's, bit for bit, and every step's prompts must have been trained on exactly once.

    OMP_NUM_THREADS=1 python scripts/kill_loop.py --kills 20 --config configs/quickstart.yaml train.steps=60 ...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

# Clock readings, and what is derived from them: the only numbers of a run that nobody can repeat.
CLOCK = ("time", "speed/")
SETTINGS = ("checkpoint.every=1", "checkpoint.keep=2")


def train(arguments: list[str], folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rl.cli", "train", *arguments, f"run.output_dir={folder}", *SETTINGS, *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, stderr = process.communicate()
    if process.returncode:
        sys.exit(f"a run failed: {stderr.decode()}")


def lines(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, without clock readings."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    whole = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in line.items() if not k.startswith(CLOCK) and not k.endswith("seconds")} for line in whole]


def digest(folder: Path) -> str:
    weights = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text() / "hf" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def kill_often(arguments: list[str], folder: Path, kills: int, draw: random.Random, spread: float) -> list[int]:
    """Train in `folder`, killed `kills` times on the way; returns how many lines were logged at every kill.

    A life is killed at most `spread` seconds after it reached the RL stage: in a rollout, an update, a checkpoint.
    """
    reached: list[int] = []
    resume: list[str] = []
    while len(reached) < kills:
        process = train(arguments, folder, *resume)
        assert process.stdout is not None
        for line in process.stdout:
            if b"[train]" in line:
                break
        try:
            process.wait(draw.uniform(0.0, spread))
        except subprocess.TimeoutExpired:
            process.kill()
        _, stderr = process.communicate()
        if process.returncode != -signal.SIGKILL:
            sys.exit(f"the run ended after {len(reached)} kills, give it more train.steps: {stderr.decode()}")
        reached.append(len(lines(folder)))
        resume = ["run.resume=true"]
    finish(train(arguments, folder, *resume))
    return reached


def compare(undisturbed: Path, killed: Path) -> list[str]:
    """What differs, one line each."""
    problems = []
    one, other = lines(undisturbed), lines(killed)
    steps = [line["step"] for line in other if line["stage"] == "train"]
    if steps != sorted(set(steps)):
        problems.append(f"steps are lost or doubled: {steps}")
    if one != other:
        where = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        problems.append(f"metrics differ from line {where} on, of {len(one)} and {len(other)}")
    samples = [(folder / "samples.jsonl").read_text() for folder in (undisturbed, killed)]
    if samples[0] != samples[1]:
        problems.append("samples differ")
    if digest(undisturbed) != digest(killed):
        problems.append("weights differ")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the times at which the trainer is killed")
    parser.add_argument("--spread", type=float, default=4.0, help="seconds of the RL stage in which a life is killed")
    parser.add_argument("--folder", type=Path, default=Path("runs/kill-loop"), help="new folder for both runs")
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"--folder {args.folder} exists: name a new one")
    arguments = ["--config", args.config, *args.overrides]
    finish(train(arguments, args.folder / "undisturbed"))
    reached = kill_often(arguments, args.folder / "killed", args.kills, random.Random(args.seed), args.spread)
    print(f"killed {len(reached)} times, with {reached} lines logged of {len(lines(args.folder / 'undisturbed'))}")
    problems = compare(args.folder / "undisturbed", args.folder / "killed")
    print("\n".join(problems) or "metrics, samples and weights are those of the undisturbed run")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
