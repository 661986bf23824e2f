"""What rewards are given of a dataset, who judges a run, and what a run says when nothing is judged."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rl.cli import main
from rl.config import load_config
from rl.sections import MAX_GROUP, RewardConfig
from rl.tasks.base import reward_columns
from rl.train.judge import Judge
from rl.train.plan import check_run
from rl.train.rollouts import request_seed
from tests import runs
from tests.test_data_files import lines, tokenizer, write

REWARD = """
from rewards import Score

def hinted(prompts, completions, hint, **columns):
    return [1.0 if one else 0.0 for one in hint]

def long(prompts, completions, **columns):
    return [10.0 + len(c) for c in completions]

def nothing(prompts, completions, **columns):
    return [None for c in completions]

class Strict:
    def __call__(self, prompts, completions, solution, num_steps, **columns):
        return [1.0 for c in completions]
"""


class Modality:
    """M trajectories are texts; the trainer adds one column."""

    def finished(self, trajectories: Any) -> tuple[list[str], dict[str, list[Any]]]:
        return list(trajectories), {"num_steps": [4] * len(trajectories)}


class Task:
    reward = None


def arguments(folder: Path, name: str, rows: list[dict[str, Any]], params: str = "", *overrides: str) -> list[str]:
    """A run of seconds on a file of rows that the reward `name` judges."""
    words = runs.tiny_config(folder, reward=REWARD)
    tokenizer().save_pretrained(folder / "tokenizer")
    path = write(folder / "data.jsonl", lines(*rows))
    functions = [{"name": f"{folder / 'reward.py'}:{name}"}] if name else []
    return [
        *words,
        "task.name=jsonl",
        f"task.params={{train: {path}, heldout: {path}{params}}}",
        f"model.tokenizer={folder / 'tokenizer'}",
        f"reward.functions={json.dumps(functions)}",
        *["train.prompts_per_step=2", "train.steps=2", "train.epochs=1", "eval.num_prompts=2", "sft.steps=0"],
        *overrides,
    ]


def checked(folder: Path, *args: Any) -> list[str]:
    words = arguments(folder, *args)
    return check_run(load_config(words[1], words[2:]))


PLAIN = [{"prompt": "1+1="}, {"prompt": "1+2="}]


# --- columns ----------------------------------------------------------------------------------------------------------


def test_the_order_of_rows_changes_no_verdict(tmp_path: Path) -> None:
    """Two of four rows have a hint; with the columns of the first row alone, half of the orders would have none."""
    (tmp_path / "reward.py").write_text(REWARD)
    options = RewardConfig(functions=[{"name": f"{tmp_path / 'reward.py'}:hinted"}])
    rows = [{"prompt": "a"}, {"prompt": "b", "hint": "x"}, {"prompt": "c"}, {"prompt": "d", "hint": "y", "more": 1}]
    judge = Judge(options, Task(), Modality())
    for order in itertools.permutations(rows):
        _, table = judge.score(order, ["text"] * 4)
        assert dict(zip([row["prompt"] for row in order], table.values, strict=True)) == {
            "a": 0,
            "b": 1,
            "c": 0,
            "d": 1,
        }
    judge.close()
    assert reward_columns(rows) == {"hint": [None, "x", None, "y"], "more": [None, None, None, 1]}
    assert reward_columns([]) == {}


@pytest.mark.parametrize(
    "name", ["num_steps", "completion_ids", "num_forwards", "reveal_steps", "completions", "prompts"]
)
def test_a_column_with_a_name_of_the_trainers_is_refused(name: str, tmp_path: Path) -> None:
    """Also where only the last row has it; `check` and `train` ask the same function."""
    rows = [*PLAIN, {"prompt": "x", name: 77}]
    with pytest.raises(
        ValueError, match=f"data.jsonl has a column '{name}', which rewards get from the trainer: rename"
    ):
        checked(tmp_path, "long", rows)


def test_a_task_that_gives_such_a_column_is_refused_when_it_is_judged() -> None:
    judge = Judge(RewardConfig(functions=[{"name": "length", "params": {"max_length": 8}}]), Task(), Modality())
    with pytest.raises(ValueError, match="the dataset has a column 'num_steps'"):
        judge.score([{"prompt": "a"}, {"prompt": "b", "num_steps": 77}], ["text"] * 2)
    judge.close()


def test_a_reward_or_verifier_without_its_column_is_found_before_the_run(tmp_path: Path) -> None:
    verifier = "the verifier 'math_answer' needs the column 'answer' .*data.jsonl has none beside the prompt"
    with pytest.raises(ValueError, match=verifier):
        checked(tmp_path / "a", "long", PLAIN, ", reward: math_answer")
    strict = "Strict' needs the column 'solution' .*data.jsonl has hint, more beside the prompt"
    with pytest.raises(ValueError, match=strict):
        checked(tmp_path / "b", "Strict", [{"prompt": "a", "hint": "b"}, {"prompt": "a", "more": 1}])
    checked(tmp_path / "c", "Strict", [{"prompt": "a"}, {"prompt": "b", "solution": "1"}])
    checked(tmp_path / "d", "long", [{"prompt": "a", "answer": "1"}], ", reward: math_answer")
    checked(tmp_path / "e", "long", PLAIN)
    fed = "reward.functions=[{name: math_answer, columns: {answer: gold}}]"
    checked(tmp_path / "g", "", [{"prompt": "a", "gold": "1"}], "", fed)
    with pytest.raises(ValueError, match="needs the column 'gold'"):
        checked(tmp_path / "h", "", [{"prompt": "a", "answer": "1"}], "", fed)
    checked(tmp_path / "f", "", [{"prompt": "a", "answer": "1"}])
    with pytest.raises(ValueError, match="'math_answer' needs the column 'answer'"):
        checked(tmp_path / "i", "", PLAIN)


# --- judges -----------------------------------------------------------------------------------------------------------


def test_who_judges_and_what_is_trained_on() -> None:
    own = RewardConfig(functions=[{"name": "countdown", "weight": 0.5, "params": {}, "normalize": "group"}])
    assert [part.name for part in own.judges("math_answer")] == ["math_answer"]
    assert [(part.name, part.weight, part.normalize) for part in own.judges(None)] == [("countdown", 0.5, "none")]
    assert own.trained("math_answer") == own.trained(None) == own.functions
    assert [part.name for part in RewardConfig().trained("sudoku")] == ["sudoku"]
    assert [part.name for part in RewardConfig().trained(None)] == ["math_answer"]
    given = RewardConfig(functions=[{"name": "math_answer", "weight": 2, "params": {"tolerance": 0.1}}])
    assert [(part.weight, part.params) for part in given.judges("math_answer")] == [(1.0, {"tolerance": 0.1})]


def test_without_a_verifier_the_rewards_trained_on_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reward is 10 and more: its accuracy, the share of rewards of at least 1, would be 1 whatever happens."""
    words = arguments(tmp_path, "long", [{"prompt": [{"role": "user", "content": "1+1="}]}] * 4)
    assert main(["train", *words]) == 0
    said, name = capsys.readouterr().out, f"{tmp_path / 'reward.py'}:long"
    assert "Judged by the reward trained on," in said and "mean reward on 2" in said
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["judge"], summary["reward"], summary["measure"]) == (name, name, "mean reward")
    assert summary["before"]["4"] >= 10 and summary["after"]["4"] >= 10
    assert "eval/reward@4" in runs.lines(run, "eval")[0] and "eval/accuracy@4" not in runs.lines(run, "eval")[0]
    assert "Judged by the reward trained on" in (run / "report.html").read_text()
    # The prompt is a chat: people see its text, with who says it.
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    view = json.loads((run / "viewer.json").read_text())["items"][0]
    assert sample["prompt"] == view["prompt"] == "user: 1+1="
    # A run that math_answer began to judge cannot be judged by another reward at its end.
    before = json.loads((run / "before.json").read_text())
    (run / "before.json").write_text(json.dumps({key: value for key, value in before.items() if key != "judge"}))
    assert main(["train", *words, "run.resume=true", "train.steps=3"]) == 2
    assert "run.resume: math_answer judged before training" in capsys.readouterr().err


