"""An autoregressive model becomes a diffusion model: noise, layout, soft targets, and the stage through its command."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rl.cli import main
from rl.config import load_config
from rl.estimators.conversion import SoftRows, Text, conversion_rows, hidden_tokens, soft_rows
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rl.models.tokenizers import load_tokenizer
from rl.tasks.load import load_task
from tests import runs

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "qwen3": {**runs.QWEN3, "num_hidden_layers": 2},
}
MASK = 11


def pair(kind: str, vocab_size: int = 12, **settings: Any) -> tuple[Any, DiffusionLM]:
    """A random causal LM, and the diffusion model with the same weights."""
    torch.manual_seed(3)
    described = {**SIZES[kind], "model_type": kind, "vocab_size": vocab_size, "max_position_embeddings": 64}
    described |= {"tie_word_embeddings": False, "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": 0}
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described)).eval().requires_grad_(False)
    settings = {"mask_token_id": vocab_size - 1, "attention": "block_causal", "block_length": 2} | settings
    model = DiffusionLM(DiffusionLMConfig(backbone=described, **settings)).eval()
    model.backbone.load_state_dict(teacher.base_model.state_dict())
    model.lm_head.load_state_dict(teacher.lm_head.state_dict())
    return teacher, model


def texts() -> list[Text]:
    """One answer that ended, behind a prompt that shares its block with the answer, and one that was cut."""
    return [Text(np.array([1, 2, 3, 4, 5, 6, 0]), 3, True), Text(np.array([4, 4, 7, 8, 9]), 2, False)]


# --- noise ------------------------------------------------------------------------------------------------------------


def test_every_block_hides_one_to_all_of_its_tokens_equally_often() -> None:
    block, rng, count = np.array([3, 4, 4, 4]), np.random.default_rng(0), 6000
    drawn = [hidden_tokens(block, rng) for _ in range(count)]
    assert all(hidden[0] and share[0] == 1 for hidden, share in drawn)
    patterns = Counter(tuple(hidden[1:]) for hidden, _ in drawn)
    expected = {(1, 0, 0): 1 / 9, (0, 1, 0): 1 / 9, (0, 0, 1): 1 / 9, (1, 1, 0): 1 / 9, (1, 0, 1): 1 / 9}
    expected |= {(0, 1, 1): 1 / 9, (1, 1, 1): 1 / 3}
    for pattern, probability in expected.items():
        assert patterns[pattern] / count == pytest.approx(probability, abs=0.02)
    assert all(share[1] == hidden[1:].sum() / 3 for hidden, share in drawn)


def test_later_tokens_of_a_block_are_hidden_more_often() -> None:
    """Two tokens, one of them hidden: the odds of the second are exp(beta (1 - 1/2) 1)."""
    rng, slope = np.random.default_rng(1), 1.5
    drawn = [hidden_tokens(np.zeros(2, dtype=np.int64), rng, slope)[0] for _ in range(6000)]
    alone = [hidden for hidden in drawn if hidden.sum() == 1]
    odds = np.exp(slope * 0.5)
    assert np.mean([hidden[1] for hidden in alone]) == pytest.approx(odds / (1 + odds), abs=0.02)
    assert len(alone) / len(drawn) == pytest.approx(0.5, abs=0.02)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_by_hand() -> None:
    """Blocks of 1: every answer token is masked, and read where an autoregressive model reads it."""
    _, model = pair("llama", block_length=1, logit_shift=1)
    rows, weight = conversion_rows(texts(), model, 0, np.random.default_rng(0), 1, 8)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 0, *[MASK] * 4], [4, 4, 7, 8, 9, *[MASK] * 3, 0, 0, 0]]
    assert rows.position_ids.tolist()[0] == [*range(7), 3, 4, 5, 6]
    assert rows.read.tolist() == [2, 3, 4, 5, 1, 2, 3]
    assert rows.target.tolist() == [4, 5, 6, 0, 7, 8, 9]
    assert weight.tolist() == [1 / 7] * 7


def test_the_last_block_ends_with_end_tokens_or_stays_masked_behind_a_cut_answer() -> None:
    _, model = pair("llama", block_length=4, logit_shift=1, context_causal=True)
    seen = set()
    for seed in range(20):
        rows, weight = conversion_rows(texts(), model, 0, np.random.default_rng(seed), 4, 8, ar_weight=0.5)
        position = rows.position_ids[rows.row, rows.column]
        noisy = rows.input_ids[rows.row, rows.column] == MASK
        masked = [
            [*zip(position[own].tolist(), rows.target[own].tolist(), strict=True)]
            for own in (noisy & (rows.row == i) for i in (0, 1))
        ]
        # Position 7 of the first text is filled; position 5 and later of the second are not known.
        assert set(masked[0]) <= {(3, 4), (4, 5), (5, 6), (6, 0), (7, 0)} and set(masked[1]) <= {(2, 7), (3, 8), (4, 9)}
        seen |= set(masked[0])
        assert rows.input_ids[1, 4:8].tolist() == [9, MASK, MASK, MASK]
        # Clean tokens: those of the answers, once each, read one to the left.
        clean = [*zip(rows.row[~noisy].tolist(), position[~noisy].tolist(), strict=True)]
        assert clean == [(0, 3), (0, 4), (0, 5), (0, 6), (1, 2), (1, 3), (1, 4)]
        assert torch.equal(rows.read[~noisy], rows.column[~noisy] - 1)
        assert float(weight[noisy].sum()) == pytest.approx(1) and float(weight[~noisy].sum()) == pytest.approx(0.5)
    assert (7, 0) in seen
    rows, weight = conversion_rows(texts(), model, 0, np.random.default_rng(0), 4, 8, elbo=True)
    # Every block adds as much as it has tokens: 8 answer positions in all.
    assert float(weight.sum()) == pytest.approx(1)


def test_an_image_of_tokens_is_seen_as_in_dida() -> None:
    """Emu3.5, section 4.3.1: of [text | image | noisy image], clean tokens see what is left of them; noisy tokens see
    the clean tokens before their image, and all noisy tokens of it.
    """
    _, model = pair("llama", block_length=4, context_causal=True)
    image = Text(np.array([1, 2, 3, 4, 8, 9, 10, 8]), 4, False)
    draws = (conversion_rows([image], model, None, np.random.default_rng(i), 4, 4, ar_weight=1.0)[0] for i in range(99))
    rows = next(rows for rows in draws if len(rows.target) == 8)
    assert rows.input_ids.tolist() == [[*image.ids.tolist(), *[MASK] * 4]]
    base = rows.score(model).logprob
    seen = []
    for column in range(12):
        changed = rows.input_ids.clone()
        changed[0, column] = 5
        seen.append(replace(rows, input_ids=changed).score(model).logprob != base)
    saw = torch.stack(seen, dim=1)
    noisy, clean = saw[:4], saw[4:]
    assert (noisy == torch.tensor([*[True] * 4, *[False] * 4, *[True] * 4])).all()
    # Read in place, as this model does, a clean token at p sees the columns 0 .. p.
    assert (clean == (torch.arange(12) <= torch.arange(4, 8)[:, None])).all()


def test_a_full_attention_model_sees_the_noisy_canvas_alone() -> None:
    _, model = pair("llama", attention="full", block_length=None, logit_shift=1)
    rows, _ = conversion_rows(texts(), model, 0, np.random.default_rng(2), None, 6)
    assert rows.input_ids.shape == (2, 9)
    assert torch.equal(rows.read, rows.column - 1)
    assert (rows.input_ids[rows.row, rows.column] == MASK).all()
    assert rows.input_ids[0, :3].tolist() == [1, 2, 3] and rows.input_ids[1, 5:8].tolist() == [MASK] * 3


def test_noise_does_not_depend_on_the_cut() -> None:
    _, model = pair("llama", block_length=2)
    whole, weight = conversion_rows(texts(), model, 0, np.random.default_rng(5), 2, 8)
    for i in (0, 1):
        part, own = conversion_rows(texts(), model, 0, np.random.default_rng(5), 2, 8, part=slice(i, i + 1))
        mine = whole.trajectory == i
        assert torch.equal(part.column, whole.column[mine]) and torch.equal(own, weight[mine])


# --- soft targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("causal", [False, True])
def test_in_blocks_of_one_an_unchanged_model_is_its_teacher(kind: str, causal: bool) -> None:
    """Two routes to one distribution: transformers' causal model, and the packed rows read with a shift."""
    teacher, model = pair(kind, block_length=1, logit_shift=1, context_causal=causal)
    rows, _ = conversion_rows(texts(), model, 0, np.random.default_rng(0), 1, 8, ar_weight=1.0 * causal)
    soft = soft_rows(rows, texts(), teacher)
    with torch.no_grad():
        scores = soft.score(model)
        assert scores.kl is not None and float(scores.kl.abs().max()) < 1e-5
        torch.testing.assert_close(scores.logprob, rows.score(model).logprob)
        wrong = conversion_rows(texts(), model, 0, np.random.default_rng(0), 2, 8)[0]
        assert float(soft_rows(wrong, texts(), teacher).score(model).kl.max()) > 0.05
    # What the teacher thinks of the mask token is left out.
    assert float(soft.logprobs[:, MASK].exp().max()) > 0.01


