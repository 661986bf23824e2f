"""Values that cross between a program and its checker, as JSON. Standard library only: runs inside the sandbox.

Data crosses by value and arrives as exactly the builtin (or standard library) type it was, so a program cannot
hand over an object whose `==` lies. Everything else crosses as a handle: a number that stands for the object.

    1, "a", [1, [2]]      ->  the same JSON
    (1, 2)                ->  {"t": "tuple", "v": [1, 2]}
    {"a": 1}              ->  {"t": "dict", "v": [["a", 1]]}
    a program's object    ->  {"t": "handle", "v": 3}
"""

from __future__ import annotations

import base64
import collections
import datetime
import decimal
import fractions
import sys
from collections.abc import Callable, Iterable
from typing import Any

LARGEST_JSON_INTEGER = 2**63  # larger ones go as hexadecimal: no digit limit, no quadratic conversion
AS_IS = {str, float, bool, type(None)}
MUTABLE = (list, dict, set, bytearray, collections.deque)
DATA_BASES: tuple[Callable[[Any], Any], ...] = (int, float, str, bytes, list, tuple, dict, set, frozenset)
TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (int, float, complex, str, bytes, bool, list, tuple, dict, set, frozenset, object, type(None))
}


class TransferError(Exception):
    """A value that cannot cross, or a message that is no value."""


Other = Callable[[Any], Any]  # what to do with a value that is not data


def encode(value: Any, other: Other) -> Any:
    """`value` as JSON; `other(value)` gives the node of anything that is not data."""
    kind = type(value)
    if kind in AS_IS:
        return value
    if kind is int:
        small = -LARGEST_JSON_INTEGER < value < LARGEST_JSON_INTEGER
        return value if small else {"t": "int", "v": hex(value)}
    if kind is list:
        if set(map(type, value)) <= AS_IS:
            return list(value)
        return [encode(item, other) for item in value]
    if kind in _ENCODERS:
        return {"t": kind.__name__, "v": _ENCODERS[kind](value, other)}
    return _encode_unusual(value, kind, other)


def decode(node: Any, handle: Other) -> Any:
    """The value of a node; `handle(node)` gives the object of a tag that is not data.

    Raises:
        TransferError: when it is no node, whatever was sent.
    """
    kind = type(node)
    if kind in AS_IS or kind is int:
        return node
    if kind is list:
        return [decode(item, handle) for item in node]
    try:
        tag = node["t"]
        return _DECODERS[tag](node["v"], handle) if tag in _DECODERS else handle(node)
    except TransferError:
        raise
    except Exception as error:
        raise TransferError(f"not a value: {type(error).__name__}: {error}") from None


def restore(original: Any, changed: Any) -> None:
    """Make the mutable `original` equal to `changed` in place, keeping the identity of what it contains."""
    if isinstance(original, list):
        original[:] = [_merged(*pair) for pair in zip(original, changed, strict=False)] + changed[len(original) :]
    elif isinstance(original, dict):
        merged = {key: _merged(original.get(key), value) for key, value in changed.items()}
        original.clear()
        original.update(merged)
    elif isinstance(original, set):
        original.clear()
        original.update(changed)
    elif isinstance(original, bytearray):
        original[:] = changed
    elif isinstance(original, collections.deque):
        original.clear()
        original.extend(changed)


def _merged(old: Any, new: Any) -> Any:
    if type(old) is type(new) and isinstance(old, MUTABLE):
        restore(old, new)
        return old
    return new


def _encode_unusual(value: Any, kind: type, other: Other) -> Any:
    if isinstance(value, type) and TYPES.get(value.__name__) is value:
        return {"t": "type", "v": value.__name__}
    if type(value).__module__ == "numpy" and hasattr(value, "dtype") and value.dtype.kind in "biufcSU":
        if value.ndim == 0:
            return encode(value.item(), other)
        data = base64.b64encode(value.tobytes()).decode("ascii")
        return {"t": "ndarray", "v": [value.dtype.str, list(value.shape), data]}
    # A type the program made is an object with behaviour; any other subclass (numpy.float64, a str enum) is data.
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return {"t": "namedtuple", "v": [kind.__name__, list(kind._fields), [encode(v, other) for v in value]]}
    if kind.__module__ != "program":
        for base in DATA_BASES:
            if isinstance(value, base):  # type: ignore[arg-type]
                return encode(base(value), other)
    return other(value)


