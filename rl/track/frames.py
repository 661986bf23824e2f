"""The denoising viewer's data made ready for the page: what each cell of each shown step looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl.track.samples import reward_text

# A cell is about 50 bytes of HTML: this keeps the page near 5 MB however long the texts are.
MAX_CELLS = 100_000


@dataclass(frozen=True)
class Cell:
    """One response position at one step.

    Attributes:
        text: the token, "" when masked.
        classes: space-separated: "masked", "given", "broken" (a given that was overwritten), "new" (decided by this
            step), "remasked" (taken back by this step), "tail" (behind the end of the answer), "violates" (a rule is
            broken there, in the last canvas).
        percent: confidence in percent, None where there is none.
    """

    text: str
    classes: str
    percent: int | None


@dataclass(frozen=True)
class Frame:
    """One shown canvas: its caption, the cells of the grid (or of the text), and the cells behind the grid."""

    caption: str
    cells: list[Cell]
    rest: list[Cell]


@dataclass(frozen=True)
class View:
    """One rollout of the viewer.

    Attributes:
        left_out: canvases that are not shown because the page would be too long.
        reward: the judge's reward and its parts in words, "" where they were not kept.
        violations: the broken rules of a grid, `["3 twice in row 1"]`.
    """

    frames: list[Frame]
    correct: bool
    left_out: int
    reward: str
    violations: list[str]


def build_view(view: Mapping[str, Any], grid: Sequence[int] | None, max_frames: int) -> View:
    """Turn one VIEW of viewer.json (see `rl.track.viewer.trajectory_view`) into frames.

    Args:
        grid: rows and columns, or None for text.
        max_frames: with more canvases than this, evenly spaced ones are shown, the first and the last among them;
            the changes of a left-out step are marked in the next shown one.
    """
    steps = view["steps"]
    shown = _evenly(len(steps), max_frames)
    num_grid = grid[0] * grid[1] if grid else len(steps[0]["tokens"]) if steps else 0
    frames, previous = [], -1
    for index in shown:
        changed = {cell for step in steps[previous + 1 : index + 1] for cell in step["changed"]}
        cells = _cells(view, index, changed)
        frames.append(Frame(_caption(index, len(steps) - 1, steps[index], changed), cells[:num_grid], cells[num_grid:]))
        previous = index
    reward = reward_text(view["value"], view.get("parts")) if "value" in view else ""
    violations = [rule for rule, _ in view.get("violations", [])]
    return View(frames, bool(view.get("correct")), len(steps) - len(shown), reward, violations)


def frame_budget(items: Sequence[Mapping[str, Any]]) -> int:
    """How many canvases per rollout fit on the page; never fewer than 2."""
    views = [item[side] for item in items for side in ("before", "after") if item.get(side)]
    cells = sum(len(view["steps"][0]["tokens"]) for view in views if view["steps"])
    return max(2, MAX_CELLS // max(cells, 1))


def _cells(view: Mapping[str, Any], index: int, changed: set[int]) -> list[Cell]:
    step = view["steps"][index]
    givens = view.get("givens") or []
    stop = view.get("stop_length", len(step["tokens"]))
    last = index == len(view["steps"]) - 1
    violating = {cell for _, cells in view.get("violations", []) for cell in cells} if last else set()
    cells = []
    for position, token in enumerate(step["tokens"]):
        given = givens[position] if position < len(givens) else ""
        classes = []
        if not token:
            classes.append("remasked" if position in changed else "masked")
        elif position in changed:
            classes.append("new")
        if given:
            classes.append("given" if token in ("", given) else "broken")
        if token and position >= stop:
            classes.append("tail")
        if position in violating:
            classes.append("violates")
        value = step["confidence"][position]
        cells.append(Cell(_visible(token), " ".join(classes), None if value is None else round(100 * value)))
    return cells


def _visible(token: str) -> str:
    """Line ends are marked, and spaces where there is nothing else: a token of a space is "·"."""
    marked = token.replace("\n", "↵\n")
    return marked if token.strip() else marked.replace(" ", "·").replace("\t", "→")


def _caption(index: int, last: int, step: Mapping[str, Any], changed: set[int]) -> str:
    if index == 0 and not changed:
        return "start: everything masked" if not any(step["tokens"]) else "start"
    remasked = sum(1 for cell in changed if not step["tokens"][cell])
    parts = [f"{len(changed) - remasked} decided"]
    if remasked:
        parts.append(f"{remasked} remasked")
    return f"step {index} of {last}: {', '.join(parts)}"


def _evenly(count: int, limit: int) -> list[int]:
    if count <= limit:
        return list(range(count))
    return sorted({round(index * (count - 1) / (limit - 1)) for index in range(limit)})
