"""`report.html`: one static page about a run that needs no network, now or in ten years."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.files import write_whole
from rl.track import table
from rl.track.frames import build_view, frame_budget
from rl.track.hacking import has_panel, parting_line, plot_hacking
from rl.track.image_grid import is_image_viewer, prompt_rows, quality_rows
from rl.track.jsonl import FILE_NAME as METRICS
from rl.track.jsonl import NON_FINITE, read_lines, read_metrics
from rl.track.plots import DARK, GAP_MAX, LIGHT, Theme, plot_learning_curve
from rl.track.samples import facts, texts, worst_and_best
from rl.track.verdict import (
    IMPROVED,
    WORSE,
    backslide_line,
    compare,
    goal_line,
    judge_line,
    measure,
    read_summary,
    unscored_line,
    verdict_line,
)

_COSTS = {
    "forward_passes": "model forward passes",
    "backward_passes": "model backward passes",
    "sequence_forwards": "sequences through the model",
    "tokens_forwarded": "tokens through the model",
    "reward_queries": "reward queries",
    "updates": "optimizer updates",
    "sft_seconds": "seconds of warm start",
    "sft_cpu_seconds": "CPU seconds of warm start",
    "train_seconds": "seconds of RL",
    "stage_seconds": "of these",
    "train_cpu_seconds": "CPU seconds of RL",
}

_NUM_ROLLOUTS = 3  # worst and best


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `<run_dir>/report.html` from summary.json, metrics.jsonl, config.yaml and viewer.json.

    A file or key that is missing leaves a sentence in its section that says so. The page holds everything it shows
    (images are inlined, a content security policy forbids the network), follows the reader's light or dark setting,
    and prints with every denoising step visible.

    Returns:
        The path of the page; it appears only when it is complete.

    Raises:
        ValueError: the folder holds none of these files, or one of them is damaged.
    """
    folder = Path(run_dir)
    names = ("summary.json", METRICS, "config.yaml", "viewer.json")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"{run_dir} is not a run folder: it has none of {', '.join(names)}")
    # Imported here: jinja2 is a matter of this command only.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    summary = read_summary(folder)
    records = read_metrics(folder) if (folder / METRICS).is_file() else []
    panel = has_panel(summary, [record for record in records if record["stage"] == "train"])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.jinja").render(
        name=folder.resolve().name,
        title=table.title(summary),
        verdict=verdict_line(summary),
        judge=judge_line(summary),
        goal=goal_line(summary),
        measure=measure(summary),
        unscored=unscored_line(summary),
        backslide=backslide_line(summary),
        mood=_mood(summary),
        curves=_curves(folder, plot_learning_curve) if records else None,
        curve_text=_curve_text(records),
        hacking=_curves(folder, plot_hacking) if panel else None,
        hacking_text=parting_line(folder) if panel else None,
        headings=table.HEADINGS,
        rows=[(table.cells(row), row.verdict.split()[0]) for row in compare(summary)],
        costs=_costs(summary),
        warnings=_warnings(records),
        config=_text(folder / "config.yaml"),
        quality=quality_rows(summary),
        rollouts=_rollouts(folder),
        judge_name=summary.get("judge"),
        **_shown(folder / "viewer.json"),
    )
    return write_whole(folder / "report.html", html)


def _mood(summary: Mapping[str, Any]) -> str:
    """Colour of the verdict: good only when nothing got worse and a goal, if there was one, was met."""
    verdicts = {row.verdict for row in compare(summary)}
    goal = goal_line(summary) or ""
    if WORSE in verdicts or goal.startswith("Goal missed"):
        return "bad"
    return "good" if IMPROVED in verdicts else "plain"


def _curves(folder: Path, plot: Callable[[Path, Path, Theme, bool], Path]) -> dict[str, str]:
    curves = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, theme, narrow in (("light", LIGHT, False), ("dark", DARK, False), ("light_narrow", LIGHT, True),
                                    ("dark_narrow", DARK, True)):  # fmt: skip
            image = plot(folder, Path(scratch) / f"{name}.png", theme, narrow)
            curves[name] = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    return curves


