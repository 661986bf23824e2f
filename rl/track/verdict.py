"""The claims that the numbers of a run support: before and after, with intervals, and sentences that do not flatter.

Everything is computed from the numbers in `summary.json`; a stored conclusion (`goal.met`) is checked, not believed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.track.intervals import Interval, difference_interval, wilson_interval

IMPROVED, WORSE, SAME, UNKNOWN = "improved", "worse", "not distinguishable", "unknown"


@dataclass(frozen=True)
class Comparison:
    """One row of the before/after table.

    Example: `Comparison("4", 0.585, (0.554, 0.615), 0.848, (0.824, 0.869), (0.224, 0.301), "improved")`.

    Attributes:
        steps: number of denoising steps, as summary.json spells it.
        before, after: accuracy in [0, 1], or mean reward (`measure`); None when it was not measured.
        before_interval, after_interval: 95 % intervals; None when neither they nor n_eval are in the summary.
        change_interval: 95 % interval of after - before (Newcombe 1998).
        verdict: "improved" or "worse" when change_interval excludes 0, else "not distinguishable"; "unknown" without
            two intervals.
    """

    steps: str
    before: float | None
    before_interval: Interval | None
    after: float | None
    after_interval: Interval | None
    change_interval: Interval | None
    verdict: str


def read_summary(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The run's `summary.json`; an empty dict when there is none (the run is not finished).

    Raises:
        ValueError: the file is not a JSON object.
    """
    path = Path(run_dir) / "summary.json"
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error.msg}); run the evaluation again") from None
    if not isinstance(summary, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return summary


def measure(summary: Mapping[str, Any]) -> str:
    """ "accuracy", or "mean reward" of a run whose task has no verifier."""
    return str(summary.get("measure", "accuracy"))


def judge_line(summary: Mapping[str, Any]) -> str | None:
    """Who judged, and what was trained on; None in summaries of earlier versions, which do not say."""
    judge, reward = summary.get("judge"), summary.get("reward")
    if judge is None:
        return None
    if judge == reward:
        return f"Judged by the reward trained on, {judge}."
    return f"Judged by {judge}, trained on {reward}: the verdict is about the former."


def compare(summary: Mapping[str, Any]) -> list[Comparison]:
    """One `Comparison` per number of denoising steps, fewest first; intervals are Wilson's where none are given."""
    before, after = summary.get("before") or {}, summary.get("after") or {}
    rows = []
    for steps in sorted({*before, *after}, key=_step_order):
        first, second = _measured(before.get(steps)), _measured(after.get(steps))
        first_interval = _interval(summary, "before_interval", steps, first)
        second_interval = _interval(summary, "after_interval", steps, second)
        change, verdict = None, UNKNOWN
        if first is not None and second is not None and first_interval and second_interval:
            change = difference_interval(first, first_interval, second, second_interval)
            verdict = IMPROVED if change[0] > 0 else WORSE if change[1] < 0 else SAME
        rows.append(Comparison(steps, first, first_interval, second, second_interval, change, verdict))
    return rows


def verdict_line(summary: Mapping[str, Any]) -> str:
    """One sentence on the whole run; what got worse is named in it, never averaged away."""
    rows = compare(summary)
    if not rows:
        return "No verdict: summary.json has no accuracies before and after training."
    if all(row.after is None for row in rows):
        return "No verdict: nothing was measured after training."
    if all(row.before is None for row in rows):
        return "No verdict: nothing was measured before training."
    parts = []
    for verdict, words in (
        (IMPROVED, "Improved"),
        (WORSE, "Worse"),
        (SAME, "Not distinguishable from before"),
        (UNKNOWN, "Unknown (a measurement or its interval is missing)"),
    ):
        group = [row for row in rows if row.verdict == verdict]
        if group:
            changes = ", ".join(f"{row.steps} ({_share(row.before)} to {_share(row.after)})" for row in group)
            parts.append(f"{words} at {changes} denoising step{'s' if group[-1].steps != '1' else ''}.")
    return " ".join(parts)


def goal_line(summary: Mapping[str, Any]) -> str | None:
    """Whether the run's goal was met, recomputed from the accuracies; None when the run had no goal."""
    goal = summary.get("goal")
    if not goal:
        return None
    steps = str(goal.get("metric", goal.get("steps", "")))
    limits = []
    if goal.get("before_max") is not None:
        limits.append(f"at most {_share(goal['before_max'])} before")
    if goal.get("after_min") is not None:
        limits.append(f"at least {_share(goal['after_min'])} after")
    wanted = f"{steps}-step {measure(summary)} {' and '.join(limits)}"
    row = next((row for row in compare(summary) if row.steps == steps), None)
    if row is None or row.before is None or row.after is None:
        return f"Goal not judged ({wanted}): there is no {measure(summary)} at {steps} steps before and after."
    low = row.before <= goal.get("before_max", 1.0)
    high = row.after >= goal.get("after_min", 0.0)
    met = low and high
    line = f"Goal {'met' if met else 'missed'} ({wanted}): {_share(row.before)} before, {_share(row.after)} after."
    if not low:
        line += " The starting point was already above its limit."
    if met and row.after_interval and row.after_interval[0] < goal.get("after_min", 0.0):
        line += f" The 95 % interval of the latter reaches down to {_share(row.after_interval[0])}, below the goal."
    if goal.get("met") is not None and bool(goal["met"]) != met:
        line += (
            f" summary.json claims the goal was {'met' if goal['met'] else 'missed'}; its own numbers say otherwise."
        )
    return line


def unscored_line(summary: Mapping[str, Any]) -> str | None:
    """How many held-out problems have no score and are in no accuracy; None when all were scored."""
    parts = []
    for side in ("before", "after"):
        counts = summary.get(f"{side}_unscored") or {}
        missing = [f"{counts[steps]} at {steps} steps" for steps in sorted(counts, key=_step_order) if counts[steps]]
        if missing:
            parts.append(f"{side} training {', '.join(missing)}")
    return f"Held-out problems without a score, counted in no accuracy: {'; '.join(parts)}." if parts else None


def backslide_line(summary: Mapping[str, Any]) -> str | None:
    """How often an answer was right at some step and wrong at the end; None when it was not measured."""
    parts = []
    for side in ("before", "after"):
        table = summary.get(f"{side}_backslide") or {}
        shares = []
        for s in sorted(table, key=_step_order):
            if _measured(table[s]["share"]) is not None:
                left_out = f", {table[s]['unscored']} not judged" if table[s].get("unscored") else ""
                each = f"{table[s]['steps']:.1f} right steps each{left_out}"
                shares.append(f"{_share(table[s]['share'])} at {s} steps ({each})")
        if shares:
            parts.append(f"{side} training {', '.join(shares)}")
    return f"Right at an earlier step and wrong at the end: {'; '.join(parts)}." if parts else None


def _measured(share: float | None) -> float | None:
    """None for NaN too: an accuracy over no scored problem is no measurement."""
    return None if share is None or math.isnan(share) else share


def _interval(summary: Mapping[str, Any], field: str, steps: str, share: float | None) -> Interval | None:
    given = (summary.get(field) or {}).get(steps)
    if given is not None:
        return float(given[0]), float(given[1])
    n = summary.get("n_eval")
    if share is None or not n or measure(summary) != "accuracy":
        return None
    return wilson_interval(round(share * n), int(n))


def _step_order(steps: str) -> tuple[float, str]:
    return (float(steps), "") if steps.isdigit() else (float("inf"), steps)


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"
