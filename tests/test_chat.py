"""`denoise-rl chat` and `denoise-rl inspect`, and the texts of single tokens that they and the report show."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rl.evaluation.chat import Chat, chat_config, talk
from rl.functions import sample
from rl.model_section import ModelConfig
from rl.models.load import load_policy, save_policy
from rl.tasks.char_tokenizer import char_tokenizer
from rl.track.pieces import NOTHING, Pieces
from rl.track.samples import worst_and_best

Run = Callable[..., tuple[int, str, str]]
SIZES = ["run.device=cpu", "sampler.gen_length=8", "sampler.num_inference_steps=4"]
PUZZLE = "0341000400000000="


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path, tokenizer = tmp_path_factory.mktemp("model"), char_tokenizer("01234=")
    backbone = {"model_type": "gpt2", "n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
    save_policy(load_policy(ModelConfig(backbone=backbone), tokenizer, seed=0), tokenizer, path)
    return str(path)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- chat -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_rollout(run: Run, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy: one prompt, lines of a pipe and the other command say the same, without a word around it."""
    kept = ["--num-prompts", "2", "--group-size", "1", "--output", str(tmp_path / "r")]
    assert run("rollout", f"model.path={folder}", *SIZES, "sampler.temperature=0", *kept)[0] == 0
    samples = [json.loads(line) for line in (tmp_path / "r" / "rollouts.jsonl").read_text().splitlines()]
    wanted = "".join(sample["completion"] + "\n" for sample in samples)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n".join(sample["prompt"] for sample in samples)))
    assert run("chat", folder, *SIZES) == (0, wanted, "")
    said = run("chat", folder, "--prompt", samples[1]["prompt"], *SIZES)
    assert said == (0, samples[1]["completion"] + "\n", "")


def test_every_step_is_drawn_and_new_tokens_are_in_colour(folder: str) -> None:
    config, template = chat_config(folder, None, SIZES, 4, 0.0)
    assert template is None
    chat, drawn = Chat(config, template), []
    assert chat.templated is False
    answer, about = chat.answer(PUZZLE, drawn.append)
    assert len(drawn) == 4 and about.endswith(" in 4 steps")
    assert [text.plain.count("░") for text in drawn] == [6, 4, 2, 0]
    coloured = [s.start for text in drawn for s in text.spans if s.style == "bold cyan"]
    assert sorted(coloured) == list(range(8)) and answer == drawn[-1].plain
    # Nothing is drawn where nobody asks for it, and the answer is the same.
    assert chat.answer(PUZZLE) == (answer, about) and len(drawn) == 4


