"""Adapters on language models: what is trained, what is saved, and runs that train nothing else."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from rl.cli import main
from rl.config import load_config
from rl.estimators.trace_rows import trace_rows
from rl.model_section import LoraOptions, ModelConfig
from rl.models.copies import share_frozen, trained_copy
from rl.models.export import write_whole
from rl.models.load import load_policy, save_policy
from rl.models.lora import WEIGHTS, merge_adapters
from rl.sections import OptimizerConfig
from rl.tasks.char_tokenizer import char_tokenizer
from rl.train.learner import Learner
from rl.train.plan import check_run
from rl.values.model import Policy, PolicyWithValue, ValueModel
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from tests import runs, test_families, test_masked_lm

TOKENIZER = char_tokenizer("01234=")
BUILT_IN = ["gpt2-full", "gpt2-full-shifted", "gpt2-block4", "qwen3-block4"]
MASKED = ["albert", "bert", "distilbert", "esm", "modernbert"]
EVERY = [*BUILT_IN, *test_families.FAMILIES, *MASKED]
SOME = ["gpt2-block4", "llada", "dream", "sdar", "bert"]
IDS = torch.tensor([[1, 4, 0, 2, 5, 3, 3, 1, 6, 0, 6, 4], [2, 2, 5, 6, 6, 6, 6, 1, 0, 0, 3, 6]])


@pytest.fixture
def folder_of(make_model: Callable[..., Any], tmp_path: Path) -> Callable[[str], str]:
    """A saved model of a family, in float64."""

    def make(name: str) -> str:
        path = tmp_path / name
        if name in test_families.FAMILIES:
            test_families.write(path, name)
        elif name in MASKED:
            save_policy(test_masked_lm.policy(name), TOKENIZER, path)
        else:
            save_policy(make_model(name), TOKENIZER, path)
        return str(path)

    return make


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of 4 k parameters in float32."""
    folder = tmp_path_factory.mktemp("base") / "model"
    save_policy(load_policy(ModelConfig(backbone=runs.GPT2), TOKENIZER, seed=0), TOKENIZER, folder)
    return folder


def load(path: str | Path, **lora: Any) -> Any:
    return load_policy(ModelConfig(path=str(path), lora=LoraOptions(**lora)), None, seed=0)


