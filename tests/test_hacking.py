"""The hacking panel: where judge and reward part, told from noise and from a judge that rises; figure and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rl.track import hacking
from rl.track.hacking import Parting, has_panel, parting, parting_line, plot_hacking
from rl.track.intervals import wilson_interval
from rl.track.jsonl import MetricsWriter
from rl.track.report import write_report
from tests.test_track_report import _Page

SUMMARY = {"judge": "digit_judge", "reward": "jpeg_compressibility", "task": "digits", "train_steps": 24}


def eval_line(step: int, right: int, n: int = 200) -> dict[str, Any]:
    low, high = wilson_interval(right, n)
    return {"step": step, "eval/accuracy@20": right / n, "eval/accuracy_low@20": low, "eval/accuracy_high@20": high}


def train_lines(slope: float = 0.1, noise: float = 0.05, steps: int = 24) -> list[dict[str, Any]]:
    """A reward that rises by `slope` a step, up and down by `noise`."""
    return [{"step": s, "reward/mean": slope * s + noise * (-1) ** s} for s in range(1, steps + 1)]


WAY = [eval_line(step, right) for step, right in ((4, 150), (8, 160), (12, 120), (16, 90), (20, 70))]


def test_judge_and_reward_part_at_the_judges_best_evaluation() -> None:
    found = parting(train_lines(), WAY, 24)
    assert found is not None and (found.step, found.judge) == (8, (0.8, 0.35))
    # Means of 9 steps around step 8, and of the last 5 (20 to 24): the noise leaves an odd count of ups and downs.
    assert found.reward == pytest.approx((0.8 + 0.05 / 9, 2.2 + 0.05 / 5))


@pytest.mark.parametrize(
    ("train", "evals"),
    [
        (train_lines(0.0), WAY),  # the judge fell, the reward did not rise
        (train_lines(0.001, 0.3), WAY),  # nor beyond its noise
        (train_lines(-0.1), WAY),
        (train_lines(), WAY[:2]),  # the judge rose
        (train_lines(), [eval_line(step, 100 - step % 8) for step in range(4, 24, 4)]),  # it fell by chance
        (train_lines(steps=4), WAY),
        (train_lines(), []),
        (train_lines(), [{"step": 4, "eval/accuracy@20": 0.9}, {"step": 8, "eval/accuracy@20": 0.1}]),  # no intervals
    ],
)
def test_they_do_not_part(train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> None:
    assert parting(train, evals, 24) is None


def test_the_best_of_many_evaluations_is_held_to_a_wider_interval() -> None:
    """110 of 200 against 89: a fall at 5 % for one comparison, none for the best of ten."""
    assert parting(train_lines(), [eval_line(10, 110), eval_line(20, 89)], 24) is not None
    many = [eval_line(step, 100) for step in range(1, 9)]
    assert parting(train_lines(), [*many, eval_line(10, 110), eval_line(20, 89)], 24) is None


def test_ends_are_compared_with_each_other_alone() -> None:
    """Problems before and after training are others than those on the way."""
    ends = [eval_line(0, 180), eval_line(24, 60)]
    assert parting(train_lines(), ends, 24) == Parting(0, (0.9, 0.3), pytest.approx((0.29, 2.21)))
    assert parting(train_lines(), [ends[0], eval_line(20, 60)], None) is None
    assert parting(train_lines(), [*ends, *WAY], 24).step == 8  # type: ignore[union-attr]


def test_the_panel_is_there_where_something_stands_beside_the_reward() -> None:
    one, two = {"reward/jpeg/mean": 1.0}, {"reward/jpeg/mean": 1.0, "reward/clip/mean": 0.5, "reward/mean@4": 1.0}
    assert hacking.reward_parts([two]) == ["jpeg", "clip"]
    assert has_panel(SUMMARY, [one]) and not has_panel(SUMMARY, [])
    same = {"judge": "sudoku", "reward": "sudoku"}
    assert not has_panel(same, [one]) and has_panel(same, [two])


def test_a_hacked_reward_is_marked_in_every_panel_and_said_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"reward/jpeg/mean": 1.0, "reward/clip/mean": 0.5, "reward/zero_variance_share": 0.25}
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    with MetricsWriter(tmp_path) as metrics:
        for line in train_lines():
            metrics.log(line.pop("step"), "train", line | parts)
        for line in map(dict, WAY):
            metrics.log(line.pop("step"), "eval", line | {"eval/vendi@20": 2.0})
    page = _Page(write_report(tmp_path).read_text())
    assert "Reward and judge" in page.text and "the judge fell from 0.800 to 0.350" in page.text
    figures: list[Any] = []
    monkeypatch.setattr(hacking, "save_figure", lambda figure, path: figures.append(figure) or path)
    for narrow in (False, True):
        plot_hacking(tmp_path, tmp_path / "x.png", narrow=narrow)
        panels = figures.pop().axes
        assert [panel.get_title(loc="left").partition(":")[0] for panel in panels] == [
            *("Reward trained on", "Reward jpeg", "Reward clip", "Judge", "Diversity", "Saturation")
        ]
        marks = [line for panel in panels for line in panel.lines if line.get_ls() == "--"]
        assert [set(line.get_xdata()) for line in marks] == [{8}] * 6
    (tmp_path / "metrics.jsonl").write_text("")
    assert (
        parting_line(tmp_path)
        == "Too few evaluations or RL steps to tell whether judge and reward part: set eval.every."
    )
