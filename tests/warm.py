"""Commands of this tree in processes of their own, forked from one that has imported torch and DeepSpeed already.

A new Python spends 3 CPU seconds on those imports, longer than most runs of the tests take. The process that is forked
never trains anything itself: it holds no threads, no process group and no random state that a child could inherit.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = ["deepspeed", "transformers", "rl.cli", "rl.train.loop", "rl.models.load", "tests.warm", "tests.many_runs"]
_CONTEXT.set_forkserver_preload(_IMPORTED)


def run(
    words: Sequence[str], cwd: Path, timeout: float, environments: Sequence[Mapping[str, str]]
) -> list[tuple[int, str, str]]:
    """`python words...` once for every environment, all at the same time.

    Args:
        words: `-m module arguments...`, whose `main(arguments)` is called, or `script arguments...`.

    Returns:
        exit code (negative: the signal), stdout and stderr of each.

    Raises:
        AssertionError: one of them hangs; it is killed with all its children.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f"out{i}", Path(folder) / f"err{i}") for i in range(len(environments))]
        started = []
        for environment, said in zip(environments, files, strict=True):
            process = _CONTEXT.Process(target=_child, args=(list(words), str(cwd), dict(environment), *said))
            _start(process, environment["PYTHONPATH"])
            started.append(process)
        end = time.monotonic() + timeout
        for process in started:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [process for process in started if process.exitcode is None]
        for process in hanging:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        texts = [tuple(path.read_text(errors="replace") if path.exists() else "" for path in said) for said in files]
        assert not hanging, f"hangs: {' '.join(words)}\n{texts}"
        return [(process.exitcode or 0, *said) for process, said in zip(started, texts, strict=True)]


def _start(process: multiprocessing.process.BaseProcess, path: str) -> None:
    """The first start also starts the process that is forked, which must find this tree.

    A child would import the caller's main module again, whatever that is: it is shown an empty one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
        forkserver.ensure_running()
        process.start()


def _child(words: list[str], cwd: str, environment: dict[str, str], out: Path, err: Path) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if words[0] == "-m":
        sys.path.insert(0, cwd)
        sys.argv = words[1:]
        sys.exit(importlib.import_module(words[1]).main(words[2:]))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
