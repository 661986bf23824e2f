"""SIGTERM (launchers, schedulers) and SIGINT (Ctrl-C) ask a run to stop: it finishes its step and saves it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A launcher passes on what the terminal has sent to its ranks already.
_SAME_SIGNAL_SECONDS = 2.0


class Stopped(Exception):
    """The run stopped because a signal told it to; its state is on disk."""

    def __init__(self, number: float):
        self.exit_code = 128 + int(number)
        super().__init__(signal.Signals(int(number)).name)


@contextmanager
def heeding_signals() -> Iterator[Callable[[], int]]:
    """Inside, SIGTERM and SIGINT are noted: the callable given tells which number came, 0 for none.

    A second one, 2 s later or more, ends the process at once.
    """
    asked, since = 0, 0.0

    def note(number: int, frame: object) -> None:
        nonlocal asked, since
        if not asked:
            asked, since = number, time.monotonic()
            if number == signal.SIGINT:
                # Not `print`: the signal may have come in the middle of one.
                os.write(2, b"\nCtrl-C: the step is finished and saved; once more ends the run at once\n")
        elif time.monotonic() - since > _SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; whoever runs a training in another one stops it in another way.
        yield lambda: 0
        return
    # What is ignored (SIGINT of a job in the background) stays ignored.
    heard = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
