"""Sent to a remote sandbox as the program to run: separates the real program from its checker there.

This process becomes the checker. It forks the program's process before it reads anything, so neither the tests nor
the secret are ever in the program's memory; then it forbids other processes of the same user to look into it.
"""

import json
import os
import resource
import sys
import tempfile
import types


def load(task):
    cpu = int(task["cpu_seconds"])
    resource.setrlimit(resource.RLIMIT_CPU, (cpu + 1, cpu + 2))
    for package in ("rewards", "rewards.sandbox"):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    for name, source in task["modules"].items():
        module = types.ModuleType("rewards.sandbox." + name)
        sys.modules[module.__name__] = module
        exec(compile(source, name + ".py", "exec"), module.__dict__)


def be_program(requests, replies, source):
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    with os.fdopen(source) as pipe:
        task = json.load(pipe)
    load(task)
    sys.modules["rewards.sandbox.program"].serve_program(task["code"], requests, replies)


def be_checker(requests, replies, source):
    try:
        import ctypes

        ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE: no ptrace, no /proc/<pid>/mem, no /proc/<pid>/fd
    except (OSError, AttributeError):
        pass
    task = json.load(sys.stdin)
    with os.fdopen(source, "w") as pipe:
        json.dump({key: task[key] for key in ("modules", "code", "cpu_seconds")}, pipe)
    load(task)
    frames = sys.modules["rewards.sandbox.frames"]
    verdict = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with tempfile.TemporaryFile() as file:
        sys.modules["rewards.sandbox.checker"].check(task["spec"], requests, replies, file.fileno())
        file.seek(0)
        messages = list(frames.split_frames(file.read()))
    frames.write_all(verdict, ("\n" + task["secret"] + json.dumps(messages) + "\n").encode())


to_program, to_checker, source = os.pipe(), os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    for end in (to_program[1], to_checker[0], source[1]):
        os.close(end)
    try:
        be_program(to_program[0], to_checker[1], source[0])
    finally:
        os._exit(0)
for end in (to_program[0], to_checker[1], source[0]):
    os.close(end)
try:
    be_checker(to_program[1], to_checker[0], source[1])
finally:
    os.kill(child, 9)
