"""What is put around one program, in its own process, just before its code runs."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

from rewards.sandbox import landlock, linux, private_root, syscall_filter
from rewards.sandbox.records import Limits

# Each process of root's sandbox gets a user id that nobody else has, so nothing on the machine is its own.
FIRST_UID, NUM_UIDS = 1_900_000_000, 200_000_000
MAX_OPEN_FILES = 64


@dataclass
class Layers:
    """The protections in force for every program of one worker, which finds them out once.

    Attributes:
        readable: paths a program may read.
        private_root: the worker lives in namespaces of its own, with a read-only root folder.
        own_uid: each process gets its own user id (the worker is root).
        read_all: with its own user id a process keeps the right to read any file; only together with `landlock`
            and `seccomp`, where root's interpreter lies in a folder closed to others.
        landlock: files are limited by Landlock (where there is no private root).
        seccomp: system calls are filtered.
        num_tasks: tasks the user already has, which count against the limit on processes.
    """

    readable: list[str]
    private_root: bool = False
    own_uid: bool = False
    read_all: bool = False
    landlock: bool = False
    seccomp: bool = False
    num_tasks: int = 0

    @property
    def namespaces(self) -> int:
        """clone(2) flags for a program's process."""
        return linux.CLONE_NEWPID | linux.CLONE_NEWNS | linux.CLONE_NEWIPC if self.private_root else 0


def confine(layers: Layers, limits: Limits, folder: str, uid: int) -> None:
    """Lock this process up. On return it may run anything.

    Args:
        layers: what to apply.
        limits: resource limits.
        folder: the temporary folder, which becomes the working folder ("/tmp" with a private root).
        uid: the user id to take when `layers.own_uid`.

    Raises:
        OSError: when a layer that worked before does not now; the caller must not run the program.
    """
    if layers.private_root:
        private_root.mount_tmp(limits.tmp_mb, uid, uid)
    os.chdir(folder)
    _set_limits(limits, layers.num_tasks)
    if layers.own_uid:
        if layers.read_all:
            linux.prctl(linux.PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    linux.keep_capabilities(linux.CAP_DAC_READ_SEARCH if layers.read_all else 0)
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    # After the change of user, which would clear it: the program dies with its worker.
    linux.prctl(linux.PR_SET_PDEATHSIG, 9)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    if layers.landlock:
        landlock.restrict(layers.readable, [folder])
    if layers.seccomp:
        syscall_filter.install(syscall_filter.filter_program(os.getpid()))


def _set_limits(limits: Limits, num_tasks: int) -> None:
    cpu = int(limits.cpu_seconds) + 2  # a backstop in whole seconds: the worker watches the exact limit
    wanted = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (limits.memory_mb << 20,) * 2,
        resource.RLIMIT_FSIZE: (limits.tmp_mb << 20,) * 2,
        resource.RLIMIT_NOFILE: (MAX_OPEN_FILES,) * 2,
        resource.RLIMIT_NPROC: (num_tasks + limits.max_threads,) * 2,
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, (soft, hard) in wanted.items():
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))
