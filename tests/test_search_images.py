"""Searches over latents: the engine's own samples, every operation by its formula, and the command on the digits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from rl.cli import main
from rl.estimators.gaussian_step import gaussian_rows
from rl.models.class_policy import new_policy
from rollouts.engines.latent import LatentEngine
from rollouts.latent_trajectory import load_latents
from rollouts.samplers.gaussian import predicted_x0, step_mean
from rollouts.samplers.latent_options import LatentSamplerOptions
from rollouts.samplers.noise import LATENT_STREAM, normal
from rollouts.search.latents import LatentSampler, LatentStates
from rollouts.search.protocol import SearchProblem, fan, split
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
    "guidance": {"scale": 0.5},
    "tds": {"num_particles": 3},
    "noise_gradient": {"num_rounds": 1},
    "failures": {"num_rounds": 1, "num_neighbours": 2},
}


MEAN, SPREAD, WANTED, WIDTH = 0.5, 0.8, 1.6, 0.5  # of the data; of the reward -(x - WANTED)^2 / (2 WIDTH^2)


class GaussianPolicy:
    """The exact model of data N(MEAN, SPREAD^2), of one entry: E[noise | latent]."""

    latent_shape, prediction_type = (1, 1, 1), "epsilon"

    def __init__(self) -> None:
        self.scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        return {"num_inference_steps": num_inference_steps}

    def encode(self, prompts: Any) -> dict[str, torch.Tensor]:
        return {"label": torch.zeros(len(prompts))}

    def num_evaluations(self, guidance_scale: float) -> int:
        return 1

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, *rest: Any) -> torch.Tensor:
        a = self.scheduler.alphas_cumprod.double()[timesteps.long()].reshape(-1, 1, 1, 1)
        return (1 - a).sqrt() * (latents - a.sqrt() * MEAN) / (a * SPREAD**2 + 1 - a)


def gaussian_problem(steps: int) -> tuple[SearchProblem, float, float]:
    """The search, and mean and variance of what the sampler draws, by the recursion of its linear steps."""
    options = LatentSamplerOptions(num_inference_steps=steps, min_std=0.0)
    sampler = LatentSampler(LatentEngine(GaussianPolicy(), options, dtype=torch.float64), ["x"])
    mean, variance = 0.0, 1.0
    for index in range(steps):
        at = torch.tensor([[0.0], [1.0]], dtype=torch.float64).reshape(2, 1, 1, 1)
        output = sampler.engine.predict(at, index, {"label": torch.zeros(2)})
        low, high = step_mean(sampler._table(index, 2), None, output, at).flatten().tolist()
        mean, variance = low + (high - low) * mean, (high - low) ** 2 * variance + sampler.engine.steps.std[index] ** 2

    def score(x: torch.Tensor) -> torch.Tensor:
        return -((x.flatten(1) - WANTED) ** 2).sum(1) / (2 * WIDTH**2)

    def reward(states: LatentStates) -> np.ndarray:
        return score(torch.from_numpy(states.latents[:, -1])).numpy()

    return SearchProblem(sampler, reward, lambda x, states: score(x)), mean, variance


def test_a_guided_step_moves_the_mean_by_the_slope_of_the_predicted_reward() -> None:
    problem, _, _ = gaussian_problem(6)
    sampler: Any = problem.sampler
    states = sampler.step(sampler.start(np.array([0]), np.array([3])))
    after, ratio = sampler.guided_step(states, problem.gradient, 0.7)

    def predicted(latent: float) -> float:
        moved = replace(states, latents=states.latents.copy())
        moved.latents[0, 1] = latent
        return float(problem.reward(sampler.x0_hat(moved))[0])

    at, std, h = float(states.latents[0, 1].item()), float(sampler.engine.steps.std[1]), 1e-5
    shift = std**2 * 0.7 * (predicted(at + h) - predicted(at - h)) / (2 * h)
    plain = sampler.step(states)
    assert after.latents[0, 2].item() - plain.latents[0, 2].item() == pytest.approx(shift, rel=1e-6)
    # The record is the policy's: its mean, and its density of the latent that the proposal drew.
    assert after.mean[0, 1].item() == plain.mean[0, 1].item() and after.at.tolist() == [2]
    z = (after.latents[0, 2].item() - plain.mean[0, 1].item()) / std
    assert after.logprob[0, 1] == pytest.approx(-0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi))
    assert ratio[0] == pytest.approx(-0.5 * z**2 + 0.5 * (z - shift / std) ** 2)


def test_tds_samples_the_posterior_of_a_gaussian() -> None:
    """Data N(m, v) and likelihood N(wanted; x, w^2) / N(0; 0, w^2): evidence and posterior are known."""
    problem, mean, variance = gaussian_problem(6)
    evidence = (1 + variance / WIDTH**2) ** -0.5 * np.exp(-((mean - WANTED) ** 2) / (2 * (variance + WIDTH**2)))
    precision = 1 / variance + 1 / WIDTH**2
    wanted = (mean / variance + WANTED / WIDTH**2) / precision
    count, spread = 800, {}
    row, seed = np.zeros(count, dtype=np.int64), np.arange(count)
    for name in ("tds", "smc"):
        found = search(name, problem, row, seed, {"num_particles": 8, "keep": "all"})
        z = np.exp(found.log_z)
        assert abs(z.mean() - evidence) < 4 * z.std() / count**0.5 < 0.15 * evidence
        spread[name] = z.std()
        x, weight = found.states.latents[:, -1].reshape(count, 8), found.weight.reshape(count, 8) * z[:, None]
        # Self-normalised over all populations, each with its estimate of the evidence.
        posterior = (weight * x).sum() / weight.sum()
        width = (weight * (x - posterior) ** 2).sum() / weight.sum()
        assert posterior == pytest.approx(wanted, abs=0.05) and width == pytest.approx(1 / precision, rel=0.15)
    assert spread["tds"] < 0.7 * spread["smc"]
    # Guidance alone goes towards the reward, and not to the posterior.
    guided = search("guidance", problem, row, seed, {"scale": 1.0})
    assert abs(mean - wanted) > 0.3 and mean + 0.1 < guided.states.latents[:, -1].mean()


def test_gradient_search_ends_at_the_likeliest_noise_of_a_gaussian() -> None:
    """With its further noise fixed a sample is a z + b, so that the best z is that of a quadratic."""
    problem, _, _ = gaussian_problem(6)
    sampler: Any = problem.sampler
    row, seed, scale = np.zeros(8, dtype=np.int64), np.arange(8), 0.6
    start = sampler.start(row, seed)
    z = sampler.noise_of(start).reshape(-1)

    def end(noise: np.ndarray) -> np.ndarray:
        moved = sampler.with_noise(start, noise.reshape(-1, 1, 1, 1))
        return finished(sampler, moved).latents[:, -1].reshape(-1)

    b = end(np.zeros(8))
    a = end(np.ones(8)) - b
    spent = sampler.budget.denoiser_evaluations
    slope = sampler.noise_gradient(start, problem.gradient).reshape(-1)
    np.testing.assert_allclose(slope, -a * (a * z + b - WANTED) / WIDTH**2, rtol=1e-6)
    assert sampler.budget.denoiser_evaluations == spent + 8 * 6
    best = scale * a * (WANTED - b) / WIDTH**2 / (1 + scale * a**2 / WIDTH**2)
    spent, judged = sampler.budget.denoiser_evaluations, sampler.budget.reward_evaluations
    found = search("noise_gradient", problem, row, seed, {"num_rounds": 60, "step_size": 0.2, "scale": scale})
    assert sampler.budget.denoiser_evaluations - spent == 8 * 6 * (1 + 2 * 60)
    assert sampler.budget.reward_evaluations - judged == 8 * (1 + 2 * 60)
    # Those that begin with a lower reward than they end with: they alone keep the end.
    up = np.abs(a * z + b - WANTED) > np.abs(a * best + b - WANTED)
    assert up.sum() >= 4
    np.testing.assert_allclose(sampler.noise_of(found.states).reshape(-1)[up], best[up], atol=1e-4)
    np.testing.assert_allclose(found.reward, problem.reward(found.states))
    assert (found.reward >= problem.reward(finished(sampler, start))).all()


def test_failures_are_what_zero_order_search_finds_for_the_other_sign() -> None:
    problem, _, _ = gaussian_problem(6)
    row, seed, params = np.zeros(5, dtype=np.int64), np.arange(5), {"num_rounds": 3, "num_neighbours": 4}
    found = search("failures", problem, row, seed, params)
    worst = search("noise_zero_order", SearchProblem(problem.sampler, lambda s: -problem.reward(s)), row, seed, params)
    np.testing.assert_array_equal(found.states.latents, worst.states.latents)
    np.testing.assert_allclose(found.reward, problem.reward(found.states))
    first = finished(problem.sampler, problem.sampler.start(row, split(seed, 0)))
    assert (found.reward <= problem.reward(first)).all() and (found.reward < problem.reward(first)).any()


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
    judged = ["reward.functions=[{name: jpeg_compressibility}]", "--output", str(tmp_path / "guided")]
    assert main([*words[:-2], *judged, "--search", "guidance"]) == 2
    assert "reward 'jpeg_compressibility' has no gradient to images" in capsys.readouterr().err


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
