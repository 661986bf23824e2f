"""Generated images made ready for the report: a row per prompt, the same seeds before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What the set of images of an evaluation is measured by, and which way is better.
QUALITY = {
    "precision": ("precision: share of images that look real", "up"),
    "recall": ("recall: share of real images that are covered", "up"),
    "frechet": ("Fréchet distance to real images", "down"),
    "vendi": ("Vendi score: different images of a prompt, right or wrong", "up"),
    "vendi_correct": ("Vendi score: different images among the right ones of a prompt", "up"),
    "distance_correct": ("mean distance between right images of a prompt", ""),
}


@dataclass(frozen=True)
class Picture:
    """One image: its data URL, and whether the verifier called it right."""

    source: str
    correct: bool


@dataclass
class PromptRow:
    """A prompt's pictures; entry i of both lists was drawn with the same seed. None where one was not recorded."""

    prompt: str
    before: list[Picture | None] = field(default_factory=list)
    after: list[Picture | None] = field(default_factory=list)

    def right(self, side: str) -> str:
        """How many are right, as "3 of 8"."""
        shown = [picture for picture in getattr(self, side) if picture is not None]
        return f"{sum(picture.correct for picture in shown)} of {len(shown)}"


def is_image_viewer(items: Sequence[Mapping[str, Any]]) -> bool:
    """Whether viewer.json holds images and not denoising canvases."""
    views = [item.get(side) for item in items for side in ("before", "after")]
    return any(view is not None and "image" in view for view in views)


def prompt_rows(items: Sequence[Mapping[str, Any]]) -> list[PromptRow]:
    """The items of viewer.json by prompt, in order of appearance.

    Example of an item: `{"prompt": "seven", "before": {"image": "data:image/png;base64,...", "correct": False},
    "after": {...}}`.

    Raises:
        ValueError: an image is no data URL; the page loads nothing from elsewhere.
    """
    rows: dict[str, PromptRow] = {}
    for item in items:
        prompt = str(item["prompt"])
        row = rows.setdefault(prompt, PromptRow(prompt))
        row.before.append(_picture(item.get("before")))
        row.after.append(_picture(item.get("after")))
    return list(rows.values())


def quality_rows(summary: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """Per number of denoising steps: (what, before, after, "better", "worse" or "") of every measure there is.

    A task's own measures, whose better direction nobody has said, stand last and under their names.
    """
    before, after = summary.get("before_quality") or {}, summary.get("after_quality") or {}
    tables = []
    for steps in sorted({*before, *after}, key=int):
        first, last = before.get(steps) or {}, after.get(steps) or {}
        measures = QUALITY | {name: (name.replace("_", " "), "") for name in {**first, **last} if name not in QUALITY}
        lines = [
            (label, _number(first.get(name)), _number(last.get(name)), _change(first.get(name), last.get(name), good))
            for name, (label, good) in measures.items()
            if name in first or name in last
        ]
        tables.append((steps, lines))
    return tables


def _picture(view: Mapping[str, Any] | None) -> Picture | None:
    if view is None or not view["image"]:
        return None
    source = str(view["image"])
    if not source.startswith("data:image/"):
        raise ValueError(f"an image must be a data URL, got {source[:40]!r}")
    return Picture(source, bool(view["correct"]))


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def _change(before: float | None, after: float | None, good: str) -> str:
    if not good or before is None or after is None or not abs(after - before) > 0:
        return ""
    return "better" if (after > before) == (good == "up") else "worse"
