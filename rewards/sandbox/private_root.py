"""A root folder of its own: the interpreter and the system libraries, read-only, and nothing else.

Needs a mount namespace: root with CAP_SYS_ADMIN, or a user namespace.
"""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path

from rewards.sandbox import linux

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
MOUNT_POINTS = ("/mnt", "/media", "/srv", "/opt", "/tmp")


def readable_paths() -> list[str]:
    """What a program may read: system libraries, the interpreter, the installed packages, harmless devices."""
    interpreter = {sys.base_prefix, sys.base_exec_prefix, sys.prefix, *site.getsitepackages()}
    # A prefix of "/" would mean everything; its parts are in SYSTEM.
    wanted = [*SYSTEM, *DEVICES, *(os.path.realpath(path) for path in interpreter), *interpreter]
    return sorted({path for path in wanted if path != "/" and os.path.exists(path)})


def enter_namespaces(as_user: bool) -> None:
    """Move this process into new namespaces without network; with `as_user` through a user namespace.

    Raises:
        OSError: when the kernel, or the container around us, forbids it.
    """
    flags = linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
    if not as_user:
        linux.unshare(flags)
        return
    uid, gid = os.getuid(), os.getgid()
    linux.unshare(flags | linux.CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def build(paths: list[str]) -> None:
    """Replace this process's root by a folder that holds `paths` read-only and an empty /tmp.

    Raises:
        OSError: when a mount is refused; the namespace is then unusable and the process should end.
    """
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    taken = [f"{path}/" for path in paths]
    base = next(point for point in MOUNT_POINTS if os.path.isdir(point) and not any(p.startswith(point) for p in taken))
    linux.mount("tmpfs", base, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    for path in paths:
        _expose(path, Path(base + path))
    os.mkdir(f"{base}/tmp")
    os.chmod(f"{base}/tmp", 0o755)
    linux.make_read_only(base)
    linux.pivot_into(base)


def mount_tmp(megabytes: int, uid: int, gid: int) -> None:
    """A private, size-limited /tmp that vanishes with the namespace of the calling process. Raises OSError."""
    options = f"size={megabytes}m,nr_inodes=4096,mode=700,uid={uid},gid={gid}"
    linux.mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)


def _expose(path: str, target: Path) -> None:
    if target.exists():  # below a folder that is already there
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.islink(path):
        target.symlink_to(os.readlink(path))
        return
    if os.path.isdir(path):
        target.mkdir()
    else:
        target.touch()
    linux.mount(path, str(target), None, linux.MS_BIND | linux.MS_REC)
