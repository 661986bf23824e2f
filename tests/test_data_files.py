"""Data files that a task reads: every cell arrives as it is, or one line names the file and the row."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rl.cli import main
from rl.config import load_config
from rl.errors import is_message
from rl.modalities.text_plan import review
from rl.tasks.char_tokenizer import char_tokenizer
from rl.tasks.chat import answer_text, prompt_text
from rl.tasks.fit import FileExamples, unfit_reasons
from rl.tasks.jsonl import JsonlTask
from rl.tasks.records import read_records, stream_at
from tests import runs

# A template as published ones are: a head and an end token for each turn, and a line break behind it.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HI = {"role": "user", "content": "hi"}


def tokenizer(template: str | None = TEMPLATE) -> Any:
    found = char_tokenizer("abcdefghijklmnopqrstuvwxyz<>0123456789+=? \n")
    found.chat_template = template
    return found


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def as_file(folder: Path, kind: str, records: list[dict[str, Any]]) -> str:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        return write(path, lines(*records))
    if kind == "jsonl.gz":
        return write(path, gzip.compress(lines(*records).encode()))
    if kind == "json":
        return write(path, json.dumps(records))
    import datasets

    columns = {name: [record.get(name) for record in records] for record in records for name in record}
    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    return str(path)


FORMATS = ["jsonl", "jsonl.gz", "json", "parquet"]


@pytest.mark.parametrize("kind", FORMATS)
def test_columns_are_the_union_and_a_missing_cell_is_none(tmp_path: Path, kind: str) -> None:
    """Whatever the order of the rows: a verdict must not depend on which row is the first of its batch."""
    rows = [{"prompt": "a"}, {"prompt": "b", "hint": "x"}, {"prompt": "c", "level": 2}]
    for order in (rows, rows[::-1]):
        found = read_records(as_file(tmp_path, kind, order))
        assert all(record.keys() == {"prompt", "hint", "level"} for record in found)
        assert {r["prompt"]: (r["hint"], r["level"]) for r in found} == {
            "a": (None, None),
            "b": ("x", None),
            "c": (None, 2),
        }


@pytest.mark.parametrize("kind", FORMATS)
def test_null_is_no_text(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}]
    task = JsonlTask(as_file(tmp_path, kind, rows), answer_column="answer")
    assert [example["answer"] for example in task.train_examples(0, 0, 2)].count(None) == 1
    path = as_file(tmp_path, kind, [{"prompt": "a"}, {"prompt": None}])
    with pytest.raises(ValueError, match=r"row 2 has no 'prompt': fill it in"):
        JsonlTask(path)


def test_nan_is_a_missing_cell_and_odd_json_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "a", "answer": NaN}\n')
    assert JsonlTask(path, answer_column="answer").train_examples(0, 0, 1)[0]["answer"] is None
    assert [row["answer"] for row in stream_at(path)] == [None]
    for text in ("9" * 5000, "[" * 100_000):
        with pytest.raises(ValueError, match=r"b\.jsonl:1: not JSON"):
            JsonlTask(write(tmp_path / "b.jsonl", f'{{"prompt": "a", "x": {text}}}\n'))


def test_numbers_are_text_and_other_cells_are_refused_by_row(tmp_path: Path) -> None:
    assert JsonlTask(write(tmp_path / "a.jsonl", lines({"prompt": 7}))).train_examples(0, 0, 1)[0]["prompt"] == "7"
    for cell, says in (
        (True, "must be text or messages, not bool"),
        ({"text": "a"}, "must be text or messages, not dict"),
        (["a"], "is a list, and not of messages"),
        ([], "is an empty list"),
        ([HI, {"role": "assistant", "content": None, "tool_calls": [1]}], "tool calls"),
        ([{"role": "user", "content": [{"type": "image"}]}], "must be text, not list"),
    ):
        with pytest.raises(ValueError, match="row 2: column 'prompt'") as error:
            JsonlTask(write(tmp_path / "b.jsonl", lines({"prompt": "a"}, {"prompt": cell})))
        assert says in str(error.value) and is_message(error.value)


def test_what_is_out_of_scope_is_refused_by_name(tmp_path: Path) -> None:
    turns = [HI, {"role": "assistant", "content": "hello"}, HI]
    for row, says in (
        ({"prompt": turns}, "row 1: column 'prompt' is a conversation of several user turns, which is out of scope"),
        ({"prompt": [HI, {"role": "tool", "content": "4"}]}, "row 1: column 'prompt' holds tool calls"),
        ({"prompt": "a", "tools": [{"name": "search"}]}, "row 1: column 'tools': tool use is out of scope: remove"),
    ):
        with pytest.raises(ValueError, match=says):
            JsonlTask(write(tmp_path / "a.jsonl", lines(row)))
    task = JsonlTask(write(tmp_path / "a.jsonl", lines({"prompt": [HI, turns[1]], "tools": None})))
    assert task.train_examples(0, 0, 1)[0]["prompt"] == [HI, turns[1]]


def test_what_measures_is_not_trained_on(tmp_path: Path) -> None:
    """A training row with a held-out prompt, and a validation row with one, are refused or left out."""
    files = {
        name: write(tmp_path / f"{name}.jsonl", lines(*({"prompt": prompt} for prompt in prompts)))
        for name, prompts in {"train": ["a", "b ", "c", "d"], "validation": ["d", "e"], "heldout": ["b", "e"]}.items()
    }

    def reviewed(drop: bool, **params: str) -> JsonlTask:
        task = JsonlTask(**{**files, **params})
        overrides = ["task.name=jsonl", "sampler.gen_length=2", "sampler.num_inference_steps=2"]
        config = load_config(None, [*overrides, f"task.unfit={'drop' if drop else 'refuse'}"])
        review(config, task, tokenizer(), tokenizer().mask_token_id, 64, None)
        return task

    with pytest.raises(ValueError, match=r"train\.jsonl: row 2 .and 1 other.*: its prompt is that of row 1 of .*held"):
        reviewed(False)
    task = reviewed(True)
    assert [[example["prompt"] for example in file.examples] for file in task.files] == [["a", "c"], ["d"], ["b", "e"]]
    assert "validation.jsonl: 1 rows left out" in task.files[1].note
    # Who names a file twice wants to measure on what is trained.
    everywhere = {"validation": files["train"], "heldout": files["train"]}
    assert [len(file.examples) for file in reviewed(False, **everywhere).files] == [4, 4, 4]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "prompt,answer\na,1\nb,2,3\n", "a.csv:3: row 2 has 3 fields, the header names 2"),
        ("a.csv", "prompt,answer\na\n", "a.csv:2: row 1 has 1 fields, the header names 2"),
        ("a.csv", "prompt,prompt\na,1\n", "the column 'prompt' is there twice"),
        ("a.csv", b"prompt\n\xe9t\xe9\n", "a.csv:2: not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "a.jsonl:2: not UTF-8"),
        ("a.json", b"\xff\xfe", "a.json:1: not UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n', "a.jsonl:2: the key 'prompt' is there twice"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud83d"}\n', "row 2: column 'prompt' holds half of a surrogate"),
        ("a.jsonl", '{"prompt": [{"role": "user", "content": "\\ude00"}]}\n', "row 1: column 'prompt' holds half"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.parquet", b"not parquet", "data file"),
        ("a.txt", "a", "the ending must be"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_with_its_row(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        read_records(path)
    assert says in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_marks_and_breaks_that_are_part_of_text_stay(tmp_path: Path) -> None:
    """A byte-order mark is no part of the first column's name; U+2028 inside a JSON string ends no line."""
    for name, content in (
        ("a.csv", '\ufeffprompt,answer\r\n"a, b",1\r\n'),
        ("a.jsonl", "\ufeff" + lines({"prompt": "a, b", "answer": "1"})),
        ("a.json", "\ufeff" + json.dumps([{"prompt": "a, b", "answer": "1"}])),
    ):
        assert read_records(write(tmp_path / name, content)) == [{"prompt": "a, b", "answer": "1"}]
    text = json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n"
    assert read_records(write(tmp_path / "b.jsonl", text)) == [{"prompt": "a\u2028b"}]


