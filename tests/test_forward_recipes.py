"""Recipes without log-probs of steps: matching, preferences, teachers; numbers by hand and by a second route."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from rl.batch import DecisionBatch
from rl.estimators.base import Scores
from rl.estimators.forward_process import MatchingRows, NFTRows
from rl.estimators.gaussian_teachers import GaussianTeachers
from rl.recipes.awm import AWM
from rl.recipes.diffusion_dpo import DiffusionDPO
from rl.recipes.diffusion_nft import DiffusionNFT
from rl.recipes.diffusion_opd import DiffusionOPD
from rl.recipes.v_grpo import VGRPO
from rl.registry import parse_recipe
from rollouts.latent_trajectory import LatentTrajectory
from rollouts.samplers.gaussian import gaussian_kl, step_mean
from rollouts.samplers.latent_options import LatentSamplerOptions
from tests.image_models import FLOW, rollouts, tiny_policy
from tests.runs import lines, series, train_here
from tests.test_image_recipes import advantage_of, tensor, tree, verdicts
from tests.test_images import image_config

STEPS = LatentSamplerOptions(kind="flow_sde", num_inference_steps=4)


class Answers:
    """A model that always gives one output."""

    def __init__(self, output: torch.Tensor):
        self.output = output

    def predict(self, *_: Any) -> torch.Tensor:
        return self.output


def matching(level: float, **fields: Any) -> MatchingRows:
    """Two samples of four zeros, noised to zeros; the target is 0, and x0 = -level output."""
    zeros, ones = torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.ones(2, 1, 1, 1, dtype=torch.float64)
    return MatchingRows(
        latent=zeros, sample=zeros, target=zeros, level=level * ones, x0_latent=ones, x0_output=-level * ones,
        timestep=tensor(1, 1), conditioning={}, trajectory=torch.arange(2), step=torch.zeros(2, dtype=torch.int64),
        **fields,
    )  # fmt: skip


def decisions(scores: Scores, advantage: torch.Tensor, **fields: Any) -> DecisionBatch:
    logprob = scores.logprob
    zeros = torch.zeros_like(logprob)
    old = {"old_logprob": logprob.detach(), "ref_logprob": None} | fields
    return DecisionBatch(
        logprob, zeros, advantage=advantage, weight=zeros, kl=scores.kl, negative=scores.negative, **old
    )


def shared_group(policy: Any, count: int = 4, version: int = 0) -> list[LatentTrajectory]:
    """Rollouts of one class."""
    return [replace(t, policy_version=version) for t in rollouts(policy, STEPS, count=3 * count)[::3]]


def test_the_matching_error_by_hand() -> None:
    """Output 1/4 everywhere: e = 1/16. ghuber at t = 1: 4 (1/2 - 10^-2.5) = 1.98735; its slope is e^(-3/4) = 8."""
    output = torch.full((2, 1, 2, 2), 0.25, dtype=torch.float64, requires_grad=True)
    plain, ghuber = (matching(1.0, kind=kind).score(Answers(output)).logprob for kind in ("plain", "ghuber"))
    torch.testing.assert_close(plain, tensor(-1, -1) / 16)
    torch.testing.assert_close(ghuber, tensor(-1, -1) * 4 * (0.5 - 10**-2.5), rtol=1e-8, atol=0)
    of_plain, of_ghuber = (torch.autograd.grad(v.sum(), output, retain_graph=True)[0] for v in (plain, ghuber))
    torch.testing.assert_close(of_ghuber, 8 * of_plain, rtol=1e-7, atol=0)
    half = matching(0.5, kind="ghuber").score(Answers(output)).logprob
    torch.testing.assert_close(half, ghuber / 2)
    # V-GRPO's: x0 = -output / 2 at t = 1/2, squared over absolute: 1/64 / (1/8) = 1/8, whatever t weighs.
    torch.testing.assert_close(matching(0.5, kind="normalised").score(Answers(output)).logprob, tensor(-1, -1) / 8)
    torch.testing.assert_close(
        matching(1.0, kind="plain", entries=4).score(Answers(output)).logprob, tensor(-1, -1) / 4
    )


def test_the_distance_to_the_anchor_stands_for_a_kl() -> None:
    """Outputs 1 and the anchor's 1/2: 1/4; of x0 at t = 1/2: 1/16."""
    rows = matching(0.5, kind="plain")
    rows.set_anchor(Answers(torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)))
    one = Answers(torch.ones(2, 1, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(rows.score(one).kl, tensor(1, 1) / 4)
    torch.testing.assert_close(replace(rows, kind="normalised").score(one).kl, tensor(1, 1) / 16)
    torch.testing.assert_close(replace(rows, draws=2).score(one).kl, tensor(1) / 4)


def test_awm_weighs_the_gradient_of_matching_by_the_advantage() -> None:
    policy = tiny_policy(FLOW)
    recipe = AWM(weighting="uniform", num_draws=2, kl_to="none", kl_coef=0)
    rows = recipe.rows(rollouts(policy, STEPS, count=2), policy)
    assert rows.step.tolist() == [0, 1, 0, 1] and recipe.num_decisions(None) == 2
    scores = rows.score(policy)
    advantage = tensor(1, 1, -0.5, -0.5)
    got = torch.autograd.grad(
        recipe.loss(decisions(scores, advantage)).loss.sum(), policy.parameters(), retain_graph=True
    )
    error = (
        (policy.predict(rows.latent, rows.timestep, rows.conditioning, 1.0) - rows.target).square().flatten(1).mean(1)
    )
    wanted = torch.autograd.grad((advantage * error).sum(), policy.parameters())
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    # The noised sample is (1 - t) x0 + t noise, and the target noise - x0.
    t = rows.level
    torch.testing.assert_close(rows.sample + t * rows.target, rows.latent)
    assert ((t.flatten() * 2).long() == rows.step).all()
    whole = recipe.model_copy(update={"reduce": "sum"}).rows(rollouts(policy, STEPS, count=2), policy).score(policy)
    torch.testing.assert_close(whole.logprob, 9 * scores.logprob)
    # Group advantages over the spread of all rewards, at most 1: +-5 over 5.02.
    summaries = tree("a", 1, 2, split=0) + tree("b", 2, 2, split=0)
    assert advantage_of(AWM(), verdicts([0, 10, 0, 1], summaries, [0, 0, 1, 1])).tolist()[:2] == [-1, 1]
    kept = AWM()
    assert kept.anchor == "reference" and kept.needs_reference
    held = decisions(scores, advantage)
    held.kl = tensor(1, 2, 3, 4)
    torch.testing.assert_close(kept.loss(held).loss, -advantage + 0.003 * held.kl)


def test_v_grpo_has_one_ratio_for_a_sample_on_draws_that_its_prompt_shares() -> None:
    policy, moved = tiny_policy(FLOW), tiny_policy(FLOW, seed=1)
    group, recipe = shared_group(policy), VGRPO(num_draws=2)
    rows = recipe.rows(group, policy)
    assert rows.trajectory.tolist() == [0, 1, 2, 3] and rows.step.tolist() == [0] * 4 and rows.num_rows == 8
    noise = rows.target + rows.sample
    torch.testing.assert_close(noise[:2], noise[2:4])
    assert (rows.level[:2] == rows.level[6:]).all()
    assert (noise[0] - noise[1]).abs().max() > 0.1
    # Another RL step, another pass and another prompt draw anew; a rollout alone draws the same.
    for other in (
        recipe.rows(shared_group(policy, version=1), policy),
        recipe.rows(group, policy, iteration=1),
        recipe.rows(rollouts(policy, STEPS, count=2)[1:], policy),
    ):
        assert (other.target[0] + other.sample[0] - noise[0]).abs().max() > 0.1
    torch.testing.assert_close(recipe.rows(group[2:3], policy).latent, rows.latent[4:6], rtol=0, atol=0)
    # AWM makes a decision of every draw, each with noise of its own.
    single = AWM(num_draws=2, weighting="uniform").rows(group, policy)
    assert len(single.trajectory) == 8 and (single.target + single.sample - noise).abs().max() > 0.1
    # The ratio is exp of the mean over draws, which is not the mean of the draws' ratios.
    now, old = (rows.score(m).logprob.detach() for m in (moved, policy))
    x0 = rows.latent - rows.level * moved.predict(rows.latent, rows.timestep, rows.conditioning, 1.0)
    error = (x0 - rows.sample).flatten(1)
    each = -error.square().mean(1) / error.abs().mean(1)
    torch.testing.assert_close(now, each.detach().view(4, 2).mean(1))
    output = recipe.loss(decisions(Scores(now, now), tensor(1, 1, 1, 1), old_logprob=old))
    torch.testing.assert_close(output.metrics["ratio"], (now - old).exp())
    # Advantages approach eta: sqrt(3) of one among four is 3 tanh(sqrt(3) / 3) = 1.5624.
    advantage = advantage_of(recipe, verdicts([0, 0, 0, 1], tree("a", 1, 4, split=0), [0] * 4))
    assert advantage[3].item() == pytest.approx(3 * torch.tensor(3**0.5 / 3).tanh().item(), abs=2e-3)


def test_diffusion_dpo_is_its_published_loss() -> None:
    """-logsigmoid(-beta_dpo / 2 ((e_w - e_l) - (e_w ref - e_l ref))), beta_dpo = 5000, by a second route."""
    reference, policy = tiny_policy(FLOW), tiny_policy(FLOW)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.0001)
    pair, recipe = shared_group(reference, 2), DiffusionDPO()
    rows = recipe.rows(pair, policy)
    torch.testing.assert_close(*(rows.target + rows.sample))
    with torch.no_grad():
        errors = [
            (m.predict(rows.latent, rows.timestep, rows.conditioning, 1.0) - rows.target).square().flatten(1).mean(1)
            for m in (policy, reference)
        ]
    (w, l), (w_ref, l_ref) = errors  # noqa: E741
    wanted = -logsigmoid(-0.5 * 5000 * ((w - l) - (w_ref - l_ref)))
    with torch.no_grad():
        batch = decisions(rows.score(policy), tensor(1, -1), ref_logprob=rows.score(reference).logprob)
    torch.testing.assert_close(recipe.loss(batch).loss, wanted.repeat(2))
    assert abs(wanted.item() - 0.6931) > 1e-3
    # The best against the worst of a group; the others and equal rewards are left out.
    found = recipe.advantage(verdicts([1, 5, 3, 2, 2], tree("a", 1, 5, split=0), [0, 0, 0, 1, 1]))
    assert found[:2].tolist() == [-1, 1] and found[2:].isnan().all()


def test_the_reference_of_diffusion_nft() -> None:
    policy, reference = tiny_policy(FLOW), tiny_policy(FLOW, seed=1)
    rows = DiffusionNFT().rows(rollouts(policy, STEPS, count=2), policy)
    rows.set_anchor(policy)
    assert isinstance(rows, NFTRows) and rows.score(policy).kl is None
    rows.set_reference(reference)
    scores = rows.score(policy)
    outputs = [m.predict(rows.latent, rows.timestep, rows.conditioning, 1.0) for m in (policy, reference)]
    torch.testing.assert_close(scores.kl, (outputs[0] - outputs[1]).square().flatten(1).mean(1))
    held, free = DiffusionNFT(kl_to="reference", kl_coef=0.5), DiffusionNFT()
    batch = decisions(scores, torch.zeros_like(scores.logprob))
    torch.testing.assert_close(held.loss(batch).loss, free.loss(batch).loss + 0.5 * scores.kl)
    assert held.anchor == free.anchor == "old" and held.needs_reference and not free.needs_reference


def test_every_prompt_has_the_teacher_that_names_it() -> None:
    """The loss of a step is ||mean - teacher mean||^2 / (2 std^2 D); the first teacher has the prompts without one."""
    student, first, second = (tiny_policy(FLOW, seed=seed) for seed in range(3))
    recipe = DiffusionOPD(teachers={"a": ["two"], "b": ["one"]})
    recipe._models = GaussianTeachers([first, second], list(recipe.teachers.values()), student)
    trajectories = rollouts(student, STEPS, count=3)  # of zero, one, two
    rows = recipe.rows(trajectories, student)
    for owner, teacher in enumerate((first, second, first)):
        mine = rows.trajectory == owner
        given = {"label": torch.full((int(mine.sum()),), owner)}
        means = [
            step_mean(
                rows.coefficients[mine],
                None,
                m.predict(rows.latent[mine], rows.timestep[mine], given, 1.0),
                rows.latent[mine],
            )
            for m in (student, teacher)
        ]
        wanted = gaussian_kl(*means, rows.std[mine]) / 9
        torch.testing.assert_close(rows.score(student).kl[mine], wanted)
    scores = rows.score(student)
    torch.testing.assert_close(recipe.loss(decisions(scores, scores.logprob.detach() * 0)).loss, scores.kl)
    # Something learned: a step along the gradient brings the student nearer to its teachers.
    before = scores.kl.mean()
    before.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= 1e-3 * parameter.grad
        assert rows.score(student).kl.mean() < before
    with pytest.raises(ValueError, match="a teacher's prediction_type is epsilon, the policy's is flow"):
        GaussianTeachers([tiny_policy()], [[]], student)
    with pytest.raises(ValueError, match=r"algorithm\.teachers is empty"):
        DiffusionOPD().check(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "awm", "old_logprob": "sampler"}, "algorithm.old_logprob of awm must be on_policy or recompute"),
        ({"name": "v_grpo", "kl_estimator": "k3"}, "algorithm.kl_estimator of v_grpo must be exact"),
        ({"name": "diffusion_nft", "kl_estimator": "k3"}, "algorithm.kl_to of diffusion_nft must be none or"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(options)


RUNS = {
    "awm": "{name: awm, num_draws: 2}",
    "v_grpo": "{name: v_grpo, num_draws: 2, old_logprob: recompute, kl_to: old, kl_coef: 0.1}",
    "diffusion_dpo": "{name: diffusion_dpo, beta: 10}",
    "diffusion_nft": "{name: diffusion_nft, num_draws: 2, kl_to: reference, kl_coef: 0.1}",
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_through_the_loop(name: str, tmp_path: Path) -> None:
    train_here(
        image_config(tmp_path, f"algorithm={RUNS[name]}", "train.steps=2", "sft.steps=0", "sampler.eta=0.0",
                     "train.optimizer={lr: 1e-3, warmup_steps: 0}", "train.max_logprob_gap=null", "eval.num_prompts=4",
                     f"train.epochs={2 if name == 'v_grpo' else 1}")
    )  # fmt: skip
    run = tmp_path / "run"
    assert all(value > 0 for value in series(run, "train", "policy/grad_norm"))
    if name in ("awm", "diffusion_nft"):
        first, second = series(run, "train", "policy/kl")
        assert abs(first) < 1e-9 < 1e-6 < second
    if name == "v_grpo":  # the second pass over the rollouts is away from the policy that sampled them
        assert min(series(run, "train", "policy/kl")) > 1e-6
    if name == "diffusion_dpo":
        decided = [line["policy/decisions"] for line in lines(run, "train")]
        assert all(2 <= count <= 16 for count in decided)
