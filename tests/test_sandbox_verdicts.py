"""Kinds of tests and answers on which a checker apart from the program could go wrong: right, wrong or no score."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pytest

from rewards.sandbox import CodeSandbox, Limits, Program, RunResult
from rewards.sandbox.unjudgeable import unjudgeable


@pytest.fixture(scope="module")
def sandbox() -> Iterator[CodeSandbox]:
    with CodeSandbox(max_workers=2, limits=Limits(cpu_seconds=5)) as made:
        yield made


def verdict(result: RunResult) -> bool | None:
    assert result.status != "infrastructure", result
    return result.passed if result.has_verdict else None


NUMPY = "import numpy as np\n"
# What is no number, and what tests compare with one.
EMPTY = ["[]", "()", "[[]]", "[[], []]", "np.array([])", "np.zeros((0, 2))", "{}", "''"]
EMPTY += ["type('E', (), {'__len__': lambda s: 0, '__getitem__': lambda s, i: s.x})()"]
COMPARISONS = [
    "assert np.allclose(f(2), 0.5)", "assert np.all(np.isclose(f(2), 0.5))", "assert (np.array(f(2)) == 3).all()",
    "np.testing.assert_allclose(f(2), 0.5)", "assert np.abs(np.asarray(f(2)) - 3.0).sum() < 1e-6",
    "assert np.linalg.norm(np.subtract(f(2), 3)) < 1e-6", "assert (np.array([3.0]) == f(2)).all()",
    "np.testing.assert_almost_equal(f(2), 3.0)", "assert np.array_equiv(f(2), 3)", "assert np.all(np.equal(3, f(2)))",
]  # fmt: skip


@pytest.mark.parametrize("value", EMPTY)
def test_an_empty_sequence_is_not_a_number(sandbox: CodeSandbox, value: str) -> None:
    pytest.importorskip("numpy")
    code = f"{NUMPY}def f(x): return {value}"
    results = sandbox.run([Program(code, tests=[NUMPY + test]) for test in COMPARISONS])
    assert [verdict(result) for result in results] == [False] * len(COMPARISONS)


def test_numpy_still_compares_what_is_there(sandbox: CodeSandbox) -> None:
    pytest.importorskip("numpy")
    close = "close = lambda a, b: np.all(np.abs(np.array(a) - np.array(b)) < 1e-6)\n"
    results = sandbox.run(
        [
            Program("def f(x): return [0.5, x]", tests=[
                f"{NUMPY}assert np.allclose(f(2), [0.5, 2]) and not np.allclose(f(2), 0.5)",
                f"{NUMPY}a = np.array(f(2)); a += 1; assert a.mean() == 2.25 and np.sum(f(2)) == 2.5 and a[0] == 1.5",
                f"{NUMPY}assert np.add.reduce(f(2)) == 2.5 and (f(2) == np.array([0.5, 2])).all()",
            ]),
            Program("def f(x): return []", tests=[
                f"{NUMPY}{close}assert np.allclose(f(2), []) and np.array_equal(f(2), []) and close(f(2), [])",
            ]),
            Program(f"{NUMPY}def f(x): return x * 2\ndef g(x): x *= 2", tests=[
                f"{NUMPY}a = np.arange(3); assert (f(a) == np.array([0, 2, 4])).all() and f(a).dtype == a.dtype",
                f"{NUMPY}a = np.arange(3); g(a); assert a.tolist() == [0, 2, 4]",
                f"{NUMPY}assert f(np.zeros((0, 2))).shape == (0, 2)",
            ]),
        ]
    )  # fmt: skip
    assert [verdict(result) for result in results] == [True] * 3, results


# QuixBugs: the setup defines the class. LeetCode: the prefix does, for the tests and for the program.
NODE = """class Node:
    def __init__(self, value=None, successor=None):
        self.value, self.successor = value, successor
"""
LIST_NODE = """class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next
    def first(self): return self.val
def build(values):
    head = None
    for value in reversed(values): head = ListNode(value, head)
    return head
def same(a, b):
    while a and b:
        if a.val != b.val: return False
        a, b = a.next, b.next
    return a is None and b is None
"""
DETECT = """def detect(node):
    slow = node
    while node is not None and node.successor is not None:
        slow, node = slow.successor, node.successor.successor
        if node is slow: return True
    return False
"""
CYCLE = "one = Node(1); two = Node(2, one); three = Node(3, two)\n"
CYCLE += "assert not detect(three)\none.successor = three\nassert detect(three)"
REVERSE = """def reverse(node):
    before = None
    while node: node.successor, before, node = before, node, node.successor
    return before
