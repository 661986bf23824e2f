"""TraFL on a toy that can be enumerated, and the further recipes: each against its equation and nearest relative."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rl.advantages import rank_advantage
from rl.batch import DecisionBatch
from rl.estimators.base import Verdicts
from rl.estimators.draws import every_block
from rl.losses.policy_gradient import clipped_policy_loss
from rl.prompt_history import PromptNumbers
from rl.registry import parse_recipe
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import TokenTrajectory
from tests.tabular import PROMPT, TabularModel

F64 = torch.float64


def every_rollout(model: TabularModel) -> list[TokenTrajectory]:
    """All answers of two tokens, written left to right, with their log-probs under the model."""
    mask, rollouts = model.num_tokens, []
    for first, second in itertools.product(range(mask), repeat=2):
        with torch.no_grad():
            logprob = [float(model.logp((mask, mask))[0, first]), float(model.logp((first, mask))[1, second])]
        rollouts.append(
            TokenTrajectory(
                prompt_ids=np.array(PROMPT), length=3, mask_token_id=mask, num_steps=2, step=np.array([0, 1]),
                position=np.array([1, 2]), token=np.array([first, second]), logprob=np.array(logprob),
                confidence=np.ones(2), stop_length=2, sampler={"temperature": 1.0, "top_p": 1.0, "top_k": 0},
            )
        )  # fmt: skip
    return rollouts


def test_the_optimum_of_trafl_is_the_tilted_law() -> None:
    """pi_ref exp(r / beta) / Z for all nine answers, and log Z is the log of their sum."""
    model, reference, beta = TabularModel(3, 2, seed=1), TabularModel(3, 2, seed=1), 0.5
    recipe = parse_recipe({"name": "trafl", "beta": beta, "z_rate": 0.5})
    memory, reward = recipe.memory(), torch.tensor([0.6, 0.0, 1.2, 0.3, 0.9, 0.15, 1.05, 0.45, 0.75], dtype=F64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    base = torch.tensor([float(t.logprob.sum()) for t in every_rollout(reference)], dtype=F64)
    for _ in range(250):
        trajectories = every_rollout(model)
        summaries = [recipe.summary(t) for t in trajectories]
        drawn = torch.tensor([total for _, total in summaries], dtype=F64)
        group = torch.zeros(9, dtype=torch.int64)
        advantage = recipe.advantage(Verdicts(reward, group, None, summaries, drawn - base, 0, memory))
        rows = recipe.rows(trajectories, model).distinct()
        scores = rows.score(model)
        torch.testing.assert_close(scores.logprob.detach(), rows.sampler_logprob)
        zeros = torch.zeros(9, dtype=F64)
        loss = recipe.loss(DecisionBatch(scores.logprob, scores.entropy, zeros, None, advantage, zeros)).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tilted = base + reward / beta
    law = torch.tensor([float(t.logprob.sum()) for t in every_rollout(model)], dtype=F64)
    torch.testing.assert_close(law, tilted - tilted.logsumexp(0), rtol=0, atol=1e-2)
    assert next(iter(memory.state().values())) == pytest.approx(float(tilted.logsumexp(0)), abs=1e-2)
    assert float(loss.detach()) < 1e-4


def test_the_number_of_a_prompt_moves_to_its_estimate() -> None:
    """A new prompt has its group's mean at once, 2; the next estimate, 6, moves it by a quarter of the way."""
    numbers = PromptNumbers()
    first = numbers.towards(["a", "a", "b"], torch.tensor([1.0, 3.0, math.nan]), 0.25)
    assert first[:2].tolist() == [2, 2] and first[2].isnan()
    assert numbers.towards(["a"], torch.tensor([6.0]), 0.25).tolist() == [2]
    again = PromptNumbers()
    again.restore(numbers.state())
    assert again.towards(["a", "b"], torch.tensor([3.0, 7.0]), 0.25).tolist() == [3, 7]


def batch_of(logprob: list[float], advantage: list[float], ref: list[float] | None = None) -> DecisionBatch:
    zeros = torch.zeros(len(logprob), dtype=F64)
    given = torch.tensor(logprob, dtype=F64, requires_grad=True)
    reference = None if ref is None else torch.tensor(ref, dtype=F64)
    return DecisionBatch(given, zeros, zeros, reference, torch.tensor(advantage, dtype=F64), zeros + 1)


