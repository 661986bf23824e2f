"""The display of a running command: bars on a terminal, one plain line now and then in a log file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.progress import Task as RichTask
from rich.table import Column
from rich.text import Text

_RECENT = 20  # steps that the speed is taken from: the first steps (compilation, caches) must not haunt the estimate


class Progress:
    """Shows stage, step, numbers, elapsed time and time left.

    On a terminal every stage has one line that updates in place; anywhere else (a pipe, a CI log) a plain line is
    printed at most every `interval` seconds and at the end of each stage.

    Example::

        with Progress() as progress:
            progress.stage("train", total=150)
            progress.update(1, reward=0.41, tokens_per_s=12_300)
            progress.message("checkpoint written to runs/a/checkpoints/step_1")

    Args:
        interval: seconds between two plain lines.
        enabled: False shows nothing (ranks other than 0).
        console: where to draw; standard output by default.
        clock: monotonic seconds, for tests.
    """

    def __init__(
        self,
        interval: float = 10.0,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._interval = interval
        self._enabled = enabled
        self._clock = clock
        # FORCE_COLOR makes rich call a pipe a terminal; moving the cursor there would only litter the log.
        self._live = enabled and self._console.is_interactive and self._console.file.isatty()
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._name = ""
        self._total: int | None = None
        self._step = 0
        self._printed_step = -1
        self._numbers: dict[str, float] = {}
        self._started = self._last_line = clock()
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT + 1)

    def stage(self, name: str, total: int | None) -> None:
        """Begin a stage of `total` steps (None: unknown); the stage before it keeps its last line."""
        self._end_stage()
        self._name, self._total, self._step, self._numbers = name, total, 0, {}
        self._printed_step = -1
        self._started = self._last_line = self._clock()
        self._recent.clear()
        self._recent.append((self._started, 0))
        if self._bars is not None:
            self._task = self._bars.add_task(name, total=total, numbers="", left="")
        elif self._enabled:
            self._print(f"[{name}] started" + (f", {total} steps" if total is not None else ""))

    def update(self, step: int, **numbers: float) -> None:
        """Say that `step` steps of the stage are done.

        Args:
            step: steps finished, 1 after the first.
            numbers: shown as they come; `x_per_s` is shown as x/s, and a number once given stays on display until it is
                given again. Names with slashes: `**{"eval/accuracy@4": 0.8}`.
        """
        self._step = step
        self._numbers.update(numbers)
        now = self._clock()
        if self._recent and step > self._recent[-1][1]:
            self._recent.append((now, step))
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=step, numbers=self._numbers_text(), left=self._left_text())
        elif self._enabled and now - self._last_line >= self._interval:
            self._print_state()

    def message(self, text: str) -> None:
        """Print a line that stays, above the bars."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._enabled:
            self._print(text)

    def _end_stage(self) -> None:
        if not self._name:
            return
        if self._bars is not None and self._task is not None:
            total = self._step if self._total is None else self._total
            self._bars.update(self._task, left="", total=total)
            self._bars.stop_task(self._task)
        elif self._enabled and self._step != self._printed_step:
            self._print_state()
        self._name = ""

    def _print_state(self) -> None:
        now = self._clock()
        self._last_line, self._printed_step = now, self._step
        steps = f"{self._step}/{self._total}" if self._total is not None else str(self._step)
        parts = [f"[{self._name}] {steps}", self._numbers_text(), f"elapsed {_duration(now - self._started)}"]
        parts.append(self._left_text())
        self._print("  ".join(part for part in parts if part))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def _numbers_text(self) -> str:
        return "  ".join(_number_text(name, value) for name, value in self._numbers.items())

    def _left_text(self) -> str:
        if self._total is None or self._step >= self._total or len(self._recent) < 2:
            return ""
        (first_time, first_step), (last_time, last_step) = self._recent[0], self._recent[-1]
        seconds = (last_time - first_time) / (last_step - first_step) * (self._total - self._step)
        return f"left {_duration(seconds)}"

    def __enter__(self) -> Progress:
        if self._live:
            self._bars = Bars(
                TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=12),
                _StepColumn(),
                # The one column that gives way on a narrow terminal, so that a stage never takes two lines.
                TextColumn("{task.fields[numbers]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
                _ElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False, style="cyan", table_column=Column(no_wrap=True)),
                console=self._console,
                refresh_per_second=4,
                expand=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_stage()
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class _StepColumn(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        total = f"/{int(task.total)}" if task.total is not None else ""
        return Text(f"{int(task.completed)}{total}", no_wrap=True)


class _ElapsedColumn(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        return Text(_duration(task.elapsed or 0.0), no_wrap=True, style="dim")


def _number_text(name: str, value: float) -> str:
    if name.endswith("_per_s"):
        return f"{value:,.{0 if value >= 10 else 2}f} {name.removesuffix('_per_s')}/s"
    if isinstance(value, int):
        return f"{name} {value:,}"
    return f"{name} {value:.3f}" if abs(value) >= 1e-3 or value == 0 else f"{name} {value:.1e}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
