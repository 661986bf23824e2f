"""Gaussian steps: equal to diffusers' schedulers, log-probs equal to closed forms, noise independent of the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from scipy.stats import norm

from rollouts.engines.base import SampleRequest
from rollouts.engines.latent import LatentEngine
from rollouts.engines.record import NonFiniteError
from rollouts.latent_trajectory import load_latents, save_latents
from rollouts.npz_file import read_records, write_records
from rollouts.samplers.first_jump import DataGaussian
from rollouts.samplers.gaussian import GaussianSteps, gaussian_step, make_steps
from rollouts.samplers.latent_options import LatentSamplerOptions
from rollouts.samplers.noise import LATENT_STREAM, branch_seed, normal
from tests.image_models import FLOW, rollouts, tiny_policy

STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
    "set_alpha_to_one": False,
}  # fmt: skip


def options(**values: Any) -> LatentSamplerOptions:
    return LatentSamplerOptions(**{"num_inference_steps": 10, **values})


def our_step(steps: GaussianSteps, index: int, output: torch.Tensor, latent: torch.Tensor, noise: torch.Tensor) -> Any:
    rows = len(latent)
    return gaussian_step(
        torch.from_numpy(steps.coefficients[index]).expand(rows, -1),
        torch.full((rows,), steps.std[index], dtype=torch.float64),
        steps.clip,
        output,
        latent,
        noise,
    )


def draws(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("clip", "eta"), [(False, 1.0), (True, 1.0), (False, 0.3), (True, 0.0)])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_ddim_step_is_diffusers_step(prediction: str, clip: bool, eta: float, offset: int) -> None:
    scheduler = DDIMScheduler(
        prediction_type=prediction, clip_sample=clip, steps_offset=offset, set_alpha_to_one=bool(offset)
    )
    steps = make_steps(scheduler, options(eta=eta))
    scheduler.set_timesteps(10)
    for index, timestep in enumerate(scheduler.timesteps):
        latent, output, noise = (draws(3 * index + k, 4, 2, 3) for k in range(3))
        theirs = scheduler.step(output, timestep, latent, eta=eta, variance_noise=noise).prev_sample
        ours = our_step(steps, index, output, latent, noise)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("clip", [False, True])
def test_a_ddpm_step_is_diffusers_step(prediction: str, variance: str, clip: bool) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction, variance_type=variance, clip_sample=clip)
    steps = make_steps(scheduler, options(kind="ddpm"))
    scheduler.set_timesteps(10)
    for index, timestep in enumerate(scheduler.timesteps):
        latent, output = draws(index, 4, 2, 3), draws(100 + index, 4, 2, 3)
        generator = torch.Generator().manual_seed(index)
        theirs = scheduler.step(output, int(timestep), latent, generator=generator).prev_sample
        ours = our_step(steps, index, output, latent, draws(index, 4, 2, 3))[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert steps.std[-1] == 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_stochastic_flow_step_is_diffusers_step(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=shift)
    steps = make_steps(scheduler, options(kind="flow_stochastic"))
    scheduler.set_timesteps(10)
    for index, timestep in enumerate(scheduler.timesteps):
        latent, output = draws(index, 4, 2, 3), draws(100 + index, 4, 2, 3)
        generator = torch.Generator().manual_seed(index)
        theirs = scheduler.step(output, timestep, latent, generator=generator).prev_sample
        ours = our_step(steps, index, output, latent, draws(index, 4, 2, 3))[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert steps.std[-1] == 0


@pytest.mark.parametrize(
    "chosen",
    [
        {"kind": "flow_sde", "noise_level": 0.0},
        {"kind": "flow_cps", "noise_level": 0.0},
        {"kind": "flow_sde", "sde_window": (10, 0)},
        {"kind": "flow_cps", "sde_window": (10, 0)},
        {"kind": "flow_stochastic", "sde_window": (10, 0)},
    ],
)
def test_a_flow_without_noise_is_diffusers_euler_step(chosen: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    # An empty window is refused, since nothing could be learnt; as a copy it shows the steps outside of one.
    steps = make_steps(scheduler, options().model_copy(update=chosen))
    scheduler.set_timesteps(10)
    for index, timestep in enumerate(scheduler.timesteps):
        latent, output = draws(index, 4, 2, 3), draws(100 + index, 4, 2, 3)
        ours = our_step(steps, index, output, latent, torch.zeros(4, 2, 3))[0]
        torch.testing.assert_close(ours, scheduler.step(output, timestep, latent).prev_sample, rtol=1e-5, atol=1e-6)
    assert (steps.std == 0).all()


def closed_form(kind: str, index: int, x: np.ndarray, o: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean and standard deviation of a step, written down from the papers without the table.

    The noise schedule is rounded to float32 as diffusers keeps it; all else is float64.
    """
    alphas = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), 0).double().numpy()
    if kind in ("ddim", "ddpm"):
        t = 100 * (9 - index) + 1
        before = alphas[t - 100] if t >= 100 else (alphas[0] if kind == "ddim" else 1.0)
        now = alphas[t]
        x0 = (x - np.sqrt(1 - now) * o) / np.sqrt(now)
        variance = (1 - before) / (1 - now) * (1 - now / before)
        if kind == "ddim":
            variance *= 0.6**2
            return np.sqrt(before) * x0 + np.sqrt(1 - before - variance) * o, np.sqrt(variance)
        mean = (
            np.sqrt(before) * (1 - now / before) / (1 - now) * x0 + np.sqrt(now / before) * (1 - before) / (1 - now) * x
        )
        return mean, np.sqrt(max(variance, 1e-20))
    sigmas = np.append(np.linspace(1, 1 / 1000, 10).astype(np.float32), np.float32(0)).astype(np.float64)
    t, after = sigmas[index], sigmas[index + 1]
    if kind == "flow_stochastic":
        return (1 - after) * (x - t * o), after
    if kind == "flow_cps":
        # Half the noise level: cos and sin of 45 degrees.
        return (1 - after) * (x - t * o) + after / 2**0.5 * (x + (1 - t) * o), after / 2**0.5
    sigma = 0.5 * np.sqrt(t / (1 - (sigmas[1] if t == 1 else t)))
    step = after - t
    mean = x * (1 + sigma**2 * step / (2 * t)) + o * (1 + sigma**2 * (1 - t) / (2 * t)) * step
    return mean, sigma * np.sqrt(-step)


