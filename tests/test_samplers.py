"""The parts of a decoder, against slow references and cases worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from rollouts.samplers import noise
from rollouts.samplers.distribution import draw, sampling_logprobs
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.parts import even_quota, position_scores, select_positions
from rollouts.samplers.step import StepState, denoise_step

INF = math.inf


def t(*values: object) -> torch.Tensor:
    return torch.tensor(values)


# --- random numbers ---------------------------------------------------------------------------------------------------


def splitmix_reference(seed: int, step: int, position: int, stream: int) -> float:
    """The same generator on Python's unbounded integers, reduced to 64 bits by hand."""
    bits = 2**64 - 1

    def mix(x: int) -> int:
        x &= bits
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & bits
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & bits
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    state = mix(seed * golden + stream)
    state = mix(state + step * golden)
    state = mix(state + (position + 1) * golden)
    return ((state >> 11) + 0.5) / 2**53


def test_uniform_is_splitmix64() -> None:
    for seed, step, position, stream in [(0, 0, 0, 1), (1, 2, 3, 1), (2**62 + 12345, 9, 4095, 2), (7, 100, 0, 2)]:
        ours = noise.uniform(t(seed), t(step), t(position), stream).item()
        assert ours == splitmix_reference(seed, step, position, stream)


def test_uniform_does_not_depend_on_the_shape_it_is_asked_in() -> None:
    seeds, steps, positions = torch.arange(3), torch.arange(4), torch.arange(5)
    grid = noise.uniform(seeds[:, None, None], steps[None, :, None], positions, 1)
    for i, j, k in itertools.product(range(3), range(4), range(5)):
        assert grid[i, j, k] == noise.uniform(seeds[i], steps[j], positions[k], 1)


def test_uniform_never_repeats_over_seeds_steps_positions_and_streams() -> None:
    axes = torch.meshgrid(torch.arange(50), torch.arange(40), torch.arange(60), indexing="ij")
    values = torch.cat([noise.uniform(*axes, stream).flatten() for stream in (noise.TOKEN_STREAM, noise.ORDER_STREAM)])
    # 240,000 draws of 53 bits: two equal ones have probability 3e-6.
    assert len(values.unique()) == values.numel() == 240_000
    assert values.min() > 0 and values.max() < 1


def test_uniform_has_the_moments_and_the_flat_histogram_of_a_uniform() -> None:
    axes = torch.meshgrid(torch.arange(40), torch.arange(50), torch.arange(50), indexing="ij")
    u = noise.uniform(*axes, noise.TOKEN_STREAM)
    n = u.numel()
    assert abs(u.mean().item() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(u.var().item() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    counts = np.bincount((u.flatten().numpy() * 100).astype(int), minlength=100)
    chi_square = ((counts - n / 100) ** 2 / (n / 100)).sum()
    # 99 degrees of freedom: mean 99, standard deviation 14.1.
    assert 45 < chi_square < 160
    # Neighbouring counters, along every axis, are uncorrelated (standard error 1/sqrt(n) = 0.003).
    for dim in range(3):
        low, high = u.narrow(dim, 0, u.shape[dim] - 1), u.narrow(dim, 1, u.shape[dim] - 1)
        assert abs(np.corrcoef(low.flatten(), high.flatten())[0, 1]) < 0.014


# --- the distribution a token is drawn from ---------------------------------------------------------------------------


def reference_logprobs(logits: list[float], temperature: float, top_p: float, top_k: int) -> list[float]:
    """Tempered, filtered log-probabilities of one position, one token after the other (no ties)."""
    scaled = [x / temperature for x in logits]
    best_first = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if top_k:
        best_first = best_first[:top_k]
    total = math.fsum(math.exp(scaled[i]) for i in best_first)
    kept, mass = [], 0.0
    for i in best_first:
        if mass >= top_p and top_p < 1:
            break
        kept.append(i)
        mass += math.exp(scaled[i]) / total
    log_total = math.log(math.fsum(math.exp(scaled[i]) for i in kept))
    return [scaled[i] - log_total if i in kept else -INF for i in range(len(scaled))]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.7, 1.0, 0), (2.5, 1.0, 3), (1.0, 0.8, 0), (1.3, 0.6, 4), (0.5, 0.95, 100), (1.0, 0.01, 0),
     (1.0, 1.0, 1)],
)  # fmt: skip
def test_sampling_logprobs_equals_the_reference(temperature: float, top_p: float, top_k: int) -> None:
    logits = torch.randn(40, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    ours = sampling_logprobs(logits, temperature, top_p, top_k)
    theirs = [reference_logprobs(row, temperature, top_p, top_k) for row in logits.tolist()]
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-12)


