"""Guidance that a rollout drops on its way: which steps, what it saves, and a replay that is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl.estimators.gaussian_step import gaussian_rows
from rl.models.class_policy import ClassPolicy
from rollouts.engines.base import SampleRequest
from rollouts.engines.latent import LatentEngine
from rollouts.latent_trajectory import LatentTrajectory, load_latents, save_latents
from rollouts.samplers.latent_options import LatentSamplerOptions
from tests.image_models import CLASSES, tiny_policy

OPTIONS = LatentSamplerOptions(num_inference_steps=6, guidance_scale=3.0, min_std=0.0)


def sampled(policy: ClassPolicy, bound: float | None, **engine: Any) -> tuple[list[LatentTrajectory], LatentEngine]:
    sampler = LatentEngine(policy, OPTIONS.model_copy(update={"guidance_cosine": bound}), dtype=torch.float64, **engine)
    requests = [SampleRequest(CLASSES[i % 3], 10 + i) for i in range(6) for _ in range(sampler.leaves)]
    return sampler.generate(requests), sampler


def cosines(policy: ClassPolicy, trajectory: LatentTrajectory) -> np.ndarray:
    """[T] of the halves on the states of a trajectory."""
    label = torch.full((trajectory.num_steps,), int(trajectory.conditioning["label"]))
    latent, time = torch.from_numpy(trajectory.latents[:-1]), torch.from_numpy(trajectory.timestep)
    with torch.no_grad():
        halves = [policy.predict(latent, time, {"label": l}, 1.0).flatten(1) for l in (0 * label + 3, label)]  # noqa: E741
    return torch.cosine_similarity(*halves).numpy()


@pytest.fixture(scope="module")
def policy() -> ClassPolicy:
    return tiny_policy()


@pytest.fixture(scope="module")
def mixed(policy: ClassPolicy) -> list[LatentTrajectory]:
    """Some rollouts drop it, at different steps, and some do not."""
    first = np.sort([cosines(policy, t)[0] for t in sampled(policy, None)[0]])
    return sampled(policy, float(first[2:4].mean()))[0]


def test_a_rollout_is_guided_until_its_halves_point_the_same_way(
    policy: ClassPolicy, mixed: list[LatentTrajectory]
) -> None:
    bound = mixed[0].sampler["guidance_cosine"]
    assert {t.guidance[1] for t in mixed if t.guidance} == {1.0, 3.0}
    for trajectory in mixed:
        trajectory.validate()
        assert trajectory.guidance is not None and trajectory.guidance[0] == 3
        met = cosines(policy, trajectory) > bound
        wanted = [3.0]
        for now in met[:-1]:
            wanted.append(1.0 if now or wanted[-1] == 1 else 3.0)
        assert trajectory.guidance == wanted


def test_the_ends_are_full_guidance_and_guidance_of_one_step(policy: ClassPolicy) -> None:
    plain, full = sampled(policy, None)
    never, engine = sampled(policy, 1.5)
    for one, other in zip(plain, never, strict=True):
        np.testing.assert_allclose(one.latents, other.latents, atol=1e-12)
        assert one.guidance is None and other.guidance == [3.0] * 6
    assert engine.stats.sequence_forwards == full.stats.sequence_forwards == 6 * 6 * 2
    _, engine = sampled(policy, -1.5)
    assert engine.stats.sequence_forwards == 6 * (2 + 5)
    halves, engine = sampled(policy, -1.5, max_batch_size=4)
    assert engine.stats.forwards == 2 * 6 and all(t.guidance == [3.0, *[1.0] * 5] for t in halves)


def test_a_replay_is_exact_and_costs_what_the_rollout_did(policy: ClassPolicy, mixed: list[LatentTrajectory]) -> None:
    rows = gaussian_rows(mixed, reduce="sum", model=policy)
    guidance = np.array([t.guidance for t in mixed])
    assert rows.num_rows == (guidance != 1).sum() * 2 + (guidance == 1).sum()
    assert rows.sampler_logprob is not None
    gap = rows.score(policy).logprob - rows.sampler_logprob
    torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0, atol=1e-9)
    # Guided as the options say, the very steps that dropped it would be off.
    wrong = replace(rows, unguided=None).score(policy).logprob - rows.sampler_logprob
    assert ((wrong.abs() > 1e-3) == rows.unguided).all()
    # A micro-batch of one kind alone, and gradients of it.
    for kind in (0, 1):
        part = gaussian_rows(mixed, (guidance == 1) == kind, reduce="sum")
        scores = part.score(policy)
        torch.testing.assert_close(scores.logprob.detach(), part.sampler_logprob, rtol=0, atol=1e-9)
        assert all(g.isfinite().all() for g in torch.autograd.grad(scores.logprob.sum(), policy.parameters()))


def test_branches_and_files_keep_it(policy: ClassPolicy, mixed: list[LatentTrajectory], tmp_path: Path) -> None:
    bound = mixed[0].sampler["guidance_cosine"]
    branched, _ = sampled(policy, bound, branch_points=((3, 2),))
    for index, trajectory in enumerate(branched):
        assert trajectory.guidance is not None and trajectory.guidance[:4] == mixed[index // 2].guidance[:4]
    gap = gaussian_rows(branched).score(policy).logprob - gaussian_rows(branched).sampler_logprob
    assert gap.abs().max() < 1e-9
    save_latents(tmp_path / "t.npz", mixed)
    assert [t.guidance for t in load_latents(tmp_path / "t.npz")] == [t.guidance for t in mixed]


def test_models_and_options_without_two_halves_are_refused(policy: ClassPolicy) -> None:
    with pytest.raises(ValueError, match=r"sampler\.guidance_cosine does nothing without guidance"):
        LatentSamplerOptions(guidance_cosine=0.9)

    class Distilled(ClassPolicy):
        def num_evaluations(self, guidance_scale: float) -> int:
            return 1

    distilled = Distilled(policy.unet, policy.scheduler, policy.classes)
    with pytest.raises(ValueError, match="which Distilled does not show"):
        LatentEngine(distilled, OPTIONS.model_copy(update={"guidance_cosine": 0.9}))
