"""Long contexts: rotary bases against published factors, chunks at the head, a plan of 16 thousand tokens, needles."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rl.cli import main
from rl.config import load_config
from rl.estimators.trace_rows import trace_rows
from rl.evaluation.accuracy import Accuracy, task_measures
from rl.evaluation.command import _result_lines
from rl.model_section import ContextOptions, LoraOptions, ModelConfig
from rl.models.context import base_factor
from rl.models.load import load_policy, save_policy
from rl.tasks.load import load_task, modality_of
from rl.tasks.needle import NeedleTask
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from tests.test_families import HEADS, IDS, MASK, THETA, TOKENIZER, D, reference, tensors, write


@pytest.mark.parametrize(
    ("base", "trained", "wanted", "factor"),
    [
        # LongLLaDA's evaluation, eval/eval_llada_niah.py: LLaDA 8B at 8, 16, 24 and 32 thousand positions, Llama 3 at
        # 16 and 32 thousand, Dream at 4 thousand.
        (5e5, 4096, 8192, 4), (5e5, 4096, 16384, 14), (5e5, 4096, 24576, 31), (5e5, 4096, 32768, 55),
        (5e5, 8192, 16384, 4), (5e5, 8192, 32768, 13), (1e6, 2048, 4096, 5),
    ],
)  # fmt: skip
def test_the_factor_is_the_published_one(base: float, trained: int, wanted: int, factor: int) -> None:
    assert base_factor(base, 128, trained, wanted) == factor


def load(path: str | Path, length: int | None = None, trained: int | None = None, **settings: Any) -> Any:
    context = ContextOptions(length=length, trained_length=trained)
    return load_policy(ModelConfig(path=str(path), context=context, **settings), TOKENIZER, seed=0)


@torch.no_grad()
def test_a_stretched_model_turns_slower_and_stays_stretched(tmp_path: Path) -> None:
    folder = write(tmp_path / "llada", "llada")
    factor = base_factor(THETA, D // HEADS, 64, 4096)
    assert factor > 2
    model = load(folder, 4096)
    expected = reference("llada", tensors("llada"), IDS, theta=THETA * factor)
    logits = model(torch.tensor([IDS]))
    torch.testing.assert_close(logits[0][:, :MASK], expected[:, :MASK], rtol=0, atol=1e-4)
    assert model.max_length == 4096
    # In our own folder, in the published one, and below adapters; said again it does nothing.
    save_policy(model, TOKENIZER, tmp_path / "ours")
    for again in (load(tmp_path / "ours"), load(tmp_path / "ours", 4096)):
        assert torch.equal(again(torch.tensor([IDS])), logits) and again.max_length == 4096
    with pytest.raises(ValueError, match=r"model\.context\.length: it is stretched to 4096 already"):
        load(tmp_path / "ours", 8192)
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--layout", "llada"]) == 0
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["rope_theta"] == THETA * factor and described["max_sequence_length"] == 4096
    assert torch.equal(load(tmp_path / "out")(torch.tensor([IDS])), logits)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors("llada").keys()
    save_policy(load(folder, 4096, lora=LoraOptions(rank=2)), TOKENIZER, tmp_path / "adapters")
    torch.testing.assert_close(load(tmp_path / "adapters")(torch.tensor([IDS])), logits, rtol=0, atol=1e-9)


def test_contexts_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path, "llada")
    with pytest.raises(ValueError, match=r"model\.context\.length is 64, and the model was trained with 64 positions"):
        load(folder, 64)
    assert load(folder, 64, trained=32).max_length == 64
    with pytest.raises(ValueError, match=r"model\.context\.trained_length does nothing without"):
        load_config(None, ["model.context.trained_length=64"])
    with pytest.raises(ValueError, match=r"model\.context\.length stretches a trained model"):
        load_policy(ModelConfig(backbone={"model_type": "gpt2"}, context=ContextOptions(length=64)), TOKENIZER, 0)
    turned = write(tmp_path / "b", "dream", rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match=r"model\.context\.length is for plain rotary embeddings, .* has linear"):
        load(turned, 128)


def test_chunks_at_the_head_change_neither_scores_nor_gradients(tmp_path: Path) -> None:
    model = load(write(tmp_path, "sdar"))
    options = SamplerOptions(gen_length=8, num_inference_steps=8, temperature=0.7)
    rows = trace_rows(InProcessEngine(model, options).generate([Request([1, 4, 2], s) for s in range(3)]), model)
    results = []
    for chunk in (None, 5):
        model.head_chunk = chunk
        model.zero_grad()
        scores = rows.score(model)
        (scores.logprob * torch.linspace(1, 2, len(scores.logprob)) + 0.3 * scores.entropy).sum().backward()
        results.append((scores, [p.grad.clone() for p in model.parameters()]))
    (whole, gradients), (cut, others) = results
    assert len(whole.logprob) > 10
    torch.testing.assert_close(cut.logprob, whole.logprob, rtol=0, atol=1e-12)
    torch.testing.assert_close(cut.entropy, whole.entropy, rtol=0, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(gradients, others, strict=True))


def test_the_plan_counts_one_chunk_at_the_head() -> None:
    """docs/long_context.md has the plan of 16 thousand tokens; here 64, whose sampler is quick."""
    short = ["algorithm.value=null", "sampler.gen_length=64", "sampler.num_inference_steps=32"]
    short += ["eval.num_inference_steps=[32]", "train.micro_batch_size=8", "rollout.max_batch_size=8"]
    config = load_config("configs/trado_8b_math_tracerl.yaml", short)

    def activations(**changes: Any) -> float:
        changed = config.model_copy(update={"model": config.model.model_copy(update=changes)})
        return modality_of(config.task.name).memory(changed, 8, 64, True).activations

    whole, cut = activations(), activations(head_chunk=64)
    # 512 decisions. Each keeps a row of float32 log-probs, and the backward the logits' gradients in both precisions.
    assert whole == activations(head_chunk=4096) and whole - cut > (512 - 64) * 151_936 * (4 + 4 + 2) * 0.99
    # The config has FlexAttention; a dense mask is one byte and one bfloat16 for every pair of positions.
    assert activations(attn_implementation="sdpa") > whole


def test_needles_stand_where_they_should() -> None:
    task = load_task("needle", {"lengths": [100, 300], "depths": [0, 50, 100], "others": 2})
    rows = task.heldout_examples(12)
    assert Counter((row["length"], row["depth"]) for row in rows) == dict.fromkeys(
        [(length, depth) for length in (100, 300) for depth in (0, 50, 100)], 2
    )
    for row in rows:
        text, question = row["prompt"].split("\n\n")
        sentences = text.split(". ")
        at = next(i for i, s in enumerate(sentences) if f"number of the {row['noun']} is {row['answer']}" in s)
        assert at / (len(sentences) - 1) == pytest.approx(row["depth"] / 100, abs=0.06)
        assert row["length"] <= len(text.split()) <= row["length"] + 25
        assert sum("secret number" in s for s in sentences) == 3 and row["noun"] in question
    assert rows == task.heldout_examples(12) != task.heldout_examples(12, seed=1)
    assert {row["answer"] for row in rows}.isdisjoint(row["answer"] for row in task.train_examples(0, 0, 12))
    # Right only in the short texts.
    texts = [f"The number is {row['answer']}." if row["length"] == 100 else "It is 7." for row in rows]
    measured = task.measure(rows, texts, {"answered": 1.0})
    assert measured == {"answered": 1.0, "length_100": 1.0, "length_300": 0.0} | {
        f"depth_{depth}": 0.5 for depth in (0, 50, 100)
    }
    # `denoise-rl eval` prints them under the accuracy.
    result = Accuracy(4, "accuracy", 0.5, 0.3, 0.7, 12, 0, 48.0, 1.0, reported={"answered": 1.0})
    made: Any = [SimpleNamespace(completion=text) for text in texts]
    run: Any = SimpleNamespace(task=task)
    lines = _result_lines({4: result}, "tokens", {4: task_measures(run, rows, result, made)})
    assert lines[1].split("  ")[-5:] == [
        "depth_0 0.500", "depth_100 0.500", "depth_50 0.500", "length_100 1.000", "length_300 0.000"
    ]  # fmt: skip
    assert task_measures(SimpleNamespace(task=object()), rows, result, made) == {}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"task\.params\.depths must be percents"):
        NeedleTask(depths=[101])
