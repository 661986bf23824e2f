"""Landlock: limit the files a process can reach, without any privilege (Linux 5.13).

Used where no private root folder can be built, which is the case in most containers.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from rewards.sandbox import linux

EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
# Access rights known to each version of the interface: 13 in the first, refer, truncate, device ioctl later.
NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
RULE_PATH_BENEATH = 1
SCOPES = 3  # abstract unix sockets and signals to processes outside, from version 6


def version() -> int:
    """Version of the interface. Raises OSError where the kernel has none."""
    return linux.syscall("landlock_create_ruleset", None, 0, 1)


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Confine this process and its future children to reading `readable` and doing anything below `writable`.

    Raises:
        OSError: where the kernel cannot; nothing is in force then.
    """
    found = version()
    rights = (1 << NUM_RIGHTS.get(found, 16)) - 1
    words = [rights, 0, SCOPES] if found >= 6 else [rights]
    attributes = (ctypes.c_uint64 * len(words))(*words)
    ruleset = linux.syscall("landlock_create_ruleset", attributes, ctypes.sizeof(attributes), 0)
    try:
        for path in readable:
            _allow(ruleset, path, READ_FILE | READ_DIR | EXECUTE)
        for path in writable:
            _allow(ruleset, path, rights)
        linux.syscall("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):  # out of reach with or without a rule
        return
    try:
        file_rights = EXECUTE | 1 << 1 | READ_FILE | 1 << 14 | 1 << 15
        if not os.path.isdir(path):
            access &= file_rights
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access, fd))
        linux.syscall("landlock_add_rule", ruleset, RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)
