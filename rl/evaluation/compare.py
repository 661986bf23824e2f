"""`denoise-rl compare`: recipes from the same warm starts over several seeds, a table with intervals and three budgets.

Every (variant, seed) is a `denoise-rl train` of its own; a seed's warm start is made once, by the stages `convert` and
`sft` of the config, and shared. Finished runs are kept, so an interrupted comparison goes on. Orderings change with the
budget that is held equal (forwards, reward queries, optimizer updates), so a second table and the plot always show all
three.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.config import Config, load_config
from rl.registry import parse_recipe
from rl.track.intervals import t_half_width
from rl.train.plan import check_modality, check_run

# Overrides with which a variant is about another model, and has warm starts of its own.
_MODELS = ("model.backbone", "model.noise", "model.attention", "model.block_length", "model.context_causal=",
           "model.logit_shift=", "model.convert", "model.path=")  # fmt: skip
COSTS = ("train_steps", "sequence_forwards", "reward_queries", "updates", "train_seconds", "train_cpu_seconds")


@dataclass(frozen=True)
class ComparisonPlan:
    """Recipes to compare, and on what.

    Example: `ComparisonPlan("configs/quickstart.yaml", {"mdpo": ["algorithm={name: mdpo}"]}, (0, 1), Path("runs/x"))`.

    Attributes:
        variants: name -> overrides of the config.
        common: overrides of every variant and of the warm starts. A variant about another model (its
            noise, its backbone) has warm starts of its own.
        warm_start: a model folder for every seed instead of stages per seed.
        jobs: runs at a time.
    """

    config: str | None
    variants: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    output: Path
    common: Sequence[str] = ()
    warm_start: str | None = None
    jobs: int = 1

    def folder(self, name: str, seed: int) -> Path:
        """The run of a variant, in `output` also where the name is an address with folders in it."""
        return self.output / f"{name.replace('/', '_')}-{seed}"


def recipe_overrides(config: Config, name: str) -> list[str]:
    """A recipe with its own defaults, and what it requires of other sections.

    Evaluations of text keep the config's own decoder where the recipe needs another one for its rollouts.

    Raises:
        ValueError: there is no such recipe, or it trains another modality.
    """
    recipe = parse_recipe({"name": name})
    check_modality(recipe, config)
    overrides = [f"algorithm={{name: {name}}}"]
    for key, value in recipe.requires(config).items():
        overrides.append(f"{key}={json.dumps(value)}")
        section, option = key.split(".")
        if recipe.modality == "text" and section == "sampler" and option not in ("record_x0", "num_inference_steps"):
            overrides.append(f"eval.sampler.{option}={json.dumps(getattr(config.sampler, option))}")
    return overrides


def compare(comparison: ComparisonPlan) -> tuple[str, Path, Path]:
    """Run what is missing; returns the table, and the paths of results.json and of the plot.

    Raises:
        ValueError: a variant's config is wrong (before anything runs), or a run failed.
    """
    given = [] if comparison.warm_start is None else _given(comparison.warm_start)
    for overrides in comparison.variants.values():
        check_run(load_config(comparison.config, [*comparison.common, *overrides, *given]), new=False)
    config = load_config(comparison.config, comparison.common)
    own = {n: n if any(o.startswith(_MODELS) for o in words) else "" for n, words in comparison.variants.items()}
    with ThreadPoolExecutor(comparison.jobs) as pool:
        wanted = [(start, seed) for start in dict.fromkeys(own.values()) for seed in comparison.seeds]
        starts = pool.map(lambda which: _warm_start(comparison, config, which[1], which[0]), wanted)
        models = dict(zip(wanted, starts, strict=True))
        # The seeds of a variant follow each other: a comparison that is stopped has whole rows.
        runs = [(name, seed) for name in comparison.variants for seed in comparison.seeds]
        list(pool.map(lambda run: _run(comparison, run[0], run[1], models[own[run[0]], run[1]]), runs))
    folders = {name: [comparison.folder(name, seed) for seed in comparison.seeds] for name in comparison.variants}
    summaries = {
        name: [json.loads((folder / "summary.json").read_text()) for folder in group] for name, group in folders.items()
    }
    table = markdown(summaries) + "\n" + equal_budgets(folders)
    (comparison.output / "table.md").write_text(table)
    results = comparison.output / "results.json"
    results.write_text(json.dumps({"seeds": list(comparison.seeds), "runs": summaries}, indent=1))
    from rl.track.budgets import plot_budgets

    metric = config.main_metric(next(iter(summaries.values()))[0].get("measure", "accuracy"))
    return table, results, plot_budgets(folders, f"eval/{metric}", comparison.output / "budgets.png")


def _command(comparison: ComparisonPlan, name: str, overrides: Sequence[str], log: Path) -> None:
    """Run a `denoise-rl` command, its output in a log file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    config = [] if comparison.config is None else ["--config", comparison.config]
    words = [sys.executable, "-m", "rl.cli", name, *config, *overrides]
    with log.open("w") as file:
        code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise ValueError(f"{log.stem} of the comparison failed with exit code {code}: see {log}")