def test_a_chat_is_rendered_by_the_template_and_kept_for_rewards(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, HI]
    task = JsonlTask(write(tmp_path / "a.jsonl", lines({"prompt": messages})))
    example = task.train_examples(0, 0, 1)[0]
    assert example["prompt"] == messages
    for chat in (True, False):
        assert prompt_text(tokenizer(), example, chat) == "<system>be brief<eos>\n<user>hi<eos>\n<assistant>"
    assert prompt_text(tokenizer(), {"prompt": "hi"}, True) == "<user>hi<eos>\n<assistant>"
    assert prompt_text(tokenizer(), {"prompt": "hi"}, False) == "hi"
    # An assistant's turn at the end is gone on with.
    begun = {"prompt": [HI, {"role": "assistant", "content": "i think"}]}
    assert prompt_text(tokenizer(), begun, False) == "<user>hi<eos>\n<assistant>i think"


def test_an_answer_is_text_or_the_rest_of_the_conversation(tmp_path: Path) -> None:
    answer = [{"role": "assistant", "content": "hello"}]
    path = write(tmp_path / "a.jsonl", lines({"messages": [HI, *answer]}))
    example = JsonlTask(path, prompt_column="messages", answer_column="messages").train_examples(0, 0, 1)[0]
    assert (example["prompt"], example["answer"]) == ([HI], answer)
    assert answer_text(tokenizer(), example, False) == "hello<eos>"
    assert answer_text(tokenizer(), {"prompt": "hi", "answer": answer}, True) == "hello<eos>"
    assert answer_text(tokenizer(), {"prompt": [HI], "answer": "hello"}, False) == "hello"
    with pytest.raises(ValueError, match=r"set task\.chat=true"):
        answer_text(tokenizer(), {"prompt": "hi", "answer": answer}, False)
    with pytest.raises(ValueError, match="must be messages that end with the assistant's"):
        path = write(tmp_path / "b.jsonl", lines({"messages": [HI]}))
        JsonlTask(path, prompt_column="messages", answer_column="messages")


