"""Learning curves of one run and of several seeds, drawn from `metrics.jsonl`.

Evaluations before and after training are about test problems, those on the way about validation problems (where a task
has them). The former are marks with bars, the latter lines with bands, and no line joins the two.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.files import write_whole
from rl.track.intervals import t_half_width
from rl.track.jsonl import read_metrics
from rl.track.verdict import read_summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REWARD, ENTROPY, GAP = "reward/mean", "policy/entropy", "policy/logprob_gap"
GAP_MAX = "policy/logprob_gap_max"
# An evaluation logs one of them (`rl.train.judge.Judge.by_rewards`).
HELDOUT = {"eval/accuracy@": "accuracy", "eval/reward@": "mean reward"}

# Okabe and Ito's colours (2008), told apart with any colour vision; the yellow is left out, it vanishes on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vP"

_WINDOW = 9  # steps of the running mean of a noisy reward; a 20th of all steps where that is more
_SMOOTHED = "Training reward, running mean of {} steps"


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
class Style:
    """How one of several curves is drawn, and what stands behind its end."""

    colour: str
    marker: str
    label: str
    line: str = "-"


End = tuple[float, float, Style]  # step and value of a curve's last point


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
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    theme: Theme = LIGHT,
    narrow: bool = False,
) -> Path:
    """Draw training reward, held-out accuracy, entropy and the rollout-learner log-prob gap of one run.

    Args:
        run_dir: a run folder with metrics.jsonl. Panels without data say so.
        out: where to write; `<run_dir>/learning_curve.png` by default.
        theme: LIGHT or DARK.
        narrow: one panel below the other, for a telephone.

    Returns:
        The path of the PNG.

    Raises:
        ValueError: the folder has no metrics.
    """
    train, evals = read_metrics(run_dir, "train"), read_metrics(run_dir, "eval")
    if narrow:
        panels, size, heights = [["reward"], ["accuracy"], ["entropy"], ["gap"]], (4.4, 11.0), [2.0, 2.0, 1.0, 1.0]
    else:
        panels, size, heights = [["reward", "accuracy"], ["entropy", "gap"]], (11.0, 6.4), [2.1, 1.0]
    figure, axes = new_figure(panels, size, heights, theme)
    names, rewards = accuracy_names(evals), reward_names(train)
    # One colour for a number of denoising steps, in both panels.
    counts = sorted({_num_steps(name) for name in [*names, *rewards]})
    styles = dict(zip(counts, styles_of([f"{count} steps" if count else "" for count in counts], theme), strict=True))
    set_title(axes["reward"], _SMOOTHED.format(window_of(len(train))))
    ends = [draw_smoothed(axes["reward"], series(train, name), styles[_num_steps(name)]) for name in rewards]
    draw_ends(axes["reward"], ends, theme)
    set_title(axes["accuracy"], f"Held-out {_measure(names[0]) if names else 'accuracy'}: before and after, on the way")
    last = read_summary(run_dir).get("train_steps")
    ends = [draw_heldout(axes["accuracy"], evals, name, last, styles[_num_steps(name)]) for name in names]
    draw_ends(axes["accuracy"], ends, theme)
    for name, metric, heading in (
        ("entropy", ENTROPY, "Entropy of the decisions (nats)"),
        ("gap", GAP, "Rollout-learner log-prob gap (nats)"),
    ):
        set_title(axes[name], heading)
        draw_ends(axes[name], [draw_line(axes[name], series(train, metric), *styles_of([""], theme))], theme)
    # The gap of an exact estimator is near 1e-7: say so on each tick, not as a factor floating above the panel.
    axes["gap"].yaxis.set_major_formatter("{x:g}")
    if all(record.get(GAP) == 0 for record in train):
        axes["gap"].set_yticks([0] if train else [])
    same_steps(axes.values(), [*train, *evals])
    last_row(axes["entropy"], axes["gap"])
    return save_figure(figure, Path(out) if out else Path(run_dir) / "learning_curve.png")


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
    summaries = [read_summary(folder) for folder in folders]
    labels = [f"seed {s['seed']}" if "seed" in s else f.name for f, s in zip(folders, summaries, strict=True)]
    styles = styles_of(labels if len(set(labels)) == len(labels) else [folder.name for folder in folders], theme)
    train = [read_metrics(folder, "train") for folder in folders]
    evals = [read_metrics(folder, "eval") for folder in folders]
    names = sorted({name for records in evals for name in accuracy_names(records)}, key=_num_steps)
    columns = max(2, -(-len(names) // 2))
    panels: list[list[str]] = [["reward"] * columns, *_grid(names, columns)]
    figure, axes = new_figure(panels, (4 * columns, 2.6 * len(panels) + 0.8), [1.2] + [1] * (len(panels) - 1), theme)
    set_title(axes["reward"], _SMOOTHED.format(window_of(max(map(len, train)))))
    curves = zip(train, styles, strict=True)
    draw_ends(
        axes["reward"], [draw_smoothed(axes["reward"], series(t, REWARD), style, False) for t, style in curves], theme
    )
    for name in names:
        set_title(axes[name], heldout_title(name))
        runs = zip(evals, summaries, styles, strict=True)
        ends = [draw_heldout(axes[name], e, name, s.get("train_steps"), style, False) for e, s, style in runs]
        _widen(axes[name], 0.1)
        draw_ends(axes[name], ends, theme)
    same_steps(axes.values(), [record for records in (*train, *evals) for record in records])
    last_row(*(axes[name] for name in panels[-1] if name in axes))
    return save_figure(figure, Path(out) if out else folders[0].parent / "runs.png")


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


def reward_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The training rewards: one per number of denoising steps where rollouts mix them, else the mean alone."""
    names = {name for record in records for name in record if name.startswith(f"{REWARD}@")}
    return sorted(names, key=_num_steps) if len(names) > 1 else [REWARD]


