"""Datasets that are streamed: what is drawn depends on seed and place alone, is never held whole, and is looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

import rl.tasks.records
from rl import Trainer
from rl.cli import main
from rl.tasks.char_tokenizer import char_tokenizer
from rl.tasks.fit import HEAD, StreamedExamples
from rl.tasks.jsonl import JsonlTask
from rl.tasks.records import records_at, stream_at
from rl.trl_args import grpo_options
from tests import runs
from tests.test_data_files import FORMATS, HI, arguments, as_file, lines, write
from tests.test_trainer import SMALL, grpo, share_of_a

ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(30)]


def stream(path: str, **params: Any) -> JsonlTask:
    return JsonlTask(path, answer_column="answer", streaming=True, **{"shuffle_buffer": 8} | params)


def prompts(examples: list[dict[str, Any]]) -> list[str]:
    return [example["prompt"] for example in examples]


def test_draws_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    """A task that begins at a step, as a resumed run does, draws what one draws that has come there."""
    path = write(tmp_path / "a.jsonl", lines(*ROWS))
    task = stream(path)
    steps = [task.train_examples(5, step, 7) for step in range(12)]
    for step in (11, 4, 5, 0):
        assert stream(path).train_examples(5, step, 7) == steps[step] == task.train_examples(5, step, 7)
    drawn = [prompt for step in steps for prompt in prompts(step)]
    first, second = drawn[:30], drawn[30:60]
    for epoch in (first, second):
        assert sorted(epoch) == sorted(prompts(ROWS))
    assert first != second and prompts(task.train_examples(6, 0, 30)) not in (first, prompts(ROWS))
    # Another cut of the same order: an RL step and a supervised batch of other sizes.
    assert prompts(stream(path).train_examples(5, 1, 20)) == drawn[20:40]


def test_only_the_buffer_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = write(tmp_path / "a.jsonl", lines(*({"prompt": str(n)} for n in range(5000)))), []
    parse = rl.tasks.records._parse
    monkeypatch.setattr("rl.tasks.records._parse", lambda *given: read.append(1) or parse(*given))
    task = JsonlTask(path, streaming=True, shuffle_buffer=50)
    assert len(read) <= HEAD + 1
    read.clear()
    for step in range(10):
        task.train_examples(0, step, 4)
        task.train_examples(0, step, 4)  # a refill of the step
    assert 40 <= len(read) <= 92, "40 drawn, at most 50 in the buffer"


@pytest.mark.parametrize("kind", [*FORMATS, "csv"])
def test_a_stream_has_the_rows_of_the_file(tmp_path: Path, kind: str) -> None:
    if kind == "csv":
        path = write(tmp_path / "a.csv", 'prompt,answer\n007,1\n"a, b",NA\n')
    else:
        path = as_file(tmp_path, kind, [*ROWS, {"prompt": [HI], "answer": None}] if kind != "parquet" else ROWS)
    if kind == "json":
        with pytest.raises(ValueError, match=r"a stream is \.jsonl, \.csv .* or \.parquet"):
            stream_at(path)
    else:
        assert list(stream_at(path)) == records_at(path)


def test_files_and_splits_by_name(tmp_path: Path) -> None:
    """A pattern's files are shards; `datasets` loads a folder by the same call as a dataset on the hub."""
    for part in range(3):
        as_file(tmp_path, "parquet", ROWS[part * 10 :][:10])
        (tmp_path / "data.parquet").rename(tmp_path / f"train-{part}.parquet")
    pattern = str(tmp_path / "train-*.parquet")
    task = stream(pattern)
    assert sorted(prompts(task.train_examples(0, 0, 30))) == sorted(prompts(ROWS))
    assert prompts(task.train_examples(0, 0, 30))[:10] != prompts(task.train_examples(1, 0, 30))[:10]
    assert list(stream_at(f"{tmp_path}:train")) == ROWS == records_at(f"{tmp_path}:train")
    with pytest.raises(ValueError, match=r"data file .*none-\*\.parquet does not exist"):
        stream_at(str(tmp_path / "none-*.parquet"))
    with pytest.raises(ValueError, match="cannot be loaded from the hub"):
        stream_at(f"{tmp_path}:tset")


@pytest.mark.parametrize(("name", "parts"), [
    ("a/b:train", ("a/b", "train", None)), ("openai/gsm8k/main:test[:9]", ("openai/gsm8k", "test[:9]", "main")),
    ("gsm8k:train", ("gsm8k", "train", None)),
])  # fmt: skip
def test_a_split_on_the_hub(monkeypatch: pytest.MonkeyPatch, name: str, parts: tuple[str, str, str | None]) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **more: asked.append((*names, more)) or ROWS)
    assert records_at(name) == ROWS
    stream_at(name)
    hub, split, config = parts
    assert asked == [(hub, config, {"split": split, "streaming": way}) for way in (False, True)]


