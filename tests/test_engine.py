"""The rollout engine against a decoder without batch, cache or tensors: one request, one full forward per step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers import noise
from rollouts.samplers.options import SamplerOptions

EOS = 0
FULL = ["gpt2-full", "qwen3-full", "gpt2-full-shifted"]
BLOCK = ["gpt2-block4", "qwen3-block4"]
STEPS = {"gen_length": 8, "num_inference_steps": 4}
DECODERS: dict[str, dict[str, Any]] = {
    "confidence": {},
    "threshold": {"selector": "threshold", "threshold": 0.6, "temperature": 0.8},
    "dynamic": {"selector": "dynamic", "threshold": 0.5, "top_p": 0.9, "top_k": 6, "score_from": "sampling"},
    "left to right": {"selector": "left_most", "temperature": 1.4},
    "greedy margin": {"score": "margin", "temperature": 0.0},
    "entropy": {"score": "neg_entropy", "top_k": 5},
    "random order": {"score": "random", "temperature": 1.2, "num_inference_steps": 8},
}


def prompts(count: int = 9) -> list[list[int]]:
    """Prompts of 1, 2, ..., count tokens, all different."""
    return [[1 + (7 * n + 3 * i) % 10 for i in range(n)] for n in range(1, count + 1)]


def requests(count: int = 9) -> list[Request]:
    return [Request(ids, seed=100 + i) for i, ids in enumerate(prompts(count))]


def requests_for(family: str) -> list[Request]:
    """Every prompt length up to 2B+1 where the grid starts at 0; a few where it starts behind the prompt."""
    return requests() if family in BLOCK else requests()[::2]


# --- the reference ----------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    canvas: list[int]
    length: int
    num_steps: int = 0
    edits: list[tuple[int, int, int, float, float]] = field(default_factory=list)


def probabilities(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    scaled = logits / temperature
    probs = np.exp(scaled - scaled.max())
    order = np.argsort(-probs)
    if top_k:
        probs[order[top_k:]] = 0.0
    probs /= probs.sum()
    if top_p < 1:
        mass = 0.0
        for token in order:
            if mass >= top_p:
                probs[token] = 0.0
            mass += probs[token]
    return probs / probs.sum()


def uniform(seed: int, step: int, position: int, stream: int) -> float:
    return noise.uniform(*(torch.tensor(x) for x in (seed, step, position)), stream).item()


def block_end_of(position: int, block: int) -> int:
    return (position // block + 1) * block


def decide(
    options: SamplerOptions, logits: dict[int, np.ndarray], seed: int, step: int, quota: int
) -> list[tuple[int, int, float, float]]:
    """(position, token, log-prob, confidence) of the positions revealed now, left to right."""
    drawn: dict[int, tuple[int, float, float]] = {}
    scores: dict[int, float] = {}
    for position, values in logits.items():
        model = probabilities(values, 1.0, 1.0, 0)
        if options.temperature == 0:
            sampling, token, logprob = model, int(values.argmax()), 0.0
        else:
            sampling = probabilities(values, options.temperature, options.top_p, options.top_k)
            token = int((np.cumsum(sampling) < uniform(seed, step, position, noise.TOKEN_STREAM)).sum())
            logprob = math.log(sampling[token])
        source = model if options.score_from == "model" else sampling
        drawn[position] = token, logprob, source[token]
        if options.score == "probability":
            scores[position] = source[token]
        elif options.score == "margin":
            second, first = np.sort(source)[-2:]
            scores[position] = first - second
        elif options.score == "neg_entropy":
            scores[position] = sum(p * math.log(p) for p in source if p > 0)
        else:
            scores[position] = uniform(seed, step, position, noise.ORDER_STREAM)
    left_to_right = sorted(logits)
    best_first = sorted(left_to_right, key=lambda p: -scores[p])
    above = [p for p in left_to_right if scores[p] > options.threshold]
    chosen = {
        "top_n": best_first[:quota],
        "left_most": left_to_right[:quota],
        "threshold": above or best_first[:1],
        "dynamic": above if len(above) >= quota else best_first[:quota],
    }[options.selector]
    return [(p, *drawn[p]) for p in sorted(chosen)]


@torch.no_grad()
def reference_decode(model: Any, request: Request, options: SamplerOptions, eos: int | None = None) -> Reference:
    """Decode one request; every step forwards the whole canvas and keeps nothing."""
    prompt = list(request.prompt_ids)
    mask, causal = model.mask_token_id, model.attention == "block_causal"
    block = options.block_length or (model.block_length if causal else options.gen_length)
    length = len(prompt) + options.gen_length
    start, end = len(prompt), len(prompt) + block
    if causal:
        length = block_end_of(length - 1, block)
        start, end = len(prompt), block_end_of(len(prompt), block)
    total_steps = request.num_inference_steps or options.num_inference_steps
    steps_per_block = total_steps // (options.gen_length // block)
    canvas = prompt + [mask] * (length - len(prompt))
    visible = None
    if causal:
        visible = torch.tensor([[[k < block_end_of(q, block) for k in range(length)] for q in range(length)]])
    result = Reference(canvas, length)
    while True:
        todo = list(range(start, end))
        num_masked, block_step = len(todo), 0
        steps = min(steps_per_block, num_masked)
        while todo:
            logits = model(torch.tensor([canvas]), visible=visible)[0]
            quota = num_masked // steps + (block_step < num_masked % steps)
            values = {p: logits[p - model.logit_shift].numpy() for p in todo}
            for position, token, logprob, confidence in decide(options, values, request.seed, result.num_steps, quota):
                canvas[position] = token
                result.edits.append((result.num_steps, position, token, logprob, confidence))
                todo.remove(position)
            result.num_steps += 1
            block_step += 1
        if end == length or (eos is not None and eos in canvas[start:end]):
            result.length = end if causal else length
            result.canvas = canvas[: result.length]
            return result
        start, end = end, end + block


def assert_equal_to_reference(trajectory: Any, reference: Reference, request: Request) -> None:
    trajectory.validate()
    step, position, token, logprob, confidence = (np.array(x) for x in zip(*reference.edits, strict=True))
    assert trajectory.prompt_ids.tolist() == list(request.prompt_ids)
    assert trajectory.length == reference.length
    assert trajectory.num_steps == reference.num_steps
    assert trajectory.step.tolist() == step.tolist()
    assert trajectory.position.tolist() == position.tolist()
    assert trajectory.token.tolist() == token.tolist()
    np.testing.assert_allclose(trajectory.logprob, logprob, rtol=0, atol=1e-10)
    np.testing.assert_allclose(trajectory.confidence, confidence, rtol=0, atol=1e-6)
    assert trajectory.final_canvas().tolist() == reference.canvas


@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.parametrize("family", FULL + BLOCK)
def test_the_engine_equals_the_uncached_reference(make_model, family: str, decoder: str) -> None:
    """Every prompt length from 1 to 2B+1, batches that mix them, an end token, slots that are refilled."""
    model = make_model(family)
    options = SamplerOptions(**{**STEPS, "block_length": 4, **DECODERS[decoder]})
    asked = requests_for(family)
    trajectories = InProcessEngine(model, options, eos_token_id=EOS, max_batch_size=4).generate(asked)
    for request, trajectory in zip(asked, trajectories, strict=True):
        assert_equal_to_reference(trajectory, reference_decode(model, request, options, EOS), request)


@pytest.mark.parametrize("decoder", ["confidence", "dynamic"])
@pytest.mark.parametrize("family", FULL)
def test_the_whole_response_at_once_equals_the_reference(make_model, family: str, decoder: str) -> None:
    model = make_model(family)
    options = SamplerOptions(**{**STEPS, "num_inference_steps": 3, **DECODERS[decoder]})
    asked = requests_for(family)
    trajectories = InProcessEngine(model, options, eos_token_id=EOS, max_batch_size=4).generate(asked)
    for request, trajectory in zip(asked, trajectories, strict=True):
        assert_equal_to_reference(trajectory, reference_decode(model, request, options, EOS), request)


@pytest.mark.parametrize("block_length", [1, 2, 8])
def test_another_block_length_than_the_models_equals_the_reference(make_model, block_length: int) -> None:
    model = make_model("qwen3-block4")
    options = SamplerOptions(gen_length=8, num_inference_steps=8, block_length=block_length)
    trajectories = InProcessEngine(model, options, max_batch_size=3).generate(requests())
    for request, trajectory in zip(requests(), trajectories, strict=True):
        assert trajectory.block_length == block_length
        assert_equal_to_reference(trajectory, reference_decode(model, request, options), request)


# --- a rollout is its own request's business --------------------------------------------------------------------------


def assert_same_rollout(one: Any, other: Any) -> None:
    for name in ("prompt_ids", "length", "num_steps", "step", "position", "token", "stop_length", "seed"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    np.testing.assert_allclose(one.logprob, other.logprob, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", ["qwen3-full", "qwen3-block4", "gpt2-block4"])
def test_neighbours_order_and_batch_size_change_nothing(make_model, family: str) -> None:
    """Prompts of several lengths share a batch, and padding must not reach the logits."""
    model = make_model(family)
    options = SamplerOptions(**STEPS, block_length=4, selector="dynamic", threshold=0.6)
    everyone = [*requests(), Request([5, 5], 1, num_inference_steps=2), Request([3], 2, num_inference_steps=8)]
    together = InProcessEngine(model, options, eos_token_id=EOS).generate(everyone)
    for size in (1, 2, 5):
        engine = InProcessEngine(model, options, eos_token_id=EOS, max_batch_size=size)
        for one, other in zip(together, engine.generate(everyone), strict=True):
            assert_same_rollout(one, other)
    engine = InProcessEngine(model, options, eos_token_id=EOS, max_batch_size=3)
    for one, other in zip(together[::-1], engine.generate(everyone[::-1]), strict=True):
        assert_same_rollout(one, other)
    for one, other in zip(together[2::4], engine.generate(everyone[2::4]), strict=True):
        assert_same_rollout(one, other)


def test_the_seed_alone_makes_rollouts_of_one_prompt_differ(make_model) -> None:
    engine = InProcessEngine(make_model("qwen3-full"), SamplerOptions(**STEPS, temperature=2.0))
    first = engine.generate([Request([1, 2, 3], seed=s) for s in range(20)])
    again = engine.generate([Request([1, 2, 3], seed=s) for s in range(20)])
    for one, other in zip(first, again, strict=True):
        assert_same_rollout(one, other)
    assert len({tuple(t.response_ids()) for t in first}) == 20


def test_first_tokens_are_drawn_from_the_models_distribution(make_model) -> None:
    model = make_model("gpt2-full")
    options = SamplerOptions(gen_length=1, num_inference_steps=1, temperature=1.5)
    n = 4000
    drawn = InProcessEngine(model, options, max_batch_size=n).generate([Request([4, 2], seed=s) for s in range(n)])
    counts = np.bincount([int(t.token[0]) for t in drawn], minlength=12)
    with torch.no_grad():
        probs = (model(torch.tensor([[4, 2, 11]]))[0, 2] / 1.5).softmax(-1).numpy()
    assert counts[11] == 0 and probs[11] == 0
    likely = n * probs > 5
    chi_square = ((counts - n * probs)[likely] ** 2 / (n * probs)[likely]).sum()
    # At most 10 degrees of freedom: above 35.6 with probability 1e-4.
    assert likely.sum() > 3 and chi_square < 35.6


def test_greedy_needs_no_seed(make_model) -> None:
    engine = InProcessEngine(make_model("gpt2-full"), SamplerOptions(**STEPS, temperature=0.0))
    one, other = engine.generate([Request([1, 2], seed=1), Request([1, 2], seed=2)])
    assert one.token.tolist() == other.token.tolist() and one.step.tolist() == other.step.tolist()


# --- schedules --------------------------------------------------------------------------------------------------------


def test_blocks_of_one_are_left_to_right_decoding(make_model) -> None:
    model = make_model("qwen3-full")
    blocks = SamplerOptions(gen_length=6, num_inference_steps=6, block_length=1)
    left = SamplerOptions(gen_length=6, num_inference_steps=6, selector="left_most")
    for one, other in zip(*(InProcessEngine(model, o).generate(requests(4)) for o in (blocks, left)), strict=True):
        assert_same_rollout(one, other)
        assert one.position.tolist() == list(range(one.prompt_length, one.length))
        assert one.step.tolist() == list(range(6))


@pytest.mark.parametrize("family", ["gpt2-full", "gpt2-block4"])
@pytest.mark.parametrize("selector", ["top_n", "threshold", "dynamic"])
def test_every_step_decides_and_every_position_is_decided_once(make_model, family: str, selector: str) -> None:
    """A step without an edit is a wasted forward, and shifts the random numbers of all later ones."""
    model = make_model(family)
    for steps in (2, 4, 8):
        options = SamplerOptions(gen_length=8, num_inference_steps=steps, block_length=4, selector=selector)
        for trajectory in InProcessEngine(model, options).generate(requests()):
            assert np.unique(trajectory.step).tolist() == list(range(trajectory.num_steps))
            assert sorted(trajectory.position) == list(range(trajectory.prompt_length, trajectory.length))
            if selector == "top_n":
                assert trajectory.num_steps <= steps + (steps // 2 if family == "gpt2-block4" else 0)


def test_requests_may_ask_for_their_own_number_of_steps(make_model) -> None:
    engine = InProcessEngine(make_model("gpt2-full"), SamplerOptions(**STEPS))
    asked = [None, 1, 2, 8]
    trajectories = engine.generate([Request([3, 4], seed=5, num_inference_steps=n) for n in asked])
    assert [t.num_steps for t in trajectories] == [4, 1, 2, 8]
    assert [np.bincount(t.step).tolist() for t in trajectories] == [[2] * 4, [8], [4] * 2, [1] * 8]


def test_work_is_counted(make_model) -> None:
    """Storing a finished block rides on the next block's first forward: no forward of its own."""
    engine = InProcessEngine(make_model("gpt2-block4"), SamplerOptions(**STEPS))
    trajectory = engine.generate([Request([1] * 9, seed=0)])[0]
    # Prompt blocks 0 to 7, one forward; token 8 shares block 8 to 11; two more blocks make a canvas of 20.
    assert (trajectory.length, trajectory.num_steps) == (20, 6)
    assert (engine.stats.forwards, engine.stats.sequence_forwards) == (7, 7)
    assert engine.stats.query_tokens == 8 + 6 * 4 + 2 * 4
    assert engine.stats.generated_tokens == 11
    assert engine.stats.seconds > 0
    engine = InProcessEngine(make_model("gpt2-full"), SamplerOptions(**STEPS), max_batch_size=2)
    engine.generate([Request([1, 2, 3], seed=s) for s in range(4)])
    assert (engine.stats.forwards, engine.stats.sequence_forwards) == (8, 16)
    assert engine.stats.query_tokens == 16 * 11 and engine.stats.generated_tokens == 32


