"""Learning curves of one run and of several seeds, drawn from `metrics.jsonl` alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rl.files import write_whole
from rl.track.jsonl import read_metrics
from rl.track.verdict import read_summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REWARD, ENTROPY, GAP = "reward/mean", "policy/entropy", "policy/logprob_gap"
# An evaluation logs one of them (`rl.train.judge.Judge.by_rewards`).
HELDOUT = {"eval/accuracy@": "accuracy", "eval/reward@": "mean reward"}

# Okabe and Ito's colours (2008), told apart with any colour vision; the yellow is left out, it vanishes on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vP"

_WINDOW = 9  # steps of the running mean where several noisy rewards share a panel
_BUDGET_POINTS = 13  # of a line over a budget


@dataclass(frozen=True)
class Theme:
    """Colours of paper, ink and lines; the report embeds one curve per theme."""

    paper: str
    ink: str
    faint: str
    colours: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1b1f24", "#d8dee4", _COLOURS)
DARK = Theme("#16191d", "#e6e9ec", "#3a4149", ("#56B4E9", "#FF8B4A", "#2BC79B", "#E59BC5", "#8AB6FF", "#E69F00"))


@dataclass(frozen=True)
class Series:
    """A metric over steps, with its interval where every point has one.

    Attributes:
        steps, values: equally long; lines where the metric is absent or null are left out.
        low, high: None, or as long as values.
    """

    steps: list[int]
    values: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


def plot_learning_curve(
    run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, theme: Theme = LIGHT
) -> Path:
    """Draw training reward, held-out accuracy, entropy and the rollout-learner log-prob gap of one run.

    Args:
        run_dir: a run folder with metrics.jsonl. Panels without data say so.
        out: where to write; `<run_dir>/learning_curve.png` by default.
        theme: LIGHT or DARK.

    Returns:
        The path of the PNG.

    Raises:
        ValueError: the folder has no metrics.
    """
    train, evals = read_metrics(run_dir, "train"), read_metrics(run_dir, "eval")
    figure, axes = _figure([["reward", "accuracy"], ["entropy", "gap"]], (11, 6.4), [2.1, 1], theme)
    _reward_panel(axes["reward"], train, theme)
    _accuracy_panel(axes["accuracy"], evals, theme)
    for name, metric, heading in (
        ("entropy", ENTROPY, "Entropy of the decisions (nats)"),
        ("gap", GAP, "Rollout-learner log-prob gap (nats)"),
    ):
        _title(axes[name], heading)
        _line(axes[name], series(train, metric), theme.colours[0], theme)
    # The gap of an exact estimator is near 1e-7: say so on each tick, not as a factor floating above the panel.
    axes["gap"].yaxis.set_major_formatter("{x:g}")
    _last_row(axes["entropy"], axes["gap"])
    return _save(figure, Path(out) if out else Path(run_dir) / "learning_curve.png")


def plot_runs(
    run_dirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None, theme: Theme = LIGHT
) -> Path:
    """Draw several runs (seeds) of one recipe: training reward, and one panel per number of denoising steps.

    Args:
        run_dirs: run folders; a run is labelled with the seed in its summary.json, else with its folder's name.
        out: where to write; `runs.png` beside the first run by default.
        theme: LIGHT or DARK.

    Returns:
        The path of the PNG.

    Raises:
        ValueError: no folder was given, or one has no metrics.
    """
    if not run_dirs:
        raise ValueError("no run folder was given; name at least one")
    folders = [Path(folder) for folder in run_dirs]
    labels = [_run_label(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        labels = [folder.name for folder in folders]
    train = [read_metrics(folder, "train") for folder in folders]
    evals = [read_metrics(folder, "eval") for folder in folders]
    names = sorted({name for records in evals for name in accuracy_names(records)}, key=_num_steps)
    columns = max(2, -(-len(names) // 2))
    panels: list[list[str]] = [["reward"] * columns, *_grid(names, columns)]
    figure, axes = _figure(panels, (4 * columns, 2.6 * len(panels) + 0.8), [1.2] + [1] * (len(panels) - 1), theme)
    _title(axes["reward"], f"Training reward, running mean of {_WINDOW} steps")
    _several(axes["reward"], [series(records, REWARD) for records in train], labels, theme, smooth=True)
    for name in names:
        _title(axes[name], _heldout_title(name))
        _several(axes[name], [series(records, name) for records in evals], labels, theme, smooth=False)
    _last_row(*(axes[name] for name in panels[-1] if name in axes))
    return _save(figure, Path(out) if out else folders[0].parent / "runs.png")


BUDGETS = {
    "cost/sequence_forwards": "Sequences through the model",
    "cost/reward_queries": "Reward queries",
    "cost/updates": "Optimizer updates",
}


def plot_budgets(
    variants: Mapping[str, Sequence[str | os.PathLike[str]]],
    metric: str,
    out: str | os.PathLike[str],
    theme: Theme = LIGHT,
) -> Path:
    """Draw a held-out metric against what it cost, once for each of three budgets; a line per variant.

    Args:
        variants: name -> run folders of its seeds. Lines are means over seeds at equal budgets.
        metric: an `eval/accuracy@S` or `eval/reward@S`.

    Raises:
        ValueError: a folder has no metrics, or nowhere is the metric.
    """
    figure, axes = _figure([list(BUDGETS)], (14, 4.4), [1], theme)
    drawn = False
    for index, (name, folders) in enumerate(variants.items()):
        runs = [[p for p in costed_evaluations(folder) if metric in p] for folder in folders]
        runs = [run for run in runs if run]
        drawn = drawn or bool(runs)
        colour = theme.colours[index % len(theme.colours)]
        style: dict[str, Any] = {
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": ("-", "--")[index // len(_COLOURS) % 2],
        }
        for budget, panel in axes.items():
            if runs:
                spent, means = mean_over_budget(runs, budget, metric)
                panel.plot(spent, means, color=colour, label=name, linewidth=1.4, markersize=4, **style)
    if not drawn:
        raise ValueError(f"no run has the metric {metric!r}: name one of its eval.num_inference_steps")
    limits = [panel.get_ylim() for panel in axes.values()]
    for budget, panel in axes.items():
        panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        panel.set_xlabel(BUDGETS[budget], fontsize=9)
        panel.tick_params(axis="x", labelrotation=20)
    first, *_, last = axes.values()
    _title(first, _heldout_title(metric))
    last.legend(fontsize=8, frameon=False, labelcolor=theme.ink, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, Path(out))


def costed_evaluations(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Every evaluation of a run, by step: its metrics, and what the run had spent of each budget by then."""
    costs = {0: dict.fromkeys(BUDGETS, 0.0)}
    costs |= {
        r["step"]: {b: r[b] for b in BUDGETS} for r in read_metrics(folder, "train") if BUDGETS.keys() <= r.keys()
    }
    return [{**r, **costs[r["step"]]} for r in sorted(read_metrics(folder, "eval"), key=lambda r: r["step"])]


