"""What must also hold on a GPU, where there is one (scripts/gpu_check.sh); on the CPU it costs seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl.estimators.trace_rows import trace_rows
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.shared import SharedForwards
from rollouts.samplers import noise
from rollouts.samplers.options import SamplerOptions
from tests.conftest import FAMILIES

pytestmark = pytest.mark.device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REQUESTS = [Request([1, 2, 3], seed=5), Request([4] * 6, seed=6), Request([1, 2, 3], seed=7)]


def options(**changes: Any) -> SamplerOptions:
    return SamplerOptions(gen_length=16, num_inference_steps=8, **changes)


def test_the_draws_are_those_of_the_cpu() -> None:
    seed, step, position = torch.arange(40)[:, None, None], torch.arange(7)[:, None], torch.arange(9)
    here = noise.uniform(seed, step, position, noise.TOKEN_STREAM)
    there = noise.uniform(seed.to(DEVICE), step.to(DEVICE), position.to(DEVICE), noise.TOKEN_STREAM)
    assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_are_those_of_the_cpu_and_the_learner_agrees(make_model: Any, family: str) -> None:
    """In float64: token for token, and the learner's log-probs and gradients are the sampler's."""
    block = FAMILIES[family][2]
    model = make_model(family)
    expected = InProcessEngine(model, options(block_length=block)).generate(REQUESTS)
    gradients = []
    for device in ("cpu", DEVICE):
        model = model.to(device)
        got = InProcessEngine(SharedForwards(model), options(block_length=block), device=device).generate(REQUESTS)
        for one, other in zip(got, expected, strict=True):
            assert (one.final_canvas() == other.final_canvas()).all() and (one.step == other.step).all()
        rows = trace_rows(got, model).distinct().to(device)
        logprob = rows.score(model).logprob
        assert float((logprob.detach() - rows.sampler_logprob).abs().max()) < 1e-9
        model.zero_grad()
        logprob.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-9 * float(gradients[0].abs().max()) + 1e-12


@pytest.mark.parametrize("family", ["qwen3-full", "qwen3-block4"])
def test_half_precision_agrees_to_its_rounding(make_model: Any, family: str) -> None:
    """In bfloat16 sampler and learner run other kernels: the mean difference of a log-prob stays below 0.1."""
    model = make_model(family).to(DEVICE, torch.bfloat16)
    got = InProcessEngine(model, options(block_length=FAMILIES[family][2]), device=DEVICE).generate(REQUESTS)
    rows = trace_rows(got, model).to(DEVICE)
    gap = (rows.score(model).logprob.detach().double() - rows.sampler_logprob).abs()
    assert float(gap.mean()) < 0.1


@pytest.mark.skipif(DEVICE == "cpu", reason="FlexAttention has no backward on the CPU")
def test_flex_attention_scores_as_sdpa_does(make_model: Any) -> None:
    """Packed rows under a block mask and under a dense one, float32."""
    model = make_model("qwen3-block4").float().to(DEVICE)
    got = InProcessEngine(model, options(block_length=4), device=DEVICE).generate(REQUESTS)
    rows = trace_rows(got, model).to(DEVICE)
    expected = rows.score(model).logprob.detach()
    model.config._attn_implementation = "flex_attention"
    assert model.wants_block_mask
    assert float((rows.score(model).logprob.detach() - expected).abs().max()) < 1e-3
