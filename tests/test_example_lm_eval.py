"""docs/examples/lm_eval: its tasks ask what `denoise-rl eval` asks, its judges judge, and the comparison counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from docs.examples.lm_eval.agreement import main
from rl.tasks.benchmarks import BENCHMARKS
from tests.runs import ROOT

FOLDER = ROOT / "docs" / "examples" / "lm_eval"
RECORDS = {
    "gsm8k_boxed": {"question": "How many {x}?", "answer": "2 + 2 = 4\n#### 4"},
    "math500_boxed": {"unique_id": "test/1", "problem": "Find $x$ in\n$\\{x\\}$.", "answer": "\\frac{1}{2}"},
    "humaneval_completion": {
        "task_id": "HumanEval/0",
        "prompt": "def twice(x):\n",
        "entry_point": "twice",
        "test": "def check(f):\n    assert f(2) == 4",
    },
}


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_a_task_asks_what_eval_asks(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    task = yaml.safe_load("\n".join(line for line in lines if "!function" not in line))
    benchmark = BENCHMARKS[name.partition("_")[0]]
    template = next(template for template in benchmark.templates if template.name == name.partition("_")[2])
    (row,) = benchmark.rows([RECORDS[name]])
    # lm-eval's own environment keeps the last line end.
    ours = jinja2.Environment(keep_trailing_newline=True).from_string(task["doc_to_text"]).render(RECORDS[name])
    assert ours == template.render(row)
    assert tuple(task["generation_kwargs"]["until"]) == template.stop


def test_the_judges_by_hand() -> None:
    pytest.importorskip("math_verify")
    from docs.examples.lm_eval.judges import math_verified, passes

    for text, right in (("So $\\boxed{0.5}$.", 1), ("So $\\boxed{2}$.", 0)):
        assert math_verified(RECORDS["math500_boxed"], [text]) == {"math_verify": right}
    for text, right in (("    return 2 * x", 1), ("    return x", 0)):
        assert passes(RECORDS["humaneval_completion"], [text]) == {"pass_at_1": right}


def test_agreement_counts_texts_and_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [("gsm8k/1", "b\ndef more", 1.0), ("gsm8k/0", "a", 0.0), ("gsm8k/2", "c", 1.0)]
    other: list[dict[str, Any]] = [
        {"doc_id": i, "doc": {}, "resps": [[text]], "exact_match": right}
        for i, (text, right) in enumerate([("a", 1), ("b", 1), ("other", 0)])
    ]
    keys = ("prompt_id", "completion", "reward")
    (tmp_path / "settings.json").write_text(json.dumps({"template": {"stop": ["\ndef"]}}))
    (tmp_path / "generations.jsonl").write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in own))
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, other)))
    main(str(tmp_path), str(tmp_path / "samples.jsonl"), "exact_match")
    assert capsys.readouterr().out.splitlines() == [
        "gsm8k/0: here False, lm-eval True, same text",
        "gsm8k/2: here True, lm-eval False, other text",
        "   1  other text",
        "   1  other text, here True, lm-eval False",
        "   2  same text",
        "   1  same text, here False, lm-eval True",
        "   1  same text, here True, lm-eval True",
    ]
