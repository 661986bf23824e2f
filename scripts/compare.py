"""Train variants of a config from the same warm starts over several seeds, and tabulate them with intervals.

    python scripts/compare.py --config configs/quickstart.yaml --seeds 0 1 2 --output runs/value \
        --common train.steps=120 --variant plain --variant value algorithm.value.optimizer.lr=5e-4

Every (variant, seed) is a `denoise-rl train` of its own; a seed's warm start is made once and shared. Finished runs
are kept, so an interrupted comparison continues. Budgets stand beside the accuracies: forward passes,
reward queries and optimizer updates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
COSTS = ("forward_passes", "reward_queries", "updates", "train_seconds")


def main() -> int:
    args = parse_arguments()
    variants = {words[0]: words[1:] for words in args.variant}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: warm_start(args, seed), args.seeds))
        jobs = [(name, overrides, seed) for seed in args.seeds for name, overrides in variants.items()]
        list(pool.map(lambda job: run(args, *job), jobs))
    summaries = {
        name: [json.loads((args.output / f"{name}-{seed}" / "summary.json").read_text()) for seed in args.seeds]
        for name in variants
    }
    table = markdown(summaries)
    (args.output / "table.md").write_text(table)
    print(table)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--warm-start", type=Path, help="one model folder for every seed, instead of a stage per seed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--common", nargs="*", default=[], help="overrides of every variant")
    parser.add_argument("--variant", nargs="+", action="append", required=True, metavar=("NAME", "key=value"))
    return parser.parse_args()


def command(name: str, config: str, overrides: list[str], log: Path) -> None:
    """Run a `denoise-rl` command, its output in a log file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        words = [sys.executable, "-m", "rl.cli", name, "--config", config, *overrides]
        code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise SystemExit(f"{' '.join(words)} failed with exit code {code}: see {log}")


def warm_start(args: argparse.Namespace, seed: int) -> None:
    if args.warm_start:
        return
    folder = args.output / f"warm-{seed}"
    if not (folder / "model" / "config.json").exists():
        overrides = [*args.common, f"run.seed={seed}", f"run.output_dir={folder}", "run.resume=true"]
        command("sft", args.config, overrides, args.output / f"warm-{seed}.log")


def run(args: argparse.Namespace, name: str, overrides: list[str], seed: int) -> None:
    folder = args.output / f"{name}-{seed}"
    if (folder / "summary.json").exists():
        return
    model = args.warm_start or args.output / f"warm-{seed}" / "model"
    start = [f"model.path={model}", "sft.steps=0", "run.resume=true"]
    where = [f"run.seed={seed}", f"run.output_dir={folder}"]
    command("train", args.config, [*args.common, *start, *where, *overrides], args.output / f"{name}-{seed}.log")


def markdown(summaries: dict[str, list[dict[str, Any]]]) -> str:
    """Accuracy by step count, mean over seeds with a 95 % t interval, and what it cost."""
    steps = list(next(iter(summaries.values()))[0]["after"])
    head = ["variant", "seeds", *[f"{s} steps" for s in steps], *[c.replace("_", " ") for c in COSTS]]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    first = next(iter(summaries.values()))
    lines.append(row("warm start", [s["before"] for s in first], steps, [{} for _ in first]))
    lines += [row(name, [s["after"] for s in runs], steps, runs) for name, runs in summaries.items()]
    return "\n".join(lines) + "\n"


def row(name: str, accuracies: list[dict[str, float]], steps: list[str], runs: list[dict[str, Any]]) -> str:
    cells = [interval([accuracy[s] for accuracy in accuracies]) for s in steps]
    costs = [f"{statistics.mean(run[c] for run in runs):,.0f}" if runs[0] else "" for c in COSTS]
    return "| " + " | ".join([name, str(len(accuracies)), *cells, *costs]) + " |"


def interval(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = T_QUANTILE.get(len(values) - 1, 2.228) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


if __name__ == "__main__":
    sys.exit(main())
