"""`budgets.png` of `denoise-rl compare`: a held-out metric against what it cost, by three budgets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from rl.track.intervals import t_half_width
from rl.track.jsonl import read_metrics
from rl.track.plots import LIGHT, Theme, heldout_title, new_figure, save_figure, set_title, styles_of
from rl.track.verdict import read_summary

BUDGETS = {
    "cost/sequence_forwards": "Sequences through the model",
    "cost/reward_queries": "Reward queries",
    "cost/updates": "Optimizer updates",
}
_POINTS = 13  # of a line over a budget
_FEW = 4  # variants whose bands may overlap and be told apart


def plot_budgets(
    variants: Mapping[str, Sequence[str | os.PathLike[str]]],
    metric: str,
    out: str | os.PathLike[str],
    theme: Theme = LIGHT,
) -> Path:
    """Draw a held-out metric against what it cost, once for each of three budgets.

    A line is the mean over seeds of what was evaluated on the way, at equal budgets. Marks with bars are the means of
    the evaluations before and after training, which are about other problems. Bands (of at most 4 variants) and bars
    are 95 % t intervals over seeds.

    Args:
        variants: name -> run folders of its seeds.
        metric: an `eval/accuracy@S` or `eval/reward@S`.

    Raises:
        ValueError: a folder has no metrics, or nowhere is the metric.
    """
    found = {
        name: [run for folder in folders if (run := [p for p in costed_evaluations(folder) if metric in p])]
        for name, folders in variants.items()
    }
    found = {name: runs for name, runs in found.items() if runs}
    if not found:
        raise ValueError(f"no run has the metric {metric!r}: name one of its eval.num_inference_steps")
    figure, axes = new_figure([list(BUDGETS)], (14, 4.4), [1], theme)
    begun: list[float] = []
    for budget, panel in axes.items():
        most = max(run[-1][budget] for runs in found.values() for run in runs)
        taken: list[float] = []
        for index, (style, runs) in enumerate(zip(styles_of(list(found), theme), found.values(), strict=True)):
            ways = [[point for point in run if not point["test"]] for run in runs]
            if all(len(way) > 1 for way in ways):
                spent, means, half = mean_over_budget(ways, budget, metric)
                panel.plot(spent, means, style.line, color=style.colour, linewidth=1.4)
                if len(found) <= _FEW:
                    panel.fill_between(spent, means - half, means + half, color=style.colour, alpha=0.15, linewidth=0)
            tests = [test for run in runs if (test := [point for point in run if point["test"]])]
            # A variant of the first one's model begins where that does; another has a mark of its own in its colour.
            start = [test[0][metric] for test in tests]
            begun = start if index == 0 else begun
            places = [(0, "before", theme.ink)] * (index == 0)
            places += [(0, f"{style.label}, before", style.colour)] * (start != begun[: len(start)])
            places += [(-1, style.label, style.colour)]
            for place, label, colour in places if tests else []:
                values, at = [test[place][metric] for test in tests], fmean(test[place][budget] for test in tests)
                # Variants of equal costs end at one place: side by side, then.
                while place and any(abs(at - other) < most * 0.01 for other in taken):
                    at += most * 0.012
                if place:
                    taken.append(at)
                panel.errorbar(
                    at, fmean(values),
                    yerr=t_half_width(values) if len(values) > 1 else None,
                    fmt=style.marker, color=colour, label=label, markersize=5, elinewidth=1,
                    markerfacecolor="none" if place == 0 else colour,
                )  # fmt: skip
    limits = [panel.get_ylim() for panel in axes.values()]
    for budget, panel in axes.items():
        # An interval of few seeds may be wider than what there is.
        low, high = min(low for low, _ in limits), max(high for _, high in limits)
        panel.set_ylim(*((max(low, -0.02), min(high, 1.02)) if "accuracy" in metric else (low, high)))
        panel.set_xlabel(BUDGETS[budget], fontsize=9)
        panel.locator_params(axis="x", nbins=5)
        panel.xaxis.set_major_formatter("{x:,.0f}")
    first, *_, last = axes.values()
    set_title(first, heldout_title(metric))
    last.legend(fontsize=8, frameon=False, labelcolor=theme.ink, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save_figure(figure, Path(out))


def costed_evaluations(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Every evaluation of a run, by step: its metrics, and what the run had spent of each budget by then.

    `test` is 1 before and after training, else 0.
    """
    costs = {0: dict.fromkeys(BUDGETS, 0.0)}
    costs |= {
        r["step"]: {b: r[b] for b in BUDGETS} for r in read_metrics(folder, "train") if BUDGETS.keys() <= r.keys()
    }
    ends = (0, read_summary(folder).get("train_steps"))
    evals = sorted(read_metrics(folder, "eval"), key=lambda r: r["step"])
    return [{**r, **costs[r["step"]], "test": r["step"] in ends} for r in evals]


def mean_over_budget(
    runs: Sequence[Sequence[Mapping[str, float]]], budget: str, metric: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of a budget, a metric's mean over runs there, and the half-width of its 95 % t interval (0 of one run).

    Runs spend their budgets at different paces: the points lie between the last first and the first last evaluation.
    """
    points = min(max(len(run) for run in runs), _POINTS)
    spent = np.linspace(max(run[0][budget] for run in runs), min(run[-1][budget] for run in runs), points)
    values = [[metric_at(run, budget, at, metric) for run in runs] for at in spent]
    half = [t_half_width(row) if len(row) > 1 else 0.0 for row in values]
    return spent, np.mean(values, axis=1), np.array(half)


def metric_at(run: Sequence[Mapping[str, float]], budget: str, spent: float, metric: str) -> float:
    """A metric of `costed_evaluations` at any point of a budget: linear between two evaluations."""
    points = [point for point in run if metric in point]
    return float(np.interp(spent, [point[budget] for point in points], [point[metric] for point in points]))
