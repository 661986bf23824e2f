"""The estimator of Gaussian steps: the sampler's own log-probs, the right gradient, exact KL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from rl.estimators.gaussian_step import gaussian_rows
from rollouts.samplers.latent_options import LatentSamplerOptions
from tests.image_models import FLOW, rollouts, tiny_policy

KINDS = ["ddim", "ddpm", "flow_sde", "flow_cps", "flow_stochastic"]
WINDOWS = [(kind, window) for kind in KINDS for window in (None, (0, 2), (3, 1)) if kind != "ddpm" or window is None]


def sampled(
    kind: str, double: bool = True, guidance: float = 2.0, count: int = 4, window: tuple[int, int] | None = None
) -> tuple:
    policy = tiny_policy(FLOW if kind.startswith("flow") else None, double=double)
    options = LatentSamplerOptions(
        kind=kind, num_inference_steps=6, guidance_scale=guidance, min_std=0.02, sde_window=window
    )
    return policy, rollouts(policy, options, count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_replay_gives_the_samplers_log_probs(kind: str, guidance: float) -> None:
    """In float64 only the order of sums differs between batches: 1e-9 on log-densities of up to 100."""
    policy, trajectories = sampled(kind, guidance=guidance)
    rows = gaussian_rows(trajectories, reduce="sum")
    assert len(rows.step) == sum(int(t.is_decision.sum()) for t in trajectories) >= 4 * 4
    with torch.no_grad():
        mean = rows.mean(policy)
    torch.testing.assert_close(rows.logprob(mean), rows.sampler_logprob, rtol=0, atol=1e-9)
    torch.testing.assert_close(mean, rows.sampler_mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "window"), WINDOWS)
def test_the_ratio_of_a_first_replay_is_exactly_one_in_the_same_layout(
    kind: str, window: tuple[int, int] | None
) -> None:
    """float32, one step of all trajectories at a time, as the sampler forwarded them: not a bit differs."""
    policy, trajectories = sampled(kind, double=False, count=8, window=window)
    if window is not None:
        assert np.flatnonzero(trajectories[0].is_decision).tolist() == list(range(window[0], sum(window)))
        # The other steps are the ODE's: sure, and no decisions.
        assert (np.delete(trajectories[0].std, range(window[0], sum(window))) == 0).all()
    for step in np.flatnonzero(trajectories[0].is_decision):
        wanted = np.zeros((8, 6), dtype=bool)
        wanted[:, step] = True
        rows = gaussian_rows(trajectories, wanted)
        with torch.no_grad():
            ratio = (rows.logprob(rows.mean(policy)) - rows.sampler_logprob).exp()
        assert (ratio == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_another_layout_moves_the_ratio_by_rounding_only(kind: str) -> None:
    """float32 outputs differ by a few 1e-7 between batch shapes, which moves a density by that over std per entry.

    Means of 9 entries with a std of at least 0.02 stay below 1e-4; clips are 1e-3 and more.
    """
    policy, trajectories = sampled(kind, double=False, count=8)
    rows = gaussian_rows(trajectories)
    with torch.no_grad():
        gap = (rows.logprob(rows.mean(policy)) - rows.sampler_logprob).abs().max()
    assert float(gap) < 1e-4


def test_guidance_is_part_of_the_policy() -> None:
    """Scored with another guidance scale the log-probs are others: what was sampled is what is scored."""
    policy, trajectories = sampled("ddim", guidance=2.0)
    rows = gaussian_rows(trajectories)
    label = rows.conditioning["label"]
    with torch.no_grad():
        given = policy.unet(rows.latent, rows.timestep, class_labels=label).sample
        without = policy.unet(rows.latent, rows.timestep, class_labels=torch.full_like(label, 3)).sample
        both = policy.predict(rows.latent, rows.timestep, rows.conditioning, 2.0)
        torch.testing.assert_close(both, without + 2 * (given - without), rtol=0, atol=1e-12)
        rows.guidance_scale = 1.0
        assert (rows.logprob(rows.mean(policy)) - rows.sampler_logprob).abs().mean() > 0.01


def test_any_subset_of_steps_can_be_replayed() -> None:
    policy, trajectories = sampled("ddim")
    wanted = np.zeros((4, 6), dtype=bool)
    wanted[0, 2] = wanted[2, [1, 3]] = wanted[3, 5] = True
    assert not trajectories[3].is_decision[5]
    rows = gaussian_rows(trajectories, wanted, reduce="sum")
    assert list(zip(rows.trajectory.tolist(), rows.step.tolist(), strict=True)) == [(0, 2), (2, 1), (2, 3)]
    expected = [trajectories[i].logprob[s] for i, s in ((0, 2), (2, 1), (2, 3))]
    with torch.no_grad():
        logprob = rows.logprob(rows.mean(policy))
    np.testing.assert_allclose(logprob.numpy(), expected, atol=1e-9)
    nothing = gaussian_rows(trajectories, np.zeros((4, 6), dtype=bool))
    assert nothing.latent.shape == (0, 1, 3, 3) and nothing.num_rows == 0


def test_mean_and_sum_differ_by_the_number_of_entries() -> None:
    policy, trajectories = sampled("ddim")
    per_entry, whole = (gaussian_rows(trajectories, reduce=reduce) for reduce in ("mean", "sum"))
    with torch.no_grad():
        mean = whole.mean(policy)
    torch.testing.assert_close(per_entry.logprob(mean) * 9, whole.logprob(mean))
    torch.testing.assert_close(per_entry.sampler_logprob * 9, whole.sampler_logprob)
    other = mean + 0.1
    torch.testing.assert_close(per_entry.kl(mean, other) * 9, whole.kl(mean, other))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    """Of a clipped-surrogate-like function of the log-probs, in a direction through all weights."""
    policy, trajectories = sampled(kind)
    rows = gaussian_rows(trajectories, reduce="sum")
    advantage = torch.linspace(-1, 1, len(rows.step), dtype=torch.float64)

    def objective() -> torch.Tensor:
        log_ratio = rows.logprob(rows.mean(policy)) - rows.sampler_logprob
        return (log_ratio.exp() * advantage).sum()

    parameters = list(policy.parameters())
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    gradient = torch.autograd.grad(objective(), parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
    width = 1e-6
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(sign * width * d)
            values.append(float(objective()))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * width), rel=1e-5)


def test_kl_is_that_of_torch() -> None:
    policy, trajectories = sampled("ddim")
    rows = gaussian_rows(trajectories, reduce="sum")
    other = tiny_policy(seed=1)
    with torch.no_grad():
        one, two = rows.mean(policy), rows.mean(other)
    std = rows.std.reshape(-1, 1, 1, 1)
    expected = kl_divergence(Normal(one, std), Normal(two, std)).flatten(1).sum(1)
    torch.testing.assert_close(rows.kl(one, two), expected)
    assert (rows.kl(one, one) == 0).all() and (expected > 0.1).any()
    assert rows.score(policy).kl is None
    rows.set_anchor(other)
    logprob, entropy, kl = rows.score(policy)[:3]
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(logprob, rows.sampler_logprob)
    torch.testing.assert_close(entropy, Normal(one, std).entropy().flatten(1).sum(1))


def test_a_sampler_without_noise_cannot_be_trained() -> None:
    policy = tiny_policy()
    trajectories = rollouts(policy, LatentSamplerOptions(eta=0.0, num_inference_steps=4))
    with pytest.raises(ValueError, match=r"raise sampler\.eta"):
        gaussian_rows(trajectories)
    mixed = [*rollouts(policy, LatentSamplerOptions(num_inference_steps=4)), *trajectories]
    with pytest.raises(ValueError, match="must share their sampler settings"):
        gaussian_rows(mixed)
    with pytest.raises(ValueError, match=r"algorithm\.reduce"):
        gaussian_rows(trajectories, reduce="max")