def test_a_run_in_which_no_reward_applies_says_so_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(tmp_path, "nothing", PLAIN)
    assert main(["train", *words]) == 1
    complaint = capsys.readouterr().err
    assert "step 1: none of 4 rollouts got a score from " in complaint and complaint.count("\n") == 1
    (line,) = runs.lines(tmp_path / "run", "train")
    # No decision was scored: there is no gap, and none of 0 either.
    assert line["filters/unscored"] == 4 and line["policy/decisions"] == 0 and "policy/logprob_gap" not in line
    assert not (tmp_path / "run" / "checkpoints").exists()
    more = ["reward.max_failure_share=1", f"run.output_dir={tmp_path / 'on'}"]
    assert main(["train", *words, *more]) == 0
    assert "step 2: none of 4 rollouts got a score" in capsys.readouterr().out


# --- rollouts ---------------------------------------------------------------------------------------------------------


def test_rollout_needs_a_model_and_seeds_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(tmp_path, "long", PLAIN)
    output = ["--output", str(tmp_path / "out")]
    for search in ([], ["--search", "best_of_n"]):
        assert main(["rollout", *words, *output, *search]) == 2
        assert "model.path is required: the model would have random weights" in capsys.readouterr().err
    assert main(["rollout", *words, *output, "--group-size", "1030"]) == 2
    assert "--group-size must lie in [1, 1024], got 1030: seeds repeat beyond" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    seeds = {request_seed(3, row, sample) for row in range(3) for sample in range(MAX_GROUP)}
    assert len(seeds) == 3 * MAX_GROUP
    with pytest.raises(AssertionError):
        request_seed(3, 0, MAX_GROUP)