def test_nucleus_by_hand() -> None:
    logits = t(0.5, 0.2, 0.3).double().log()[None]
    # The most likely token alone reaches 0.5; 0.51 needs the second; 0.8 is reached by two, 0.81 by three.
    for top_p, kept in ((0.4, [0]), (0.51, [0, 2]), (0.79, [0, 2]), (0.81, [0, 1, 2])):
        probs = sampling_logprobs(logits, 1.0, top_p).exp()[0]
        assert probs.nonzero().flatten().tolist() == kept
        assert probs.sum().item() == pytest.approx(1.0)
    assert sampling_logprobs(logits, 1.0, 0.51).exp()[0].tolist() == pytest.approx([0.625, 0.0, 0.375])


def test_the_nucleus_is_taken_of_what_top_k_leaves() -> None:
    logits = t(0.4, 0.3, 0.2, 0.1).double().log()[None]
    # After top-k 2 the masses are 4/7 and 3/7: the first alone reaches 0.5. Of the full distribution it would not.
    assert sampling_logprobs(logits, 1.0, 0.5, 2).exp()[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert (sampling_logprobs(logits, 1.0, 0.5).exp()[0] > 0).tolist() == [True, True, False, False]


def test_a_recorded_token_stays_in_the_support() -> None:
    logits = t(0.6, 0.3, 0.1).double().log()[None]
    filtered = sampling_logprobs(logits, 1.0, 1.0, top_k=1, keep=t(2))
    assert filtered.exp()[0].tolist() == pytest.approx([6 / 7, 0.0, 1 / 7])
    # A token that is inside anyway changes nothing.
    assert sampling_logprobs(logits, 1.0, 1.0, top_k=1, keep=t(0)).exp()[0].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_no_density_without_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"sampler\.temperature must be > 0"):
        sampling_logprobs(torch.zeros(1, 3), temperature)


def test_draw_inverts_the_cumulative_distribution() -> None:
    logprobs = t(0.5, 0.0, 0.3, 0.2).double().log()
    u = t(1e-300, 0.2, 0.4999, 0.5001, 0.79, 0.81, 1 - 2**-53).double()
    assert draw(logprobs.expand(7, 4), u).tolist() == [0, 0, 0, 2, 2, 3, 3]


def test_draw_never_takes_an_impossible_token() -> None:
    logprobs = t(-INF, 0.0, -INF, -INF).double().expand(3, 4)
    assert draw(logprobs, t(2**-54, 0.5, 1 - 2**-53).double()).tolist() == [1, 1, 1]


def test_draw_has_the_right_frequencies() -> None:
    probs = np.array([0.02, 0.4, 0.0, 0.28, 0.1, 0.2])
    n = 40_000
    u = noise.uniform(torch.arange(n), t(3), t(5), noise.TOKEN_STREAM)
    tokens = draw(torch.tensor(np.log(probs, where=probs > 0, out=np.full(6, -INF))).expand(n, 6), u)
    counts = np.bincount(tokens.numpy(), minlength=6)
    assert counts[2] == 0
    used = probs > 0
    chi_square = ((counts - n * probs)[used] ** 2 / (n * probs)[used]).sum()
    # 4 degrees of freedom: above 23.5 with probability 1e-4.
    assert chi_square < 23.5


