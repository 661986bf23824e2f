"""FIND: the initial noise as a decision, against closed forms, and through the loop."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from rl.batch import DecisionBatch
from rl.estimators.initial_noise import initial_noise_rows
from rl.losses.aggregate import weighted_sum
from rl.models.class_policy import new_policy
from rl.models.noise_policy import NoisePolicy
from rl.recipes.find import FIND
from rollouts.engines.base import SampleRequest
from rollouts.engines.latent import LatentEngine
from rollouts.latent_trajectory import load_latents, save_latents
from rollouts.samplers.latent_options import LatentSamplerOptions
from rollouts.samplers.noise import LATENT_STREAM, normal
from tests import runs
from tests.image_models import CLASSES, rollouts, tiny_policy
from tests.test_images import image_config

OPTIONS = LatentSamplerOptions(num_inference_steps=3, eta=0.0)


def noise_policy(seed: int = 5) -> NoisePolicy:
    """Gaussians for two of the three classes."""
    policy = NoisePolicy(tiny_policy(), CLASSES[:2], "nowhere").double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        policy.mean.normal_(0.0, 1.0, generator=generator)
        policy.log_std.normal_(0.0, 0.3, generator=generator)
    return policy


def test_a_rollout_starts_from_the_gaussian_of_its_prompt() -> None:
    policy = noise_policy()
    engine = LatentEngine(policy, OPTIONS, dtype=torch.float64)
    trajectories = engine.generate([SampleRequest(CLASSES[i % 3], 40 + i) for i in range(6)])
    plain = rollouts(tiny_policy(), OPTIONS, count=1)
    assert plain[0].initial_logprob is None
    for index, trajectory in enumerate(trajectories):
        z = normal(torch.tensor(40 + index), torch.tensor(0), torch.arange(9), LATENT_STREAM).reshape(1, 3, 3)
        known = index % 3 < 2
        mean = policy.mean[index % 3].detach() if known else torch.zeros(1, 3, 3).double()
        std = policy.log_std[index % 3].detach().exp() if known else torch.ones(1, 3, 3).double()
        start = torch.from_numpy(trajectory.latents[0])
        torch.testing.assert_close(start, mean + std * z)
        assert trajectory.initial_logprob == pytest.approx(float(Normal(mean, std).log_prob(start).sum()), abs=1e-10)


def test_the_rows_are_the_closed_forms(tmp_path: Path) -> None:
    policy, other = noise_policy(5), noise_policy(6)
    engine = LatentEngine(policy, OPTIONS, dtype=torch.float64)
    save_latents(tmp_path / "t.npz", engine.generate([SampleRequest(CLASSES[i % 2], i) for i in range(4)]))
    rows = initial_noise_rows(load_latents(tmp_path / "t.npz"), reduce="sum")
    rows.set_anchor(other)
    logprob, entropy, kl = rows.score(policy)[:3]
    torch.testing.assert_close(logprob.detach(), rows.sampler_logprob, rtol=0, atol=1e-12)
    ours, theirs = (Normal(p.mean[[0, 1, 0, 1]], p.log_std[[0, 1, 0, 1]].exp()) for p in (policy, other))
    torch.testing.assert_close(entropy, ours.entropy().flatten(1).sum(1))
    torch.testing.assert_close(kl, kl_divergence(ours, theirs).flatten(1).sum(1))
    mean = initial_noise_rows(load_latents(tmp_path / "t.npz"))
    torch.testing.assert_close(mean.score(policy).logprob * 9, logprob)
    assert rows.num_rows == 0  # no denoiser runs to score a start
    with pytest.raises(ValueError, match=r"set model\.initial_noise to learned"):
        initial_noise_rows(rollouts(tiny_policy(), OPTIONS, count=1))


def test_the_gradient_is_that_of_the_expected_reward_and_the_kl() -> None:
    """One entry, reward a x + b x^2, the expectation by quadrature: d/dm and d/ds of a m + b (m^2 + s^2), exactly."""
    a, b, m, s = 0.7, -0.4, 0.5, 1.3
    base: Any = torch.nn.Module()
    base.latent_shape, base.scheduler = (1, 1, 1), None
    policy = NoisePolicy(base, ["x"], "nowhere").double()
    with torch.no_grad():
        policy.mean.fill_(m)
        policy.log_std.fill_(np.log(s))
    nodes, weight = np.polynomial.hermite_e.hermegauss(8)
    starts = m + s * nodes
    density = Normal(*torch.tensor([m, s], dtype=torch.float64)).log_prob(torch.from_numpy(starts)).tolist()
    trajectories: Any = [
        SimpleNamespace(
            latents=np.full((1, 1, 1, 1), x), conditioning={"noise_row": np.array(0)}, num_entries=1, initial_logprob=p
        )
        for x, p in zip(starts, density, strict=True)
    ]
    recipe = FIND(kl_coef=0.3)
    rows: Any = recipe.rows(trajectories, policy, None, None)
    rows.set_anchor(NoisePolicy(base, ["x"], "nowhere").double())
    logprob, entropy, kl = rows.score(policy)[:3]
    reward = torch.from_numpy(a * starts + b * starts**2)
    share = torch.from_numpy(weight / weight.sum())
    batch = DecisionBatch(logprob, entropy, rows.sampler_logprob, None, reward, share, kl=kl)
    mean, log_std = torch.autograd.grad(weighted_sum(recipe.loss(batch).loss, share), [policy.mean, policy.log_std])
    assert float(mean) == pytest.approx(-(a + 2 * b * m) + 0.3 * m, abs=1e-10)
    assert float(log_std) == pytest.approx(-2 * b * s**2 + 0.3 * (s**2 - 1), abs=1e-10)


def find_config(folder: Path, *overrides: str) -> list[str]:
    base = new_policy({"width": 24, "num_blocks": 1}, {}, "0123456789", 0)
    base.save_pretrained(folder / "base")
    fixed = ["algorithm={name: find}", "model.initial_noise=learned", f"model.path={folder / 'base'}", "sft.steps=0"]
    small = ["train.optimizer.lr=0.05", "eval.num_prompts=20", "sampler.eta=0.0", "train.steps=2"]
    return image_config(folder, *fixed, *small, *overrides)


def test_a_run_learns_the_noise_and_nothing_else(tmp_path: Path) -> None:
    runs.train_here(find_config(tmp_path))
    line = runs.lines(tmp_path / "run", "train")[0]
    assert line["policy/logprob_gap_max"] < 1e-9
    # 16 rollouts of 6 steps to sample; to learn, and to hold to the reference, none.
    assert line["cost/sequence_forwards"] == 16 * 6 and line["policy/decisions"] == 2 * 16
    folder = tmp_path / "run" / "checkpoints" / "step_2" / "hf"
    assert json.loads((folder / "initial_noise.json").read_text())["base"] == str(tmp_path / "base")
    assert sorted(path.name for path in folder.iterdir()) == ["initial_noise.json", "initial_noise.safetensors"]
    # The checkpoint is a model by itself: evaluated without saying that its noise is learned.
    from rl.config import load_config
    from rl.train.run import Run

    arguments = image_config(tmp_path)[1]
    overrides = [f"model.path={folder}", "algorithm={name: find}"]
    with Run.open(load_config(arguments, overrides), write=False) as run:
        assert isinstance(run.model, NoisePolicy)
        assert float(run.model.mean.detach().abs().max()) > 0.01
        assert run.model.prompts == list("0123456789")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.initial_noise=standard"], "needs model.initial_noise=learned"),
        (["model.path=null"], "set model.path to a trained one"),
        (["sft.steps=2"], "the sft stage trains the built-in image model alone: set sft.steps=0"),
        (["model.initial_noise=standard", "algorithm.name=ddpo", "model.pipeline.height=8"], "no such options"),
    ],
)
def test_mistakes_are_one_clear_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    from rl.config import load_config
    from rl.train.plan import check_run

    arguments = find_config(tmp_path, *overrides)
    with pytest.raises(ValueError, match=message):
        check_run(load_config(arguments[1], arguments[2:]))
        runs.train_here(arguments)
