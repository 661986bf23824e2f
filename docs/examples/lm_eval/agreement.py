"""Does lm-evaluation-harness see what `denoise-rl eval` saw? Problem by problem, two folders compared.

    python docs/examples/lm_eval/agreement.py EVAL_FOLDER SAMPLES.jsonl METRIC

EVAL_FOLDER is what `denoise-rl eval --output` wrote, SAMPLES what `lm-eval run --log_samples` wrote for the same
problems, METRIC the name of lm-eval's verdict there.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def main(folder: str, samples: str, metric: str) -> None:
    stops = json.loads((Path(folder) / "settings.json").read_text())["template"]["stop"]
    own = {row["prompt_id"]: row for row in _rows(f"{folder}/generations.jsonl")}
    other = {problem_of(row): row for row in _rows(samples)}
    if own.keys() != other.keys():
        raise SystemExit(f"{len(own.keys() ^ other.keys())} problems are in one of {folder} and {samples} only")
    counts: Counter[str] = Counter()
    for name, here in own.items():
        there, text = other[name], here["completion"]
        for stop in stops:
            text = text.split(stop)[0]
        same = text.strip() == there["resps"][0][0].strip()
        right, theirs = here["reward"] >= 1, there[metric] == 1
        counts["same text" if same else "other text"] += 1
        counts[f"{'same' if same else 'other'} text, here {right}, lm-eval {theirs}"] += 1
        if right != theirs:
            print(f"{name}: here {right}, lm-eval {theirs}, {'same' if same else 'other'} text")
    for what, count in sorted(counts.items()):
        print(f"{count:4d}  {what}")


def problem_of(sample: dict[str, Any]) -> str:
    """What `denoise-rl eval` calls the problem of a sample of lm-eval; GSM8K has no names, only an order."""
    doc = sample["doc"]
    return doc.get("unique_id") or doc.get("task_id") or f"gsm8k/{sample['doc_id']}"


def _rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main(*sys.argv[1:])