def _warm_start(comparison: ComparisonPlan, config: Config, seed: int, variant: str = "") -> list[str]:
    """Make the model of a seed where it is missing; returns the overrides of the runs that begin from it.

    Args:
        variant: the one whose model it is; empty for that of all others.
    """
    if comparison.warm_start is not None:
        return _given(comparison.warm_start)
    start: list[str] = []
    which, changes = comparison.folder(variant, seed).name if variant else seed, comparison.variants.get(variant, [])
    for stage, name in (("convert", f"converted-{which}"), ("sft", f"warm-{which}")):
        if not getattr(config, stage).steps:
            continue
        folder = comparison.output / name
        if not (folder / "model").is_dir():
            where = [f"run.seed={seed}", f"run.output_dir={folder}", "run.resume=true"]
            words = [*comparison.common, *changes, *start, *where]
            _command(comparison, stage, words, comparison.output / f"{name}.log")
        start = _given(folder / "model")
    return start


def _given(model: str | Path) -> list[str]:
    """Overrides of a run that begins from a finished diffusion model."""
    return [f"model.path={model}", "model.convert={}", "convert.steps=0"]


def _run(comparison: ComparisonPlan, name: str, seed: int, start: Sequence[str]) -> None:
    folder = comparison.folder(name, seed)
    if (folder / "summary.json").exists():
        return
    where = ["sft.steps=0", "run.resume=true", f"run.seed={seed}", f"run.output_dir={folder}"]
    if (name, seed) != (next(iter(comparison.variants)), comparison.seeds[0]):
        # The first run judges it for all.
        where.append("eval.baseline=null")
    overrides = [*comparison.common, *where, *comparison.variants[name], *start]
    _command(comparison, "train", overrides, Path(f"{folder}.log"))


def markdown(summaries: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Accuracy by step count and its change from the seed's own warm start, and what it cost.

    Means over seeds with a 95 % t interval. Warm starts differ more than recipes do, and variants of one model share
    them, so the interval of a change is the one to compare.
    """
    first = next(iter(summaries.values()))
    steps = list(first[0]["after"])
    columns = [column for s in steps for column in (f"{s} steps", "change")]
    head = ["variant", "seeds", *columns, *[cost.replace("_", " ") for cost in COSTS]]
    rows = [head, ["---"] * len(head)]
    starts: list[list[str]] = []
    for name, runs in summaries.items():
        before = [cell for s in steps for cell in (interval([run["before"][s] for run in runs]), "")]
        if before not in starts:
            what = f"warm start of {name}" if starts else "warm start"
            rows.append([what, str(len(runs)), *before, *[""] * len(COSTS)])
            starts.append(before)
    # One model, and one forward a token: the same in every column.
    for tokens, value in first[0].get("baseline", {}).items():
        low, high = first[0]["baseline_interval"][tokens]
        cell = f"{value:.3f} [{low:.3f}, {high:.3f}]"
        rows.append(["autoregressive", "", *[part for _ in steps for part in (cell, "")], *[""] * len(COSTS)])
    for name, runs in summaries.items():
        cells = []
        for s in steps:
            change = interval([run["after"][s] - run["before"][s] for run in runs], sign="+")
            cells += [interval([run["after"][s] for run in runs]), change]
        # Runs of earlier versions do not say their CPU seconds.
        costs = [
            "-" if any(cost not in run for run in runs) else f"{statistics.mean(run[cost] for run in runs):,.0f}"
            for cost in COSTS
        ]
        rows.append([name, str(len(runs)), *cells, *costs])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def equal_budgets(folders: Mapping[str, Sequence[Path]]) -> str:
    """Every held-out metric at what all runs have spent: of each budget, the most that even the thriftiest run did.

    Between two evaluations of a run its metrics are interpolated linearly in the budget, and none is taken from outside
    them: "-" says that a run was first evaluated later. Evaluations on the way are about other problems than those
    before and after training: the former count where every run has two, else the latter.
    """
    from rl.track.budgets import BUDGETS, costed_evaluations, metric_at

    found = {name: [costed_evaluations(folder) for folder in group] for name, group in folders.items()}
    ways = {name: [[p for p in run if not p["test"]] for run in runs] for name, runs in found.items()}
    ends = {name: [[p for p in run if p["test"]] for run in runs] for name, runs in found.items()}
    curves = ways if all(len(way) > 1 for runs in ways.values() for way in runs) else ends
    every = [run for runs in curves.values() for run in runs]
    hidden = ("_low@", "_high@", "unscored@")
    metrics = [
        key
        for key in every[0][-1]
        if key.startswith("eval/") and not any(part in key for part in hidden) and all(key in run[-1] for run in every)
    ]
    head = ["equal", "variant", "seeds", *[key.removeprefix("eval/").replace("_", " ") for key in metrics]]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for budget, words in BUDGETS.items():
        limit = min(run[-1][budget] for run in every)
        for name, runs in curves.items():
            known = all(run[0][budget] <= limit for run in runs)
            cells = [
                interval([metric_at(run, budget, limit, key) for run in runs]) if known else "-" for key in metrics
            ]
            lines.append("| " + " | ".join([f"{limit:,.0f} {words.lower()}", name, str(len(runs)), *cells]) + " |")
    return "\n".join(lines) + "\n"


def interval(values: Sequence[float], sign: str = "") -> str:
    """Mean and half-width of the 95 % t interval over seeds; sign "+" shows that of a positive mean."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:{sign}.3f}"
    return f"{mean:{sign}.3f} ± {t_half_width(values):.3f}"
