"""`denoise-rl compare`: what it writes, from real processes, and its numbers by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rl.config import Config, load_config
from rl.evaluation import compare as comparing
from rl.evaluation.compare import COSTS, ComparisonPlan, compare, equal_budgets, interval, markdown, recipe_overrides
from rl.track import budgets
from rl.track.budgets import costed_evaluations, mean_over_budget, plot_budgets
from rl.track.jsonl import MetricsWriter
from tests.runs import cli, series, tiny_config

SUMMARY = {"train_seconds": 10.0, "train_cpu_seconds": 19.6, "train_steps": 3, "updates": 6, "reward_queries": 96}


def test_the_table_by_hand() -> None:
    """Means 0.3 and 0.6 of three seeds; standard deviation 0.1, so half-width 4.303 x 0.1 / sqrt(3).

    The seeds' warm starts differ as much, and every one of them gains 0.1.
    """
    runs = [
        {**SUMMARY, "before": {"4": a - 0.1, "8": 0.65}, "after": {"4": a, "8": 0.6}, "sequence_forwards": f}
        for a, f in ((0.2, 1000), (0.3, 2000), (0.4, 3000))
    ]
    head, rule, warm, row = markdown({"mine": runs}).splitlines()
    assert (
        head
        == "| variant | seeds | 4 steps | change | 8 steps | change | "
        + " | ".join(c.replace("_", " ") for c in COSTS)
        + " |"
    )
    assert rule == "| " + " | ".join(["---"] * 12) + " |"
    assert warm == "| warm start | 3 | 0.200 ± 0.248 |  | 0.650 ± 0.000 |  |" + "  |" * 6
    accuracies = "0.300 ± 0.248 | +0.100 ± 0.000 | 0.600 ± 0.000 | -0.050 ± 0.000"
    assert row == f"| mine | 3 | {accuracies} | 3 | 2,000 | 96 | 6 | 10 | 20 |"
    assert interval([0.25]) == "0.250"
    other = [run | {"before": {"4": 0.5, "8": 0.6}} for run in runs]
    starts = [line.split(" |")[0] for line in markdown({"mine": runs, "again": runs, "other": other}).splitlines()]
    assert starts[2:] == ["| warm start", "| warm start of other", "| mine", "| again", "| other"]
    older = [{key: run[key] for key in run if key != "train_cpu_seconds"} for run in runs]
    for some in (older, [*runs[:-1], older[-1]], [older[0], *runs[1:]]):
        assert markdown({"mine": some}).splitlines()[-1] == row.replace(" 20 |", " - |")
    runs[0] |= {"baseline": {"12": 0.5}, "baseline_interval": {"12": [0.4, 0.6]}}
    other = markdown({"mine": runs}).splitlines()[3]
    assert other == "| autoregressive |  | 0.500 [0.400, 0.600] |  | 0.500 [0.400, 0.600] |  |" + "  |" * 6


def write_run(folder: Path, rows: list[tuple[int, int, int, int, float]]) -> Path:
    """Metrics of a run: (step, sequences, queries, updates, accuracy) of every evaluation."""
    with MetricsWriter(folder) as metrics:
        for step, sequences, queries, updates, accuracy in rows:
            if step:
                costs = {"sequence_forwards": sequences, "reward_queries": queries, "updates": updates}
                metrics.log(step, "train", {f"cost/{name}": value for name, value in costs.items()})
            metrics.log(step, "eval", {"eval/accuracy@4": accuracy, "eval/accuracy_low@4": 0.0, "eval/recall@4": 0.5})
    return folder


def test_equal_budgets_by_hand(tmp_path: Path) -> None:
    """The first variant spends few queries and many forwards, the second the reverse; both make 10 updates on the way.

    What was evaluated before and after training (0.1 and 0.99) is about other problems and is no part of it.
    """
    ends = (0, 0, 0, 0, 0.1), (8, 1600, 320, 20, 0.99)
    one = write_run(tmp_path / "a", [ends[0], (2, 400, 20, 4, 0.4), (4, 800, 40, 10, 0.6), ends[1]])
    two = write_run(tmp_path / "b", [ends[0], (3, 100, 20, 6, 0.3), (6, 500, 160, 10, 0.7), ends[1]])
    three = write_run(tmp_path / "c", [ends[0], (3, 100, 30, 6, 0.5), (6, 500, 160, 10, 0.9), ends[1]])
    late = write_run(tmp_path / "d", [ends[0], (3, 600, 35, 6, 0.5), (6, 700, 160, 10, 0.9), ends[1]])
    for folder in (one, two, three, late):
        (folder / "summary.json").write_text('{"train_steps": 8}')
    head, _, *rows = equal_budgets({"mine": [one], "other": [two, three], "late": [late]}).splitlines()
    assert head == "| equal | variant | seeds | accuracy@4 | recall@4 |"
    # At 500 sequences the first is a quarter of the way to its second evaluation, and the last has none before 600. At
    # 40 queries the others are 1/7, 1/13 and 1/25 of the way.
    assert rows == [
        "| 500 sequences through the model | mine | 1 | 0.450 | 0.500 |",
        "| 500 sequences through the model | other | 2 | 0.800 ± 1.271 | 0.500 ± 0.000 |",
        "| 500 sequences through the model | late | 1 | - | - |",
        "| 40 reward queries | mine | 1 | 0.600 | 0.500 |",
        "| 40 reward queries | other | 2 | 0.444 ± 1.103 | 0.500 ± 0.000 |",
        "| 40 reward queries | late | 1 | 0.516 | 0.500 |",
        "| 10 optimizer updates | mine | 1 | 0.600 | 0.500 |",
        "| 10 optimizer updates | other | 2 | 0.800 ± 1.271 | 0.500 ± 0.000 |",
        "| 10 optimizer updates | late | 1 | 0.900 | 0.500 |",
    ]
    # Without evaluations on the way, the ends are all of one kind.
    (two / "summary.json").write_text('{"train_steps": 6}')
    plain = write_run(tmp_path / "e", [ends[0], ends[1]])
    (plain / "summary.json").write_text('{"train_steps": 8}')
    assert "| 20 optimizer updates | plain | 1 | 0.990 |" in equal_budgets({"plain": [plain], "mine": [one]})


def test_a_line_of_the_plot_is_the_mean_at_equal_budgets(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", [(0, 0, 0, 0, 0.2), (2, 400, 20, 4, 0.4), (4, 800, 40, 10, 0.6)])
    two = write_run(tmp_path / "b", [(0, 0, 0, 0, 0.2), (3, 300, 80, 6, 0.8)])
    runs = [costed_evaluations(one), costed_evaluations(two)]
    spent, means, half = mean_over_budget(runs, "cost/sequence_forwards", "eval/accuracy@4")
    assert spent.tolist() == [0, 150, 300]
    assert means == pytest.approx([0.2, (0.275 + 0.5) / 2, (0.35 + 0.8) / 2])
    # Of two values the t interval is 12.706 x their distance / sqrt(2) / sqrt(2).
    assert half == pytest.approx([0, 12.706 * 0.225 / 2, 12.706 * 0.45 / 2])
    # Evaluations on the way begin later: the line does so where the last of them begins.
    spent, means, half = mean_over_budget([runs[0][1:]], "cost/sequence_forwards", "eval/accuracy@4")
    assert spent.tolist() == [400, 800] and means.tolist() == [0.4, 0.6] and half.tolist() == [0, 0]


def test_marks_of_the_plot_are_the_ends_and_lines_what_is_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after training it is other problems than on the way: no line joins them, marks have bars of seeds."""
    folders = []
    for seed, shift in enumerate((0.0, 0.1)):
        rows = [(0, 0, 0, 0, 0.2), (2, 400, 20, 4, 0.4), (4, 800, 40, 8, 0.5), (6, 1200, 60, 12, 0.6 + shift)]
        folders.append(write_run(tmp_path / str(seed), rows))
        (folders[-1] / "summary.json").write_text('{"train_steps": 6}')
    figures: list[Any] = []
    monkeypatch.setattr(budgets, "save_figure", lambda figure, path: figures.append(figure) or path)
    plot_budgets({"mine": folders, "other": folders[:1]}, "eval/accuracy@4", tmp_path / "out.png")
    panel = figures[0].axes[0]
    lines = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in panel.lines if line.get_ls() == "-"]
    assert lines == [([400, 800], [0.4, 0.5])] * 2
    marks = {bar.get_label(): bar for bar in panel.containers}
    assert {name: bar.lines[0].get_ydata().tolist() for name, bar in marks.items()} == {
        "before": [0.2], "mine": [pytest.approx(0.65)], "other": [0.6],
    }  # fmt: skip
    # Where both ended at 1,200 sequences they stand side by side; where one spent less, at what it spent.
    assert marks["mine"].lines[0].get_xdata() == [1200] and marks["other"].lines[0].get_xdata() == [1200 * 1.012]
    # A variant with warm starts of its own begins elsewhere.
    third = write_run(tmp_path / "3", [(0, 0, 0, 0, 0.3), (6, 900, 60, 12, 0.7)])
    (third / "summary.json").write_text('{"train_steps": 6}')
    plot_budgets({"mine": folders, "third": [third]}, "eval/accuracy@4", tmp_path / "out.png")
    ends = {bar.get_label(): bar.lines[0].get_ydata().tolist() for bar in figures[1].axes[0].containers}
    assert ends["before"] == [0.2] and ends["third, before"] == [0.3] and ends["third"] == [0.7]
    assert [bar.lines[0].get_xdata().tolist() for bar in figures[1].axes[0].containers][-1] == [900]
    (segment,) = marks["mine"].lines[2][0].get_segments()
    # 12.706 x sd of (0.6, 0.7) / sqrt(2).
    assert segment[:, 1].tolist() == pytest.approx([0.65 - 0.6353, 0.65 + 0.6353]) and not marks["other"].lines[2]


