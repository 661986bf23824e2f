"""What a finished run leaves behind for people: table, learning curve, report."""

from __future__ import annotations

from pathlib import Path


def finish(run_dir: Path) -> None:
    """Draw and print the results of a run folder."""
    from rich.console import Console

    from rl.track.plots import plot_learning_curve
    from rl.track.report import write_report
    from rl.track.table import before_after_table
    from rl.track.verdict import read_summary

    summary = read_summary(run_dir)
    console = Console()
    curve = plot_learning_curve(run_dir)
    report = write_report(run_dir)
    if "after" in summary:
        console.print(before_after_table(summary))
    # soft_wrap keeps a long path on one line, so that it can be clicked and copied.
    console.print(f"learning curve: {curve}", soft_wrap=True)
    console.print(f"report:         {report}", soft_wrap=True)
