"""Watch a few child processes against their limits, reading what they write."""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rewards.sandbox import linux

LOOK_SECONDS = 0.02  # between two looks into the temporary folder, or as long as two looks take
LONGEST_RUN = 5  # times the wall limit, however busy the machine is


class ParentGone(Exception):
    """Whoever asked for this run has closed the connection."""


@dataclass
class Child:
    """A process of this worker."""

    pid: int
    status: int | None = None
    usage: resource.struct_rusage | None = None

    @property
    def cpu_seconds(self) -> float:
        if self.usage is not None:
            return self.usage.ru_utime + self.usage.ru_stime
        return linux.cpu_clock(self.pid)

    def starved_seconds(self, proc: int) -> float:
        """How long it was ready to run while others had the processors; 0.0 where that is not known.

        Args:
            proc: descriptor of the /proc folder.
        """
        try:
            fd = os.open(f"{self.pid}/schedstat", os.O_RDONLY, dir_fd=proc)
            try:
                return int(os.read(fd, 100).split()[1]) / 1e9
            finally:
                os.close(fd)
        except (OSError, ValueError, IndexError):
            return 0.0

    @property
    def exit_code(self) -> int | None:
        return None if self.status is None else os.waitstatus_to_exitcode(self.status)

    def reap(self, block: bool = False) -> bool:
        """Collect the exit status if it is there; True once the process has ended."""
        if self.status is None:
            pid, status, usage = os.wait4(self.pid, 0 if block else os.WNOHANG)
            if pid:
                self.status, self.usage = status, usage
        return self.status is not None

    def kill(self) -> None:
        """End it and its process group, and wait for that."""
        for end in (os.killpg, os.kill):
            try:
                end(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        self.reap(block=True)


@dataclass
class Sink:
    """Collects what arrives on a pipe.

    Attributes:
        fd: read end, non-blocking.
        limit: bytes to keep; the rest is read and dropped.
        stop_at_limit: whether more than `limit` ends the run.
    """

    fd: int
    limit: int
    stop_at_limit: bool = False
    data: bytearray = field(default_factory=bytearray)
    overflow: bool = False
    open: bool = True

    @property
    def text(self) -> str:
        """What was kept, undecodable bytes replaced."""
        return self.data.decode("utf-8", errors="replace")

    def read(self) -> None:
        """Take what is there now, at most 64 KiB."""
        try:
            chunk = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return
        self.open = bool(chunk)
        room = self.limit - len(self.data)
        self.overflow |= len(chunk) > room
        self.data += chunk[: max(room, 0)]

    def drain(self) -> None:
        """Take everything that was written by processes that have ended."""
        before = -1
        while self.open and before != len(self.data):
            before = len(self.data)
            self.read()


def watch(
    children: Sequence[Child],
    sinks: Sequence[Sink],
    finished: Callable[[], bool],
    cpu_limit: float,
    wall_limit: float,
    overfull: Callable[[], bool],
    wakeup: int,
    control: int,
    proc: int,
) -> str:
    """Wait until `finished()`; returns "" then, else which limit was hit: "timeout" or "output".

    Args:
        children: processes that are each held to `cpu_limit`.
        sinks: pipes to read meanwhile.
        finished: asked whenever something happened; reaps.
        cpu_limit: seconds of each child.
        wall_limit: seconds, not counting those in which a child waited for a processor.
        overfull: asked every `LOOK_SECONDS`: whether the programs keep too much on disk.
        wakeup: descriptor that becomes readable when a child ends.
        control: pipe from whoever asked; that its other end was closed ends the run.
        proc: descriptor of the /proc folder.

    Raises:
        ParentGone: as said.
    """
    start = time.monotonic()
    starved = 0.0
    next_look = start + LOOK_SECONDS
    poll = select.poll()
    poll.register(wakeup, select.POLLIN)
    poll.register(control, 0)  # only its hang-up: a message for the checker may be waiting there
    by_fd = {sink.fd: sink for sink in sinks}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    while not finished():
        passed = time.monotonic() - start
        if passed - starved >= wall_limit:
            starved = sum(child.starved_seconds(proc) for child in children)
        left = min(wall_limit - passed + starved, wall_limit * LONGEST_RUN - passed)
        left = min(left, *(cpu_limit - child.cpu_seconds for child in children))
        if left <= 0:
            return "timeout"
        now = time.monotonic()
        if now >= next_look:
            if overfull():
                return "output"
            next_look = now + max(LOOK_SECONDS, 3 * (time.monotonic() - now))
        events = poll.poll(max(0.0, min(left, next_look - now)) * 1000 + 1)
        for fd, _ in events:
            if fd == control:
                raise ParentGone
            if fd == wakeup:
                os.read(wakeup, 4096)
                continue
            sink = by_fd[fd]
            sink.read()
            if not sink.open:
                poll.unregister(fd)
            if sink.overflow and sink.stop_at_limit:
                return "output"
    return ""
