"""Rollouts with weights of 8 bits: what is rounded, what is shared, and that the learner corrects for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rl.models import copies
from rl.models.copies import LowCopy, LowLinear
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.latent_options import LatentSamplerOptions
from rollouts.samplers.options import SamplerOptions
from tests.image_models import rollouts, tiny_policy
from tests.runs import lines, series, tiny_config, train_here


def test_a_weight_by_hand() -> None:
    linear = nn.Linear(2, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.27, -0.634], [0.0, 0.0], [-25.4, 0.1]]))
        linear.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    low = LowLinear(linear, "int8")
    assert low.numbers.tolist() == [[127, -63], [0, 0], [-127, 0]] and low.numbers.dtype == torch.int8
    torch.testing.assert_close(low.scale, torch.tensor([0.01, 1e-12 / 127, 0.2]))
    torch.testing.assert_close(low(torch.tensor([[1.0, 2.0]])), torch.tensor([[1.27 - 1.26 + 1, 2.0, -25.4 + 3]]))
    turned = Conv1D(3, 2)
    turned.weight, turned.bias = nn.Parameter(linear.weight.T.clone()), linear.bias
    assert torch.equal(LowLinear(turned, "int8").numbers, low.numbers)


def test_a_weight_of_float8_by_hand() -> None:
    """With 3 bits of mantissa numbers of 16 to 32 are even ones, and of 1 to 2 eighths."""
    linear = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[4.48, 0.165, -0.2104, 0.0131]]))
    low = LowLinear(linear, "fp8")
    assert low.numbers.dtype == torch.float8_e4m3fn and low.numbers.tolist() == [[448, 16, -22, 1.25]]
    torch.testing.assert_close(low(torch.ones(1, 4)), torch.tensor([[4.48 + 0.16 - 0.22 + 0.0125]]))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["gpt2-full", "qwen3-block4"])
def test_a_copy_rounds_linear_layers_and_follows_the_policy(make_model: Any, family: str, kind: str) -> None:
    model = make_model(family)
    low = LowCopy(model, kind)
    assert any(isinstance(m, LowLinear) for m in low.model.modules())
    assert not any(isinstance(m, LowLinear) for m in model.modules())
    assert low.model.lm_head.weight is model.lm_head.weight and low.model.config is model.config
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])

    def logits(policy: Any) -> torch.Tensor:
        with torch.no_grad():
            return policy.token_logits(policy.hidden_states(ids))[..., :-1]

    gap = (logits(low.model) - logits(model)).abs().max()
    assert 1e-4 < gap < 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    stale = logits(low.model)
    low.refresh()
    fresh = (logits(low.model) - logits(model)).abs().max()
    assert fresh < 0.4 * (stale - logits(model)).abs().max()
    # It samples, and says what it sampled from: its own law, not the policy's.
    options = SamplerOptions(gen_length=8, num_inference_steps=8, block_length=4 if "block" in family else None)
    (one,) = InProcessEngine(low.model, options).generate([Request([1, 2], 0)])
    (other,) = InProcessEngine(model, options).generate([Request([1, 2], 0)])
    assert 1e-6 < abs(one.logprob[0] - other.logprob[0]) < 0.5 or one.token[0] != other.token[0]


def test_images_are_sampled_with_a_copy_too() -> None:
    policy = tiny_policy()
    models = {kind: LowCopy(policy, kind).model for kind in ("int8", "fp8")}
    assert all(any(isinstance(m, LowLinear) for m in model.modules()) for model in models.values())
    options = LatentSamplerOptions(num_inference_steps=3)
    exact, *low = (rollouts(model, options, count=1)[0].latents for model in (policy, *models.values()))
    gaps = [abs(one - exact).max() for one in low]
    # Numbers of 3 bits of mantissa are coarser than whole ones up to 127.
    assert 1e-5 < gaps[0] < 0.3 and gaps[0] < gaps[1] < 1.5


@pytest.mark.parametrize("old", ["sampler", "recompute"])
def test_the_learner_corrects_for_the_weights_that_sampled(
    tmp_path: Path, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gap is there and small, and where the recipe's ratio does not correct for it, a weight near 1 does."""
    short = ["sft.steps=0", "train.steps=2", f"algorithm.old_logprob={old}"]
    gaps = {}
    low = "int8" if old == "sampler" else "fp8"
    monkeypatch.setattr(copies, "_KINDS", {low: copies._KINDS[low]})
    for kind in ("none", low):
        train_here(tiny_config(tmp_path / kind, *short, f"rollout.quantize={kind}"))
        gaps[kind] = series(tmp_path / kind / "run", "train", "policy/logprob_gap_max")
        steps = lines(tmp_path / kind / "run", "train")
        weights = [step["policy/lag_weight"] for step in steps if "policy/lag_weight" in step]
        if kind == low and old == "recompute":
            assert len(weights) == 2 and all(0.9 < w < 1.1 and w != 1 for w in weights), weights
        else:
            assert not weights
    largest = {"int8": 0.1, "fp8": 0.4}[low]
    assert max(gaps["none"]) < 1e-5 and all(1e-5 < gap < largest for gap in gaps[low])


def test_what_quantizes_elsewhere_is_refused(tmp_path: Path, run: Any) -> None:
    words = tiny_config(tmp_path, "rollout.quantize=int8", "rollout.engine=ray")
    code, _, err = run("check", *words)
    assert code == 2 and "rollout.quantize int8 is for rollout.engine in_process" in err
