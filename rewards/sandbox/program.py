"""The side of the program: runs inside the sandbox, in the same process as code nobody trusts.

Nothing here decides anything. Under tests it executes the calls the checker asks for and sends back what they
returned; a program that takes over this process can only change its own answers. Standard library only.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import copy
import importlib
import io
import operator
import sys
import threading
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from rewards.sandbox.frames import FrameError, receive_frame, send_frame
from rewards.sandbox.instances import Instances
from rewards.sandbox.values import build_error, decode, describe_error, is_mutable

# Modules whose functions the tests may use under their own name when only the program imported them.
_SHARED = """math cmath collections itertools functools re heapq bisect string typing copy datetime decimal fractions
statistics random operator json"""
SHARED_MODULES = tuple(_SHARED.split())

# What a checker may do to an object of the program besides calling it: functions of `operator`, and a few more.
_OPERATORS = """eq ne lt le gt ge add sub mul truediv floordiv mod pow matmul xor and_ or_ index getitem setitem
delitem"""
OPERATIONS: dict[str, Callable[..., Any]] = {name.strip("_"): getattr(operator, name) for name in _OPERATORS.split()}
OPERATIONS |= {"bool": bool, "len": len, "str": str, "repr": repr}
OPERATIONS |= {"int": int, "float": float, "iter": iter, "next": next, "getattr": getattr, "setattr": setattr}
OPERATIONS |= {"isinstance": isinstance, "copy": copy.copy, "deepcopy": copy.deepcopy}
OPERATIONS |= {"seed": lambda module, *args: importlib.import_module(module).seed(*args)}
OPERATIONS |= {"enter": lambda value: value.__enter__(), "exit": lambda value: value.__exit__(None, None, None)}


def run_script(code: str) -> int:
    """Run `code` as `__main__` on this process's standard streams; returns the exit code."""
    sys.argv = ["main.py"]
    module = _fresh_module("__main__")
    status = 1
    try:  # like the interpreter does: traceback and exit code included
        exec(compile(code, "main.py", "exec", dont_inherit=True, optimize=0), module.__dict__)
        status = 0
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            status = (stop.code or 0) & 0xFF
        else:
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    for finish in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        try:
            finish()
        except BaseException:
            traceback.print_exc()
            status = status or 1
    return status