# --- quota ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masked", "steps", "quotas"),
    [(16, 4, [4, 4, 4, 4]), (7, 3, [3, 2, 2]), (3, 3, [1, 1, 1]), (5, 4, [2, 1, 1, 1]), (6, 1, [6])],
)
def test_even_quota_by_hand(masked: int, steps: int, quotas: list[int]) -> None:
    assert [even_quota(t(masked), t(steps), t(step)).item() for step in range(steps)] == quotas


def test_even_quotas_add_up_and_never_stall() -> None:
    for masked in range(1, 40):
        for steps in range(1, masked + 1):
            quotas = even_quota(t(masked), t(steps), torch.arange(steps))
            assert quotas.sum() == masked
            assert quotas.min() >= 1 and quotas.max() - quotas.min() <= 1


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    logprobs = t([0.5, 0.25, 0.25], [0.1, 0.9, 0.0]).double().log()
    tokens = t(1, 1)
    assert position_scores("probability", logprobs, tokens).tolist() == pytest.approx([0.25, 0.9])
    assert position_scores("margin", logprobs, tokens).tolist() == pytest.approx([0.25, 0.8])
    entropy = [-(0.5 * math.log(0.5) + 0.5 * math.log(0.25)), -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))]
    assert position_scores("neg_entropy", logprobs, tokens).tolist() == pytest.approx([-e for e in entropy])
    random = t(0.3, 0.1).double()
    assert position_scores("random", logprobs, tokens, random) is random
    with pytest.raises(ValueError, match=r"sampler\.score 'luck' is unknown"):
        position_scores("luck", logprobs, tokens)


# --- selectors --------------------------------------------------------------------------------------------------------


def reference_selection(kind: str, scores: list[float], eligible: list[bool], quota: int, threshold: float) -> set[int]:
    places = [i for i, ok in enumerate(eligible) if ok]
    if kind == "left_most":
        return set(places[:quota])
    best_first = sorted(places, key=lambda i: (-scores[i], i))
    above = {i for i in places if scores[i] > threshold}
    if kind == "top_n":
        return set(best_first[:quota])
    if kind == "threshold":
        return above | set(best_first[:1])
    return above if len(above) >= quota else set(best_first[:quota])


@pytest.mark.parametrize("kind", ["top_n", "threshold", "dynamic", "left_most"])
def test_selectors_equal_the_reference_also_with_ties(kind: str) -> None:
    rng = np.random.default_rng(0)
    # Few distinct values, among them exactly 0, exactly the threshold and exactly 1: ties and edges everywhere.
    scores = rng.choice([0.0, 0.2, 0.5, 0.9, 1.0], size=(300, 7))
    eligible = rng.random((300, 7)) < 0.6
    quota = rng.integers(0, 5, size=300)
    chosen = select_positions(kind, *(torch.from_numpy(x) for x in (scores, eligible, quota)), 0.5)
    for row in range(300):
        expected = reference_selection(kind, scores[row].tolist(), eligible[row].tolist(), quota[row], 0.5)
        assert set(chosen[row].nonzero().flatten().tolist()) == expected, (scores[row], eligible[row], quota[row])


def test_selectors_by_hand() -> None:
    scores = t([0.95, 0.3, 0.99, 0.6, 0.97]).double()
    eligible = t([True, True, False, True, True])

    def chosen(kind: str, quota: int, threshold: float = 0.9) -> list[int]:
        return select_positions(kind, scores, eligible, t(quota), threshold)[0].nonzero().flatten().tolist()

    assert chosen("top_n", 1) == [4]
    assert chosen("top_n", 3) == [0, 3, 4]
    assert chosen("left_most", 2) == [0, 1]
    assert chosen("threshold", 3) == [0, 4]
    assert chosen("threshold", 3, threshold=0.98) == [4]
    assert chosen("dynamic", 1) == [0, 4]
    assert chosen("dynamic", 3) == [0, 3, 4]


