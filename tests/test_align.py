"""`denoise-rl align`: one table of searches and recipes, with what each costs; and its metrics by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rl import cli
from rl.config import load_config
from rl.evaluation.align import align, summary_lines
from rl.files import write_folder

ROOT = Path(__file__).resolve().parent.parent


def config_file(folder: Path, **changes: Any) -> Path:
    optimizer = {"lr": 0.01, "warmup_steps": 1}
    drakes = {"name": "drakes", "alpha": 0.01, "relaxed": {"relaxed_steps": 2}}
    config: dict[str, Any] = {
        "run": {"output_dir": str(folder / "run"), "device": "cpu", "num_threads": 1},
        "model": {"backbone": {"model_type": "dilated_conv", "hidden_size": 12, "kernel_size": 5, "dilations": [1, 2]}},
        "task": {"name": "dna", "params": {"length": 12, "motif_rate": 0.04}},
        "sampler": {"gen_length": 12, "num_inference_steps": 4, "score": "random"},
        "sft": {"steps": 5, "batch_size": 16, "optimizer": optimizer},
        "reward": {"functions": [{"name": "sequence_oracle", "params": {"path": str(folder / "oracle.safetensors")}}]},
        "filters": {"drop_zero_variance": False},
        "train": {"steps": 2, "prompts_per_step": 1, "group_size": 8, "optimizer": optimizer},
        "align": {
            "num_samples": 6,
            "oracles": {str(folder / "oracle.safetensors"): 0},
            "oracle_labels": 64,
            "judges": {"truth": {"name": "motif_activity"}},
            "likelihood_samples": 2,
            "likelihood_masks": 2,
            "rows": [
                {"name": "pretrained"},
                {"name": "best_of_3", "search": "best_of_n", "params": {"num_samples": 3}},
                {"name": "guidance", "search": "guidance", "params": {"scale": 3}},
                {"name": "drakes", "algorithm": drakes, "overrides": ["train.steps=1"]},
            ],
        },
    }
    config["align"] |= changes
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_a_table_with_its_budgets_and_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path)
    assert cli.main(["align", "--config", str(path)]) == 0
    printed = capsys.readouterr().out
    table = {row["name"]: row for row in json.loads((tmp_path / "run" / "table.json").read_text())}
    assert list(table) == ["pretrained", "best_of_3", "guidance", "drakes"]
    assert all(name in printed for name in [*table, "truth", "3mer", "pretrained_ll"])
    # T = 4 denoiser calls a sample; best of 3 costs 3 T and 3 rewards, guidance T gradients and one verdict.
    costs = {name: (row["denoiser_per_sample"], row["reward_per_sample"]) for name, row in table.items()}
    assert costs == {"pretrained": (4, 0), "best_of_3": (12, 3), "guidance": (4, 5), "drakes": (4, 0)}
    # One update on 8 rollouts: 4 steps of policy and reference each.
    assert (table["drakes"]["train_denoiser"], table["drakes"]["train_reward"]) == (64, 8)
    assert table["pretrained"]["train_denoiser"] == 0
    assert table["best_of_3"]["optimised"] > table["pretrained"]["optimised"]
    # A model that hardly trained writes letters that are no DNA: the grammar then gives -inf, the model a number.
    assert all(row["exact_ll"] < 0 and math.isfinite(row["pretrained_ll"]) for row in table.values())
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name in ("row.json", "oracle.safetensors")}
    assert len(times) == 5
    align(load_config(path))
    assert times == {p: p.stat().st_mtime_ns for p in times}
    # Another number of samples is another table.
    align(load_config(config_file(tmp_path, num_samples=4)))
    assert all(p.stat().st_mtime_ns > at for p, at in times.items() if p.name == "row.json")


def test_a_row_is_computed_again_when_anything_changes_that_its_numbers_depend_on(tmp_path: Path) -> None:
    rows = [{"name": "pretrained"}]
    config = load_config(config_file(tmp_path, rows=rows))
    align(config)
    row, model = (tmp_path / "run" / name for name in ("pretrained/row.json", "pretrained/config.json"))
    assert model.is_file() and not list(tmp_path.rglob("*.partial"))
    for override, again in (
        ("filters.drop_overlong=true", True),
        ("rollout.max_importance_weight=1.5", True),
        ("rollout.max_batch_size=3", False),
        ("eval.viewer_items=1", False),
    ):
        before = row.read_bytes(), row.stat().st_mtime_ns
        align(load_config(config_file(tmp_path, rows=rows), [override]))
        assert (row.stat().st_mtime_ns > before[1]) == again, override
        row.write_bytes(before[0])


def test_a_model_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def half(path: Path) -> None:
        path.mkdir()
        (path / "config.json").write_text("{}")
        raise OSError("disk full")

    def whole(path: Path) -> None:
        path.mkdir()
        (path / "config.json").write_text("1")

    with pytest.raises(OSError, match="disk full"):
        write_folder(folder, half)
    assert not folder.exists()
    assert write_folder(folder, whole) == folder
    with pytest.raises(OSError, match="disk full"):
        write_folder(folder, half)
    # What the unfinished one left behind is gone with the next that is written.
    assert (folder / "config.json").read_text() == "1"
    write_folder(folder, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("names", [["notes.txt"], ["data.json", "README.md"], ["config.json", "model.py"]])
def test_a_folder_that_is_no_model_is_not_replaced_by_one(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="which a model would replace: name a new folder"):
        write_folder(tmp_path, lambda partial: partial.mkdir())
    assert [(tmp_path / name).read_text() for name in names] == ["mine"] * len(names)


def test_intervals_by_hand() -> None:
    tables = [[{"name": "x", "truth": value}] for value in (1.0, 2.0, 3.0)]
    # Student with 2 degrees of freedom: 4.303 * 1 / sqrt(3) = 2.484.
    assert summary_lines(tables)[1].split() == ["x", "2±2.5"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "align.rows is empty"),
        ([{"name": "a"}, {"name": "a"}], "'a' must be used once"),
        ([{"name": "a", "search": "svd"}], "svdd"),
        ([{"name": "a", "search": "svdd", "algorithm": {"name": "drakes"}}], "set search or algorithm, not both"),
        ([{"name": "a", "algorithm": {"name": "drake"}}], "did you mean 'drakes'"),
    ],
)
def test_mistakes_in_rows_are_found_before_anything_runs(
    tmp_path: Path, rows: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["align", "--config", str(config_file(tmp_path, rows=rows))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