def test_requests_out_of_step_share_every_forward_of_a_model_without_cache(make_model) -> None:
    options = SamplerOptions(gen_length=16, num_inference_steps=16, block_length=4, selector="threshold", threshold=0.4)
    engine = InProcessEngine(make_model("gpt2-full"), options)
    trajectories = engine.generate([Request([1, 0, 1, s % 10], seed=s) for s in range(16)])
    steps = [t.num_steps for t in trajectories]
    assert min(steps) < max(steps), "they must not all take the same number of steps"
    assert engine.stats.forwards == max(steps) and engine.stats.sequence_forwards == sum(steps)


# --- approximate caches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("family", FULL)
def test_an_approximate_cache_is_exact_while_nothing_is_stale(make_model, family: str, kind: str) -> None:
    """One step per block: every forward is a first one, which sees the whole canvas."""
    model = make_model(family)
    options = SamplerOptions(gen_length=8, num_inference_steps=2, block_length=4)
    cached = InProcessEngine(model, options, eos_token_id=EOS, max_batch_size=3, approximate_cache=kind)
    exact = InProcessEngine(model, options, eos_token_id=EOS)
    for one, other in zip(cached.generate(requests(6)), exact.generate(requests(6)), strict=True):
        assert_same_rollout(one, other)
        assert (one.exact, other.exact) == (False, True)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("family", FULL)
