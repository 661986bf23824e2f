"""Searches against exact laws on a space of 27 samples, bit for bit against the engine, and by hand counts.

The target of every search with a temperature alpha is the tilted law p(x) exp(r(x) / alpha) / Z; p comes from the
enumeration of tests/test_exact_toy.py, and each search is held to the law that theory gives *it* where one is known
(best-of-N, SVDD, guidance) and to the tilted law in the limit where not.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.shared import SharedForwards
from rollouts.samplers.options import SamplerOptions
from rollouts.search.options import parse_search
from rollouts.search.protocol import Problem, SearchResult, fan
from rollouts.search.run import search
from rollouts.search.tokens import TokenSampler, TokenStates
from tests.test_exact_toy import PROMPT, World, enumerate_world

ALPHA = 0.5


@dataclass
class Toy:
    """Three positions of three tokens, one revealed per step in an order that no draw changes.

    Attributes:
        p, reward: float64 [27], law and reward of every sample, in the order of `index`.
    """

    world: World
    p: np.ndarray
    reward: np.ndarray
    index: dict[tuple[int, ...], int]
    soft: torch.Tensor | None = None

    def problem(self, prompts: int = 1, **changes: Any) -> Problem:
        model = SharedForwards(self.world.model)
        engine = InProcessEngine(model, self.world.options.model_copy(update=changes), max_batch_size=100_000)
        return Problem(TokenSampler(engine, [PROMPT] * prompts), lambda states: self.reward[self.place(states)])

    def place(self, states: TokenStates) -> np.ndarray:
        return np.array([self.index[tuple(x)] for x in states.canvas[:, len(PROMPT) :].tolist()])

    @property
    def tilted(self) -> np.ndarray:
        weight = self.p * np.exp(self.reward / ALPHA)
        return weight / weight.sum()

    def run(self, name: str, count: int, **params: Any) -> SearchResult:
        problem = self.problem()
        return search(name, problem, np.zeros(count), np.arange(count), parse_search(name, params))

    def law(self, result: SearchResult) -> np.ndarray:
        weight = np.ones(len(result.request)) if result.weight is None else result.weight
        return np.bincount(self.place(result.states), weight, len(self.p)) / weight.sum()


@pytest.fixture(scope="module")
def toy(make_model) -> Toy:
    options = SamplerOptions(gen_length=3, num_inference_steps=3, score="neg_entropy")
    return make_toy(make_model("gpt2-full", vocab_size=4, seed=3, scale=1.0), options)


def make_toy(model: Any, options: SamplerOptions) -> Toy:
    world = enumerate_world(model, options)
    samples = [tuple(t.final_canvas()[len(PROMPT) :].tolist()) for t in world.trajectories]
    reward = np.random.default_rng(5).normal(size=len(samples))
    return Toy(world, world.probability.detach().numpy(), reward, {x: i for i, x in enumerate(samples)})


def assert_follows(counts: np.ndarray, expected: np.ndarray, n: int) -> None:
    """Chi-square of observed frequencies against an exact law: mean k, standard deviation sqrt(2 k)."""
    likely = n * expected > 5
    chi_square = (n * (counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert likely.sum() >= 4
    assert chi_square < likely.sum() + 5 * math.sqrt(2 * likely.sum())


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(one - other).sum() / 2)


# --- the sampler ------------------------------------------------------------------------------------------------------

DECODERS: dict[str, dict[str, Any]] = {
    "confidence": {},
    "threshold": {"selector": "threshold", "threshold": 0.6, "temperature": 0.8},
    "semi-autoregressive": {"block_length": 4, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
    "random order": {"score": "random"},
    "dream": {"preset": "dream_maskgit_plus", "num_inference_steps": 12},
    "dream origin": {"preset": "dream_origin"},
    "end tokens late": {"preset": "eoser_ass"},
}


@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.parametrize("family", ["gpt2-full", "gpt2-full-shifted", "gpt2-block4"])
def test_stepping_to_the_end_is_the_engine(make_model, family: str, decoder: str) -> None:
    """Ragged prompts, end tokens, chunks smaller than the batch: the same trajectories to the last bit but rounding."""
    options = SamplerOptions(**{"gen_length": 8, "num_inference_steps": 4, **DECODERS[decoder]})
    engine = InProcessEngine(make_model(family), options, eos_token_id=0, max_batch_size=4)
    prompts = [[1 + (7 * n + 3 * i) % 10 for i in range(n)] for n in range(1, 10)]
    expected = engine.generate([Request(ids, 100 + i) for i, ids in enumerate(prompts)])
    sampler = TokenSampler(engine, prompts)
    states = Problem(sampler, lambda s: []).finish(sampler.start(np.arange(9), 100 + np.arange(9)))
    for ours, theirs in zip(sampler.trajectories(states), expected, strict=True):
        ours.validate()
        assert (ours.num_steps, ours.length, ours.stop_length) == (theirs.num_steps, theirs.length, theirs.stop_length)
        for name in ("prompt_ids", "step", "position", "token"):
            assert (getattr(ours, name) == getattr(theirs, name)).all(), name
        np.testing.assert_allclose(ours.logprob, theirs.logprob, rtol=0, atol=1e-12)
        np.testing.assert_allclose(ours.confidence, theirs.confidence, rtol=0, atol=1e-6)
        assert (ours.block_length, ours.block_origin) == (theirs.block_length, theirs.block_origin)
        assert (ours.sampler, ours.decoder, ours.seed) == (theirs.sampler, theirs.decoder, theirs.seed)
    assert sampler.budget.denoiser_evaluations == sum(t.num_steps for t in expected)


@pytest.mark.parametrize("settings", [{"preset": "rcr"}, {"preset": "remdm"}, {"cfg_scale": 1.0}])
def test_a_decoder_that_revises_or_guides_is_refused(make_model, settings: dict[str, Any]) -> None:
    engine = InProcessEngine(make_model("gpt2-full"), SamplerOptions(gen_length=4, **settings))
    with pytest.raises(ValueError, match=r"set sampler\.reviser to none and sampler\.cfg_scale to 0"):
        TokenSampler(engine, [[1, 2]])


def test_candidates_are_the_steps_of_their_seeds(toy: Toy) -> None:
    sampler = toy.problem().sampler
    states = sampler.step(sampler.start(np.zeros(5, dtype=np.int64), np.arange(5)))
    before = sampler.budget.denoiser_evaluations
    seeds = 1000 + np.arange(15).reshape(5, 3)
    together = sampler.candidates(states, seeds)
    assert sampler.budget.denoiser_evaluations == before + 5
    for j in range(3):
        alone = sampler.step(sampler.reseed(states, seeds[:, j]))
        assert (alone.canvas == together.canvas[j::3]).all()
        assert together.seed[j::3].tolist() == seeds[:, j].tolist()
    # The state they came from is untouched.
    assert (states.canvas == toy.world.model.mask_token_id).sum() == 5 * 2


def test_a_finished_state_costs_nothing_and_stays(toy: Toy) -> None:
    problem = toy.problem()
    states = problem.finish(problem.sampler.start(np.zeros(4, dtype=np.int64), np.arange(4)))
    spent = problem.budget.denoiser_evaluations
    assert spent == 4 * 3
    again = [
        problem.sampler.step(states),
        problem.sampler.x0_hat(states),
        problem.sampler.candidates(states, np.zeros((4, 1), dtype=np.int64)),
    ]
    assert all((other.canvas == states.canvas).all() and other.done.all() for other in again)
    assert problem.budget.denoiser_evaluations == spent


def test_x0_hat_is_the_most_likely_fill(toy: Toy) -> None:
    sampler = toy.problem().sampler
    states = sampler.step(sampler.start(np.zeros(6, dtype=np.int64), np.arange(6)))
    fills = sampler.x0_hat(states)
    best = toy.world.model(states.canvas).argmax(-1)
    masked = states.canvas == toy.world.model.mask_token_id
    assert (fills.canvas == torch.where(masked, best, states.canvas)).all()
    for trajectory in sampler.trajectories(fills):
        trajectory.validate()


@pytest.mark.parametrize(("num_steps", "masks"), [(1, 4), (2, 6), (3, 8), (9, 8)])
@pytest.mark.parametrize("family", ["gpt2-full", "gpt2-block4"])
def test_renoising_goes_back_in_the_schedule(make_model, family: str, num_steps: int, masks: int) -> None:
    """8 positions in 4 steps, or the last block of 4 in 2: after 3 of 4 (or all) steps, back by `num_steps`."""
    model = make_model(family)
    block = family == "gpt2-block4"
    options = SamplerOptions(gen_length=8, num_inference_steps=4)
    sampler = TokenSampler(InProcessEngine(model, options), [[1, 2, 3, 4]])
    states = sampler.start(np.zeros(50, dtype=np.int64), np.arange(50))
    for _ in range(4 if block else 3):
        states = sampler.step(states)
    noised = sampler.renoise(states, num_steps, 500 + np.arange(50))
    masked = noised.canvas == model.mask_token_id
    assert (masked.sum(-1) == (min(2 * num_steps, 4) if block else masks)).all()
    assert not masked[:, : 8 if block else 4].any()
    assert not noised.done.any()
    assert (noised.canvas == states.canvas)[~masked].all()
    # Not always the same ones.
    assert block or num_steps > 2 or len(torch.unique(masked, dim=0)) > 10
    ends = Problem(sampler, lambda s: []).finish(noised)
    for i, trajectory in enumerate(sampler.trajectories(ends)):
        trajectory.validate()
        assert (trajectory.final_canvas() == ends.canvas[i].numpy()).all()
        # What was masked again replays as it was.
        assert (trajectory.canvas_at(int(noised.step[i])) == noised.canvas[i].numpy()).all()


def test_a_neighbour_redraws_a_share_of_the_noise(toy: Toy) -> None:
    sampler = toy.problem().sampler
    states = sampler.start(np.zeros(200, dtype=np.int64), np.zeros(200, dtype=np.int64))
    for share, count in ((0.01, 1), (0.34, 1), (0.5, 2), (1.0, 3)):
        near = sampler.perturb(states, share, np.arange(200))
        moved = near.noise != states.noise
        assert (moved.sum(-1) == count).all()
        assert not moved[:, : len(PROMPT)].any()
        assert len(torch.unique(moved, dim=0)) == math.comb(3, count)
    again = sampler.perturb(states, 0.5, np.arange(200))
    assert (again.noise == sampler.perturb(states, 0.5, np.arange(200)).noise).all()


def test_seeds_do_not_collide() -> None:
    seeds = fan(np.arange(100), 100)
    assert len(np.unique(seeds)) == 10_000
    assert seeds.min() >= 0


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_best_of_n_has_the_law_of_the_largest_order_statistic(toy: Toy, count: int) -> None:
    below = np.array([toy.p[toy.reward < r].sum() for r in toy.reward])
    exact = (below + toy.p) ** count - below**count
    assert exact.sum() == pytest.approx(1.0, abs=1e-12)
    result = toy.run("best_of_n", 2000, num_samples=count)
    assert (result.reward == toy.reward[toy.place(result.states)]).all()
    assert_follows(toy.law(result), exact, 2000)


def svdd_law(toy: Toy, count: int, alpha: float) -> np.ndarray:
    """The exact law of SVDD with the posterior-mean value, by enumerating all candidate sets of every state."""
    model, samples = toy.world.model, np.array(list(toy.index))
    law = np.zeros(len(samples))

    def value(known: np.ndarray) -> float:
        canvas = torch.tensor([[*PROMPT, *known]])
        fill = torch.where(canvas == model.mask_token_id, model(canvas).argmax(-1), canvas)
        return float(toy.reward[toy.index[tuple(fill[0, len(PROMPT) :].tolist())]])

    def descend(known: np.ndarray, probability: float) -> None:
        masked = known == model.mask_token_id
        if not masked.any():
            law[toy.index[tuple(known.tolist())]] += probability
            return
        same = (samples[:, ~masked] == known[~masked]).all(1)
        trajectory = toy.world.trajectories[int(np.flatnonzero(same)[0])]
        place = int(trajectory.position[int((~masked).sum())]) - len(PROMPT)
        after = [known.copy() for _ in range(3)]
        for token in range(3):
            after[token][place] = token
        p = np.array([toy.p[same & (samples[:, place] == token)].sum() for token in range(3)])
        p /= p.sum()
        values = np.array([value(x) for x in after])
        taken = np.zeros(3)
        for drawn in itertools.product(range(3), repeat=count):
            v = values[list(drawn)]
            weight = np.exp((v - v.max()) / alpha) if alpha else (np.arange(count) == v.argmax()).astype(float)
            np.add.at(taken, list(drawn), p[list(drawn)].prod() * weight / weight.sum())
        for token in range(3):
            descend(after[token], probability * taken[token])

    descend(np.full(3, model.mask_token_id), 1.0)
    return law


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
@pytest.mark.parametrize("count", [1, 3])
def test_svdd_has_its_enumerated_law(toy: Toy, count: int, alpha: float) -> None:
    exact = svdd_law(toy, count, alpha)
    assert exact.sum() == pytest.approx(1.0, abs=1e-9)
    if count == 1:
        np.testing.assert_allclose(exact, toy.p, rtol=0, atol=1e-9)
    result = toy.run("svdd", 2000, num_candidates=count, alpha=alpha)
    assert (result.reward == toy.reward[toy.place(result.states)]).all()
    assert_follows(toy.law(result), exact, 2000)


def test_svdd_approaches_the_tilted_law_with_candidates_and_rollouts(toy: Toy) -> None:
    """Only with the exact soft value is it the limit; rollouts estimate that value."""
    far = toy.run("svdd", 600, num_candidates=2, alpha=ALPHA, value="monte_carlo")
    near = toy.run("svdd", 600, num_candidates=10, alpha=ALPHA, value="monte_carlo", num_rollouts=6)
    assert distance(toy.law(far), toy.tilted) > 0.15
    assert distance(toy.law(near), toy.tilted) < 0.09
