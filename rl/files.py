"""Files that are whole or absent: a reader never sees half of one, whenever the writer is stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, content: str | bytes | Callable[[Path], object]) -> Path:
    """Write a file in one step; an older one stays until the new one is complete.

    Args:
        content: text, bytes, or a function that writes the file at the path it is given.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            # A full disk does not say by itself which file did not fit.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write a value as indented JSON; see `write_whole`. Numbers of numpy and torch become floats."""
    return write_whole(path, json.dumps(value, indent=1, default=float) + "\n")