def test_equal_scores_go_from_left_to_right() -> None:
    scores, eligible = torch.full((1, 6), 0.4).double(), t([False, True, True, False, True, True])
    chosen = select_positions("top_n", scores, eligible, t(3), 0.9)
    assert chosen[0].nonzero().flatten().tolist() == [1, 2, 4]


@pytest.mark.parametrize("kind", ["top_n", "threshold", "dynamic", "left_most"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_saturated_scores_never_select_an_ineligible_position(kind: str, value: float) -> None:
    """Defect W11: with every confidence equal (1.0 under top_k=1, or underflowed to 0.0) and more to reveal
    than is left, published decoders select, and overwrite, prompt tokens. Here eligibility is a mask."""
    scores = torch.full((1, 6), value).double()
    eligible = t([False, False, True, False, True, False])
    chosen = select_positions(kind, scores, eligible, t(5), 0.9)
    assert not (chosen & ~eligible).any()
    assert chosen.any()
    nobody = select_positions(kind, scores, torch.zeros_like(eligible), t(5), 0.9)
    assert not nobody.any()


def test_the_largest_entropy_of_a_prefix_is_not_in_its_sum() -> None:
    """Entropies 0.1, 0.2, 0.4 add up to 0.1, 0.3, 0.7, without the last to 0, 0.1, 0.3; the bound is 0.35."""
    scores = -torch.tensor([[0.4, 0.1, 0.2]], dtype=torch.float64)
    for kind, expected in (("entropy_bound", [True, True, True]), ("entropy_sum", [False, True, True])):
        assert select_positions(kind, scores, torch.ones(1, 3) > 0, t(1), 0.35)[0].tolist() == expected


def test_an_unknown_selector_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sampler\.selector 'best' is unknown"):
        select_positions("best", torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), t(1), 0.9)


# --- one step ---------------------------------------------------------------------------------------------------------

MASK = 4


def state(quota: int = 1, seed: int = 0) -> StepState:
    """Two requests on a canvas of 4; prompts of 1 and 2 tokens; the second may not yet touch position 3."""
    canvas = t([0, MASK, MASK, MASK], [1, 2, MASK, MASK])
    candidates = canvas == MASK
    eligible = candidates.clone()
    eligible[1, 3] = False
    return StepState(canvas, candidates, eligible, t(quota, quota), t(seed, seed + 1), t(0, 5))


def logits(seed: int = 0) -> torch.Tensor:
    values = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values[:, MASK] = -1e9
    return values


def test_a_seed_per_position_draws_what_that_seed_would() -> None:
    """A search redraws some positions of a request and keeps others."""
    options = SamplerOptions(gen_length=4, num_inference_steps=4)
    one = denoise_step(state(), logits(), options).token
    far = next(s for s in range(20, 999) if (denoise_step(state(seed=s), logits(), options).token != one).all())
    other = denoise_step(state(seed=far), logits(), options).token
    mixed = state()
    mixed.seed = t([far, 0, far, 0], [1, far + 1, 1, far + 1])
    at = mixed.candidates.nonzero()
    redrawn = mixed.seed[at[:, 0], at[:, 1]] >= far
    assert torch.equal(denoise_step(mixed, logits(), options).token, torch.where(redrawn, other, one))


def test_greedy_takes_the_most_likely_token_with_no_density() -> None:
    result = denoise_step(state(), logits(), SamplerOptions(temperature=0.0))
    assert result.token.tolist() == logits().argmax(-1).tolist()
    assert result.logprob.tolist() == [0.0] * 5
    torch.testing.assert_close(result.confidence, logits().softmax(-1).amax(-1))


def test_the_recorded_logprob_is_the_sampling_distributions() -> None:
    options = SamplerOptions(temperature=1.7, top_k=3, top_p=0.9)
    result = denoise_step(state(), logits(), options)
    expected = sampling_logprobs(logits(), 1.7, 0.9, 3).gather(-1, result.token[:, None])[:, 0]
    torch.testing.assert_close(result.logprob, expected, rtol=0, atol=0)
    assert torch.isfinite(result.logprob).all()


@pytest.mark.parametrize("source", ["model", "sampling"])
def test_confidence_is_read_from_the_distribution_asked_for(source: str) -> None:
    options = SamplerOptions(temperature=0.5, top_k=2, score_from=source)
    result = denoise_step(state(), logits(), options)
    distribution = logits().log_softmax(-1) if source == "model" else sampling_logprobs(logits(), 0.5, 1.0, 2)
    expected = distribution.exp().gather(-1, result.token[:, None])[:, 0]
    torch.testing.assert_close(result.confidence, expected, rtol=0, atol=1e-15)


def test_with_one_token_left_the_sampling_confidence_degenerates_and_the_models_does_not() -> None:
    """Defect W11: under top_k=1 the filtered distribution is one-hot, every confidence is exactly 1.0 and the
    'most confident' order is a tie-break. The default reads the model's distribution instead."""
    degenerate = denoise_step(state(), logits(), SamplerOptions(top_k=1, score_from="sampling"))
    assert degenerate.confidence.tolist() == [1.0] * 5
    default = denoise_step(state(), logits(), SamplerOptions(top_k=1))
    assert len(set(default.confidence.tolist())) == 5
    first = default.confidence[:3]
    assert default.position[:3][default.reveal[:3]].tolist() == [int(first.argmax()) + 1]


def test_candidates_that_are_not_eligible_are_drawn_but_not_revealed() -> None:
    result = denoise_step(state(quota=3), logits(), SamplerOptions())
    assert result.row.tolist() == [0, 0, 0, 1, 1]
    assert result.position.tolist() == [1, 2, 3, 2, 3]
    assert result.reveal.tolist() == [True, True, True, True, False]


def test_a_draw_belongs_to_its_request_step_and_position() -> None:
    options = SamplerOptions(temperature=1.0)
    result = denoise_step(state(seed=3), logits(), options)
    steps, positions, seeds = [0, 0, 0, 5, 5], [1, 2, 3, 2, 3], [3, 3, 3, 4, 4]
    u = noise.uniform(t(*seeds), t(*steps), t(*positions), noise.TOKEN_STREAM)
    assert result.token.tolist() == draw(logits().log_softmax(-1), u).tolist()


def test_random_order_is_reproducible_and_independent_of_the_tokens() -> None:
    options = SamplerOptions(score="random", temperature=1.0)
    first = [denoise_step(state(seed=s), logits(), options).reveal[:3].tolist().index(True) for s in range(600)]
    again = [denoise_step(state(seed=s), logits(1), options).reveal[:3].tolist().index(True) for s in range(600)]
    assert first == again
    # Three positions, 200 expected each, standard deviation 11.5.
    assert all(150 < first.count(i) < 250 for i in range(3))


# --- options ----------------------------------------------------------------------------------------------------------


def test_steps_are_split_over_the_blocks() -> None:
    options = SamplerOptions(gen_length=12, num_inference_steps=6, block_length=4)
    assert options.steps_per_block() == 2
    assert options.steps_per_block(12) == 4
    assert SamplerOptions(gen_length=12, num_inference_steps=5).steps_per_block() == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 10, "block_length": 4}, r"gen_length \(10\) must be a multiple of .*block_length"),
        ({"gen_length": 12, "block_length": 4, "num_inference_steps": 4}, r"num_inference_steps \(4\) must be"),
        ({"temprature": 1.0}, "temprature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"selector": "luck"}, "selector"),
    ],
)
def test_options_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerOptions(**settings)


@pytest.mark.parametrize("steps", [0, -3, 5])
def test_a_step_count_that_cannot_be_is_refused(steps: int) -> None:
    options = SamplerOptions(gen_length=12, num_inference_steps=6, block_length=4)
    with pytest.raises(ValueError, match=f"num_inference_steps.*{steps}"):
        options.steps_per_block(steps)
