"""Hostile programs against the sandbox, in every isolation this machine can offer: no wrong verdict, no effect outside.

The programs are in sandbox_hostile_programs.py. They run from a process of their own, so that an ordinary user can
be tried too, and so that what they leave behind can be found.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).with_name("sandbox_hostile_programs.py")
NOBODY = 65534
# The worst of them, for isolations that share most of their code with one that faces all.
WORST = ["os._exit in the call", "equal to all", "frames", "forged messages", "ignore signals", "kill the parent"]
WORST += ["memory slowly", "fork bomb", "daemon", "delete files", "disk", "network", "privileges"]
WORST += ["meddle with other processes", "change files without writing"]

# Without namespaces and without the filter, what a user may do to what is his: the report says so.
BY_THE_SAME_USER = ["kill the parent", "meddle with other processes", "change files without writing", "delete files"]

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@pytest.fixture
def surroundings() -> Iterator[tuple[Path, socket.socket]]:
    """A folder and a server that any user may harm; both must be untouched in the end."""
    # Not below tmp_path, which is closed to other users, so nothing could go wrong there.
    folder = Path(tempfile.mkdtemp(prefix="canary_"))
    folder.chmod(0o777)
    (folder / "file").write_text("keep")
    (folder / "file").chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        yield folder, server
    shutil.rmtree(folder)


def judge(
    surroundings: tuple[Path, socket.socket],
    isolation: str,
    without: list[str],
    user: int | None = None,
    only: list[str] | None = None,
    skip: list[str] | None = None,
) -> dict[str, Any]:
    folder, server = surroundings
    owned = [folder, folder / "file", Path(os.__file__)]
    if user is not None:
        for path in owned[:2]:
            os.chown(path, user, user)
    states = [_state(path) for path in owned]
    before = set(Path(tempfile.gettempdir()).glob("sandbox_*"))
    options: dict[str, Any] = {"isolation": isolation, "without": without, "canary": str(folder)}
    options |= {"port": server.getsockname()[1], "only": only, "skip": skip or []}
    process = subprocess.Popen(
        [sys.executable if user is None else _open_interpreter(), str(PROGRAMS), json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    output, errors = process.communicate(timeout=250)
    if "no bubblewrap" in errors or "no namespaces" in errors:
        pytest.skip(errors.strip().splitlines()[-1])
    assert process.returncode == 0, errors
    report: dict[str, Any] = json.loads(output)
    assert report["wrong"] == []
    assert report["programs"] >= (len(only) if only else 100) - len(skip or [])
    assert "worker was replaced" not in errors  # no program brought its worker down
    assert [_state(path) for path in owned] == states
    _nothing_happened(folder, server, process.pid)
    assert set(Path(tempfile.gettempdir()).glob("sandbox_*")) <= before
    return report


def _state(path: Path) -> tuple[object, ...]:
    stat = path.stat()
    return stat.st_mode, stat.st_uid, stat.st_gid, stat.st_mtime_ns, stat.st_nlink, tuple(os.listxattr(path))


def _open_interpreter() -> str:
    """An interpreter that an ordinary user may run: this one, or the system's."""
    folders = [Path(sys.base_prefix), *Path(sys.base_prefix).parents, PROGRAMS.parent]
    if all(folder.stat().st_mode & 0o005 == 0o005 for folder in folders):
        return sys.executable
    for name in ("/usr/bin/python3.13", "/usr/bin/python3.12", "/usr/bin/python3.11"):
        if os.path.exists(name):
            return name
    pytest.skip("no interpreter of Python 3.11 or later that another user may run")


def _nothing_happened(folder: Path, server: socket.socket, owner: int) -> None:
    with pytest.raises(TimeoutError):
        server.accept()
    assert [entry.name for entry in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == "keep"
    assert not Path(os.__file__).with_name("sandbox_was_here.py").exists()
    deadline = time.monotonic() + 5
    while left := _processes_of(owner):
        assert time.monotonic() < deadline, f"processes left behind: {left}"
        time.sleep(0.1)


def _processes_of(owner: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if f'"owner": {owner}}}'.encode() in line:
            found.append(path.parent.name)
    return found


def test_all_programs_in_the_strongest_isolation(surroundings: tuple[Path, socket.socket]) -> None:
    """Defect W7: a program that exits while it is imported, or in the call, passes all its tests."""
    report = judge(surroundings, "auto", [])
    assert report["slowest"] < 20


def test_all_programs_without_namespaces(surroundings: tuple[Path, socket.socket]) -> None:
    """What most containers allow: a user id per process, Landlock, seccomp."""
    judge(surroundings, "process", [])


@as_root
@pytest.mark.parametrize(
    ("isolation", "without", "skip"),
    [
        ("namespaces", ["real_root"], []),
        # Landlock alone governs neither the network nor attributes of files open to everybody.
        ("process", ["seccomp"], ["network", "change files without writing"]),
        ("bubblewrap", [], []),
    ],
)
def test_worst_programs_with_one_layer_less(
    surroundings: tuple[Path, socket.socket], isolation: str, without: list[str], skip: list[str]
) -> None:
    judge(surroundings, isolation, without, only=WORST, skip=skip)


@as_root
@pytest.mark.parametrize(
    ("isolation", "without", "skip"),
    [
        ("namespaces", [], []),
        ("process", [], []),
        ("process", ["seccomp"], ["network", *BY_THE_SAME_USER]),
    ],
)
def test_worst_programs_for_an_ordinary_user(
    surroundings: tuple[Path, socket.socket], isolation: str, without: list[str], skip: list[str]
) -> None:
    report = judge(surroundings, isolation, without, user=NOBODY, only=WORST, skip=skip)
    assert not any("user id for each" in layer for layer in report["layers"])
