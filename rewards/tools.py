"""The library behind `denoise-rl score` and `denoise-rl new-reward`."""

from __future__ import annotations

import json
import keyword
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.run import RewardRunner
from rewards.table import RewardPart

PLUGIN = '''\
"""Reward `{name}`: say in one line what earns the reward."""

from rewards import Score


def {name}(prompts, completions, answer, bonus=0.0, **columns):
    """1.0 when the completion ends with the answer, else `bonus`.

    Args:
        prompts: [B] prompts, text or chat messages.
        completions: [B] what the model wrote.
        answer: [B] a column of your dataset. Ask for any column by its name.
        bonus: a parameter; the config sets it.
        columns: all other columns; keep it, so that datasets may have more than you use.

    Returns:
        [B] floats. `None` means the reward does not apply to this row; `Score(None, reason="...")` means the
        verdict failed, which masks the completion instead of punishing it.
    """
    scores = []
    for completion, wanted in zip(completions, answer, strict=True):
        if not wanted:
            scores.append(Score(None, reason="the row has no answer"))
        else:
            scores.append(1.0 if completion.strip().endswith(wanted) else bonus)
    return scores
'''

PLUGIN_TEST = '''\
"""Run with: python -m pytest {test_file}"""

from pathlib import Path

from rewards import RewardPart, RewardRunner

REWARD = f"{{Path(__file__).parent / '{file}'}}:{name}"


def test_right_wrong_and_failed():
    completions = ["2 + 2 = 4", "2 + 2 = 5", "2 + 2 = 4"]
    columns = {{"answer": ["4", "4", ""]}}
    # mode="process" is how training runs it: loaded by name in a process of its own.
    with RewardRunner([RewardPart(REWARD, params={{"bonus": 0.1}})], mode="process", max_failure_share=1.0) as runner:
        table = runner.score(["2 + 2 ="] * 3, completions, columns)
    assert table.values == [1.0, 0.1, None]
    assert table.parts["{name}"][2].reason == "the row has no answer"
'''


@dataclass
class ScoreReport:
    """What a reward says about a file.

    Example: `print(score_file("samples.jsonl", "math_answer", columns={"answer": "gold"}).text())`.
    """

    reward: str
    values: list[float | None]  # one per completion, None where there is no score
    reasons: Counter[str]  # why scores are missing -> how often
    metrics: dict[str, float] = field(default_factory=dict)  # as the reward reports them, mean over all completions
    seconds: float = 0.0  # wall time of scoring
    load_seconds: float = 0.0  # wall time of loading the reward

    def text(self) -> str:
        """A report of a few lines: counts, mean, distribution, failures, timing."""
        present = [value for value in self.values if value is not None]
        lines = [f"{self.reward}: {len(self.values)} completions, {len(present)} scored"]
        if present:
            spread = statistics.pstdev(present)
            mean = statistics.fmean(present)
            lines.append(f"mean {mean:.4f}  std {spread:.4f}  min {min(present):g}  max {max(present):g}")
            lines += [f"  {label:>20}  {count:>7}  {count / len(present):6.1%}" for label, count in _histogram(present)]
        for name, value in sorted(self.metrics.items()):
            lines.append(f"{name}: {value:.4g}")
        lines.append(f"without score: {len(self.values) - len(present)}")
        lines += [f"  {count:>7}x  {reason}" for reason, count in self.reasons.most_common(10)]
        rate = len(self.values) / self.seconds if self.seconds else 0.0
        lines.append(f"{self.seconds:.2f} s, {rate:.0f} verdicts/s (loading: {self.load_seconds:.2f} s)")
        return "\n".join(lines)


