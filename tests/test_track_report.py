"""The table, the curves and the report of a made-up run whose every number is known."""

import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rewards.image import data_url
from rl.track import plots
from rl.track.frames import MAX_CELLS, build_view, frame_budget
from rl.track.image_grid import quality_rows
from rl.track.jsonl import MetricsWriter, read_metrics
from rl.track.plots import (
    DARK,
    Series,
    accuracy_names,
    plot_learning_curve,
    plot_runs,
    reward_names,
    series,
    smoothed,
)
from rl.track.report import write_report
from rl.track.table import before_after_table, conclusion, title
from rl.track.verdict import compare, goal_line, unscored_line, verdict_line
from rl.track.viewer import trajectory_view
from rollouts.trajectory import TokenTrajectory

MASK = 9
SUMMARY = {
    "task": "sudoku",
    "seed": 0,
    "n_eval": 1000,
    "before": {"16": 0.985, "4": 0.585, "8": 0.72},
    "after": {"16": 0.94, "4": 0.86, "8": 0.73},
    "train_seconds": 51.25,
    "forward_passes": 12345,
    "goal": {"metric": "4", "before_max": 0.65, "after_min": 0.85, "met": True},
}


def _remasking_trajectory() -> TokenTrajectory:
    """Four cells: 3 revealed, then 0 revealed and 3 taken back, then 3 set again beside 1, then 2."""
    return TokenTrajectory(
        prompt_ids=np.array([5, 6]),
        length=6,
        mask_token_id=MASK,
        num_steps=4,
        step=np.array([0, 1, 1, 2, 2, 3]),
        position=np.array([5, 2, 5, 5, 3, 4]),
        token=np.array([1, 2, MASK, 3, 4, 1]),
        logprob=np.zeros(6),
        confidence=np.array([0.5, 0.25, 0.125, 0.75, 1.0, 0.0], dtype=np.float32),
        stop_length=3,
    )


def _texts(tokens: Sequence[int | None]) -> list[str]:
    return ["" if token is None else str(token) for token in tokens]


def _run_folder(folder: Path, seed: int = 0) -> Path:
    with MetricsWriter(folder) as metrics:
        for step in range(40):
            reward = 0.5 + step / 100
            numbers = {"reward/mean": reward, "reward/low": reward - 0.05, "reward/high": reward + 0.05}
            entropy = math.nan if step == 7 else 0.5
            metrics.log(step, "train", {**numbers, "policy/entropy": entropy, "policy/logprob_gap": 1e-7 * step})
            if step % 10 == 0:
                metrics.log(step, "eval", {f"eval/accuracy@{steps}": 0.5 + step / 100 for steps in (16, 4, 8)})
    view = trajectory_view(_remasking_trajectory(), _texts, True, ["", "4", "2", ""])
    wrong = trajectory_view(_remasking_trajectory(), _texts, False, ["2", "", "", ""])
    items = [{"prompt": "<script>alert(1)</script>", "before": wrong, "after": view}]
    (folder / "viewer.json").write_text(json.dumps({"grid": [2, 2], "items": items}))
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, "seed": seed}))
    (folder / "config.yaml").write_text("task:\n  name: sudoku\n")
    return folder


