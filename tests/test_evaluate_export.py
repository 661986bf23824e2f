"""Exported samples are what the benchmarks' own scorers run: built as those do, the reference solutions pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rl.evaluation.export_samples import export_samples
from rl.evaluation.generations import BatchCost, Generation, GenerationFolder
from rl.tasks.load import load_task
from rl.tasks.records import Record, read_records
from rl.tasks.templates import choose_template

# Runs in one child process: the reference solutions are trusted, and hundreds of sandboxes would only take longer.
CHILD = """
import contextlib, io, json, sys
failed = []
for name, program in json.load(sys.stdin):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(program, name, "exec"), {"__name__": name})
    except BaseException as error:
        failed.append(f"{name}: {error!r}")
json.dump(failed, sys.stdout)
"""


def failures(programs: list[tuple[str, str]]) -> list[str]:
    done = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(programs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def kept(folder: Path, task: str, template: str, completions: list[tuple[str, list[str]]]) -> GenerationFolder:
    """An evaluation folder with these completions of (prompt_id, one per sample)."""
    settings = {"task": {"name": task, "params": {}}, "samples": 1, "decoders": {"static@4": {}}}
    result = GenerationFolder(folder)
    result.open({**settings, "template": {"name": template}})
    made = [
        Generation("static@4", prompt_id, sample, 0, text, [1], [0], 1, True, None, "not judged")
        for prompt_id, texts in completions
        for sample, text in enumerate(texts)
    ]
    result.append(made, BatchCost("static@4", len(made), 1, 1.0, 0.0))
    result.close()
    return result


def humaneval(shared_data: Path) -> tuple[str, list[Record]]:
    path = str(shared_data / "code" / "HumanEval.jsonl.gz")
    return path, read_records(path)


def answer(record: Record, chat: bool) -> str:
    """What a model that knows the solution writes: the body and more, or an explained program."""
    if not chat:
        return record["canonical_solution"] + "\ndef another():\n    broken("
    return f"Sure.\n```python\n{record['prompt']}{record['canonical_solution']}```\nIt works."


@pytest.mark.parametrize("template_name", ["completion", "code_block"])
def test_human_eval_samples_pass_put_behind_the_prompt(shared_data: Path, tmp_path: Path, template_name: str) -> None:
    path, records = humaneval(shared_data)
    task = load_task("humaneval", {})
    template = choose_template(task, template_name, has_chat=False)
    texts = [(record["task_id"], [answer(record, template.chat)]) for record in records]
    folder = kept(tmp_path, "humaneval", template_name, texts)
    (file,) = export_samples(folder, "human-eval", template, task.file_examples(path))
    assert file.name == "human-eval-static@4.jsonl"
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert [set(sample) for sample in samples] == [{"task_id", "completion"}] * 164
    by_id = {record["task_id"]: record for record in records}
    programs = []
    for sample in samples:
        record = by_id[sample["task_id"]]
        check = f"{record['test']}\ncheck({record['entry_point']})"
        programs.append((sample["task_id"], f"{record['prompt']}{sample['completion']}\n{check}"))
    assert failures(programs) == []


@pytest.mark.parametrize("template_name", ["completion", "code_block"])
def test_evalplus_solutions_pass_by_themselves(shared_data: Path, tmp_path: Path, template_name: str) -> None:
    path, records = humaneval(shared_data)
    task = load_task("humaneval", {})
    template = choose_template(task, template_name, has_chat=False)
    texts = [(record["task_id"], [answer(record, template.chat)] * 2) for record in records]
    folder = kept(tmp_path, "humaneval", template_name, texts)
    (file,) = export_samples(folder, "evalplus", template, task.file_examples(path))
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == 328 and all(set(sample) == {"task_id", "solution"} for sample in samples)
    by_id = {record["task_id"]: record for record in records}
    checks = {name: f"{r['test']}\ncheck({r['entry_point']})" for name, r in by_id.items()}
    programs = [(s["task_id"], f"{s['solution']}\n{checks[s['task_id']]}") for s in samples[::2]]
    assert failures(programs) == []


def test_evalplus_takes_mbpp_with_its_own_ids(shared_data: Path, tmp_path: Path) -> None:
    path = str(shared_data / "code" / "mbpp.jsonl")
    task = load_task("mbpp", {})
    template = choose_template(task, "few_shot", has_chat=False)
    folder = kept(tmp_path, "mbpp", "few_shot", [("Mbpp/11", ["def f():\n  return 1\n[DONE]\nmore"])])
    (file,) = export_samples(folder, "evalplus", template, task.file_examples(path))
    assert json.loads(file.read_text()) == {"task_id": "Mbpp/11", "solution": "def f():\n  return 1\n"}


def test_livecodebench_gets_all_codes_of_a_question_in_one_place(shared_data: Path, tmp_path: Path) -> None:
    path = str(shared_data / "code" / "sandboxfusion_samples" / "code_eval_live_code_bench_v1.jsonl")
    task = load_task("livecodebench", {})
    texts = [("leetcode/2727", ["```python\na\n```", "no fence"]), ("codeforces/1873_A", ["```python\nb\n```", ""])]
    folder = kept(tmp_path, "livecodebench", "code_block", texts)
    (file,) = export_samples(folder, "livecodebench", choose_template(task, None, True), task.file_examples(path))
    assert json.loads(file.read_text()) == [
        {"question_id": "codeforces/1873_A", "code_list": ["b\n", ""]},
        {"question_id": "leetcode/2727", "code_list": ["a\n", "no fence"]},
    ]


def test_a_format_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    folder = kept(tmp_path, "humaneval", "completion", [("HumanEval/0", [""])])
    template = choose_template(load_task("humaneval", {}), None, has_chat=False)
    with pytest.raises(ValueError, match="--export livecodebench is for the task livecodebench, not for humaneval"):
        export_samples(folder, "livecodebench", template, [])
