"""Self-speculative decoding has the law of the autoregressive reading, and the learner scores that law."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rl.estimators.trace_rows import packed_rows
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.self_speculative import SelfSpeculativeEngine
from rollouts.engines.tokens import token_engine
from rollouts.samplers.options import SamplerOptions

# Read at the mask or before it, with clean tokens that see their block or only what is left of them.
FAMILIES = ["qwen3-block4", "qwen3-block4-shifted-causal", "gpt2-block2-causal"]


def options(**changed: Any) -> SamplerOptions:
    return SamplerOptions(**{"gen_length": 8, "num_inference_steps": 8, "verify": True, **changed})


def scored(model: Any, trajectories: Any) -> np.ndarray:
    with torch.no_grad():
        return (
            packed_rows(trajectories, logit_shift=model.logit_shift, context_causal=model.context_causal)
            .score(model)
            .logprob.numpy()
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_law_is_the_autoregressive_reading(make_model, family: str) -> None:
    """Against all 81 answers, scored one token at a time. The prompt ends inside a block; blocks end inside answers."""
    model, prompt, count = make_model(family, vocab_size=4, scale=0.7), [1, 2, 0], 4000
    engine = token_engine(model, options(gen_length=4, num_inference_steps=4, temperature=1.2), max_batch_size=count)
    assert isinstance(engine, SelfSpeculativeEngine)
    trajectories = engine.generate([Request(prompt, seed) for seed in range(count)])
    forwards = np.mean([t.decoder["forwards"] for t in trajectories])
    assert 2 <= forwards < 8, "drafts are kept, so that two forwards give more than one token"
    every = list(itertools.product(range(3), repeat=4))
    # The exact law, by the learner: each answer in the place of one that was drawn.
    answers = [replace(trajectories[0], token=np.array(answer)) for answer in every]
    exact = np.exp(scored(model, answers).reshape(81, 4).sum(1))
    assert exact.sum() == pytest.approx(1.0)
    drawn = np.zeros(81)
    for trajectory in trajectories:
        trajectory.validate()
        drawn[every.index(tuple(trajectory.token.tolist()))] += 1
    np.testing.assert_array_less(np.abs(drawn / count - exact), 4.5 * np.sqrt(exact * (1 - exact) / count) + 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_blocks_of_one_token(make_model, family: str) -> None:
    """The learner, and the engine that decodes the model at block length 1, give what was recorded."""
    model = make_model(family)
    for settings in ({"temperature": 1.3}, {"temperature": 0.8, "top_p": 0.8}, {"top_k": 4}):
        speculative = options(**settings)
        requests = [Request([(3 * i + n) % 11 for i in range(n)], seed=n) for n in range(1, 8)]
        trajectories = token_engine(model, speculative, eos_token_id=0, max_batch_size=4).generate(requests)
        recorded = np.concatenate([t.logprob for t in trajectories])
        np.testing.assert_allclose(scored(model, trajectories), recorded, rtol=0, atol=1e-9)
        for trajectory in trajectories:
            ends = np.flatnonzero(trajectory.token == 0)
            assert len(trajectory.token) == (ends[0] + 1 if len(ends) else 8)
        one = InProcessEngine(
            model, options(block_length=1, verify=False, **settings),
            eos_token_id=0, max_batch_size=4,
        ).generate(requests)  # fmt: skip
        np.testing.assert_allclose(scored(model, one), np.concatenate([t.logprob for t in one]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_blocks_of_one_token(make_model, family: str) -> None:
    model = make_model(family)
    requests = [Request([(5 * i + n) % 11 for i in range(n)], seed=n) for n in range(1, 8)]
    both = [
        token_engine(model, options(temperature=0.0, **changed), eos_token_id=0)
        for changed in ({}, {"verify": False, "block_length": 1})
    ]
    speculative, plain = (engine.generate(requests) for engine in both)
    assert [t.response_ids().tolist() for t in speculative] == [t.response_ids().tolist() for t in plain]


def test_a_rollout_does_not_depend_on_its_batch(make_model) -> None:
    model = make_model(FAMILIES[0])
    requests = [Request(list(range(1, n + 1)), seed=n) for n in range(1, 7)]
    together = token_engine(model, options(), max_batch_size=6).generate(requests)
    alone = token_engine(model, options(), max_batch_size=1).generate(requests[::-1])[::-1]
    assert [t.token.tolist() for t in together] == [t.token.tolist() for t in alone]


def test_a_cache_changes_nothing_but_the_work(make_model, monkeypatch) -> None:
    """Causal context and shifted logits: the same rollouts from the windows alone, for prompts of any length."""
    model = make_model("qwen3-block4-shifted-causal")
    options = SamplerOptions(gen_length=12, num_inference_steps=12, block_length=4, verify=True, temperature=0.8)
    requests = [Request([1 + (n + i) % 9 for i in range(1 + n % 6)], seed=n) for n in range(12)]
    work, found = [], []
    for cached in (True, False):
        if not cached:
            monkeypatch.setattr(SelfSpeculativeEngine, "_filled_cache", lambda *_: None)
        engine = SelfSpeculativeEngine(model, options, eos_token_id=0, max_batch_size=5)
        found.append(engine.generate(requests))
        work.append(engine.stats.query_tokens)
    for mine, plain in zip(*found, strict=True):
        assert mine.token.tolist() == plain.token.tolist() and mine.decoder == plain.decoder
        np.testing.assert_allclose(mine.logprob, plain.logprob, rtol=0, atol=1e-9)
    assert work[0] < 0.7 * work[1]


def test_what_it_cannot_do_is_refused(make_model) -> None:
    with pytest.raises(ValueError, match=r"sampler\.verify reads a block-causal model"):
        token_engine(make_model("gpt2-full"), options())
    for changed in ({"preset": "rcr"}, {"record_x0": True}, {"constraint": {"regex": "a"}}):
        with pytest.raises(ValueError, match=r"sampler\.verify does not go with"):
            options(**changed)