def test_an_approximate_cache_changes_log_probs_and_nothing_else(make_model, family: str, kind: str) -> None:
    """It is cheaper and near, each rollout is still its request's own business, and the record says so."""
    model = make_model(family)
    options = SamplerOptions(gen_length=8, num_inference_steps=8, block_length=4, selector="left_most")
    engine = InProcessEngine(model, options, max_batch_size=3, approximate_cache=kind)
    together = engine.generate(requests(6))
    for trajectory in together:
        trajectory.validate()
        assert not trajectory.exact
        assert trajectory.position.tolist() == list(range(trajectory.prompt_length, trajectory.length))
    cost = engine.stats.query_tokens
    alone = InProcessEngine(model, options, max_batch_size=1, approximate_cache=kind)
    for one, request in zip(together, requests(6), strict=True):
        assert_same_rollout(one, alone.generate([request])[0])
    plain = InProcessEngine(model, options, max_batch_size=3)
    exact = plain.generate(requests(6))
    first = [(one.logprob[0], other.logprob[0]) for one, other in zip(together, exact, strict=True)]
    np.testing.assert_allclose(*zip(*first, strict=True), rtol=0, atol=1e-10)
    assert any(abs(a.logprob - b.logprob).max() > 1e-6 for a, b in zip(together, exact, strict=True))
    assert cost < plain.stats.query_tokens