class _Page(HTMLParser):
    """Collects what the tests ask for: text, loaded addresses, and the cells of every step."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.steps: list[list[str]] = []
        self.text = ""
        self.open_tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.addresses += [values[name] for name in ("src", "srcset", "href", "data", "action") if name in values]
        if tag == "figure":
            self.steps.append([])
        if tag == "span" and values.get("class", "").startswith("cell") and self.steps:
            self.steps[-1].append(" ".join(values["class"].split()[1:]))
        if tag not in {"meta", "img", "source", "input"}:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open_tags and self.open_tags[-1] not in {"script", "style"}:
            self.text += data


def test_comparison_is_computed_from_the_counts() -> None:
    rows = compare(SUMMARY)
    assert [(row.steps, row.verdict) for row in rows] == [
        ("4", "improved"),
        ("8", "not distinguishable"),
        ("16", "worse"),
    ]
    # Wilson's interval of 585 of 1000 by hand: (0.585 + z2/2000 -+ z sqrt(0.585 0.415/1000 + z2/4e6)) / (1 + z2/1000)
    assert rows[0].before_interval == (pytest.approx(0.55419, abs=1e-5), pytest.approx(0.61516, abs=1e-5))
    given = {**SUMMARY, "before_interval": {"4": [0.1, 0.99]}}
    assert compare(given)[0].before_interval == (0.1, 0.99)
    assert compare(given)[0].verdict == "not distinguishable"


def test_verdict_names_what_got_worse() -> None:
    assert verdict_line(SUMMARY) == (
        "Improved at 4 (0.585 to 0.860) denoising steps. Worse at 16 (0.985 to 0.940) denoising steps. "
        "Not distinguishable from before at 8 (0.720 to 0.730) denoising steps."
    )
    assert verdict_line({"before": {"4": 0.5}}) == "No verdict: nothing was measured after training."
    assert verdict_line({"after": {"4": 0.5}}) == "No verdict: nothing was measured before training."
    assert "no accuracies" in verdict_line({})
    unsure = verdict_line({"before": {"4": 0.5}, "after": {"4": 0.9}})  # no n_eval: no interval, so no claim
    assert unsure.startswith("Unknown") and "mproved" not in unsure


def test_an_accuracy_over_nothing_is_no_measurement() -> None:
    nothing = {"before": {"4": 0.5}, "after": {"4": math.nan}, "after_interval": {"4": [0.0, 1.0]}, "n_eval": 10}
    assert verdict_line(nothing) == "No verdict: nothing was measured after training."
    assert unscored_line({**nothing, "after_unscored": {"16": 3, "4": 10, "8": 0}}) == (
        "Held-out problems without a score, counted in no accuracy: after training 10 at 4 steps, 3 at 16 steps."
    )
    assert unscored_line({**nothing, "after_unscored": {"4": 0}}) is None


def test_goal_is_judged_by_the_numbers_not_by_its_own_flag() -> None:
    assert goal_line(SUMMARY) == (
        "Goal met (4-step accuracy at most 0.650 before and at least 0.850 after): 0.585 before, 0.860 after. "
        "The 95 % interval of the latter reaches down to 0.837, below the goal."
    )
    lying = goal_line({**SUMMARY, "after": {"4": 0.84}})
    assert lying is not None and lying.startswith("Goal missed") and "claims the goal was met" in lying
    easy = goal_line({**SUMMARY, "before": {"4": 0.7}, "goal": {"metric": "4", "before_max": 0.65, "after_min": 0.85}})
    assert easy is not None and easy.startswith("Goal missed") and "already above" in easy
    unmeasured = goal_line({**SUMMARY, "after": {}})
    assert unmeasured is not None and unmeasured.startswith("Goal not judged")
    assert goal_line({}) is None


def test_the_table_has_every_number_and_its_interval() -> None:
    assert title(SUMMARY) == "sudoku, accuracy on 1,000 held-out problems, seed 0, 95 % intervals"
    console = Console(width=80, record=True, file=StringIO())
    console.print(before_after_table(SUMMARY))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    first = lines.index("4 0.585 0.860 +0.275 improved")
    assert lines[first + 1] == "[0.554, 0.615] [0.837, 0.880] [+0.237, +0.312]"
    assert lines[lines.index("8 0.720 0.730 +0.010 not") + 1].endswith("+0.049] distinguishable")
    drawn = " ".join(lines)
    assert "Goal met" in drawn and "Worse at 16" in drawn
    assert "No verdict" in conclusion({})


def test_the_headline_names_the_judge_and_the_reward_trained_on(tmp_path: Path) -> None:
    """A reward may rise while its verifier's accuracy falls: who reads "worse" must see of what."""
    apart = {**SUMMARY, "judge": "math_answer", "reward": "mine.py:mine + 0.2 x overlong"}
    said = "Judged by math_answer, trained on mine.py:mine + 0.2 x overlong: the verdict is about the former."
    own = {
        "task": "jsonl",
        "judge": "mine.py:mine",
        "reward": "mine.py:mine",
        "measure": "mean reward",
        "n_eval": 3,
        "before": {"4": -3.0},
        "after": {"4": 7.5},
        "before_interval": {"4": [-4.0, -2.0]},
        "after_interval": {"4": [7.0, 8.0]},
        "goal": {"metric": "4", "before_max": 0.0, "after_min": 1.0},
    }
    for name, summary, words in (
        ("apart", apart, [said]),
        (
            "own",
            own,
            ["Judged by the reward trained on, mine.py:mine.", "Improved at 4 (-3.000 to 7.500)", "4-step mean"],
        ),
    ):
        folder = _run_folder(tmp_path / name)
        (folder / "summary.json").write_text(json.dumps(summary))
        page = _Page(write_report(folder).read_text()).text
        assert all(text in page and text in conclusion(summary) for text in words), words
    assert title(own) == "jsonl, mean reward on 3 held-out problems, 95 % intervals"
    assert "Mean reward of held-out problems" in page
    # A mean reward has no interval but its own.
    assert compare({**own, "after_interval": {}})[0].verdict == "unknown"
    assert "Judged" not in conclusion(SUMMARY)


