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

from rl.evaluation.search import parse_search
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.shared import SharedForwards
from rollouts.samplers.options import SamplerOptions
from rollouts.search.protocol import SearchProblem, SearchResult, fan
from rollouts.search.smc import systematic
from rollouts.search.tokens import TokenSampler, TokenStates
from rollouts.search.tree import Dts, Node, TreeSearch, grow, sampled_child
from rollouts.search.values import soft_mean
from tests.test_exact_toy import PROMPT, World, enumerate_world

ALPHA = 0.5


def search(name: str, problem: SearchProblem, row: Any, seed: Any, params: dict[str, Any]) -> SearchResult:
    """M searches of one kind, by name."""
    return parse_search(name, params).run(problem, np.array(row, dtype=np.int64), np.array(seed, dtype=np.int64))


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

    def problem(self, prompts: int = 1, **changes: Any) -> SearchProblem:
        model = SharedForwards(self.world.model)
        engine = InProcessEngine(model, self.world.options.model_copy(update=changes), max_batch_size=100_000)
        return SearchProblem(TokenSampler(engine, [PROMPT] * prompts), lambda states: self.reward[self.place(states)])

    def place(self, states: TokenStates) -> np.ndarray:
        return np.array([self.index[tuple(x)] for x in states.canvas[:, len(PROMPT) :].tolist()])

    @property
    def tilted(self) -> np.ndarray:
        weight = self.p * np.exp(self.reward / ALPHA)
        return weight / weight.sum()

    def run(self, name: str, count: int, **params: Any) -> SearchResult:
        problem = self.problem()
        return search(name, problem, np.zeros(count), np.arange(count), params)

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
    states = SearchProblem(sampler, lambda s: []).finish(sampler.start(np.arange(9), 100 + np.arange(9)))
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
    ends = SearchProblem(sampler, lambda s: []).finish(noised)
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


