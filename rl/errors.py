"""Errors as one line that names the option."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_ours(error: BaseException) -> bool:
    """Whether one of our own packages raised the error; its message then names the field and the fix."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    home = Path(__file__).resolve().parents[1]
    ours = [home / package for package in ("rl", "rewards", "rollouts")]
    return bool(files) and any(Path(files[-1]).resolve().is_relative_to(folder) for folder in ours)


@contextmanager
def about(field: str) -> Iterator[None]:
    """Libraries answer a bad folder, file or description with errors of every kind and length.

    Raises:
        ValueError: one line that names the field, whatever was raised inside; our own ValueErrors as they are.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and is_ours(error):
            raise
        text = " ".join(str(error).split()) or "no message"
        kind = "" if type(error) in (ValueError, OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{field}: {kind}{text[:300]}{'...' if len(text) > 300 else ''}") from error
