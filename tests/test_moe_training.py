"""Training mixtures of experts: adapters on stacked experts, frozen routers, load metrics, ZeRO 3."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rl.cli import main
from rl.model_section import LoraOptions, ModelConfig
from rl.models import routing
from rl.models.load import load_policy, save_policy
from tests import runs
from tests.test_families import IDS, TOKENIZER
from tests.test_lora import logits, shake
from tests.test_moe_families import EXPERTS, tensors, write

EVERYTHING = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def llada2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder in float32, blocks of 4."""
    weights = {n: t.float() for n, t in tensors("llada2").items()}
    return write(tmp_path_factory.mktemp("llada2"), "llada2", weights, torch_dtype="float32", block_size=4)


def load(path: str | Path, **settings: Any) -> Any:
    return load_policy(ModelConfig(path=str(path), **settings), TOKENIZER, seed=0)


@torch.no_grad()
def test_adapters_on_attention_and_experts(llada2: Path, tmp_path: Path) -> None:
    plain, policy = load(llada2), load(llada2, lora=LoraOptions(rank=2, targets=EVERYTHING))
    torch.testing.assert_close(logits(policy), logits(plain), rtol=0, atol=1e-5)
    trained = {name.split(".lora_")[0].split("layers.")[1] for name, p in policy.named_parameters() if p.requires_grad}
    # Two wrappers, one inside the other, on the experts of the two layers that have them.
    inside = {f"{layer}.mlp.experts{inner}" for layer in (1, 2) for inner in ("", ".base_layer")}
    assert trained == {f"{layer}.self_attn.q_proj" for layer in range(3)} | inside
    shake(policy)
    moved = logits(policy)
    assert (moved - logits(plain)).abs().max() > 0.1
    # Saved and read back; merged into the published layout, expert by expert.
    save_policy(policy, TOKENIZER, tmp_path / "adapters")
    assert torch.equal(logits(load(tmp_path / "adapters")), moved)
    assert main(["export", str(tmp_path / "adapters"), str(tmp_path / "out"), "--layout", "llada2"]) == 0
    torch.testing.assert_close(logits(load(tmp_path / "out")), moved, rtol=0, atol=1e-4)
    before, after = load_file(llada2 / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    experts = {name for name in before if ".mlp.experts." in name}
    assert changed == experts | {f"model.layers.{i}.attention.query_key_value.weight" for i in range(3)}
    # By hand: the k-th factor of expert e is row e * rank + k of A, and column k * E + e of B.
    wrapper = policy.backbone.layers[1].mlp.experts.base_layer
    assert wrapper.parameter_name == "gate_up_proj"
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    delta = sum(torch.outer(b[:, k * EXPERTS + 5], a[5 * 2 + k]) for k in range(2))
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    torch.testing.assert_close(after[name], before[name] + delta[8:], rtol=0, atol=1e-5)


def test_experts_that_do_not_exist_are_refused(llada2: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.lora\.targets \['experts\.up_proj'\]"):
        load(llada2, lora=LoraOptions(rank=2, targets=["experts.up_proj"]))
    with pytest.raises(ValueError, match=r"model\.train_router is false, and the model has no routers"):
        load_policy(ModelConfig(backbone=runs.GPT2, train_router=False), TOKENIZER, seed=0)


def run_of(folder: Path, source: Path, *overrides: str) -> list[str]:
    return runs.tiny_config(
        folder, "model.backbone={}", f"model.path={source}", "sft.steps=0", "train.steps=1", "eval.viewer_items=0",
        "train.max_logprob_gap=1e-3", "sampler.num_inference_steps=8", "eval.num_inference_steps=[8]", *overrides,
    )  # fmt: skip


def test_a_frozen_router_stays_and_the_load_is_logged(llada2: Path, tmp_path: Path) -> None:
    runs.train_here(run_of(tmp_path, llada2, "model.train_router=false"))
    before = load(llada2).state_dict()
    after = load(tmp_path / "run" / "checkpoints" / "step_1" / "hf").state_dict()
    for name, tensor in after.items():
        frozen = ".mlp.gate." in name
        assert torch.equal(tensor, before[name]) == frozen, name
    line = runs.lines(tmp_path / "run", "train")[0]
    assert 0.5 < line["moe/load_entropy"] < 1 and 1 < line["moe/load_max"] < EXPERTS and line["moe/unused"] < 0.5


def test_the_load_of_experts_by_hand(llada2: Path) -> None:
    """Two layers of 8 experts. One spreads evenly, one sends every token to the experts 0, 1 and 2."""
    model = load(llada2)
    found = routing.routers(model)
    routing.count_loads(found)
    found[0].counts += 6
    found[1].counts[:3] += 16
    metrics = routing.load_metrics(found)
    assert metrics["moe/load_entropy"] == pytest.approx((1 + math.log(3) / math.log(8)) / 2)
    assert metrics["moe/load_max"] == pytest.approx(8 / 3) and metrics["moe/unused"] == 5 / 16
    routing.count_loads(found)
    model(torch.tensor([IDS, IDS]))
    assert [int(router.counts.sum()) for router in found] == [2 * len(IDS) * 3] * 2
    assert routing.load_metrics([]) == {}


def test_zero_3_on_two_ranks_is_one_rank(llada2: Path, tmp_path: Path) -> None:
    """Ranks whose tokens choose other experts gather the same stacked tensors: no rank waits for another."""
    alone = run_of(tmp_path / "one", llada2)
    runs.train_here(alone)
    both = run_of(tmp_path / "two", llada2, f"train.deepspeed={runs.ZERO[3]}")
    result = runs.ranks(2, *runs.many([both]))
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (runs.weights(folder / "run") for folder in (tmp_path / "one", tmp_path / "two"))
    assert runs.largest_difference(one, two) < 1e-5
    loads = [
        runs.lines(folder / "run", "train")[0]["moe/load_entropy"] for folder in (tmp_path / "one", tmp_path / "two")
    ]
    # Other padding, nearly the same shares.
    assert loads[0] == pytest.approx(loads[1], abs=0.02)