def test_bgpo_is_a_lower_bound_that_touches_the_objective() -> None:
    """Changes 0.1 and -0.1 with A 1: 1.1 and 0.9 where PPO has e^0.1 and e^-0.1. With A -1 a copy has its own ratio."""
    recipe = parse_recipe({"name": "bgpo"})
    objective = -recipe.loss(batch_of([0.1, -0.1, 0.1, -0.1], [1, 1, -1, -1])).loss
    expected = [1.1, 0.9, -math.exp(0.1), -math.exp(-0.1)]
    assert objective.tolist() == pytest.approx(expected)
    plain = -clipped_policy_loss(batch_of([0.1, -0.1], [1, 1])).loss
    assert plain.tolist() == pytest.approx([math.exp(0.1), math.exp(-0.1)])
    # Copies whose changes are 0.15 and -0.05: the mean over copies is below A times the ratio of their mean.
    for sign in (1, -1):
        copies = -recipe.loss(batch_of([0.15, -0.05], [sign, sign])).loss.mean()
        assert float(copies.detach()) < sign * math.exp(0.05)
    for loss in (recipe.loss, clipped_policy_loss):
        batch = batch_of([0.0, 0.0], [2, -3])
        assert torch.autograd.grad(loss(batch).loss.sum(), batch.logprob)[0].tolist() == [-2, 3]


def answers(make_model, count: int = 2) -> tuple[Any, list[TokenTrajectory]]:
    model = make_model("gpt2-full", vocab_size=8)
    engine = InProcessEngine(model, SamplerOptions(gen_length=4, num_inference_steps=2))
    return model, engine.generate([Request([1, 2, 3], seed=s) for s in range(count)])


def test_every_copy_of_bgpo_is_a_decision_and_their_mean_the_bound(make_model) -> None:
    model, trajectories = answers(make_model)
    recipe, whole = (parse_recipe({"name": name, "draws": 4}) for name in ("bgpo", "vrpo"))
    rows = recipe.rows(trajectories, model)
    assert rows.trajectory.tolist() == [0] * 4 + [1] * 4 and rows.step.tolist() == [0, 1, 2, 3] * 2
    assert rows.weight_factor.tolist() == [0.25] * 8
    with torch.no_grad():
        mean = rows.score(model).logprob.view(2, 4).mean(1)
        torch.testing.assert_close(mean, whole.rows(trajectories, model).score(model).logprob / 4)


def test_the_ratio_of_ebpo_is_the_whole_answers(make_model) -> None:
    """With one block and one draw the estimate is 4 tokens times that of a copy of `bgpo`, which is per token."""
    model, trajectories = answers(make_model)
    one, single = (parse_recipe({"name": name, "draws": 1}) for name in ("ebpo", "bgpo"))
    with torch.no_grad():
        ebpo, bgpo = (recipe.rows(trajectories, model).score(model).logprob for recipe in (one, single))
    torch.testing.assert_close(ebpo, 4 * bgpo)


def test_every_block_hides_some_of_its_tokens_and_the_weights_are_unbiased() -> None:
    """Positions 5 to 10 on a grid of 4: blocks of 3 and 3. Over all levels a token's weight is 1 on average."""
    places, total, hidden_counts = np.arange(5, 11), np.zeros(11), set()
    for trial in range(3000):
        (copy,) = every_block(places, np.random.default_rng(trial), (trial + 0.5) / 3000, 1, 4)
        total[copy.read] += copy.weight
        first, second = (copy.read < 8).sum(), (copy.read >= 8).sum()
        hidden_counts.add((int(first), int(second)))
        assert copy.weight[0] == 3 / first
    assert hidden_counts == {(1, 1), (2, 2), (3, 3)}
    assert np.allclose(total[5:] / 3000, 1, atol=0.06) and not total[:5].any()
    (whole,) = every_block(places, np.random.default_rng(0), 0.99, 1)
    assert whole.read.tolist() == places.tolist() and whole.weight.tolist() == [1.0] * 6


def test_rspo_is_the_square_of_the_gap_to_its_target() -> None:
    """Up to a constant: (lambda / 2) (d - A / lambda)^2, in value and slope; GDSD's is another."""
    recipe = parse_recipe({"name": "rspo", "kl_coef": 0.1})
    ref, advantage = [-1.5, -0.5, -2.0], [1.0, -0.5, 0.25]
    losses, slopes = [], []
    for logprob in ([-1.0, -1.0, -1.0], [-0.7, -1.4, -2.5]):
        batch = batch_of(logprob, advantage, ref)
        batch.old_logprob = batch.logprob.detach()
        output = recipe.loss(batch)
        losses.append(output.loss.detach())
        slopes.append(torch.autograd.grad(output.loss.sum(), batch.logprob)[0])
    d = [torch.tensor(x, dtype=F64) - torch.tensor(ref, dtype=F64) for x in ([-1.0, -1.0, -1.0], [-0.7, -1.4, -2.5])]
    a = torch.tensor(advantage, dtype=F64)
    for score, slope in zip(d, slopes, strict=True):
        torch.testing.assert_close(slope, 0.1 * (score - a / 0.1))
    gdsd = parse_recipe({"name": "gdsd", "psi": 10.0, "clip_low": 0.5, "clip_high": 0.5})
    batch = batch_of([-0.1, 0.1, 0.0], advantage, ref)
    (other,) = torch.autograd.grad(gdsd.loss(batch).loss.sum(), batch.logprob)
    torch.testing.assert_close(other, 2 * (torch.tensor([-0.1, 0.1, 0.0], dtype=F64) - 10 * a))
    assert not torch.allclose(other, slopes[0])


