"""Length-prefixed JSON over pipes. Standard library only: this file also runs inside the sandbox."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from typing import Any

MAX_BYTES = 64 * 1024 * 1024
HEADER = struct.Struct("<I")


class FrameError(Exception):
    """The other side closed its end or sent what is no frame."""


def frame(message: Any) -> bytes:
    """One JSON value as bytes to send. Raises FrameError when it is too large."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_BYTES:
        raise FrameError(f"message of {len(body)} bytes, the limit is {MAX_BYTES}")
    return HEADER.pack(len(body)) + body


def write_all(fd: int, data: bytes) -> None:
    """Write everything. Raises OSError when the other side is gone."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def send_frame(fd: int, message: Any) -> None:
    """Write one JSON value. Raises FrameError when it is too large, OSError when the other side is gone."""
    write_all(fd, frame(message))


def receive_frame(fd: int) -> Any:
    """Read one JSON value. Raises FrameError at the end of the stream, or when it is no valid frame."""
    (length,) = HEADER.unpack(_read(fd, HEADER.size))
    if length > MAX_BYTES:
        raise FrameError(f"message of {length} bytes, the limit is {MAX_BYTES}")
    try:
        return json.loads(_read(fd, length))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"not JSON: {error}") from None


def split_frames(data: bytes | bytearray) -> Iterator[Any]:
    """The complete messages in `data`, from a sender that can be trusted."""
    position = 0
    while position + HEADER.size <= len(data):
        (length,) = HEADER.unpack_from(data, position)
        position += HEADER.size + length
        if position > len(data):
            return
        yield json.loads(data[position - length : position])


def _read(fd: int, size: int) -> bytes:
    chunks = []
    while size:
        chunk = os.read(fd, min(size, 1 << 20))
        if not chunk:
            raise FrameError("end of stream")
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)
