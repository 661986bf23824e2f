"""Whether a program's output is the expected one."""

from __future__ import annotations

import math


def outputs_match(actual: str, expected: str, float_tolerance: float | None = None) -> bool:
    """Compare line by line, word by word; blank lines at both ends and the amount of white space do not count.

    Example: `outputs_match("1  2 \n", "1 2")` is True, `outputs_match("1\n2", "1 2")` is False.

    With `float_tolerance` two words that are finite numbers match if they differ by at most this, absolutely or
    relative to the expected one; otherwise words must be the same text.
    """
    left = [line.split() for line in actual.strip().splitlines()]
    right = [line.split() for line in expected.strip().splitlines()]
    if left == right:
        return True
    if float_tolerance is None or [len(words) for words in left] != [len(words) for words in right]:
        return False
    pairs = zip((w for line in left for w in line), (w for line in right for w in line), strict=True)
    return all(one == other or _close(one, other, float_tolerance) for one, other in pairs)


def _close(actual: str, expected: str, tolerance: float) -> bool:
    try:
        one, other = float(actual), float(expected)
    except ValueError:
        return False
    if not (math.isfinite(one) and math.isfinite(other)):
        return False
    return abs(one - other) <= tolerance * max(1.0, abs(other))
