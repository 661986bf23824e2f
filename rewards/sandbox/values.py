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
import functools
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
        return value if small else {"t": "int", "v": [hex(value)]}
    if kind is list:
        if set(map(type, value)) <= AS_IS:
            return list(value)
        return [encode(item, other) for item in value]
    if kind in _CODECS:
        return {"t": kind.__name__, "v": [encode(part, other) for part in _CODECS[kind][0](value)]}
    return _encode_unusual(value, kind, other)


def decode(node: Any, handle: Other) -> Any:
    """The value of a node; `handle(node)` gives that of a tag that is not data. Raises TransferError for nonsense."""
    kind = type(node)
    if kind in AS_IS or kind is int:
        return node
    if kind is list:
        return [decode(item, handle) for item in node]
    try:
        tag = node["t"]
        return _NAMED[tag](*[decode(part, handle) for part in node["v"]]) if tag in _NAMED else handle(node)
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
        return {"t": "type", "v": [value.__name__]}
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


def _base64(value: bytes) -> list[str]:
    return [base64.b64encode(value).decode("ascii")]


def _text(value: Any) -> list[str]:
    return [str(value)]


def _iso(value: Any) -> list[str]:
    return [value.isoformat()]


def _pairs(mapping: Any) -> list[Any]:
    return [[key, value] for key, value in dict.items(mapping)]


def _stream(kind: Callable[[Any], Any], content: Any, position: int) -> Any:
    stream = kind(content)
    stream.seek(position)
    return stream


# A type -> the parts of a value, which are values themselves, and what is made of them again.
_CODECS: dict[type, tuple[Callable[[Any], Iterable[Any]], Callable[..., Any]]] = {
    tuple: (list, lambda *parts: parts),
    set: (list, lambda *parts: set(parts)),
    frozenset: (list, lambda *parts: frozenset(parts)),
    collections.deque: (lambda value: (list(value), value.maxlen), collections.deque),
    dict: (_pairs, lambda *parts: dict(parts)),
    collections.OrderedDict: (_pairs, lambda *parts: collections.OrderedDict(parts)),
    collections.Counter: (_pairs, lambda *parts: collections.Counter(dict(parts))),
    collections.defaultdict: (_pairs, lambda *parts: collections.defaultdict(None, parts)),
    type({}.keys()): (list, lambda *parts: dict.fromkeys(parts).keys()),
    type({}.values()): (list, lambda *parts: dict(enumerate(parts)).values()),
    type({}.items()): (lambda value: map(list, value), lambda *parts: dict(parts).items()),
    bytes: (_base64, base64.b64decode),
    bytearray: (_base64, lambda text: bytearray(base64.b64decode(text))),
    complex: (lambda value: (value.real, value.imag), lambda real, imag: complex(float(real), float(imag))),
    range: (lambda value: (value.start, value.stop, value.step), range),
    slice: (lambda value: (value.start, value.stop, value.step), slice),
    type(...): (lambda value: (), lambda: ...),
    decimal.Decimal: (_text, decimal.Decimal),
    fractions.Fraction: (_text, fractions.Fraction),
    pathlib.PosixPath: (_text, pathlib.PosixPath),
    pathlib.PurePosixPath: (_text, pathlib.PurePosixPath),
    io.StringIO: (lambda value: (value.getvalue(), value.tell()), functools.partial(_stream, io.StringIO)),
    io.BytesIO: (lambda value: (value.getvalue(), value.tell()), functools.partial(_stream, io.BytesIO)),
    datetime.datetime: (_iso, datetime.datetime.fromisoformat),
    datetime.date: (_iso, datetime.date.fromisoformat),
    datetime.time: (_iso, datetime.time.fromisoformat),
    datetime.timedelta: (lambda value: (value.days, value.seconds, value.microseconds), datetime.timedelta),
}
_NAMED = {kind.__name__: make for kind, (_, make) in _CODECS.items()}


def _make_array(dtype: Any, shape: list[int], data: str) -> Any:
    numpy = load_numpy()
    if not isinstance(dtype, str) or numpy.dtype(dtype).kind not in ARRAY_KINDS:
        raise TransferError(f"array of {dtype}")
    return numpy.frombuffer(base64.b64decode(data), dtype=dtype).reshape(shape).copy()


_NAMED |= {
    "int": lambda text: int(text, 16),
    "type": lambda name: TYPES[name],
    "namedtuple": lambda name, fields, parts: collections.namedtuple(name, fields)(*parts),
    "ndarray": _make_array,
}
