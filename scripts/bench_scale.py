"""What several ranks and rollout workers cost: where a step's time goes, bytes exchanged, and what a weight sync takes.

Trains a small block model for a few steps under torchrun for every number of ranks and ZeRO stage, then copies weights
of models of growing width into a plain module, as the loop does after every update. Bytes are the payloads of
DeepSpeed's collectives on rank 0, as its own communication log counts them. With `--workers` the same training runs
with rollout workers under Ray, synchronous and asynchronous, and the weights are pushed to a worker.

    OMP_NUM_THREADS=1 python scripts/bench_scale.py --ranks 1 2 --deepspeed zero0 zero2 zero3
    OMP_NUM_THREADS=1 python scripts/bench_scale.py --ranks --workers 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rl import distributed
from rl.config import load_config
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rl.sections import OptimizerConfig
from rl.track.jsonl import read_metrics
from rl.train.deepspeed_json import read_deepspeed_config
from rl.train.learner import Learner
from rl.train.loop import train
from rl.train.run import Run
from rollouts.engines.ray_workers import RayEngine

STAGES = ("rollout", "reward", "learn", "sync")


def backbone(width: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 32, "num_key_value_heads": width // 64, "head_dim": 32,
        "max_position_embeddings": 128,
    }  # fmt: skip


def sized_model(width: int) -> DiffusionLM:
    with torch.random.fork_rng():
        described = DiffusionLMConfig(backbone={**backbone(width, 8), "vocab_size": 1024}, mask_token_id=0)
        return DiffusionLM(described).eval()


class SizedWorker:
    """Builds a worker's model, and is the source of its weights."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self) -> tuple[DiffusionLM, Any]:
        return sized_model(self.width), None

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(sized_model(self.width).named_parameters())

    def save(self, folder: Path) -> None:
        raise AssertionError("workers under Ray take tensors")


def exchanged() -> float:
    """Bytes of this rank's collectives so far; a group of one sends nothing."""
    import deepspeed.comm.comm as comm

    if distributed.world_size() == 1:
        return 0.0
    return sum(
        size * entry[0] for sizes in comm.comms_logger.comms_dict.values() for size, entry in sizes.items() if size
    )


def work(args: argparse.Namespace, folder: Path) -> None:
    """One process of a launch; rank 0 writes the numbers."""
    overrides = {
        "run.output_dir": str(folder / "run"), "run.device": "cpu", "run.num_threads": 1,
        "model.backbone": json.dumps(backbone(args.width, 4)), "model.attention": "block_causal",
        "model.block_length": 4, "sampler.block_length": 4, "sampler.gen_length": 16,
        "sampler.num_inference_steps": 8, "algorithm.name": "tracerl", "algorithm.entropy_coef": 0.01,
        "filters.drop_zero_variance": "false", "train.steps": args.steps, "train.prompts_per_step": 32,
        "train.group_size": 8, "train.micro_batch_size": 64, "train.deepspeed": str(folder / "deepspeed.json"),
        "eval.num_prompts": 2, "eval.num_inference_steps": "[8]", "eval.viewer_items": 0,
        "algorithm.old_logprob": "recompute", **dict(pair.split("=", 1) for pair in args.override),
    }  # fmt: skip
    config = load_config(None, [f"{key}={value}" for key, value in overrides.items()])
    with Run.open(config) as run:
        train(run)
    per_step = exchanged() / args.steps
    # The first step pays for allocations.
    lines = [line for line in read_metrics(folder / "run", "train") if line["step"] > 1]
    seconds = {name: statistics.median(line[f"time/{name}"] for line in lines) for name in STAGES}
    overlap = statistics.median(line.get("speed/overlap", 0.0) for line in lines)
    syncs = []
    for width in args.widths:
        model = sized_model(width)
        learner = Learner(model, str(folder / "deepspeed.json"), OptimizerConfig(), 1, torch.device("cpu"))
        times = []
        for _ in range(4):
            distributed.barrier()
            before, started = exchanged(), time.perf_counter()
            learner.copy_weights_into(model)
            times.append(time.perf_counter() - started)
        parameters = sum(p.numel() for p in model.parameters())
        syncs.append([parameters, statistics.median(times[1:]), exchanged() - before])
        del learner
    if distributed.rank() == 0:
        (folder / "numbers.json").write_text(
            json.dumps({"seconds": seconds, "bytes": per_step, "syncs": syncs, "overlap": overlap})
        )
    distributed.stop()