def test_caches_that_cannot_be_are_refused(make_model) -> None:
    full, block = make_model("gpt2-full"), make_model("gpt2-block4")
    with pytest.raises(ValueError, match=r"rollout\.cache must be none, prefix, dual or frozen, got 'exact'"):
        InProcessEngine(full, SamplerOptions(**STEPS), approximate_cache="exact")
    with pytest.raises(ValueError, match=r"rollout\.cache dual is for full-attention models"):
        InProcessEngine(block, SamplerOptions(**STEPS), approximate_cache="dual")
    with pytest.raises(ValueError, match=r"record_x0 needs forwards of the whole canvas: set rollout\.cache to none"):
        InProcessEngine(full, SamplerOptions(**STEPS, record_x0=True), approximate_cache="prefix")


# --- end of a response ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3-full", "qwen3-block4"])
def test_the_terminal_block_is_kept_whole(make_model, family: str) -> None:
    """The tokens decoded behind the end token stay in the record, since the policy saw it."""
    engine = InProcessEngine(
        make_model(family), SamplerOptions(**STEPS, block_length=4, temperature=2.0), eos_token_id=EOS
    )
    trajectories = engine.generate([Request([2, 3, 4, 5, 6][: 1 + s % 5], seed=s) for s in range(200)])
    stopped_early = kept_behind_the_end = 0
    for trajectory in trajectories:
        prompt, canvas = trajectory.prompt_length, trajectory.final_canvas()
        response = canvas[prompt : prompt + 8].tolist()
        expected = response.index(EOS) + 1 if EOS in response else 8
        assert trajectory.stop_length == expected
        assert trajectory.response_ids().tolist() == response[:expected]
        decided = np.sort(trajectory.position)
        block_end = int(decided[-1]) + 1
        assert decided.tolist() == list(range(prompt, block_end)), "a block was left half decided"
        assert (block_end - trajectory.block_origin) % 4 == 0
        assert (canvas[:prompt] == trajectory.prompt_ids).all()
        if family == "qwen3-block4":
            assert trajectory.length == block_end
        else:
            # Full attention saw the masks of the later blocks: they belong to the state.
            assert trajectory.length == prompt + 8
            assert (canvas[block_end:] == trajectory.mask_token_id).all()
        assert EOS not in canvas[prompt : block_end - 4], "decoding went on behind a block with an end token"
        stopped_early += block_end < prompt + 8
        kept_behind_the_end += prompt + expected < block_end
    assert stopped_early > 20 and kept_behind_the_end > 20