@pytest.mark.parametrize("kind", ["ddim", "ddpm", "flow_sde", "flow_cps", "flow_stochastic"])
def test_log_probs_are_the_closed_form_at_every_step(kind: str) -> None:
    """Against SciPy's density of formulas written down separately, in float64."""
    scheduler = FLOW if kind.startswith("flow") else {"name": "DDIMScheduler", "steps_offset": 1}
    policy = tiny_policy(scheduler)
    chosen = options(kind=kind, eta=0.6, noise_level=0.5, min_std=0.0, guidance_scale=1.5)
    for trajectory in rollouts(policy, chosen):
        trajectory.validate()
        conditioning = {name: torch.from_numpy(row[None]) for name, row in trajectory.conditioning.items()}
        for index in range(10):
            latent = torch.from_numpy(trajectory.latents[index][None])
            time = torch.from_numpy(trajectory.timestep[index : index + 1])
            with torch.no_grad():
                output = policy.predict(latent, time, conditioning, 1.5)[0].numpy()
            mean, std = closed_form(kind, index, trajectory.latents[index], output)
            np.testing.assert_allclose(trajectory.mean[index], mean, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(trajectory.std[index], std, rtol=1e-3, atol=1e-6)
            if trajectory.std[index] == 0:
                # A sure step has no density: it counts as a probability of 1, and nobody may train on it.
                assert trajectory.logprob[index] == 0 and not trajectory.is_decision[index]
            else:
                density = norm.logpdf(trajectory.latents[index + 1], mean, std).sum()
                # A mean that is off by 1e-4 moves the log-density by that many standard deviations.
                np.testing.assert_allclose(trajectory.logprob[index], density, atol=2e-3 + 2e-3 / std, rtol=1e-4)
        assert (trajectory.std[-1] == 0) == (kind in ("ddpm", "flow_cps", "flow_stochastic")) or kind == "ddpm"


def test_the_published_schedule_of_stable_diffusion() -> None:
    """Standard deviations of 20 DDIM steps at eta 1 with the published offset, read off the published code."""
    steps = make_steps(DDIMScheduler(steps_offset=1, **STABLE_DIFFUSION), options(num_inference_steps=20))
    assert steps.timestep.tolist() == [951 - 50 * i for i in range(20)]
    np.testing.assert_allclose(steps.std[[0, -4, -3, -2, -1]], [0.644, 0.214, 0.167, 0.041, 0.0206], atol=2e-3)


def test_the_last_step_without_an_offset_has_no_density_and_no_nan() -> None:
    scheduler = DDIMScheduler(steps_offset=0, **STABLE_DIFFUSION)
    excluded = make_steps(scheduler, options())
    assert excluded.std[-1] == 0 and (excluded.std[:-1] > 0.02).all()
    floored = make_steps(scheduler, options(small_std="floor", min_std=0.05))
    assert floored.std[-1] == 0.05 and (floored.std >= 0.05).all()
    trap = {"name": "DDIMScheduler", "steps_offset": 0}
    for small, decisions in (("exclude", 9), ("floor", 10)):
        for trajectory in rollouts(tiny_policy(trap), options(small_std=small, min_std=0.001)):
            trajectory.validate()
            assert trajectory.is_decision.sum() == decisions


def exact_flow(mean: float, std: float) -> Any:
    """The velocity E[noise - x0 | x_t] of flow matching on data N(mean, std^2), as a policy."""

    class Flow:
        latent_shape = (1, 4, 5)
        scheduler = FlowMatchEulerDiscreteScheduler()

        def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
            return {"sigmas": np.linspace(1.0, 0.001, num_inference_steps)}

        def encode(self, prompts: Any) -> dict[str, torch.Tensor]:
            return {}

        def predict(self, x: torch.Tensor, timesteps: torch.Tensor, conditioning: Any, scale: float) -> torch.Tensor:
            t = (timesteps / 1000).reshape(-1, 1, 1, 1)
            residual = (x - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
            return t * residual - (mean + (1 - t) * std**2 * residual)

        def num_evaluations(self, guidance_scale: float) -> int:
            return 1

    return Flow()


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_the_flow_sde_has_the_marginals_of_the_ode(noise_level: float) -> None:
    """x_t of data N(1, 0.5^2) is N((1-t), ((1-t)/2)^2 + t^2), whatever the noise level.

    20,000 independent entries, 200 steps, fixed seeds. Tolerance: 4 standard errors (0.007 sd of the mean, 0.005 sd of
    the standard deviation), and for the standard deviation 0.015 for steps of finite length, whose bias a recursion
    over means and variances puts at 0.012 or less. With the wrong sign of the drift's correction it is off by 2.
    """
    count, num_steps = 1_000, 200
    flow = exact_flow(1.0, 0.5)
    chosen = options(kind="flow_sde", noise_level=noise_level, num_inference_steps=num_steps)
    engine = LatentEngine(flow, chosen, max_batch_size=count, dtype=torch.float64)
    trajectories = engine.generate([SampleRequest("", seed) for seed in range(count)])
    latents = np.stack([t.latents.reshape(201, -1) for t in trajectories])
    sigmas = np.append(trajectories[0].timestep / 1000, 0.0)
    for index in (50, 100, 150, 190, 200):
        t = sigmas[index]
        exact = np.sqrt(((1 - t) / 2) ** 2 + t**2)
        assert abs(latents[:, index].mean() - (1 - t)) < 0.028 * exact
        assert abs(latents[:, index].std() - exact) < 0.02 * exact + 0.015


def test_normal_draws_have_the_right_distribution() -> None:
    index = torch.arange(200_000)
    z = normal(index // 100, torch.tensor(3), index % 100, LATENT_STREAM)
    assert abs(float(z.mean())) < 4 * 200_000**-0.5 and abs(float(z.std()) - 1) < 4 * 400_000**-0.5
    for bound in (-2.0, -0.5, 1.0):
        share = float((z < bound).double().mean())
        assert abs(share - norm.cdf(bound)) < 4 * (0.25 / 200_000) ** 0.5
    # Neighbouring seeds, steps and entries are unrelated.
    other = normal(index // 100 + 1, torch.tensor(3), index % 100, LATENT_STREAM)
    assert abs(float((z * other).mean())) < 4 * 200_000**-0.5


def test_a_rollout_does_not_depend_on_its_batch() -> None:
    policy, chosen = tiny_policy(), options(guidance_scale=2.0)
    together = rollouts(policy, chosen, count=7)
    for count, size in ((7, 2), (3, 256)):
        for one, other in zip(together, rollouts(policy, chosen, count, max_batch_size=size), strict=False):
            np.testing.assert_allclose(one.latents, other.latents, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(one.seed, other.seed)


def test_branches_share_their_prefix_and_nothing_else() -> None:
    policy, chosen = tiny_policy(), options()
    plain = rollouts(policy, chosen, count=2)
    tree = rollouts(policy, chosen, count=2, branch_points=((3, 2), (7, 3)))
    assert len(tree) == 2 * 6
    for request in range(2):
        leaves = tree[6 * request : 6 * request + 6]
        # The first branch is the rollout that would have been without branching.
        np.testing.assert_allclose(leaves[0].latents, plain[request].latents, atol=1e-12)
        for a, one in enumerate(leaves):
            assert one.branch_steps == (3, 7)
            for b, other in enumerate(leaves):
                shared = 10 if a == b else 7 if a // 3 == b // 3 else 3
                equal = (one.latents == other.latents).reshape(11, -1).all(1)
                assert (equal[: shared + 1].all() and not equal[shared + 1 :].any()) or a == b
                assert [one.node(d) == other.node(d) for d in range(11)] == [d <= shared for d in range(11)]


def test_a_shared_prefix_is_computed_once() -> None:
    policy = tiny_policy()
    engine = LatentEngine(policy, options(guidance_scale=2.0), dtype=torch.float64, branch_points=[(3, 2), (7, 3)])
    engine.generate([SampleRequest(prompt, 1) for prompt in ("one", "two") for _ in range(6)])
    assert engine.stats.sequence_forwards == 2 * (2 * 3 + 4 * 4 + 12 * 3)
    assert engine.stats.forwards == 10


def test_branch_seeds_differ() -> None:
    seeds = torch.arange(1000).repeat_interleave(8)
    branch = torch.arange(8).repeat(1000)
    made = torch.cat([branch_seed(seeds, torch.tensor(step), branch) for step in (2, 3)])
    # Branch 0 keeps the seed at both steps; all else is new.
    assert len(made.unique()) == 1000 + 2 * 1000 * 7


@pytest.mark.parametrize("branch_points", [((7, 2), (3, 2)), ((10, 2),), ((-1, 2),)])
def test_impossible_branch_points_are_refused(branch_points: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="branch_points must ascend"):
        rollouts(tiny_policy(), options(), branch_points=branch_points)


def test_branches_of_two_prompts_are_refused() -> None:
    engine = LatentEngine(tiny_policy(), options(), dtype=torch.float64, branch_points=[(2, 2)])
    for prompts in (("one", "two"), ("one", "one", "one")):
        with pytest.raises(ValueError, match=r"train\.group_size must be a multiple"):
            engine.generate([SampleRequest(prompt, 1) for prompt in prompts])


def test_a_model_that_gives_nan_is_not_sampled_from() -> None:
    policy = tiny_policy()
    torch.nn.init.constant_(policy.unet.out.bias, float("nan"))
    with pytest.raises(NonFiniteError):
        rollouts(policy, options())


def test_one_rollout_that_is_not_finite_has_failed_and_the_others_are_as_they_would_be(tmp_path: Path) -> None:
    policy = tiny_policy()
    whole = rollouts(policy, options())
    with torch.no_grad():
        policy.unet.label.weight[1] = float("inf")
    found = rollouts(policy, options())
    assert [t.failed for t in found] == [False, True, False]
    for i in (0, 2):
        np.testing.assert_array_equal(found[i].latents, whole[i].latents)
    save_latents(tmp_path / "t.npz", found)
    again = load_latents(tmp_path / "t.npz")
    assert [t.failed for t in again] == [False, True, False] and not again[1].latents.any()


@pytest.mark.parametrize(
    ("chosen", "scheduler", "message"),
    [
        ({"kind": "flow_sde"}, {}, "sampler.kind 'flow_sde' needs a flow-matching scheduler"),
        ({"kind": "ddim"}, FLOW, "sampler.kind 'ddim' needs a scheduler with alphas_cumprod"),
        ({}, {"name": "DDIMScheduler", "thresholding": True}, "set thresholding to false"),
        ({"kind": "ddpm"}, {"name": "DDPMScheduler", "variance_type": "learned_range"}, "variance_type"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_refused(chosen: dict, scheduler: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentEngine(tiny_policy(scheduler), options(**chosen))


def test_trajectories_survive_a_file(tmp_path: Path) -> None:
    saved = rollouts(tiny_policy(double=False), options(), branch_points=((4, 2),))
    save_latents(tmp_path / "t.npz", saved)
    for before, after in zip(saved, load_latents(tmp_path / "t.npz"), strict=True):
        for name in ("latents", "timestep", "coefficients", "mean", "std", "logprob", "seed"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name), strict=True)
        np.testing.assert_array_equal(before.conditioning["label"], after.conditioning["label"], strict=True)
        assert (before.branch_steps, before.clip, before.sampler) == (after.branch_steps, after.clip, after.sampler)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]
    # Files from before branch points had this name.
    items, arrays = read_records(tmp_path / "t.npz", "latent trajectories", 1)
    old = [{"splits" if name == "branch_steps" else name: value for name, value in item.items()} for item in items]
    write_records(tmp_path / "old.npz", "latent trajectories", 1, old, arrays)
    assert [t.branch_steps for t in load_latents(tmp_path / "old.npz")] == [(4,), (4,)] * 3


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("seed", lambda t: t.seed[1:]),
        ("latents", lambda t: t.latents.astype(np.float16)),
        ("logprob", lambda t: t.logprob * np.nan),
        ("std", lambda t: -t.std),
        ("branch_steps", lambda t: (3, 2)),
        ("mean", lambda t: t.mean[:, :, :2]),
    ],
)
def test_a_record_that_contradicts_itself_is_named(field: str, change: Any) -> None:
    trajectory = rollouts(tiny_policy(), options(), count=1)[0]
    with pytest.raises(ValueError, match=f"field '{field}'"):
        replace(trajectory, **{field: change(trajectory)}).validate()


def test_the_one_step_of_a_flow_sde_has_the_published_deviation() -> None:
    """Sigmas 1 and 0: a sqrt(t / (1 - s)) with the second sigma s = 0 in the place of t = 1, so a; std = a sqrt(1)."""
    steps = make_steps(
        FlowMatchEulerDiscreteScheduler(), options(kind="flow_sde", noise_level=0.7, num_inference_steps=1)
    )
    np.testing.assert_allclose(steps.std, [0.7], rtol=1e-6)
    # mean = x (1 - a^2 / 2) - o, with o the velocity and dt = -1.
    np.testing.assert_allclose(steps.coefficients[0, 3:], [1 - 0.7**2 / 2, -1.0], rtol=1e-6)


def test_a_window_draws_the_steps_of_the_sampler_and_follows_the_ode_elsewhere() -> None:
    for kind, ode in (("ddim", {"eta": 0.0}), ("flow_sde", {"noise_level": 0.0}), ("flow_cps", {"noise_level": 0.0})):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if kind != "ddim" else DDIMScheduler(steps_offset=1)
        whole, sure = make_steps(scheduler, options(kind=kind)), make_steps(scheduler, options(kind=kind, **ode))
        # The floor raises small noise inside the window alone.
        window = make_steps(scheduler, options(kind=kind, sde_window=(2, 3), small_std="floor", min_std=1e-6))
        inside = np.isin(np.arange(10), [2, 3, 4])
        np.testing.assert_array_equal(window.coefficients[inside], whole.coefficients[inside])
        np.testing.assert_array_equal(window.std[inside], whole.std[inside])
        # Tables may share the mean out among x0, latent and output in different ways: weights of latent and output.
        a, c = (s.coefficients[~inside, 3:] + s.coefficients[~inside, 2:3] * s.coefficients[~inside, :2]
                for s in (window, sure))  # fmt: skip
        np.testing.assert_allclose(a, c, rtol=0, atol=1e-12)
        assert (window.std[~inside] == 0).all() and (window.std[inside] > 0).all()


@pytest.mark.parametrize("noise_level", [0.3, 1.0])
def test_cps_keeps_the_weights_of_data_and_noise_at_any_number_of_steps(noise_level: float) -> None:
    """Data of one point m: x0 and x1 are exact, so x_t is N((1 - t) m, t^2) after three steps as after three hundred.

    The SDE's steps miss that: its first, at t = 1, keeps a share of x that is none of the schedule's.
    """
    flow = exact_flow(2.0, 0.0)
    variance = {}
    for kind in ("flow_cps", "flow_sde"):
        steps = make_steps(
            flow.scheduler, options(kind=kind, noise_level=noise_level, num_inference_steps=3),
            {"sigmas": [1.0, 0.6, 0.3]},
        )  # fmt: skip
        mean, spread, variance[kind] = 0.0, 1.0, []
        for t, c, std in zip((1.0, 0.6, 0.3), steps.coefficients, steps.std, strict=True):
            # The velocity is linear in x: v = (x - m) / t. Two outputs give slope and offset of the step's mean.
            at = [
                float(
                    our_step(
                        steps_of(c, 0.0), 0, torch.tensor([[(x - 2.0) / t]]), torch.tensor([[x]]), torch.zeros(1, 1)
                    )[0]
                )
                for x in (0.0, 1.0)
            ]
            slope = at[1] - at[0]
            mean, spread = at[0] + slope * mean, slope**2 * spread + std**2
            variance[kind].append((mean, spread))
    np.testing.assert_allclose(variance["flow_cps"], [(0.8, 0.36), (1.4, 0.09), (2.0, 0.0)], atol=1e-6)
    assert abs(variance["flow_sde"][0][1] - 0.36) > 0.01


def steps_of(coefficients: np.ndarray, std: float) -> GaussianSteps:
    return GaussianSteps(np.zeros(1), coefficients[None], np.array([std]))


def test_a_list_of_timesteps_takes_the_place_of_the_spacing() -> None:
    """The scheduler's own timesteps, written out, are the same steps; others give the closed form between them."""
    for kind, scheduler in (
        ("ddim", DDIMScheduler(steps_offset=1, set_alpha_to_one=False)),
        ("ddpm", DDPMScheduler()),
        ("flow_sde", FlowMatchEulerDiscreteScheduler()),
        ("flow_cps", FlowMatchEulerDiscreteScheduler()),
    ):
        own = make_steps(scheduler, options(kind=kind))
        listed = make_steps(scheduler, options(kind=kind, timesteps=own.timestep.tolist()))
        np.testing.assert_allclose(listed.coefficients, own.coefficients, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(listed.std, own.std, rtol=1e-5, atol=1e-7)
    steps = make_steps(DDIMScheduler(), options(timesteps=(900, 300), num_inference_steps=2))
    alphas = DDIMScheduler().alphas_cumprod.double().numpy()
    variance = (1 - alphas[300]) / (1 - alphas[900]) * (1 - alphas[900] / alphas[300])
    np.testing.assert_allclose(steps.std, [np.sqrt(variance), 0.0], rtol=1e-6)
    assert steps.timestep.tolist() == [900, 300]


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_more_steps_than_the_model_was_trained_with_are_refused(kind: str) -> None:
    make_steps(DDIMScheduler(num_train_timesteps=10), options(kind=kind, num_inference_steps=10))
    with pytest.raises(ValueError, match=r"sampler.num_inference_steps 11 is more than the 10 that the model"):
        make_steps(DDIMScheduler(num_train_timesteps=10), options(kind=kind, num_inference_steps=11))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"timesteps": (900, 300)}, "sampler.timesteps has 2 entries for sampler.num_inference_steps 10"),
        ({"timesteps": (300, 900), "num_inference_steps": 2}, "must descend"),
        ({"sde_window": (8, 3)}, r"sampler.sde_window \[8, 3\] must lie in the 10 steps"),
        ({"sde_window": (0, 0)}, r"sampler.sde_window \[0, 0\]"),
        ({"sde_window": (0, 2), "kind": "ddpm"}, "set sampler.kind to ddim"),
        ({"kind": "flow_cps", "noise_level": 1.5}, "must be at most 1"),
    ],
)
def test_samplers_that_cannot_be_are_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**chosen)


def test_timesteps_that_the_schedule_lacks_are_refused() -> None:
    for scheduler, kind, times in (
        (DDIMScheduler(), "ddim", (1000.0, 3.0)),
        (DDIMScheduler(), "ddim", (10.5, 3.0)),
        (FlowMatchEulerDiscreteScheduler(), "flow_cps", (900.0, 0.0)),
    ):
        with pytest.raises(ValueError, match=r"sampler\.timesteps"):
            make_steps(scheduler, options(kind=kind, timesteps=times, num_inference_steps=2))


def test_the_first_jump_is_where_the_ode_of_gaussian_data_leads(tmp_path: Path) -> None:
    """Correlated data of two entries under its exact model: the ODE's steps from the same noise come to the jump."""
    mean, covariance = np.array([0.5, -1.0]), np.array([[1.0, 0.6], [0.6, 0.8]])
    alphas = DDIMScheduler().alphas_cumprod.double()

    class Exact:
        latent_shape, prediction_type, scheduler = (2, 1, 1), "epsilon", DDIMScheduler(clip_sample=False)

        def schedule_options(self, count: int) -> dict[str, Any]:
            return {"num_inference_steps": count}

        def encode(self, prompts: Any) -> dict[str, torch.Tensor]:
            return {"label": torch.zeros(len(prompts))}

        def num_evaluations(self, scale: float) -> int:
            return 1

        def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, *rest: Any) -> torch.Tensor:
            a = float(alphas[int(timesteps[0])])
            spread = torch.from_numpy(a * covariance + (1 - a) * np.eye(2))
            away = latents.flatten(1) - a**0.5 * torch.from_numpy(mean)
            return ((1 - a) ** 0.5 * away @ torch.linalg.inv(spread)).reshape(latents.shape)

    path = str(tmp_path / "data.npz")
    value, vectors = np.linalg.eigh(covariance)
    DataGaussian(mean.reshape(2, 1, 1), vectors.T, value, 0.0).save(path)
    every = tuple(float(t) for t in range(999, 498, -5))
    whole = LatentEngine(
        Exact(), options(eta=0.0, num_inference_steps=len(every), timesteps=every), dtype=torch.float64
    )
    end = len(every) - 1
    slow = np.stack([t.latents[end] for t in whole.generate([SampleRequest("x", i) for i in range(4)])])
    short = {"eta": 0.0, "num_inference_steps": 2, "timesteps": (every[-1], 200.0), "first_jump": path}
    quick = LatentEngine(Exact(), options(**short), dtype=torch.float64)
    found = quick.generate([SampleRequest("x", i) for i in range(4)])
    np.testing.assert_allclose([t.latents[0] for t in found], slow, atol=0.02)
    assert len(found[0].latents) == 3 and quick.stats.sequence_forwards == 8
    # Mean and covariance of the jump, exactly; and of the Gaussian fitted to draws, in one direction and the rest.
    data, signal, level = DataGaussian.load(path, (2, 1, 1)), 0.8, 0.6
    basis = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).reshape(3, 2, 1, 1)
    moved = data.jump(basis, signal, level).flatten(1).numpy()
    np.testing.assert_allclose(moved[0], signal * mean)
    root = moved[1:] - moved[0]
    np.testing.assert_allclose(root.T @ root, signal**2 * covariance + level**2 * np.eye(2))
    draws = np.random.default_rng(0).standard_normal((500, 3, 1, 1)) * np.array([3.0, 1.0, 1.0]).reshape(3, 1, 1)
    fitted = DataGaussian.fit(draws, rank=1)
    assert fitted.variances == pytest.approx([9.0], rel=0.15) and fitted.rest == pytest.approx(1.0, rel=0.15)
    assert abs(fitted.directions[0, 0]) > 0.99
    with pytest.raises(ValueError, match=r"is about latents \[2, 1, 1\], the model's are \[1, 3, 3\]"):
        LatentEngine(tiny_policy(), options(**short))
    with pytest.raises(ValueError, match=r"sampler.first_jump 'nowhere' cannot be read"):
        DataGaussian.load("nowhere", (2, 1, 1))
    with pytest.raises(ValueError, match=r"sampler.first_jump needs sampler.timesteps"):
        options(first_jump=path)