def test_systematic_resampling_is_unbiased_for_every_weight() -> None:
    """Integrated over u exactly: the copies are constant between the points where some k/P - u/P meets the cdf."""
    log_weight = np.log(np.array([[0.05, 0.35, 0.15, 0.45]]))
    breaks = np.unique(np.concatenate([[0.0, 1.0], (np.exp(log_weight[0]).cumsum() * 4) % 1.0]))
    expected = np.zeros(4)
    for low, high in itertools.pairwise(breaks):
        index = systematic(log_weight, np.array([(low + high) / 2]))[0]
        copies = np.bincount(index, minlength=4)
        assert np.all(np.abs(copies - 4 * np.exp(log_weight[0])) < 1)
        expected += (high - low) * copies
    np.testing.assert_allclose(expected, 4 * np.exp(log_weight[0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("params", [{}, {"resample_below": 1.0}, {"resample_below": 0.0}, {"value": "none"}], ids=str)
def test_smc_estimates_the_normaliser_without_bias(toy: Toy, params: dict[str, Any]) -> None:
    """With as few as 4 particles, resampling never, sometimes or always, and with any value on the way."""
    z = (toy.p * np.exp(toy.reward / ALPHA)).sum()
    result = toy.run("smc", 1500, num_particles=4, alpha=ALPHA, **params)
    assert result.log_z is not None
    estimates = np.exp(result.log_z)
    error = estimates.std(ddof=1) / math.sqrt(len(estimates))
    assert error < 0.05 * z
    assert abs(estimates.mean() - z) < 4 * error


def test_smc_approaches_the_tilted_law_with_particles(toy: Toy) -> None:
    gaps = []
    for count, particles in ((2000, 2), (500, 16), (40, 512)):
        result = toy.run("smc", count, num_particles=particles, alpha=ALPHA, keep="all")
        assert result.weight is not None
        np.testing.assert_allclose(np.bincount(result.request, result.weight), 1.0, rtol=0, atol=1e-12)
        gaps.append(distance(toy.law(result), toy.tilted))
    assert gaps[0] > 2 * gaps[1] and gaps[1] > 2 * gaps[2]
    assert gaps[2] < 0.02
    # One particle drawn by weight has the same law.
    one = toy.run("smc", 500, num_particles=16, alpha=ALPHA)
    assert (one.reward == toy.reward[toy.place(one.states)]).all()
    assert distance(toy.law(one), toy.tilted) < gaps[1] + 0.08


# --- gradients --------------------------------------------------------------------------------------------------------


class Independent:
    """Positions that know nothing of each other: the tilted law of a linear reward is then a product."""

    mask_token_id, attention, block_length, logit_shift, max_length = 3, "full", None, 0, 64

    def __init__(self, logits: torch.Tensor):
        self.logits = logits

    def hidden_states(self, input_ids, *, visible=None, position_ids=None, cache=None):
        hidden = torch.nn.functional.one_hot(torch.arange(input_ids.shape[1]), 6).double()
        return hidden.expand(len(input_ids), -1, -1)

    def token_logits(self, hidden):
        return hidden @ self.logits


LINEAR = torch.tensor(np.random.default_rng(2).normal(size=(3, 4)))


def linear_problem(model: Any, selector: str = "left_most", score: str = "probability") -> SearchProblem:
    """Reward sum of w[position, token], as a sum over one-hots and over finished samples."""
    options = SamplerOptions(gen_length=3, num_inference_steps=3, selector=selector, score=score)
    sampler = TokenSampler(InProcessEngine(model, options, max_batch_size=1000), [PROMPT])

    def reward(states: TokenStates) -> np.ndarray:
        return LINEAR[torch.arange(3), states.canvas[:, 3:]].sum(-1).numpy()

    return SearchProblem(sampler, reward, lambda soft, states: (soft * LINEAR).sum((1, 2)))


def independent() -> Independent:
    logits = torch.tensor(np.random.default_rng(1).normal(size=(6, 4)))
    logits[:, 3] = -1e9
    return Independent(logits)


@pytest.mark.parametrize("order", ["left_most", "top_n"])
def test_guidance_on_a_linear_reward_and_independent_positions_is_the_tilted_law(order: str) -> None:
    """Also when the order is read from the draws: it then depends on them, the law of the sample does not."""
    model = independent()
    problem = linear_problem(model, order, "random")
    n = 3000
    options = {"scale": 1 / ALPHA}
    result = search("guidance", problem, np.zeros(n), np.arange(n), options)
    exact = torch.softmax(model.logits[3:, :3] + LINEAR[:, :3] / ALPHA, -1).numpy()
    product = np.einsum("a,b,c->abc", *exact).reshape(-1)
    place = (result.states.canvas[:, 3:].numpy() * [9, 3, 1]).sum(-1)
    assert_follows(np.bincount(place, minlength=27) / n, product, n)
    assert (problem.budget.denoiser_evaluations, problem.budget.reward_evaluations) == (n * 3, n * 4)


@pytest.mark.parametrize(("selector", "score"), [("left_most", "probability"), ("top_n", "neg_entropy")])
def test_tds_with_the_exact_proposal_has_no_variance(selector: str, score: str) -> None:
    """p / q of the steps and the reward at the end make every weight the normaliser itself."""
    model = independent()
    problem = linear_problem(model, selector, score)
    options = {"alpha": ALPHA, "num_particles": 3, "value": "none", "keep": "all", "resample_below": 0}
    result = search("tds", problem, np.zeros(20), np.arange(20), options)
    log_p = torch.log_softmax(model.logits[3:, :3], -1)
    log_z = torch.logsumexp(log_p + LINEAR[:, :3] / ALPHA, -1).sum().item()
    assert result.log_z is not None and result.weight is not None
    np.testing.assert_allclose(result.log_z, log_z, rtol=0, atol=1e-10)
    np.testing.assert_allclose(result.weight, 1 / 3, rtol=0, atol=1e-10)


def soft_table(toy: Toy) -> Any:
    """The toy's reward as a polynomial of one-hots: E of the table under the soft positions."""
    table = torch.zeros(4, 4, 4, dtype=torch.float64)
    for sample, index in toy.index.items():
        table[sample] = toy.reward[index]
    return lambda soft, states: torch.einsum("abc,na,nb,nc->n", table, *soft.unbind(1))


@pytest.mark.parametrize("score", ["neg_entropy", "probability"])
def test_tds_is_unbiased_whatever_the_order_and_the_guidance(toy: Toy, score: str) -> None:
    """With an order read from the draws, those thrown away count in p / q; leaving them out would bias it."""
    own = toy.problem(score=score)
    problem = SearchProblem(own.sampler, own.reward, soft_table(toy))
    plain = toy.world
    if score == "probability":
        plain = enumerate_world(toy.world.model, toy.world.options.model_copy(update={"score": score}))
    samples = [toy.index[tuple(t.final_canvas()[3:].tolist())] for t in plain.trajectories]
    p = np.bincount(samples, plain.probability.detach().numpy(), 27)
    z = (p * np.exp(toy.reward / ALPHA)).sum()
    options = {"alpha": ALPHA, "num_particles": 8, "scale": 1.0}
    result = search("tds", problem, np.zeros(1500), np.arange(1500), options)
    assert result.log_z is not None
    estimates = np.exp(result.log_z)
    error = estimates.std(ddof=1) / math.sqrt(len(estimates))
    assert error < 0.03 * z
    assert abs(estimates.mean() - z) < 4 * error


def test_the_guidance_gradient_is_that_of_finite_differences_at_the_probabilities(toy: Toy) -> None:
    own = toy.problem()
    reward = soft_table(toy)
    problem = SearchProblem(own.sampler, own.reward, reward)
    seen: list[tuple[torch.Tensor, torch.Tensor, TokenStates]] = []

    def gradient(soft: torch.Tensor, states: TokenStates) -> torch.Tensor:
        seen.append((soft.clone(), problem.gradient(soft, states), states))
        return seen[-1][1]

    states = problem.sampler.step(problem.sampler.start(np.zeros(5, dtype=np.int64), np.arange(5)))
    problem.sampler.guided_step(states, gradient, 1.0)
    soft, slope, at = seen[0]
    probabilities = torch.softmax(toy.world.model(at.canvas).detach()[:, 3:], -1)
    known = at.canvas[:, 3:] != toy.world.model.mask_token_id
    one_hot = torch.nn.functional.one_hot(at.canvas[:, 3:], 4).double()
    torch.testing.assert_close(soft, torch.where(known[..., None], one_hot, probabilities), rtol=0, atol=1e-12)
    for place in itertools.product(range(5), range(3), range(4)):
        step = torch.zeros_like(soft)
        step[place] = 1e-5
        numeric = (reward(soft + step, at) - reward(soft - step, at))[place[0]] / 2e-5
        assert slope[place].item() == pytest.approx(numeric.item(), abs=1e-8)


def test_guidance_says_what_it_needs(toy: Toy) -> None:
    with pytest.raises(ValueError, match="needs a differentiable reward"):
        toy.run("guidance", 2)
    cold = toy.problem(temperature=0.0)
    problem = SearchProblem(cold.sampler, cold.reward, soft_table(toy))
    with pytest.raises(ValueError, match=r"set sampler\.temperature > 0"):
        search("guidance", problem, np.zeros(2), np.arange(2), {})


# --- trees ------------------------------------------------------------------------------------------------------------


def test_tree_sampling_approaches_the_tilted_law_as_the_tree_grows(toy: Toy) -> None:
    """Exactly: the law of what a finished tree gives, and not of samples from it."""

    def law(node: Node, probability: float, into: np.ndarray) -> np.ndarray:
        if node.done:
            into[toy.place(node.batch.select(np.array([node.index])))[0]] += probability
            return into
        values = np.array([child.value for child in node.children])
        weight = np.array(node.draws) * np.exp((values - values.max()) / ALPHA)
        for child, share in zip(node.children, weight / weight.sum(), strict=True):
            law(child, probability * share, into)
        return into

    gaps = []
    for iterations in (10, 80, 600):
        options = Dts(num_iterations=iterations, alpha=ALPHA)
        rows = np.zeros(4, dtype=np.int64)
        roots, _ = grow(toy.problem(), rows, np.arange(4), options, sampled_child(ALPHA))
        gaps.append(np.mean([distance(law(root, 1.0, np.zeros(27)), toy.tilted) for root in roots]))
    assert gaps[0] > 1.5 * gaps[1] and gaps[1] > 1.5 * gaps[2]
    assert gaps[2] < 0.09


def test_samples_of_a_tree_are_leaves_with_their_rewards(toy: Toy) -> None:
    result = toy.run("dts", 100, num_iterations=30, alpha=ALPHA, num_samples=10)
    assert (result.reward == toy.reward[toy.place(result.states)]).all()
    assert result.request.tolist() == np.repeat(np.arange(100), 10).tolist()
    assert distance(toy.law(result), toy.tilted) < distance(toy.p, toy.tilted) / 4


def test_tree_search_finds_the_maximum_as_the_tree_grows(make_model) -> None:
    """Over a policy that gives the best sample with probability 0.008."""
    toy = make_toy(
        make_model("gpt2-full", vocab_size=4, seed=3, scale=1.0),
        SamplerOptions(gen_length=3, num_inference_steps=3, score="neg_entropy", temperature=2.0),
    )
    means = []
    for iterations in (1, 10, 100, 500):
        result = toy.run("dts_star", 6, num_iterations=iterations)
        means.append(result.reward.mean())
    assert means == sorted(means)
    assert (result.reward == toy.reward.max()).all()


def test_tree_values_are_backed_up_by_a_uniform_mean() -> None:
    """Worked out by hand: children of values 0 and 2, the second visited more often, alpha 1."""
    node = Node(None, 0, -1)
    for key, value, visits in (("a", 0.0, 1), ("b", 2.0, 7)):
        child = node.drawn(None, 0, key)
        child.value, child.visits = value, visits
    node.back_up(TreeSearch(alpha=1.0))
    assert node.value == pytest.approx(math.log((1 + math.e**2) / 2), abs=1e-12)
    node.back_up(TreeSearch(alpha=1.0, backup="max"))
    assert (node.value, node.visits) == (2.0, 2)
    # C n^a children after n visits: 2 * 2^0.8 = 3.48.
    assert not node.is_full(TreeSearch())
    assert node.drawn(None, 0, "b") is node.children[1] and node.drawn(None, 0, "b") is node.children[1]
    assert node.is_full(TreeSearch())
    # An equal draw is the same child, and counts again.
    node.back_up(TreeSearch(alpha=1.0))
    assert node.value == pytest.approx(math.log((1 + 3 * math.e**2) / 4), abs=1e-12)


def test_a_tree_branches_only_where_it_may(toy: Toy) -> None:
    problem = toy.problem()
    options = Dts(num_iterations=40, branch_steps=[1])
    roots, _ = grow(problem, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), options, sampled_child(1.0))
    assert roots[0].draws == [1]
    middle = roots[0].children[0]
    assert len(middle.children) > 1 and sum(middle.draws) > 10
    assert all(child.draws == [1] for child in middle.children)
    # A forward per draw, and a verdict per finished sample, however often it was reached.
    leaves = len(middle.children)
    assert problem.budget.denoiser_evaluations == 1 + sum(middle.draws) + leaves
    assert problem.budget.reward_evaluations == leaves


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "option", "fixed"),
    [
        ("noise_random", "num_samples", {}),
        ("noise_zero_order", "num_rounds", {"num_neighbours": 2, "share": 0.34}),
    ],
)
def test_more_search_over_the_same_noise_is_never_worse(toy: Toy, name: str, option: str, fixed: dict) -> None:
    rewards = [toy.run(name, 60, **{option: budget}, **fixed).reward for budget in range(1, 8)]
    for less, more in itertools.pairwise(rewards):
        assert (more >= less).all()
    assert (rewards[-1] > rewards[0]).sum() > 20


