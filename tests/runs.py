"""Tiny runs for the tests of training: a config, real processes, and what a run leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file
from torch.distributed import TCPStore

from rl.cli import main
from tests import many_runs, warm

ROOT = Path(__file__).resolve().parent.parent
ZERO = {stage: str(ROOT / "configs" / "deepspeed" / f"zero{stage}.json") for stage in range(4)}

GPT2 = {"model_type": "gpt2", "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "activation_function": "gelu"}
QWEN3 = {
    "model_type": "qwen3",
    "max_position_embeddings": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}

# Every two completions differ in it, so a group has no variance only where the reward is made constant:
# on prompts that begin with a given. An untrained model would never solve a puzzle.
REWARD = """
def dense(prompts, completions, **columns):
    def score(text):
        return sum((i + 1) * 1.37 ** int(digit) for i, digit in enumerate(text) if digit.isdigit()) / 500
    return [score(c) if p.startswith("0") else 0.25 for p, c in zip(prompts, completions, strict=True)]
"""


def train_and_export(folder: Path, source: Path, layout: str, *overrides: str) -> Path:
    """One RL step on a published checkpoint, and the folder that `denoise-rl export --layout` makes of it."""
    arguments = tiny_config(
        folder,
        "model.backbone={}",
        f"model.path={source}",
        "sft.steps=0",
        "train.steps=1",
        "train.max_logprob_gap=1e-3",
        "sampler.num_inference_steps=8",
        "eval.num_inference_steps=[8]",
        *overrides,
    )
    train_here(arguments)
    out = folder / "out"
    assert main(["export", str(folder / "run"), str(out), "--layout", layout]) == 0
    return out


def tiny_config(folder: Path, *overrides: str, reward: str = REWARD) -> list[str]:
    """Arguments `--config FILE key=value ...` of a run of seconds in `folder`/run, which `reward` judges.

    Adam divides a gradient by its own size. With the usual epsilon a rounding error in a gradient that is
    nearly zero would move a weight by the whole learning rate; 1e-3 keeps rounding errors what they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward.py").write_text(reward)
    optimizer = {"lr": 0.02, "eps": 1e-3, "warmup_steps": 1}
    config = {
        "run": {"output_dir": str(folder / "run"), "device": "cpu", "num_threads": 1},
        "model": {"backbone": GPT2},
        "sampler": {"gen_length": 16, "num_inference_steps": 4},
        "reward": {"functions": [{"name": f"{folder / 'reward.py'}:dense"}]},
        "sft": {"steps": 2, "batch_size": 8, "optimizer": optimizer},
        "algorithm": {"name": "tracerl", "entropy_coef": 0.01},
        "train": {
            "steps": 3,
            "prompts_per_step": 8,
            "group_size": 2,
            "epochs": 2,
            "micro_batch_size": 2,
            "optimizer": optimizer,
            "deepspeed": ZERO[0],
        },
        "eval": {"num_inference_steps": [4], "num_prompts": 6, "viewer_items": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path), *overrides]


def resumed_config(folder: Path, whole: list[str], *overrides: str) -> list[str]:
    """The same run, continued in `folder`/run: a copy of the run folder, everything else as it was."""
    return [*whole, f"run.output_dir={folder / 'run'}", "run.resume=true", *overrides]


def clean_env(**extra: str) -> dict[str, str]:
    """The environment of a user's shell: no launcher variables, this tree first on the path."""
    drop = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "PYTHONPATH"}
    env = {name: value for name, value in os.environ.items() if name not in drop}
    # The launchers and console scripts are found beside the interpreter, whether or not it was activated.
    env["PATH"] = str(Path(sys.executable).parent) + os.pathsep + env.get("PATH", "")
    return env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def execute(
    command: Sequence[str | Path], cwd: Path = ROOT, timeout: float = 240, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; a command that hangs is killed with all its children, and the test fails."""
    words = [str(word) for word in command]
    process = subprocess.Popen(
        words, cwd=cwd, env=clean_env(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"hangs: {' '.join(words)}\n{stdout[-3000:]}\n{stderr[-3000:]}") from None
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def cli(*arguments: str | Path, cwd: Path = ROOT, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """The `denoise-rl` command of this tree in a process of its own (`tests/warm.py`)."""
    words = ["-m", "rl.cli", *map(str, arguments)]
    ((code, stdout, stderr),) = warm.run(words, cwd, timeout, [clean_env(**env)])
    return subprocess.CompletedProcess(words, code, stdout, stderr)


def ranks(count: int, *script: str | Path, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """`script` on `count` CPU processes as `torchrun` would start them, which costs four times as much.

    The store where ranks meet is this process's, as it is the launcher's there: it binds a free port itself.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count)}
    meeting |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    each = [clean_env(RANK=str(i), LOCAL_RANK=str(i), **meeting, **env) for i in range(count)]
    words = [str(word) for word in script]
    codes, stdouts, stderrs = zip(*warm.run(words, ROOT, timeout, each), strict=True)
    worst = next((code for code in codes if code), 0)
    return subprocess.CompletedProcess(words, worst, "".join(stdouts), "".join(stderrs))


def many(configs: Sequence[list[str]]) -> list[str]:
    """The script, and its arguments, that trains several configs in one process group."""
    return ["tests/many_runs.py", *(json.dumps(arguments) for arguments in configs)]


def train_here(arguments: list[str]) -> None:
    """What `denoise-rl train` does up to its report, in this process on one rank."""
    many_runs.train_all([json.dumps(arguments)])


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full: inside, no file of this process grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(ranks: int, *script: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`script` on `ranks` CPU processes; the launcher's own store binds a free port and the ranks share it."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    return execute([sys.executable, *launcher, *script], **options)


def deepspeed(ranks: int, *script: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`script` under DeepSpeed's launcher."""
    launcher = Path(sys.executable).parent / "deepspeed"
    return _on_a_port([launcher, "--num_gpus", str(ranks), "--master_port"], script, **options)


def launch(ranks: int, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`denoise-rl launch`."""
    command = [sys.executable, "-m", "rl.cli", "launch", "--num-gpus", str(ranks), "--master-port"]
    return _on_a_port(command, arguments, **options)


def _on_a_port(
    command: Sequence[str | Path], arguments: Sequence[str | Path], **options: Any
) -> subprocess.CompletedProcess[str]:
    """A launcher that must be told a port; tried again when it was taken."""
    for _ in range(5):
        done = execute([*command, free_port(), *arguments], **options)
        if done.returncode == 0 or "EADDRINUSE" not in done.stderr:
            break
    return done


# Seconds, and what is derived from them: the only numbers of a run that nobody can repeat.
_CLOCK = ("time", "speed/")


def lines(run: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without clock readings."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in records if stage is None or record["stage"] == stage]
    return [{k: v for k, v in r.items() if not k.startswith(_CLOCK) and not k.endswith("seconds")} for r in kept]


def series(run: Path, stage: str, name: str) -> list[float]:
    """One metric over the steps of a stage."""
    return [line[name] for line in lines(run, stage)]


def weights(run: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """The policy's weights, or its adapters, in the checkpoint of a step, the newest by default."""
    name = (run / "checkpoints" / "latest").read_text() if step is None else f"step_{step}"
    (file,) = (run / "checkpoints" / name / "hf").glob("*.safetensors")
    return load_file(file)


def largest_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)
