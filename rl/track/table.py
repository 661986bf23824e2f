"""The before/after table of a run, for the terminal and for plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rl.evaluation.intervals import Interval
from rl.track.verdict import (
    IMPROVED,
    WORSE,
    Comparison,
    backslide_line,
    compare,
    goal_line,
    unscored_line,
    verdict_line,
)

HEADINGS = ("denoising steps", "before", "after", "change", "verdict")


def before_after_table(summary: Mapping[str, Any]) -> Table:
    """A rich table: accuracy before and after by number of denoising steps, with 95 % intervals and a verdict.

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


def before_after_text(summary: Mapping[str, Any]) -> str:
    """The same table as plain text, for logs and files."""
    lines = [HEADINGS, *(cells(row) for row in compare(summary))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    text = [title(summary)]
    text += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text, conclusion(summary)])


def title(summary: Mapping[str, Any]) -> str:
    """What was measured: task, seed and number of held-out problems, as far as they are known."""
    parts = [f"{summary['task']}" if "task" in summary else "held-out accuracy"]
    if "n_eval" in summary:
        parts.append(f"{summary['n_eval']:,} held-out problems")
    if "seed" in summary:
        parts.append(f"seed {summary['seed']}")
    return ", ".join(parts) + ", 95 % intervals"


def conclusion(summary: Mapping[str, Any]) -> str:
    """The verdict; the goal when the run had one; unscored problems when there were any."""
    lines = (verdict_line(summary), goal_line(summary), backslide_line(summary), unscored_line(summary))
    return "\n".join(line for line in lines if line)


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
