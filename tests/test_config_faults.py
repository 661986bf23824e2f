"""Faults of configs and command lines: one line that names the key and the fix, the same from `check` and `train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rl.cli import main
from rl.config import load_config, option_help
from rl.tasks.char_tokenizer import char_tokenizer
from rl.train.loop import train
from rl.train.run import Run
from tests import runs

Complain = Any


@pytest.fixture
def complain(capsys: pytest.CaptureFixture[str]) -> Complain:
    """complain(words): the one line that a command ends with."""

    def said(*words: str | Path) -> str:
        assert main([str(word) for word in words]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    return said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"train:\n  steps: 1\nrun:\n  seed: 1\ntrain:\n  steps: 2\n", "the key 'train' is there twice: remove one"),
        (b"train:\n  steps: 1\n  steps: 2\n", "the key 'steps' is there twice: remove one"),
        (b"task: {params: {train: a, train: b}}\n", "the key 'train' is there twice: remove one"),
        (b"run:\n  output_dir: caf\xe9\n", "c.yaml:2: not UTF-8"),
        (b"train: 3\n", "config key 'train' is a section, not a value: set a key of it, such as train.steps"),
        (
            b"model:\n  lora: 8\n",
            "config key 'model.lora' is a section, not a value: set a key of it, such as model.lora.rank",
        ),
    ],
)
def test_a_config_file_that_means_two_things_is_refused(
    tmp_path: Path, complain: Complain, content: bytes, says: str
) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    for command in ("check", "train"):
        assert says in complain(command, "--config", tmp_path / "c.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("\ufefftrain:\n  steps: 7\n".encode())
    assert load_config(tmp_path / "c.yaml").train.steps == 7


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--confg", "c.yaml"], "unknown argument '--confg': did you mean --config?"),
        (["eval", "--outputs", "x"], "unknown argument '--outputs': did you mean --output?"),
        (["train", "train=3"], "config key 'train' is a section"),
        (["train", "sampler.preset=sdar_dinamic"], "did you mean 'sdar_dynamic'?"),
        (
            ["train", "model.backbone={model_type: qwen33}"],
            "model.backbone.model_type 'qwen33' is unknown: did you mean 'qwen3'?",
        ),
        (
            ["train", "model.backbone={model_type: qwen3, num_atention_heads: 2}"],
            "unknown config key 'model.backbone.num_atention_heads': did you mean 'num_attention_heads'?",
        ),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest(complain: Complain, words: list[str], says: str) -> None:
    assert says in complain(*words)
    if words[0] == "train":
        assert says in complain("check", *words[1:])


def test_the_version_and_what_a_choice_allows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("denoise-rl ")
    options = {key: text for key, _, text in option_help(load_config(None))}
    assert options["model.attention"].endswith("[full, block_causal]")
    assert "[" not in options["run.seed"]


def test_a_home_is_found_wherever_a_path_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text(
        "run: {output_dir: ~/runs/a}\nreward: {functions: [{name: ~/r.py:f, params: {path: ~/w}}]}\n"
    )
    config = load_config(tmp_path / "c.yaml", ["model.path=~/m"])
    assert config.run.output_dir == str(tmp_path / "runs" / "a")
    assert config.model.path == str(tmp_path / "m")
    part = config.reward.functions[0]
    assert (part.name, part.params["path"]) == (str(tmp_path / "r.py:f"), str(tmp_path / "w"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", "--config", "~/c.yaml"]) == 0
    assert not (tmp_path / "~").exists()


def test_tied_embeddings_are_one_matrix(tmp_path: Path) -> None:
    """`model.backbone.tie_word_embeddings` ties the head, in memory and on disk, and training keeps it tied."""
    backbone = {**runs.QWEN3, "tie_word_embeddings": True}
    words = runs.tiny_config(tmp_path, f"model.backbone={json.dumps(backbone)}", "sft.steps=1", "train.steps=1")
    assert main(["train", *words]) == 0
    from rl.models.diffusion_lm import DiffusionLM

    model = DiffusionLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step_1" / "hf")
    assert model.lm_head.weight is model.backbone.get_input_embeddings().weight
    # A run folder stands for its newest checkpoint, for every command that takes a model; a checkpoint for its policy.
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_1"):
        assert load_config(None, [f"model.path={path}"]).model.path == str(
            tmp_path / "run" / "checkpoints" / "step_1" / "hf"
        )
    assert main(["eval", *words, f"model.path={tmp_path / 'run'}", "eval.num_prompts=2"]) == 0
    (tmp_path / "run" / "checkpoints" / "step_1" / "complete.json").unlink()
    with pytest.raises(ValueError, match=r"holds no complete checkpoint; checkpoint .*step_1 is passed over"):
        load_config(None, [f"model.path={tmp_path / 'run'}"])


@pytest.mark.parametrize("command", ["check", "train"])
def test_what_a_tokenizer_lacks_is_said_before_a_run(tmp_path: Path, complain: Complain, command: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1\u00d71", "answer": "1"}\n')
    char_tokenizer("0123456789+=").save_pretrained(tmp_path / "plain")
    char_tokenizer("0123456789+=\u00d7", ends=False).save_pretrained(tmp_path / "endless")
    rows = tmp_path / "rows.jsonl"
    words = [
        *runs.tiny_config(tmp_path / "here", "task.name=jsonl"),
        f"task.params={{train: {rows}, heldout: {rows}, answer_column: answer}}",
    ]
    line = complain(command, *words, f"model.tokenizer={tmp_path / 'plain'}")
    assert "rows.jsonl: row 2: '1\u00d71', holds '\u00d7', which the tokenizer has no token for" in line
    line = complain(command, *words, f"model.tokenizer={tmp_path / 'endless'}")
    assert (
        "rows.jsonl: row 1 (and 1 other rows): the tokenizer has no end token to follow the answer: set model.eos_token"
        in line
    )


@pytest.mark.parametrize("command", ["check", "train"])
def test_attention_and_blocks_fit_before_a_run(tmp_path: Path, complain: Complain, command: str) -> None:
    words = runs.tiny_config(tmp_path)
    line = complain(command, *words, "model.block_length=4")
    assert "model.block_length is for attention block_causal, and this model's is full: leave it out" in line
    assert "model.block_length must be set" in complain(command, *words, "model.attention=block_causal")
    assert "flex_attention needs a GPU" in complain(command, *words, "model.attn_implementation=flex_attention")


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_decoder_fits_the_models_attention_before_a_run(tmp_path: Path, complain: Complain, command: str) -> None:
    """Of a new model, and of a folder whose description says what it is."""
    words = runs.tiny_config(tmp_path, "model.attention=block_causal", "model.block_length=4")
    saved = tmp_path / "saved"
    assert main(["sft", *words, "sft.steps=1", f"run.output_dir={saved}"]) == 0
    folder = runs.tiny_config(tmp_path, f"model.path={saved / 'model'}", "model.backbone={}")
    for blocks in (words, folder):
        line = complain(command, *blocks, "algorithm={name: mdpo}", "sampler.record_x0=true")
        assert "sampler.record_x0 needs a full-attention model" in line
        assert "rollout.cache dual is for full-attention" in complain(command, *blocks, "rollout.cache=dual")
    line = complain(command, *runs.tiny_config(tmp_path), "sampler.verify=true")
    assert "sampler.verify reads a block-causal model at block length 1" in line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_steps_that_no_rollout_takes_need_not_fit_the_blocks_of_a_folder(tmp_path: Path, complain: Complain) -> None:
    words = runs.tiny_config(tmp_path, "model.attention=block_causal", "model.block_length=4")
    saved = tmp_path / "saved"
    assert main(["sft", *words, "sft.steps=1", f"run.output_dir={saved}"]) == 0
    other = ["model.backbone={}", "sampler.num_inference_steps=2", "sft.steps=0"]
    folder = runs.tiny_config(tmp_path, f"model.path={saved / 'model'}", *other)
    assert "must be a multiple of" in complain("check", *folder)
    assert main(["check", *folder, "train.steps=0"]) == 0


def test_a_decoder_that_only_the_model_refuses_ends_a_run_before_its_first_evaluation(tmp_path: Path) -> None:
    """A model of a hub is known once it is loaded; evaluations do not record x0, so only rollouts would refuse it."""
    words = runs.tiny_config(tmp_path, "algorithm={name: mdpo}", "sampler.record_x0=true")
    blocks = runs.tiny_config(tmp_path, "model.attention=block_causal", "model.block_length=4")
    model = Run.open(load_config(blocks[1], blocks[2:]), write=False).model
    with Run.open(load_config(words[1], words[2:]), model=model) as run:
        with pytest.raises(ValueError, match=r"sampler.record_x0 needs a full-attention model"):
            train(run)
        assert not (run.folder / "before.json").exists()