def attach_streams() -> None:
    """Give the interpreter new text streams on descriptors 0, 1 and 2, as at start-up."""
    modes = (("stdin", "r", "strict"), ("stdout", "w", "strict"), ("stderr", "w", "backslashreplace"))
    for number, (name, mode, errors) in enumerate(modes):
        stream = open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def flush_streams() -> None:
    """Write out what is buffered; a closed stream is no error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def serve_program(code: str, requests: int, replies: int) -> None:
    """When the checker says so run `code`, as a module named "program", then answer its requests until it hangs up."""
    Server(requests, replies).run(code)


def _fresh_module(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module


class Server:
    """Answers one checker."""

    def __init__(self, requests: int, replies: int) -> None:
        self.requests, self.replies = requests, replies
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.module = _fresh_module("program")
        self.shared: set[str] = set()  # names of classes that the task defines on both sides
        self.instances = Instances(-1, self._class)

    def run(self, code: str) -> None:
        with contextlib.suppress(FrameError, OSError):
            # ["run", names]: the checker has its tests and is watching.
            self.shared.update(receive_frame(self.requests)[1])
            self._answer(self._execute, code)
            while True:
                self._serve(receive_frame(self.requests))

    # -- what the checker may ask -------------------------------------------------------------------------------

    def _serve(self, request: Any) -> None:
        kind, *arguments = request
        self._answer(getattr(self, f"_{kind}"), *arguments)

    def _answer(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            reply = function(*arguments)
        except StopIteration as stop:
            reply = ["stop", str(stop.value)]
        except Exception as error:
            reply = ["raise", self._pack(error)]
        except BaseException as error:
            reply = ["exit", type(error).__name__]
        send_frame(self.replies, reply)

    def _execute(self, code: str) -> list[Any]:
        exec(compile(code, "program.py", "exec", dont_inherit=True, optimize=0), self.module.__dict__)
        return ["ok", sorted(name for name in self.module.__dict__ if isinstance(name, str))]

    def _define(self, names: list[str], sources: list[str]) -> list[Any]:
        """Take over classes of the tests, as if they had been defined after the program."""
        for source in sources:
            with contextlib.suppress(Exception):  # an import that only the tests need
                exec(source, self.module.__dict__)
        self.shared.update(names)
        return ["ok", all(isinstance(self.module.__dict__.get(name), type) for name in names)]

    def _global(self, name: str) -> list[Any]:
        value = self.module.__dict__[name]
        if isinstance(value, ModuleType):
            return ["ok", {"t": "module", "v": value.__name__}]
        if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == "program":
            return [
                "ok",
                {"t": "exception", "v": [base.__name__ for base in value.__mro__[:-1]], "h": self._handle(value)["v"]},
            ]
        for module in SHARED_MODULES:
            if module in sys.modules and getattr(sys.modules[module], name, self) is value:
                return ["ok", {"t": "shared", "v": module}]
        return ["ok", self._pack(value)]

    def _call(
        self, target: Any, nodes: list[Any], names: list[str], stdin: str | None, capture: bool, patched: dict[str, Any]
    ) -> list[Any]:
        """Call `target`; the last of the arguments `nodes` have `names`."""
        function = self._unpack(target)
        arrived: dict[int, Any] = {}
        self.instances.arrived = arrived
        values = [self._unpack(node) for node in nodes]
        at = len(values) - len(names)
        named = dict(zip(names, values[at:], strict=True))
        streams, builtin = (sys.stdin, sys.stdout), {name: getattr(builtins, name) for name in patched}
        written = io.StringIO()
        try:
            if stdin is not None:
                sys.stdin = io.StringIO(stdin)
            if capture:
                sys.stdout = written
            for name, node in patched.items():
                setattr(builtins, name, self._unpack(node))
            result = function(*values[:at], **named)
        except StopIteration:
            raise
        except Exception as error:
            return ["raise", self._pack(error), self._changes(nodes, values, [*arrived.values()]), written.getvalue()]
        finally:
            sys.stdin, sys.stdout = streams
            for name, value in builtin.items():
                setattr(builtins, name, value)
        same = [position for position, value in enumerate(values) if value is result and is_mutable(value)]
        node = {"t": "argument", "v": same[0]} if same else self._pack(result)
        return ["ok", node, self._changes(nodes, values, [*arrived.values()]), written.getvalue()]

    def _changes(self, nodes: list[Any], values: list[Any], arrived: list[Any]) -> dict[str, Any]:
        """Arguments that are no longer what was sent, by position, and the instances among them as "instances"."""
        changed = {}
        for position, (node, value) in enumerate(zip(nodes, values, strict=True)):
            if is_mutable(value):
                now = self._pack(value)
                if now != node:
                    changed[str(position)] = now
        if arrived:
            changed["instances"] = self._pack(arrived)
        return changed

    def _op(self, name: str, args: list[Any]) -> list[Any]:
        return ["ok", self._pack(OPERATIONS[name](*map(self._unpack, args)))]

    # -- values -------------------------------------------------------------------------------------------------

    def _pack(self, value: Any) -> Any:
        return self.instances.pack(value, self._export)

    def _unpack(self, node: Any) -> Any:
        return decode(node, self._import)

    def _class(self, name: str) -> type:
        return self.module.__dict__[name]

    def _export(self, value: Any) -> Any:
        if isinstance(value, _Callback):
            return {"t": "callback", "v": value.number}
        kind = type(value)
        if kind.__name__ in self.shared and self.module.__dict__.get(kind.__name__) is kind:
            return self.instances.refer(value)
        if isinstance(value, Exception):
            own = self._handle(value)["v"] if kind.__module__ == "program" else None
            return {"t": "error", "v": [*describe_error(value, self._export), own]}
        return self._handle(value)

    def _handle(self, value: Any) -> Any:
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)  # kept alive, so its id stays its own
        return {"t": "handle", "v": number}

    def _import(self, node: Any) -> Any:
        if node["t"] == "handle":
            return self.objects[node["v"]]
        if node["t"] == "callback":
            return _Callback(self, node["v"])
        if node["t"] == "iterator":
            return _Iterator(self, node["v"])
        if node["t"] == "error":
            names, args, state, text = node["v"]
            found = (self.module.__dict__.get(name) or getattr(builtins, name, None) for name in names)
            kind = next(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))
            return build_error(kind, args, state, text, self._import)
        return self.instances.unpack(node, self._import)

    def call_checker(self, number: int, args: Any, kwargs: Any) -> Any:
        """Run one of the tests' own functions, which stays in the checker."""
        named = {name: self._pack(value) for name, value in kwargs.items()}
        send_frame(self.replies, ["callback", number, [self._pack(arg) for arg in args], named])
        while True:
            message = receive_frame(self.requests)
            if message[0] == "result":
                return self._unpack(message[1])
            if message[0] == "failed":
                raise self._unpack(message[1])
            self._serve(message)


class _Callback:
    """Stands for a function of the tests."""

    def __init__(self, server: Server, number: int) -> None:
        self._server, self.number = server, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._server.call_checker(self.number, args, kwargs)


class _Iterator(_Callback):
    """Stands for an iterator of the tests, which may be endless."""

    def __iter__(self) -> _Iterator:
        return self

    def __next__(self) -> Any:
        return self._server.call_checker(self.number, (), {})
