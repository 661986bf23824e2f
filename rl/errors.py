"""Errors as one line that names the option."""

from __future__ import annotations

import dis
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rewards.address import is_ours, is_plugin, place_in_plugin


def is_message(error: BaseException) -> bool:
    """Whether an error is a message for the user: our packages or a plugin wrote `raise ValueError(...)`.

    Such an error names the field and the fix. A ValueError of any other code is a bug, and needs its traceback; so is
    one that Python raises inside our code or a plugin's, such as the one of `int("a")`.
    """
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    if dis.opname[code.co_code[trace.tb_lasti]] not in ("RAISE_VARARGS", "RERAISE"):
        return False
    file = Path(code.co_filename).resolve()
    return is_plugin(file) or is_ours(file)


def reason_of(first: Mapping[str, Any]) -> str:
    """What an error of pydantic says, one of `ValidationError.errors()`; a validator's own words as they are."""
    return str(first["msg"]).removeprefix("Value error, ")


@contextmanager
def about(field: str) -> Iterator[None]:
    """Libraries answer a bad folder, file or description with errors of every kind and length.

    Raises:
        ValueError: one line that names the field, whatever was raised inside; our own ValueErrors as they are.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and is_message(error):
            raise
        text = " ".join(str(error).split()) or "no message"
        kind = "" if type(error) in (ValueError, OSError) else f"{type(error).__name__}: "
        place = place_in_plugin(error)
        told = f"{kind}{text[:300]}{'...' if len(text) > 300 else ''}{f' ({place})' if place else ''}"
        raise ValueError(f"{field}: {told}") from error


@contextmanager
def in_words(words: Mapping[str, str]) -> Iterator[None]:
    """Messages of the code inside speak of a caller's arguments: `words` is our name -> the caller's."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for ours, theirs in words.items():
            text = text.replace(ours, theirs)
        if text == str(error) or not is_message(error):
            raise
        raise ValueError(text) from None