def test_curves_of_mean_rewards_take_their_interval() -> None:
    records = [{"step": 0, "eval/reward@4": 2.0, "eval/reward_low@4": 1.0, "eval/reward_high@4": 3.0}]
    assert accuracy_names(records) == ["eval/reward@4"]
    assert series(records, "eval/reward@4") == Series([0], [2.0], [1.0], [3.0])


def test_view_replays_remasking_and_keeps_confidences_with_their_tokens() -> None:
    def letters(tokens: Sequence[int | None]) -> list[str]:
        return ["" if token is None else "abcde"[token] for token in tokens]

    view = trajectory_view(_remasking_trajectory(), letters, True, ["", "e"])
    assert [step["tokens"] for step in view["steps"]] == [
        ["", "", "", ""],
        ["", "", "", "b"],
        ["c", "", "", ""],
        ["c", "e", "", "d"],
        ["c", "e", "b", "d"],
    ]
    assert [step["confidence"] for step in view["steps"]] == [
        [None, None, None, None],
        [None, None, None, 0.5],
        [0.25, None, None, None],
        [0.25, 1.0, None, 0.75],
        [0.25, 1.0, 0.0, 0.75],
    ]
    assert [step["changed"] for step in view["steps"]] == [[], [3], [0, 3], [1, 3], [2]]
    assert view["givens"] == ["", "e", "", ""] and view["stop_length"] == 3 and view["correct"] is True
    json.dumps(view, allow_nan=False)
    # An answer that ended in an earlier block leaves cells of the grid undecided.
    short = trajectory_view(_remasking_trajectory(), letters, False, ["", "e", "", "", "", "a"])
    assert short["givens"] == ["", "e", "", "", "", "a"] and short["stop_length"] == 3
    for step, whole in zip(short["steps"], view["steps"], strict=True):
        assert step["tokens"] == [*whole["tokens"], "", ""] and step["changed"] == whole["changed"]
    frame = build_view(short, [2, 3], max_frames=99).frames[-1]
    assert [cell.classes for cell in frame.cells][3:] == ["tail", "masked", "masked given"]


def test_frames_mark_what_happened_to_each_cell() -> None:
    view = trajectory_view(_remasking_trajectory(), _texts, False, ["", "3", "1", ""])
    frames = build_view(view, [2, 2], max_frames=99).frames
    assert [[cell.classes for cell in frame.cells] for frame in frames] == [
        ["masked", "masked given", "masked given", "masked"],
        ["masked", "masked given", "masked given", "new tail"],
        ["new", "masked given", "masked given", "remasked"],
        ["", "new broken", "masked given", "new tail"],
        ["", "broken", "new given", "tail"],
    ]
    assert [frame.caption for frame in frames[1:3]] == ["step 1 of 4: 1 decided", "step 2 of 4: 1 decided, 1 remasked"]
    assert [cell.percent for cell in frames[-1].cells] == [25, 100, 0, 75]
    # Fewer grid cells than response cells: the rest is shown behind the grid.
    assert [cell.text for cell in build_view(view, [1, 3], 99).frames[-1].rest] == ["3"]


def test_left_out_canvases_are_counted_and_their_changes_carried_over() -> None:
    view = trajectory_view(_remasking_trajectory(), _texts, True)
    built = build_view(view, None, max_frames=3)
    assert built.left_out == 2
    assert [frame.caption for frame in built.frames] == [
        "start: everything masked",
        "step 2 of 4: 1 decided, 1 remasked",
        "step 4 of 4: 3 decided",
    ]
    long = {"steps": [{"tokens": [""] * 1000, "confidence": [None] * 1000, "changed": []}] * 500}
    limit = frame_budget([{"before": long, "after": long}] * 5)
    assert limit >= 2 and limit * 1000 * 10 <= MAX_CELLS
    assert len(build_view(long, None, limit).frames) == limit


