"""Recipes on Gaussian steps: schedules, selection, histories and tree advantages against numbers done by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from rl.advantages import extremes, node_advantage
from rl.batch import DecisionBatch
from rl.config import load_config
from rl.estimators.base import Verdicts
from rl.estimators.forward_process import NFTRows, forward_rows
from rl.prompt_history import PromptHistory
from rl.recipes.b2_diffurl import B2DiffuRL
from rl.recipes.branch_grpo import BranchGRPO
from rl.recipes.ddpo import DDPO
from rl.recipes.diffusion_nft import DiffusionNFT
from rl.recipes.flow_dppo import FlowDPPO
from rl.recipes.flow_grpo import FlowGRPO
from rl.recipes.grpo_guard import GRPOGuard
from rl.recipes.images import ImageRecipe, PathSummary, branch_of
from rl.recipes.mix_grpo import MixGRPO
from rl.registry import RECIPES, parse_recipe
from rollouts.samplers.latent_options import LatentSamplerOptions
from tests.image_models import FLOW, rollouts, tiny_policy

NAN = float("nan")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def verdicts(
    reward: Sequence[float], summaries: Sequence[PathSummary], group: Sequence[int], rl_step: int = 0
) -> Verdicts:
    return Verdicts(tensor(*reward), torch.tensor(group), summaries=summaries, rl_step=rl_step)


def advantage_of(recipe: ImageRecipe, seen: Verdicts) -> torch.Tensor:
    """Of the first step of a run."""
    return recipe.advantage(replace(seen, memory=recipe.memory()))


def tree(prompt: str, root: int, count: int, split: int, num_steps: int = 4, sure: int = 0) -> list[PathSummary]:
    """Leaves of one tree that branches before step `split`; the last `sure` steps have no density."""
    decides = tuple(step < num_steps - sure for step in range(num_steps))
    return [
        PathSummary(prompt, tuple([root] * (split + 1) + [100 * root + leaf] * (num_steps - split)), decides)
        for leaf in range(count)
    ]


def test_the_published_interval_schedule() -> None:
    """Remaining steps of 20: 14 for stages 0-14, then 15: 15-28, 16: 29-42, 17: 43-57, 18: 58-71, 19: 72-85, 20."""
    options = B2DiffuRL(interval_steps=100)
    lengths = [20 - options.first_step(stage, 20) for stage in range(100)]
    assert [lengths.count(n) for n in range(14, 21)] == [15, 14, 14, 15, 14, 14, 14]
    assert lengths == sorted(lengths)
    assert 20 - options.first_step(500, 20) == 20
    assert B2DiffuRL(progressive=False).first_step(0, 20) == 0
    # Fewer steps than the first interval: all of them from the start.
    assert options.first_step(0, 10) == 0


def test_the_branch_point_is_where_the_interval_begins() -> None:
    recipe = B2DiffuRL(interval_steps=100)
    assert [recipe.branch_points(stage) for stage in (0, 15, 99)] == [[(6, 5)], [(5, 5)], [(0, 5)]]
    plain = B2DiffuRL(branches=1, selection="all")
    assert plain.branch_points(0) == []


def test_extremes() -> None:
    value = tensor(0.6, 2.0, -1.0, 0.4, -0.4, 0.0, 1.0, NAN, 0.9, NAN)
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    # Group 0 gives both, group 1 neither, group 2 only its best: its worst is above the bound.
    assert extremes(value, group, 0.5, -0.5).nonzero().flatten().tolist() == [1, 2, 6]
    assert extremes(value, group, 5.0, -5.0).sum() == 0
    # The best may equal its bound, the worst may not.
    assert extremes(tensor(1.0, 0.0), torch.tensor([0, 0]), 1.0, 0.0).tolist() == [True, False]


def test_z_scores_by_prompt_over_the_remembered_steps() -> None:
    history = PromptHistory(steps=1)
    first = history.z_scores(tensor(1, 3, 10, NAN), ["a", "a", "b", "a"])
    # a: mean 2, standard deviation sqrt(2). b has one reward: the statistics of all, mean 14/3, sd sqrt(67/3).
    torch.testing.assert_close(first[:2], tensor(-1, 1) / 2**0.5)
    torch.testing.assert_close(first[2], (tensor(10 - 14 / 3) / (67 / 3) ** 0.5)[0])
    assert first[3].isnan()
    second = history.z_scores(tensor(5, 7), ["a", "b"])
    # a: 1, 3, 5 -> mean 3, sd 2. b: 10, 7 -> mean 8.5, sd sqrt(4.5).
    torch.testing.assert_close(second, tensor(1.0, -1.5 / 4.5**0.5))
    third = history.z_scores(tensor(9, 9), ["a", "a"])
    # The step before last is forgotten: 5, 9, 9.
    torch.testing.assert_close(third, tensor(4 / 3, 4 / 3) / (16 / 3) ** 0.5)
    # The population's standard deviation: 1 for 1 and 3.
    population = PromptHistory(0, correction=0, eps=1.0).z_scores(tensor(1, 3), ["a", "a"])
    torch.testing.assert_close(population, tensor(-0.5, 0.5))
    flat = PromptHistory(0).z_scores(tensor(0.1, 0.1, 0.1), ["a"] * 3)
    assert (flat == 0).all()


def test_a_history_goes_on_where_it_was_saved() -> None:
    one, other = PromptHistory(3), PromptHistory(3)
    one.z_scores(tensor(1, 2, 4), ["a", "a", "b"])
    other.restore(json.loads(json.dumps(one.state())))
    later = (tensor(3, 5), ["a", "b"])
    torch.testing.assert_close(one.z_scores(*later), other.z_scores(*later), rtol=0, atol=0)


def test_b2_trains_the_extremes_of_a_branch_point_on_the_interval() -> None:
    recipe = B2DiffuRL(num_steps=4, branches=3, first_interval=2, interval_steps=10)
    summaries = tree("a", 1, 3, split=2, sure=1) + tree("a", 2, 3, split=2, sure=1)
    # Mean 2, standard deviation sqrt(2): z = -1.41, 0, 1.41, then -0.71, 0.71, 0.
    advantage = advantage_of(recipe, verdicts([0, 2, 4, 1, 3, 2], summaries, [0, 0, 0, 1, 1, 1]))
    z = torch.tensor([-2.0, 2.0, -1.0, 1.0], dtype=torch.float64) / 2**0.5
    expected = torch.full((6, 4), NAN, dtype=torch.float64)
    # Steps 0 and 1 are shared, step 3 is sure: step 2 alone is trained.
    expected[[0, 2, 3, 4], 2] = z
    torch.testing.assert_close(advantage, expected, equal_nan=True)


def test_the_branch_advantage_compares_within_the_branch_point() -> None:
    recipe = B2DiffuRL(num_steps=4, branches=2, first_interval=2, compare="branch", selection="all")
    summaries = tree("a", 1, 2, split=2) + tree("a", 2, 2, split=2)
    advantage = advantage_of(recipe, verdicts([10, 12, 0, 2], summaries, [0, 0, 0, 0]))
    assert advantage[:, :2].isnan().all()
    # Both pairs differ by 2: deviation 1 over (standard deviation 1 + 0.1), however different the pairs are.
    torch.testing.assert_close(advantage[:, 2:], tensor(-1, 1, -1, 1)[:, None].expand(4, 2) / 1.1)


def test_ddpo_trains_every_step_and_with_backward_progress_the_last_ones() -> None:
    summaries = tree("a", 1, 2, split=0)
    both = verdicts([0, 1], summaries, [0, 0])
    everywhere = advantage_of(DDPO(min_count=2), both)
    # Mean 1/2, population standard deviation 1/2, as the published tracker.
    torch.testing.assert_close(everywhere, tensor(-0.5, 0.5)[:, None].expand(2, 4) / (0.5 + 1e-6), rtol=0, atol=1e-12)
    late = advantage_of(DDPO(min_count=2, progressive=True, first_interval=3, interval_steps=10), both)
    assert late[:, 0].isnan().all()
    torch.testing.assert_close(late[:, 1:], everywhere[:, 1:])


def test_flow_grpo_divides_by_the_spread_of_all_rewards() -> None:
    """Groups 0, 1 and 10, 11: mean 5.5, variance (30.25 + 20.25) / 2 = 25.25, so +-0.5 / (5.0249 + 1e-4)."""
    summaries = tree("a", 1, 2, split=0) + tree("b", 2, 2, split=0)
    advantage = advantage_of(FlowGRPO(), verdicts([0, 1, 10, 11], summaries, [0, 0, 1, 1]))
    expected = tensor(-1, 1, -1, 1)[:, None].expand(4, 4) * 0.5 / (25.25**0.5 + 1e-4)
    torch.testing.assert_close(advantage, expected, rtol=0, atol=1e-12)
    assert advantage.abs().max().item() == pytest.approx(0.0995, abs=1e-4)
    own = advantage_of(FlowGRPO(scale="batch_std"), verdicts([0, 1, 10, 11], summaries, [0, 0, 1, 1]))
    torch.testing.assert_close(own.abs(), torch.full_like(own, 0.5 / (0.5 + 1e-4)), rtol=0, atol=1e-12)


def test_advantages_are_clamped() -> None:
    summaries = tree("a", 1, 30, split=0)
    advantage = advantage_of(DDPO(advantage_clip=2.0), verdicts([0.0] * 29 + [1.0], summaries, [0] * 30))
    assert advantage.max() == 2


def test_node_advantage() -> None:
    # Two prompts of four leaves; nodes of two. Node means 1, 3 and 0, 0: z = -1, 1 and 0, 0.
    reward = tensor(0, 2, 2, 4, 0, 0, -1, 1)
    node, group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([0] * 4 + [1] * 4)
    expected = tensor(-1, -1, 1, 1, 0, 0, 0, 0)
    torch.testing.assert_close(node_advantage(reward, node, group, eps=0.0 + 1e-12), expected)


def test_branch_grpo_gives_every_depth_its_own_advantage() -> None:
    recipe = BranchGRPO(branch_steps=[1, 3])
    trajectories = rollouts(
        tiny_policy(), LatentSamplerOptions(num_inference_steps=5, min_std=0), count=1, branch_points=((1, 2), (3, 2))
    )
    summaries = [recipe.summary(t) for t in trajectories]
    advantage = recipe.advantage(verdicts([0, 2, 2, 8], summaries, [0, 0, 0, 0]))
    # Nothing differs before the first branch point. Below it two nodes, of mean 1 and 5; below the second every leaf.
    assert advantage[:, 0].isnan().all()
    expected = tensor(-2, -2, 2, 2) / (2 + 1e-4)
    torch.testing.assert_close(advantage[:, 1:3], expected[:, None].expand(4, 2))
    leaves = tensor(-3, -1, -1, 5) / (3 + 1e-4)
    torch.testing.assert_close(advantage[:, 3:], leaves[:, None].expand(4, 2))


def test_notes_of_real_trajectories_tell_branch_points_apart() -> None:
    options = LatentSamplerOptions(num_inference_steps=5)
    trajectories = rollouts(tiny_policy(), options, count=2, branch_points=((2, 3),))
    seen = verdicts([0.0] * 6, [DDPO().summary(t) for t in trajectories], [0] * 3 + [1] * 3)
    assert branch_of(seen, 2).tolist() == [0, 0, 0, 1, 1, 1]
    assert branch_of(seen, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert len({n.prompt for n in seen.summaries}) == 2


def test_the_exact_kl_enters_the_loss() -> None:
    loss = DDPO(kl_to="reference", kl_coef=0.5).loss
    zeros = torch.zeros(2, dtype=torch.float64)
    batch = DecisionBatch(zeros, zeros, zeros, None, zeros, zeros + 0.5, kl=tensor(1.0, 3.0))
    torch.testing.assert_close(loss(batch).loss, tensor(0.5, 1.5))
    torch.testing.assert_close(loss(batch).metrics["kl"], tensor(1.0, 3.0))


@pytest.mark.parametrize("scheduler", [{}, FLOW])
def test_the_forward_process_gradient_is_reward_weighted_denoising(scheduler: dict[str, Any]) -> None:
    """At the policy that sampled, d loss / d x = 2 (2r - 1) (x - x0) / w / D: towards good samples, from bad ones."""
    policy = tiny_policy(scheduler)
    options = LatentSamplerOptions(kind="flow_sde" if scheduler else "ddim", num_inference_steps=4)
    rows = forward_rows(NFTRows, rollouts(policy, options, count=3), policy, num_draws=2, beta=0.3)
    assert rows.trajectory.tolist() == [0, 0, 1, 1, 2, 2] and rows.step.tolist() == [0, 1] * 3
    rows.set_anchor(policy)
    output = rows.predict(policy).detach().requires_grad_()
    rows.predict = lambda model: output  # type: ignore[method-assign]
    scores = rows.score(policy)
    positive = scores.logprob
    advantage = tensor(10, 10, 0, 0, -2, -2)  # r = 1, 1, 1/2, 1/2, 0.3, 0.3
    batch = DecisionBatch(positive, positive * 0, positive, None, advantage, positive * 0 + 1, negative=scores.negative)
    recipe = DiffusionNFT(beta=0.3)
    (gradient,) = torch.autograd.grad(recipe.loss(batch).loss.sum(), output)
    gradient, error = gradient / rows.x0_output, rows.x0(output).detach() - rows.sample
    factor = tensor(1, 1, 0, 0, -0.4, -0.4) * 2 / 9 / error.flatten(1).abs().mean(1)
    torch.testing.assert_close(gradient, factor.reshape(-1, 1, 1, 1) * error)


def test_the_forward_process_draws_anew_every_pass_and_from_seeds_alone() -> None:
    policy = tiny_policy()
    trajectories = rollouts(policy, LatentSamplerOptions(num_inference_steps=4), count=3)
    one, same, other = (forward_rows(NFTRows, trajectories, policy, 2, i, beta=1.0) for i in (0, 0, 1))
    assert (one.latent == same.latent).all() and (one.latent != other.latent).any()
    alone = forward_rows(NFTRows, trajectories[1:2], policy, 2, beta=1.0)
    assert (alone.latent == one.latent[2:4]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "b2_diffurl", "branches": 1}, "algorithm.branches 1 leaves nothing to compare"),
        ({"name": "ddpo", "kl_coef": 0.1}, "algorithm.kl_coef does nothing"),
        ({"name": "flow_dppo", "kl_to": "reference", "kl_coef": 0.1}, "algorithm.kl_to of flow_dppo must be none"),
        ({"name": "flow_dppo", "old_logprob": "on_policy"}, "leaves flow_dppo no ratio"),
        ({"name": "flow_dppo", "clip_low": 0.1}, "algorithm.clip_low does nothing in flow_dppo"),
        ({"name": "diffusion_opd", "scale": "std"}, "algorithm.scale does nothing in diffusion_opd"),
        ({"name": "diffusion_dpo", "entropy_coef": 0.1}, "algorithm.entropy_coef does nothing in diffusion_dpo"),
        ({"name": "flow_grpo", "entropy_coef": 0.1}, "algorithm.entropy_coef does nothing in flow_grpo"),
        ({"name": "diffusion_nft", "clip_high": 0.1}, "algorithm.clip_high does nothing in diffusion_nft"),
        ({"name": "diffusion_nft", "old_logprob": "recompute"}, "algorithm.old_logprob does nothing in diffusion_nft"),
        ({"name": "grpo_guard", "old_logprob": "on_policy"}, "leaves grpo_guard no ratio"),
        ({"name": "grpo_guard", "kl_to": "old", "kl_coef": 1, "kl_estimator": "k3"}, "of grpo_guard must be exact"),
        ({"name": "branch_grpo", "splits": [1]}, "algorithm.splits is called algorithm.branch_steps now"),
        ({"name": "b2_diffurl", "advantage": "branch"}, "algorithm.advantage is called algorithm.compare now"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(options)


@pytest.mark.parametrize(
    ("options", "steps", "group", "message"),
    [
        ({"name": "b2_diffurl"}, 10, 5, "algorithm.num_steps"),
        ({"name": "b2_diffurl"}, 20, 4, "train.group_size"),
        ({"name": "branch_grpo"}, 20, 8, "16 leaves"),
        ({"name": "mix_grpo", "window_size": 11}, 10, 8, "algorithm.window_size"),
        ({"name": "branch_grpo", "branch_steps": [3, 1]}, 20, 8, r"branch_steps \[3, 1\] must ascend"),
    ],
)
def test_a_recipe_that_does_not_fit_the_sampler_is_refused(options: dict, steps: int, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen = ["task.name=digits", f"sampler.num_inference_steps={steps}", f"train.group_size={group}"]
        parse_recipe(options).check(load_config(None, chosen))


def test_mix_grpo_slides_its_window_from_the_noisy_end_and_begins_again() -> None:
    """25 steps, a window of 4: 22 places, 25 RL steps each, so RL step 550 is at the first place again."""
    sampler = LatentSamplerOptions(kind="flow_sde", num_inference_steps=25)
    recipe = MixGRPO()
    window = [recipe.sampler_options(sampler, step).sde_window for step in (0, 24, 25, 549, 550)]
    assert window == [(0, 4), (0, 4), (1, 4), (21, 4), (0, 4)]
    far = MixGRPO(window_stride=3, window_interval=1)
    assert [far.sampler_options(sampler, step).sde_window[0] for step in range(9)] == [0, 3, 6, 9, 12, 15, 18, 21, 2]
    drawn = MixGRPO(window_order="random", window_interval=2)
    places = [drawn.sampler_options(sampler, step).sde_window[0] for step in range(400)]
    assert places[::2] == places[1::2] and set(places) == set(range(22))
    # Flow-GRPO trains every step; here the ODE's steps are none of the gradient's, nor of the shared path's.
    assert FlowGRPO().sampler_options(sampler, 30) is sampler
    policy, small = tiny_policy(FLOW), sampler.model_copy(update={"num_inference_steps": 6})
    trajectories = rollouts(policy, MixGRPO().sampler_options(small, 25), count=2)
    seen = verdicts([0, 1], [recipe.summary(t) for t in trajectories], [0, 0])
    assert (~recipe.advantage(seen).isnan()).tolist() == [[False, True, True, True, True, False]] * 2
    assert sorted(set(recipe.rows(trajectories, policy).step.tolist())) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"sampler\.sde_window is set by mix_grpo"):
        recipe.check(load_config(None, ["task.name=digits", "sampler.sde_window=[0,2]"]))


def test_guarded_ratios_have_the_same_spread_at_every_step_and_no_bias() -> None:
    """With z the noise that was drawn and d the move of the mean, a guarded log-ratio is the mean of z d.

    Flow-GRPO's is the mean of z d / std - d^2 / (2 std^2): biased, and wider where a step has less noise.
    """
    policy, options = tiny_policy(FLOW), LatentSamplerOptions(kind="flow_sde", num_inference_steps=6)
    trajectories = rollouts(policy, options, count=3)
    rows, plain = (recipe().rows(trajectories, policy) for recipe in (GRPOGuard, FlowGRPO))
    first = rows.score(policy).logprob - rows.sampler_logprob
    torch.testing.assert_close(first, torch.zeros_like(first), rtol=0, atol=1e-12)
    moved = tiny_policy(FLOW, seed=1)
    with torch.no_grad():
        guarded = rows.score(moved).logprob - rows.sampler_logprob
        ratio = plain.score(moved).logprob - plain.sampler_logprob
    std = rows.std[:, None]
    z = (rows.sample - rows.sampler_mean).flatten(1) / std
    d = (rows.mean(moved).detach() - rows.sampler_mean).flatten(1)
    torch.testing.assert_close(guarded, (z * d).mean(1))
    torch.testing.assert_close(ratio, (z * d / std - d**2 / (2 * std**2)).mean(1))
    # Sigmas 1, 0.8002, ..., 0.001, whose last step is below min_std. The loss of a step is divided by its length.
    torch.testing.assert_close(1 / rows.weight_factor[:5], tensor(*[0.1998] * 5), rtol=0, atol=1e-6)
    # A schedule that is stretched to end at 0.1 goes from there to 0 all the same.
    stretched = tiny_policy(FLOW | {"shift_terminal": 0.1})
    seen = rollouts(stretched, options.model_copy(update={"min_std": 0.0}), count=1)
    length = 1 / GRPOGuard().rows(seen, stretched).weight_factor
    torch.testing.assert_close(length, tensor(*[0.18] * 5, 0.1), rtol=0, atol=1e-6)


def test_flow_dppo_holds_what_is_far_and_goes_further_whatever_its_ratio_says() -> None:
    """Ratios 1.1, 1.1, 0.9, 0.9, 1.1 with advantages 1, -1, 1, -1, 1; all but the last are beyond the bound.

    PPO's clip at 0.2 would clip none of them; its clip at 0.05 would clip the last one too.
    """
    ratio, advantage = tensor(1.1, 1.1, 0.9, 0.9, 1.1), tensor(1, -1, 1, -1, 1)
    kl = tensor(2, 1, 2, 2, 0.5) * 1e-5
    batch = DecisionBatch(ratio.log().requires_grad_(), ratio * 0, ratio * 0, None, advantage, ratio * 0 + 1, kl=kl)
    output = FlowDPPO().loss(batch)
    torch.testing.assert_close(output.loss, tensor(0, 1.1, -0.9, 0, -1.1))
    (gradient,) = torch.autograd.grad(output.loss.sum(), batch.logprob)
    torch.testing.assert_close(gradient, tensor(0, 1.1, -0.9, 0, -1.1))
    assert output.metrics["clip_fraction"].tolist() == [1, 0, 0, 1, 0]
    clipped = FlowGRPO(clip_low=0.05, clip_high=0.05, kl_to="none", kl_coef=0).loss(batch).loss
    torch.testing.assert_close(clipped, tensor(-1.05, 1.1, -0.9, 0.95, -1.05))
    # The KL is that to the recorded Gaussians: 0 where the old policy scores, d^2 / (2 std^2) elsewhere.
    policy = tiny_policy(FLOW)
    rows = FlowDPPO().rows(rollouts(policy, LatentSamplerOptions(kind="flow_cps", num_inference_steps=3)), policy)
    kl = rows.score(tiny_policy(FLOW, seed=1)).kl
    d = (rows.mean(tiny_policy(FLOW, seed=1)) - rows.sampler_mean).flatten(1)
    torch.testing.assert_close(kl, (d**2).mean(1) / (2 * rows.std**2))
    assert rows.score(policy).kl.abs().max() < 1e-12


def test_every_image_recipe_says_so() -> None:
    images = {n for n in RECIPES.known if issubclass(type(parse_recipe({"name": n})), ImageRecipe)}
    assert images == {
        "awm", "b2_diffurl", "branch_grpo", "ddpo", "diffusion_dpo", "diffusion_nft", "diffusion_opd", "dpok", "find",
        "flow_dppo", "flow_grpo", "grpo_guard", "mix_grpo", "v_grpo",
    }  # fmt: skip
    modality = {n: parse_recipe({"name": n}).modality for n in RECIPES.known}
    assert {n for n in RECIPES.known if modality[n] == "images"} == images | {"alignprop", "class_tokens"}
