"""The memory plan against what DeepSpeed estimates, what its engine holds, and what autograd keeps."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import GPT2Config

from rl.config import load_config
from rl.estimators.logprob import logprob_and_entropy
from rl.modalities.text_memory import BatchShape, activations, batch_shape, text_memory
from rl.model_section import LoraOptions
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rl.models.lora import add_adapters
from rl.sections import OptimizerConfig
from rl.train.deepspeed_json import read_deepspeed_config
from rl.train.learner import Learner
from rl.train.memory import GIB, memory_lines, model_states
from tests import runs

VOCAB, WIDTH = 32, 16
P = 4_000_000_000


@pytest.mark.parametrize("ranks", [1, 8])
def test_half_precision_states_are_deepspeeds_estimate(ranks: int) -> None:
    two = model_states(P, P, read_deepspeed_config("zero2_bf16"), ranks)
    assert two.device - two.buffers == estimate_zero2_model_states_mem_needs(P, ranks, 1, False)[1]
    three = model_states(P, P, read_deepspeed_config("zero3_bf16"), ranks)
    # Its formula for stage 3 leaves the 16-bit gradients out.
    assert (
        three.device - three.buffers == estimate_zero3_model_states_mem_needs(P, 0, ranks, 1, False)[1] + 2 * P / ranks
    )


def test_stages_by_hand() -> None:
    """8 parameters on 4 ranks, float32: 4 bytes each for weight and gradient, 8 for the moments."""
    states = {stage: model_states(8, 8, {"zero_optimization": {"stage": stage}}, 4) for stage in range(4)}
    parts = {stage: (s.parameters, s.gradients, s.optimizer) for stage, s in states.items()}
    # From stage 1 on the optimizer works on a flat part of its own: another 4 bytes.
    assert parts == {0: (32, 32, 64), 1: (32, 32, 24), 2: (32, 8, 24), 3: (8, 8, 24)}
    frozen = model_states(8, 2, {"zero_optimization": {"stage": 0}}, 4)
    assert (frozen.parameters, frozen.gradients, frozen.optimizer) == (32, 8, 16)
    offloaded = model_states(8, 8, read_deepspeed_config("zero3_bf16_offload_all"), 4)
    assert (offloaded.parameters, offloaded.optimizer, offloaded.host) == (0, 0, 16 * 2 + 2 * 2)


def build(layers: int, device: str, family: str = "gpt2") -> DiffusionLM:
    backbone = {**(runs.GPT2 | {"n_layer": layers} if family == "gpt2" else runs.QWEN3 | {"num_hidden_layers": layers})}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    with torch.device(device):
        return DiffusionLM(DiffusionLMConfig(backbone={**backbone, **dropout, "vocab_size": VOCAB}, mask_token_id=0))


def test_states_are_what_the_engine_holds() -> None:
    model = build(1, "cpu")
    learner = Learner(model, "zero0", OptimizerConfig(), 1, torch.device("cpu"))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    learner.update([ids], lambda batch: learner.forward(batch).square().mean(), None)
    total = sum(p.numel() for p in model.parameters())
    plan = model_states(total, total, read_deepspeed_config("zero0"), 1)
    assert plan.parameters == sum(p.numel() * p.element_size() for p in learner.module.parameters())
    moments = [v for state in learner.optimizer.state.values() for v in state.values() if v.dim()]
    assert plan.optimizer == sum(v.numel() * v.element_size() for v in moments)


def test_adapters_share_the_model_they_are_in() -> None:
    """What learner and sampling copy hold together is the plan's two lines; only adapters have moments."""
    model = build(1, "cpu", "qwen3")
    add_adapters(model, LoraOptions(rank=2), "", 0)
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False))
    assert trained == 2 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 32))
    learner = Learner(model, "zero0", OptimizerConfig(), 1, torch.device("cpu"))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    learner.update([ids], lambda batch: learner.forward(batch).square().mean(), None)
    plan = model_states(trained, trained, read_deepspeed_config("zero0"), 1)
    held = {p.data_ptr(): p.numel() * 4 for p in [*model.parameters(), *learner.module.parameters()]}
    assert sum(held.values()) == plan.parameters + 4 * total
    assert plan.gradients == sum(p.numel() * 4 for p in learner.module.parameters() if p.requires_grad)
    moments = [v for state in learner.optimizer.state.values() for v in state.values() if v.dim()]
    assert plan.optimizer == sum(v.numel() * v.element_size() for v in moments)
    # 4 layers of 64 wide, 4 heads of 16 with 2 for keys and values, 128 inside.
    lines = memory_lines(load_config(None, config("model.lora.rank=2")), 2, 8)
    assert 4 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)) == 8192
    assert "0.00819 M of them trained" in lines[0]


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_activations_are_what_autograd_keeps(family: str) -> None:
    """Three layers with the real kernel on the CPU, against a count on the meta device from one and two layers."""
    shape = BatchShape(rows=2, width=16, decisions=5, masked=False)
    plan = activations(lambda layers: build(layers, "meta", family), 3, shape)
    model, kept = build(3, "cpu", family), {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids, place = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
        hidden = model.hidden_states(ids, position_ids=torch.zeros_like(ids))
        result = logprob_and_entropy(model.token_logits(hidden[place, place]), place, 1.0)
    assert result[0].requires_grad
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert plan.peak(recompute=False) - plan.head_backward == pytest.approx(real, rel=0.02)
    assert plan.layer_input == 2 * 16 * 16 * 4
    assert plan.head_backward == 5 * VOCAB * 8
    assert plan.peak(recompute=True) < plan.peak(recompute=False)


def config(*overrides: str) -> list[str]:
    sizes = "{model_type: qwen3, vocab_size: 151936, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 4, "
    heads = "num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16}"
    block = ["model.attention=block_causal", "model.block_length=4", "sampler.block_length=4", "sampler.gen_length=16"]
    small = ["train.prompts_per_step=8", "train.group_size=4", "train.micro_batch_size=4", "algorithm.name=tracerl"]
    return [f"model.backbone={sizes}{heads}", *block, *small, "sampler.num_inference_steps=8", *overrides]


def test_shape_of_a_micro_batch_by_hand() -> None:
    """A prompt of 8, 4 blocks of 4 with 2 steps each: 20 clean tokens before the last block, 8 noisy copies of 4."""
    assert batch_shape(load_config(None, config()), 8) == BatchShape(rows=4, width=20 + 32, decisions=64, masked=True)
    full = ["model.attention=full", "model.block_length=null", "sampler.block_length=null"]
    assert batch_shape(load_config(None, config(*full)), 8) == BatchShape(4 * 8, 24, 64, False)


def test_lines_and_limit() -> None:
    lines = memory_lines(load_config(None, config("train.deepspeed=zero2_bf16")), 2, 8)
    # 16 requests on a rank, 25 positions, keys and values of 2 heads of 16 in 4 layers, 2 bytes each.
    assert any(f"rollout cache {16 * 25 * 2 * 4 * 2 * 16 * 2 / GIB:.2f}" in line for line in lines)
    with pytest.raises(ValueError, match=r"the plan needs .* GiB per rank and --memory is 0.01: take more ranks"):
        memory_lines(load_config(None, config()), 2, 8, limit_gib=0.01)
    with pytest.raises(ValueError, match=r"model\.backbone must give model_type, vocab_size"):
        memory_lines(load_config(None, config("model.backbone={model_type: gpt2}")), 2, 8)


def test_a_guide_is_held_and_reads(tmp_path) -> None:
    """A GPT-2 of 8 positions, 4 wide, one layer: 4 (10 + 8) + 8 + (3 x 4 x 4 + 12) + 20 + 84 + 76 + 2 x 4 numbers."""
    GPT2Config(vocab_size=10, n_positions=8, n_embd=4, n_layer=1, n_head=1).save_pretrained(tmp_path)
    numbers = 4 * (10 + 8) + 2 * 8 + (3 * 4 * 4 + 12) + (4 * 4 + 4) + (4 * 16 + 16) + (16 * 4 + 4) + 2 * 4
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        guide = f"sampler.guide={{model: {tmp_path}, dtype: {dtype}, batch_size: 3}}"
        found = text_memory(load_config(None, config(guide)), 1, 8, True)
        assert found.held == {"sampler.guide": numbers * size}
        # 16 tokens of each of 3 answers; one answer's logits in float32, and its log-probs.
        assert found.sampling["logits of sampler.guide"] == 16 * 10 * (3 * size + 8)
    assert any(line == "memory: sampler.guide 0.00" for line in memory_lines(load_config(None, config(guide)), 1, 8))
    served = text_memory(load_config(None, config("sampler.guide={model: 'http://localhost:1'}")), 1, 8, True)
    assert served == text_memory(load_config(None, config()), 1, 8, True)


def test_command() -> None:
    """Without the checkpoint, which `check` alone would ask for; batch numbers are checked against the ranks given."""
    words = ["check", "--config", "configs/trado_4b_math_tracerl.yaml", "sampler.gen_length=64", "--plan", "--ranks"]
    steps = ["sampler.num_inference_steps=64", "eval.num_inference_steps=[64]"]
    done = runs.cli(*words, "8", "--memory", "80", *steps)
    assert done.returncode == 0, done.stderr
    assert "4.41 B parameters by model.backbone, 8 rank(s), zero3_bf16" in done.stdout
    refused = runs.cli(*words, "7", *steps)
    assert refused.returncode == 2
    assert "train.prompts_per_step (64) must be a multiple of train.updates_per_step x ranks (1 x 7)" in refused.stderr


def test_a_folder_describes_itself_and_a_hub_name_is_described_by_the_config(tmp_path) -> None:
    """`model.backbone` of a published size stands beside a small folder in `model.path`: the folder counts."""
    model = build(2, "cpu", "qwen3")
    model.save_pretrained(tmp_path / "small")
    own = sum(p.numel() for p in model.parameters())
    full = ["model.attention=full", "model.block_length=null", "sampler.block_length=null"]
    at = tmp_path / "small"
    lines = memory_lines(load_config(None, config(*full, f"model.path={at}")), 1, 8)
    assert any(f"{own / 1e9:.3g} B parameters by {at / 'config.json'}" in line for line in lines)
    lines = memory_lines(load_config(None, config(*full, "model.path=somebody/model")), 1, 8)
    assert any("parameters by model.backbone" in line for line in lines)
