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
import builtins
import collections
import datetime
import decimal
import enum
import fractions
import io
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

LARGEST_JSON_INTEGER = 2**63  # larger ones go as hexadecimal: no digit limit, no quadratic conversion
AS_IS = {str, float, bool, type(None)}
MUTABLE = (list, dict, set, bytearray, collections.deque, io.StringIO, io.BytesIO)
DATA_BASES: tuple[Callable[[Any], Any], ...] = (int, float, str, bytes, list, tuple, dict, set, frozenset)
TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (int, float, complex, str, bytes, bool, list, tuple, dict, set, frozenset, object, type(None))
}
TYPES |= {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)}
ARRAY_KINDS = "biufcSUmM"


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


def is_mutable(value: Any) -> bool:
    """Whether a call can change a value that crosses as data."""
    return isinstance(value, MUTABLE) or (_is_array(value) and value.ndim > 0)


def restore(original: Any, changed: Any) -> None:
    """Make the mutable `original` equal to `changed` in place, keeping the identity of what it contains."""
    if isinstance(original, list):
        original[:] = [merged(*pair) for pair in zip(original, changed, strict=False)] + changed[len(original) :]
    elif isinstance(original, dict):
        entries = {key: merged(original.get(key), value) for key, value in changed.items()}
        original.clear()
        original.update(entries)
    elif isinstance(original, set):
        original.clear()
        original.update(changed)
    elif isinstance(original, bytearray):
        original[:] = changed
    elif isinstance(original, collections.deque):
        original.clear()
        original.extend(changed)
    elif isinstance(original, io.StringIO | io.BytesIO):
        original.seek(0)
        original.truncate()
        original.write(changed.getvalue())
        original.seek(changed.tell())
    elif _is_array(original) and original.shape == changed.shape:
        original[...] = changed


def merged(old: Any, new: Any) -> Any:
    """`new`, or `old` made equal to it where both are mutable and of one type."""
    if type(old) is type(new) and isinstance(old, MUTABLE):
        restore(old, new)
        return old
    return new


def _encode_unusual(value: Any, kind: type, other: Other) -> Any:
    if isinstance(value, type) and TYPES.get(value.__name__) is value:
        return {"t": "type", "v": value.__name__}
    if _is_array(value) and value.dtype.kind in ARRAY_KINDS:
        if value.ndim == 0 and value.dtype.kind not in "mM":
            return encode(value.item(), other)
        data = base64.b64encode(value.tobytes()).decode("ascii")
        return {"t": "ndarray", "v": [value.dtype.str, list(value.shape), data]}
    if isinstance(value, enum.Enum) and kind.__module__ == "tests":  # both sides have the class
        return other(value)
    # A type the program made is an object with behaviour; any other subclass (numpy.float64, a str enum) is data.
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return {"t": "namedtuple", "v": [kind.__name__, list(kind._fields), [encode(v, other) for v in value]]}
    if kind.__module__ != "program":
        for base in DATA_BASES:
            if isinstance(value, base):  # type: ignore[arg-type]
                return encode(base(value), other)
    return other(value)


def describe_error(error: BaseException, other: Other) -> list[Any]:
    """An exception as JSON: names of its classes, arguments, attributes, text."""
    try:
        args = [encode(arg, other) for arg in error.args]
        state = [[name, encode(value, other)] for name, value in vars(error).items() if not name.startswith("_")]
        if error.__cause__ is not None:
            state.append(["__cause__", encode(error.__cause__, other)])
        text = str(error)
    except Exception:
        args, state, text = [], [], "an exception that cannot be shown"
    return [[base.__name__ for base in type(error).__mro__[:-1]], args, state, text]


def build_error(kind: type[Exception], args: list[Any], state: list[Any], text: str, handle: Other) -> Exception:
    """An exception of class `kind` with these arguments and attributes; a RuntimeError where these do not fit it."""
    values = tuple(decode(arg, handle) for arg in args)
    try:
        error = kind(*values)
    except Exception:
        try:
            error = kind.__new__(kind)
            error.args = values
        except Exception:
            error = RuntimeError(text)
    for name, node in state:
        value = decode(node, handle)
        if name == "__cause__" and isinstance(value, BaseException):
            error.__cause__ = value
        elif not name.startswith("_") and not hasattr(type(error), name):
            setattr(error, name, value)
    return error


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray | numpy.generic)


def load_numpy() -> Any:
    """The module that arrays are made with; the checker puts a guarded one here."""
    import numpy

    return numpy


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
    type({}.keys()): _items,
    type({}.values()): _items,
    type({}.items()): _items,
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
    pathlib.PosixPath: _text,
    pathlib.PurePosixPath: _text,
    io.StringIO: lambda value, other: [value.getvalue(), value.tell()],
    io.BytesIO: lambda value, other: [base64.b64encode(value.getvalue()).decode("ascii"), value.tell()],
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
    numpy = load_numpy()
    dtype, shape, data = node
    if not isinstance(dtype, str) or numpy.dtype(dtype).kind not in ARRAY_KINDS:
        raise TransferError(f"array of {dtype}")
    return numpy.frombuffer(base64.b64decode(data), dtype=dtype).reshape(shape).copy()


def _decode_stream(kind: Callable[[Any], Any], node: Any, content: Any) -> Any:
    stream = kind(content)
    stream.seek(node[1])
    return stream


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
    "dict_keys": lambda node, handle: dict.fromkeys(_decode_items(node, handle)).keys(),
    "dict_values": lambda node, handle: dict(enumerate(_decode_items(node, handle))).values(),
    "dict_items": lambda node, handle: dict(_decode_items(node, handle)).items(),
    "PosixPath": lambda node, handle: pathlib.PosixPath(node),
    "PurePosixPath": lambda node, handle: pathlib.PurePosixPath(node),
    "StringIO": lambda node, handle: _decode_stream(io.StringIO, node, node[0]),
    "BytesIO": lambda node, handle: _decode_stream(io.BytesIO, node, base64.b64decode(node[0])),
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
