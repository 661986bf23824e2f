"""The published formats of the benchmarks, one function each: records in, rows out.

A row has `prompt_id`, the columns that templates show (`problem`, ...) and those that the reward reads. Reference
solutions of code tasks stay out of it.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Sequence
from typing import Any

from rl.tasks.base import Example
from rl.tasks.records import Record

MBPP_TEST_IDS = range(11, 511)
MBPP_EXAMPLE_IDS = (2, 3, 4)


def gsm8k_examples(records: Sequence[Record]) -> list[Example]:
    """`question` and `answer` (a solution that ends in `#### 72`)."""
    return [
        {"prompt_id": f"gsm8k/{index}", "problem": record["question"], "answer": record["answer"]}
        for index, record in enumerate(records)
    ]


def math_examples(records: Sequence[Record]) -> list[Example]:
    """`problem` and `answer`, with a `unique_id` (MATH-500) or `id` (AIME)."""
    return [
        {
            "prompt_id": str(next((record[k] for k in ("unique_id", "id") if record.get(k) is not None), index)),
            "problem": record["problem"],
            "answer": None if record["answer"] is None else str(record["answer"]),
        }
        for index, record in enumerate(records)
    ]


def humaneval_examples(records: Sequence[Record]) -> list[Example]:
    """`task_id`, `prompt`, `entry_point`, `test`. As in human-eval, the program is prompt + completion."""
    return [
        {
            "prompt_id": record["task_id"],
            "problem": record["prompt"],
            "code_prefix": record["prompt"],
            "test": record["test"],
            "entry_point": record["entry_point"],
        }
        for record in records
    ]


def mbpp_examples(records: Sequence[Record]) -> list[Example]:
    """`task_id`, `text`, `test_list`, `test_setup_code`; the test split (ids 11 to 510) of what there is.

    The three-shot examples are ids 2, 3 and 4, for templates that show them; without these rows there is no such
    column.
    """
    by_id = {int(record["task_id"]): record for record in records}
    examples = "".join(
        f"You are an expert Python programmer, and here is your task: {record['text']} Your code should pass these "
        f"tests:\n\n{_lines(record)}\n[BEGIN]\n{_unix(record['code'])}\n[DONE]\n"
        for record in (by_id.get(task_id) for task_id in MBPP_EXAMPLE_IDS)
        if record is not None
    )
    has_examples = all(task_id in by_id for task_id in MBPP_EXAMPLE_IDS)
    return [
        {
            "prompt_id": f"Mbpp/{task_id}",
            "problem": record["text"],
            "shown": _lines(record),
            "examples": examples if has_examples else None,
            "test_list": list(record["test_list"]),
            "test_setup_code": record.get("test_setup_code") or "",
        }
        for task_id, record in sorted(by_id.items())
        if task_id in MBPP_TEST_IDS
    ]


def livecodebench_examples(records: Sequence[Record]) -> list[Example]:
    """LiveCodeBench's code generation files, or SandboxFusion's copy of them (`content`, `test`, `labels`)."""
    return [_sandbox_fusion(record) if "content" in record else _livecodebench(record) for record in records]


def _livecodebench(record: Record) -> Example:
    private = record["private_test_cases"]
    # Large test sets are stored packed.
    hidden = json.loads(private if private.lstrip().startswith("[") else unpack(private))
    tests = [*json.loads(record["public_test_cases"]), *hidden]
    metadata = json.loads(record["metadata"] or "{}")
    tests_column = {
        "inputs": [test["input"] for test in tests],
        "outputs": [test["output"] for test in tests],
        "fn_name": metadata.get("func_name"),
    }
    starter = record["starter_code"] or ""
    return _code_row(record["question_id"], record["question_content"], starter, json.dumps(tests_column))


def _sandbox_fusion(record: Record) -> Example:
    labels = record["labels"] if isinstance(record["labels"], dict) else json.loads(record["labels"])
    # The file holds LiveCodeBench's whole prompt; its parts are what a template is made of.
    question, _, form = record["content"].partition("### Question:\n")[2].rpartition("\n### Format:")
    starter = form.partition("```python\n")[2].partition("\n```")[0] if "starter code" in form else ""
    tests = unpack(record["test"])["input_output"]
    return _code_row(labels["task_id"], question.strip(), starter, tests)


def _code_row(prompt_id: str, problem: str, starter: str, input_output: str) -> Example:
    return {
        "prompt_id": prompt_id,
        "problem": problem,
        "starter_code": starter or None,
        "form": "function" if starter else "stdin",
        "input_output": input_output,
    }


def unpack(text: str) -> Any:
    """What LiveCodeBench packs as base64 of zlib of pickle: texts, lists and dicts of them.

    Raises:
        ValueError: the pickle names anything to import: a data file has no business running code.
    """
    return _DataUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load()


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"packed tests name {module}.{name}: not data, refused")


def _lines(record: Record) -> str:
    return "\n".join(record["test_list"])


def _unix(code: str) -> str:
    return code.replace("\r\n", "\n")