def test_a_model_of_uniform_noise_is_drawn_step_by_step(folder: str, tmp_path: Path) -> None:
    """Its canvas is random tokens at first and never masks; the answer is that of `sample`."""
    tokenizer = char_tokenizer("01234=")
    backbone = {"model_type": "gpt2", "n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = load_policy(ModelConfig(backbone=backbone, noise="uniform"), tokenizer, seed=0)
    save_policy(model, tokenizer, tmp_path)
    chat, drawn = Chat(chat_config(str(tmp_path), None, SIZES, 4, 1.0)[0], None), []
    answer, _ = chat.answer(PUZZLE, drawn.append)
    (trajectory,) = sample(model, [PUZZLE], chat.engine.options, tokenizer=tokenizer)
    assert answer == tokenizer.decode(trajectory.response_ids(), skip_special_tokens=True)
    last = tokenizer.convert_ids_to_tokens(trajectory.final_canvas()[len(PUZZLE) :])
    assert len(drawn) == 4 and drawn[-1].plain == "".join(last)
    assert not any("░" in text.plain for text in drawn) and trajectory.sampler["noise"] == "uniform"


def test_a_constraint_holds_in_a_talk(folder: str) -> None:
    constraint = 'sampler.constraint={graph: {"<start>": ["3"], "3": ["4"], "4": ["3"]}}'
    answer, _ = Chat(chat_config(folder, None, [*SIZES, constraint], None, 0.0)[0], None).answer(PUZZLE)
    assert answer and answer == "34343434"[: len(answer)]


def test_a_person_sees_a_mistake_and_goes_on(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = ["abc", PUZZLE, KeyboardInterrupt()]

    class Typing(Console):
        def input(self, *_: Any, **__: Any) -> str:
            line = lines.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

    monkeypatch.setattr(sys, "stdin", _Terminal())
    monkeypatch.setattr("rl.evaluation.chat._SHORTEST", 0.0)
    chat, file = Chat(chat_config(folder, None, SIZES, None, 0.0)[0], None), _Terminal()
    talk(chat, Typing(file=file, width=200, highlight=False))
    said = file.getvalue()
    assert "Ctrl-D or Ctrl-C ends" in said and "'abc', holds 'a', which the tokenizer has no token for" in said
    assert chat.answer(PUZZLE)[0] in said and " in 4 steps" in said
    # Ctrl-C during an answer ends the talk; where nobody types, it ends the command as anywhere.
    monkeypatch.setattr(chat, "answer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    lines[:] = [PUZZLE]
    talk(chat, Typing(file=_Terminal()))
    with pytest.raises(KeyboardInterrupt):
        talk(chat, Console(file=io.StringIO()), PUZZLE)


def test_a_run_brings_its_own_config(folder: str, tmp_path: Path) -> None:
    """RUN and RUN/warm_start are talked to with the sampler and the template of the run."""
    shutil.copytree(folder, tmp_path / "warm_start")
    (tmp_path / "metrics.jsonl").touch()
    sampler = "sampler: {gen_length: 12, num_inference_steps: 6, temperature: 0.7, selector: threshold}"
    (tmp_path / "config.yaml").write_text(f"{sampler}\neval: {{sampler: {{threshold: 0.8}}}}\ntask: {{chat: true}}\n")
    for path in (tmp_path, tmp_path / "warm_start"):
        config, template = chat_config(str(path), None, ["sampler.top_k=3"], None, 0.25)
        options = config.sampler
        assert template is True and config.model.path is not None and Path(config.model.path).name == "warm_start"
        assert (options.gen_length, options.num_inference_steps, options.selector) == (12, 6, "threshold")
        assert (options.temperature, options.threshold, options.top_k) == (0.25, 0.8, 3)
    config, template = chat_config(folder, None, [], 8, 0.0)
    assert template is None and (config.sampler.gen_length, config.sampler.num_inference_steps) == (64, 8)


def test_an_autoregressive_model_answers_token_by_token(run: Run, tmp_path: Path) -> None:
    tokenizer = char_tokenizer("01234=")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config, template = chat_config(str(tmp_path), None, [*SIZES, "model.autoregressive=true"], None, 0.0)
    chat, drawn = Chat(config, template), []
    answer, about = chat.answer(PUZZLE, drawn.append)
    assert [len(chat.tokenizer(text.plain).input_ids) for text in drawn] == list(range(1, len(drawn) + 1))
    assert drawn[-1].plain.replace("<mask>", "") == answer and about == f"{len(drawn)} tokens in {len(drawn)} steps"
    assert run("chat", str(tmp_path), "--prompt", PUZZLE, *SIZES, "model.autoregressive=true")[1] == answer + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat"], "the following arguments are required: model"),
        (["chat", "nowhere/model"], "nowhere/model"),
        (["chat", "FOLDER", "sampler.quota=evn"], "config key 'sampler.quota'"),
        (["chat", "FOLDER", "sampler.block_length=3"], "sampler.gen_length (64)"),
        (["chat", "FOLDER", "--temperature", "-1"], "--temperature must be at least 0, got -1"),
        (["chat", "FOLDER", "--template", *SIZES], "a chat needs a tokenizer with a chat template"),
        (["chat", "FOLDER"], "prompt of 17 tokens plus sampler.gen_length 64 needs 81 positions, the model has 40"),
        (["chat", "FOLDER", "task.name=digits", "sampler={}"], "chat is about text"),
        (["inspect", "FOLDER"], "has no rollouts (a line of samples.jsonl, rollouts.jsonl, generations.jsonl)"),
        (["inspect", "FOLDER", "--n", "0"], "--n must be at least 1, got 0"),
    ],
)
def test_refusals_are_one_line(run: Run, folder: str, arguments: list[str], message: str) -> None:
    arguments = [folder if word == "FOLDER" else word for word in arguments]
    code, out, err = run(*arguments, *(["--prompt", PUZZLE] if arguments[0] == "chat" else []))
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1, err


# --- inspect --------------------------------------------------------------------------------------------------------


def test_worst_and_best_share_no_rollout_and_take_the_newest_of_equals() -> None:
    samples = [{"reward": reward, "step": step} for step, reward in enumerate([0.5, None, 1.0, 0.0, 1.0, 0.0, 0.5])]
    found = {name: [s["step"] for s in group] for name, group in worst_and_best(samples, 2)}
    assert found == {"worst": [5, 3], "best": [4, 2], "without a score": [1]}
    assert [(name, len(group)) for name, group in worst_and_best(samples[2:3], 2)] == [("best", 1)]
    few = {name: [s["step"] for s in group] for name, group in worst_and_best(samples, 9)}
    assert few == {"worst": [5, 3, 6], "best": [4, 2, 0], "without a score": [1]}


def test_inspect_shows_texts_and_what_the_reward_is_made_of(run: Run, tmp_path: Path) -> None:
    rows = [
        {"step": 1, "prompt": [{"role": "user", "content": "hi"}], "completion": "a\nb", "reward": 0.25,
         "parts": {"style": 0.125, "length": None}, "num_steps": 4},
        {"step": 2, "prompt": "p", "completion": "x" * 2001, "reward": 1.0, "answer": "gold"},
    ]  # fmt: skip
    torn = '{"step": 3, "pro'
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    code, out, err = run("inspect", str(tmp_path), "--n", "1")
    assert code == 0, err
    assert out.splitlines() == [
        f"2 rollouts of {tmp_path}",
        "",
        "worst 1: reward 0.25 (style 0.125, length none), denoising steps 4, RL step 1",
        "  prompt    user: hi",
        "  answer    a",
        "            b",
        "",
        "best 1: reward 1, RL step 2",
        "  prompt    p",
        f"  answer    {'x' * 2000}... (2,001 characters)",
        "  expected  gold",
    ]
    assert "worst" not in run("inspect", str(tmp_path), "--step", "2")[1]
    code, out, err = run("inspect", str(tmp_path), "--step", "7")
    assert code == 2 and err.endswith("has no rollouts of RL step 7: its steps are 1 to 2\n")
    (tmp_path / "samples.jsonl").write_text("{}\n[\n")
    code, out, err = run("inspect", str(tmp_path))
    assert code == 2 and "samples.jsonl line 2 is not JSON" in err and len(err.splitlines()) == 1


# --- texts of tokens ------------------------------------------------------------------------------------------------


def _byte_level() -> Any:
    """A BPE tokenizer over bytes: "Ġcat" is " cat", and a snowman is three tokens that are no text alone."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    for left, right in (merges := [("c", "a"), ("ca", "t"), ("Ġ", "cat")]):
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _metaspace() -> Any:
    """As SentencePiece marks words: "▁cat" decoded alone has lost its space."""
    vocab = {"<unk>": 0, "a": 1, "▁cat": 2, "s": 3, "▁": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_tokens_have_their_spaces_and_no_marks_of_subwords() -> None:
    tokenizer = _byte_level()
    ids = tokenizer(" cat cats\n☃!").input_ids
    texts = Pieces(tokenizer).texts(ids)
    assert texts == [" cat", " cat", "s", "\n", "☃", NOTHING, NOTHING, "!"]
    assert "".join(texts).replace(NOTHING, "") == " cat cats\n☃!"
    assert tokenizer.decode(ids[4:5]) == "�"
    assert Pieces(_metaspace()).texts([2, 3, None, 2]) == [" cat", "s", "", " cat"]
    assert _metaspace().decode([2]) == "cat"
    words = Tokenizer(models.WordLevel({"cat": 0, "##s": 1, "[UNK]": 2}, "[UNK]"))
    words.decoder = decoders.WordPiece()
    assert Pieces(PreTrainedTokenizerFast(tokenizer_object=words)).texts([0, 1]) == [" cat", "s"]


def test_bytes_of_a_character_whose_rest_is_masked_stay_apart() -> None:
    tokenizer = _byte_level()
    ids: list[int | None] = list(tokenizer("a☃").input_ids)
    pieces = Pieces(tokenizer)
    assert pieces.texts([*ids[:2], None, ids[3]]) == ["a", "�", "", "�"]
    assert pieces.texts(ids[:3]) == ["a", "�", "�"]
    assert pieces.texts([*ids[:3], None, ids[3]]) == ["a", "�", "�", "", "�"]
    assert pieces.texts([*ids, *ids[1:]]) == ["a", "☃", NOTHING, NOTHING, "☃", NOTHING, NOTHING]


def test_a_token_without_text_shows_its_id() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "": 1}, "a"))
    tokenizer.decoder = decoders.Fuse()
    assert Pieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).texts([0, 1, 0]) == ["a", "<1>", "a"]
