"""The worker process: warm, small and single-threaded. It reads nothing; each request is served by a fork of it.

Started by `pool` as a fresh interpreter with requests on descriptor 0 and answers on descriptor 1 (see `frames`).
Its first message says which protections it has. Programs never see these descriptors.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import shutil
import sys
from typing import NoReturn

from rewards.sandbox import frames, linux
from rewards.sandbox.isolation import Protection, protect
from rewards.sandbox.runner import ParentGone, Runner

# Imported once here, so that programs find them loaded; anything else they import for themselves.
PRELOAD = "abc array base64 bisect calendar cmath collections copy csv dataclasses datetime decimal enum fractions"
PRELOAD += " functools hashlib heapq inspect itertools json math numbers operator queue random re statistics string"
PRELOAD += " struct textwrap time typing types unicodedata zlib"


def main() -> None:
    """Entry point; the only argument is a JSON object with `isolation` (see `protect`)."""
    isolation = json.loads(sys.argv[1])["isolation"]
    control, replies = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1):
        os.dup2(null, number)
    for name in PRELOAD.split():
        importlib.import_module(name)
    try:
        found = protect(isolation)
    except OSError as error:
        frames.send_frame(replies, {"error": str(error)})
        return
    gc.collect()
    gc.freeze()  # forked processes share these pages until they write to them
    gc.disable()
    try:
        frames.send_frame(replies, {"layers": found.names, "missing": found.missing})
        while select.select([control], [], []):
            pid = os.fork()
            if pid == 0:
                _serve_one(found, control, replies)
            if os.waitpid(pid, 0)[1] != 0:
                return
    finally:
        if isolation != "bubblewrap":
            shutil.rmtree(found.folder, ignore_errors=True)


def _serve_one(found: Protection, control: int, replies: int) -> NoReturn:
    """In a fork: answer one request; exit code 0 means that the worker may go on."""
    code = 1
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, 9)
        runner = Runner(found, control)
        try:
            frames.send_frame(replies, runner.answer(frames.receive_frame(control)))
            code = 0
        except (frames.FrameError, ParentGone):
            runner.clean_up()
    finally:
        os._exit(code)
