"""The key-value store, the scheduling of slots, and the caches that are approximate and say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from rl.config import load_config
from rl.estimators.trace_rows import remask_rows
from rl.train.learner import TrainingError
from rl.train.loop import reinforce
from rl.train.run import Run
from rollouts.engines.block_cache import BlockCache
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.slots import Plan, Slots
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.parts import even_quota
from rollouts.samplers.step import StepState, denoise_step

FULL = ["gpt2-full", "qwen3-full", "gpt2-full-shifted"]
STEPS = {"gen_length": 12, "num_inference_steps": 6, "block_length": 4, "temperature": 1.2}


def requests(lengths: range | list[int] = range(1, 8)) -> list[Request]:
    return [Request([1 + (5 * n + 3 * i) % 10 for i in range(n)], seed=50 + j) for j, n in enumerate(lengths)]


def same(one: Any, other: Any) -> None:
    for name in ("length", "num_steps", "step", "position", "token", "stop_length"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    np.testing.assert_allclose(one.logprob, other.logprob, rtol=0, atol=1e-11)


# --- the store --------------------------------------------------------------------------------------------------------


def test_states_come_back_from_where_they_were_written() -> None:
    """Slots that lie together are handed out as they lie, others are collected: the same numbers either way."""
    cache = BlockCache(num_slots=5, max_length=6)
    expected = torch.zeros(5, 2, 6, 3)
    generator = torch.Generator().manual_seed(0)
    for slots in ([0, 1, 2], [3, 4], [0, 2, 4], [1], [1, 3], [0, 1, 2, 3, 4]):
        positions = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in slots])
        new = torch.randn(len(slots), 2, 2, 3, generator=generator)
        for row, slot in enumerate(slots):
            expected[slot][:, positions[row]] = new[row]
        cache.aim(slots, positions, num_keys=5)
        keys, values = cache.update(new, -new, layer_idx=7)
        assert torch.equal(keys, expected[slots][:, :, :5])
        assert torch.equal(values, -expected[slots][:, :, :5])
    cache.copy([0, 0], [2, 3], num_keys=4)
    expected[[2, 3], :, :4] = expected[0, :, :4]
    cache.aim([0, 1, 2, 3, 4], torch.zeros(5, 0, dtype=torch.int64), num_keys=6)
    empty = torch.zeros(5, 2, 0, 3)
    assert torch.equal(cache.update(empty, empty, layer_idx=7)[0], expected)


# --- slots ------------------------------------------------------------------------------------------------------------


def plan(index: int, prompt: int, steps: int = 2) -> Plan:
    """A block-causal request on the grid of 4 with 8 tokens to generate."""
    start = prompt // 4 * 4
    return Plan(index, prompt, length=-(-(prompt + 8) // 4) * 4, start=start, end=start + 4, steps=steps, seed=0)


def test_the_larger_group_runs_and_the_smaller_one_waits_for_company() -> None:
    slots = Slots(3, longer_first=True)
    for slot, prompt in enumerate((4, 4, 7)):
        slots.admit(slot, plan(slot, prompt), fresh=False)
    assert slots.num_masked.tolist() == [4, 4, 1]
    group = slots.next_group()
    assert group.tolist() == [0, 1, 2]
    none = np.zeros(3, dtype=bool)
    # The third has one masked position: it completes its block and has one to store.
    assert slots.after_step(group, np.array([2, 2, 1]), none, 4).tolist() == []
    assert slots.fresh.tolist() == [False, False, True]
    assert (slots.start[2], slots.end[2], slots.num_masked[2], slots.block_step[2]) == (8, 12, 4, 0)
    group = slots.next_group()
    assert group.tolist() == [0, 1]
    slots.after_step(group, np.array([2, 2]), none[:2], 4)
    # Now all three begin a block: one forward serves them from here on.
    assert slots.next_group().tolist() == [0, 1, 2]
    assert slots.step.tolist() == [2, 2, 1]


def test_a_slot_is_freed_at_the_end_token_or_at_the_last_block() -> None:
    slots = Slots(2, longer_first=True)
    for slot in range(2):
        slots.admit(slot, plan(slot, 4), fresh=False)
    ended = np.array([True, False])
    # The end token came first, but its block is not complete: the terminal block is decoded to its end.
    assert slots.after_step(np.array([0, 1]), np.array([2, 2]), ended, 4).tolist() == []
    assert slots.after_step(np.array([0, 1]), np.array([2, 2]), ~ended & False, 4).tolist() == [0]
    assert slots.free().tolist() == [0]
    slots.admit(0, plan(2, 5), fresh=False)
    assert not slots.stopped[0] and slots.step[0] == 0
    for _ in range(2):
        done = slots.after_step(np.array([1]), np.array([2]), np.array([False]), 4)
    assert done.tolist() == [1]


def test_requests_fall_into_step(make_model) -> None:
    """Prompts of 1 to 8 tokens leave 1 to 4 masked positions in the first block, so they start out of step."""
    model = make_model("qwen3-block4")
    options = SamplerOptions(gen_length=16, num_inference_steps=16, block_length=4)
    asked = requests(range(1, 9))
    engine = InProcessEngine(model, options)
    together = engine.generate(asked)
    longest = max(t.num_steps for t in together)
    assert len({t.num_steps for t in together}) == 4
    # A round of two forwards, one for each group, would take 38 and a prefill.
    assert longest == 19 and engine.stats.forwards < 30
    assert engine.stats.sequence_forwards == sum(t.num_steps for t in together) + 5
    for one, request in zip(together, asked, strict=True):
        same(one, InProcessEngine(model, options).generate([request])[0])


def test_without_a_cache_every_forward_serves_everyone(make_model) -> None:
    """No forward is longer than another there, so nobody has to wait, in whatever block each request is."""
    engine = InProcessEngine(make_model("qwen3-full"), SamplerOptions(**STEPS))
    together = engine.generate([Request([1, 2, n], seed=n, num_inference_steps=3 * n) for n in (1, 2, 3, 4)])
    assert [t.num_steps for t in together] == [3, 6, 9, 12]
    assert engine.stats.forwards == 12


def test_equal_prompts_are_prefilled_once(make_model) -> None:
    """The rollouts of a group share their prompt's states, and each is what it would be alone."""
    model = make_model("gpt2-block4")
    options = SamplerOptions(gen_length=8, num_inference_steps=4, block_length=4)
    prompt, other = [3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]
    asked = [Request(prompt if i % 3 else other, seed=i) for i in range(9)]
    engine = InProcessEngine(model, options)
    together = engine.generate(asked)
    # Two prompts of two whole blocks, then 6 steps for each request: 4 queries, 8 when a block is stored.
    assert [t.num_steps for t in together] == [6] * 9
    assert engine.stats.query_tokens == 2 * 8 + 9 * (6 * 4 + 2 * 4)
    for one, request in zip(together, asked, strict=True):
        same(one, InProcessEngine(model, options).generate([request])[0])


