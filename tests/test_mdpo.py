"""MDPO: the rows of recorded x0 predictions, per-step advantages, and what a run does with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl.advantages import mdpo_advantage
from rl.config import load_config
from rl.estimators.base import Verdicts
from rl.estimators.x0_rows import StepSummary, num_x0_targets, step_summary, x0_rows
from rl.modalities.text import TextModality
from rl.tasks.sudoku import SudokuTask
from rl.track.report import write_report
from rl.track.verdict import backslide_line
from rl.train.backslide import Backslide, backslide_of
from rl.train.loop import train
from rl.train.plan import check_run
from rl.train.rollouts import RolloutSource
from rl.train.run import Run
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.distribution import sampling_logprobs
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import TokenTrajectory
from tests.runs import lines, tiny_config, train_here

NAN = math.nan


def sampled(model: Any, count: int = 4, **settings: Any) -> list[TokenTrajectory]:
    options = {"gen_length": 8, "num_inference_steps": 4, "record_x0": True, "temperature": 1.3, "top_p": 0.95}
    engine = InProcessEngine(model, SamplerOptions(**{**options, **settings}))
    return engine.generate([Request([1, 4, 2][: 1 + s % 3], seed=s) for s in range(count)])


@pytest.mark.parametrize("targets", ["masked", "committed"])
@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("family", ["gpt2-full", "gpt2-full-shifted", "qwen3-full"])
def test_the_learner_scores_the_recorded_x0_predictions(
    make_model, family: str, block_length: Any, targets: Any
) -> None:
    """Sampler, learner and one plain forward of the canvas agree on every draw, prompts of three lengths in a batch."""
    model = make_model(family)
    trajectories = sampled(model, block_length=block_length)
    steps = [np.array([True, False, True, True]), *[np.array([False, i % 2 == 0, False, True]) for i in range(3)]]
    rows = x0_rows(trajectories, model, steps, targets)
    with torch.no_grad():
        logprob = rows.score(model).logprob
    torch.testing.assert_close(logprob, rows.sampler_logprob, rtol=0, atol=1e-9)
    at = 0
    for index, (trajectory, chosen) in enumerate(zip(trajectories, steps, strict=True)):
        before = at
        for step in np.flatnonzero(chosen):
            canvas = trajectory.canvas_at(step)
            with torch.no_grad():
                logits = model(torch.from_numpy(canvas)[None])[0]
            now = trajectory.position[trajectory.step == step]
            for position in now if targets == "committed" else np.flatnonzero(canvas == trajectory.mask_token_id):
                token = int(trajectory.x0_hat[step, position])
                plain = sampling_logprobs(
                    logits[position - model.logit_shift][None], keep=torch.tensor([token]), **trajectory.sampler
                )[0, token]
                assert (int(rows.trajectory[at]), int(rows.step[at])) == (index, step)
                assert int(rows.position_ids[rows.row[at], rows.column[at]]) == position
                assert float(logprob[at]) == pytest.approx(float(plain), abs=1e-9)
                at += 1
        assert at - before == num_x0_targets(trajectory, chosen, targets)
    assert at == len(logprob) and logprob.std() > 0.3


def test_what_a_draw_counts(make_model) -> None:
    """With weight 1 / decisions: confidence over (targets of its step x steps). A step that was left out is counted."""
    model = make_model("gpt2-full")
    (trajectory,) = sampled(model, 1)
    steps = [np.array([True, False, False, True])]
    for confidence in (False, True):
        for num_steps, divisor in ((None, 2), (3, 3), (9, 4)):
            rows = x0_rows([trajectory], model, steps, confidence=confidence, num_steps=num_steps)
            # 8 masked positions at step 0, 2 at step 3.
            assert rows.step.tolist() == [0] * 8 + [3] * 2
            weight = rows.weight_factor / 10
            sure = torch.from_numpy(trajectory.x0_confidence)[rows.step, rows.column] if confidence else 1.0
            expected = sure / torch.tensor([8.0] * 8 + [2.0] * 2) / divisor
            torch.testing.assert_close(weight, expected.double(), rtol=1e-6, atol=0)
            if not confidence:
                assert float(weight.sum()) == pytest.approx(2 / divisor)


def test_a_rollout_without_fills_is_refused(make_model) -> None:
    model = make_model("gpt2-full")
    plain = sampled(model, 1, record_x0=False)
    with pytest.raises(ValueError, match=r"set sampler\.record_x0=true"):
        num_x0_targets(plain[0], np.array([True] * 4), "masked")


def test_notes_of_a_trajectory(make_model) -> None:
    model = make_model("gpt2-full")
    first, second = sampled(model, 2, num_inference_steps=3)
    summary = step_summary(first)
    # 8 positions over 3 steps, the remainder first.
    assert summary.masked.tolist() == [8, 5, 2] and summary.seed == first.seed
    for step in range(3):
        assert summary.surprisal[step] == pytest.approx(-first.logprob[first.step == step].mean())
    assert len(set(summary.canvas.tolist())) == 3
    again = InProcessEngine(model, SamplerOptions(gen_length=8, num_inference_steps=3)).generate([Request([1], seed=9)])
    assert step_summary(again[0]).canvas[0] == summary.canvas[0] != step_summary(second).canvas[0]


def verdicts(steps: list[list[float]], canvas: list[list[int]] | None = None) -> Verdicts:
    table = torch.tensor(steps, dtype=torch.float64)
    keys = canvas or [[0] * len(steps[0])] * len(steps)
    masked = np.array([8, 4, 2])
    summaries = [StepSummary(s, np.array(k), np.zeros(3), masked) for s, k in enumerate(keys)]
    last = torch.tensor([[r for r in row if r == r][-1] for row in steps], dtype=torch.float64)
    return Verdicts(last, torch.zeros(len(steps), dtype=torch.int64), table, summaries)


SETTINGS: dict[str, Any] = {
    "credit": "delta_future", "compare": "index", "scale": "none", "train_steps": 3, "select": "largest",
    "mask_weight": False,
}  # fmt: skip


def advantage(given: Verdicts, **settings: Any) -> list[list[float]]:
    return mdpo_advantage(given, **{**SETTINGS, **settings}).tolist()


def approx(rows: list[list[float]]) -> Any:
    return [pytest.approx(row, nan_ok=True) for row in rows]


def test_advantages_of_a_group_by_hand() -> None:
    """One rollout finds the answer and loses it, the other finds it last.

    Credit (delta + future): 0+1/2, 1+0, -1+0 against 0+1/2, 0+1, 1+1; their means are 1/2, 1 and 1/2.
    """
    group = verdicts([[0, 1, 0], [0, 0, 1]])
    assert advantage(group) == approx([[NAN, NAN, -1.5], [NAN, NAN, 1.5]])
    # Sample standard deviation of -1 and 2 is sqrt(4.5).
    z = 1.5 / (math.sqrt(4.5) + 1e-4)
    assert advantage(group, scale="std") == approx([[NAN, NAN, -z], [NAN, NAN, z]])
    # Terminal reward alone: -1/2 and 1/2 at every step; a step with 4 of 8 masked counts 2, with 2 of 8 counts 4.
    final = advantage(group, credit="final", mask_weight=True)
    assert final == approx([[-0.5, -1, -2], [0.5, 1, 2]])
    # Two steps of equal advantage: the earlier; chosen before the weight by masks.
    assert advantage(group, credit="final", train_steps=2, mask_weight=True) == approx([[-0.5, -1, NAN], [0.5, 1, NAN]])
    # The first canvas is shared, the others are not: nothing to compare with there.
    alone = advantage(verdicts([[1, 1, 0], [0, 0, 1]], [[5, 6, 7], [5, 8, 9]]), credit="step", compare="canvas")
    assert alone == approx([[0.5, NAN, NAN], [-0.5, NAN, NAN]])
    # The same canvas at different steps is the same state.
    shifted = advantage(verdicts([[1, 1, 0], [0, 0, 1]], [[5, 6, 7], [4, 5, 6]]), credit="step", compare="canvas")
    assert shifted == approx([[0.5, NAN, NAN], [NAN, -0.5, NAN]])


def test_a_rollout_without_advantage_keeps_its_place_in_the_mean() -> None:
    """0 and not NaN: it is one of the rollouts that the loss is averaged over."""
    group = verdicts([[1, 0, 1], [0, 0, 0], [0.5, 0, 0.5]])
    assert advantage(group, credit="step") == approx([[0.5, NAN, 0.5], [-0.5, NAN, -0.5], [0, 0, 0]])


def test_an_unscored_rollout_has_no_advantage() -> None:
    given = verdicts([[1, 0, 1], [0, NAN, 0], [0, 0, 0]])
    assert advantage(given, credit="step") == approx([[0.5, NAN, 0.5], [NAN] * 3, [-0.5, NAN, -0.5]])
    given.reward[2] = NAN
    assert torch.tensor(advantage(given, credit="step"))[1:].isnan().all()


COUNTING = """
def dense(prompts, completions, **columns):
    with open({path!r}, "a") as file:
        for prompt, completion in zip(prompts, completions, strict=True):
            file.write(prompt + completion + "\\n")
    def score(text):
        return sum((i + 1) * 1.37 ** int(digit) for i, digit in enumerate(text) if digit.isdigit()) / 500
    return [score(c) for c in completions]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A tiny MDPO run of two steps, and the texts its reward was asked about."""
    folder = tmp_path_factory.mktemp("mdpo")
    queries = folder / "queries.txt"
    arguments = tiny_config(
        folder, "algorithm.name=mdpo", "algorithm.entropy_coef=0", "algorithm.train_steps=2", "sampler.record_x0=true",
        "train.steps=2", "train.epochs=1", "train.max_logprob_gap=1e-4",
        "sampler.temperature=0.03", "task.params.min_givens=8", "eval.num_prompts=2",
        reward=COUNTING.format(path=str(queries)),
    )  # fmt: skip
    train_here(arguments)
    return folder / "run", queries.read_text().splitlines()


def test_a_run_takes_one_optimizer_step_per_batch(run) -> None:
    train = lines(run[0], "train")
    assert [line["cost/updates"] for line in train] == [1, 2]
    # Exact, in the learner's precision: the sampler's log-prob of every draw of the x0 predictions.
    assert all(line["policy/logprob_gap_max"] < 1e-4 for line in train)
    # 16 rollouts, at most 2 steps each, with at most 16 and 12 masked positions.
    assert all(16 < line["policy/decisions"] <= 16 * 28 for line in train)
    assert all(line["policy/grad_norm"] > 0 for line in train)


def test_every_distinct_x0_prediction_is_verified_once(run) -> None:
    """An RL step of 8 prompts and 2 rollouts of 4 steps: 16 terminal texts, then every other x0 prediction.

    The last prediction is the terminal text, which has its verdict.
    """
    train = lines(run[0], "train")
    queries, first = run[1], int(train[0]["cost/reward_queries"])
    assert train[-1]["cost/reward_queries"] == len(queries)
    for mine in (queries[:first], queries[first:]):
        others = mine[16:]
        assert 0 < len(others) == len(set(others)) < 16 * 3
        assert not set(mine[:16]) & set(others)


FAILING = """
def dense(prompts, completions, **columns):
    # Predictions come without the columns of a trajectory: every verdict is given, and no prediction has one.
    return [0.25 if "num_steps" in columns else float("nan") for _ in completions]
