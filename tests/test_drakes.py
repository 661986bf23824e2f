"""The DRAKES recipe: three estimators of one objective, and the updater whose gradient goes through the sampler."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rl.advantages import group_softmax
from rl.batch import DecisionBatch
from rl.config import load_config
from rl.distributed import Means
from rl.estimators.base import Verdicts
from rl.losses.aggregate import weighted_sum
from rl.modalities.gradient import GradientSegment
from rl.recipes.drakes import DRAKES
from rl.registry import parse_recipe
from rl.sections import TrainConfig
from rl.train.reward_gradient import RewardGradientUpdater
from rl.train.rollouts import RolloutSource
from rl.train.run import Costs, Run
from rl.train.update import PolicyUpdater
from rollouts.samplers.options import SamplerOptions
from tests import runs
from tests.tabular import PROMPT, TabularModel, path_objective
from tests.test_exact_toy import World, enumerate_world
from tests.test_updater import plain_scores

ALPHA = 0.5


def table(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A joint law of 3 positions over 2 tokens, and a reward of every sequence."""
    generator = torch.Generator().manual_seed(seed)
    law = torch.rand((2, 2, 2), generator=generator, dtype=torch.float64) + 0.1
    return law / law.sum(), torch.randn((2, 2, 2), generator=generator, dtype=torch.float64)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Every rollout of a tabular policy that decodes left to right, one position at a time."""
    monkeypatch.setattr("tests.test_exact_toy.PROMPT", PROMPT)
    law, _ = table()
    policy = TabularModel(2, 3).become(law)
    with torch.no_grad():
        policy.table += 0.5 * torch.randn(policy.table.shape, generator=torch.Generator().manual_seed(0)).double()
    options = SamplerOptions(gen_length=3, num_inference_steps=3, selector="left_most")
    return enumerate_world(policy, options)


def log_ratio_of(world: World, reference: TabularModel) -> torch.Tensor:
    recipe = DRAKES(gradient="score_function")
    rows = recipe.rows(world.trajectories, world.model, None, None)
    with torch.no_grad():
        ratio = rows.sampler_logprob - rows.score(reference).logprob
    return torch.zeros(len(world.trajectories), dtype=torch.float64).index_add(0, rows.trajectory, ratio)


def gradient_of(world: World, advantage: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    recipe = DRAKES(**options)
    rows = recipe.rows(world.trajectories, world.model, None, None).distinct()
    logprob, entropy, *_ = rows.score(world.model)
    batch = DecisionBatch(
        logprob=logprob, entropy=entropy, old_logprob=logprob.detach(), ref_logprob=None,
        advantage=advantage[rows.trajectory], weight=weight[rows.trajectory],
        trajectory=rows.trajectory, step=rows.step,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(weighted_sum(recipe.loss(batch).loss, batch.weight), [world.model.table])
    return gradient


def reward_of(world: World) -> torch.Tensor:
    _, reward = table()
    return torch.stack([reward[tuple(t.final_canvas()[1:])] for t in world.trajectories])


def test_the_score_function_gradient_is_the_gradient_of_the_objective(world: World) -> None:
    """E[reward - alpha * log-ratio] by enumeration and automatic differentiation, against the recipe's own pieces."""
    law, _ = table()
    reference = TabularModel(2, 3).become(law)
    reward, log_ratio = reward_of(world), log_ratio_of(world, reference)
    p = world.probability
    path = sum_log_ratio(world, reference)
    torch.testing.assert_close(path.detach(), log_ratio)
    (exact,) = torch.autograd.grad((p * (reward - ALPHA * path)).sum(), [world.model.table], retain_graph=True)
    verdicts = Verdicts(reward, torch.zeros(len(reward), dtype=torch.int64), log_ratio=log_ratio)
    advantage = DRAKES(gradient="score_function", alpha=ALPHA).advantage(verdicts)
    torch.testing.assert_close(advantage, (reward - ALPHA * log_ratio) - (reward - ALPHA * log_ratio).mean())
    ours = -gradient_of(world, advantage, p.detach(), gradient="score_function", alpha=ALPHA)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-10)
    assert exact.norm() > 0.1
    # Without the path KL it is another gradient.
    (other,) = torch.autograd.grad((p * reward).sum(), [world.model.table])
    assert (other - exact).norm() > 0.05