def test_series_takes_its_interval_and_skips_holes(tmp_path: Path) -> None:
    records = [
        {
            "step": 0,
            "eval/accuracy@4": 0.5,
            "eval/accuracy_low@4": 0.4,
            "eval/accuracy_high@4": 0.6,
            "eval/accuracy@16": 1,
        },
        {"step": 1, "eval/accuracy@4": None},
        {"step": 2, "eval/accuracy@4": 0.9, "eval/accuracy_low@4": 0.1, "eval/accuracy_high@4": 1.0},
        {"step": 2, "eval/accuracy@4": 0.7, "eval/accuracy_low@4": 0.6, "eval/accuracy_high@4": 0.8},
    ]
    assert series(records, "eval/accuracy@4") == Series([0, 2], [0.5, 0.7], [0.4, 0.6], [0.6, 0.8])
    assert series(records, "eval/accuracy@16") == Series([0], [1])
    assert accuracy_names(records) == ["eval/accuracy@4", "eval/accuracy@16"]
    train = read_metrics(_run_folder(tmp_path), "train")
    reward = series(train, "reward/mean")
    assert reward.low is not None and reward.low[3] == pytest.approx(0.48)
    assert 7 not in series(train, "policy/entropy").steps


def test_curves_draw_what_was_logged(tmp_path: Path) -> None:
    from matplotlib.image import imread

    runs = [_run_folder(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 1))]
    curve = plot_learning_curve(runs[0])
    assert curve == runs[0] / "learning_curve.png"
    image = imread(curve)
    dark = imread(plot_learning_curve(runs[0], tmp_path / "dark.png", DARK))
    assert image.shape == dark.shape
    # Paper, and the ink of the reward line: #0072B2 on white.
    assert image[0, 0, :3].tolist() == [1, 1, 1] and dark[0, 0, :3].max() < 0.2
    blue = np.abs(image[..., :3] - np.array([0, 0x72, 0xB2]) / 255).max(axis=-1) < 0.01
    assert blue.sum() > 500
    assert plot_runs(runs) == tmp_path / "runs.png"
    with MetricsWriter(tmp_path / "empty") as metrics:
        metrics.log(0, "sft", {"loss/total": 1.0})
    assert plot_learning_curve(tmp_path / "empty").stat().st_size > 0  # every panel says "not logged"
    assert plot_runs([tmp_path / "empty"]).stat().st_size > 0
    with pytest.raises(ValueError, match="name at least one"):
        plot_runs([])
    assert not list(tmp_path.rglob("*.partial"))


def test_measures_of_a_task_are_listed_under_their_names() -> None:
    """Which way is better is known of images alone."""
    summary = {"before_quality": {"4": {"num_words": 5.0}}, "after_quality": {"4": {"num_words": 7.5}}}
    assert quality_rows(summary) == [("4", [("num words", "5.000", "7.500", "")])]


def test_a_running_mean_by_hand() -> None:
    """Windows of five: the ends have three and four values, of which there is no interval."""
    means, half = smoothed([0.0, 1.0, 2.0, 3.0, 4.0, 11.0], 5)
    assert means == [1.0, 1.5, 2.0, 4.2, 5.0, 6.0]
    # Of 0..4 the standard deviation is sqrt(2.5), and t of 4 degrees of freedom is 2.776.
    assert half[:3] == [0, 0, pytest.approx(2.776 * (2.5 / 5) ** 0.5)] and half[4:] == [0, 0]


def test_no_line_joins_test_and_validation_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _run_folder(tmp_path)
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, "train_steps": 30}))
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or path)

    def drawn() -> set[tuple[tuple[int, ...], str]]:
        panel = figures.pop().axes[1]
        return {(tuple(line.get_xdata()), line.get_ls()) for line in panel.lines}

    plot_learning_curve(folder)
    assert drawn() == {((0, 30), "None"), ((10, 20), "-")}
    # A run that goes on has no end yet; one without evaluations on the way joins the two that it has.
    (folder / "summary.json").unlink()
    plot_learning_curve(folder)
    assert drawn() == {((0,), "None"), ((10, 20, 30), "-")}
    ends = [{"step": step, "eval/accuracy@4": 0.5} for step in (0, 30)]
    monkeypatch.setattr(plots, "read_metrics", lambda _, stage: ends if stage == "eval" else [])
    (folder / "summary.json").write_text('{"train_steps": 30}')
    plot_learning_curve(folder, narrow=True)
    assert drawn() == {((0, 30), ":")}


