"""The side of the tests: runs them in a process of its own, with stand-ins for what the program defines.

A test such as `assert f(1) == 2` runs here. `f` is a `ProgramObject`: calling it sends the arguments to the
program's process and brings the answer back as data. The expected value, the comparison and the verdict never
leave this process. What a program can still do is answer; so these rules close what answers could reach:

* Data arrives as builtin types. An object of the program arrives as a handle, which is never equal to data, and
  has no arithmetic, ordering or `in` with data: those would let the program answer in place of the comparison.
* What the task itself defines for every program (`preamble`) is defined here too, and not taken from the program.
* A name that is a builtin's stays the builtin, so `def abs(x): return 0` changes nothing in a test; except
  for the function under test (`entry_point`, or the only thing of the program that the tests use).
* `StopIteration` out of a call becomes an error, as it would silently end a loop of the tests.
* A call in which the program exits, or dies, fails its test even when the test catches everything.

Standard library only: runs inside the sandbox.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType
from typing import Any, NoReturn

from rewards.sandbox.frames import FrameError, receive_frame, send_frame
from rewards.sandbox.program import SHARED_MODULES
from rewards.sandbox.values import MUTABLE, TransferError, decode, encode, restore

MODULE_ALIASES = {"np": "numpy", "pd": "pandas"}
COMPARISONS_AND_ARITHMETIC = "lt le gt ge add sub mul truediv floordiv mod pow matmul and or xor"
DELEGATED = "len str repr int float index iter next getitem delitem enter copy"


class ProgramStopped(BaseException):
    """The program is gone, or left in the middle of a call. No `except Exception` of a test catches it."""


def check(spec: Mapping[str, Any], requests: int, replies: int, out: int) -> None:
    """Run every test and report on `out`, ["begin", number], one ["test", passed, reason] each, ["done"].

    ["invalid", reason] instead says that the tests say nothing about any program.

    Args:
        spec: `tests`, `setup`, `preamble` and `entry_point` as in `records.Program`.
        requests, replies: descriptors of the pipes to and from the program.
        out: descriptor of the pipe to whoever wants the verdict.
    """
    try:
        parts = [_compiled(text, f"<test {i}>") for i, text in enumerate(spec["tests"])]
        before = _compiled(spec["setup"], "<setup>")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        send_frame(out, ["invalid", f"the tests do not compile: {error}"])
        return
    send_frame(out, ["begin", len(parts)])
    link = Link(requests, replies)
    problem = link.start() or link.own(spec["preamble"])
    problem = problem or link.fill([tree for tree, _ in [before, *parts]], spec["entry_point"]) or link.run(before[1])
    num_passed = 0
    for _, code in parts:
        reason = problem or link.run(code)
        num_passed += not reason
        send_frame(out, ["test", not reason, reason])
    if num_passed and not link.used:
        send_frame(out, ["invalid", "the tests never use the program; is the call of its function missing?"])
    send_frame(out, ["done"])


def verdict(messages: Iterable[Sequence[Any]], status: str = "ok", stopped: str = "") -> dict[str, Any]:
    """What the messages of `check` add up to, completed by failures for the tests it never came to.

    Args:
        messages: in order; they may break off.
        status: how the run ended otherwise: "ok", "timeout" or "output".
        stopped: why the messages break off, if they do.

    Returns:
        `tests`, `status` and `reason` as in `records.RunResult`.
    """
    tests: list[list[Any]] = []
    num_tests, done = 0, False
    for kind, *rest in messages:
        if kind == "invalid":
            return {"tests": [], "status": "invalid", "reason": rest[0]}
        if kind == "begin":
            num_tests = rest[0]
        elif kind == "test":
            tests.append(rest)
        done |= kind == "done"
    if not done and status == "ok":
        status = "error"
    tests += [[False, f"not reached: {stopped}"]] * (num_tests - len(tests))
    failed = [reason for passed, reason in tests if not passed]
    return {
        "tests": tests,
        "status": status,
        "reason": "" if status == "ok" and not failed else (failed or [stopped])[0],
    }


def _compiled(text: str, name: str) -> tuple[ast.Module, CodeType]:
    tree = ast.parse(text, name)
    return tree, compile(tree, name, "exec", dont_inherit=True, optimize=0)


def _one_line(error: BaseException) -> str:
    where = ""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename.startswith("<"):  # the tests' own code
            where = f" at line {step.tb_lineno}"
        step = step.tb_next
    return " ".join(f"{type(error).__name__}{where}: {error}".split()).removesuffix(":")[:300]


class Link:
    """The checker's end of the connection to one program."""

    def __init__(self, requests: int, replies: int) -> None:
        self.requests, self.replies = requests, replies
        self.used = False  # whether the tests asked the program for anything
        self.fault = ""  # what went wrong with the program in the current test
        self.dead = ""
        self.names: set[str] = set()
        self.namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
        self.exceptions: dict[str, type[Exception]] = {}
        self.callbacks: list[Callable[..., Any]] = []
        self.streams = sys.stdin, sys.stdout

    # -- the stages, each "" or what went wrong ---------------------------------------------------------------

    def start(self) -> str:
        """Have the program executed."""
        try:
            send_frame(self.requests, ["run"])
            reply = receive_frame(self.replies)
            if reply[0] == "ok":
                self.names = {name for name in reply[1] if isinstance(name, str)}
                return ""
            return f"the program raised {reply[3]}" if reply[0] == "raise" else f"the program called exit ({reply[1]})"
        except Exception as error:
            return f"the program stopped while it was loaded ({error})"

    def own(self, preamble: str) -> str:
        """Define here what the task gave to every program, so that no program can define it otherwise."""
        try:
            code = _compiled(preamble, "<preamble>")[1]
        except (SyntaxError, ValueError):
            return ""  # the beginning of something: it exists only together with the program
        return self.run(code)

    def fill(self, trees: Sequence[ast.Module], entry_point: str | None) -> str:
        """Bind the names that the tests take from the program."""
        if entry_point and entry_point.isidentifier() and entry_point not in self.names:
            return f"the program does not define {entry_point}"
        nodes = [node for tree in trees for node in ast.walk(tree)]
        used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
        bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        self.namespace.pop(entry_point or "", None)  # the preamble's is the unfinished one
        offered = used & self.names - self.namespace.keys()
        shadowing = {name for name in offered if hasattr(builtins, name)}
        try:
            # What the tests define themselves simply replaces what is bound here.
            own = {name for name in sorted(offered - shadowing) if self._bind(name)} - bound
            if entry_point in shadowing or (not entry_point and not own and len(shadowing) == 1):
                self._bind(entry_point or shadowing.pop())
        except (Exception, ProgramStopped) as error:
            return _one_line(error)
        return ""

    def run(self, code: CodeType) -> str:
        """Execute one snippet of the tests."""
        self.fault = self.dead
        try:
            exec(code, self.namespace)
        except BaseException as error:
            return self.fault or _one_line(error)
        finally:
            sys.stdin, sys.stdout = self.streams
        return self.fault

    def _bind(self, name: str) -> bool:
        """Bind one name; True when it stands for something the program itself made."""
        node = self._ask(["global", name])[0]
        tag = node.get("t") if isinstance(node, dict) else None
        if tag == "module":
            if node["v"] == MODULE_ALIASES.get(name, name) and node["v"].split(".")[0] in (
                *sys.stdlib_module_names,
                *MODULE_ALIASES.values(),
            ):
                self.namespace[name] = importlib.import_module(node["v"])
            return False
        if tag == "shared":
            if node["v"] in SHARED_MODULES:
                self.namespace[name] = getattr(importlib.import_module(node["v"]), name)
            return False
        if tag == "exception":
            base = self._exception_class(node["v"][1:])
            found = type(str(node["v"][0]), (base,), {"__program_class__": node["h"]})
            self.exceptions[found.__name__] = self.namespace[name] = found
            return True
        self.namespace[name] = value = self.decode(node)
        self.used |= not isinstance(value, ProgramObject)
        return True

    # -- requests ---------------------------------------------------------------------------------------------

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an object of the program; what it did to mutable arguments is done here too."""
        self.used = True
        stdin = sys.stdin.read() if sys.stdin is not self.streams[0] else None
        capture = sys.stdout is not self.streams[1]
        named = {name: self.encode(value) for name, value in kwargs.items()}
        reply = self._ask(["call", target, [self.encode(arg) for arg in args], named, stdin, capture], args)
        return self.decode(reply[0])

    def _take_effects(self, args: tuple[Any, ...], changed: Any, written: Any) -> None:
        try:
            for position, node in changed.items():
                original, new = args[int(position)], self.decode(node)
                if type(new) is type(original) and isinstance(new, MUTABLE):
                    restore(original, new)
            if sys.stdout is not self.streams[1]:
                sys.stdout.write(str(written))
        except TransferError:
            raise
        except Exception as error:
            raise TransferError(f"the program sent no valid answer: {error}") from None

    def operate(self, name: str, *args: Any) -> Any:
        """Apply a named operation to objects of the program."""
        reply = self._ask(["op", name, [self.encode(arg) for arg in args]])
        return self.decode(reply[0])

    def _ask(self, request: list[Any], args: tuple[Any, ...] = ()) -> list[Any]:
        if self.dead:
            raise ProgramStopped(self.dead)
        try:
            send_frame(self.requests, request)
            reply = receive_frame(self.replies)
            while isinstance(reply, list) and reply and reply[0] == "callback":
                self._run_callback(*reply[1:])
                reply = receive_frame(self.replies)
        except (FrameError, OSError) as error:
            self.dead = self.fault = f"the program stopped in a call ({error})"
            raise ProgramStopped(self.dead) from None
        if not isinstance(reply, list) or len(reply) < 2:
            raise TransferError("the program sent no valid answer")
        if request[0] == "call" and reply[0] in ("ok", "raise"):
            self._take_effects(args, *reply[-2:])
        if reply[0] == "ok":
            return reply[1:]
        if reply[0] == "raise" and len(reply) >= 4:
            self._raise(*reply[1:4])
        if reply[0] == "stop" and request[:2] == ["op", "next"]:
            raise StopIteration
        if reply[0] == "exit":
            self.fault = f"the program called exit ({str(reply[1])[:80]})"
            raise ProgramStopped(self.fault)
        raise RuntimeError("the program raised StopIteration")

    def _run_callback(self, number: Any, args: Any) -> None:
        try:
            function = self.callbacks[number]
            value = function(*[self.decode(node) for node in args])
            reply = ["result", self.encode(value)]
        except Exception as error:
            reply = ["failed", _one_line(error)]
        send_frame(self.requests, reply)

    # -- values -----------------------------------------------------------------------------------------------

    def encode(self, value: Any) -> Any:
        return encode(value, self._hand_over)

    def decode(self, node: Any) -> Any:
        return decode(node, self._receive)

    def _hand_over(self, value: Any) -> Any:
        if isinstance(value, ProgramObject):
            return {"t": "handle", "v": value._number}
        if isinstance(value, type) and "__program_class__" in value.__dict__:
            return {"t": "handle", "v": value.__dict__["__program_class__"]}
        if hasattr(type(value), "__next__"):
            return {"t": "iterator", "v": [self.encode(item) for item in value]}
        if callable(value):
            self.callbacks.append(value)
            return {"t": "callback", "v": len(self.callbacks) - 1}
        raise TransferError(f"the tests hand the program a {type(value).__name__}, which cannot cross")

    def _receive(self, node: Any) -> Any:
        if node["t"] == "handle" and isinstance(node["v"], int):
            return ProgramObject(self, node["v"])
        if node["t"] == "callback":
            return self.callbacks[node["v"]]
        raise TransferError(f"the program sent an unknown tag {node['t']}")

    def _exception_class(self, bases: Sequence[Any]) -> type[Exception]:
        for name in bases:
            found = self.exceptions.get(name) or getattr(builtins, str(name), None)
            if isinstance(found, type) and issubclass(found, Exception):
                return RuntimeError if issubclass(found, StopIteration | StopAsyncIteration) else found
        return RuntimeError

    def _raise(self, bases: Any, args: Any, text: Any) -> NoReturn:
        kind = self._exception_class(bases)
        values = tuple(self.decode(arg) for arg in args)
        try:
            error = kind(*values)
        except Exception:
            error = kind.__new__(kind)
            error.args = values
        raise error


class ProgramObject:
    """Stands for an object that lives in the program: a function, a class, an instance, a generator."""

    __slots__ = ("_link", "_number")
    _link: Link
    _number: int

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.call({"t": "handle", "v": self._number}, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__", "__dict__", "__qualname__"):
            raise AttributeError(name)
        return self._link.operate("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.operate("setattr", self, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProgramObject) and self._link.operate("eq", self, other) is True

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, ProgramObject) or self._link.operate("ne", self, other) is True

    def __hash__(self) -> int:
        return hash(("program", self._number))

    def __bool__(self) -> bool:
        return self._link.operate("bool", self) is True

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, ProgramObject) and self._link.operate("isinstance", instance, self) is True

    def __contains__(self, item: Any) -> NoReturn:
        raise TypeError("`in` an object of the program: its answer would be the program's own word")

    def __setitem__(self, key: Any, value: Any) -> None:
        self._link.operate("setitem", self, key, value)

    def __exit__(self, *exception: Any) -> None:
        self._link.operate("exit", self)

    def __deepcopy__(self, memo: Any) -> Any:
        return self._link.operate("deepcopy", self)


def _unary(name: str) -> Callable[..., Any]:
    return lambda self, *args: self._link.operate(name, self, *args)


def _binary(name: str) -> Callable[[Any, Any], Any]:
    def apply(self: Any, other: Any) -> Any:
        return self._link.operate(name, self, other) if isinstance(other, ProgramObject) else NotImplemented

    return apply


for _name in DELEGATED.split():
    setattr(ProgramObject, f"__{_name}__", _unary(_name))
for _name in COMPARISONS_AND_ARITHMETIC.split():
    setattr(ProgramObject, f"__{_name}__", _binary(_name))
