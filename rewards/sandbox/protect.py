"""Find out, once per worker, which protections this machine allows, and set up what all programs share."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from rewards.sandbox import landlock, linux, private_root, syscall_filter
from rewards.sandbox.confine import FIRST_UID, Layers

FORBIDDEN_PATH = "/proc/self/status"  # exists, harmless, and never among the readable paths


@dataclass
class Protection:
    """What one worker has to offer.

    Attributes:
        layers: what each program's process must apply.
        names: the layers in words, strongest first.
        missing: what is not there, one line each.
        folder: where temporary folders of programs are made; "" when each has its own /tmp.
        proc: descriptor of the /proc folder, which a private root does not hold.
    """

    layers: Layers
    names: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    folder: str = ""
    proc: int = -1


def protect(isolation: str, without: Collection[str] = ()) -> Protection:
    """Set this process up as a worker.

    Args:
        isolation: "namespaces", "bubblewrap" (this process is already inside it) or "process".
        without: layers to leave out, for tests: "real_root", "own_uid", "landlock", "seccomp".

    Raises:
        OSError: when `isolation` is not possible here; try the next one in a new process.
    """
    if sys.platform != "linux":
        raise OSError(f"the local sandbox is made of features of Linux, this is {sys.platform}; use a remote one")
    found = Protection(Layers(private_root.readable_paths()), proc=os.open("/proc", os.O_PATH | os.O_CLOEXEC))
    found.layers.num_tasks = _count_tasks(os.getuid())
    many_ids = os.geteuid() == 0 and "real_root" not in without
    if isolation == "namespaces":
        many_ids = _enter_private_root(found, many_ids)
    elif isolation == "bubblewrap":
        found.names.append("own pid, mount, net, ipc, uts and user namespaces, read-only files")
        many_ids = False
    # Other processes of the same user may not look into this one. Not sooner: it also closes our own /proc/self.
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    if many_ids and "own_uid" not in without:
        found.layers.own_uid = not attempt(lambda: os.setresuid(FIRST_UID, FIRST_UID, FIRST_UID))
    if found.layers.own_uid:
        found.layers.num_tasks = 0
        found.names.append("a user id for each process")
    problem = "left out" if "seccomp" in without else attempt(_try_filter)
    found.layers.seccomp = not problem
    if os.getuid() == 0 and not found.layers.own_uid and problem:
        raise OSError(
            f"nothing would stop a fork bomb of root: no user id to give away, no system call filter ({problem})"
        )
    if not found.layers.private_root:
        _protect_files(found, isolation, without)
        if not found.layers.own_uid and isolation == "process":
            found.missing.append(f"programs run under this process's user id ({os.getuid()})")
    if found.layers.seccomp:
        found.names.append("seccomp (no new process, program, socket; no signal to others)")
    else:
        found.missing.append(f"no system call filter ({problem}): programs may start others, signal, change modes")
        if isolation == "process":
            found.missing.append("the network is within a program's reach")
    found.names.append("resource limits")
    if not found.layers.private_root:
        found.folder = tempfile.mkdtemp(prefix="sandbox_")  # last, when nothing can fail any more
        os.chmod(found.folder, 0o711)
    return found


def attempt(action: Callable[[], object]) -> str:
    """Try something irreversible in a throwaway process; "" when it worked, else the reason in one line."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        reason = ""
        try:
            action()
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
        os.write(write, reason.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        reason = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return reason or ("" if status == 0 else f"ended with status {status}")


def _enter_private_root(found: Protection, as_root: bool) -> bool:
    """Returns whether user ids can still be given away."""
    try:
        if not as_root:
            raise PermissionError
        private_root.enter_namespaces(as_user=False)
    except PermissionError:
        private_root.enter_namespaces(as_user=True)
        as_root = False  # a user namespace made without privilege maps a single id
    private_root.build(found.layers.readable)
    found.layers.private_root = True
    found.names.append("own pid, mount, net, ipc and uts namespaces" + ("" if as_root else ", in a user namespace"))
    found.names.append("root folder with the interpreter only, read-only")
    return as_root


def _protect_files(found: Protection, isolation: str, without: Collection[str]) -> None:
    def read_a_forbidden_file() -> None:
        landlock.restrict(found.layers.readable, [tempfile.gettempdir()])
        try:
            open(FORBIDDEN_PATH).close()
        except PermissionError:
            return
        raise OSError("Landlock does not hold")

    problem = "left out" if "landlock" in without else attempt(lambda: _unprivileged(read_a_forbidden_file))
    found.layers.landlock = not problem
    if found.layers.landlock:
        found.names.append("Landlock (no files but the interpreter and a temporary folder)")
    else:
        where = "in bubblewrap's folders" if isolation == "bubblewrap" else "open to the program's user id"
        found.missing.append(f"no Landlock ({problem}): a program can write without limit to files {where}")
    if found.layers.own_uid and attempt(_read_interpreter_as_stranger):
        found.layers.read_all = found.layers.landlock and found.layers.seccomp
        if not found.layers.read_all:
            found.missing.append(f"{sys.base_prefix} is closed to other users: programs import preloaded modules only")


def _unprivileged(action: Callable[[], None]) -> None:
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    action()


def _try_filter() -> None:
    program = syscall_filter.filter_program(os.getpid())
    _unprivileged(lambda: syscall_filter.install(program))
    try:
        os.kill(os.getppid(), 0)
    except PermissionError:
        return
    raise OSError("the filter does not hold")


def _read_interpreter_as_stranger() -> None:
    os.setresuid(FIRST_UID, FIRST_UID, FIRST_UID)
    os.listdir(os.path.dirname(os.__file__))


def _count_tasks(uid: int) -> int:
    count = 0
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == uid:
                count += len(os.listdir(f"/proc/{entry}/task"))
        except OSError:  # it ended meanwhile
            continue
    return count