def sum_log_ratio(world: World, reference: TabularModel) -> torch.Tensor:
    """[worlds], with gradient: log p_theta(path) - log p_pre(path)."""
    values = []
    for trajectory, probability in zip(world.trajectories, world.probabilities, strict=True):
        other = torch.zeros((), dtype=torch.float64)
        for step, (position, token) in enumerate(zip(trajectory.position, trajectory.token, strict=True)):
            state = tuple(int(i) for i in trajectory.canvas_at(step)[1:])
            other = other + reference.logp(state)[position - 1, token].detach()
        values.append(probability.log() - other)
    return torch.stack(values)


def test_the_regression_pulls_to_the_tilted_law(world: World) -> None:
    """Weighted by the policy's own probabilities the weights are those of the tilted paths: its cross-entropy."""
    law, reward_table = table()
    reference = TabularModel(2, 3).become(law)
    reward, log_ratio = reward_of(world), log_ratio_of(world, reference)
    p = world.probability
    target = p.detach() * ((reward - ALPHA * log_ratio) / ALPHA).exp()
    target = target / target.sum()
    tilted = law * (reward_table / ALPHA).exp()
    torch.testing.assert_close(
        target, torch.stack([tilted[tuple(t.final_canvas()[1:])] for t in world.trajectories]) / tilted.sum()
    )
    (exact,) = torch.autograd.grad((target * p.log()).sum(), [world.model.table])
    options = {"gradient": "weighted_regression", "alpha": ALPHA}
    ours = -gradient_of(world, target / p.detach(), p.detach(), **options)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-10)
    # On samples the same weights come from the group alone, up to a factor: a softmax at temperature alpha.
    verdicts = Verdicts(reward, torch.zeros(len(reward), dtype=torch.int64), log_ratio=log_ratio)
    weight = DRAKES(**options).advantage(verdicts)
    torch.testing.assert_close(weight / weight.sum(), target / p.detach() / (target / p.detach()).sum())
    assert float(weight.mean()) == pytest.approx(1.0)


