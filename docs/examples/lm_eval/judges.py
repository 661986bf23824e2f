"""Judges for lm-evaluation-harness that share no code with `rewards`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from math_verify import parse, verify


def math_verified(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """MATH-500 by math_verify, the gold answer in dollars as its parser wants it."""
    return {"math_verify": int(verify(parse(f"${doc['answer']}$"), parse(results[0])))}


def passes(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """HumanEval as in human-eval: prompt, completion and tests in a process of their own, 10 s. Not a sandbox."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})"
    try:
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return {"pass_at_1": 0}
    return {"pass_at_1": int(run.returncode == 0)}
