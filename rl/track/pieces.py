"""Texts of single tokens, as they stand inside a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

# Tokens of one character's bytes show nothing but the first, which shows the character. "" would mean masked.
NOTHING = "\u200b"
_BROKEN = "\ufffd"


class Pieces:
    """The text of a token with its space, without the marks of subwords: `Ġcat`, `▁cat` and `##s` are " cat" and "s".

    A tokenizer decodes a token alone as the start of a text, often without its space. So every token is decoded behind
    another one.
    """

    def __init__(self, tokenizer: Any):
        self.decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        self.before: list[int] = []
        self.known: dict[int, str] = {}
        for token in range(min(len(tokenizer), 1000)):
            text = self.decode([token])
            if text.isascii() and text.isalnum() and self.decode([token, token]).startswith(text):
                self.before = [token]
                break

    def text(self, token: int) -> str:
        """A token without text shows its id."""
        if token not in self.known:
            whole, start = self.decode([*self.before, token]), self.decode(self.before) if self.before else ""
            self.known[token] = whole[len(start) :] if whole.startswith(start) else self.decode([token])
        return self.known[token] or f"<{token}>"

    def texts(self, tokens: Sequence[int | None]) -> list[str]:
        """The text of every token, "" of None. The bytes of one character are put together where all are there."""
        shown = ["" if token is None else self.text(token) for token in tokens]
        for start, text in enumerate(shown):
            stop, last = start, min(len(tokens), start + 4)  # a character has at most 4 bytes
            while _BROKEN in text and stop < last and _BROKEN in shown[stop]:
                stop += 1
                whole = self.decode([*self.before, *(token for token in tokens[start:stop] if token is not None)])
                if _BROKEN not in whole:
                    shown[start:stop] = [whole[len(self.decode(self.before)) :], *[NOTHING] * (stop - start - 1)]
                    break
        return shown