def score_file(
    path: str | Path,
    reward: str,
    params: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    prompt: str = "prompt",
    completion: str = "completion",
    output: str | Path | None = None,
    limit: int | None = None,
    mode: str = "process",
    num_workers: int = 1,
    timeout_seconds: float = 10.0,
    batch_size: int = 256,
) -> ScoreReport:
    """Run a reward over a JSONL file of samples.

    Args:
        path: one JSON object a line. The completion may be a text, a chat, or a list of texts (samples of one prompt).
        reward, params: any name `load_reward` takes, and parameters of it.
        columns: argument of the reward -> field of the file, where the names differ.
        prompt, completion: fields that hold the prompt ("" when absent) and the completion.
        output: write every completion with its score to this JSONL file.
        limit, batch_size: score only the first so many completions, so many at once.
        mode, num_workers, timeout_seconds: of the `RewardRunner`; "inline" shows the reward's own prints.

    Raises:
        ValueError: for a broken line, a missing completion, an unknown reward or parameter, a wrong output.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    rows = list(_samples(Path(path), prompt, completion, limit))
    if not rows:
        raise ValueError(f"{path} holds no samples")
    if output is not None and not Path(output).parent.is_dir():
        raise ValueError(f"--output: the folder {Path(output).parent} does not exist, make it first")
    if output is not None and Path(output).exists() and Path(output).samefile(path):
        raise ValueError(f"--output {output} is the file of the samples: name another one")
    part = RewardPart(reward, params=dict(params or {}), columns=dict(columns or {}), label="reward")
    report = ScoreReport(reward, [], Counter())
    totals: dict[str, list[float]] = {}
    begin = time.perf_counter()
    how: dict[str, Any] = {"mode": mode, "num_workers": num_workers, "timeout_seconds": timeout_seconds}
    with RewardRunner([part], **how, max_failure_share=1.0) as runner:
        start = time.perf_counter()
        report.load_seconds = start - begin
        for at in range(0, len(rows), batch_size):
            chunk = rows[at : at + batch_size]
            # A field only some rows have is None in the others.
            names = sorted({name for row in chunk for name in row} - {prompt, completion})
            fields = {name: [row.get(name) for row in chunk] for name in names}
            table = runner.score([row.get(prompt, "") for row in chunk], [row[completion] for row in chunk], fields)
            for row, value, score in zip(chunk, table.values, table.parts["reward"], strict=True):
                report.values.append(value)
                row["score"] = value
                if score.reason:
                    report.reasons[score.reason] += 1
                    row["reason"] = score.reason
                for name, number in score.metrics.items():
                    totals.setdefault(name, []).append(float(number))
        report.seconds = time.perf_counter() - start
    report.metrics = {name: statistics.fmean(numbers) for name, numbers in totals.items()}
    if output is not None:
        Path(output).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return report


def new_reward(path: str | Path) -> tuple[Path, Path]:
    """Write a working reward, `my_reward` or `folder/my_reward.py`, named like its file; returns it and its test.

    Raises:
        ValueError: when the name is no Python name or a standard-library module, or when a file exists already.
    """
    file = Path(path).with_suffix(".py")
    name = file.stem
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"'{name}' cannot name a Python function; use letters, digits and _")
    if name in sys.stdlib_module_names:
        raise ValueError(f"'{name}' is a standard-library module; give the reward another name")
    test = file.with_name(f"test_{file.name}")
    for existing in (file, test):
        if existing.exists():
            raise ValueError(f"{existing} exists already; choose another name")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(PLUGIN.format(name=name), encoding="utf-8")
    test.write_text(PLUGIN_TEST.format(name=name, file=file.name, test_file=test.name), encoding="utf-8")
    return file, test


def _samples(path: Path, prompt: str, completion: str, limit: int | None) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a file" if path.is_dir() else f"no file {path}")
    count = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise ValueError(f"{path}:{number} is not UTF-8: save the file as UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(row, dict) or completion not in row:
                fields = sorted(row) if isinstance(row, dict) else type(row).__name__
                has = f"{path}:{number} has no '{completion}', it has {fields}"
                raise ValueError(f"{has}; name the field of completions")
            found = row[completion]
            several = isinstance(found, list) and all(isinstance(text, str) for text in found)
            for text in found if several else [found]:
                if limit is not None and count >= limit:
                    return
                count += 1
                yield {**row, completion: text}


def _histogram(values: Sequence[float]) -> list[tuple[str, int]]:
    """Each value with its count when there are at most ten, else ten equal bins."""
    counts = Counter(values)
    if len(counts) <= 10:
        return [(f"{value:g}", counts[value]) for value in sorted(counts)]
    low, high = min(values), max(values)
    width = (high - low) / 10
    bins = Counter(min(9, int((value - low) / width)) for value in values)
    return [(f"{low + width * bin:.3g} to {low + width * (bin + 1):.3g}", bins[bin]) for bin in range(10)]