def test_rewards_are_drawn_by_step_count_where_rollouts_mix_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MetricsWriter(tmp_path) as metrics:
        for step in range(1, 13):
            numbers = {"reward/mean": 0.5, "reward/mean@4": step / 12}
            metrics.log(step, "train", numbers | ({"reward/mean@16": 1.0} if step > 2 else {}))
    assert reward_names(read_metrics(tmp_path, "train")) == ["reward/mean@4", "reward/mean@16"]
    assert reward_names([{"reward/mean": 0.5, "reward/mean@4": 0.5}]) == ["reward/mean"]
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or path)
    plot_learning_curve(tmp_path)
    panel = figures.pop().axes[0]
    points, four, _, sixteen = panel.lines
    assert points.get_ls() == "None" and points.get_ydata() == pytest.approx(np.arange(1, 13) / 12)
    assert four.get_ydata()[5] == pytest.approx(sum(range(2, 11)) / 9 / 12) and set(sixteen.get_ydata()) == {1.0}
    band = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() <= 1.0 and band.min() >= 1 / 12  # no mean lies beyond the values
    assert [text.get_text() for text in panel.texts] == ["4 steps", "16 steps"]


def test_report_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    folder = _run_folder(tmp_path / "my run")
    path = write_report(folder)
    assert path == folder / "report.html" and not list(folder.glob("*.partial"))
    html = path.read_text()
    page = _Page(html)
    assert page.open_tags == []
    assert len(page.addresses) == 4 and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?:|url\(|@import", html)
    assert "<script>alert" not in html and "<script>alert(1)</script>" in page.text
    for words in (verdict_line(SUMMARY), goal_line(SUMMARY), "12,345", "51.2", "name: sudoku", "NaN or infinite: 1"):
        assert words is not None and words in page.text
    # Every step of both rollouts is in the page itself, whatever JavaScript later hides.
    assert len(page.steps) == 10 and all(len(step) == 4 for step in page.steps)
    assert page.steps[2] == ["new given", "masked", "masked", "remasked"]  # before: cell 0 must be 2
    assert page.steps[7] == ["new", "masked given", "masked given", "remasked"]
    assert page.steps[9] == ["", "given", "new broken", "tail"]
    assert "before training: ✗ wrong" in page.text and "after training: ✓ right" in page.text
    assert "verdicts of" not in page.text and "expected" not in page.text  # summaries of earlier versions


def test_the_report_marks_what_a_wrong_grid_violates_and_says_who_judged(tmp_path: Path) -> None:
    """The cells are marked in the last canvas alone; without an accuracy nothing is called right."""
    wrong = trajectory_view(_remasking_trajectory(), _texts, False) | {"value": 0.25, "parts": {"rows": 0.5, "box": 0}}
    wrong["violations"] = [["3 twice in row 1", [0, 1]], ["given 2 changed to 4", [1]]]
    item = {"prompt": "p", "answer": "<gold>", "before": wrong, "after": wrong | {"value": None, "parts": None}}
    (tmp_path / "viewer.json").write_text(json.dumps({"grid": [2, 2], "items": [item]}))
    (tmp_path / "summary.json").write_text(json.dumps({**SUMMARY, "judge": "sudoku", "reward": "sudoku"}))
    page = _Page(write_report(tmp_path).read_text())
    assert [[("violates" in cell) for cell in step] for step in page.steps[3:5]] == [
        [False] * 4,
        [True, True, False, False],
    ]
    assert page.text.count("3 twice in row 1") == page.text.count("given 2 changed to 4") == 2
    assert "a right answer <gold>" in page.text and "verdicts of sudoku" in page.text
    assert "✗ wrong reward 0.25 (rows 0.5, box 0)" in page.text and "✗ wrong no reward" in page.text
    (tmp_path / "summary.json").write_text(json.dumps({**SUMMARY, "measure": "mean reward"}))
    page = _Page(write_report(tmp_path).read_text())
    assert "✗ wrong" not in page.text and "before training reward 0.25" in page.text


def test_text_shows_its_spaces_the_expected_answer_and_rollouts_of_training(tmp_path: Path) -> None:
    tokens = [" a", " ", "\n", "b\n", "7", "\u200b"]
    view = {"steps": [{"tokens": tokens, "confidence": [0.5] * 6, "changed": []}], "correct": True}
    assert [c.text for c in build_view(view, None, 9).frames[0].cells] == [" a", "·", "↵\n", "b↵\n", "7", "\u200b"]
    item = {"prompt": "p", "answer": "gold", "before": view, "after": view}
    (tmp_path / "viewer.json").write_text(json.dumps({"grid": None, "items": [item]}))
    sample = {"prompt": "q", "completion": "<b>", "reward": 0.5, "parts": {"x": 0.5}, "answer": "silver", "step": 3}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    html = write_report(tmp_path).read_text()
    page, one = _Page(html), re.search(r'<span class="([^"]*)"[^>]*>7</span>', html)
    assert one is not None and one[1].split() == ["one", "chip"]
    assert "expected gold" in page.text and "Rollouts of training" in page.text
    assert "best 1 reward 0.5 (x), RL step 3 promptqanswer<b>expectedsilver" in " ".join(page.text.split())


def test_report_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    page = _Page(write_report(tmp_path).read_text())
    for words in (
        "No verdict",
        "summary.json has no accuracies",
        "metrics.jsonl is missing or empty",
        "viewer.json is missing or empty",
        "summary.json has no costs",
        "config.yaml is missing",
    ):
        assert words in page.text, words
    item = {"prompt": "p", "before": trajectory_view(_remasking_trajectory(), _texts, False), "after": None}
    (tmp_path / "viewer.json").write_text(json.dumps({"grid": None, "items": [item]}))
    page = _Page(write_report(tmp_path).read_text())
    assert len(page.steps) == 5 and "not recorded" in page.text


def test_report_refuses_what_is_no_run_folder_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        write_report(tmp_path)
    for name, content in (("summary.json", "[1]"), ("summary.json", "{"), ("viewer.json", '{"items": []}')):
        folder = tmp_path / f"{name}{len(content)}"
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            write_report(folder)
        assert not (folder / "report.html").exists()


def _image_run(folder: Path) -> list[str]:
    """A run that drew two samples each of two prompts; returns the data URLs in order."""
    images = [data_url(np.full((8, 8), shade, dtype=np.uint8)) for shade in (0, 60, 120, 180, 240)]
    items = [
        {
            "prompt": "seven",
            "before": {"image": images[0], "correct": False},
            "after": {"image": images[1], "correct": True},
        },
        {"prompt": "<two>", "before": {"image": images[2], "correct": True}, "after": None},
        {
            "prompt": "seven",
            "before": {"image": images[3], "correct": True},
            "after": {"image": images[4], "correct": True},
        },
    ]
    (folder / "viewer.json").write_text(json.dumps({"grid": None, "items": items}))
    quality = {"precision": 0.5, "recall": 0.75, "frechet": 8.0, "vendi_correct": 1.8, "distance_correct": 3.5}
    after = {"precision": 0.6, "recall": 0.25, "frechet": 7.0, "vendi_correct": math.nan, "distance_correct": 3.6}
    summary = {**SUMMARY, "before_quality": {"20": quality}, "after_quality": {"20": after}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return images


def test_images_stand_by_prompt_with_the_same_seed_at_the_same_place(tmp_path: Path) -> None:
    images = _image_run(tmp_path)
    html = write_report(tmp_path).read_text()
    page = _Page(html)
    shown = [address for address in page.addresses if address.startswith("data:image/png")]
    assert shown == [images[0], images[3], images[1], images[4], images[2]]
    assert page.text.count("not recorded") == 1
    assert "before: 1 of 2 right" in page.text and "after: 2 of 2 right" in page.text and "after: 0 of 0" in page.text
    assert html.count('class="is-right"') == 4 and html.count('class="is-wrong"') == 1
    assert "&lt;two&gt;" in html and "<two>" not in html
    assert "Denoising, step by step" not in page.text
    words = " ".join(page.text.split())
    for cells in (
        "20 denoising stepsbeforeafter",
        "precision: share of images that look real0.5000.600better",
        "share of real images that are covered0.7500.250worse",
        "distance to real images8.0007.000better",
        "right ones of a prompt1.800- ",  # NaN is no number, and no change
        "right images of a prompt3.5003.600 ",  # neither way is better
    ):
        assert cells in words


def test_an_image_from_elsewhere_is_refused(tmp_path: Path) -> None:
    _image_run(tmp_path)
    data = json.loads((tmp_path / "viewer.json").read_text())
    data["items"][0]["after"]["image"] = "https://example.org/x.png"
    (tmp_path / "viewer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"viewer.json is damaged .*must be a data URL, got 'https"):
        write_report(tmp_path)