@pytest.mark.parametrize("family", ["qwen3-full", "qwen3-block4"])
def test_an_end_token_in_the_prompt_ends_nothing(make_model, family: str) -> None:
    engine = InProcessEngine(make_model(family), SamplerOptions(**STEPS, block_length=4), eos_token_id=EOS)
    trajectories = engine.generate([Request([3, EOS, EOS, 5, 7, EOS], seed=s) for s in range(40)])
    first_block_end = 8 if family == "qwen3-block4" else 10
    went_on = [t.position.max() >= first_block_end for t in trajectories]
    assert went_on == [EOS not in t.token[t.position < first_block_end] for t in trajectories]
    assert sum(went_on) > 5


def test_without_an_end_token_a_response_is_exactly_as_long_as_asked(make_model) -> None:
    """A block canvas may be longer than the response; the surplus is recorded but is not the answer."""
    for trajectory in InProcessEngine(make_model("gpt2-block4"), SamplerOptions(**STEPS)).generate(requests()):
        assert trajectory.stop_length == 8
        assert trajectory.length == math.ceil((trajectory.prompt_length + 8) / 4) * 4


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_is_an_error_that_names_it(make_model) -> None:
    """Published code drops long prompts and keeps their rewards, which shifts all later ones.
    Here a prompt is decoded or the whole call is refused, and results keep the requests' order."""
    engine = InProcessEngine(make_model("gpt2-full"), SamplerOptions(**STEPS))
    with pytest.raises(
        ValueError, match=r"request 1: prompt of 57 tokens plus sampler\.gen_length 8 needs 65 .* has 64"
    ):
        engine.generate([Request([1], seed=0), Request([1] * 57, seed=0)])
    assert engine.generate([Request([1] * 56, seed=0)])[0].length == 64
    block = InProcessEngine(make_model("gpt2-block4"), SamplerOptions(**STEPS))
    with pytest.raises(ValueError, match="request 0"):
        block.generate([Request([1] * 57, seed=0)])
    assert block.generate([Request([1] * 55, seed=0)])[0].length == 64


