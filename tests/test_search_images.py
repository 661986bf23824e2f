"""Searches over latents: the engine's own samples, every operation by its formula, and the command on the digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl.cli import main
from rl.estimators.gaussian_step import gaussian_rows
from rl.models.class_policy import new_policy
from rollouts.engines.latent import LatentEngine
from rollouts.latent_trajectory import load_latents
from rollouts.samplers.gaussian import predicted_x0
from rollouts.samplers.latent_options import LatentSamplerOptions
from rollouts.samplers.noise import LATENT_STREAM, normal
from rollouts.search.latents import LatentSampler, LatentStates
from rollouts.search.protocol import SearchProblem, fan
from tests.image_models import CLASSES, FLOW, rollouts, tiny_policy
from tests.test_images import image_config
from tests.test_search import search

OPTIONS = LatentSamplerOptions(num_inference_steps=5, guidance_scale=2.0, min_std=0.02)
FLOW_OPTIONS = LatentSamplerOptions(kind="flow_sde", num_inference_steps=5, guidance_scale=2.0)
BOTH = pytest.mark.parametrize("options", [OPTIONS, FLOW_OPTIONS], ids=["ddim", "flow"])


def sampler_of(options: LatentSamplerOptions = OPTIONS) -> LatentSampler:
    policy = tiny_policy(FLOW if options.kind == "flow_sde" else None)
    return LatentSampler(LatentEngine(policy, options, dtype=torch.float64), CLASSES)


def finished(sampler: LatentSampler, states: LatentStates) -> LatentStates:
    return SearchProblem(sampler, lambda states: np.zeros(len(states))).finish(states)


def draw(seed: int, step: int) -> np.ndarray:
    return normal(torch.tensor(seed), torch.tensor(step), torch.arange(9), LATENT_STREAM).reshape(1, 3, 3).numpy()


@BOTH
def test_starting_and_finishing_gives_the_engines_rollouts(options: LatentSamplerOptions) -> None:
    sampler = sampler_of(options)
    records = sampler.trajectories(finished(sampler, sampler.start(np.arange(3), np.arange(10, 13))))
    for ours, engines in zip(records, rollouts(sampler.engine.model, options), strict=True):  # type: ignore[arg-type]
        ours.validate()
        for name in ("latents", "mean", "logprob", "std", "coefficients", "seed"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(engines, name))
        assert ours.sampler == engines.sampler
    assert sampler.budget.denoiser_evaluations == 3 * 5 * 2  # guidance runs the network twice


def test_states_at_different_steps_move_together() -> None:
    sampler = sampler_of()
    states = sampler.start(np.array([0, 1, 2]), np.array([1, 2, 3]))
    one = sampler.step(states.select(np.array([1])))
    ended = finished(sampler, states.select(np.array([2])))
    spent = sampler.budget.denoiser_evaluations
    together = sampler.step(sampler.join([states.select(np.array([0])), one, ended]))
    assert together.at.tolist() == [1, 2, 5] and sampler.budget.denoiser_evaluations == spent + 2 * 2
    alone = sampler.join([sampler.step(states.select(np.array([0]))), sampler.step(one), ended])
    np.testing.assert_allclose(together.latents, alone.latents, rtol=0, atol=1e-12)


def test_candidates_share_a_forward_and_differ_in_their_noise() -> None:
    sampler = sampler_of()
    states = sampler.step(sampler.start(np.array([0, 1]), np.array([1, 2])))
    spent = sampler.budget.denoiser_evaluations
    seeds = fan(np.array([7, 8]), 3)
    moved = sampler.candidates(states, seeds)
    assert sampler.budget.denoiser_evaluations == spent + 2 * 2
    assert moved.row.tolist() == [0, 0, 0, 1, 1, 1] and moved.seed.tolist() == seeds.reshape(-1).tolist()
    mean = moved.mean[:, 1]
    np.testing.assert_array_equal(mean[0], mean[2])
    for place, seed in enumerate(seeds.reshape(-1).tolist()):
        expected = mean[place] + sampler.engine.steps.std[1] * draw(seed, 2)
        np.testing.assert_allclose(moved.latents[place, 2], expected, rtol=0, atol=1e-12)


@BOTH
def test_the_look_ahead_is_the_models_prediction_of_the_data(options: LatentSamplerOptions) -> None:
    sampler = sampler_of(options)
    states = sampler.step(sampler.start(np.array([0, 1]), np.array([1, 2])))
    ahead = sampler.x0_hat(states)
    latent = torch.from_numpy(states.latent)
    given = sampler.engine.model.encode(CLASSES[:2])
    with torch.no_grad():
        output = sampler.engine.model.predict(latent, torch.full((2,), sampler.engine.steps.timestep[1]), given, 2.0)
    table = torch.from_numpy(sampler.engine.steps.coefficients[1]).expand(2, -1)
    assert ahead.done.all()
    np.testing.assert_allclose(ahead.latents[:, -1], predicted_x0(table, None, output, latent), rtol=0, atol=1e-12)


@BOTH
def test_noising_back_follows_the_forward_process(options: LatentSamplerOptions) -> None:
    """A latent s x + n z becomes s' x + n' z'': its factor of the data is s', its noise has the variance n'^2."""
    sampler = sampler_of(options)
    states = sampler.start(np.array([0]), np.array([1]))
    for _ in range(4):
        states = sampler.step(states)
    s, n = sampler.signal, sampler.noise_level
    back = sampler.renoise(states, 2, np.array([50]))
    keep = s[2] / s[4]
    added = back.latent - keep * states.latent
    np.testing.assert_allclose(added, (n[2] ** 2 - (keep * n[4]) ** 2) ** 0.5 * draw(50, 0)[None], rtol=0, atol=1e-12)
    assert (np.diff(s) > 0).all() and (np.diff(n) < 0).all()
    # The schedule's own words: alpha-bar of the timestep, or the time of the flow.
    if options is OPTIONS:
        np.testing.assert_allclose(s**2 + n**2, 1)
    else:
        np.testing.assert_allclose(s + n, 1)
        np.testing.assert_allclose(n, sampler.engine.model.scheduler.sigmas[[0]].tolist() + n[1:].tolist(), atol=1e-6)
    # From the start on it is noise alone, and what was recorded behind is gone.
    assert sampler.renoise(states, 9, np.array([3])).at.tolist() == [0]
    assert not back.latents[0, 3:].any() and not back.logprob[0, 2:].any()


def test_neighbours_are_standard_noise_again() -> None:
    sampler = sampler_of()
    states = sampler.start(np.array([0]), np.array([1]))
    near = sampler.perturb(states, 0.36, np.array([9]))
    np.testing.assert_allclose(near.latent[0], 0.8 * draw(1, 0) + 0.6 * draw(9, 0), rtol=0, atol=1e-12)
    assert near.seed.tolist() == [1]


def test_best_of_n_keeps_the_best_and_its_record_can_be_trained_on() -> None:
    sampler = sampler_of()

    def reward(states: LatentStates) -> np.ndarray:
        return states.latents[:, -1].reshape(len(states), -1).sum(1)

    row, seed = np.array([0, 1]), np.array([4, 5])
    every = finished(sampler, sampler.start(np.repeat(row, 6), fan(seed, 6).reshape(-1)))
    best = reward(every).reshape(2, 6).max(1)
    found = search("best_of_n", SearchProblem(sampler, reward), row, seed, {"num_samples": 6})
    np.testing.assert_allclose(found.reward, best)
    # Paths are noised back and denoised again: what is recorded still is the policy's own density.
    params = {"num_paths": 2, "num_renoisings": 2, "start_steps": 2}
    found = search("noise_paths", SearchProblem(sampler, reward), row, seed, params)
    records = sampler.trajectories(found.states)
    for record in records:
        record.validate()
    rows: Any = gaussian_rows(records, reduce="sum")
    logprob = rows.score(sampler.engine.model).logprob
    torch.testing.assert_close(logprob.detach(), rows.sampler_logprob, rtol=0, atol=1e-8)


SEARCHES: dict[str, dict[str, Any]] = {
    "best_of_n": {"num_samples": 3},
    "noise_zero_order": {"num_rounds": 2, "num_neighbours": 2},
    "noise_paths": {"num_paths": 2, "num_renoisings": 2},
    "svdd": {"num_candidates": 2},
    "smc": {"num_particles": 3},
    "dts": {"num_iterations": 3},
}


def test_the_command_searches_and_samples_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_policy({"width": 24, "num_blocks": 1}, {}, "0123456789", 0).save_pretrained(tmp_path / "base")
    arguments = image_config(tmp_path, f"model.path={tmp_path / 'base'}", "algorithm={name: ddpo}")
    assert main(["rollout", *arguments, "--num-prompts", "2", "--output", str(tmp_path / "plain")]) == 0
    assert len(load_latents(tmp_path / "plain" / "trajectories.npz")) == len(_lines(tmp_path / "plain"))
    for name, params in SEARCHES.items():
        out = tmp_path / name
        words = ["rollout", *arguments, "--num-prompts", "2", "--group-size", "1", "--output", str(out)]
        assert main([*words, "--search", name, "--search-params", json.dumps(params)]) == 0
        lines, summary = _lines(out), json.loads((out / "search.json").read_text())
        assert len(lines) == len(load_latents(out / "trajectories.npz")) == summary["num_samples"] == 2
        assert lines[0]["completion"].startswith("data:image/png;base64,")
        if name == "best_of_n":
            spent = summary["budget"]
            assert (spent["denoiser_evaluations"], spent["reward_evaluations"]) == (2 * 3 * 6, 2 * 3)
    capsys.readouterr()
    assert main([*words[:-1], str(tmp_path / "guided"), "--search", "guidance"]) == 2
    assert "--search guidance follows a reward's gradient in text only" in capsys.readouterr().err


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
