"""Turn one row of a code dataset and one answer into programs to run. Standard library only.

Accepted columns (a row uses the first that is there):

    tests | test_list            list of assert snippets, or one text      (MBPP, TraceRL "function")
    test  + entry_point          text that defines check(candidate)        (HumanEval, HumanEval+)
    inputs + outputs             lists of texts                            (standard input and output)
    test_input + test_output     the same                                  (TraceRL "stdio")
    input_output                 JSON text or dict of inputs, outputs, fn_name   (APPS, TACO, LiveCodeBench)

and with them: `test_setup` | `test_setup_code`, run after the program and before the tests; `code_prefix` |
`prefix`, which the program is put after; `entry_point`, the name of the function under test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.sandbox.records import Program

COLUMNS = ("tests", "test_list", "test", "inputs", "test_input", "input_output")

CALL_TEMPLATE = """import json
_got = {call}(*json.loads({args!r}))
_got, _want = json.loads(json.dumps(_got)), json.loads({want!r})
assert _got == _want or (isinstance(_want, list) and len(_want) == 1 and _got == _want[0])
"""


@dataclass(frozen=True)
class CodeTask:
    """What one answer has to do."""

    programs: list[Program]  # one with tests, or one per input
    expected: list[str]  # the outputs wanted, one per program; empty when the programs carry tests

    @property
    def num_tests(self) -> int:
        return len(self.expected) or len(self.programs[0].tests or ())


def code_task(code: str, row: Mapping[str, Any]) -> CodeTask:
    """The programs that judge an answer's `code` by the columns of its row, where None counts as absent.

    Raises:
        ValueError: when the row holds no tests, or not in a form listed above.
    """
    prefix = _first(row, "code_prefix", "prefix") or ""
    entry_point = row.get("entry_point")
    text = f"{prefix}\n{code}" if prefix else code
    tests = _function_tests(code, row)
    if tests is not None:
        if not tests:
            raise ValueError("the row has an empty list of tests")
        setup = _first(row, "test_setup", "test_setup_code") or ""
        preamble = prefix if entry_point else ""
        return CodeTask([Program(text, tests=tests, setup=setup, preamble=preamble, entry_point=entry_point)], [])
    inputs, outputs = _input_output(row)
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"the row has {len(inputs)} inputs and {len(outputs)} outputs; give one output per input")
    return CodeTask([Program(text, stdin=_as_text(item)) for item in inputs], [_as_text(item) for item in outputs])


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _function_tests(code: str, row: Mapping[str, Any]) -> list[str] | None:
    tests = _first(row, "tests", "test_list")
    if tests is not None:
        return [tests] if isinstance(tests, str) else list(tests)
    if row.get("test") is not None:
        call = f"\ncheck({row['entry_point']})" if row.get("entry_point") else ""
        return [row["test"] + call]
    if row.get("input_output") is not None and (spec := _spec(row)).get("fn_name"):
        owner = "Solution()." if re.search(r"^class Solution\b", code, re.MULTILINE) else ""
        pairs = zip(spec["inputs"], spec["outputs"], strict=True)
        return [_call_test(owner + spec["fn_name"], args, want) for args, want in pairs]
    return None


def _call_test(call: str, args: Any, want: Any) -> str:
    # LiveCodeBench gives the arguments as JSON texts, one per line, and the result as JSON; APPS gives values.
    values = [json.loads(line) for line in args.splitlines()] if isinstance(args, str) else args
    wanted = want if isinstance(want, str) else json.dumps(want)
    return CALL_TEMPLATE.format(call=call, args=json.dumps(values), want=wanted)


def _input_output(row: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    if row.get("input_output") is not None:
        spec = _spec(row)
        return spec["inputs"], spec["outputs"]
    inputs, outputs = _first(row, "inputs", "test_input"), _first(row, "outputs", "test_output")
    if inputs is None or outputs is None:
        raise ValueError(f"the row has no tests; give one of the columns {', '.join(COLUMNS)}")
    return inputs, outputs


def _spec(row: Mapping[str, Any]) -> Mapping[str, Any]:
    spec = row["input_output"]
    try:
        spec = json.loads(spec) if isinstance(spec, str) else spec
    except json.JSONDecodeError as error:
        raise ValueError(f"column input_output is not JSON: {error}") from None
    if not isinstance(spec, Mapping) or not {"inputs", "outputs"} <= spec.keys():
        raise ValueError("column input_output needs `inputs` and `outputs`")
    return spec


def _as_text(item: Any) -> str:
    # Some APPS rows give lines instead of a text.
    return item if isinstance(item, str) else "\n".join(map(str, item))
