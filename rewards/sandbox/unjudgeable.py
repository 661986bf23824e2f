"""Tests that cannot be run apart from the program, found by their text: no score, with the reason.

The list is in docs/sandbox.md. It is about the tests of a row, never about a program, so no program can choose it.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Sequence

# Their objects do not cross, or they look into an object instead of using it.
MODULES = {"pandas", "polars", "torch", "tensorflow", "jax", "inspect", "asyncio", "threading", "multiprocessing"}
MODULES |= {"concurrent", "subprocess", "socket", "tempfile", "shutil", "sqlite3"}
# State of the process or of the disk, which the program has of its own.
STATE = {
    "os": "chdir environ getcwd getenv listdir makedirs mkdir putenv remove unlink exists isfile isdir scandir walk",
    "sys": "argv modules path",
}
FILES = {"write_text", "read_text", "write_bytes", "read_bytes"}
PATCHES = {"builtins.input", "builtins.print", "sys.stdin", "sys.stdout"}


def unjudgeable(nodes: Sequence[ast.AST], defined: Iterable[str]) -> str:
    """Why no verdict is possible with tests of these nodes (setup included), or "".

    `defined` are the names of classes that the task gives to every program.
    """
    modules = {"pd": "pandas"}
    known = {*defined, *dir(builtins)}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = getattr(node, "module", None)
            for alias in node.names:
                name = (alias.asname or alias.name).split(".")[0]
                modules[name] = (source or alias.name).split(".")[0]
                known.add(name)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            known.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            known.add(node.id)
    for node in nodes:
        if reason := _reason(node, modules, known):
            return f"the tests {reason}"
    return ""


def _reason(node: ast.AST, modules: dict[str, str], known: set[str]) -> str:
    if isinstance(node, ast.Name) and modules.get(node.id) in MODULES:
        return f"use {modules[node.id]}, which does not work on a program in another process"
    if isinstance(node, ast.Await | ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith):
        return "await something of the program"
    if isinstance(node, ast.ClassDef):
        foreign = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id not in known]
        return f"subclass {foreign[0]}, a class of the program" if foreign else ""
    if isinstance(node, ast.Attribute):
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
        module = modules.get(root.id, "") if isinstance(root, ast.Name) else ""
        if node.attr in STATE.get(module, "").split() or node.attr in FILES:
            return f"use {node.attr}, but the program has files and a process of its own"
    if isinstance(node, ast.Call):
        return _call(node)
    return ""


def _call(node: ast.Call) -> str:
    words = ast.unparse(node.func).split(".")
    if words == ["open"]:
        return "open files, but the program has a folder of its own"
    if "patch" not in words[-2:]:
        return ""
    # patch(target) and patch.object(owner, name)
    at = 1 if words[-1] == "object" else 0
    target = ast.unparse(node.args[at]).strip("'") if len(node.args) > at else "something"
    allowed = {name.split(".")[1] for name in PATCHES} if at else PATCHES
    if words[-1] in ("patch", "object") and target in allowed:
        return ""
    return f"patch {target}, which the program in another process would not see"