def test_a_chat_that_cannot_be_rendered_says_why() -> None:
    with pytest.raises(ValueError, match=r"a chat needs a tokenizer with a chat template: set model\.tokenizer"):
        prompt_text(tokenizer(None), {"prompt": [HI]}, False)
    with pytest.raises(ValueError, match="chat template refuses the messages: roles must alternate"):
        refusing = tokenizer("{{ raise_exception('roles must alternate') }}")
        prompt_text(refusing, {"prompt": [HI]}, False)


def reasons(examples: list[dict[str, Any]], **changed: Any) -> list[str | None]:
    given: dict[str, Any] = {
        "chat": False,
        "mask_token_id": tokenizer().mask_token_id,
        "gen_length": 4,
        "max_length": 12,
        "block_length": None,
        "with_answers": False,
    }
    return unfit_reasons(examples, tokenizer(), **{**given, **changed})


def test_which_examples_do_not_fit() -> None:
    """12 positions, 4 of them generated: 8 prompt tokens fit; in blocks of 8, 4 + 4 fit and 5 + 4 need 16."""
    eight = {"prompt": "aaaaaaaa"}
    assert reasons([eight, {"prompt": "a" * 9}]) == [
        None,
        "a prompt of 9 tokens plus sampler.gen_length 4 needs 13 positions, the model has 12",
    ]
    assert reasons([{"prompt": "aaaa"}, {"prompt": "aaaaa"}], block_length=8) == [
        None,
        "a prompt of 5 tokens plus sampler.gen_length 4 needs 16 positions in blocks of 8, the model has 12",
    ]
    assert reasons([eight], max_length=None, gen_length=1000) == [None]
    assert reasons([{"prompt": ""}, {"prompt": "a<mask>"}]) == [
        "the prompt is empty",
        "the prompt holds the mask token <mask>",
    ]
    masked = {"prompt": "a", "answer": "b<mask>"}
    assert reasons([masked]) == [None], "an answer that nobody imitates may hold anything"
    assert reasons(
        [masked, {"prompt": "a", "answer": None}, {"prompt": "a", "answer": "12345"}], with_answers=True
    ) == [
        "the answer holds the mask token <mask>",
        "it has no answer to imitate (task.params.answer_column)",
        "an answer of 5 tokens is longer than sampler.gen_length 4",
    ]


def test_a_review_refuses_by_row_or_leaves_out_and_counts() -> None:
    examples = [{"prompt": name} for name in "abc"]
    with pytest.raises(
        ValueError, match=r"^f\.jsonl: row 2 \(and 1 other rows\): too long: mend it, or set task\.unfit to drop"
    ):
        FileExamples("f.jsonl", examples).review(lambda _: [None, "too long", "empty"], drop=False)
    file = FileExamples("f.jsonl", examples)
    file.review(lambda _: [None, "too long", None], drop=True)
    assert [example["prompt"] for example in file.examples] == ["a", "c"]
    assert file.note == "f.jsonl: 1 rows left out (task.unfit drop), the first is row 2: too long"
    with pytest.raises(ValueError, match="no row can be used; row 1: empty"):
        FileExamples("f.jsonl", examples).review(lambda _: ["empty"] * 3, drop=True)


# --- through the commands ---------------------------------------------------------------------------------------------

REWARD = """
SEEN = []
def seen(prompts, completions, **columns):
    SEEN.extend(prompts)
    return [float(len(c)) for c in completions]
"""
COMMANDS = ["check", "train", "sft", "rollout"]