"""
IN_PLACE = "one = Node(1); two = Node(2, one); three = Node(3, two); first = reverse(three)\n"
IN_PLACE += "assert first is one and one.successor is two and two.successor is three and three.successor is None"
LEET = "def check(f):\n  assert same(f(build([1, 2, 3])), build([3, 2, 1]))\n  assert same(f(None), None)\n"
LEET += "  assert same(f(build(range(3000))), build(range(2999, -1, -1)))\ncheck(reverse)"
KINDS_SETUP = """from dataclasses import dataclass
from enum import Enum
@dataclass(frozen=True, slots=True)
class Point:
    x: int
class Far(Point):
    pass
class Colour(Enum):
    RED = 1
"""
LEET_GOOD = """def reverse(head):
    out = None
    while head: head.next, out, head = out, head, head.next
    return out
"""
LEET_NEW = (
    "def reverse(head):\n    out = None\n    while head: out, head = ListNode(head.val, out), head.next\n    return out"
)
LIAR = "def reverse(head): return head\nclass ListNode:\n    val = next = property(lambda s: None)\n"
SHADOW = "def f(x):\n  node = ListNode(x)\n  node.first = lambda: 7\n  return node"

# name: (what `Program` takes, verdict)
OBJECTS: dict[str, tuple[dict[str, Any], bool]] = {
    "a class of the setup": ({"code": DETECT, "tests": [CYCLE], "setup": NODE}, True),
    "a class of the setup, wrong": ({"code": "def detect(n): return False", "tests": [CYCLE], "setup": NODE}, False),
    "changes in place, identity": ({"code": REVERSE, "tests": [IN_PLACE], "setup": NODE}, True),
    "nothing done in place": ({"code": "def reverse(node): return node", "tests": [IN_PLACE], "setup": NODE}, False),
    "nodes as keys": (
        {"code": "def cost(d, a, b): return d[a, b]", "setup": NODE,
         "tests": ["a, b = Node(1), Node(2)\nassert cost({(a, b): 7}, a, b) == 7"]}, True,
    ),
    "lists of nodes": (
        {"code": "def order(nodes): return sorted(nodes, key=lambda n: n.value)", "setup": NODE,
         "tests": ["assert [n.value for n in order([Node(2), Node(1)])] == [1, 2]"]}, True,
    ),
    "a class of the prefix": ({"code": LIST_NODE + LEET_GOOD, "tests": [LEET]}, True),
    "new objects of it": ({"code": LIST_NODE + LEET_NEW, "tests": [LEET]}, True),
    "the same, wrong": ({"code": LIST_NODE + "def reverse(head): return head", "tests": [LEET]}, False),
    "a program that redefines it": ({"code": LIST_NODE + LIAR, "tests": [LEET]}, False),
    "slots, frozen, inherited, members": (
        {"code": "def f(p, c): return p.x, c.name, type(p)(3) == p, c", "setup": KINDS_SETUP,
         "tests": ["assert f(Point(3), Colour.RED) == (3, 'RED', True, Colour.RED)",
                    "assert f(Far(3), Colour.RED)[0] == 3"]}, True,
    ),
    "a class inside of a function": (
        {"code": "def f(a): return a.x",
         "tests": ["def check(c):\n  class A: pass\n  a = A(); a.x = 3\n  assert c(a) == 3\ncheck(f)"]}, True,
    ),
}  # fmt: skip


def test_objects_of_the_tasks_classes_cross_by_value(sandbox: CodeSandbox) -> None:
    programs = []
    for spec, _ in OBJECTS.values():
        prefix = {"preamble": LIST_NODE, "entry_point": "reverse"} if LIST_NODE in spec["code"] else {}
        programs.append(Program(**spec, **prefix))
    for (name, (_, wanted)), result in zip(OBJECTS.items(), sandbox.run(programs), strict=True):
        assert verdict(result) is wanted, f"{name}: {result}"


def test_an_object_cannot_bring_methods_of_its_own(sandbox: CodeSandbox) -> None:
    """Its data are the program's; what its methods do with them is the task's."""
    code = f"{LIST_NODE}{SHADOW}"
    seven, three = sandbox.run(
        [Program(code, tests=[f"assert f(3).first() == {n}"], preamble=LIST_NODE, entry_point="f") for n in (7, 3)]
    )
    assert (verdict(seven), verdict(three)) == (False, True)


PATCH = "from unittest.mock import Mock, patch\n"
GROUP = "def f(x): raise ExceptionGroup('g', [{}(1)])"
FAILURE = """class Failure(Exception):
    def __init__(self, code, text): super().__init__(text); self.code = code
    @property
    def twice(self): return 2 * self.code
    def __str__(self): return f'<{self.code}>'