@pytest.mark.parametrize(
    ("request_", "message"),
    [(Request([], seed=0), "request 0 has an empty prompt"), (Request([1], 0, num_inference_steps=0), "at least 1")],
)
def test_requests_that_cannot_be_are_refused(make_model, request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InProcessEngine(make_model("gpt2-full"), SamplerOptions(**STEPS)).generate([request_])


def test_engines_that_cannot_be_are_refused(make_model) -> None:
    with pytest.raises(ValueError, match=r"rollout\.max_batch_size must be at least 1"):
        InProcessEngine(make_model("gpt2-full"), SamplerOptions(**STEPS), max_batch_size=0)
    with pytest.raises(ValueError, match=r"sampler\.record_x0 needs a full-attention model"):
        InProcessEngine(make_model("gpt2-block4"), SamplerOptions(**STEPS, record_x0=True))
    with pytest.raises(ValueError, match=r"sampler\.gen_length \(6\) must be a multiple"):
        InProcessEngine(make_model("gpt2-block4"), SamplerOptions(gen_length=6, num_inference_steps=4))


def test_no_requests_no_rollouts(make_model) -> None:
    assert InProcessEngine(make_model("gpt2-full"), SamplerOptions(**STEPS)).generate([]) == []


# --- other records ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_length", [None, 4])
def test_the_full_fill_of_every_step_is_recorded_on_request(make_model, block_length: int | None) -> None:
    model = make_model("qwen3-full")
    options = SamplerOptions(**STEPS, block_length=block_length, record_x0=True)
    plain = InProcessEngine(model, options.model_copy(update={"record_x0": False}), eos_token_id=EOS)
    filled = InProcessEngine(model, options, eos_token_id=EOS).generate(requests())
    for trajectory, without in zip(filled, plain.generate(requests()), strict=True):
        assert_same_rollout(trajectory, without)
        assert without.x0_hat is None
        x0_hat = trajectory.x0_hat
        assert x0_hat.shape == (trajectory.num_steps, trajectory.length)
        assert (x0_hat != model.mask_token_id).all()
        for step in range(trajectory.num_steps):
            canvas = trajectory.canvas_at(step)
            known = canvas != model.mask_token_id
            assert (x0_hat[step, known] == canvas[known]).all()
            now = trajectory.step == step
            assert (x0_hat[step, trajectory.position[now]] == trajectory.token[now]).all()
            for name in ("confidence", "logprob"):
                values = getattr(trajectory, f"x0_{name}")[step]
                assert (np.isnan(values) == known).all()
                assert (values[trajectory.position[now]] == getattr(trajectory, name)[now]).all()
            # Also the draws that were not committed: one forward of the step's canvas gives their log-probs.
            with torch.no_grad():
                logprobs = model(torch.from_numpy(canvas)[None])[0].log_softmax(-1).numpy()
            drawn = np.flatnonzero(~known)
            expected = logprobs[drawn, x0_hat[step, drawn]]
            np.testing.assert_allclose(trajectory.x0_logprob[step, drawn], expected, rtol=0, atol=1e-9)
            np.testing.assert_allclose(trajectory.x0_confidence[step, drawn], np.exp(expected), rtol=1e-6)


def test_the_record_carries_its_origin(make_model) -> None:
    options = SamplerOptions(**STEPS, block_length=4, temperature=0.7, top_p=0.9, top_k=5)
    full = InProcessEngine(make_model("gpt2-full"), options).generate([Request([1, 2, 3], seed=42)], policy_version=7)[
        0
    ]
    block = InProcessEngine(make_model("gpt2-block4"), options).generate([Request([1, 2, 3], seed=42)])[0]
    assert full.sampler == {"temperature": 0.7, "top_p": 0.9, "top_k": 5}
    assert (full.seed, full.policy_version, full.exact, full.mask_token_id) == (42, 7, True, 11)
    assert (full.block_length, full.block_origin) == (4, 3)
    assert (block.block_length, block.block_origin) == (4, 0)


class Saturated:
    """A model that is certain: every confidence is exactly 1.0, also at the prompt's positions."""

    mask_token_id, attention, block_length, logit_shift, max_length = 5, "full", None, 0, 64

    def hidden_states(self, input_ids, *, visible=None, position_ids=None, cache=None):
        return (
            torch.nn.functional.one_hot(torch.arange(input_ids.shape[1]) % 5, 6).double().expand(len(input_ids), -1, -1)
        )

    def token_logits(self, hidden):
        return hidden * 1e4 - 1e9 * torch.nn.functional.one_hot(torch.tensor(5), 6)


@pytest.mark.parametrize("selector", ["top_n", "threshold", "dynamic", "left_most"])
def test_prompts_survive_confidences_of_exactly_one(selector: str) -> None:
    """Published decoders re-select fixed positions, prompt tokens too, once confidences tie."""
    options = SamplerOptions(gen_length=8, num_inference_steps=4, block_length=4, selector=selector)
    trajectories = InProcessEngine(Saturated(), options).generate([Request([4] * n, seed=n) for n in range(1, 6)])
    for trajectory in trajectories:
        trajectory.validate()
        assert trajectory.confidence.tolist() == [1.0] * 8
        assert sorted(trajectory.position) == list(range(trajectory.prompt_length, trajectory.length))
        assert trajectory.final_canvas()[: trajectory.prompt_length].tolist() == [4] * trajectory.prompt_length
