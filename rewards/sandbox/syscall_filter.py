"""A seccomp filter: what no judged program needs is refused with EPERM.

Refused: new processes and programs, sockets (but pairs of stream sockets, which reach nobody else), anything done to
another process (signals, also by way of file owners, tracing, limits, priorities), mounting, namespaces, kernel keys
and modules, System V memory and memory files (both escape the memory limit), fallocate (it fills a disk at once),
clocks, and changing the mode, owner, times or attributes of files, which Landlock does not govern. Threads, files, and
signals to oneself stay allowed. A list of refusals rather than of permissions, so that a new libc or numpy does not
break verdicts.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import platform
import struct

from rewards.sandbox import linux

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000

LOAD, AND, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_SET, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
OFFSET_NUMBER, OFFSET_ARCHITECTURE, OFFSET_ARGUMENTS = 0, 4, 16  # in struct seccomp_data, little endian

# fcntl F_SETOWN, F_SETSIG, F_SETOWN_EX and ioctl FIOSETOWN, SIOCSPGRP: have the kernel signal another process.
SIGNAL_BY_FILE, SIGNAL_BY_SOCKET = (8, 10, 15), (0x8901, 0x8902)
SOCKET_TYPE_MASK, SOCK_STREAM = 0xF, 1
NAMELESS_FILE = 0x400000  # the bit of O_TMPFILE that is not O_DIRECTORY
GUARDED_OPTIONS = (linux.PR_SET_PDEATHSIG, linux.PR_SET_DUMPABLE, linux.PR_SET_SECCOMP)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


DENY = _op(RETURN, ERRNO | errno.EPERM)
PERMIT = _op(RETURN, ALLOW)


def _when(number: int, *then: bytes) -> bytes:
    """Run `then` (which must return) for one system call."""
    body = b"".join(then)
    return _op(JUMP_EQUAL, number, 0, len(body) // 8) + body


def _by_argument(number: int, position: int, values: tuple[int, ...], found: bytes, other: bytes) -> bytes:
    """Answer `found` when the low half of an argument is one of `values`, else `other`."""
    checks = [_op(JUMP_EQUAL, value, 0, 1) + found for value in values]
    return _when(number, _op(LOAD, OFFSET_ARGUMENTS + 8 * position), *checks, other)


@functools.lru_cache(maxsize=8)
def filter_program(own_pid: int, keep_files: bool, machine: str | None = None) -> bytes:
    """The filter as BPF instructions, for a process that may signal only `own_pid`.

    `keep_files` is for a disk whose size nothing limits: a file must stay where its size is seen, so removing one is
    answered with success and not done, and files without a name are refused. Raises OSError on other architectures.
    """
    machine = machine or platform.machine()
    numbers = linux.syscall_numbers(machine)
    if machine not in ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no system call numbers for {machine}")
    start = [
        _op(LOAD, OFFSET_ARCHITECTURE),
        _op(JUMP_EQUAL, ARCHITECTURES[machine], 1, 0),
        _op(RETURN, KILL),
        _op(LOAD, OFFSET_NUMBER),
    ]
    if machine == "x86_64":
        start.append(_op(JUMP_AT_LEAST, X32_BIT, 0, 1) + DENY)
    thread = _op(LOAD, OFFSET_ARGUMENTS) + _op(JUMP_SET, linux.CLONE_THREAD, 0, 1)
    conditional = {
        # libc answers ENOSYS for clone3 by using clone, whose flags a filter can read.
        "clone3": _when(numbers["clone3"], _op(RETURN, ERRNO | errno.ENOSYS)),
        "clone": _when(numbers["clone"], thread, PERMIT, DENY),
        "prctl": _by_argument(numbers["prctl"], 0, GUARDED_OPTIONS, DENY, PERMIT),
        "fcntl": _by_argument(numbers["fcntl"], 1, SIGNAL_BY_FILE, DENY, PERMIT),
        "ioctl": _by_argument(numbers["ioctl"], 1, SIGNAL_BY_SOCKET, DENY, PERMIT),
    }
    stream = (_op(LOAD, OFFSET_ARGUMENTS + 8), _op(AND, SOCKET_TYPE_MASK), _op(JUMP_EQUAL, SOCK_STREAM, 0, 1))
    conditional["socketpair"] = _when(numbers["socketpair"], *stream, PERMIT, DENY)
    for name, position in (("open", 1), ("openat", 2)):
        flags = (_op(LOAD, OFFSET_ARGUMENTS + 8 * position), _op(JUMP_SET, NAMELESS_FILE, 0, 1))
        nothing = _op(RETURN, ERRNO | errno.EOPNOTSUPP)
        conditional[name] = _when(numbers[name], *flags, nothing, PERMIT) if keep_files and name in numbers else b""
    conditional["openat2"] = _when(numbers["openat2"], _op(RETURN, ERRNO | errno.ENOSYS)) if keep_files else b""
    for name in ("unlink", "unlinkat", "rmdir"):
        conditional[name] = _when(numbers[name], _op(RETURN, ERRNO)) if keep_files and name in numbers else b""
    for name in ("kill", "tgkill"):
        conditional[name] = _by_argument(numbers[name], 0, (own_pid,), PERMIT, DENY)
    for name in ("prlimit64", "sched_setaffinity"):  # 0 is the calling process
        conditional[name] = _by_argument(numbers[name], 0, (0, own_pid), PERMIT, DENY)
    refused = [_when(number, DENY) for name, number in numbers.items() if name not in conditional]
    return b"".join([*start, *conditional.values(), *refused, PERMIT])


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def install(program: bytes) -> None:
    """Put the filter in force for this process, for good. Needs no_new_privs. Raises OSError."""
    linux.prctl(linux.PR_SET_SECCOMP, 2, ctypes.byref(_Program(len(program) // 8, program)))
