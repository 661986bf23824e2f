"""One reward process seen from the trainer: start it, talk to it without ever blocking, kill all of it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from rewards.jobs import Job
from rewards.wire import frame, take_frame

TOKEN_VARIABLE = "DENOISE_RL_REWARD_WORKER"
MAX_PROCESSES = 64  # a call that has more than this many processes alive is killed
SEND_SECONDS = 30.0


class WorkerLostError(RuntimeError):
    """The process died or must be given up."""


class Child:
    """A process running `rewards.worker.main` in a session of its own.

    It is started as a bare interpreter, not through multiprocessing: the user's main script is not imported again,
    and no lock or CUDA state of the trainer is inherited.

    Args:
        memory_mb: memory limit in MiB, None for none.
        import_seconds: how long all imports inside calls may take; `deadline` does not run meanwhile.
    """

    def __init__(self, memory_mb: int | None, import_seconds: float = 120.0) -> None:
        self.token = secrets.token_hex(8)
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        start = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from rewards.worker import main; main({theirs.fileno()}, {memory_mb!r})"
        )
        environment = {**os.environ, TOKEN_VARIABLE: self.token}
        environment.setdefault("OMP_NUM_THREADS", "1")
        self.process = subprocess.Popen(
            [sys.executable, "-c", start],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self.job: Job | None = None
        self.call = 0
        self.deadline = 0.0
        self._import_left = import_seconds
        self._importing: tuple[float, float] | None = None  # when the import began, how far the deadline was then
        self._buffer = bytearray()
        self._next_census = 0.0
        self._killed = False

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return not self._killed and self.process.poll() is None

    def send(self, request: dict[str, Any]) -> None:
        """Write one request. A child that died or does not read is left for `poll` to find."""
        view = memoryview(frame(pickle.dumps(request)))
        end = time.monotonic() + SEND_SECONDS
        while view:
            try:
                view = view[self.channel.send(view) :]
            except BlockingIOError:
                if time.monotonic() > end or not self.alive:
                    return
                select.select([], [self.channel], [], 0.1)
            except OSError:
                return

    def poll(self) -> dict[str, Any] | None:
        """The next answer if it is there, else None.

        Raises:
            WorkerLostError: when the process is dead, or has forked without end.
            ValueError: when it wrote something that is no answer.
        """
        try:
            while True:
                piece = self.channel.recv(2**20)
                if not piece:
                    raise self._death()
                self._buffer += piece
                if len(piece) < 2**16:
                    break
        except BlockingIOError:
            pass
        except ConnectionError:
            raise self._death() from None
        while (payload := take_frame(self._buffer)) is not None:
            answer: dict[str, Any] = json.loads(payload)
            if "importing" not in answer:
                return answer
            self._note_import(bool(answer["importing"]))
        if self.process.poll() is not None:  # dead, but a process it started keeps the socket open
            raise self._death()
        now = time.monotonic()
        if now > self._next_census:
            self._next_census = now + 1.0
            count = len(processes_with_token(self.token))
            if count > MAX_PROCESSES:
                raise WorkerLostError(f"killed: the reward had {count} processes running")
        return None

    def _note_import(self, begins: bool) -> None:
        now = time.monotonic()
        if begins:
            self._importing = now, self.deadline - now
            self.deadline = now + self._import_left
        elif self._importing is not None:
            start, left = self._importing
            self._import_left -= now - start
            self.deadline = now + left
            self._importing = None

    def receive(self, deadline: float) -> dict[str, Any] | None:
        """Wait for the next answer; None when the deadline passes."""
        while time.monotonic() < deadline:
            answer = self.poll()
            if answer is not None:
                return answer
            select.select([self.channel], [], [], min(0.25, max(0.0, deadline - time.monotonic())))
        return None

    def kill(self) -> None:
        """End the process and everything it started, also what moved to a session of its own."""
        if self._killed:
            return
        self._killed = True
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        for _ in range(100):  # again while something forks faster than it is killed
            left = processes_with_token(self.token)
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        self.channel.close()

    def _death(self) -> WorkerLostError:
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return WorkerLostError("the reward closed its connection")
        if code == -signal.SIGXCPU:
            return WorkerLostError("timeout: CPU time limit exceeded")
        if code < 0:
            return WorkerLostError(f"the reward process died of {signal.Signals(-code).name}")
        return WorkerLostError(f"the reward process exited with code {code}")


def processes_with_token(token: str) -> list[int]:
    """Ids of living processes started, at whatever remove, by the worker with this token (Linux; else none)."""
    wanted = f"{TOKEN_VARIABLE}={token}".encode()
    found: list[int] = []
    try:
        entries = os.listdir("/proc")
    except FileNotFoundError:
        return found
    for entry in entries:
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as file:
            if wanted in file.read().split(b"\0"):
                found.append(int(entry))
    return found
