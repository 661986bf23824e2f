"""`metrics.jsonl`: one line per logged step, plain enough for `jq`, pandas and a text editor.

A line is `{"step": 12, "stage": "train", "time": 1760000000.0, "reward/mean": 0.61, ...}`. The names are
explained in docs/metrics.md. The file is the record; trackers get copies of it.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import operator
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rl.files import write_whole, writing
from rl.track.callbacks import Callbacks

FILE_NAME = "metrics.jsonl"
NON_FINITE = "warnings/non_finite"
_RESERVED = frozenset({"step", "stage", "time", NON_FINITE})

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends one JSON line per `log` call and tells the callbacks the same numbers.

    Example::

        with MetricsWriter(run_dir, callbacks=Callbacks(services=open_services(["tensorboard"], run_dir))) as metrics:
            metrics.log(3, "train", {"reward/mean": 0.5, "policy/entropy": 1.2})

    Args:
        run_dir: the run folder; it is created when absent.
        rank: the process's rank; every rank but 0 writes nothing, so callers need no `if`.
        callbacks: told on every rank; their trackers are closed together with the writer.
    """

    def __init__(self, run_dir: str | os.PathLike[str], rank: int = 0, callbacks: Callbacks | None = None) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.rank = rank
        self.callbacks = callbacks or Callbacks()
        self._file: Any = None
        if rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(self.path)
            self._open()

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Append one line.

        Args:
            step: optimizer-independent step of the stage (RL step for "train" and "eval").
            stage: "sft", "train" or "eval".
            metrics: flat names with slashes to numbers (0-d tensors and NumPy scalars are fine). NaN and infinity
                become null, and the line's `warnings/non_finite` says how many there were.

        Raises:
            ValueError: a metric is not a number or takes a name the line needs for itself.
        """
        line: dict[str, Any] = {"step": int(step), "stage": stage, "time": round(time.time(), 3)}
        non_finite = 0
        for name, value in metrics.items():
            if name in _RESERVED:
                raise ValueError(f"metric {name!r} is reserved by {FILE_NAME}; rename it")
            number = _as_number(name, value)
            if not math.isfinite(number):
                non_finite += 1
                number = None
            line[name] = number
        if non_finite:
            line[NON_FINITE] = non_finite
        for service in self.callbacks.services:
            if service.failures:
                line[f"warnings/{service.name}_failures"] = service.failures
        if self._file is not None:
            with writing(self.path):
                self._file.write(json.dumps(line, allow_nan=False) + "\n")
        numbers = {name: value for name, value in line.items() if name not in {"step", "stage", "time"}}
        self.callbacks.log(int(step), stage, {name: value for name, value in numbers.items() if value is not None})

    def truncate_after(self, step: int, stages: str | Iterable[str] = ("train", "eval")) -> int:
        """Drop the lines of `stages` whose step is greater than `step`: a resumed run logs them again.

        Returns:
            The number of dropped lines. The file is replaced in one move, never half written.
        """
        if self._file is None:
            return 0
        dropped_stages = {stages} if isinstance(stages, str) else set(stages)
        self._file.close()
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines]
        keep = [record["stage"] not in dropped_stages or record["step"] <= step for record in records]
        write_whole(self.path, "".join(itertools.compress(lines, keep)))
        self._open()
        dropped = list(itertools.compress(records, map(operator.not_, keep)))
        for service in self.callbacks.services:
            service.rewind(list(itertools.compress(records, keep)), dropped)
        return len(dropped)

    def close(self) -> None:
        """Close the file and every tracker; calling it twice is fine."""
        for service in self.callbacks.services:
            service.close()
        if self._file is not None:
            file, self._file = self._file, None
            with writing(self.path):
                file.close()

    def _open(self) -> None:
        # Line buffered: a killed run keeps every finished step, and `tail -f` follows a live one.
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: str | os.PathLike[str], stage: str | None = None) -> list[dict[str, Any]]:
    """Every complete line of the run's `metrics.jsonl`, in file order; only those of `stage` when it is given.

    A last line without its newline (a killed or still writing run) is left out, with a logged warning.

    Raises:
        ValueError: the run folder has no metrics, or a complete line is not JSON.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{run_dir} has no {FILE_NAME}; give the folder of a run")
    return [record for record in read_lines(path) if stage is None or record["stage"] == stage]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines. A last line without its newline is left out, with a logged warning.

    Raises:
        ValueError: a complete line is not JSON.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            logger.warning("%s line %d is incomplete and was left out", path, number)
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error.msg}); delete that line") from None
    return records


def _as_number(name: str, value: Any) -> Any:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, (str, bytes)):
        raise ValueError(f"metric {name!r} is text ({value!r}); log a number")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"metric {name!r} is a {type(value).__name__}; log one number") from None


def _drop_torn_line(path: Path) -> None:
    """Cut a last line that a killed run left without its newline; appending to it would spoil the next line too."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            file.truncate(end)
            logger.warning("%s ended in an incomplete line (%d bytes), which was dropped", path, len(data) - end)