def test_search_over_paths_improves_on_its_paths(toy: Toy) -> None:
    """More noised copies, and more paths, find more; the result is what the sampler really ends in."""
    means = []
    for paths, copies in ((1, 1), (2, 4), (6, 8)):
        result = toy.run("noise_paths", 100, num_paths=paths, num_renoisings=copies)
        assert (result.reward == toy.reward[toy.place(result.states)]).all()
        means.append(result.reward.mean())
    assert means[0] + 0.3 < means[1] < means[2]
    # One path and one copy of it is the sampler itself, in some other order.
    assert abs(means[0] - (toy.p * toy.reward).sum()) < 0.3


# --- accounts ---------------------------------------------------------------------------------------------------------

T = 3
# name -> (options, denoiser evaluations, reward evaluations) of one search with T = 3 steps, counted by hand.
BUDGETS: dict[str, tuple[dict[str, Any], int, int]] = {
    "best_of_n": ({"num_samples": 5}, 5 * T, 5),
    "noise_random": ({"num_samples": 2}, 2 * T, 2),
    # A forward per step and one per candidate that is not finished yet.
    "svdd": ({"num_candidates": 4}, T + 4 * (T - 1), 4 * T),
    "smc": ({"num_particles": 5}, 5 * T + 5 * (T - 1), 5 * T),
    "noise_paths": (
        # 2 paths: 1 step; round 1: 6 copies back to 0 and on to 2, valued; round 2: 6 copies back to 1 and on to 3.
        {"num_paths": 2, "num_renoisings": 3},
        2 + (6 * 2 + 6) + 6 * 2,
        6 + 6 + 2,
    ),
}


