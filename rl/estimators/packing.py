"""Which documents share a row, and which of them one copy of their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """Some tokens of a document, in a row.

    Attributes:
        document: its index; tokens: which of its tokens.
        row, begin, end: the columns [begin, end) of this row hold them.
        number: 0, 1, ... within the row.
        context: number of the part with the shared prompt that they see as well, their own without one.
    """

    document: int
    tokens: slice
    row: int
    begin: int
    end: int
    number: int
    context: int


def placed(
    tokens: Sequence[np.ndarray], heads: Sequence[int] | None, pack_to: int | None
) -> tuple[list[Part], np.ndarray, list[np.ndarray]]:
    """Give documents their places. Example: the first bundle of `bundled` takes the columns 0 to 7 of a row.

        columns   0 1  2 3 4  5 6 7
        document  0 0  0 0 0  1 1 1
        number    0 0  1 1 1  2 2 2
        context   0 0  0 0 0  0 0 0

    Args:
        tokens, heads: see `bundled`; heads None shares nothing.
        pack_to: tokens of a row; None gives every document a row of its own.

    Returns:
        the parts; int64, the row of every document; int64 for every document, the columns of its tokens.
    """
    if pack_to is None or heads is None:
        bundles = [[index] for index in range(len(tokens))]
    else:
        bundles = bundled(tokens, heads, pack_to)
    # A prompt that one document alone has stays a part of it.
    shared = [heads[bundle[0]] if heads is not None and len(bundle) > 1 else 0 for bundle in bundles]
    lengths = [
        head + sum(len(tokens[index]) - head for index in bundle) for bundle, head in zip(bundles, shared, strict=True)
    ]
    row_of_bundle, offset = np.arange(len(bundles)), np.zeros(len(bundles), dtype=np.int64)
    if pack_to is not None:
        row_of_bundle, offset = first_fit(lengths, pack_to)
    parts: list[Part] = []
    rows, columns = np.zeros(len(tokens), dtype=np.int64), [np.zeros(0, dtype=np.int64)] * len(tokens)
    used = np.zeros(len(bundles), dtype=np.int64)
    for which in np.argsort(offset, kind="stable"):
        bundle, head, row, begin = bundles[which], shared[which], int(row_of_bundle[which]), int(offset[which])
        number, context = int(used[row]), int(used[row])
        if head:
            parts.append(Part(bundle[0], slice(head), row, begin, begin + head, number, context))
            number += 1
        end = begin + head
        for index in bundle:
            start, end = end, end + len(tokens[index]) - head
            parts.append(Part(index, slice(head, None), row, start, end, number, context if head else number))
            rows[index], columns[index] = row, np.append(np.arange(begin, begin + head), np.arange(start, end))
            number += 1
        used[row] = number
    return parts, rows, columns


def bundled(clean: Sequence[np.ndarray], heads: Sequence[int], capacity: int) -> list[list[int]]:
    """Documents that begin with the same prompt, together: one copy of the prompt serves them all.

    Example, three documents of 5 tokens whose first 2 are equal, and a capacity of 8: [[0, 1], [2]]. The first two take
    2 + 3 + 3 tokens, which leaves no room for the third.

    Args:
        clean: int64, the tokens of each document.
        heads: how many tokens of each see nothing behind them; 0 where none can be shared.
        capacity: of a row, in tokens.

    Returns:
        the documents of each bundle, as indices.
    """
    bundles: list[list[int]] = []
    used: list[int] = []
    latest: dict[bytes, int] = {}
    for index, (tokens, head) in enumerate(zip(clean, heads, strict=True)):
        prompt, own = tokens[:head].tobytes(), len(tokens) - head
        place = latest.get(prompt) if head else None
        if place is None or used[place] + own > capacity:
            place = latest[prompt] = len(bundles)
            bundles.append([])
            used.append(head)
        bundles[place].append(index)
        used[place] += own
    return bundles


def first_fit(lengths: Sequence[int], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Place documents into rows: the longest first, each into the first row that has room.

    Returns:
        int64 row and offset of every document. One longer than the capacity has a row of its own.
    """
    row, offset = np.zeros((2, len(lengths)), dtype=np.int64)
    used = np.zeros(0, dtype=np.int64)
    for index in np.argsort(-np.asarray(lengths), kind="stable"):
        fits = np.flatnonzero(used + lengths[index] <= capacity)
        if not len(fits):
            fits = np.array([len(used)])
            used = np.append(used, 0)
        row[index], offset[index] = fits[0], used[fits[0]]
        used[fits[0]] += lengths[index]
    return row, offset