def _items(values: Iterable[Any], other: Other) -> list[Any]:
    return [encode(value, other) for value in values]


def _pairs(mapping: Any, other: Other) -> list[Any]:
    return [[encode(key, other), encode(value, other)] for key, value in dict.items(mapping)]


def _text(value: Any, other: Other) -> str:
    return str(value)


def _iso(value: Any, other: Other) -> str:
    return value.isoformat()


_ENCODERS: dict[type, Callable[[Any, Other], Any]] = {
    tuple: _items,
    set: _items,
    frozenset: _items,
    collections.deque: lambda value, other: [_items(value, other), value.maxlen],
    dict: _pairs,
    collections.OrderedDict: _pairs,
    collections.Counter: _pairs,
    collections.defaultdict: _pairs,
    bytes: lambda value, other: base64.b64encode(value).decode("ascii"),
    bytearray: lambda value, other: base64.b64encode(value).decode("ascii"),
    complex: lambda value, other: [value.real, value.imag],
    range: lambda value, other: _items((value.start, value.stop, value.step), other),
    slice: lambda value, other: _items((value.start, value.stop, value.step), other),
    type(...): lambda value, other: 0,
    decimal.Decimal: _text,
    fractions.Fraction: _text,
    datetime.datetime: _iso,
    datetime.date: _iso,
    datetime.time: _iso,
    datetime.timedelta: lambda value, other: [value.days, value.seconds, value.microseconds],
}


def _decode_pairs(node: Any, handle: Other) -> dict[Any, Any]:
    return {decode(key, handle): decode(value, handle) for key, value in node}


def _decode_items(node: Any, handle: Other) -> list[Any]:
    return [decode(item, handle) for item in node]


def _decode_namedtuple(node: Any, handle: Other) -> Any:
    name, fields, values = node
    return collections.namedtuple(name, fields)(*_decode_items(values, handle))


def _decode_array(node: Any, handle: Other) -> Any:
    import numpy

    dtype, shape, data = node
    if not isinstance(dtype, str) or numpy.dtype(dtype).kind not in "biufcSU":
        raise TransferError(f"array of {dtype}")
    if 0 in shape:
        raise TransferError("an empty array, which broadcasts to equal anything")
    return numpy.frombuffer(base64.b64decode(data), dtype=dtype).reshape(shape).copy()


_DECODERS: dict[str, Callable[[Any, Other], Any]] = {
    "int": lambda node, handle: int(node, 16),
    "tuple": lambda node, handle: tuple(_decode_items(node, handle)),
    "set": lambda node, handle: set(_decode_items(node, handle)),
    "frozenset": lambda node, handle: frozenset(_decode_items(node, handle)),
    "deque": lambda node, handle: collections.deque(_decode_items(node[0], handle), node[1]),
    "dict": _decode_pairs,
    "OrderedDict": lambda node, handle: collections.OrderedDict(_decode_pairs(node, handle)),
    "Counter": lambda node, handle: collections.Counter(_decode_pairs(node, handle)),
    "defaultdict": lambda node, handle: collections.defaultdict(None, _decode_pairs(node, handle)),
    "bytes": lambda node, handle: base64.b64decode(node),
    "bytearray": lambda node, handle: bytearray(base64.b64decode(node)),
    "complex": lambda node, handle: complex(float(node[0]), float(node[1])),
    "range": lambda node, handle: range(*_decode_items(node, handle)),
    "slice": lambda node, handle: slice(*_decode_items(node, handle)),
    "ellipsis": lambda node, handle: ...,
    "Decimal": lambda node, handle: decimal.Decimal(node),
    "Fraction": lambda node, handle: fractions.Fraction(node),
    "datetime": lambda node, handle: datetime.datetime.fromisoformat(node),
    "date": lambda node, handle: datetime.date.fromisoformat(node),
    "time": lambda node, handle: datetime.time.fromisoformat(node),
    "timedelta": lambda node, handle: datetime.timedelta(*node),
    "type": lambda node, handle: TYPES[node],
    "namedtuple": _decode_namedtuple,
    "ndarray": _decode_array,
}

assert {kind.__name__ for kind in _ENCODERS} <= _DECODERS.keys(), sys.modules[__name__]