def test_prompts_of_unlike_length_are_prefilled_apart(make_model) -> None:
    """A prompt of 40 tokens does not make one of 4 run 40 positions; nothing else changes."""
    model = make_model("qwen3-block4")
    options = SamplerOptions(gen_length=4, num_inference_steps=2, block_length=4)
    asked = requests([40, 4, 38, 5])
    engine = InProcessEngine(model, options)
    together = engine.generate(asked)
    decoding = sum(4 * t.num_steps + 4 * (t.length // 4 - t.prompt_length // 4 - 1) for t in together)
    # 40 and 36 whole positions share a batch, the two of 4 share another.
    assert engine.stats.query_tokens == 2 * 40 + 2 * 4 + decoding
    for one, request in zip(together, asked, strict=True):
        same(one, InProcessEngine(model, options).generate([request])[0])


# --- approximate caches -----------------------------------------------------------------------------------------------


@torch.no_grad()
def reference(model: Any, request: Request, options: SamplerOptions, mode: str) -> list[tuple[int, int, int, float]]:
    """(step, position, token, log-prob): one request, transformers' own cache cut and joined by hand."""
    prompt = list(request.prompt_ids)
    length, block, shift = len(prompt) + options.gen_length, options.block_length, model.logit_shift
    assert block is not None
    canvas = torch.tensor([prompt + [model.mask_token_id] * options.gen_length])
    edits, step = [], 0
    for start in range(len(prompt), length, block):
        stop = start + block if mode == "dual" else length
        begin = start - shift
        for block_step in range(options.steps_per_block()):
            if block_step == 0 and (mode != "frozen" or start == len(prompt)):
                everything = DynamicCache()
                hidden = model.hidden_states(canvas, cache=everything)[0, begin:stop]
            else:
                outside = [*range(begin), *range(stop, length)]
                cache = DynamicCache()
                for index, layer in enumerate(everything.layers):
                    cache.update(layer.keys[:, :, outside], layer.values[:, :, outside], index)
                positions = torch.arange(begin, stop)[None]
                hidden = model.hidden_states(canvas[:, begin:stop], position_ids=positions, cache=cache)[0]
                if mode == "frozen":
                    everything = cache
            eligible = torch.zeros_like(canvas, dtype=torch.bool)
            eligible[:, start : start + block] = canvas[:, start : start + block] == model.mask_token_id
            at = eligible[0].nonzero().squeeze(1) - shift - begin
            quota = even_quota(*(torch.tensor([x]) for x in (block, options.steps_per_block(), block_step)))
            state = StepState(canvas, eligible, eligible, quota, torch.tensor([request.seed]), torch.tensor([step]))
            result = denoise_step(state, model.token_logits(hidden[at]), options)
            for i in result.reveal.nonzero().squeeze(1).tolist():
                position, token = int(result.position[i]), int(result.token[i])
                canvas[0, position] = token
                edits.append((step, position, token, float(result.logprob[i])))
            step += 1
    return edits


@pytest.mark.parametrize("mode", ["prefix", "dual", "frozen"])
@pytest.mark.parametrize("family", FULL)
def test_approximate_caches_equal_their_definition(make_model, family: str, mode: str) -> None:
    model = make_model(family)
    options = SamplerOptions(**STEPS)
    engine = InProcessEngine(model, options, max_batch_size=3, approximate_cache=mode)
    for request, trajectory in zip(requests(), engine.generate(requests()), strict=True):
        step, position, token, logprob = (
            np.array(x) for x in zip(*reference(model, request, options, mode), strict=False)
        )
        assert not trajectory.exact
        assert trajectory.step.tolist() == step.tolist()
        assert trajectory.position.tolist() == position.tolist()
        assert trajectory.token.tolist() == token.tolist()
        np.testing.assert_allclose(trajectory.logprob, logprob, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["prefix", "dual", "frozen"])
@pytest.mark.parametrize("family", FULL)
def test_an_approximate_cache_shows_in_the_learners_log_probs(make_model, family: str, mode: str) -> None:
    """Exact at the first step of every block (of a response, if frozen), wrong behind it; without one everywhere."""
    model = make_model(family)
    gaps = {}
    for cache in ("none", mode):
        engine = InProcessEngine(model, SamplerOptions(**STEPS), approximate_cache=cache)
        trajectories = engine.generate(requests())
        assert {t.exact for t in trajectories} == {cache == "none"}
        with torch.no_grad():
            scored = remask_rows(trajectories, logit_shift=model.logit_shift).score(model).logprob
        gap = np.abs(scored.numpy() - np.concatenate([t.logprob for t in trajectories]))
        first = np.concatenate([t.step % (6 if mode == "frozen" else 2) == 0 for t in trajectories])
        gaps[cache] = gap[first].max(), gap[~first].max()
    assert max(gaps["none"]) < 1e-10
    assert gaps[mode][0] < 1e-10
    assert gaps[mode][1] > 1e-2


def test_one_step_per_block_leaves_nothing_to_approximate(make_model) -> None:
    """The first forward of a block is a whole one; the trajectories still do not claim to be exact."""
    model = make_model("gpt2-full")
    options = SamplerOptions(**{**STEPS, "num_inference_steps": 3})
    exact = InProcessEngine(model, options).generate(requests())
    for one, other in zip(
        InProcessEngine(model, options, approximate_cache="dual").generate(requests()), exact, strict=False
    ):
        same(one, other)
        assert not one.exact and other.exact


@pytest.mark.parametrize("mode", ["prefix", "dual", "frozen"])
def test_cached_rollouts_do_not_depend_on_their_batch(make_model, mode: str) -> None:
    """Requests in other phases, padding queries and refilled slots leave no trace."""
    model = make_model("qwen3-full")
    options = SamplerOptions(**{**STEPS, "selector": "dynamic", "threshold": 0.5})
    asked = [*requests(), Request([4, 4], 3, num_inference_steps=12), Request([5], 4, num_inference_steps=3)]
    alone = [InProcessEngine(model, options, eos_token_id=0, approximate_cache=mode).generate([r])[0] for r in asked]
    for size in (2, 9):
        engine = InProcessEngine(model, options, eos_token_id=0, max_batch_size=size, approximate_cache=mode)
        for one, other in zip(engine.generate(asked), alone, strict=True):
            same(one, other)


def test_a_dual_cache_forwards_less(make_model) -> None:
    model = make_model("gpt2-full")
    counts = {}
    for mode in ("none", "prefix", "dual", "frozen"):
        engine = InProcessEngine(model, SamplerOptions(**STEPS), approximate_cache=mode)
        engine.generate([Request([1, 2, 3], seed=0)])
        counts[mode] = engine.stats.query_tokens
    # 6 forwards of 15; then 3 of 15 and 3 of the rest of the canvas, or of one block.
    whole = {"none": 90, "prefix": 45 + 12 + 8 + 4, "dual": 45 + 3 * 4}
    # Only the first forward is whole, and no later one computes what lies before its block.
    assert counts == whole | {"frozen": 15 + 12 + 2 * 8 + 2 * 4}


def test_caches_that_make_no_sense_are_refused(make_model) -> None:
    options = SamplerOptions(**STEPS)
    with pytest.raises(ValueError, match=r"rollout\.cache dual is for full-attention models"):
        InProcessEngine(make_model("gpt2-block4"), options, approximate_cache="dual")
    with pytest.raises(ValueError, match=r"rollout\.cache must be none, prefix, dual or frozen, got 'paged'"):
        InProcessEngine(make_model("gpt2-full"), options, approximate_cache="paged")  # type: ignore[arg-type]
    recording = options.model_copy(update={"record_x0": True})
    with pytest.raises(ValueError, match=r"sampler\.record_x0 needs forwards of the whole canvas"):
        InProcessEngine(make_model("gpt2-full"), recording, approximate_cache="prefix")
    with pytest.raises(ValueError, match=r"rollout\.cache"):
        load_config(None, ["rollout.cache=fast"])


@pytest.mark.parametrize(("cache", "limit"), [("dual", 1e-3), ("dual", None), ("none", 1e-3)])
def test_training_on_approximate_rollouts_needs_consent(tmp_path: Path, cache: str, limit: float | None) -> None:
    """With train.max_logprob_gap set, an update on log-probs that are wrong is refused; without, the gap is logged."""
    config = load_config(
        None,
        [
            f"run.output_dir={tmp_path / 'run'}", "run.device=cpu", "run.num_threads=1",
            "model.backbone={model_type: gpt2, n_positions: 48, n_embd: 24, n_layer: 2, n_head: 2}",
            "sampler.gen_length=16", "sampler.num_inference_steps=8", "sampler.block_length=4",
            f"rollout.cache={cache}", "filters.drop_zero_variance=false",
            "train.steps=1", "train.prompts_per_step=2", "train.group_size=2", "eval.viewer_items=0",
            f"train.max_logprob_gap={'null' if limit is None else limit}",
        ],
    )  # fmt: skip
    with Run.open(config) as run:
        generator = torch.Generator().manual_seed(0)
        for parameter in run.model.parameters():
            if parameter.dim() == 2:
                # Freshly initialised models predict the same everywhere, whatever they see.
                parameter.data.normal_(0.0, 0.4, generator=generator)
        if cache == "dual" and limit is not None:
            with pytest.raises(TrainingError, match=r"more than train\.max_logprob_gap"):
                reinforce(run)
            return
        reinforce(run)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    gap = float(lines.split('"policy/logprob_gap_max": ')[1].split(",")[0].rstrip("}\n"))
    assert gap > 1e-2 if cache == "dual" else gap < 1e-4