def test_a_recipe_comes_with_what_it_requires() -> None:
    config = load_config(None, ["sampler.selector=threshold", "sampler.gen_length=8"])
    assert recipe_overrides(config, "espo") == ["algorithm={name: espo}"]
    with pytest.raises(ValueError, match=r"algorithm.name 'ddpo' trains images, and task.name 'sudoku' is about text"):
        recipe_overrides(config, "ddpo")
    images = load_config(None, ["task.name=digits"])
    assert recipe_overrides(images, "flow_grpo") == ["algorithm={name: flow_grpo}", 'sampler.kind="flow_sde"']
    assert recipe_overrides(config, "mdpo") == ["algorithm={name: mdpo}", "sampler.record_x0=true"]
    changed = load_config(None, ["sampler.gen_length=8", *recipe_overrides(config, "justgrpo")])
    # Rollouts one token a step, left to right; evaluations as the config has them.
    assert (changed.sampler.selector, changed.sampler.num_inference_steps) == ("left_most", 8)
    assert changed.eval.sampler == {"selector": "threshold"}


def test_two_recipes_from_one_warm_start(tmp_path: Path) -> None:
    arguments = tiny_config(tmp_path, "algorithm={}", "train.steps=2", "train.epochs=1", "eval.every=1")
    folder = tmp_path / "compared"
    command = ["compare", *arguments, "--recipes", "wd1", "mdpo", "--seeds", "5", "--output", str(folder)]
    result = cli(*command)
    assert result.returncode == 0, result.stderr
    results = json.loads((folder / "results.json").read_text())
    assert results["seeds"] == [5] and list(results["runs"]) == ["wd1", "mdpo"]
    (wd1,), (mdpo,) = results["runs"].values()
    assert wd1["before"] == mdpo["before"] and wd1["algorithm"] == "wd1" and mdpo["algorithm"] == "mdpo"
    assert all(run[f"{stage}_cpu_seconds"] > 0 for run in (wd1, mdpo) for stage in ("train", "before", "after"))
    # The same rollouts begin both runs; MDPO asks about the x0 predictions of every step too.
    rewards = [series(folder / f"{name}-5", "train", "reward/mean") for name in ("wd1", "mdpo")]
    assert rewards[0][0] == rewards[1][0]
    assert wd1["reward_queries"] == 32 < mdpo["reward_queries"]
    assert (folder / "table.md").read_text() in result.stdout
    assert re.search(r"^\| mdpo \| 1 \| ", result.stdout, re.M)
    assert (folder / "budgets.png").read_bytes().startswith(b"\x89PNG")
    # Finished runs are kept.
    before = (folder / "wd1-5" / "metrics.jsonl").stat().st_mtime_ns
    assert cli(*command).returncode == 0
    assert (folder / "wd1-5" / "metrics.jsonl").stat().st_mtime_ns == before