def test_steps_of_one_rank_are_compared() -> None:
    """Two rollouts of three steps, of which the two most uncertain are trained: 2, 0 and 1, 2."""
    value = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [math.nan] * 3], dtype=F64)
    order = torch.tensor([[2, 0, 1], [1, 2, 0], [0, 1, 2]])
    result = rank_advantage(value, order, torch.tensor([0, 0, 0]), 2)
    # Rank 0: 3 and 5, mean 4; rank 1: 1 and 6, mean 3.5.
    torch.testing.assert_close(
        result,
        torch.tensor([[-2.5, math.nan, -1.0], [math.nan, 1.0, 2.5], [math.nan] * 3], dtype=F64),
        equal_nan=True,
    )


def test_a_step_of_egspo_is_credited_with_what_came_after_it(make_model) -> None:
    """r = 1 and 0; at the chosen step r_t = 0.5 and 0.2: credits (1 + 0.5) / 2 and (0 - 0.2) / 2, mean 0.325."""
    model = make_model("gpt2-full", vocab_size=8)
    options = SamplerOptions(gen_length=4, num_inference_steps=2, record_x0=True)
    trajectories = InProcessEngine(model, options).generate([Request([1, 2, 3], seed=s) for s in range(2)])
    recipe = parse_recipe({"name": "egspo", "train_steps": 1})
    summaries = [recipe.summary(t) for t in trajectories]
    for summary in summaries:
        summary.surprisal = np.array([2.0, 1.0])
    steps = torch.tensor([[0.5, 1.0], [0.2, 0.0]], dtype=F64)
    verdicts = Verdicts(torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0, 0]), steps, summaries)
    advantage = recipe.advantage(verdicts)
    assert advantage[:, 0].tolist() == pytest.approx([0.425, -0.425]) and advantage[:, 1].isnan().all()
    # Without lambda: the terminal reward alone, plus and minus a half.
    plain = parse_recipe({"name": "egspo", "train_steps": 1, "step_weight": 0.0})
    assert plain.advantage(verdicts)[:, 0].tolist() == [0.5, -0.5]
    summaries[1].surprisal = np.array([1.0, 2.0])
    assert recipe.advantage(verdicts).isnan().tolist() == [[False, True], [True, False]]
    rows = recipe.rows(trajectories, model, steps=[np.array([True, False])] * 2)
    assert rows.trajectory.tolist() == [0, 0, 1, 1]


def test_lightningrl_adds_reward_and_speed_after_each_is_z_scored() -> None:
    """Worked out: z-scores of 1, 0, 1 and of 2, 4, 1 tokens a forward; 0.44, -0.08, -0.36 are z-scored once more."""
    recipe = parse_recipe({"name": "lightningrl"})
    reward = torch.tensor([1.0, 0.0, 1.0, math.nan, 0.0, 0.5, 1.0, 0.0], dtype=F64)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    # Nothing is right in the second group, and the third's speeds are all but equal.
    verdicts = Verdicts(reward, group, None, [2.0, 4.0, 1.0, 99.0, 1.0, 5.0, 3.0, 3.005])
    found = recipe.advantage(verdicts)
    assert found[:3].tolist() == pytest.approx([1.3246, -0.2346, -1.0900], abs=2e-3) and found[3:].isnan().all()
    slow = parse_recipe({"name": "lightningrl", "speed_weight": 0.0, "min_speed_range": 0.001}).advantage(verdicts)
    assert slow[6] == -slow[7] and slow[0] == slow[2] > 0 > slow[1] and slow[3:6].isnan().all()
    nothing = replace(verdicts, reward=torch.zeros_like(reward))
    assert recipe.advantage(nothing).isnan().all()


def test_lightningrl_holds_to_right_answers() -> None:
    """On policy the slope of a right decision is -(A + 0.1), that of a wrong one -A."""
    recipe = parse_recipe({"name": "lightningrl", "kl_to": "none", "kl_coef": 0.0})
    batch = batch_of([0.0, 0.0, 0.0], [2.0, -1.0, 0.5], [0.0, 0.0, 0.0])
    batch.reward = torch.tensor([1.0, 0.0, 0.9], dtype=F64)
    output = recipe.loss(batch)
    (slope,) = torch.autograd.grad(output.loss.sum(), batch.logprob)
    torch.testing.assert_close(slope, torch.tensor([-2.1, 1.0, -0.5], dtype=F64))
    assert output.metrics["nll_right"].tolist() == pytest.approx((-batch.reward.floor() * batch.logprob).tolist())


def test_lightningrl_counts_the_forwards_of_the_decoder() -> None:
    (trajectory, *_) = every_rollout(TabularModel(2, 2))
    recipe = parse_recipe({"name": "lightningrl"})
    assert recipe.summary(trajectory) == 1.0
    trajectory.decoder["forwards"] = 4
    assert recipe.summary(trajectory) == 0.5
