"""Temporary folders of programs: how much is in them, and emptying them, whatever a program has built there."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator

MAX_ENTRIES, MAX_DEPTH = 1000, 32
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def holds_too_much(folder: str, num_bytes: int) -> bool:
    """Whether there is more than `num_bytes` in a folder, or more than `MAX_ENTRIES` files and folders, or folders
    nested deeper than `MAX_DEPTH`. Stops at the first of these, so looking costs little however much is there."""
    total = 0.0
    for count, size in enumerate(_sizes(os.open(folder, _FOLDER), 0), start=1):
        total += size
        if total > num_bytes or count > MAX_ENTRIES:
            return True
    return False


def _sizes(fd: int, depth: int) -> Iterator[float]:
    """Bytes of each entry below an open folder, which is closed; infinite for folders nested too deep."""
    try:
        for entry in _entries(fd):
            try:
                yield entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    if depth == MAX_DEPTH:
                        yield math.inf
                    yield from _sizes(os.open(entry.name, _FOLDER, dir_fd=fd), depth + 1)
            except OSError:  # gone meanwhile, or closed even to the program
                continue
    finally:
        os.close(fd)


def _entries(fd: int) -> list[os.DirEntry[str]]:
    with os.scandir(fd) as entries:
        return list(itertools.islice(entries, MAX_ENTRIES + 1))


def empty(folder: str) -> None:
    """Delete everything below a folder in which no program is running any more.

    Folders are brought up to the top before they are emptied, so no depth is too deep, and each entry is touched twice.

    Raises:
        OSError: when something cannot be deleted.
    """
    top = os.open(folder, _FOLDER)
    try:
        while entries := _entries(top):
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    _empty_into(top, entry.name)
                    os.rmdir(entry.name, dir_fd=top)
                else:
                    os.unlink(entry.name, dir_fd=top)
    finally:
        os.close(top)


def _empty_into(top: int, name: str) -> None:
    os.chmod(name, 0o700, dir_fd=top)
    inner = os.open(name, _FOLDER, dir_fd=top)
    try:
        while entries := _entries(inner):
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.name, 0o700, dir_fd=inner)
                    os.rename(entry.name, os.urandom(8).hex(), src_dir_fd=inner, dst_dir_fd=top)
                else:
                    os.unlink(entry.name, dir_fd=inner)
    finally:
        os.close(inner)