"""


def test_failed_fills_are_counted_like_failed_verdicts(tmp_path: Path) -> None:
    arguments = tiny_config(
        tmp_path, "algorithm.name=mdpo", "algorithm.entropy_coef=0", "sampler.record_x0=true", "train.steps=1",
        "train.epochs=1", "sft.steps=0", "reward.max_failure_share=1", "eval.num_prompts=2", "eval.viewer_items=0",
        reward=FAILING,
    )  # fmt: skip
    train_here(arguments)
    (line,) = lines(tmp_path / "run", "train")
    # All 16 rollouts have a verdict; left out are those with a prediction that no rollout of the prompt ended in.
    asked = line["cost/reward_queries"] - 16
    assert asked > 16 and line["reward/dense/failures"] == line["reward/masked"] == asked
    assert line["reward/mean"] == 0.25 and 8 < line["reward/failed"] == line["filters/unscored"] <= 16
    assert line["policy/decisions"] == 0


def test_remasking_decoding_is_trained_as_it_decodes(tmp_path: Path) -> None:
    """The published pair, MDPO and running-confidence remasking, through the whole loop."""
    arguments = tiny_config(
        tmp_path, "algorithm.name=mdpo", "algorithm.entropy_coef=0", "sampler.record_x0=true", "sampler.preset=rcr",
        "sampler.block_length=8", "sampler.num_inference_steps=8", "eval.num_inference_steps=[8]",
        "train.steps=2", "train.max_logprob_gap=1e-4", "eval.num_prompts=2",
        "eval.viewer_items=0",
    )  # fmt: skip
    config = load_config(arguments[1], arguments[2:])
    check_run(config)
    with Run.open(config) as opened:
        train(opened)
        rollouts = RolloutSource(opened).sample(2, 0)
        rows = x0_rows(rollouts.trajectories, opened.model, None)
        with torch.no_grad():
            gap = (rows.score(opened.model).logprob - rows.sampler_logprob).abs()
    run = lines(tmp_path / "run", "train")
    assert len(run) == 2 and all(line["policy/grad_norm"] > 0 and line["policy/decisions"] > 16 for line in run)
    assert all(line["policy/logprob_gap_max"] < 1e-4 for line in run)
    # The sampler of that run does take tokens back, into earlier blocks too.
    assert float(gap.max()) < 1e-4
    assert len(gap) == sum(int((~np.isnan(t.x0_logprob)).sum()) for t in rollouts.trajectories)
    assert sum(int((~t.is_reveal).sum()) for t in rollouts.trajectories) > 16
    assert any((np.diff(t.block_of(t.position)) < 0).any() for t in rollouts.trajectories)


def test_a_rank_without_rollouts_fills_up_with_one_draw_and_any_other_with_the_steps_it_may_train(make_model) -> None:
    """Not with every step: at 128 steps these rows would be the largest of the run."""
    model = make_model("gpt2-full")
    config = load_config(None, ["algorithm.name=mdpo", "algorithm.train_steps=3", "sampler.record_x0=true"])
    recipe = config.algorithm
    rows = recipe.rows([TextModality(config, SudokuTask(), None).smallest_trajectory(model)], model)
    assert len(rows.target) == rows.num_rows == 1 and torch.isfinite(rows.score(model).logprob).all()
    trajectory = sampled(model, 1)[0]
    rows = recipe.rows([trajectory], model)
    assert rows.num_rows == 3 and rows.step.tolist() == [0] * 8 + [1] * 6 + [2] * 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "reward.functions=[{name: sudoku, normalize: group}]",
            "'sudoku' has normalize group, but algorithm.name mdpo compares .*: set normalize to none",
        ),
        ("sampler.record_x0=false", "algorithm.name mdpo needs sampler.record_x0=true: set it"),
        ("algorithm.credit=best", "algorithm.credit"),
        ("algorithm.aggregation=token_mean", "algorithm.aggregation"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    arguments = tiny_config(
        tmp_path, "algorithm.name=mdpo", "algorithm.entropy_coef=0", "sampler.record_x0=true", override
    )
    with pytest.raises(ValueError, match=message):
        check_run(load_config(arguments[1], arguments[2:]))


def test_answer_backslide_by_hand() -> None:
    """Right, right, wrong; wrong, right; wrong twice; right, wrong; and one with an unscored prediction, left out."""
    rewards = [[1, 1, 0], [0, 1], [0.9, 0], [2, 0.5], [1, NAN, 0]]
    report = backslide_of([np.array(r, dtype=np.float64) for r in rewards])
    assert (report.share, report.steps, report.ever, report.unscored) == (2 / 4, 1.5, 3 / 4, 1)
    assert report.line().endswith("(on average 1.5 right steps), 1 not judged")
    assert backslide_of([np.array([0.0]), np.array([1.0])]) == Backslide(0.0, 0.0, 0.5)
    assert math.isnan(backslide_of([np.array([NAN])]).share)
    # The report says it too, and nothing of a step count at which nothing was judged.
    tables = {"4": vars(report), "8": vars(backslide_of([np.array([NAN])]))}
    assert backslide_line({"after_backslide": tables}) == (
        "Right at an earlier step and wrong at the end: after training 0.500 at 4 steps (1.5 right steps each, "
        "1 not judged)."
    )


def test_a_run_reports_backslide_before_and_after(tmp_path: Path) -> None:
    """With eval.backslide the verifier sees the x0 predictions of held-out problems; a budget ends the run."""
    arguments = tiny_config(
        tmp_path, "algorithm.entropy_coef=0", "eval.backslide=true", "eval.sampler.selector=left_most",
        "train.max_sequence_forwards=150", "eval.viewer_items=0",
    )  # fmt: skip
    train_here(arguments)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # 16 rollouts of 4 steps, then 2 passes over at most 64 rows: over the budget after the first step or the second.
    assert summary["sequence_forwards"] >= 150 and summary["train_steps"] < 3
    assert summary["before_backslide"].keys() == {"4"} and summary["after_backslide"]["4"]["share"] == 0.0
    assert "Right at an earlier step and wrong at the end: before training 0.000 at 4 steps" in backslide_line(summary)
    evals = lines(tmp_path / "run", "eval")
    assert all("eval/backslide_share@4" in line for line in evals)
    write_report(tmp_path / "run")
    assert "Right at an earlier step" in (tmp_path / "run" / "report.html").read_text()
