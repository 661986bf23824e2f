"""Models: what a position sees, what it predicts, and folders that load back as what was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rl.model_section import ModelConfig
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rl.models.load import load_policy, save_policy
from rl.models.tokenizers import load_tokenizer
from rl.tasks.char_tokenizer import char_tokenizer
from rl.tasks.jsonl import JsonlTask
from rl.tasks.sudoku import SudokuTask
from rollouts.model_protocol import DenoisingModel, mask_token_of

FAMILIES = ["gpt2-full", "qwen3-full", "gpt2-full-shifted", "gpt2-block4", "qwen3-block4"]
TINY = {"model_type": "gpt2", "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return char_tokenizer("01234=")


def canvas(model: DiffusionLM) -> torch.Tensor:
    ids = torch.randint(0, 11, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 6:9] = model.mask_token_id
    return ids


# --- what a position sees ---------------------------------------------------------------------------------------------


@torch.no_grad()
def changed_positions(model: DiffusionLM, ids: torch.Tensor, at: int) -> list[int]:
    """Positions whose logits move when the token at one position does."""
    other = ids.clone()
    other[:, at] = (other[:, at] + 1) % 11
    return ((model(ids) - model(other)).abs().amax((0, 2)) > 1e-9).nonzero().flatten().tolist()


@pytest.mark.parametrize("family", ["gpt2-full", "qwen3-full", "gpt2-full-shifted"])
def test_full_attention_sees_everything(make_model, family: str) -> None:
    model = make_model(family)
    for at in (0, 5, 11):
        assert changed_positions(model, canvas(model), at) == list(range(12))


@pytest.mark.parametrize("family", ["gpt2-block4", "qwen3-block4"])
def test_block_causal_attention_sees_up_to_the_end_of_its_block(make_model, family: str) -> None:
    model = make_model(family)
    for at in (0, 3, 4, 7, 11):
        assert changed_positions(model, canvas(model), at) == list(range(at // 4 * 4, 12))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_what_samplers_ask_for(make_model, family: str) -> None:
    model = make_model(family)
    assert isinstance(model, DenoisingModel)
    assert mask_token_of(model) == 11 and model.max_length == 64
    assert model.logit_shift == int(family.endswith("shifted"))
    assert model.block_length == (4 if "block" in family else None)
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_token_is_never_predicted(make_model, family: str) -> None:
    model = make_model(family)
    with torch.no_grad():
        logits = model(canvas(model))
        assert (logits.softmax(-1)[..., 11] == 0).all()
        # Not even where the head likes it best, hot or cold.
        model.lm_head.weight[11] = 100 * model.lm_head.weight[3]
        for temperature in (0.1, 1.0, 10.0):
            assert ((model(canvas(model)) / temperature).softmax(-1)[..., 11] == 0).all()
            assert model(canvas(model)).softmax(-1).sum(-1).allclose(torch.ones(()).double())


def test_logits_are_float32_at_least(make_model) -> None:
    model = make_model("qwen3-full")
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        with torch.no_grad():
            assert model.to(dtype)(canvas(model)).dtype == expected


def test_logits_are_computed_where_they_are_read_only(make_model) -> None:
    model = make_model("gpt2-block4")
    ids = canvas(model)
    with torch.no_grad():
        everywhere = model(ids)
        position = torch.arange(12)
        visible = (position[None, :] // 4 <= position[:, None] // 4)[None].expand(2, -1, -1)
        hidden = model.hidden_states(ids, visible=visible)
        assert hidden.shape == (2, 12, 24)
        torch.testing.assert_close(model.token_logits(hidden[:, [2, 7]]), everywhere[:, [2, 7]], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": {"vocab_size": 8}}, r"model\.backbone needs model_type"),
        ({"attention": "causal"}, r"model\.attention must be full or block_causal, got 'causal'"),
        ({"attention": "block_causal"}, r"model\.block_length must be set: the model's attention is block_causal"),
        ({"block_length": 4}, r"model\.block_length is for attention block_causal, and this model's is full"),
        ({"logit_shift": 2}, r"model\.logit_shift must be 0 or 1, got 2"),
        (
            {"context_causal": True},
            r"model\.context_causal needs attention block_causal: full attention has no context",
        ),
        ({"mask_token_id": None}, r"model\.mask_token_id must lie in the vocabulary of 8, got None"),
        ({"mask_token_id": 8}, r"model\.mask_token_id must lie in the vocabulary of 8, got 8"),
    ],
)
def test_configs_that_describe_no_diffusion_model_are_refused(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"backbone": {**TINY, "vocab_size": 8}, "mask_token_id": 7, **change}
    with pytest.raises(ValueError, match=message):
        DiffusionLM(DiffusionLMConfig(**settings))


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_with_equal_logits(make_model, tokenizer, tmp_path: Path, family: str) -> None:
    model = make_model(family)
    save_policy(model, tokenizer, tmp_path)
    for _ in range(2):
        loaded = load_policy(ModelConfig(path=str(tmp_path)), None, seed=0)
        assert not loaded.training and loaded.dtype == torch.float64
        for name in ("mask_token_id", "attention", "block_length", "logit_shift", "max_length"):
            assert getattr(loaded, name) == getattr(model, name), name
        with torch.no_grad():
            assert torch.equal(loaded(canvas(model)), model(canvas(model)))
        # Saved again and loaded again.
        save_policy(loaded, tokenizer, tmp_path)
    ids = load_tokenizer(ModelConfig(path=str(tmp_path)), SudokuTask())("12=", add_special_tokens=False).input_ids
    assert ids == [1, 2, 5]


def test_a_new_policy_comes_from_its_seed(tokenizer) -> None:
    config = ModelConfig(backbone={**TINY, "attn_pdrop": 0.1}, attention="block_causal", block_length=4)
    one, same, other = (load_policy(config, tokenizer, seed) for seed in (0, 0, 1))
    assert one.mask_token_id == tokenizer.mask_token_id and one.config.backbone["vocab_size"] == 9
    assert one.config.backbone["resid_pdrop"] == 0.0 and not one.training
    weights = [model.lm_head.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.fixture
def folder(make_model, tokenizer, tmp_path: Path) -> Path:
    save_policy(make_model("gpt2-full"), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def refusal(path: Path | str) -> str:
    with pytest.raises(ValueError) as caught:
        load_policy(ModelConfig(path=str(path)), None, seed=0)
    message = str(caught.value)
    assert "\n" not in message and "model.path" in message
    return message


def test_incomplete_folders_are_refused_in_one_line(folder: Path) -> None:
    assert "is not a folder" in refusal(folder / "nowhere")
    (folder / "config.json").rename(folder / "config.bak")
    assert "config.json is missing" in refusal(folder)
    (folder / "config.bak").rename(folder / "config.json")
    (folder / "model.safetensors").rename(folder / "model.bin")
    assert "no .safetensors weights" in refusal(folder)


def test_weights_that_are_cut_off_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for length in (100, len(content) - 10):
        weights.write_bytes(content[:length])
        assert "cannot be loaded" in refusal(folder)


def test_a_missing_weight_is_refused_and_not_drawn_at_random(folder: Path) -> None:
    """transformers fills it with random numbers, prints a report and goes on."""
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "is incomplete: 1 weights are missing, lm_head.weight first" in refusal(folder)
    save_file({**weights, "lm_head.weight": head[:5]}, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight has shape [5, 24] instead of [12, 24]" in refusal(folder)
    save_file(
        {**weights, "lm_head.weight": head, "extra": head.clone()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert "1 weights belong to no such model, extra first" in refusal(folder)


def test_a_missing_shard_is_refused(make_model, tmp_path: Path) -> None:
    make_model("gpt2-full").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    assert "cannot be loaded" in refusal(tmp_path) and shards[1].name in refusal(tmp_path)


def test_other_peoples_models_are_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "cannot be loaded" in refusal(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "opt", "vocab_size": 8}))
    message = refusal(folder)
    assert (
        "model_type 'opt': known are diffusion_lm, llada, Dream, sdar, llada2_moe, sdar_moe, diffusion_gemma, "
        in message
    )
    assert ", gemma, llava, gpt_neox, and masked LMs of transformers" in message


def test_no_model_at_all_is_refused(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.backbone or model\.path is required"):
        load_policy(ModelConfig(), tokenizer, seed=0)
    tokenizer.save_pretrained(tmp_path)
    unmasked = load_tokenizer(ModelConfig(tokenizer=str(tmp_path)), SudokuTask())
    unmasked.mask_token = None
    with pytest.raises(ValueError, match=r"model\.tokenizer has no mask token"):
        load_policy(ModelConfig(backbone=TINY), unmasked, seed=0)


def test_a_tokenizer_has_to_come_from_somewhere(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"model\.tokenizer is required: this task does not bring its own alphabet"):
        load_tokenizer(ModelConfig(), JsonlTask(str(tmp_path / "rows.jsonl")))
    with pytest.raises(ValueError, match="is not a folder"):
        load_tokenizer(ModelConfig(tokenizer=str(tmp_path / "nowhere")), SudokuTask())
    with pytest.raises(ValueError, match=r"no tokenizer can be loaded from .* set model.tokenizer") as caught:
        load_tokenizer(ModelConfig(path=str(tmp_path)), SudokuTask())
    assert "\n" not in str(caught.value)


def test_the_published_tokenizer_of_block_models_loads(shared_data, tmp_path: Path) -> None:
    """SDAR's: the mask token is an added one, behind the vocabulary of Qwen3."""
    source = tmp_path / "tokenizer"
    shutil.copytree(shared_data / "tokenizers" / "qwen3_sdar", source)
    tokenizer = load_tokenizer(ModelConfig(tokenizer=str(source)), SudokuTask())
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (151669, 151643)
