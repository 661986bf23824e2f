"""The benchmarks: where their problems are, how they are asked, and what judges the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl.tasks import benchmark_examples as published
from rl.tasks import templates
from rl.tasks.base import Example
from rl.tasks.records import Record, hub_records, read_records
from rl.tasks.templates import Template


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        hub: dataset on the Hugging Face hub, with its configuration and split.
        rows: turns published records into rows (`rl.tasks.benchmark_examples`).
        templates: prompts (`rl.tasks.templates`), the preferred chat and plain one first; the last is plain and
            shows nothing but the problem.
        reward: what judges an answer, and by that how the answer is found in the completion.
        releases: name -> files on the hub, for a benchmark that grows; the last one is the default.
    """

    hub: str
    split: str
    rows: Callable[[Sequence[Record]], list[Example]]
    templates: tuple[Template, ...]
    reward: str
    config: str | None = None
    releases: dict[str, list[str]] | None = None


# LiveCodeBench adds a file per release; release_v3 is the first three files.
_LCB_FILES = ["test.jsonl", *(f"test{number}.jsonl" for number in range(2, 7))]
_LCB_RELEASES = {f"release_v{number}": _LCB_FILES[:number] for number in range(1, 7)}

_MATH, _CODE = "math_answer", "code_tests"
BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "test", published.gsm8k_examples, templates.GSM8K, _MATH, config="main"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", published.math_examples, templates.MATH, _MATH),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", published.math_examples, templates.MATH, _MATH),
    "humaneval": Benchmark("openai/openai_humaneval", "test", published.humaneval_examples, templates.HUMANEVAL, _CODE),
    "mbpp": Benchmark(
        "google-research-datasets/mbpp",
        "prompt+test",
        published.mbpp_examples,
        templates.MBPP,
        _CODE,
        config="full",
    ),
    "livecodebench": Benchmark(
        "livecodebench/code_generation_lite",
        "test",
        published.livecodebench_examples,
        templates.LIVECODEBENCH,
        _CODE,
        releases=_LCB_RELEASES,
    ),
}


class BenchmarkTask:
    """A benchmark as a task: rows to evaluate on, none to train on."""

    grid = None
    alphabet = None

    def __init__(self, name: str, release: str | None = None):
        """
        Args:
            name: a key of `BENCHMARKS`.
            release: which release of a benchmark that grows; the newest known when None.
        """
        self.benchmark = BENCHMARKS[name]
        self.name = name
        self.reward = self.benchmark.reward
        self.templates = self.benchmark.templates
        releases = self.benchmark.releases or {}
        if release is not None and release not in releases:
            known = ", ".join(releases) or "none"
            raise ValueError(f"task.params.release {release!r} does not exist; {name} has {known}")
        self.release = release or (list(releases)[-1] if releases else None)

    @property
    def origin(self) -> str:
        """Where the rows come from without a file, for results."""
        part = self.release or self.benchmark.config
        return f"{self.benchmark.hub}{f' [{part}]' if part else ''} {self.benchmark.split}"

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        raise ValueError(
            f"task.name {self.name} is a benchmark, to evaluate on: train on task.name jsonl with its file"
        )

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        return self.all_examples()[:count]

    def all_examples(self) -> list[Example]:
        """Every problem, from the hub.

        Raises:
            ValueError: it cannot be reached.
        """
        files = (self.benchmark.releases or {}).get(self.release or "", [])
        records = hub_records(self.benchmark.hub, self.benchmark.split, self.benchmark.config, files)
        return self._rows(records, self.benchmark.hub)

    def file_examples(self, path: str) -> list[Example]:
        """Every problem of a file in the benchmark's published format."""
        return self._rows(read_records(path), path)

    def _rows(self, records: Sequence[Record], where: str) -> list[Example]:
        try:
            rows = self.benchmark.rows(records)
        except KeyError as error:
            columns = ", ".join(records[0])
            raise ValueError(f"{where} is not a {self.name} file: no column {error}; it has {columns}") from None
        # A cell that is empty or of another kind.
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{where} is not a {self.name} file: {error}") from None
        if not rows:
            raise ValueError(f"{where} holds no problem of {self.name}")
        empty = next((row["prompt_id"] for row in rows if not row["problem"]), None)
        if empty is not None:
            raise ValueError(f"{where}: problem {empty} is empty: fill it in, or leave it out")
        # The last template shows nothing but the problem, so every file has what it needs.
        return [row | {"prompt": self.templates[-1].render(row)} for row in rows]
