"""Temporary folders of programs: how much is in them, and emptying them, whatever a program has built there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

MAX_FILES, MAX_FOLDERS, MAX_DEPTH = 1000, 100, 32  # removing a folder can take a disk milliseconds
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def holds_too_much(folder: str, num_bytes: int) -> bool:
    """Whether a folder holds more than `num_bytes`, `MAX_FILES` files or `MAX_FOLDERS` folders, or folders nested
    deeper than `MAX_DEPTH`. Stops at the first of these, so looking costs little however much is there."""
    total, num_files, num_folders = 0, 0, 0
    for size, is_folder, depth in _contents(os.open(folder, _FOLDER), 1):
        total, num_files, num_folders = total + size, num_files + (not is_folder), num_folders + is_folder
        if total > num_bytes or num_files > MAX_FILES or num_folders > MAX_FOLDERS or depth > MAX_DEPTH:
            return True
    return False


def _contents(fd: int, depth: int) -> Iterator[tuple[int, bool, int]]:
    """Bytes, whether it is a folder, and depth of each entry below an open folder, which is closed."""
    try:
        for entry in _entries(fd):
            try:
                is_folder = entry.is_dir(follow_symlinks=False)
                yield entry.stat(follow_symlinks=False).st_blocks * 512, is_folder, depth
                if is_folder:
                    yield from _contents(os.open(entry.name, _FOLDER, dir_fd=fd), depth + 1)
            except OSError:  # gone meanwhile, or closed even to the program
                continue
    finally:
        os.close(fd)


def _entries(fd: int) -> list[os.DirEntry[str]]:
    with os.scandir(fd) as entries:
        return list(itertools.islice(entries, MAX_FILES + 1))


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