def test_group_softmax_by_hand() -> None:
    value = torch.tensor([0.0, np.log(3.0), torch.nan, 5.0], dtype=torch.float64)
    weight = group_softmax(value, torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(weight, torch.tensor([0.5, 1.5, torch.nan, 1.0], dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize("gradient", ["score_function", "weighted_regression"])
def test_sampled_updates_reach_the_tilted_law(gradient: str) -> None:
    """Real engine, real recipe, 100 plain updates of a table on 200 rollouts: near the optimum alpha log Z."""
    from rollouts.engines.in_process import InProcessEngine, Request
    from rollouts.engines.shared import SharedForwards

    law, reward_table = table()
    reference, policy = TabularModel(2, 3).become(law), TabularModel(2, 3).become(law)
    recipe = DRAKES(gradient=gradient, alpha=ALPHA)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=100)
    sampler = SamplerOptions(gen_length=3, num_inference_steps=3, score="random")
    group = torch.zeros(200, dtype=torch.int64)
    for update in range(100):
        engine = InProcessEngine(SharedForwards(policy), sampler)
        trajectories = engine.generate([Request(PROMPT, seed) for seed in range(update * 200, (update + 1) * 200)])
        rows = recipe.rows(trajectories, policy, None, None).distinct()
        reward = torch.stack([reward_table[tuple(t.final_canvas()[1:])] for t in trajectories])
        with torch.no_grad():
            ratio = rows.sampler_logprob - rows.score(reference).logprob
        log_ratio = torch.zeros(200, dtype=torch.float64).index_add(0, rows.trajectory, ratio)
        advantage = recipe.advantage(Verdicts(reward, group, log_ratio=log_ratio))
        logprob, entropy, *_ = rows.score(policy)
        batch = DecisionBatch(
            logprob=logprob, entropy=entropy, old_logprob=logprob.detach(), ref_logprob=None,
            advantage=advantage[rows.trajectory], weight=torch.full_like(logprob, 1 / 200),
            trajectory=rows.trajectory, step=rows.step,
        )  # fmt: skip
        optimizer.zero_grad()
        weighted_sum(recipe.loss(batch).loss, batch.weight).backward()
        optimizer.step()
        schedule.step()
    value, _, final = (x.detach() for x in path_objective(policy, reference, reward_table, ALPHA))
    start = float(path_objective(reference, reference, reward_table, ALPHA)[0].detach())
    z = law * (reward_table / ALPHA).exp()
    best = float(ALPHA * z.sum().log())
    assert (float(value) - start) / (best - start) > 0.97
    assert 0.5 * float((final - z / z.sum()).abs().sum()) < 0.05


def drakes_config(folder: Path, *overrides: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = {"lr": 0.01, "warmup_steps": 1}
    config = {
        "run": {"output_dir": str(folder / "run"), "device": "cpu", "num_threads": 1},
        "model": {"backbone": {"model_type": "dilated_conv", "hidden_size": 12, "kernel_size": 5, "dilations": [1, 2]}},
        "task": {"name": "dna", "params": {"length": 12, "motif_rate": 0.04}},
        "sampler": {"gen_length": 12, "num_inference_steps": 6, "score": "random"},
        "sft": {"steps": 5, "batch_size": 16, "optimizer": optimizer},
        "algorithm": {"name": "drakes", "alpha": 0.01, "relaxed": {"relaxed_steps": 3}},
        "train": {"steps": 2, "prompts_per_step": 4, "group_size": 4, "micro_batch_size": 8, "optimizer": optimizer},
        "eval": {"num_inference_steps": [6], "num_prompts": 2},
        "filters": {"drop_zero_variance": False},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return ["--config", str(path), *overrides]


def test_a_run_logs_its_kl_and_counts_every_forward(tmp_path: Path) -> None:
    runs.train_here(drakes_config(tmp_path))
    lines = runs.lines(tmp_path / "run", "train")
    assert len(lines) == 2
    # Two micro-batches of 8 rollouts, 6 steps, policy and reference; 3 hard steps and the relaxed end are segments.
    assert lines[0]["cost/forward_passes"] == 2 * 12 and lines[0]["cost/sequence_forwards"] == 16 * 12
    assert lines[0]["cost/backward_passes"] == 2 * 4 and lines[1]["cost/updates"] == 2
    # The prompt's token and 12 letters of each canvas; a step's 16 rollouts cost one reward each.
    assert lines[0]["cost/tokens_forwarded"] == 16 * 12 * 13 and lines[0]["cost/reward_queries"] == 16
    # The policy is the reference before the first update, and not after it.
    assert abs(lines[0]["policy/path_kl"]) < 1e-5 < lines[1]["policy/path_kl"]
    assert lines[0]["policy/last_mask_mass"] == 0.0
    assert lines[0]["reward/low"] < lines[0]["reward/mean"] < lines[0]["reward/high"]


def test_what_a_checkpoint_repeats_is_counted(tmp_path: Path) -> None:
    runs.train_here(drakes_config(tmp_path, "algorithm.relaxed.checkpoint=true", "train.steps=1"))
    (line,) = runs.lines(tmp_path / "run", "train")
    # 3 hard steps once, 3 relaxed ones twice, through policy and reference.
    assert line["cost/sequence_forwards"] == 16 * 2 * (3 + 2 * 3)
    assert line["cost/tokens_forwarded"] == 13 * line["cost/sequence_forwards"]


def test_metrics_are_means_over_rollouts_and_the_interval_is_over_prompts() -> None:
    """Two prompts of two rollouts in micro-batches of 3 and 1: by hand, and not by micro-batch."""
    updater: Any = SimpleNamespace(run=SimpleNamespace(config=SimpleNamespace(train=TrainConfig(group_size=2))))
    done = [
        GradientSegment(torch.tensor([0.1, 0.2, 0.3]), 2, 39),
        GradientSegment(torch.zeros(3), 2, 39, torch.tensor([1.0, 3.0, 5.0]), "abc", {"policy/last_mask_mass": 0.2}),
        GradientSegment(torch.tensor([0.6]), 2, 13),
        GradientSegment(torch.zeros(1), 2, 13, torch.tensor([9.0]), "d", {"policy/last_mask_mass": 0.6}),
    ]
    metrics = RewardGradientUpdater._metrics(updater, done)
    # Prompt means 2 and 7; their standard error is 2.5.
    assert metrics["reward/mean"] == pytest.approx(4.5)
    assert metrics["reward/low"] == pytest.approx(4.5 - 1.96 * 2.5)
    assert metrics["policy/path_kl"] == pytest.approx(1.2 / 4)
    assert metrics["policy/last_mask_mass"] == pytest.approx((3 * 0.2 + 0.6) / 4)


def test_micro_batches_ranks_and_checkpoints_change_nothing(tmp_path: Path) -> None:
    runs.train_here(drakes_config(tmp_path / "whole", "train.micro_batch_size=16"))
    runs.train_here(drakes_config(tmp_path / "cut", "train.micro_batch_size=4", "algorithm.relaxed.checkpoint=true"))
    process = runs.ranks(2, *runs.many([drakes_config(tmp_path / "ranks", "train.deepspeed=zero2")]))
    assert process.returncode == 0, process.stderr[-2000:]
    whole = runs.weights(tmp_path / "whole" / "run")
    assert runs.largest_difference(whole, runs.weights(tmp_path / "cut" / "run")) < 2e-5
    assert runs.largest_difference(whole, runs.weights(tmp_path / "ranks" / "run")) < 2e-5
    start = runs.series(tmp_path / "whole" / "run", "train", "reward/mean")
    assert start == pytest.approx(runs.series(tmp_path / "ranks" / "run", "train", "reward/mean"), abs=1e-5)


def test_the_log_ratio_is_the_samplers_over_the_references(tmp_path: Path) -> None:
    """Against a reference that was moved by hand, token by token in the canvas before its step."""
    arguments = drakes_config(tmp_path, "algorithm.gradient=score_function", "algorithm.relaxed={}")
    config = load_config(arguments[1], arguments[2:])
    with Run.open(config, write=False) as run:
        source = RolloutSource(run)
        updater = PolicyUpdater(source, config.algorithm, total_updates=2)
        with torch.no_grad():
            for parameter in updater.reference.parameters():
                parameter.mul_(1.5)
        rollouts = source.sample(0, 0)
        updater.spent, updater.means = Costs(), Means()
        got = updater._log_ratio(rollouts)
        with torch.no_grad():
            expected = [
                float(t.logprob.sum() - plain_scores(updater.reference, t)[0].sum()) for t in rollouts.trajectories
            ]
    assert got == pytest.approx(expected, abs=1e-4) and max(map(abs, expected)) > 0.1


@pytest.mark.parametrize("gradient", ["score_function", "weighted_regression"])
def test_the_other_estimators_run_on_the_trace_machinery(tmp_path: Path, gradient: str) -> None:
    arguments = [f"algorithm.gradient={gradient}", "algorithm.relaxed={}", "train.max_logprob_gap=1e-4"]
    runs.train_here(drakes_config(tmp_path, *arguments))
    lines = runs.lines(tmp_path / "run", "train")
    assert abs(lines[0]["policy/path_kl"]) < 1e-4 < abs(lines[1]["policy/path_kl"])
    assert lines[1]["policy/decisions"] == 16 * 12


def test_mistakes_are_one_clear_line(tmp_path: Path) -> None:
    for index, (override, message) in enumerate(
        [
            ("train.epochs=2", "train.epochs is 2: a reward gradient samples anew for every update, set it to 1"),
            ("filters.drop_zero_variance=true", "algorithm.name drakes needs filters.drop_zero_variance=false: set it"),
            ("rollout.asynchronous=true", "algorithm.name drakes needs rollout.asynchronous=false: set it"),
            ("filters.refill_rounds=1", "sample, set it to 0"),
            ("filters.accuracy_low=0.5", "filters.accuracy_low is 0.5: a reward gradient learns from every sample"),
            ("train.max_logprob_gap=0.1", "a reward gradient has no recorded log-probs, set it to null"),
            ("reward.functions=[{name: motif_activity, normalize: group}]", "set it to none"),
            ("sampler.top_k=2", "sampler.top_k is 2: algorithm.gradient pathwise needs 0"),
            ("algorithm.relaxed.relaxed_steps=7", "must not exceed sampler.num_inference_steps (6)"),
            ("reward.functions=[{name: length, params: {max_length: 3}}]", "reward 'length' (length) has no gradient"),
            ("reward.functions=[{name: net_charge}]", "model.tokenizer has no token for the letter 'D'"),
        ]
    ):
        with pytest.raises(ValueError) as error:
            runs.train_here(drakes_config(tmp_path / str(index), "sft.steps=0", override))
        assert message in str(error.value)
    for raw, message in (
        ({"kl_coef": 0.1, "kl_to": "old"}, "algorithm.kl_to is not the KL of drakes"),
        ({"gradient": "weighted_regression", "alpha": 0}, "must be above 0 for gradient weighted_regression"),
        ({"baseline": "leave_one_out"}, "algorithm.baseline does nothing with algorithm.gradient pathwise"),
        (
            {"gradient": "weighted_regression", "clip_low": 0.1},
            "algorithm.clip_low does nothing with",
        ),
        ({"gradient": "score_function", "relaxed": {"relaxed_steps": 3}}, "algorithm.relaxed does nothing with"),
        ({"relaxed": {"relaxed_step": 3}}, "Extra inputs are not permitted"),
    ):
        with pytest.raises(ValidationError, match=message):
            parse_recipe({"name": "drakes", **raw})