def mean_over_budget(
    runs: Sequence[Sequence[Mapping[str, float]]], budget: str, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Points of a budget, and a metric's mean over runs there.

    Runs spend their budgets at different paces: the mean goes as far as the thriftiest.
    """
    points = min(max(len(run) for run in runs), _BUDGET_POINTS)
    spent = np.linspace(0.0, min(run[-1][budget] for run in runs), points)
    return spent, np.mean([[metric_at(run, budget, at, metric) for at in spent] for run in runs], axis=0)


def metric_at(run: Sequence[Mapping[str, float]], budget: str, spent: float, metric: str) -> float:
    """A metric of `costed_evaluations` at any point of a budget: linear between two evaluations."""
    points = [point for point in run if metric in point]
    return float(np.interp(spent, [point[budget] for point in points], [point[metric] for point in points]))


def series(records: Sequence[Mapping[str, Any]], metric: str) -> Series:
    """The metric over the records' steps; its interval is `reward/low` of `reward/mean`, `x_low@4` of `x@4`.

    A step that was logged twice (an evaluation on the way and the final one) keeps its last value.
    """
    points = list({record["step"]: record for record in records if record.get(metric) is not None}.values())
    steps, values = [record["step"] for record in points], [record[metric] for record in points]
    low, high = (
        metric.replace("@", f"_{side}@").removesuffix("mean") + side * ("@" not in metric) for side in ("low", "high")
    )
    if points and all(record.get(low) is not None and record.get(high) is not None for record in points):
        return Series(steps, values, [record[low] for record in points], [record[high] for record in points])
    return Series(steps, values)


def accuracy_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The `eval/accuracy@S` or `eval/reward@S` metrics of the records, fewest denoising steps first."""
    return sorted({name for record in records for name in record if name.startswith(tuple(HELDOUT))}, key=_num_steps)


def _heldout_title(name: str) -> str:
    return f"Held-out {_measure(name)}, {_num_steps(name)} denoising steps"


def _measure(name: str) -> str:
    return HELDOUT.get(name.partition("@")[0] + "@", name)


def _reward_panel(axes: Axes, train: Sequence[Mapping[str, Any]], theme: Theme) -> None:
    reward = series(train, REWARD)
    _title(axes, "Training reward" + (", mean with 95 % interval" if reward.low else ""))
    _line(axes, reward, theme.colours[0], theme)


def _accuracy_panel(axes: Axes, evals: Sequence[Mapping[str, Any]], theme: Theme) -> None:
    names = accuracy_names(evals)
    _title(axes, f"Held-out {_measure(names[0]) if names else 'accuracy'} by number of denoising steps")
    if not names:
        _nothing(axes, theme)
    ends = []
    for index, name in enumerate(names):
        curve = series(evals, name)
        colour = theme.colours[index % len(theme.colours)]
        _line(axes, curve, colour, theme, marker=_MARKERS[index % len(_MARKERS)])
        if curve.values:
            ends.append((curve.steps[-1], curve.values[-1], f"{_num_steps(name)} steps", colour))
    _direct_labels(axes, ends)


def _several(axes: Axes, curves: Sequence[Series], labels: Sequence[str], theme: Theme, smooth: bool) -> None:
    ends = []
    for index, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        colour = theme.colours[index % len(theme.colours)]
        if not curve.values:
            continue
        values = _running_mean(curve.values) if smooth else curve.values
        _line(axes, Series(curve.steps, values), colour, theme, marker="" if smooth else _MARKERS[index % 6])
        ends.append((curve.steps[-1], values[-1], label, colour))
    if not ends:
        _nothing(axes, theme)
    elif not smooth:
        _widen(axes, 0.1)
    _direct_labels(axes, ends)


def _widen(axes: Axes, span: float) -> None:
    """Give an accuracy panel at least this height, so that noise around a flat curve does not fill it."""
    bottom, top = axes.get_ylim()
    missing = max(0.0, span - (top - bottom))
    top = min(top + missing / 2, max(top, 1.01))  # no room above what an accuracy can reach
    axes.set_ylim(min(bottom, top - span), top)


def _line(axes: Axes, curve: Series, colour: str, theme: Theme, marker: str = "") -> None:
    if not curve.values:
        _nothing(axes, theme)
        return
    # A single point has no line: it needs a marker to be seen at all.
    marker = marker or ("o" if len(curve.values) == 1 else "")
    axes.plot(curve.steps, curve.values, color=colour, linewidth=1.6, marker=marker, markersize=4.5)
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)


