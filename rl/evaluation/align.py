"""`denoise-rl align`: ways to align one pretrained model with one reward, side by side.

A row of the table is the pretrained model, a search over its samples, or a recipe that fine-tunes it. All rows share
the pretrained model and the oracles. Where their files are missing they are trained here, the model by the `sft` stage.
Finished rows are kept: a second call computes the missing ones.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewards.run import RewardRunner
from rewards.table import RewardPart
from rl.config import Config, load_config, save_config
from rl.evaluation.likelihood import log_likelihoods
from rl.evaluation.search import parse_search, search_rollouts
from rl.evaluation.sequence_metrics import kmer_correlation, mean_hamming, uniqueness
from rl.files import write_json
from rl.sections import AlignRow
from rl.tasks.base import Example, reward_columns
from rl.tasks.load import load_task
from rl.track.intervals import t_half_width
from rl.train.rollouts import request_seed
from rl.train.run import Run


@dataclass
class Samples:
    """The samples of a row, and their cost.

    Attributes:
        texts, ids: [S] completions.
        prompts, prompt_ids: [S].
        budget: denoiser and reward evaluations of training, and per sample afterwards.
    """

    texts: list[str]
    ids: list[list[int]]
    prompts: list[str]
    prompt_ids: list[list[int]]
    rows: list[Example]
    budget: dict[str, float]


def align(config: Config) -> list[dict[str, Any]]:
    """Compute the table of one seed, and write it to `table.json` of the run folder.

    Raises:
        ValueError: there are no rows, or one of them is not possible.
    """
    check_rows(config)
    folder = Path(config.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train_oracles(config)
    pretrained = pretrain(config)
    table = []
    for row in config.align.rows:
        path = folder / row.name / "row.json"
        settings = _row_settings(config, row)
        saved = json.loads(path.read_text()) if path.is_file() else None
        if saved is None or saved["settings"] != settings:
            saved = {"settings": settings, **compute_row(config, row, pretrained, path.parent)}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, saved)
        table.append({name: value for name, value in saved.items() if name not in ("settings", "texts")})
    write_json(folder / "table.json", table)
    return table


def check_rows(config: Config) -> None:
    """Find mistakes in the rows before an hour is spent on them."""
    from rl.registry import parse_recipe

    if not config.align.rows:
        raise ValueError("align.rows is empty: name what to compare")
    names = Counter(row.name for row in config.align.rows)
    for row in config.align.rows:
        if names[row.name] > 1 or "/" in row.name:
            raise ValueError(f"align.rows: {row.name!r} must be used once, and be a folder name")
        if row.search is not None:
            parse_search(row.search, row.params)
            if row.algorithm is not None:
                raise ValueError(f"align.rows {row.name}: set search or algorithm, not both")
        if row.algorithm is not None:
            parse_recipe(row.algorithm)


def _row_settings(config: Config, row: AlignRow) -> dict[str, Any]:
    """All that a row's numbers depend on; another value computes the row again."""
    sections = {"model", "task", "sampler", "rollout", "reward", "sft", "train", "filters"}
    kept = config.model_dump(mode="json", include=sections)
    # How many are decoded together changes no number.
    del kept["rollout"]["max_batch_size"]
    align = config.align.model_dump(mode="json", exclude={"rows"})
    return {**kept, "align": align, "row": row.model_dump(mode="json"), "seed": config.run.seed}


def train_oracles(config: Config) -> None:
    """Fit the oracles whose files are missing, each to its half of the task's labelled data."""
    from rewards.sequence_oracle import train_oracle

    task: Any = load_task(config.task.name, config.task.params)
    for path, half in config.align.oracles.items():
        if Path(path).is_file():
            continue
        sequences, labels = task.labelled(half, config.align.oracle_labels)
        error = train_oracle(sequences, labels, path, seed=half)
        print(f"oracle {path}: {len(sequences)} labels, mean squared error {error:.3f}", flush=True)


def pretrain(config: Config) -> str:
    """The folder of the pretrained model, trained by the `sft` stage where it is missing."""
    folder = Path(config.align.pretrained or f"{config.run.output_dir}/pretrained")
    if (folder / "config.json").is_file():
        return str(folder)
    if config.model.path is not None and not config.sft.steps:
        return config.model.path
    from rl.train.sft import supervised

    own = config.run.model_copy(update={"output_dir": str(folder.parent / f"{folder.name}-run")})
    with Run.open(config.model_copy(update={"run": own})) as run:
        supervised(run)
        run.save_model(folder)
    return str(folder)


