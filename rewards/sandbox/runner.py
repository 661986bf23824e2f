"""Judge one program: fork its process, the checker's for function tests, watch both, collect what came out.

A runner is itself a fork of the worker and serves a single request, so the memory a program is forked from has
never held another program's output, and never holds the tests: those are read by the checker's process alone.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import os
import random
import select
import signal
import tempfile
import time
from collections.abc import Callable
from typing import Any

from rewards.sandbox import checker, folders, frames, program
from rewards.sandbox.children import Child, Sink
from rewards.sandbox.isolation import FIRST_UID, NUM_UIDS, Protection
from rewards.sandbox.records import LONGEST_RUN, Limits

STDERR_KEPT = 64 * 1024
MESSAGES_KEPT = 16 * 1024 * 1024
READY = b"\x01"
FIRST_HIGH_DESCRIPTOR = 64
LOOK_SECONDS = 0.02  # between two looks into the temporary folder, or three times as long as a look takes
REASONS = {"": "", "timeout": "time limit reached", "output": "output limit reached"}


class ParentGone(Exception):
    """Whoever asked for this run has closed the connection."""


class Runner:
    """Serves one request of the pool, which was read from the descriptor `control`."""

    def __init__(self, found: Protection, control: int) -> None:
        self.found, self.control = found, control
        self.uids = [FIRST_UID + (2 * os.getpid() + which) % NUM_UIDS for which in range(2)]
        self.open: list[int] = []
        self.children: list[Child] = []
        self.wakeup, wakeup_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run one program; a `RunResult` as a JSON object.

        The request has `code`, `limits`, and `stdin`, a text or None: then a second message follows on `control`, with
        the tests, which only the checker's process reads.
        """
        limits = Limits(**request["limits"])
        start = time.monotonic()
        try:
            if request["stdin"] is None:
                result = self._tests(request["code"], limits)
            else:
                result = self._script(request["code"], request["stdin"], limits)
        except OSError as error:  # no process, no pipe, no memory: nothing the program did
            result = {"status": "infrastructure", "reason": f"sandbox: {error}"}
        finally:
            self.clean_up()
        return {**result, "wall_seconds": time.monotonic() - start}

    def clean_up(self) -> None:
        """End every process of this run and give everything back."""
        for child in self.children:
            child.kill()
        for fd in self.open:
            os.close(fd)
        for number in range(len(self.children)):
            folders.empty(f"{self.found.folder}/{number}")
        self.children, self.open = [], []

    # -- the two kinds of run -----------------------------------------------------------------------------------

    def _script(self, code: str, stdin: str, limits: Limits) -> dict[str, Any]:
        out_read, out = self._pipe()
        err_read, err = self._pipe()
        source = self._nameless_file(stdin)
        child, ready = self._spawn(lambda: program.run_script(code), [source, out, err], limits, program.attach_streams)
        stdout = Sink(out_read, limits.output_kb * 1024, stop_at_limit=True)
        stderr = Sink(err_read, STDERR_KEPT)
        stopped = self._watch([child], [stdout, stderr, ready], child.reap, limits)
        result = _outcome(stopped, ready)
        result |= {"stdout": stdout.text, "stderr": stderr.text, "cpu_seconds": child.cpu_seconds}
        if result["status"] == "ok":
            result["exit_code"] = exit_code = os.waitstatus_to_exitcode(child.status or 0)
            if exit_code:
                last_line = stderr.text.strip().rpartition("\n")[2]
                result |= {"status": "error", "reason": f"exit code {exit_code}: {last_line}"[:300]}
        return result

    def _tests(self, code: str, limits: Limits) -> dict[str, Any]:
        out_read, out = self._pipe()
        err_read, err = self._pipe()
        verdict_read, verdict = self._pipe()
        request_read, request_write = self._pipe(blocking=True)
        reply_read, reply_write = self._pipe(blocking=True)
        nothing = self._keep(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))

        def check() -> None:
            checker.check(spec[0], requests=3, replies=4, out=5)

        def read_tests() -> None:
            spec.append(frames.receive_frame(6))
            os.close(6)

        spec: list[Any] = []
        ends = [nothing, out, err, request_read, reply_write]
        serve = functools.partial(program.serve_program, code, requests=3, replies=4)
        served, ready = self._spawn(serve, ends, limits, program.attach_streams)
        ends = [nothing, nothing, nothing, request_write, reply_read, verdict, self.control]
        checked, checker_ready = self._spawn(check, ends, limits, read_tests)
        # Ours must be closed for either side to notice that the other has ended.
        for fd in (request_read, request_write, reply_read, reply_write, verdict):
            self._close(fd)
        stdout = Sink(out_read, limits.output_kb * 1024, stop_at_limit=True)
        stderr, messages = Sink(err_read, STDERR_KEPT), Sink(verdict_read, MESSAGES_KEPT)
        sinks = [stdout, stderr, messages, ready, checker_ready]
        stopped = self._watch([served, checked], sinks, checked.reap, limits)
        result = _outcome(stopped, ready, checker_ready)
        if bytes(checker_ready.data) != READY:
            raise frames.FrameError(result["reason"])  # the stream may be anywhere: this worker is done
        served.kill()
        if result["status"] != "infrastructure":
            stopped_at = result["reason"] or f"the checker stopped (wait status {checked.status})"
            result |= checker.verdict(frames.split_frames(messages.data), result["status"], stopped_at)
        return result | {"stdout": stdout.text, "stderr": stderr.text, "cpu_seconds": served.cpu_seconds}

    # -- processes ----------------------------------------------------------------------------------------------

    def _spawn(
        self, run: Callable[[], int | None], descriptors: list[int], limits: Limits, prepare: Callable[[], None]
    ) -> tuple[Child, Sink]:
        """Call `prepare` and `run` in a confined process with `descriptors` as its 0, 1, 2 ...

        Returns the process, and a sink that holds `READY` once `prepare` is done, or else the reason why not.
        """
        ready_read, ready = self._pipe()
        uid = self.uids[len(self.children)] if self.found.own_uid else os.getuid()
        folder = f"{self.found.folder}/{len(self.children)}"
        if self.found.own_uid:
            os.chown(folder, uid, uid)
        pid = os.fork()
        if pid:
            self._close(ready)
            self.children.append(Child(pid))
            return self.children[-1], Sink(ready_read, 1000)
        code = 1
        try:
            ready = _become([*descriptors, ready])
            self.found.confine(limits, folder, uid)
            os.environ.update(HOME=folder, TMPDIR=folder)
            tempfile.tempdir = None
            random.seed(0)  # a verdict should be the same tomorrow
            gc.enable()
            prepare()
        except BaseException as error:
            os.write(ready, f"{type(error).__name__}: {error}".encode()[:1000])
            os._exit(1)
        try:
            os.write(ready, READY)
            os.close(ready)
            code = run() or 0
        finally:  # without running anything it inherited from the worker
            program.flush_streams()
            os._exit(code)

    def _watch(self, children: list[Child], sinks: list[Sink], finished: Callable[[], bool], limits: Limits) -> str:
        """Wait until `finished()`; returns "" then, else which limit was hit: "timeout" or "output".

        CPU time is counted for each child, wall time without that in which a child waited for a processor. Raises
        ParentGone when `control` was closed at its other end.
        """
        stopped = self._wait(children, sinks, finished, limits)
        if stopped:
            for child in children:
                child.kill()
        for sink in sinks:
            sink.drain()
        return stopped or ("output" if any(sink.overflow and sink.stop_at_limit for sink in sinks) else "")

    def _wait(self, children: list[Child], sinks: list[Sink], finished: Callable[[], bool], limits: Limits) -> str:
        start, starved, next_look = time.monotonic(), 0.0, time.monotonic() + LOOK_SECONDS
        poll = select.poll()
        poll.register(self.wakeup, select.POLLIN)
        poll.register(self.control, 0)  # only its hang-up: a message for the checker may be waiting there
        by_fd = {sink.fd: sink for sink in sinks}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while not finished():
            now = time.monotonic()
            passed = now - start
            if passed - starved >= limits.wall:
                starved = sum(child.starved_seconds(self.found.proc) for child in children)
            left = min(limits.wall - passed + starved, limits.wall * LONGEST_RUN - passed)
            left = min(left, *(limits.cpu_seconds - child.cpu_seconds for child in children))
            if left <= 0:
                return "timeout"
            if now >= next_look:
                if folders.holds_too_much(self.found.folder, limits.tmp_mb << 20):
                    return "output"
                next_look = now + max(LOOK_SECONDS, 3 * (time.monotonic() - now))
            for fd, _ in poll.poll(max(0.0, min(left, next_look - now)) * 1000 + 1):
                if fd == self.control:
                    raise ParentGone
                if fd == self.wakeup:
                    os.read(self.wakeup, 4096)
                    continue
                sink = by_fd[fd]
                sink.read()
                if not sink.open:
                    poll.unregister(fd)
                if sink.overflow and sink.stop_at_limit:
                    return "output"
        return ""

    # -- descriptors, given back by clean_up --------------------------------------------------------

    def _keep(self, fd: int) -> int:
        self.open.append(fd)
        return fd

    def _close(self, fd: int) -> None:
        self.open.remove(fd)
        os.close(fd)

    def _pipe(self, blocking: bool = False) -> tuple[int, int]:
        read, write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read, blocking)
        return self._keep(read), self._keep(write)

    def _nameless_file(self, text: str) -> int:
        fd = self._keep(os.memfd_create("stdin", os.MFD_CLOEXEC))
        frames.write_all(fd, text.encode("utf-8", "surrogatepass"))
        os.lseek(fd, 0, os.SEEK_SET)
        return fd


def _become(descriptors: list[int]) -> int:
    """In a new process: forget the runner's signals, make `descriptors` 0, 1, 2 ... and close all others."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST_HIGH_DESCRIPTOR) for fd in descriptors]):
        os.dup2(fd, number)
    os.closerange(len(descriptors), 1 << 16)
    return len(descriptors) - 1


def _outcome(stopped: str, *ready: Sink) -> dict[str, Any]:
    for sink in ready:
        # A checker whose tests do not compile may be done before the program's process has begun.
        not_yet = sink.open and not sink.data and not stopped
        if bytes(sink.data) != READY and not not_yet:
            return {"status": "infrastructure", "reason": f"sandbox: {sink.text or 'no process became ready in time'}"}
    return {"status": stopped or "ok", "reason": REASONS[stopped]}
