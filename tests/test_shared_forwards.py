"""Equal canvases share a forward: less work, the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl.estimators.trace_rows import remask_rows
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.shared import SharedForwards, first_of_equal_rows
from rollouts.samplers.options import SamplerOptions


@pytest.fixture(scope="module")
def model() -> DiffusionLM:
    torch.manual_seed(0)
    backbone = {"model_type": "gpt2", "vocab_size": 8, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    quiet = {"bos_token_id": None, "eos_token_id": None, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return DiffusionLM(DiffusionLMConfig(backbone={**backbone, **quiet}, mask_token_id=7)).double().eval()


OPTIONS = SamplerOptions(gen_length=6, num_inference_steps=3)
# Two prompts of different lengths, four rollouts each: first canvases coincide within a prompt.
REQUESTS = [Request(prompt, seed=i) for prompt in ([1, 2], [3, 4, 5]) for i in range(4)]


def test_first_of_equal_rows_by_hand() -> None:
    key = torch.tensor([[1, 2], [0, 0], [1, 2], [1, 3], [0, 0]])
    first, inverse = first_of_equal_rows(key)
    assert sorted(first.tolist()) == [0, 1, 3]
    assert torch.equal(key[first][inverse], key)


def test_sampler_is_unchanged_and_runs_fewer_rows(model: DiffusionLM) -> None:
    engine, plain = InProcessEngine(SharedForwards(model), OPTIONS), InProcessEngine(model, OPTIONS)
    with_sharing, without = engine.generate(REQUESTS), plain.generate(REQUESTS)
    for a, b in zip(with_sharing, without, strict=True):
        assert np.array_equal(a.token, b.token) and np.array_equal(a.position, b.position)
        np.testing.assert_allclose(a.logprob, b.logprob, rtol=0, atol=1e-12)
    width = 9
    assert (plain.stats.rows_asked, plain.stats.sequence_forwards, plain.stats.query_tokens) == (24, 24, 24 * width)
    # The first step of four rollouts of a prompt is one canvas; later ones are told apart on the trajectories.
    distinct = sum(len({(*t.prompt_ids, -1, *t.canvas_at(step)) for t in without}) for step in range(3))
    assert distinct <= 18 and engine.stats.rows_asked == 24
    assert (engine.stats.sequence_forwards, engine.stats.query_tokens) == (distinct, distinct * width)


def test_rows_that_differ_in_length_only_are_not_merged(model: DiffusionLM) -> None:
    # The same ids, but the last position is padding in the second row.
    ids = torch.tensor([[1, 2, 7], [1, 2, 7]])
    visible = torch.tensor([[[True, True, True]], [[True, True, False]]])
    hidden = SharedForwards(model).hidden_states(ids, visible=visible)
    assert not torch.allclose(hidden[0, :2], hidden[1, :2])
    torch.testing.assert_close(hidden, model.hidden_states(ids, visible=visible), rtol=0, atol=1e-12)


def test_merged_rows_give_equal_logprobs_and_gradients(model: DiffusionLM) -> None:
    rows = remask_rows(InProcessEngine(model, OPTIONS).generate(REQUESTS))
    merged = rows.distinct()
    assert len(merged.input_ids) < len(rows.input_ids)
    weight = torch.linspace(-1, 1, len(rows.row), dtype=torch.float64)
    results = []
    for each in (rows, merged):
        model.zero_grad()
        logprob, entropy, *_ = each.score(model)
        ((logprob + 0.3 * entropy) * weight).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((logprob.detach(), entropy.detach(), gradients))
    for plain, shared in zip(*results, strict=True):
        torch.testing.assert_close(shared, plain, rtol=0, atol=1e-12)
