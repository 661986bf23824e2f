"""The side of the tests: runs them in a process of its own, with stand-ins for what the program defines.

A test such as `assert f(1) == 2` runs here. `f` is a `ProgramObject`: calling it sends the arguments to the
program's process and brings the answer back as data. The expected value, the comparison and the verdict never
leave this process. What a program can still do is answer; the rules that close what answers could reach are in
docs/sandbox.md, "Who makes the verdict". Standard library only: runs inside the sandbox.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType
from typing import Any

from rewards.sandbox import values
from rewards.sandbox.arrays import guarded_numpy
from rewards.sandbox.frames import FrameError, receive_frame, send_frame
from rewards.sandbox.instances import Instances
from rewards.sandbox.program import SHARED_MODULES
from rewards.sandbox.program_object import ProgramObject, exception_class
from rewards.sandbox.unjudgeable import unjudgeable
from rewards.sandbox.values import TransferError, build_error, decode, describe_error, is_mutable, restore

PATCHED = {"input": builtins.input, "print": builtins.print}  # what tests may replace for the program too


class ProgramStopped(BaseException):
    """The program is gone, or left in the middle of a call. No `except Exception` of a test catches it."""


def check(spec: Mapping[str, Any], requests: int, replies: int, out: int) -> None:
    """Run every test of `spec` (see `records.Program`) over the pipes `requests` and `replies`, and report on `out`.

    The report is ["begin", number], one ["test", passed, reason] each, ["done"]; ["invalid", reason] instead says that
    the tests say nothing about any program.
    """
    try:
        parts = [_compiled(text, f"<test {i}>") for i, text in enumerate(spec["tests"])]
        before = _compiled(spec["setup"], "<setup>")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        send_frame(out, ["invalid", f"the tests do not compile: {error}"])
        return
    nodes = [node for tree, _ in [before, *parts] for node in ast.walk(tree)]
    link = Link(requests, replies, nodes, spec["preamble"])
    if reason := unjudgeable(nodes, link.shared):
        send_frame(out, ["invalid", reason])
        return
    send_frame(out, ["begin", len(parts)])
    texts = "\n".join([spec["preamble"], spec["setup"], *spec["tests"]])
    if "numpy" in texts or "scipy" in texts:
        guarded_numpy()
    problem = link.start() or link.own(spec["preamble"])
    problem = problem or link.fill(nodes, spec["entry_point"]) or link.run(before[1])
    num_passed = 0
    for _, code in parts:
        reason = problem or link.run(code)
        num_passed += not reason
        send_frame(out, ["test", not reason, reason])
    if link.unusable:
        send_frame(out, ["invalid", link.unusable])
    elif num_passed and not link.used:
        send_frame(out, ["invalid", "the tests never use the program; is the call of its function missing?"])
    send_frame(out, ["done"])


def verdict(messages: Iterable[Sequence[Any]], status: str = "ok", stopped: str = "") -> dict[str, Any]:
    """`tests`, `status` and `reason` of a `RunResult`, from the messages of `check`.

    The messages may break off: `status` and `stopped` say how else the run ended, and the tests not come to failed.
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
    reason = "" if status == "ok" and not failed else (failed or [stopped])[0]
    return {"tests": tests, "status": status, "reason": reason}


def _compiled(text: str, name: str) -> tuple[ast.Module, CodeType]:
    tree = ast.parse(text, name)
    return tree, compile(tree, name, "exec", dont_inherit=True, optimize=0)


