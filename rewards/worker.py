"""A reward process: reads calls from its socket, answers each one. Started by `rewards.pool`, never by hand."""

from __future__ import annotations

import ctypes
import glob
import importlib
import io
import json
import math
import os
import pickle
import resource
import socket
import sys
import threading
import time
from typing import Any

from rewards.call import Outcome, call_reward, one_line
from rewards.load import load_reward
from rewards.wire import HEADER, frame, outcome_to_json

OUTPUT_BYTES = 64 * 1024  # of prints shown per worker; a reward that prints a gigabyte costs nobody a disk
MAX_CHILDREN = 32  # left behind by a reward before its worker is replaced
PR_SET_CHILD_SUBREAPER = 36


def main(descriptor: int, memory_mb: int | None) -> None:
    """Serve until the socket closes or the parent is gone."""
    own_pid = os.getpid()
    channel = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    os.register_at_fork(after_in_child=channel.close)  # else a forked reward could answer twice
    _limit_process(memory_mb)
    _cap_output()
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    rewards: dict[int, Any] = {}
    imports = _Imports(channel, own_pid)
    while True:
        request = pickle.loads(_receive(channel))
        imports.told = "load" not in request
        answer = _load(rewards, *request["load"]) if "load" in request else _call(rewards, memory_mb, **request)
        imports.told = False
        if os.getpid() != own_pid:
            os._exit(0)  # a child the reward forked has returned from the reward as well
        channel.sendall(frame(json.dumps(answer).encode()))


class _Imports:
    """Tells the trainer when an import inside a call begins and ends: loading torch is not scoring.

    `importlib._bootstrap._find_and_load` is where the import statement and `import_module` meet, once a module is not
    loaded yet.
    """

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self.channel, self.pid = channel, pid
        self.told = False
        self.depth = 0
        self.find_and_load = importlib._bootstrap._find_and_load  # type: ignore[attr-defined]
        importlib._bootstrap._find_and_load = self  # type: ignore[attr-defined]

    def __call__(self, name: str, import_: Any) -> Any:
        outermost = self.told and not self.depth and os.getpid() == self.pid
        if not outermost or threading.current_thread() is not threading.main_thread():
            return self.find_and_load(name, import_)
        self.depth += 1
        soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
        start = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
        self.tell(True)
        try:
            return self.find_and_load(name, import_)
        finally:
            self.depth -= 1
            used = math.ceil(time.process_time() - start)
            _set_limit(resource.RLIMIT_CPU, soft if soft == resource.RLIM_INFINITY else soft + used)
            self.tell(False)

    def tell(self, begins: bool) -> None:
        self.channel.sendall(frame(json.dumps({"importing": begins}).encode()))


def _load(rewards: dict[int, Any], part: int, spec: str, params: dict[str, Any]) -> dict[str, Any]:
    try:
        rewards[part] = load_reward(spec, params)
    except ValueError as error:
        return {"loaded": part, "error": str(error)}
    except (Exception, SystemExit) as error:
        return {"loaded": part, "error": f"reward '{spec}' could not be loaded: {one_line(error)}"}
    return {"loaded": part, "error": None}


def _call(
    rewards: dict[int, Any], memory_mb: int | None, call: int, part: int, timeout_seconds: float, arguments: bytes
) -> dict[str, Any]:
    _limit_cpu(timeout_seconds)
    try:
        outcome = outcome_to_json(call_reward(rewards[part], *pickle.loads(arguments)))
    except (Exception, SystemExit) as error:  # columns that do not unpickle here, scores that are no numbers
        outcome = outcome_to_json(Outcome(error=one_line(error)))
    return {"call": call, "outcome": outcome, "replace": _is_worn(memory_mb)}


def _limit_process(memory_mb: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if memory_mb is not None:
        # DATA, not AS: torch and CUDA reserve address space that they never touch.
        _set_limit(resource.RLIMIT_DATA, memory_mb * 2**20)
    if sys.platform == "linux":
        # Daemons a reward leaves behind become our children, so that they can be counted.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _limit_cpu(timeout_seconds: float) -> None:
    """Let this call use CPU time for its wall limit on every allowed thread; the kernel kills what goes on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    _set_limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + (timeout_seconds + 1) * threads))


def _set_limit(kind: int, limit: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _is_worn(memory_mb: int | None) -> bool:
    """True when the reward has leaked so much that a fresh process should take over."""
    if sys.platform != "linux":
        return False
    children: list[str] = []
    for path in glob.glob("/proc/self/task/*/children"):
        with open(path) as file:
            children += file.read().split()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    return len(children) > MAX_CHILDREN or (memory_mb is not None and resident > 0.75 * memory_mb * 2**20)


class _CappedOutput(io.RawIOBase):
    """Shows the first `OUTPUT_BYTES` of what a reward prints on the trainer's stderr and drops the rest, saying so."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.left = OUTPUT_BYTES

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def write(self, data: Any) -> int:
        if self.left > 0:
            os.write(self.descriptor, bytes(data[: self.left]))
            self.left -= len(data)
            if self.left <= 0:
                os.write(self.descriptor, b"\n[reward process: further output dropped]\n")
        return len(data)


def _cap_output() -> None:
    shown = os.dup(2)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # also for C code and programs a reward starts
        os.dup2(null, descriptor)
    stream = io.TextIOWrapper(io.BufferedWriter(_CappedOutput(shown), 1), line_buffering=True, errors="replace")
    sys.stdout = sys.stderr = stream


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _receive(channel: socket.socket) -> bytes:
    header = _receive_exactly(channel, HEADER.size)
    return _receive_exactly(channel, HEADER.unpack(header)[0])


def _receive_exactly(channel: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = channel.recv(min(count - len(data), 2**20))
        if not piece:
            os._exit(0)  # the runner closed the socket
        data += piece
    return bytes(data)
