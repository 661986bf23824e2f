"""Child processes and what they write on pipes, as the runner sees them."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from dataclasses import dataclass, field

from rewards.sandbox import linux


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
        """How long it was ready to run while others had the processors (`proc` is the open /proc folder)."""
        try:
            with open(os.open(f"{self.pid}/schedstat", os.O_RDONLY, dir_fd=proc)) as file:
                return int(file.read().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0

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
            with contextlib.suppress(ProcessLookupError, PermissionError):
                end(self.pid, signal.SIGKILL)
        self.reap(block=True)


@dataclass
class Sink:
    """Collects up to `limit` bytes from the non-blocking `fd`; more ends the run when `stop_at_limit`, else is lost."""

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