def _complete(preamble: str) -> ast.Module:
    """The preamble; nothing where it is the beginning of something, which exists only together with the program."""
    try:
        return ast.parse(preamble)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


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

    def __init__(self, requests: int, replies: int, nodes: Sequence[ast.AST] = (), preamble: str = "") -> None:
        self.requests, self.replies = requests, replies
        self.used = False  # whether the tests asked the program for anything
        self.fault = ""  # what went wrong with the program in the current test
        self.unusable = ""  # why the tests cannot be run apart from the program
        self.dead = ""
        self.names: set[str] = set()
        self.namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
        self.exceptions: dict[str, type[Exception]] = {}
        self.callbacks: list[Callable[..., Any]] = []
        self.streams = sys.stdin, sys.stdout
        self.instances = Instances(0, self._class)
        self.imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        self.sources = {node.name: ast.unparse(node) for node in nodes if isinstance(node, ast.ClassDef)}
        self.shared = {node.name for node in _complete(preamble).body if isinstance(node, ast.ClassDef)}
        values.load_numpy = guarded_numpy

    # -- the stages, each "" or what went wrong ---------------------------------------------------------------

    def start(self) -> str:
        """Have the program executed."""
        try:
            send_frame(self.requests, ["run", sorted(self.shared)])
            reply = receive_frame(self.replies)
            if reply[0] == "ok":
                self.names = {name for name in reply[1] if isinstance(name, str)}
                return ""
            if reply[0] == "raise":
                return f"the program raised {_one_line(self.decode(reply[1]))}"
            return f"the program called exit ({reply[1]})"
        except Exception as error:
            return f"the program stopped while it was loaded ({error})"

    def own(self, preamble: str) -> str:
        """Define here what the task gave to every program, so that no program can define it otherwise."""
        return self.run(compile(_complete(preamble), "<preamble>", "exec", dont_inherit=True, optimize=0))

    def fill(self, nodes: Sequence[ast.AST], entry_point: str | None) -> str:
        """Bind the names that the tests take from the program."""
        if entry_point and entry_point.isidentifier() and entry_point not in self.names:
            return f"the program does not define {entry_point}"
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
            elif not own:  # an answer such as `from math import gcd`
                for name in (offered - shadowing - bound) & self.namespace.keys():
                    self.namespace[name] = self._counted(self.namespace[name])
            self._follow_seeds(nodes)
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
            module = node["v"]
            if module == {"np": "numpy"}.get(name, name) and module.split(".")[0] in (
                *sys.stdlib_module_names,
                "numpy",
            ):
                self.namespace[name] = guarded_numpy() if module == "numpy" else importlib.import_module(module)
            return False
        if tag == "shared":
            if node["v"] in SHARED_MODULES:
                self.namespace[name] = getattr(importlib.import_module(node["v"]), name)
            return False
        if tag == "exception":
            base = self._exception_class(node["v"][1:])
            found = exception_class(str(node["v"][0]), base, node["h"])
            self.exceptions[found.__name__] = self.namespace[name] = found
            return True
        self.namespace[name] = value = self.decode(node)
        self.used |= not isinstance(value, ProgramObject)
        return True

    def _counted(self, function: Any) -> Any:
        """A function of the standard library whose call counts as a use of the program that imported it."""
        if not callable(function) or isinstance(function, type):
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            self.used = True
            return function(*args, **kwargs)

        return call

    def _follow_seeds(self, nodes: Iterable[ast.AST]) -> None:
        """Where the tests seed a generator of random numbers, seed the program's too."""
        if not any(isinstance(node, ast.Attribute) and node.attr == "seed" for node in nodes):
            return
        for name in ["random"] + ["numpy.random"] * ("numpy" in sys.modules):
            module = importlib.import_module(name)

            def seed(*args: Any, name: str = name, own: Callable[..., Any] = module.seed) -> None:
                own(*args)
                self.operate("seed", name, *args)

            module.seed = seed  # type: ignore[attr-defined]

    # -- requests ---------------------------------------------------------------------------------------------

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an object of the program; what it did to mutable arguments is done here too."""
        self.used = True
        stdin = sys.stdin.read() if sys.stdin is not self.streams[0] else None
        capture = sys.stdout is not self.streams[1]
        now = {name: self.namespace.get(name, getattr(builtins, name)) for name in PATCHED}
        patched = {name: self.encode(found) for name, found in now.items() if found is not PATCHED[name]}
        given = (*args, *kwargs.values())
        request = [target, [self.encode(value) for value in given], [*kwargs], stdin, capture, patched]
        node = self._ask(["call", *request], given)[0]
        return given[node["v"]] if isinstance(node, dict) and node.get("t") == "argument" else self.decode(node)

    def _take_effects(self, args: tuple[Any, ...], changed: Any, written: Any) -> None:
        try:
            self.decode(changed.pop("instances", None))
            for position, node in changed.items():
                original, new = args[int(position)], self.decode(node)
                if type(new) is type(original) and is_mutable(new):
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
        if reply[0] == "raise":
            raised = self.decode(reply[1])
            raise raised if isinstance(raised, Exception) else TransferError("the program sent no exception")
        if reply[0] == "stop" and request[:2] == ["op", "next"]:
            raise StopIteration
        if reply[0] == "exit":
            self.fault = f"the program called exit ({str(reply[1])[:80]})"
            raise ProgramStopped(self.fault)
        raise RuntimeError("the program raised StopIteration")

    def _run_callback(self, number: Any, args: Any, kwargs: Any) -> None:
        try:
            function = self.callbacks[number]
            named = {name: self.decode(node) for name, node in kwargs.items()}
            reply = ["result", self.encode(function(*[self.decode(node) for node in args], **named))]
        except Exception as error:
            if isinstance(error, AssertionError):  # the program may catch it; the test fails all the same
                self.fault = _one_line(error)
            reply = ["failed", self.encode(error)]
        send_frame(self.requests, reply)

    # -- values -----------------------------------------------------------------------------------------------

    def encode(self, value: Any) -> Any:
        return self.instances.pack(value, self._hand_over)

    def decode(self, node: Any) -> Any:
        return decode(node, self._receive)

    def _hand_over(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, ProgramObject):
            return {"t": "handle", "v": value._number}
        if isinstance(value, type) and "__program_class__" in value.__dict__:
            return {"t": "handle", "v": value.__dict__["__program_class__"]}
        if isinstance(value, Exception):
            return {"t": "error", "v": describe_error(value, self._hand_over)}
        if hasattr(kind, "__next__") and not callable(value):
            return self._callback("iterator", value.__next__)
        if kind.__module__ == "tests" and not isinstance(value, type) and self._define(kind):
            return self.instances.refer(value)
        if callable(value):
            return self._callback("callback", value)
        self.unusable = f"the tests hand the program a {kind.__name__}, which cannot cross to its process"
        raise TransferError(self.unusable)

    def _callback(self, tag: str, function: Callable[..., Any]) -> Any:
        self.callbacks.append(function)
        return {"t": tag, "v": len(self.callbacks) - 1}

    def _define(self, kind: type) -> bool:
        """Whether the program has this class of the task, if need be after sending its text."""
        names = [base.__name__ for base in reversed(kind.__mro__) if base.__module__ == "tests"]
        missing = [name for name in names if name not in self.shared]
        if missing and self.sources.keys() >= set(missing):
            sources = [*self.imports, *(self.sources[name] for name in missing)]
            if self._ask(["define", missing, sources])[0] is True:
                self.shared.update(missing)
        return self.shared >= set(names)

    def _class(self, name: Any) -> type:
        found = self.namespace.get(name)
        if name not in self.shared or not isinstance(found, type):
            raise TransferError(f"no class {name} of the task")
        return found

    def _receive(self, node: Any) -> Any:
        tag, value = node["t"], node["v"]
        if tag == "handle" and isinstance(value, int):
            return ProgramObject(self, value)
        if tag == "callback":
            return self.callbacks[value]
        if tag == "error":
            bases, args, state, text, number = value
            error = build_error(self._exception_class(bases), args, state, str(text), self._receive)
            if "__program_class__" in type(error).__dict__:
                error.__dict__.update(_text=str(text), _object=ProgramObject(self, int(number)))
            return error
        return self.instances.unpack(node, self._receive)

    def _exception_class(self, bases: Sequence[Any]) -> type[Exception]:
        for name in bases:
            found = self.exceptions.get(name) or getattr(builtins, str(name), None)
            if isinstance(found, type) and issubclass(found, Exception):
                return RuntimeError if issubclass(found, StopIteration | StopAsyncIteration) else found
        return RuntimeError