def pushes(widths: list[int], folder: Path) -> list[list[float]]:
    """[parameters, megabytes, seconds by file, seconds through the object store] of a push to one worker."""
    rows = []
    for width in widths:
        source = SizedWorker(width)
        tensors = source.tensors()
        source.tensors = lambda tensors=tensors: tensors  # type: ignore[misc]
        row = [sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values()) / 1e6]
        for weights_dir in (folder / "weights", None):
            engine = RayEngine(SizedWorker(width), None, workers=1, weights_dir=weights_dir)
            times = []
            for version in range(4):
                started = time.perf_counter()
                engine.push_weights(version, source)
                times.append(time.perf_counter() - started)
            engine.close()
            row.append(statistics.median(times[1:]))
        rows.append(row)
    return rows


def launch(args: argparse.Namespace, ranks: int, name: str, *overrides: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        deepspeed = read_deepspeed_config(name) | {"comms_logger": {"enabled": True, "prof_all": True}}
        (Path(folder) / "deepspeed.json").write_text(json.dumps(deepspeed))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        widths = [str(width) for width in args.widths]
        mine = ["--steps", str(args.steps), "--width", str(args.width), "--widths", *widths, "--work", folder]
        mine += ["--override", *overrides] if overrides else []
        done = subprocess.run([*command, __file__, *mine], capture_output=True, text=True, env=os.environ)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads((Path(folder) / "numbers.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--workers", type=int, default=0, help="also train with this many rollout workers under Ray")
    parser.add_argument("--deepspeed", nargs="+", default=["zero0", "zero2", "zero3"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--width", type=int, default=128, help="width of the model that is trained")
    parser.add_argument("--widths", type=int, nargs="*", default=[128, 256, 512], help="widths of the weight syncs")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--override", nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args, Path(args.work))
    if args.ranks:
        several_ranks(args)
    if args.workers:
        workers(args)


def workers(args: argparse.Namespace) -> None:
    ray = ["rollout.engine=ray", f"rollout.ray.workers={args.workers}"]
    runs = {
        "in the learner's process": [],
        "workers": ray,
        "workers, asynchronous": [*ray, "rollout.asynchronous=true"],
    }
    print(f"| rollouts | {' s | '.join(STAGES)} s | step s | sampling hidden |")
    print("|---" * (3 + len(STAGES)) + "|")
    for name, overrides in runs.items():
        numbers = launch(argparse.Namespace(**{**vars(args), "widths": []}), 1, "zero0", *overrides)
        seconds = [numbers["seconds"][stage] for stage in STAGES]
        print(f"| {name} | {' | '.join(f'{v:.3f}' for v in [*seconds, sum(seconds)])} | {numbers['overlap']:.0%} |")
    print("\n| parameters | MB | push by file s | push through the object store s |")
    print("|---" * 4 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for parameters, megabytes, by_file, by_store in pushes(args.widths, Path(folder)):
            print(f"| {parameters / 1e6:.1f} M | {megabytes:.0f} | {by_file:.3f} | {by_store:.3f} |")


def several_ranks(args: argparse.Namespace) -> None:
    results = {(ranks, name): launch(args, ranks, name) for name in args.deepspeed for ranks in args.ranks}
    print(f"| ranks | config | {' s | '.join(STAGES)} s | step s | MB exchanged per step |")
    print("|---" * (4 + len(STAGES)) + "|")
    for (ranks, name), numbers in results.items():
        seconds = [numbers["seconds"][stage] for stage in STAGES]
        cells = " | ".join(f"{value:.3f}" for value in [*seconds, sum(seconds)])
        print(f"| {ranks} | {name} | {cells} | {numbers['bytes'] / 1e6:.1f} |")
    print("\n| ranks | config | parameters | sync s | MB exchanged |")
    print("|---" * 5 + "|")
    for (ranks, name), numbers in results.items():
        for parameters, seconds, moved in numbers["syncs"]:
            print(f"| {ranks} | {name} | {parameters / 1e6:.1f} M | {seconds:.4f} | {moved / 1e6:.1f} |")


if __name__ == "__main__":
    main()
