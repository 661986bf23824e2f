"""The folder of an evaluation: every generation as a line, the settings that made it, and the figures.

settings.json       everything that a score depends on; written first, compared when a run continues
generations.jsonl   one line per prompt, sample and decoder, written as they come
batches.jsonl       work and time of every batch of them
results.json        the figures
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rl.files import lock_file, write_json, write_whole, writing

# These may differ between two calls that share a folder: the place of a file (its content is compared), and the number
# of samples.
FREE = ("model.path", "model.tokenizer", "data.file", "samples")


@dataclass
class Generation:
    """One completion and its verdict.

    Example: `Generation("static@8", "HumanEval/0", 0, 42, "    return 1", [5, 6], [1, 0], 2, True, 0.0, None)`.

    Attributes:
        decoder: a key of the settings' `decoders`.
        sample: index among the samples of this prompt.
        completion: the whole text; what is judged ends at the template's first stop string.
        completion_ids: tokens up to and including the end token.
        reveal_steps: the denoising step at which each of these tokens got its value.
        steps: denoising forwards it took; 0 where it was not sampled at all.
        ended: the end token was reached.
        reward: None where there is no score.
        reason: why there is none.
        metrics: what the judge reports beside it (`Score.metrics`); a folder of an older version has none.
    """

    decoder: str
    prompt_id: str
    sample: int
    seed: int
    completion: str
    completion_ids: list[int]
    reveal_steps: list[int]
    steps: int
    ended: bool
    reward: float | None
    reason: str | None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.decoder, self.prompt_id, self.sample


@dataclass
class BatchCost:
    """Cost of one batch of a decoder: answer tokens, wall seconds of sampling and of scoring."""

    decoder: str
    completions: int
    tokens: int
    seconds: float
    reward_seconds: float


class GenerationFolder:
    """Reads and writes one folder; one process at a time may append."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._lock: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        """The content of settings.json.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        try:
            return dict(json.loads((self.path / "settings.json").read_text()))
        except (OSError, ValueError):
            raise ValueError(f"{self.path} is no folder of an evaluation: it has no readable settings.json") from None

    def open(self, settings: Mapping[str, Any]) -> None:
        """Begin to write under these settings, or continue what was written under the same.

        More samples or further decoders may be asked for than before.

        Raises:
            ValueError: the folder was written under other settings (naming the first that differs), belongs to
                something else, or is being written by another process.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(self.path / "generations.jsonl")
        try:
            self._begin(settings)
        except ValueError:
            self.close()
            raise

    def _begin(self, settings: Mapping[str, Any]) -> None:
        merged = dict(settings)
        if (self.path / "settings.json").exists():
            old = self.settings
            self._compare(old, settings)
            merged["decoders"] = old["decoders"] | settings["decoders"]
        elif (self.path / "generations.jsonl").stat().st_size:
            raise ValueError(f"{self.path} holds generations without settings.json: name another folder")
        self.write("settings.json", merged)

    def _compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        before, now = _flat(old), _flat(new)
        # A decoder that only one of the two has is not a difference.
        shared = old["decoders"].keys() & new["decoders"].keys()
        for key in [*before, *(key for key in now if key not in before)]:
            if key in FREE or (key.startswith("decoders.") and key.split(".")[1] not in shared):
                continue
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{self.path} was written with {key} {before.get(key)!r}, now it is {now.get(key)!r}: "
                    f"use the same settings, or another --output"
                )
        if new["samples"] < old["samples"]:
            raise ValueError(
                f"{self.path} was written with samples {old['samples']}, now it is {new['samples']}: ask for as many, "
                f"or for more"
            )

    def generations(self) -> list[Generation]:
        """All generations in the order they were written; half a last line (a killed run) is cut off the file."""
        return [Generation(**record) for record in self._lines("generations.jsonl")]

    def batches(self) -> list[BatchCost]:
        return [BatchCost(**record) for record in self._lines("batches.jsonl")]

    def append(self, generations: Sequence[Generation], batch: BatchCost) -> None:
        """Write a batch; it is on disk when this returns."""
        self._append("generations.jsonl", generations)
        self._append("batches.jsonl", [batch])

    def replace(self, generations: Iterable[Generation]) -> None:
        """Put other generations in the place of those there are; the file changes at once or not at all."""
        write_whole(self.path / "generations.jsonl", "".join(_line(generation) for generation in generations))

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, at once or not at all."""
        write_json(self.path / name, content)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _append(self, name: str, records: Sequence[Any]) -> None:
        with writing(self.path / name), (self.path / name).open("a") as file:
            file.write("".join(_line(record) for record in records))
            file.flush()
            os.fsync(file.fileno())

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return []
        content = path.read_bytes()
        whole = content.rpartition(b"\n")[0]
        if len(whole) + 1 < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole) + 1 if whole else 0)
        return [json.loads(line) for line in whole.splitlines()]


def _line(record: Any) -> str:
    return json.dumps(asdict(record), allow_nan=False) + "\n"


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