@pytest.mark.parametrize("name", list(BUDGETS))
def test_budgets_are_what_a_hand_counts(toy: Toy, name: str) -> None:
    params, denoiser, reward = BUDGETS[name]
    for count in (1, 7):
        budget = toy.run(name, count, **params).budget
        assert (budget.denoiser_evaluations, budget.reward_evaluations) == (count * denoiser, count * reward)


def test_budgets_that_depend_on_the_value(toy: Toy) -> None:
    monte_carlo = toy.run("svdd", 1, num_candidates=4, value="monte_carlo", num_rollouts=2).budget
    # Two rollouts per candidate: of 2 steps after the first, of 1 after the second; the last are finished.
    assert monte_carlo.denoiser_evaluations == T + 4 * 2 * (2 + 1)
    assert monte_carlo.reward_evaluations == 4 * (2 + 2 + 1)
    plain = toy.run("smc", 1, num_particles=5, value="none").budget
    assert (plain.denoiser_evaluations, plain.reward_evaluations) == (5 * T, 5)
    # A pivot that no neighbour beats is drawn anew: one more sample, but not after the last round.
    zero = toy.run("noise_zero_order", 1, num_rounds=1, num_neighbours=4).budget
    assert (zero.denoiser_evaluations, zero.reward_evaluations) == (5 * T, 5)


