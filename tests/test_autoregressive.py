"""The autoregressive baseline: its draws against a plain loop without a cache, its place in `eval`, and refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rl.config import load_config
from rl.model_section import ModelConfig
from rl.models.causal import CausalLM
from rl.models.load import load_policy, save_policy
from rl.tasks.char_tokenizer import char_tokenizer
from rollouts.engines.causal import CausalEngine
from rollouts.engines.in_process import Request
from rollouts.samplers import noise
from rollouts.samplers.options import SamplerOptions

Run = Callable[..., tuple[int, str, str]]
PROMPTS = ([1, 2, 3], [4], [2, 5, 1, 0, 3], [3, 3])
EOS = 5


def tiny_llama(vocab_size: int, **more: Any) -> LlamaForCausalLM:
    """Random weights, drawn wide enough for distinct and peaked predictions."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=64, initializer_range=0.3, **sizes, **more)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def lm() -> LlamaForCausalLM:
    return tiny_llama(7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    tokenizer = char_tokenizer("01234=")
    tiny_llama(len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def by_hand(lm: Any, prompt: list[int], seed: int, length: int, temperature: float) -> tuple[list[int], list[float]]:
    """Token by token, every forward over the whole text."""
    text, logprobs = list(prompt), []
    for step in range(length):
        with torch.no_grad():
            logits = lm(torch.tensor([text])).logits[0, -1]
        if not temperature:
            token = int(logits.argmax())
        else:
            probs = (logits / temperature).softmax(-1)
            place = (torch.tensor(value) for value in (seed, step, len(text)))
            u = float(noise.uniform(*place, noise.TOKEN_STREAM))
            token = min(int((probs.double().cumsum(0) < u).sum()), len(probs) - 1)
            logprobs.append(float(probs[token].log()))
        text.append(token)
        if token == EOS:
            break
    return text[len(prompt) :], logprobs


@pytest.mark.parametrize("temperature", [0.0, 4.0])
def test_answers_are_those_of_a_loop_without_batch_and_cache(lm: Any, temperature: float) -> None:
    options = SamplerOptions(gen_length=9, temperature=temperature)
    engine = CausalEngine(CausalLM(lm, lm.config, 64), options, eos_token_id=EOS, max_batch_size=3)
    found = engine.generate([Request(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS * 2)])
    wanted = [by_hand(lm, prompt, seed, 9, temperature) for seed, prompt in enumerate(PROMPTS * 2)]
    # Rows leave the batch at different times, and one never does.
    assert len({len(tokens) for tokens, _ in wanted}) > 2 or not temperature
    for trajectory, (tokens, logprobs) in zip(found, wanted, strict=True):
        trajectory.validate()
        assert trajectory.response_ids().tolist() == tokens and trajectory.num_steps == len(tokens)
        assert trajectory.reveal_step()[trajectory.prompt_length :].tolist() == list(range(len(tokens)))
        assert trajectory.logprob == pytest.approx(logprobs or np.zeros(len(tokens)), abs=1e-4)
    assert engine.stats.generated_tokens == sum(len(tokens) for tokens, _ in wanted)


def test_greedy_answers_are_those_of_generate(lm: Any) -> None:
    engine = CausalEngine(CausalLM(lm, lm.config, 64), SamplerOptions(gen_length=12, temperature=0), eos_token_id=EOS)
    for prompt, trajectory in zip(PROMPTS, engine.generate([Request(p, 0) for p in PROMPTS]), strict=True):
        ids = torch.tensor([prompt])
        text = lm.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=EOS,
            pad_token_id=0,
        )  # fmt: skip
        assert trajectory.response_ids().tolist() == text[0, len(prompt) :].tolist()


def test_a_request_that_does_not_fit_is_refused(lm: Any) -> None:
    engine = CausalEngine(CausalLM(lm, lm.config, 64), SamplerOptions(gen_length=60))
    with pytest.raises(ValueError, match=r"request 0: prompt of 5 tokens plus sampler.gen_length 60 .* 64 positions"):
        engine.generate([Request([1] * 5, 0)])
    with pytest.raises(ValueError, match="request 0 has an empty prompt"):
        engine.generate([Request([], 0)])


# --- in the commands ------------------------------------------------------------------------------------------------


SIZES = ["run.device=cpu", "sampler.gen_length=16", "eval.num_prompts=6"]


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> str:
    path, tokenizer = tmp_path_factory.mktemp("diffusion"), char_tokenizer("01234=")
    backbone = {"model_type": "gpt2", "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    save_policy(load_policy(ModelConfig(backbone=backbone), tokenizer, seed=0), tokenizer, path)
    return str(path)


LINE = r" {2}16 steps: \d\.\d{3} .* n=6  unscored=0  tokens/forward=1.00$"


def test_eval_counts_it_beside_a_model_or_alone(run: Run, folder: str, diffusion: str, tmp_path: Path) -> None:
    config = ["eval", "--config", "quickstart", f"eval.baseline={folder}", *SIZES]
    both = [*config, f"model.path={diffusion}", "eval.num_inference_steps=[8]"]
    code, out, err = run(*both, "--output", str(tmp_path / "both.json"))
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "accuracy, judged by sudoku" and lines[1].startswith("   8 steps: ")
    assert lines[2] == f"autoregressive, {folder}" and re.match(LINE, lines[3]) and len(lines) == 4
    code, alone, err = run(*config, "--output", str(tmp_path / "alone.json"))
    assert code == 0 and alone.splitlines() == [lines[0], *lines[2:]]
    both_json, alone_json = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("both", "alone"))
    assert both_json["baseline"] == alone_json["baseline"] and list(alone_json["baseline"]["results"]) == ["16"]
    assert list(both_json["results"]) == ["8"] and alone_json["results"] == {}


def test_eval_keeps_its_generations(run: Run, folder: str, diffusion: str, tmp_path: Path) -> None:
    kept = ["--samples", "2", "--temperature", "0.7", "--output", str(tmp_path)]
    config = ["eval", "--config", "quickstart", f"model.path={diffusion}", f"eval.baseline={folder}", *SIZES, *kept]
    code, out, err = run(*config, "eval.num_inference_steps=[8]")
    assert code == 0, err
    assert "\ntop_n@8 " in out.replace("static", "top_n") and "\nautoregressive@16 " in out
    settings = json.loads((tmp_path / "autoregressive" / "settings.json").read_text())
    assert list(settings["decoders"]) == ["autoregressive@16"] and settings["model"]["attention"] == "causal"
    assert settings["decoders"]["autoregressive@16"]["temperature"] == 0.7
    lines = (tmp_path / "autoregressive" / "generations.jsonl").read_text().splitlines()
    assert len(lines) == 12
    for line in map(json.loads, lines):
        assert line["steps"] == len(line["completion_ids"]) and line["reveal_steps"] == list(range(line["steps"]))
    assert run(*config, "eval.num_inference_steps=[8]")[0] == 0  # goes on, with nothing to do
    assert settings["model"]["dtype"] == "bfloat16"
    code, _, err = run(*config, "eval.num_inference_steps=[8]", "model.autoregressive_dtype=float32")
    assert code and "model.dtype" in err and "float32" in err


def test_rollout_writes_its_trajectories(run: Run, folder: str, tmp_path: Path) -> None:
    config = ["model.path=" + folder, "model.autoregressive=true", *SIZES]
    code, out, err = run("rollout", *config, "--output", str(tmp_path / "r"), "--num-prompts", "2")
    assert code == 0, err
    assert "2 rollouts" in out and (tmp_path / "r" / "trajectories.npz").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "model.autoregressive=true"], "model.autoregressive is for eval and rollout"),
        (["eval", "model.autoregressive=true"], "model.path is required"),
        (["eval", "AR", "eval.backslide=true"], "eval.backslide needs x0 predictions"),
        (["eval", "BASELINE", "--decoding", "static"], "--decoding chooses positions"),
        (["eval", "BASELINE", "--samples", "2"], "--samples 2 needs --temperature above 0"),
        (["eval", "BASELINE", "task.name=digits", "sampler={}"], "eval.baseline is for text"),
        (["eval", "AR", "PATH", "model.lora.rank=2"], "model.lora is for models that are trained"),
        (["eval", "AR", "PATH", "model.family=sdar"], "model.family is for"),
        (["eval", "eval.baseline=missing/model.gguf"], "there is no file missing/model.gguf"),
    ],
)
def test_refusals(run: Run, folder: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    words = {"BASELINE": f"eval.baseline={folder}", "PATH": f"model.path={folder}", "AR": "model.autoregressive=true"}
    arguments = [words.get(word, word) for word in arguments]
    code, _, err = run(*arguments, f"run.output_dir={tmp_path / 'run'}")
    assert code == 2 and message in err and len(err.splitlines()) == 1


def test_steps_of_an_evaluation_are_tokens() -> None:
    overrides = ["model.path=x", "sampler.gen_length=16", "sampler.block_length=4", "eval.num_inference_steps=[8]"]
    assert load_config(None, overrides).evaluation_steps() == [8]
    assert load_config(None, [*overrides, "model.autoregressive=true"]).evaluation_steps() == [16]


def test_a_misspelt_tokenizer_is_refused_at_once_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from rl.models import tokenizers

    def unknown(*place: Any) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(tokenizers.urllib.request, "getproxies", dict)
    monkeypatch.setattr(tokenizers.socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match=r"'tokeniser' is no folder here .* the hub cannot be reached"):
        tokenizers.load_tokenizer(ModelConfig(tokenizer="tokeniser"), None)  # type: ignore[arg-type]