def _curve_text(records: Sequence[Mapping[str, Any]]) -> str:
    """The picture in words, for readers who do not see it."""
    rewards = [r["reward/mean"] for r in records if r["stage"] == "train" and r.get("reward/mean") is not None]
    if not rewards:
        return "Learning curve; no training reward was logged."
    return f"Learning curve over {len(rewards)} logged RL steps: reward {rewards[0]:.3f} first, {rewards[-1]:.3f} last."


def _costs(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(label, _number(summary[key])) for key, label in _COSTS.items() if summary.get(key) is not None]


def _number(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_number(part)}" for key, part in value.items())
    # Counts summed over ranks arrive as floats.
    return f"{int(value):,}" if value == int(value) else f"{value:,.1f}"


def _warnings(records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for name, words in ((NON_FINITE, "numbers logged as NaN or infinite"), ("reward/failed", "failed rewards")):
        total = sum(record.get(name) or 0 for record in records)
        if total:
            found.append(f"{words[0].upper()}{words[1:]}: {total:,.0f}.")
    last = {name: value for record in records for name, value in record.items() if name.endswith("_failures")}
    for name, value in last.items():
        found.append(f"Failed calls to {name[len('warnings/') : -len('_failures')]}: {value:,.0f}.")
    gaps = [record["rollout/image_gap"] for record in records if record.get("rollout/image_gap") is not None]
    if gaps:
        words = f"The cache of the rollouts moved pixels by {max(gaps):.4f} on average where it did most"
        odds = [record[GAP_MAX] for record in records if record.get(GAP_MAX) is not None]
        found.append(words + (f", and a decision's log-prob by {max(odds):.4f} at most." if odds else "."))
    return found


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _rollouts(folder: Path) -> list[tuple[str, list[tuple[str, list[tuple[str, str]]]]]]:
    """The worst and the best kept rollouts of text: [(group, [(facts, [(name of a text, text)])])]."""
    path = folder / "samples.jsonl"
    samples = [sample for sample in read_lines(path) if isinstance(sample["completion"], str)] if path.is_file() else []
    return [(name, [(facts(s), texts(s)) for s in group]) for name, group in worst_and_best(samples, _NUM_ROLLOUTS)]


def _shown(path: Path) -> dict[str, Any]:
    """The content of viewer.json: `viewer`, canvases step by step, or `pictures`, a grid of images."""
    text = _text(path)
    if text is None:
        return {"viewer": None, "pictures": None}
    try:
        data = json.loads(text)
        if is_image_viewer(data["items"]):
            return {"viewer": None, "pictures": prompt_rows(data["items"])}
        return {"viewer": _viewer(data), "pictures": None}
    except (AttributeError, json.JSONDecodeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); run the evaluation again") from None


def _viewer(data: Mapping[str, Any]) -> dict[str, Any]:
    grid, items = data["grid"], data["items"]
    limit = frame_budget(items)
    built = [
        {
            "prompt": item["prompt"],
            "answer": item.get("answer"),
            "sides": [
                (side, build_view(item[side], grid, limit) if item.get(side) else None) for side in ("before", "after")
            ],
        }
        for item in items
    ]
    views = [view for item in built for _, view in item["sides"] if view is not None]
    return {
        "columns": grid[1] if grid else None,
        "box": _box(grid),
        "items": built,
        "last": max((len(view.frames) for view in views), default=1) - 1,
        "left_out": sum(view.left_out for view in views),
        "shown": sum(len(view.frames) for view in views),
    }


def _box(grid: Sequence[int] | None) -> int:
    """Side of the inner boxes of a square grid whose side is a square (Sudoku), else 0."""
    if not grid or grid[0] != grid[1]:
        return 0
    root = round(grid[0] ** 0.5)
    return root if root * root == grid[0] and root > 1 else 0
