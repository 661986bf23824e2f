"""Text files, read in one way; files that are whole or absent, whenever their writer is stopped."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

# Only a folder that has one of these files, and none of another ending than a model's, is replaced by another model.
_MODEL = ("config.json", "model_index.json", "*.safetensors")
_OF_MODELS = {".safetensors", ".json", ".md", ".txt", ".model", ".jinja", ".yaml", ".bin", ".pt"}


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


def write_folder(path: str | Path, make: Callable[[Path], object]) -> Path:
    """Write a folder in one step: `make` fills one beside it, which then takes the place of an older one.

    A writer that is stopped leaves `path` as it was, and the unfinished one as `path`.partial.

    Raises:
        ValueError: `path` is a file, or a folder that holds other things than a model, which would be lost.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file: name a folder for the model")
    files = [found for found in path.rglob("*") if found.is_file()]
    is_model = any(any(path.glob(name)) for name in _MODEL)
    other = next((found for found in files if not is_model or found.suffix not in _OF_MODELS), None)
    if other is not None:
        raise ValueError(f"{path} holds {other.relative_to(path)}, which a model would replace: name a new folder")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
    return path


def read_text(path: str | Path, what: str) -> str:
    """A UTF-8 text file without its byte-order mark, unpacked where its name ends in `.gz`.

    Args:
        what: what the file is, for messages: `data file`, `config file`.

    Raises:
        ValueError: one line: there is no such file, it cannot be read, or it is not UTF-8 (with its line).
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{what} {path} {'is a folder' if file.is_dir() else 'does not exist'}")
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if file.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{what} {path} cannot be read: {error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x}): save the file as UTF-8") from None


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What libraries raise inside for a full disk names neither the file nor the disk.

    Raises:
        OSError: with the path, for one without, and for the other errors that torch and safetensors have.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            if error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(path)) from error
        text = " ".join(str(error).split())
        if (
            type(error).__name__ != "SafetensorError"
            and "PytorchStreamWriter" not in text
            and "unexpected pos" not in text
        ):
            raise
        raise OSError(errno.EIO, f"cannot be written, is the disk full? ({text[:200]})", str(path)) from error


def lock_file(path: Path) -> IO[str]:
    """Open a file for appending, for this process alone until it is closed or the process ends, however it ends.

    Raises:
        ValueError: another process has it.
    """
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path.parent} is being written by another process") from None
    except OSError:
        # Some network file systems have no locks.
        pass
    return file


def write_json(path: str | Path, value: Any) -> Path:
    """Write a value as indented JSON; see `write_whole`. Numbers of numpy and torch become floats."""
    return write_whole(path, json.dumps(value, indent=1, default=float) + "\n")