def test_behind_the_end_the_end_token_is_certain() -> None:
    teacher, model = pair("llama", block_length=4, logit_shift=1)
    for seed in range(10):
        rows, _ = conversion_rows(texts(), model, 0, np.random.default_rng(seed), 4, 8)
        position = rows.position_ids[rows.row, rows.column]
        behind = (rows.row == 0) & (position == 7)
        expected = soft_rows(rows, texts(), teacher).logprobs.exp()
        assert expected[behind].tolist() == [[1.0] + [0.0] * 11] * int(behind.sum())
        assert float(expected[~behind].max()) < 1


def test_the_gradient_of_the_soft_loss_is_the_difference_of_the_distributions() -> None:
    class Logits(torch.nn.Module):
        """Hidden states are logits."""

        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(8, 12, dtype=torch.float64))

        def hidden_states(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return self.table[None, : input_ids.shape[1]]

        def token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    model = Logits()
    _, described = pair("llama", attention="full", block_length=None)
    rows, _ = conversion_rows(texts()[:1], described, 0, np.random.default_rng(1), None, 5)
    expected = torch.rand(len(rows.target), 12, dtype=torch.float64).softmax(-1)
    expected[0] = torch.nn.functional.one_hot(torch.tensor(4), 12)
    kl = SoftRows(**vars(rows), kind="forward", logprobs=expected.log()).score(model).kl  # type: ignore[arg-type]
    assert kl is not None
    logprobs = model.table.detach()[rows.column].log_softmax(-1)
    pairs = zip(expected.tolist(), logprobs.tolist(), strict=True)
    by_hand = [sum(p * (np.log(p) - q) for p, q in zip(a, b, strict=True) if p) for a, b in pairs]
    torch.testing.assert_close(kl.detach(), torch.tensor(by_hand, dtype=torch.float64))
    kl.sum().backward()
    torch.testing.assert_close(model.table.grad[rows.column], logprobs.exp() - expected)


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ar`, a random causal LM with the tokenizer of the sudoku task; `start`, its weights as a diffusion model."""
    folder = tmp_path_factory.mktemp("convert")
    tokenizer = load_tokenizer(load_config(None).model, load_task("sudoku", {}))
    teacher, model = pair(
        "llama", len(tokenizer), mask_token_id=tokenizer.mask_token_id, logit_shift=1, context_causal=True
    )
    teacher.save_pretrained(folder / "ar")
    model.save_pretrained(folder / "start")
    for name in ("ar", "start"):
        tokenizer.save_pretrained(folder / name)
    return folder


def arguments(folder: Path, output: Path, *overrides: str) -> list[str]:
    optimizer = {"lr": 0.01, "eps": 1e-3, "warmup_steps": 1}
    config = {
        "run": {"output_dir": str(output), "device": "cpu", "num_threads": 1},
        "model": {"path": str(folder / "start")},
        "sampler": {"gen_length": 8, "num_inference_steps": 8},
        "convert": {
            "steps": 6, "batch_size": 6, "num_texts": 10, "sample_batch_size": 4, "teacher": str(folder / "ar"),
            "block_lengths": [{"until": 0.4, "lengths": [1, 2]}], "optimizer": optimizer,
        },
        "train": {"steps": 0, "deepspeed": runs.ZERO[0]},
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["convert", "--config", str(path), *overrides]


def test_the_command_samples_once_fits_and_goes_on_bit_for_bit(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(arguments(folder, tmp_path / "whole", "convert.checkpoint_every=3")) == 0
    answers = (tmp_path / "whole" / "convert" / "answers.jsonl").read_text()
    records = [json.loads(line) for line in answers.splitlines()]
    assert len(records) == 10 and all(1 <= len(record["answer_ids"]) <= 8 for record in records)
    assert len({json.dumps(record["answer_ids"]) for record in records}) > 5
    lines = [line for line in runs.lines(tmp_path / "whole") if line["stage"] == "convert"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {line["convert/block_length"] for line in lines[:3]} <= {1.0, 2.0} and lines[3]["convert/block_length"] == 2
    assert all(line["convert/masked_tokens"] > 0 for line in lines)
    # As if it had been killed behind the checkpoint of update 3, and half of the answers were not there.
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    shutil.rmtree(part / "model")
    shutil.rmtree(part / "convert" / "checkpoints" / "step_6")
    (part / "convert" / "answers.jsonl").write_text("".join(line + "\n" for line in answers.splitlines()[:4]))
    assert main(arguments(folder, part, "convert.checkpoint_every=3", "run.resume=true")) == 0
    assert "resumed from" in capsys.readouterr().out
    assert [line for line in runs.lines(part) if line["stage"] == "convert"] == lines
    assert (part / "convert" / "answers.jsonl").read_text() == answers
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "part")]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["convert.teacher=null"], "model.path: cannot load .*convert.teacher"),
        (["convert.noise=nbdiff", "model.path=PLAIN"], "convert.noise nbdiff .* needs a shifted readout"),
        (["convert.block_lengths=[{until: 1, lengths: [128]}]"], "convert.block_lengths has 128, .* 64 positions"),
        (
            ["convert.block_lengths=[{until: 1, lengths: [64]}]", "sampler.gen_length=60"],
            "does not fit|needs 128 positions",
        ),
        (["convert.data=FILE"], r"row 2 holds the mask token"),
        (["convert.data=EMPTY"], "must hold rows"),
        (["convert.teacher=OTHER"], "another vocabulary"),
        (["convert.steps=0"], "convert.steps is 0"),
    ],
)
def test_mistakes_are_named_in_one_line(
    folder: Path, tmp_path: Path, capsys: Any, overrides: list[str], message: str
) -> None:
    rows = [{"prompt_ids": [1, 2], "answer_ids": [3, mask]} for mask in (4, load_mask(folder))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "empty.jsonl").write_text("")
    other, _ = pair("llama", 40)
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(load_config(None, ["task.name=countdown"]).model, load_task("countdown", {})).save_pretrained(
        tmp_path / "other"
    )
    described = json.loads((folder / "start" / "config.json").read_text()) | {"context_causal": False}
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in (folder / "start").iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    (plain / "config.json").write_text(json.dumps(described))
    places = {"FILE": "data.jsonl", "EMPTY": "empty.jsonl", "OTHER": "other", "PLAIN": "plain"}
    for name, place in places.items():
        overrides = [text.replace(name, str(tmp_path / place)) for text in overrides]
    # Saving the models above shows a bar.
    capsys.readouterr()
    assert main(arguments(folder, tmp_path / "run", *overrides)) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert re.search(message, said), said


def load_mask(folder: Path) -> int:
    return int(json.loads((folder / "start" / "config.json").read_text())["mask_token_id"])


def test_one_model_is_fitted_and_sampled_at_many_block_lengths(tmp_path: Path) -> None:
    """BlockGen's mixture, on a new model: every update draws a block length, and rollouts take any of them."""
    mixture = "{steps: 6, batch_size: 4, num_texts: 8, data: task, targets: hard"
    runs.train_here(
        runs.tiny_config(
            tmp_path, "model.attention=block_causal", "model.block_length=4",
            f"convert={mixture}, block_lengths: [{{until: 1, lengths: [1, 2, 4]}}]}}", "sampler.block_length=2",
            "sampler.num_inference_steps=16", "eval.num_inference_steps=[16]", "sft.steps=0", "train.steps=1",
            "train.max_logprob_gap=1e-4", "eval.num_prompts=2", "eval.viewer_items=0",
        )
    )  # fmt: skip
    lengths = [line["convert/block_length"] for line in runs.lines(tmp_path / "run", "convert")]
    assert len(lengths) == 6 and len(set(lengths)) > 1 and set(lengths) <= {1, 2, 4}
    (step,) = runs.lines(tmp_path / "run", "train")
    assert step["policy/logprob_gap_max"] < 1e-4