def test_the_stages_of_a_seed_follow_each_other_and_runs_begin_from_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {path: ar, convert: {block_length: 4}}\nsampler: {block_length: 4}\n"
        "convert: {steps: 5}\nsft: {steps: 3}\n"
    )
    begun: list[tuple[str, Config]] = []

    def record(comparison: ComparisonPlan, name: str, overrides: Sequence[str], log: Path) -> None:
        begun.append((name, load_config(comparison.config, overrides)))
        folder = Path(begun[-1][1].run.output_dir)
        (folder / "model").mkdir(parents=True)
        (folder / "summary.json").write_text("{}")

    monkeypatch.setattr(comparing, "_command", record)
    monkeypatch.setattr(comparing, "check_run", lambda config, new: [])
    monkeypatch.setattr(comparing, "markdown", lambda summaries: "")
    monkeypatch.setattr(comparing, "equal_budgets", lambda folders: "")
    monkeypatch.setattr(budgets, "plot_budgets", lambda folders, metric, path: path)
    # The second is about another model, which is made for it.
    variants = {"wd1": ["algorithm={name: wd1}"], "two": ["model.convert={block_length: 2}", "sampler.block_length=8"]}
    compare(ComparisonPlan(str(config), variants, (7,), tmp_path / "out"))
    seen = [(name, c.model.path, c.model.convert.block_length, c.convert.steps, c.sft.steps) for name, c in begun]
    expected = []
    for which, block in (("7", 4), ("two-7", 2)):
        converted, warm = (str(tmp_path / "out" / f"{name}-{which}" / "model") for name in ("converted", "warm"))
        made = [("convert", "ar", block, 5, 3), ("sft", converted, None, 0, 3), ("train", warm, None, 0, 0)]
        expected.append(made)
    assert seen == [*expected[0][:2], *expected[1][:2], expected[0][2], expected[1][2]]


def test_the_run_of_a_recipe_with_an_absolute_address_is_in_the_output() -> None:
    plan = ComparisonPlan(None, {}, (0,), Path("out"))
    assert plan.folder("/home/me/own.py:X", 3) == Path("out/_home_me_own.py:X-3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --recipes or --variant"),
        (["--recipes", "mdpa"], "did you mean 'mdpo'"),
        (["--recipes", "wd1", "train={steps: 2}"], "overrides of all runs come before --recipes and --variant"),
        (["--recipes", "wd1", "--variant", "wd1", "algorithm={name: wd1}"], "a name that no other variant has"),
        (["--variant", "mine", "train.stepz=3"], "unknown config key 'train.stepz'"),
        (["--variant", "mine", "algorithm={name: mdpo}"], "algorithm.name mdpo needs sampler.record_x0=true"),
    ],
)
def test_a_wrong_comparison_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    from rl.cli import main

    arguments = tiny_config(tmp_path, "algorithm={}")
    assert main(["compare", *arguments, *words, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