def _direct_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each curve's name behind its last point, pushed apart where the ends are close."""
    if not ends:
        return
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    gap = (top - bottom) * 0.07
    ordered = sorted(ends, key=lambda end: end[1])
    heights = [end[1] for end in ordered]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    # Pushing up may leave the panel; slide the stack down from the top by as little as it takes.
    for index in range(len(heights) - 1, -1, -1):
        limit = top - gap / 2 if index == len(heights) - 1 else heights[index + 1] - gap
        heights[index] = min(heights[index], limit)
    for (step, value, text, colour), height in zip(ordered, heights, strict=True):
        axes.annotate(
            text,
            xy=(step, value),
            xytext=(1.015, height),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def _running_mean(values: Sequence[float], window: int = _WINDOW) -> list[float]:
    half = window // 2
    spans = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def _grid(names: Sequence[str], columns: int) -> list[list[str]]:
    cells = [*names, *["."] * (-len(names) % columns)]
    return [cells[start : start + columns] for start in range(0, len(cells), columns)]


def _num_steps(name: str) -> int:
    digits = name.rpartition("@")[2]
    return int(digits) if digits.isdigit() else 0


def _run_label(folder: Path) -> str:
    seed = read_summary(folder).get("seed")
    return folder.name if seed is None else f"seed {seed}"


def _figure(
    panels: list[list[str]], size: tuple[float, float], heights: Sequence[float], theme: Theme
) -> tuple[Figure, dict[str, Axes]]:
    # The object-oriented interface and the Agg canvas: no global backend is switched, no window can open.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1), facecolor=theme.paper)
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic(panels, height_ratios=heights)  # type: ignore[arg-type]
    for panel in axes.values():
        panel.set_facecolor(theme.paper)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(theme.faint)
        panel.tick_params(colors=theme.ink, labelsize=9, color=theme.faint)
        panel.grid(axis="y", color=theme.faint, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.title.set_color(theme.ink)
        panel.xaxis.label.set_color(theme.ink)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes  # type: ignore[return-value]


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=axes.title.get_color())


def _last_row(*panels: Axes) -> None:
    for axes in panels:
        axes.set_xlabel("RL step", fontsize=9)


def _nothing(axes: Axes, theme: Theme) -> None:
    axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=theme.ink, alpha=0.6)
    axes.set_xticks([])
    axes.set_yticks([])


def _save(figure: Figure, path: Path) -> Path:
    return write_whole(path, lambda partial: figure.savefig(partial, format="png", facecolor=figure.get_facecolor()))
