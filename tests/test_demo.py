"""`make demo` with a tiny model: conversion and RL as adapters, resumed, copied to two folders, shown."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def tiny_autoregressive(folder: Path) -> str:
    """A random Llama with a tokenizer of whole words, an unused token to be the mask, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<end>", "<user>", "<model>", "the", "wolf", "plays", "piano", "old", "a", "<unused>"]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    tokenizer.chat_template = "<user> {{ messages[0]['content'] }} <model> "
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=10, max_position_embeddings=64, initializer_range=0.8, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_demo_shows_what_a_run_with_adapters_left(tmp_path, monkeypatch, capsys) -> None:
    from rl.config import load_config
    from rl.train import loop
    from rl.train.run import Run

    path, out = tiny_autoregressive(tmp_path / "ar"), tmp_path / "run"
    changes = [
        f"model.path={path}", "model.convert={block_length: 4, mask_token: <unused>}", f"eval.baseline={path}",
        f"reward.functions=[{{name: keyword_fluency, params: {{model: {path}}}}}, "
        f"{{name: keyword_sentence, weight: 0, params: {{model: {path}, max_nats: 9, min_words: 1}}}}]",
        "sampler.gen_length=8", "sampler.num_inference_steps=2", "eval.num_inference_steps=[8, 2]",
        "train.mixed_steps=[2, 8]", "eval.num_prompts=3",
    ]  # fmt: skip
    overrides = [
        f"run.output_dir={out}", *changes, "model.lora.rank=2", "convert.steps=1", "convert.num_texts=4",
        "convert.batch_size=4", "train.prompts_per_step=2", "train.group_size=2", "eval.viewer_items=0",
        "checkpoint.every=1", "filters.drop_zero_variance=false",
    ]  # fmt: skip
    for steps, resume in ((1, "false"), (2, "true")):
        words = [*overrides, f"train.steps={steps}", f"run.resume={resume}"]
        with Run.open(load_config(ROOT / "configs" / "smollm_words.yaml", words)) as run:
            summary = loop.train(run)
    assert summary["train_steps"] == 2 and summary["convert_steps"] == 1 and summary["baseline"].keys() == {"8"}
    adapters = tmp_path / "adapters"
    # The tokenizer stays with the model they adapt.
    leave = shutil.ignore_patterns("tokenizer*", "*.jinja")
    shutil.copytree(out / "warm_start", adapters / "converted", ignore=leave)
    shutil.copytree(out / "checkpoints" / "step_2" / "hf", adapters / "after_rl", ignore=leave)
    first, last = (load_file(adapters / name / "adapter_model.safetensors") for name in ("converted", "after_rl"))
    assert {tensor.dtype for tensor in last.values()} == {torch.bfloat16}
    assert any(not torch.equal(first[name], last[name]) for name in last)
    argv = ["demo.py", "--config", str(ROOT / "configs" / "smollm_words.yaml"), "--adapters", str(adapters)]
    monkeypatch.setattr("sys.argv", [*argv, "--prompts", "2", "--steps", "2", *changes])
    script = runpy.run_path(str(ROOT / "scripts" / "demo.py"))
    script["main"]()
    shown = capsys.readouterr().out
    for name in ("autoregressive", "converted", "after RL"):
        assert f"{name}: " in shown and "of 2 right" in shown
    monkeypatch.setattr("sys.argv", [*argv[:-1], str(tmp_path / "nothing"), "--prompts", "1", *changes])
    with pytest.raises(SystemExit, match="2"):
        script["main"]()
    assert "there are no adapters in" in capsys.readouterr().err