def shake(policy: nn.Module, scale: float = 0.3, seed: int = 1) -> None:
    """Move every trained weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@torch.no_grad()
def logits(policy: Any) -> torch.Tensor:
    return policy(IDS)[..., :6]


def linear_layers(policy: Any) -> list[str]:
    return [name for name, module in policy.body.named_modules() if isinstance(module, nn.Linear | Conv1D)]


@pytest.mark.parametrize("name", EVERY)
def test_every_linear_layer_below_the_head_gets_an_adapter_and_nothing_else_is_trained(
    folder_of: Callable[[str], str], name: str
) -> None:
    folder = folder_of(name)
    plain, policy = load(folder), load(folder, rank=2, alpha=3)
    assert torch.equal(logits(policy), logits(plain))  # new adapters add nothing
    trained = {n.removesuffix(".default.weight") for n, p in policy.named_parameters() if p.requires_grad}
    path = next(n for n, m in policy.named_modules() if m is policy.body)
    assert trained == {f"{path}.{n}.lora_{x}" for n in linear_layers(plain) for x in "AB"}
    shake(policy)
    # By hand: W + 3/2 B A.
    with torch.no_grad():
        for layer in linear_layers(plain):
            adapted, weight = policy.body.get_submodule(layer), plain.body.get_submodule(layer).weight
            change = 1.5 * adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
            weight.add_(
                change if weight.shape == change.shape and not isinstance(adapted.base_layer, Conv1D) else change.T
            )
    before = logits(load(folder))
    assert (logits(policy) - before).abs().max() > 0.05
    torch.testing.assert_close(logits(policy), logits(plain), rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", EVERY)
def test_a_saved_policy_is_read_back_by_us_by_peft_and_merged(folder_of: Callable[[str], str], name: str) -> None:
    folder = folder_of(name)
    policy = load(folder, rank=2)
    policy.exclude([[0, 1]])
    shake(policy)
    expected = logits(policy)
    saved = Path(folder).parent / "saved"
    save_policy(policy, TOKENIZER, saved)
    assert {p.name for p in saved.glob("*.safetensors")} == {WEIGHTS}
    assert (saved / WEIGHTS).stat().st_size < sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))
    assert torch.equal(logits(policy), expected)  # saving changes nothing
    for again in (load(saved), load(saved, rank=2)):
        assert torch.equal(logits(again), expected)
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in policy.parameters()]
        assert [list(r) for r in again.excluded_token_ids] == [[0, 1]] and again.block_length == policy.block_length
    # peft on the untouched backbone gives the same states.
    visible = torch.ones(1, 1, IDS.shape[1], dtype=torch.bool)
    with torch.no_grad():
        states = policy.hidden_states(IDS, visible=visible)
        plain = load(folder)
        peft.PeftModel.from_pretrained(plain.body, str(saved))
        torch.testing.assert_close(plain.hidden_states(IDS, visible=visible), states, rtol=0, atol=1e-12)
    assert main(["export", str(saved), str(saved.parent / "merged")]) == 0
    merged = load(saved.parent / "merged")
    assert all(p.requires_grad for p in merged.parameters())
    assert merged.state_dict().keys() == load(folder).state_dict().keys()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", test_families.FAMILIES)
def test_a_merged_policy_in_the_published_layout(family: str, tmp_path: Path) -> None:
    """The hand-written forward of the layout gives the adapted policy's logits; no other key or shape changes."""
    folder = test_families.write(tmp_path / family, family)
    policy = load(folder, rank=2)
    shake(policy, 0.1)
    save_policy(policy, TOKENIZER, tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out"), "--layout", family]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    # What a rollout server is given is the same; the policy keeps its adapters.
    before = logits(policy)
    write_whole(policy, TOKENIZER, tmp_path / "server", family)
    served = load_file(tmp_path / "server" / "model.safetensors")
    assert all(torch.equal(served[n], t) for n, t in written.items()) and torch.equal(logits(policy), before)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == test_families.PUBLISHED[family]
    assert written.keys() == test_families.tensors(family).keys()
    ids = IDS[0].tolist()
    by_hand = test_families.reference(family, written, ids)
    torch.testing.assert_close(logits(policy)[0], by_hand[:, :6], rtol=0, atol=1e-4)
    plain = test_families.reference(family, test_families.tensors(family), ids)
    assert (by_hand - plain).abs().max() > 0.1


def test_half_precision(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    """Saved in the dtype it was trained in, read back in it; merging rounds every weight once."""
    folder = folder_of("llada")
    policy = load(folder, rank=2).to(torch.bfloat16)
    shake(policy, 0.1)
    save_policy(policy, TOKENIZER, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.dtype == torch.bfloat16 and torch.equal(logits(again), logits(policy))
    merge_adapters(again)
    exact = load(tmp_path / "saved").double()
    merge_adapters(exact)
    for found, wanted in zip(again.parameters(), exact.parameters(), strict=True):
        assert torch.equal(found, wanted.to(torch.bfloat16))
    assert (logits(again) - logits(policy)).abs().max() < 0.05 * logits(policy).abs().max()


def test_copies_share_what_is_never_trained(folder_of: Callable[[str], str]) -> None:
    policy = load(folder_of("qwen3-block4"), rank=2)
    shake(policy)
    expected = logits(policy)
    for copy in (trained_copy(policy), load(folder_of("qwen3-block4"), rank=2)):
        share_frozen(copy, policy)
        for mine, theirs in zip(copy.parameters(), policy.parameters(), strict=True):
            assert (mine is theirs) == (not theirs.requires_grad)
    copy = trained_copy(policy)
    shake(copy)
    assert torch.equal(logits(policy), expected) and (logits(copy) - expected).abs().max() > 0.05
    # A critic is adapters and a head; on the policy's own backbone, the policy's adapters and a head.
    critic, both = ValueModel(policy), PolicyWithValue(policy)
    for model in (critic, both):
        assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"model", "head"}
        assert all("lora_" in n for n, p in model.model.named_parameters() if p.requires_grad)
    shake(critic)
    assert torch.equal(logits(policy), expected)


@pytest.mark.parametrize("name", SOME)
def test_the_learner_scores_what_was_sampled_and_recomputing_changes_no_gradient(
    folder_of: Callable[[str], str], name: str
) -> None:
    gradients = []
    for recompute in (False, True):
        config = ModelConfig(path=folder_of(name), lora=LoraOptions(rank=2), gradient_checkpointing=recompute)
        policy = load_policy(config, None, seed=0)
        shake(policy)
        options = SamplerOptions(gen_length=8, num_inference_steps=4, block_length=policy.block_length)
        trajectories = InProcessEngine(policy, options).generate([Request([1, 4, 2], seed=s) for s in range(3)])
        for layer in policy.modules():
            layer.training = bool(getattr(layer, "gradient_checkpointing", False))
        rows = trace_rows(trajectories, policy)
        logprob = rows.score(policy).logprob
        torch.testing.assert_close(logprob, rows.sampler_logprob, rtol=0, atol=1e-9)
        logprob.sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == {n for n, p in policy.named_parameters() if p.requires_grad}
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=0, atol=1e-9)
        assert gradient.abs().max() > 0, key


def test_a_learner_in_half_precision_trains_the_policy_that_samples(base: Path) -> None:
    """The model that both share is cast once; adapters keep a float32 master, which small updates move."""
    policy = load(base, rank=2)
    shake(policy)
    sampling = Policy(policy)
    learner = Learner(sampling, "zero2_bf16", OptimizerConfig(lr=1e-6, warmup_steps=0), 3, torch.device("cpu"))
    learner.copy_weights_into(sampling)
    assert {p.dtype for p in [*policy.parameters(), *learner.module.parameters()]} == {torch.bfloat16}
    options = SamplerOptions(gen_length=8, num_inference_steps=8)
    trajectories = InProcessEngine(policy, options).generate([Request([1, 4, 2], seed=s) for s in range(3)])
    rows = trace_rows(trajectories, policy)
    scored = learner.forward(rows).logprob
    assert (scored.double() - rows.sampler_logprob).abs().max() < 0.05
    master = [p.clone() for p in learner.optimizer.single_partition_of_fp32_groups]
    for _ in range(3):
        learner.update([rows], lambda batch: -learner.forward(batch).logprob.mean(), None)
    moved = [
        (a - b).abs().max() for a, b in zip(master, learner.optimizer.single_partition_of_fp32_groups, strict=True)
    ]
    assert sum(p.numel() for p in master) == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert min(moved) > 1e-6


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(path: str | Path, **lora: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load(path, **lora)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_options_that_do_not_fit_are_one_line(folder_of: Callable[[str], str]) -> None:
    folder = folder_of("llada")
    with pytest.raises(ValueError, match=r"model\.lora\.dropout is 0\.1: rollout and update would see different"):
        load_config(None, ["model.lora.rank=4", "model.lora.dropout=0.1"])
    with pytest.raises(ValueError, match=r"model\.lora\.alpha does nothing without adapters: set model"):
        load_config(None, ["model.lora.alpha=8"])
    with pytest.raises(ValueError, match=r"model\.lora\.targets does nothing without adapters"):
        load_config(None, ["model.lora.targets=[q_proj]"])
    new = ModelConfig(backbone=runs.GPT2, lora=LoraOptions(rank=4))
    with pytest.raises(ValueError, match=r"model\.lora\.rank is 4: adapters need a model to adapt, set model\.path"):
        load_policy(new, TOKENIZER, seed=0)
    with pytest.raises(ValueError, match=r"model\.lora\.rank is 4: adapters need a model to adapt, set model\.path"):
        check_run(load_config(None, ["model.backbone={model_type: gpt2}", "model.lora.rank=4"]))
    assert "model.lora.targets ['q_prj']: Target modules" in refusal(folder, rank=2, targets=["q_prj"])
    assert "model.lora.targets ['lm_head']: Target modules" in refusal(folder, rank=2, targets=["lm_head"])
    assert "['embed_tokens']: embed_tokens is no linear layer" in refusal(folder, rank=2, targets=["embed_tokens"])
    targets = load(folder, rank=2, targets=["q_proj", "v_proj"])
    assert sum(p.requires_grad for p in targets.parameters()) == 2 * 2 * 2


def test_a_backbone_without_linear_layers_is_refused(tmp_path: Path) -> None:
    conv = ModelConfig(backbone={"model_type": "dilated_conv", "hidden_size": 8})
    save_policy(load_policy(conv, TOKENIZER, seed=0), TOKENIZER, tmp_path)
    assert "model.lora.rank is 2: the backbone DilatedConv has no linear layers" in refusal(tmp_path, rank=2)


def test_adapters_that_do_not_fit_are_one_line(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    folder, saved = Path(folder_of("llada")), tmp_path / "saved"
    save_policy(load(folder, rank=2), TOKENIZER, saved)
    assert "model.lora.rank is 4, the adapters in" in refusal(saved, rank=4)
    weights, described = load_file(saved / WEIGHTS), json.loads((saved / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(folder)
    first = min(weights)
    save_file({n: t for n, t in weights.items() if n != first}, saved / WEIGHTS)
    assert f"is incomplete: 1 weights are missing, {first} first" in refusal(saved)
    save_file(weights | {first: weights[first][:, :3].contiguous()}, saved / WEIGHTS)
    assert f"{first} has shape" in refusal(saved)
    (saved / WEIGHTS).unlink()
    assert f"model.path '{saved}' is incomplete" in refusal(saved)
    save_file(weights, saved / WEIGHTS)
    for change, message in (
        ({"bias": "all"}, "only plain LoRA is read"),
        ({"use_dora": True}, "only plain LoRA is read"),
        ({"base_model_name_or_path": None}, "adapter_config.json does not name the base model"),
    ):
        (saved / "adapter_config.json").write_text(json.dumps(described | change))
        assert message in refusal(saved)
    (saved / "adapter_config.json").write_text(json.dumps(described))
    folder.rename(tmp_path / "moved")
    assert f"model.path '{saved}', adapters of another model: model.path '{folder}'" in refusal(saved)


# --- runs -------------------------------------------------------------------------------------------------------------

RECIPE = "algorithm={name: tracerl, kl_to: reference, kl_coef: 0.1, value: {lam: 0.9, optimizer: {eps: 1e-3}}}"


def config(folder: Path, base: Path, *overrides: str) -> list[str]:
    own = ["model.backbone={}", f"model.path={base}", "model.lora.rank=2", RECIPE, "train.max_logprob_gap=1e-4"]
    return runs.tiny_config(folder, *own, "run.seed=5", "checkpoint.every=1", "checkpoint.keep=9", *overrides)


@pytest.fixture(scope="module")
def one_rank(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    runs.train_here(config(folder, base))
    return folder / "run"


def adapters(run: Path, step: int) -> dict[str, np.ndarray]:
    file = run / "checkpoints" / f"step_{step}" / "hf" / WEIGHTS
    return {name: tensor.numpy() for name, tensor in load_file(file).items()}


def test_a_run_trains_and_keeps_adapters_alone(base: Path, one_rank: Path) -> None:
    start = {n: t.numpy() for n, t in load_file(one_rank / "warm_start" / WEIGHTS).items()}
    assert runs.largest_difference(start, adapters(one_rank, 3)) > 1e-3
    checkpoint = one_rank / "checkpoints" / "step_3"
    assert not list(checkpoint.rglob("model.safetensors"))
    # The critic starts from the policy's adapters and has its own optimizer.
    for name, others in (("policy", set()), ("value", {"head.linear.weight"})):
        state = torch.load(checkpoint / name / "state" / "mp_rank_00_model_states.pt", weights_only=False)
        trained = {key for key in state["module"] if "lora_" in key}
        assert len(trained) == 8 and state["module"].keys() == trained | others
        assert len(state["optimizer"]["state"]) == 8 + len(others)
    # The KL is to where RL began, with the base that all share; what was sampled is what is scored.
    assert runs.series(one_rank, "train", "policy/kl")[0] == pytest.approx(0, abs=1e-6)
    assert runs.series(one_rank, "train", "policy/kl")[-1] > 1e-6
    before, now = load(base), load(checkpoint / "hf")
    shared = [n for n in dict(before.named_parameters()) if n in dict(now.named_parameters())]
    assert len(shared) > 5 and all(torch.equal(before.get_parameter(n), now.get_parameter(n)) for n in shared)


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(base: Path, one_rank: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(one_rank, run)
    for step in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"step_{step}")
    arguments = config(one_rank.parent, base)
    runs.train_here([*arguments, f"run.output_dir={run}", "run.resume=true"])
    assert runs.largest_difference(adapters(run, 3), adapters(one_rank, 3)) == 0.0
    assert runs.lines(run) == runs.lines(one_rank)


RELOAD = """
import sys
import numpy as np, torch
from rl.model_section import ModelConfig
from rl.models.load import load_policy
model = load_policy(ModelConfig(path=sys.argv[1]), None, 0)
with torch.no_grad():
    np.save(sys.argv[2], model(torch.arange(12)[None] % 6).numpy())
assert "peft" not in sys.modules
"""


def test_an_exported_run_reloads_in_a_clean_process(one_rank: Path, tmp_path: Path) -> None:
    assert main(["export", str(one_rank), str(tmp_path / "model")]) == 0
    done = runs.execute([sys.executable, "-c", RELOAD, tmp_path / "model", tmp_path / "logits.npy"])
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load(one_rank / "checkpoints" / "step_3" / "hf")(torch.arange(12)[None] % 6).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-5)
