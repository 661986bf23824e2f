"""Whole runs, warm start to report, for both model families: what they leave behind and what stops them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from rewards import RewardFailureError
from rl.cli import main
from rl.config import load_config
from rl.evaluation.scoring import judge_of
from rl.models.load import load_policy
from rl.models.tokenizers import load_tokenizer
from rl.tasks.sudoku import SudokuTask, is_heldout
from rl.train.learner import TrainingError
from rl.train.run import Run
from tests import runs

FAMILIES = {
    "full": [],
    "block_causal": [
        f"model.backbone={json.dumps(runs.QWEN3)}",
        "model.attention=block_causal",
        "model.block_length=4",
    ],
}

# The share of ones: easy to learn, and its sign is easy to get wrong.
ONES = """
def ones(prompts, completions, **columns):
    return [c.count("1") / 16 for c in completions]
"""


def reward(folder: Path, code: str, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "own.py").write_text(code)
    return f"reward.functions=[{{name: '{folder / 'own.py'}:{name}'}}]"


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    goal = "goal={steps: 4, before_max: 1.0, after_min: 0.0}"
    runs.train_here(runs.tiny_config(folder, *FAMILIES[request.param], "eval.every=1", "checkpoint.every=2", goal))
    return folder / "run"


def test_run_folder(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    files = {"config.yaml", "metrics.jsonl", "samples.jsonl", "before.json", "viewer.json", "summary.json"}
    assert names == files | {"data.json", "lock", "checkpoints", "warm_start"}
    stages = [(line["stage"], line["step"]) for line in runs.lines(run)]
    # The evaluation after the last step is the final one.
    assert stages == [
        ("sft", 1), ("sft", 2), ("eval", 0),
        ("train", 1), ("eval", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3),
    ]  # fmt: skip
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {1, 2, 3}
    assert all(sample["prompt"].endswith("=") for sample in samples)
    # Four steps; with blocks one step a block, of which there are at most five: block 5 starts inside the prompt.
    steps = {sample["num_steps"] for sample in samples}
    assert steps == {4} if run.parent.name.startswith("full") else steps <= {1, 2, 3, 4, 5}


def test_summary(run: Path) -> None:
    """Defect W8: the published evaluation on the way is undefined for one family, and stops its run."""
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["task"], summary["seed"], summary["n_eval"]) == ("sudoku", 0, 6)
    assert summary["before"].keys() == summary["after"].keys() == {"4"}
    assert summary["train_steps"] == 3
    assert summary["sft_steps"] == 2
    assert summary["updates"] == 6
    assert summary["reward_queries"] == 3 * 8 * 2
    assert summary["goal"]["met"] is True
    assert summary["after"]["4"] == runs.series(run, "eval", "eval/accuracy@4")[-1]
    for start, end in summary["after_interval"].values():
        assert 0 <= start <= end <= 1


def test_sampler_and_learner_agree_on_the_recorded_log_probs(run: Path) -> None:
    """Float32 rounding only, at weights that have moved: 6 updates of a rate of 0.02."""
    assert max(runs.series(run, "train", "policy/logprob_gap_max")) < 1e-5


def test_the_newest_checkpoint_holds_the_final_policy(run: Path) -> None:
    """The evaluated policy is the saved one: decoding with it gives the summary's numbers again."""
    assert (run / "checkpoints" / "latest").read_text() == "step_3"
    folder = run / "checkpoints" / "step_3" / "hf"
    output = str(run.parent / "eval.json")
    assert main(["eval", "--config", str(run / "config.yaml"), f"model.path={folder}", "--output", output]) == 0
    result = json.loads((run.parent / "eval.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert result["results"]["4"]["accuracy"] == summary["after"]["4"]
    warm, trained = (runs.load_file(folder / "model.safetensors")
                     for folder in (run / "warm_start", run / "checkpoints" / "step_3" / "hf"))  # fmt: skip
    assert runs.largest_difference(warm, trained) > 0.02


def test_saved_policy_loads_with_equal_logits(run: Path, tmp_path: Path) -> None:
    folder = str(run / "checkpoints" / "step_3" / "hf")
    config = load_config(None, [f"model.path={folder}"])
    tokenizer = load_tokenizer(config.model, SudokuTask())
    models = [load_policy(config.model, tokenizer, seed) for seed in (0, 1)]
    ids = torch.tensor(
        [tokenizer("0340120000000000=", add_special_tokens=False).input_ids + [tokenizer.mask_token_id] * 15]
    )
    with torch.no_grad():
        first, second = (model(ids) for model in models)
    assert torch.equal(first, second)


def test_held_out_puzzles_are_never_trained_on(run: Path) -> None:
    prompts = {json.loads(line)["prompt"][:-1] for line in (run / "samples.jsonl").read_text().splitlines()}
    assert not any(is_heldout(prompt) for prompt in prompts)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        runs.train_here(runs.tiny_config(tmp_path / name, f"run.seed={seed}", "train.steps=2"))
    a, b, c = (tmp_path / name / "run" for name in "abc")
    assert runs.lines(a) == runs.lines(b)
    assert runs.largest_difference(runs.weights(a), runs.weights(b)) == 0.0
    assert runs.series(a, "train", "reward/mean") != runs.series(c, "train", "reward/mean")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_rewarded_becomes_more_frequent(tmp_path: Path, family: str) -> None:
    """From about a sixth of ones to more than half; with the sign of the gradient turned it falls to 0."""
    runs.train_here(
        runs.tiny_config(tmp_path, *FAMILIES[family], reward(tmp_path, ONES, "ones"), "train.steps=20",
                         "train.epochs=1", "train.micro_batch_size=16", "algorithm.entropy_coef=0", "sft.steps=0")
    )  # fmt: skip
    rewards = runs.series(tmp_path / "run", "train", "reward/mean")
    assert rewards[0] < 0.3
    assert rewards[-1] > 0.5


def test_equal_rewards_teach_nothing(tmp_path: Path) -> None:
    constant = "def constant(prompts, completions, **columns):\n    return [0.5] * len(prompts)\n"
    runs.train_here(runs.tiny_config(tmp_path, reward(tmp_path, constant, "constant")))
    started = runs.load_file(tmp_path / "run" / "warm_start" / "model.safetensors")
    assert runs.largest_difference(runs.weights(tmp_path / "run"), started) == 0.0
    assert runs.series(tmp_path / "run", "train", "reward/zero_variance_share") == [1.0, 1.0, 1.0]
    assert runs.series(tmp_path / "run", "train", "cost/updates") == [0, 0, 0]


def test_a_reward_that_fails_now_and_then_is_counted_and_left_out(tmp_path: Path) -> None:
    flaky = """
def flaky(prompts, completions, **columns):
    if len(prompts) == 1:
        raise RuntimeError("no verdict")
    return [float("nan") if c.startswith("1") else c.count("1") / 16 for c in completions]
"""
    runs.train_here(runs.tiny_config(tmp_path, reward(tmp_path, flaky, "flaky"), "reward.max_failure_share=1"))
    failed = runs.series(tmp_path / "run", "train", "reward/failed")
    assert 0 < sum(failed) < 3 * 16
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all((sample["reward"] is None) == sample["completion"].startswith("1") for sample in samples)


def test_rewards_that_fail_too_often_stop_the_run(tmp_path: Path) -> None:
    broken = "def broken(prompts, completions, **columns):\n    raise RuntimeError('no network')\n"
    with pytest.raises(RewardFailureError, match="no network"):
        runs.train_here(runs.tiny_config(tmp_path, reward(tmp_path, broken, "broken")))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_disagreement_with_the_sampler_stops_the_run(tmp_path: Path) -> None:
    """With a cache, sampler and learner round differently; a limit below rounding must be noticed."""
    arguments = runs.tiny_config(tmp_path, *FAMILIES["block_causal"], "train.max_logprob_gap=1e-12")
    with pytest.raises(TrainingError, match="what is trained is not what was sampled"):
        runs.train_here(arguments)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_nan_stops_the_run_before_a_checkpoint(tmp_path: Path) -> None:
    """A learning rate that throws the weights out of range: the next loss is NaN, and nobody saves it."""
    arguments = runs.tiny_config(
        tmp_path, "train.optimizer.lr=1e25", "train.optimizer.warmup_steps=0", "checkpoint.every=1"
    )
    done = runs.cli("train", *arguments)
    assert done.returncode == 1, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert "the loss of update 1 is not finite; no step was taken" in lines[0]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_weights_that_overflow_never_reach_a_checkpoint(tmp_path: Path) -> None:
    """Loss and gradient of the last update are finite; what the update made of the weights is not."""
    arguments = runs.tiny_config(tmp_path, "sft.steps=0", "train.steps=1", "train.epochs=1", "train.optimizer.lr=1e37",
                                 "train.optimizer.weight_decay=1e3", "train.optimizer.warmup_steps=0")  # fmt: skip
    with pytest.raises(TrainingError, match="update 0 left weights that are not finite"):
        runs.train_here(arguments)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_model_that_gives_nan_gets_no_accuracy(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It decodes to something all the same: an accuracy of 0 would look like a measurement."""
    folder = tmp_path / "hf"
    shutil.copytree(run / "checkpoints" / "step_3" / "hf", folder)
    damaged = runs.load_file(folder / "model.safetensors")
    damaged["lm_head.weight"][0] = np.nan
    save_file(damaged, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["eval", "--config", str(run / "config.yaml"), f"model.path={folder}"]) == 1
    assert "the model's logits are not finite" in capsys.readouterr().err


class Briefly(SudokuTask):
    reward = "length"


def test_the_verifier_takes_the_parameters_of_the_tasks_own_reward(tmp_path: Path) -> None:
    """Accuracy is measured by the reward as the config describes it, without its weight."""
    functions = "reward.functions=[{name: sudoku}, {name: length, weight: 0.1, params: {max_length: 4}}]"
    arguments = runs.tiny_config(tmp_path, "task.name=tests.test_loop:Briefly", functions)
    config = load_config(arguments[1], arguments[2:])
    with Run.open(config, write=False) as opened:
        assert opened.judge.verifier.score(["a"], ["b"], {"completion_ids": [[7]]}).values == [-0.25]
        own = judge_of(config.reward, opened.task, None).functions[0]
        assert (own.name, own.params) == ("length", {"max_length": 4})
    assert judge_of(config.reward, opened.task, "length").functions[0].params == {}


def test_out_of_time(tmp_path: Path) -> None:
    """The step that is running ends, is saved and evaluated."""
    runs.train_here(runs.tiny_config(tmp_path, "train.max_seconds=0.001", "sft.max_seconds=0.001"))
    run = tmp_path / "run"
    assert [(line["stage"], line["step"]) for line in runs.lines(run)] == [
        ("sft", 1), ("eval", 0), ("train", 1), ("eval", 1),
    ]  # fmt: skip
    assert json.loads((run / "summary.json").read_text())["train_steps"] == 1
    assert (run / "checkpoints" / "latest").read_text() == "step_1"


def test_mixed_step_counts_depend_on_seed_and_prompt_only(tmp_path: Path) -> None:
    runs.train_here(runs.tiny_config(tmp_path, "train.mixed_steps=[2, 8]", "train.steps=2"))
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    counts: dict[tuple[int, str], set[int]] = {}
    for sample in samples:
        counts.setdefault((sample["step"], sample["prompt"]), set()).add(sample["num_steps"])
    # The rollouts of a prompt share one step count, or their rewards could not be compared.
    assert all(len(values) == 1 for values in counts.values())
    forwards = runs.series(tmp_path / "run", "train", "cost/reward_queries")
    assert forwards == [16, 32]
    # The mean of all is that of the two step counts, whose prompts are as many as the draws gave them.
    for line in runs.lines(tmp_path / "run", "train"):
        two, eight = (line[f"reward/mean@{steps}"] for steps in (2, 8))
        weight = (line["reward/mean"] - eight) / (two - eight) * 8
        assert weight == pytest.approx(round(weight), abs=1e-6) and 0 < weight < 8


def test_samples_are_the_first_the_worst_and_the_best_with_their_parts(tmp_path: Path) -> None:
    runs.train_here(runs.tiny_config(tmp_path, "train.steps=1"))
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    rewards = [sample["reward"] for sample in samples]
    assert len(samples) == 4 and rewards[2] < rewards[3]
    assert all(sample["parts"] == {"dense": sample["reward"]} for sample in samples)
    viewer = json.loads((tmp_path / "run" / "viewer.json").read_text())
    view = viewer["items"][0]["after"]
    assert view["parts"] == {"sudoku": view["value"]} and view["correct"] == (view["value"] >= 1)
    assert bool(view["violations"]) != view["correct"]
