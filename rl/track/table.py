"""The before/after table of a run, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rl.track.intervals import Interval
from rl.track.verdict import (
    IMPROVED,
    WORSE,
    Comparison,
    backslide_line,
    compare,
    goal_line,
    judge_line,
    measure,
    unscored_line,
    verdict_line,
)

HEADINGS = ("denoising steps", "before", "after", "change", "verdict")


def before_after_table(summary: Mapping[str, Any]) -> Table:
    """A rich table by number of denoising steps: accuracy (or mean reward) before and after, interval and verdict.

    Args:
        summary: the content of `summary.json`; missing parts show as "-" (see `rl.track.verdict`).
    """
    table = Table(
        title=title(summary),
        caption=conclusion(summary),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in HEADINGS:
        table.add_column(
            heading.replace(" ", "\n"),
            justify="left" if heading == "verdict" else "right",
            no_wrap=heading != "verdict",
        )
    for row in compare(summary):
        style = {IMPROVED: "green", WORSE: "red"}.get(row.verdict, "")
        # Intervals on a line of their own: the table then fits 80 columns.
        table.add_row(*(cell.replace(" [", "\n[") for cell in cells(row)), style=style)
    return table


def title(summary: Mapping[str, Any]) -> str:
    """Task, measure, number of held-out problems and seed, as far as they are known."""
    parts = [str(summary.get("task", "a run"))]
    problems = f"{summary['n_eval']:,} held-out problems" if "n_eval" in summary else "held-out problems"
    parts.append(f"{measure(summary)} on {problems}")
    if "seed" in summary:
        parts.append(f"seed {summary['seed']}")
    return ", ".join(parts) + ", 95 % intervals"


def conclusion(summary: Mapping[str, Any]) -> str:
    """The verdict and who judged; the goal when the run had one; unscored problems when there were any."""
    lines = (verdict_line, judge_line, goal_line, backslide_line, unscored_line)
    return "\n".join(text for line in lines if (text := line(summary)))


def cells(row: Comparison) -> tuple[str, ...]:
    """One table row as text, in the order of `HEADINGS`."""
    change = "-"
    if row.before is not None and row.after is not None:
        change = f"{row.after - row.before:+.3f}"
        if row.change_interval is not None:
            change += f" [{row.change_interval[0]:+.3f}, {row.change_interval[1]:+.3f}]"
    before = _with_interval(row.before, row.before_interval)
    return row.steps, before, _with_interval(row.after, row.after_interval), change, row.verdict


def _with_interval(share: float | None, interval: Interval | None) -> str:
    if share is None:
        return "-"
    return f"{share:.3f}" if interval is None else f"{share:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