SMALL: dict[str, dict[str, Any]] = {
    "best_of_n": {"num_samples": 3},
    "svdd": {"num_candidates": 3, "alpha": 0.5, "value": "monte_carlo"},
    "smc": {"num_particles": 4, "keep": "all", "resample_below": 0.9},
    "dts": {"num_iterations": 5, "num_samples": 2},
    "dts_star": {"num_iterations": 5},
    "noise_zero_order": {},
    "noise_paths": {"num_paths": 2, "num_renoisings": 2},
}


@pytest.mark.parametrize("name", list(SMALL))
def test_a_search_does_not_depend_on_what_is_searched_beside_it(make_model, name: str) -> None:
    """Prompts of several lengths, responses that end early: one search alone gives what it gives in a batch."""
    options = SamplerOptions(gen_length=8, num_inference_steps=4, block_length=4)
    engine = InProcessEngine(make_model("gpt2-full", scale=0.7), options, eos_token_id=0)
    prompts = [[1 + (7 * n + 3 * i) % 10 for i in range(n)] for n in (2, 5, 3, 7)]
    weights = np.random.default_rng(0).normal(size=12)

    def run(rows: list[int]) -> tuple[SearchResult, list[Any]]:
        sampler = TokenSampler(engine, prompts)

        def reward(states: TokenStates) -> list[float]:
            return [weights[t.response_ids()].sum() for t in sampler.trajectories(states)]

        result = search(name, SearchProblem(sampler, reward), rows, 50 + np.array(rows), SMALL[name])
        return result, sampler.trajectories(result.states)

    together, records = run([0, 1, 2, 3])
    for row in (1, 3):
        alone, own = run([row])
        mine = together.request == row
        np.testing.assert_array_equal(alone.reward, together.reward[mine])
        for one, other in zip(own, [records[i] for i in np.flatnonzero(mine)], strict=True):
            assert (one.step.tolist(), one.token.tolist()) == (other.step.tolist(), other.token.tolist())