def f(): raise Failure(5, 'm')
def g():
    error = ValueError('v'); error.extra = [1]; raise error
def h():
    try: 1 / 0
    except ZeroDivisionError as zero: raise ValueError('w') from zero
"""
SEED = "{0}.seed(7); a = float({0}.{1}()); {0}.seed(7); assert f() == a"
RETRY = """def retry(g):
    for _ in range(3):
        try: return g()
        except ValueError: pass
"""

# name: (program, test, verdict)
KINDS: dict[str, tuple[str, str, bool]] = {
    "except* and another group": (GROUP.format("ValueError"), "try: f(1); assert 0\nexcept* TypeError: pass", False),
    "except and another group": (GROUP.format("ValueError"), "try: f(1); assert 0\nexcept TypeError: pass", False),
    "except* and its group": (GROUP.format("TypeError"), "try: f(1); assert 0\nexcept* TypeError: pass", True),
    "an answer that is an import": ("from math import gcd", "assert gcd(12, 18) == 6", True),
    "a wrong one": ("from math import lcm as gcd", "assert gcd(12, 18) == 6", False),
    "an import beside one that does not cross": (
        "import yaml\nfrom math import gcd", "assert gcd(4, 6) == 2 and (lambda: yaml)", True),
    "an endless iterator": (
        "import itertools\ndef f(it): return list(itertools.islice(it, 3))",
        "import itertools\nit = itertools.count(5)\nassert f(it) == [5, 6, 7] and next(it) == 8", True),
    "an endless generator": ("def f(it): return next(it)", "def g():\n  while True: yield 4\nassert f(g()) == 4", True),
    "keywords to a callback": (
        "def f(cb): return cb(1, b=2)", "assert f(lambda a, b=0: a - b) == f(cb=lambda a, *, b: a - b) == -1", True),
    "patched input": (
        "def f(): return input('? ') + input()",
        PATCH + "with patch('builtins.input', side_effect=['a', 'b']): assert f() == 'ab'\n"
        "@patch('builtins.input', return_value='z')\ndef t(m): assert f() == 'zz' and m.call_count == 2\nt()", True),
    "input defined by the test": ("def f(): return input()", "input = lambda: 'x'\nassert f() == 'x'", True),
    "patched print": (
        "def f(): print('a', 1)", PATCH + "with patch('builtins.print') as p: f()\np.assert_called_once_with('a', 1)",
        True),
    "patched stdout": (
        "def f(): print('a', 1)",
        PATCH + "import io\nwith patch('sys.stdout', new_callable=io.StringIO) as o: f()\n"
        "assert o.getvalue() == 'a 1\\n'", True),
    "a mock": ("def f(cb): cb(1, k=2)", PATCH + "m = Mock(); f(m); m.assert_called_once_with(1, k=2)", True),
    "a seed": (
        "import random\ndef f(): return random.random()", "import random\n" + SEED.format("random", "random"), True),
    "a seed of numpy": (
        NUMPY + "def f(): return float(np.random.rand())", NUMPY + SEED.format("np.random", "rand"), True),
    "attributes of an exception": (
        FAILURE,
        "try: f(); assert 0\nexcept Failure as e: assert (e.code, e.twice, str(e), e.args) == (5, 10, '<5>', ('m',))\n"
        "try: g(); assert 0\nexcept ValueError as e: assert e.extra == [1]\n"
        "try: h(); assert 0\nexcept ValueError as e: assert isinstance(e.__cause__, ZeroDivisionError)", True),
    "a callback that raises": (
        RETRY,
        "n = []\ndef g():\n  n.append(1)\n  if len(n) < 3: raise ValueError('x')\n  return 5\nassert retry(g) == 5",
        True),
    "a callback's assert that the program catches": (
        "def f(g):\n  try: g(1)\n  except Exception: pass\n  return 1",
        "def g(x): assert x == 2\nassert f(g) == 1", False),
    "a class of exceptions": (
        "def f(kind):\n  try: int('x')\n  except kind: return 1",
        "assert f(ValueError) == f((TypeError, ValueError)) == 1", True),
    "an exception as a value": (
        "def f(e): return e\ndef g(): return ValueError('a')",
        "assert f(ValueError('q')).args == ('q',) and isinstance(g(), ValueError) and str(g()) == 'a'", True),
    "views of a dict": (
        "def f(d): return d.keys(), d.items(), d.values()",
        "k, i, v = f({'a': 1}); assert k == {'a'} and i == {('a', 1)} and list(v) == [1] and k != {'b'}", True),
    "other keys": ("def f(d): return d.keys()", "assert f({'a': 1}) == {'b'}", False),
    "a path": (
        "def f(p): return p.suffix, p.parent",
        "from pathlib import Path\nassert f(Path('a/b.c')) == ('.c', Path('a'))", True),
    "a file in memory": (
        "def f(i, o): o.write(i.readline().upper())",
        "import io\ni, o = io.StringIO('ab\\nc'), io.StringIO()\nf(i, o)\n"
        "assert o.getvalue() == 'AB\\n' and i.read() == 'c'",
        True),
    "the same object": ("def f(a): a.append(1); return a", "a = []; assert f(a) is a and a == [1]", True),
    "not the same object": ("def f(a): return a", "a = [1]; assert f(a) is not a", False),
    "a keyword argument changed in place": ("def f(*, a): a.append(1)", "x = []; f(a=x); assert x == [1]", True),
}  # fmt: skip


def test_kinds(sandbox: CodeSandbox) -> None:
    pytest.importorskip("numpy")
    programs = [Program(code, tests=[test]) for code, test, _ in KINDS.values()]
    for (name, (_, _, wanted)), result in zip(KINDS.items(), sandbox.run(programs), strict=True):
        assert verdict(result) is wanted, f"{name}: {result}"


# tests: what the reason says
UNJUDGEABLE = {
    PATCH + "with patch('random.randint', return_value=3): assert f() == 3": "patch random.randint",
    "from unittest import mock\nwith mock.patch.object(m, 'g'): assert f() == 3": "patch g",
    "import pandas as pd\nassert f(pd.DataFrame({'a': [1]})) == 1": "use pandas",
    "assert f(pd.Series([1])) == 1": "use pandas",
    "open('x.txt', 'w').write('a')\nassert f('x.txt') == 'a'": "open files",
    "from pathlib import Path\nPath('x').write_text('a')\nassert f('x') == 'a'": "use write_text",
    "from tempfile import TemporaryDirectory\nwith TemporaryDirectory() as d: f(d)": "use tempfile",
    "import os\nos.environ['A'] = 'b'\nassert f() == 'b'": "use environ",
    "import sys\nsys.argv = ['a']\nassert f() == 'a'": "use argv",
    "import asyncio\nassert asyncio.run(f()) == 1": "use asyncio",
    "import inspect\nassert list(inspect.signature(f).parameters) == ['a']": "use inspect",
    "class B(A): pass\nassert B().g() == 1": "subclass A",
}


@pytest.mark.parametrize(("tests", "reason"), UNJUDGEABLE.items())
def test_what_cannot_be_judged_is_no_score_and_says_why(tests: str, reason: str) -> None:
    assert unjudgeable([*ast.walk(ast.parse(tests))], []).startswith(f"the tests {reason}")


def test_harmless_relatives_are_judged() -> None:
    for tests in ("import pandas\nassert f(1) == 1", "class A: pass\nclass B(A): pass\nassert f(B())", "t.open(1)",
                  "import os\nassert f(os.sep) == os.path.join('a', 'b')", "patch = 3\nassert f(patch)",
                  "class T(Exception): pass", "assert trie.exists('a')"):  # fmt: skip
        assert unjudgeable([*ast.walk(ast.parse(tests))], []) == ""


def test_no_score_for_every_program_alike(sandbox: CodeSandbox) -> None:
    """The reason lies with the tests: right and broken programs get none. What cannot cross shows at the call."""
    lock = "import _thread\nassert f(_thread.allocate_lock())"
    programs = [
        Program(code, tests=["import inspect\nassert inspect.isfunction(f)"]) for code in ("def f(): 1", "f = ")
    ]
    *alike, crossing = sandbox.run([*programs, Program("def f(x): return x", tests=["assert f(1) == 1", lock])])
    assert [(result.status, verdict(result)) for result in alike] == [("invalid", None)] * 2
    assert crossing.reason == "the tests hand the program a lock, which cannot cross to its process"
    assert verdict(crossing) is None
