"""Wall and CPU seconds of a stage."""

from __future__ import annotations

import contextlib
import time

import psutil
import torch

from rl import distributed


def cpu_seconds() -> float:
    """CPU seconds so far of this process, its threads, and its child processes (reward workers), ended ones too."""
    me, total = psutil.Process(), 0.0
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # a child that has just ended
            total += sum(process.cpu_times()[:4])
    return total


class Stopwatch:
    """Begins when it is made."""

    def __init__(self) -> None:
        self.started, self.cpu = time.perf_counter(), cpu_seconds()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def read(self, name: str, device: torch.device) -> dict[str, float]:
        """`{"train_seconds": 9.5, "train_cpu_seconds": 17.2}`, CPU seconds over all ranks; all ranks must call this.

        Servers and Ray's workers are no children of a run, and not in it.
        """
        spent = distributed.reduce_number(cpu_seconds() - self.cpu, "sum", device)
        return {f"{name}_seconds": self.seconds, f"{name}_cpu_seconds": spent}