def compute_row(config: Config, row: AlignRow, pretrained: str, folder: Path) -> dict[str, Any]:
    """Train or search, sample, and judge the samples."""
    started = time.perf_counter()
    budget = {"train_denoiser": 0.0, "train_reward": 0.0}
    model = pretrained
    if row.algorithm is not None:
        model = str(folder / "model")
        budget |= _train(config, row, pretrained, folder)
    trained = time.perf_counter()
    with _open(config, model) as run:
        samples = _sample(run, row)
        sampled = time.perf_counter()
        budget |= samples.budget
        seconds = {"train_seconds": trained - started, "sample_seconds": sampled - trained}
        return {"name": row.name, **judge_samples(run, samples, pretrained), **budget, **seconds,
                "texts": samples.texts}  # fmt: skip


def _open(config: Config, model: str) -> Run:
    path = config.model.model_copy(update={"path": model})
    return Run.open(config.model_copy(update={"model": path}), write=False)


def _train(config: Config, row: AlignRow, pretrained: str, folder: Path) -> dict[str, float]:
    from rl.train.loop import reinforce

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    place = config.run.model_copy(update={"output_dir": str(folder)})
    model = config.model.model_copy(update={"path": pretrained})
    assert row.algorithm is not None
    save_config(config.model_copy(update={"run": place, "model": model, "algorithm": row.algorithm}), path)
    own = load_config(path, row.overrides)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    with Run.open(own) as run:
        reinforce(run)
        run.save_model(folder / "model")
        costs = run.costs
    return {"train_denoiser": costs.sequence_forwards, "train_reward": costs.reward_queries}


def _sample(run: Run, row: AlignRow) -> Samples:
    """The row's samples: as many requests as the config says, each row of the task in turn."""
    config = run.config
    count = row.num_samples or config.align.num_samples
    rows = run.task.heldout_examples(count)
    if row.search is not None:
        found = search_rollouts(run, rows, parse_search(row.search, row.params))
        trajectories, of = found.trajectories, found.examples
        spent = (found.budget.denoiser_evaluations, found.budget.reward_evaluations)
    else:
        engine = run.engine(run.model)
        seeds = [[request_seed(config.run.seed + 7_919, i, 0)] for i in range(count)]
        trajectories, of = engine.generate(run.modality.requests(rows, seeds, None)), rows
        # As searches count it: the cost of a sample must not depend on how many share its batch.
        spent = (engine.stats.rows_asked, 0)
    texts, columns = run.modality.finished(trajectories)
    ids = columns["completion_ids"]
    prompt_ids = [t.prompt_ids.tolist() for t in trajectories]
    per_sample = {"denoiser_per_sample": spent[0] / len(texts), "reward_per_sample": spent[1] / len(texts)}
    return Samples(texts, ids, [r["prompt"] for r in of], prompt_ids, of, per_sample)


def judge_samples(run: Run, samples: Samples, pretrained: str) -> dict[str, float]:
    """Rewards under every oracle, likeness to data and pretrained model, and diversity."""
    config = run.config
    numbers: dict[str, float] = {}
    named = {
        "optimised": config.reward.trained(run.task.reward),
        **{name: [part] for name, part in config.align.judges.items()},
    }
    for name, parts in named.items():
        with RewardRunner([RewardPart(**part.model_dump()) for part in parts], mode="inline") as runner:
            table = runner.score(samples.prompts, samples.texts, reward_columns(samples.rows))
        numbers[name] = float(np.median([np.nan if v is None else v for v in table.values]))
    reference = getattr(run.task, "reference_sequences", None)
    if reference is not None:
        numbers["3mer"] = kmer_correlation(samples.texts, reference())
    grammar = getattr(run.task, "grammar", None)
    if grammar is not None:
        fitting = [text for text in samples.texts if len(text) == grammar.length]
        numbers["exact_ll"] = float(np.median(grammar.log_likelihood(fitting))) if fitting else float("nan")
    model = run.modality.load_model(pretrained).to(run.device)
    pairs = list(zip(samples.prompt_ids, samples.ids, strict=True))[: config.align.likelihood_samples]
    bounds = log_likelihoods(model, pairs, num_samples=config.align.likelihood_masks, device=run.device)
    numbers["pretrained_ll"] = float(np.median([bound.logprob for bound in bounds]))
    numbers["hamming"] = mean_hamming(samples.texts)
    numbers["unique"] = uniqueness(samples.texts)
    return numbers


def summary_lines(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """The table as text: means over seeds, with the half-width of a 95 % interval where there are several."""
    first = tables[0]
    columns = [name for name in first[0] if name != "name"]
    cells = [["row", *columns]]
    for index, row in enumerate(first):
        line = [row["name"]]
        for name in columns:
            values = np.array([table[index][name] for table in tables], dtype=np.float64)
            text = f"{values.mean():.4g}"
            if len(values) > 1 and values.std() > 0:
                text += f"±{t_half_width(values.tolist()):.2g}"
            line.append(text)
        cells.append(line)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