def arguments(folder: Path, rows: list[dict[str, Any]], *overrides: str, name: str = "seen") -> list[str]:
    """A tiny run on a file of rows, with a tokenizer of its own."""
    words = runs.tiny_config(folder, reward=REWARD.replace("seen", name))
    tokenizer().save_pretrained(folder / "tokenizer")
    path, judge = write(folder / "data.jsonl", lines(*rows)), f"{folder / 'reward.py'}:{name}"
    return [
        *words,
        "task.name=jsonl",
        f"task.params={{train: {path}, heldout: {path}, answer_column: answer, reward: '{judge}'}}",
        f"model.tokenizer={folder / 'tokenizer'}",
        f"reward.functions=[{{name: '{judge}'}}]",
        "train.prompts_per_step=2",
        "train.steps=1",
        "eval.num_prompts=2",
        "sft.batch_size=2",
        *overrides,
    ]


def run(command: str, words: list[str], folder: Path) -> int:
    output = ["--output", str(folder / "rollouts"), "--num-prompts", "2"] if command == "rollout" else []
    return main([command, *words, *output])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"prompt": "b<mask>", "answer": "1"}, "the prompt holds the mask token <mask>"),
        ({"prompt": "a", "answer": "<mask>"}, "the answer holds the mask token <mask>"),
        (
            {"prompt": "a" * 60, "answer": "1"},
            "a prompt of 60 tokens plus sampler.gen_length 16 needs 76 positions, the model has 64",
        ),
        ({"prompt": "", "answer": "1"}, "the prompt is empty"),
        ({"prompt": "a", "answer": None}, "it has no answer to imitate (task.params.answer_column)"),
    ],
)
def test_every_command_refuses_a_row_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: dict[str, Any], says: str
) -> None:
    """The bad row is the last of many, and would come up late or never."""
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(30)] + [bad]
    words = arguments(tmp_path, rows)
    for command in COMMANDS:
        assert run(command, words, tmp_path) == 2
        complaint = capsys.readouterr().err
        assert f"data.jsonl: row 31: {says}: mend it, or set task.unfit to drop" in complaint
        assert complaint.count("\n") == 1
    assert not (tmp_path / "run" / "model").exists()


def test_rows_that_are_dropped_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "", "answer": "2"}, {"prompt": "2+1=", "answer": "3"}]
    words = arguments(tmp_path, rows, "task.unfit=drop")
    for command in COMMANDS:
        # Only a trained model is sampled.
        model = [f"model.path={tmp_path / 'sft' / 'model'}"] if command == "rollout" else []
        assert run(command, [*words, *model, f"run.output_dir={tmp_path / command}"], tmp_path) == 0
        out = capsys.readouterr().out
        assert "1 rows left out (task.unfit drop), the first is row 2: the prompt is empty" in out


def test_a_chat_goes_through_a_whole_run(tmp_path: Path) -> None:
    """The model is given the template's text, the reward the messages, whatever `task.chat` says."""
    for chat in ("true", "false"):
        folder = tmp_path / chat
        rows = [
            {"prompt": [{"role": "user", "content": name}], "answer": [{"role": "assistant", "content": "1"}]}
            for name in "ab"
        ]
        words = arguments(folder, rows, f"task.chat={chat}", name=f"seen_{chat}")
        assert main(["train", *words]) == 0
        module = next(
            m for n, m in sys.modules.items() if n.startswith("denoise_rl_file_reward") and hasattr(m, f"seen_{chat}")
        )
        assert module.SEEN and all(prompt[0]["role"] == "user" for prompt in module.SEEN)
        sample = json.loads((folder / "run" / "samples.jsonl").read_text().splitlines()[0])
        assert sample["prompt"] in ("user: a", "user: b"), "people are shown text"


def test_check_names_a_prompt_that_the_tokenizer_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    char_tokenizer("0123456789").save_pretrained(tmp_path / "digits")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2+2", "answer": "4"}\n')
    rows = f"task.params={{train: {tmp_path}/rows.jsonl, heldout: {tmp_path}/rows.jsonl}}"
    backbone = "model.backbone={model_type: gpt2, n_positions: 64, n_embd: 16, n_layer: 1, n_head: 1}"
    words = ["task.name=jsonl", rows, backbone, f"model.tokenizer={tmp_path}/digits", f"run.output_dir={tmp_path}/run"]
    assert main(["check", *words]) == 2
    assert "'2+2', holds '+', which the tokenizer has no token for" in capsys.readouterr().err
