"""SIGTERM, which launchers and schedulers send, asks a run to stop: it finishes its step and writes a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM


class Stopped(Exception):
    """The run stopped because it was told to; its state is on disk."""


@contextmanager
def heeding_sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM is noted: the callable given tells whether it came. A second one ends the process at once."""
    asked = False

    def note(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; whoever runs a training in another one stops it in another way.
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, before)