def heldout_title(name: str) -> str:
    return f"Held-out {_measure(name)}, {_num_steps(name)} denoising steps"


def _measure(name: str) -> str:
    return HELDOUT.get(name.partition("@")[0] + "@", name)


def styles_of(labels: Sequence[str], theme: Theme) -> list[Style]:
    """A colour, a mark and a kind of line for each; past the last colour its mark is another one."""
    colours, count = theme.colours, len(theme.colours)
    return [
        Style(
            colours[index % count], _MARKERS[(index + index // count) % count], label, ("-", "--")[index // count % 2]
        )
        for index, label in enumerate(labels)
    ]


def draw_smoothed(axes: Axes, curve: Series, style: Style, whole: bool = True) -> End | None:
    """The running mean; `whole` draws its 95 % interval and the single steps too."""
    means, half = smoothed(curve.values, window_of(len(curve.values)))
    if whole:
        axes.plot(curve.steps, curve.values, ".", color=style.colour, markersize=3, alpha=0.4)
        # No mean lies beyond the values themselves, such as 1.
        least, most = min(curve.values, default=0.0), max(curve.values, default=0.0)
        low = [max(least, mean - h) for mean, h in zip(means, half, strict=True)]
        high = [min(most, mean + h) for mean, h in zip(means, half, strict=True)]
        return draw_line(axes, Series(curve.steps, means, low, high), style)
    return draw_line(axes, Series(curve.steps, means), style)


def smoothed(values: Sequence[float], window: int) -> tuple[list[float], list[float]]:
    """The mean of `window` values around every value, fewer at both ends, and the half-width of its 95 % t interval.

    Of fewer than 5 values no interval is given (0): it would be wider than the panel.
    """
    half = window // 2
    spans = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    widths = [t_half_width(span) if len(span) >= 5 else 0.0 for span in spans]
    return [sum(span) / len(span) for span in spans], widths


def window_of(count: int) -> int:
    return max(_WINDOW, count // 20 | 1)


def draw_heldout(
    axes: Axes, evals: Sequence[Mapping[str, Any]], name: str, last: int | None, style: Style, bars: bool = True
) -> End | None:
    """Marks before and after training (RL steps 0 and `last`), and a line through what was evaluated on the way."""
    marks = series([record for record in evals if record["step"] in (0, last)], name)
    way = series([record for record in evals if record["step"] not in (0, last)], name)
    if marks.low is not None and marks.high is not None and bars:
        ends = zip(marks.low, marks.values, marks.high, strict=True)
        reach = [(value - low, high - value) for low, value, high in ends]
        axes.errorbar(marks.steps, marks.values, yerr=list(zip(*reach, strict=True)), fmt="none", ecolor=style.colour)
    # Two marks alone are about the same problems, so they may be joined.
    join = "none" if way.values else ":"
    axes.plot(marks.steps, marks.values, linestyle=join, color=style.colour, marker=style.marker, linewidth=1)
    line = draw_line(axes, way if bars else Series(way.steps, way.values), style)
    return (marks.steps[-1], marks.values[-1], style) if marks.values and (marks.steps[-1] or not line) else line


def _widen(axes: Axes, span: float) -> None:
    """Give an accuracy panel at least this height, so that noise around a flat curve does not fill it."""
    bottom, top = axes.get_ylim()
    missing = max(0.0, span - (top - bottom))
    top = min(top + missing / 2, max(top, 1.01))  # no room above what an accuracy can reach
    axes.set_ylim(min(bottom, top - span), top)


def draw_line(axes: Axes, curve: Series, style: Style) -> End | None:
    if not curve.values:
        return None
    # A single point has no line: it needs a marker to be seen at all.
    marker = "o" if len(curve.values) == 1 else ""
    axes.plot(curve.steps, curve.values, style.line, color=style.colour, linewidth=1.6, marker=marker, markersize=4.5)
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.steps, curve.low, curve.high, color=style.colour, alpha=0.18, linewidth=0)
    return curve.steps[-1], curve.values[-1], style


def draw_ends(axes: Axes, found: Sequence[End | None], theme: Theme) -> None:
    """Write each curve's name behind its last point, pushed apart where the ends are close."""
    ends = [end for end in found if end is not None]
    if not ends:
        axes.text(
            0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=theme.ink, alpha=0.6
        )
        axes.set_xticks([])
        axes.set_yticks([])
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
    for (step, value, style), height in zip(ordered, heights, strict=True):
        axes.annotate(
            style.label,
            xy=(step, value),
            xytext=(1.015, height),
            textcoords=axes.get_yaxis_transform(),
            color=style.colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def _grid(names: Sequence[str], columns: int) -> list[list[str]]:
    cells = [*names, *["."] * (-len(names) % columns)]
    return [cells[start : start + columns] for start in range(0, len(cells), columns)]


def _num_steps(name: str) -> int:
    digits = name.rpartition("@")[2]
    return int(digits) if digits.isdigit() else 0


def new_figure(
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


def set_title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=axes.title.get_color())


def same_steps(panels: Iterable[Axes], records: Sequence[Mapping[str, Any]]) -> None:
    """All panels over the same RL steps."""
    last = max((record["step"] for record in records), default=0) or 1
    for axes in panels:
        axes.set_xlim(-0.03 * last, 1.03 * last)


def last_row(*panels: Axes) -> None:
    for axes in panels:
        axes.set_xlabel("RL step", fontsize=9)


def save_figure(figure: Figure, path: Path) -> Path:
    return write_whole(path, lambda partial: figure.savefig(partial, format="png", facecolor=figure.get_facecolor()))