def test_what_a_search_found_can_be_trained_on(toy: Toy) -> None:
    """The learner's log-prob of every recorded decision equals the sampler's, remasking and guidance included."""
    from rl.estimators.trace_rows import remask_rows

    found = []
    for name, params in [*SMALL.items(), ("guidance", {"scale": 3.0}), ("tds", {"num_particles": 4})]:
        own = toy.problem()
        problem = SearchProblem(own.sampler, own.reward, soft_table(toy))
        result = search(name, problem, np.zeros(6), np.arange(6), params)
        found += problem.sampler.trajectories(result.states)
    for trajectory in found:
        trajectory.validate()
    assert any(not t.is_reveal.all() for t in found), "search over paths masks again"
    logprob = remask_rows(found).score(toy.world.model).logprob
    recorded = np.concatenate([t.logprob[t.is_reveal] for t in found])
    np.testing.assert_allclose(logprob.detach().numpy(), recorded, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["best_of_n", "smc", "dts", "dts_star", "noise_zero_order"])
def test_a_sample_without_a_verdict_is_never_preferred(toy: Toy, name: str) -> None:
    """A reward that fails on most samples: what is returned has one, wherever any finished sample had."""
    problem = toy.problem(prompts=50)
    reward = np.where(np.arange(27) % 2 == 0, np.nan, toy.reward)
    scored: set[int] = set()

    def some(states: TokenStates) -> np.ndarray:
        values = reward[toy.place(states)]
        scored.update(states.row[~np.isnan(values)].tolist())
        return values

    problem.reward = some
    params = SMALL[name] | ({"value": "none"} if name == "smc" else {})
    result = search(name, problem, np.arange(50), np.arange(50), params)
    assert 0 < len(scored) < 50
    weight = np.ones(len(result.request)) if result.weight is None else result.weight
    for request in scored:
        failed = np.isnan(result.reward[result.request == request])
        assert (weight[result.request == request][failed] == 0).all() if name == "smc" else not failed.any()
    assert 0 < problem.budget.unscored < problem.budget.reward_evaluations


def test_soft_mean_by_hand() -> None:
    assert soft_mean(np.array([0.0, 0.0]), 1.0) == pytest.approx(0.0)
    assert soft_mean(np.array([1.0, 3.0]), 2.0) == pytest.approx(2 * math.log((math.exp(0.5) + math.exp(1.5)) / 2))
    assert soft_mean(np.array([-np.inf, 1.0]), 0.5) == pytest.approx(1 + 0.5 * math.log(0.5))
    assert soft_mean(np.array([-np.inf, -np.inf]), 1.0) == -np.inf
