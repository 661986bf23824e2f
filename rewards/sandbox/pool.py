"""The local sandbox: a few warm workers, each judging one program at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from rewards.sandbox import frames
from rewards.sandbox.isolation import ISOLATIONS, LANDLOCK, REWARDS, SECCOMP, TRIAL, bubblewrap
from rewards.sandbox.records import LONGEST_RUN, Limits, Program, RunResult, SandboxReport

LOG = logging.getLogger(__name__)
START_SECONDS = 60.0
GRACE_SECONDS = 20.0  # over the longest run of a program, before its worker counts as stuck
STOP_SECONDS = 10.0  # for a worker to end by itself once its pipes are closed
BOOT = (
    "import sys; sys.path.insert(0, sys.argv.pop()); from rewards.sandbox.worker import main; del sys.path[0]; main()"
)
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of a set must not decide a verdict
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class SandboxError(RuntimeError):
    """No worker could be started."""


class WorkerDied(Exception):
    """A worker ended, or did not answer in time."""


class CodeSandbox:
    """Runs programs that nobody trusts. A context manager; safe to call from several threads.

    The strongest isolation that works here is found when the first program comes, and logged in one line: "bubblewrap",
    or "process" (resource limits, seccomp, Landlock), which most containers allow. Where neither works nothing runs,
    unless `isolation` is "none": resource limits only. See docs/sandbox.md for what each one holds back.

    Raises:
        ValueError: for an unknown isolation, or max_workers below 1.
    """

    def __init__(self, max_workers: int = 2, limits: Limits | None = None, isolation: str = "auto") -> None:
        if max_workers < 1:
            raise ValueError(f"max_workers must be at least 1, got {max_workers}")
        if isolation not in ("auto", *ISOLATIONS):
            raise ValueError(f"isolation must be 'auto' or one of {', '.join(ISOLATIONS)}; got '{isolation}'")
        self.max_workers = max_workers
        self.limits = limits or Limits()
        self.isolation = isolation
        self._report: SandboxReport | None = None
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def run(self, programs: Sequence[Program]) -> list[RunResult]:
        """Run each program in a process of its own; results in the order of `programs`.

        Raises:
            ValueError: for a program in another language than Python.
            SandboxError: when no worker can be started.
        """
        for program in programs:
            if program.language != "python":
                raise ValueError(f"language '{program.language}' needs a remote sandbox; the local one runs python")
        with self._lock:
            if self._owner != os.getpid():  # we are in a fork: the workers are another process's
                self._workers, self._owner = [], os.getpid()
            for worker in [worker for worker in self._workers if worker.tmp_mb != self.limits.tmp_mb]:
                self._remove_worker(worker)
            if programs and self._report is None:
                self._workers.append(self._start_worker())
            self._idle = list(self._workers)
            with ThreadPoolExecutor(self.max_workers, "code sandbox") as threads:
                try:
                    return list(threads.map(self._judge, programs))
                except BaseException:  # an interrupt: the answers on their way belong to nobody
                    threads.shutdown(wait=False, cancel_futures=True)
                    while self._workers:
                        self._remove_worker(self._workers[-1])
                    raise

    def describe(self) -> SandboxReport:
        """Which protections are in force. Starts a worker when there is none. Raises SandboxError."""
        with self._lock:
            if self._report is None:
                self._workers.append(self._start_worker())
            assert self._report is not None
            return self._report

    def close(self) -> None:
        """End the workers. The next `run` starts new ones."""
        with self._lock:
            for worker in self._workers if self._owner == os.getpid() else []:
                worker.stop()
            self._workers = []

    def __enter__(self) -> CodeSandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_workers", None):
            self.close()

    def _judge(self, program: Program) -> RunResult:
        request = _request(program, self.limits)
        if not request:
            return RunResult("invalid", reason=f"program or tests above {frames.MAX_BYTES} bytes")
        problem = ""
        for _ in range(2):
            try:
                worker = self._idle.pop()
            except IndexError:
                worker = self._start_worker()
                self._workers.append(worker)
            try:
                result = worker.judge(request, self.limits.wall)
            except WorkerDied as error:
                LOG.warning("code sandbox: a worker was replaced: %s", error)
                problem = str(error)
                self._remove_worker(worker)
                continue
            self._idle.append(worker)
            return result
        return RunResult("infrastructure", reason=f"sandbox: {problem}, twice")

    def _remove_worker(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.stop()

    def _start_worker(self) -> _Worker:
        if self._report is not None:
            return _Worker.start(self._report.isolation, self.limits.tmp_mb)[0]
        problems = []
        for isolation in ISOLATIONS[:-1] if self.isolation == "auto" else (self.isolation,):
            try:
                worker, hello = _Worker.start(isolation, self.limits.tmp_mb)
            except SandboxError as error:
                problems.append(f"no {isolation}: {error}")
                continue
            self._report = SandboxReport(isolation, tuple(hello["layers"]), (*problems, *hello["missing"]))
            LOG.log(logging.WARNING if self._report.missing else logging.INFO, "%s", self._report)
            return worker
        unsafe = "; isolation: none runs programs with resource limits only" if self.isolation == "auto" else ""
        raise SandboxError(f"code sandbox: {'; '.join(problems)}{unsafe}")


class _Worker:
    """One worker process, seen from the pool."""

    def __init__(self, process: subprocess.Popen[bytes], tmp_mb: int) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process, self.tmp_mb = process, tmp_mb
        self.requests, self.replies = process.stdin.fileno(), process.stdout.fileno()

    @classmethod
    def start(cls, isolation: str, tmp_mb: int) -> tuple[_Worker, dict[str, Any]]:
        """Start a worker and read what it says of its protections. Raises SandboxError."""
        # The owner is there for whoever looks at a list of processes.
        options = json.dumps({"isolation": isolation, "owner": os.getpid()})
        command = [sys.executable, "-s", "-P", "-c", BOOT, options, os.path.dirname(REWARDS)]
        if isolation == "bubblewrap":
            try:
                command = bubblewrap(tmp_mb) + command
            except OSError as error:
                raise SandboxError(str(error)) from None
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd="/", start_new_session=True
        )
        worker = cls(process, tmp_mb)
        try:
            hello = worker._receive(START_SECONDS)
            if "error" in hello:
                raise WorkerDied(hello["error"])
            trial = worker.judge(_request(Program(TRIAL), Limits()), START_SECONDS)
            named = [layer for layer in (SECCOMP, LANDLOCK) if any(name.startswith(layer) for name in hello["layers"])]
            broken = [layer for layer in named if layer not in trial.stdout.split()]
            if trial.status != "ok" or broken:
                raise WorkerDied(f"{trial.reason or ' and '.join(broken) + ' without effect'} {trial.stderr}".strip())
        except WorkerDied as error:
            worker.stop()
            raise SandboxError(str(error)) from None
        return worker, hello

    def judge(self, request: bytes, wall_seconds: float) -> RunResult:
        """The result of a program that may take `wall_seconds`. Raises WorkerDied."""
        with contextlib.suppress(OSError):  # a worker that is gone is noticed when its answer is read
            frames.write_all(self.requests, request)
        return RunResult.from_message(self._receive(wall_seconds * LONGEST_RUN + GRACE_SECONDS))

    def stop(self) -> None:
        """End the process, and with it whatever it is running."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self.process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _receive(self, patience: float) -> Any:
        poll = select.poll()
        poll.register(self.replies, select.POLLIN)
        if not poll.poll(patience * 1000):
            raise WorkerDied("worker did not answer in time")
        try:
            return frames.receive_frame(self.replies)
        except (frames.FrameError, OSError):
            code = self.process.wait()
            raise WorkerDied(f"worker ended (exit code {code})") from None


def _request(program: Program, limits: Limits) -> bytes:
    """What to send for one program, b"" when it is too large. Tests go in a message of their own, which only the
    checker's process reads."""
    stdin = program.stdin if program.tests is None else None
    spec = {name: getattr(program, name) for name in ("setup", "preamble", "entry_point")}
    spec["tests"] = list(program.tests or ())
    try:
        request = frames.frame({"code": program.code, "stdin": stdin, "limits": dataclasses.asdict(limits)})
        return request if program.tests is None else request + frames.frame(spec)
    except frames.FrameError:
        return b""
