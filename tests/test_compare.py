"""`denoise-rl compare`: what it writes, from real processes, and its numbers by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rl.config import load_config
from rl.evaluate.compare import COSTS, interval, markdown, recipe_overrides
from tests.runs import cli, series, tiny_config

SUMMARY = {"before": {"4": 0.2, "8": 0.5}, "train_seconds": 10.0, "train_steps": 3, "updates": 6, "reward_queries": 96}


def test_the_table_by_hand() -> None:
    """Means 0.3 and 0.6 of three seeds; standard deviation 0.1, so half-width 4.303 x 0.1 / sqrt(3)."""
    runs = [
        {**SUMMARY, "after": {"4": a, "8": 0.6}, "sequence_forwards": f}
        for a, f in ((0.2, 1000), (0.3, 2000), (0.4, 3000))
    ]
    head, rule, warm, row = markdown({"mine": runs}).splitlines()
    assert head == "| variant | seeds | 4 steps | 8 steps | " + " | ".join(c.replace("_", " ") for c in COSTS) + " |"
    assert rule == "|" + "---|" * 9
    assert warm.startswith("| warm start | 3 | 0.200 ± 0.000 | 0.500 ± 0.000 |")
    assert row == "| mine | 3 | 0.300 ± 0.248 | 0.600 ± 0.000 | 3 | 2,000 | 96 | 6 | 10 |"
    assert interval([0.25]) == "0.250"


def test_a_recipe_comes_with_what_it_requires() -> None:
    config = load_config(None, ["sampler.selector=threshold", "sampler.gen_length=8"])
    assert recipe_overrides(config, "espo") == ["algorithm={name: espo}"]
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
    # The same rollouts begin both runs; MDPO asks about the fills of every step too.
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --recipes or --variant"),
        (["--recipes", "mdpa"], "did you mean 'mdpo'"),
        (["--recipes", "wd1", "--variant", "wd1", "algorithm={name: wd1}"], "a name that no other variant has"),
        (["--variant", "mine", "train.stepz=3"], "unknown config key 'train.stepz'"),
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