def test_rows_are_looked_at_when_they_come_up(tmp_path: Path) -> None:
    """The first ones before the run; a later one ends it by name, or is left out, also of the places of a step."""
    many = [{"prompt": f"{n}+1=", "answer": "1"} for n in range(HEAD)]
    path = write(tmp_path / "a.jsonl", lines(*many, {"prompt": "bad", "answer": "1"}, {"prompt": None}))
    task = stream(path)
    (file,) = task.files
    assert isinstance(file, StreamedExamples) and len(file.examples) == HEAD
    look = lambda rows: ["is bad" if row["prompt"] == "bad" else None for row in rows]  # noqa: E731
    file.review(look, drop=False)
    assert "rows after the first 256 are looked at when they are drawn" in file.note
    with pytest.raises(ValueError, match=r"the row \{'prompt': ('bad', .*is bad: mend it|None\}: .*fill it in)"):
        task.train_examples(0, 0, HEAD + 2)
    file.review(look, drop=True)
    assert "left out uncounted" in file.note
    assert sorted(prompts(task.train_examples(0, 0, HEAD))) == sorted(prompts(many))
    with pytest.raises(ValueError, match="row 1: is bad"):
        stream(write(tmp_path / "b.jsonl", lines({"prompt": "bad"}))).files[0].review(look, drop=False)
    file.review(lambda rows: [None if len(rows) > 1 else "later"] * len(rows), drop=True)
    with pytest.raises(ValueError, match="no row can be used"):
        task.train_examples(0, 0, 1)


def test_what_a_stream_cannot_do_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", lines(*ROWS, 3))
    with pytest.raises(ValueError, match=r"a\.jsonl:31: a row must have named columns"):
        stream(path)
    path = write(tmp_path / "a.jsonl", lines(*ROWS))
    with pytest.raises(ValueError, match=r"row 1 has no column 'question'; it has prompt, answer"):
        stream(path, prompt_column="question")
    with pytest.raises(ValueError, match=r"streaming is true or false, shuffle_buffer a number of rows"):
        stream(path, shuffle_buffer=0)
    with pytest.raises(ValueError, match="must hold rows with named columns, at least one"):
        stream(write(tmp_path / "b.jsonl", ""))
    with pytest.raises(ValueError, match=r"args\.num_train_epochs counts .* set max_steps"):
        grpo_options(grpo(), None)
    monkeypatch.setattr("rl.models.load.load_policy", lambda *_: pytest.fail("a model is loaded"))
    on = {**SMALL, "run.output_dir": str(tmp_path / "run"), "task.params.streaming": True}
    table = datasets.Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match=r"train_dataset is a Dataset, and task\.params\.streaming reads what has a"):
        Trainer(None, share_of_a, on, table, table)
    iterable = table.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"train_dataset is an IterableDataset.*options=.'task\.params\.streaming'"):
        Trainer(None, share_of_a, SMALL, iterable, table)


def test_a_trainer_on_a_stream_learns_from_its_answers(tmp_path: Path) -> None:
    """The column `answer` is known by the held-out rows, since the stream is not read."""
    path = write(tmp_path / "a.jsonl", lines(*ROWS))
    held = [{"prompt": "77+1=", "answer": "78"}]
    options = {**SMALL, "run.output_dir": str(tmp_path / "run"), "task.params.streaming": True, "sft.steps": 1}
    options["model.backbone"] = runs.QWEN3
    trainer = Trainer(None, share_of_a, options, path, held, char_tokenizer("0123456789+="))
    assert trainer.config.task.params["answer_column"] == "answer"


def test_a_run_on_a_stream_goes_on_where_it_ended(tmp_path: Path) -> None:
    """The metrics of a run that stopped after step 1 and of one that did not are the same, and so is the data."""
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(40)]
    held = write(tmp_path / "held.jsonl", lines({"prompt": "a+1=", "answer": "b"}, {"prompt": "39+1=", "answer": "40"}))
    params = {"streaming": True, "shuffle_buffer": 8, "heldout": held}

    def words(folder: Path, *more: str) -> list[str]:
        found = arguments(folder, rows, "checkpoint.every=1", "sft.steps=1", "task.unfit=drop", *more)
        return [*found, *(f"task.params.{name}={json.dumps(value)}" for name, value in params.items())]

    assert main(["train", *words(tmp_path / "whole", "train.steps=3")]) == 0
    parts = words(tmp_path / "parts")
    assert main(["train", *parts]) == 0
    assert main(["train", *parts, "train.steps=3", "run.resume=true"]) == 0
    metrics = [runs.lines(tmp_path / name / "run", "train") for name in ("whole", "parts")]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 3
    samples = [(tmp_path / name / "run" / "samples.jsonl").read_text() for name in ("whole", "parts")]
    assert samples[0] == samples[1] and "39+1=" not in samples[0]
    write(tmp_path / "parts" / "data.jsonl", lines(*rows[1:]))
    with pytest.raises(ValueError, match=r"data\.jsonl .task\.params\.train. is not the file that the run"):
        runs.train_here([*parts, "train.steps=4", "run.resume=true"])
