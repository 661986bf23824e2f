"""System calls that Python does not wrap, through libc. Nothing here is called on another system than Linux."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from typing import Any

CLONE_THREAD = 0x00010000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 22, 38
CAP_DAC_READ_SEARCH = 1 << 2  # read any file

# name, number on x86_64, number on aarch64 (- = does not exist there). Source: the kernel's unistd headers.
_TABLE = """
clone 56 220; clone3 435 435; fork 57 -; vfork 58 -; execve 59 221; execveat 322 281
socket 41 198; connect 42 203; bind 49 200; listen 50 201; accept 43 202; accept4 288 242
ptrace 101 117; process_vm_readv 310 270; process_vm_writev 311 271; process_madvise 440 440; kcmp 312 272
kill 62 129; tkill 200 130; tgkill 234 131; rt_sigqueueinfo 129 138; rt_tgsigqueueinfo 297 240
pidfd_open 434 434; pidfd_getfd 438 438; pidfd_send_signal 424 424; process_mrelease 448 448
mount 165 40; umount2 166 39; pivot_root 155 41; chroot 161 51; unshare 272 97; setns 308 268
mount_setattr 442 442; move_mount 429 429; open_tree 428 428; fsopen 430 430; fsmount 432 432; fsconfig 431 431
fspick 433 433; name_to_handle_at 303 264; open_by_handle_at 304 265; mknod 133 -; mknodat 259 33
bpf 321 280; perf_event_open 298 241; userfaultfd 323 282; seccomp 317 277; personality 135 92
io_uring_setup 425 425; io_uring_enter 426 426; io_uring_register 427 427
keyctl 250 219; add_key 248 217; request_key 249 218; init_module 175 105; finit_module 313 273
delete_module 176 106; kexec_load 246 104; kexec_file_load 320 294; reboot 169 142; swapon 167 224; swapoff 168 225
syslog 103 116; acct 163 89; quotactl 179 60; quotactl_fd 443 443; sethostname 170 161; setdomainname 171 162
settimeofday 164 170; clock_settime 227 112; adjtimex 159 171; clock_adjtime 305 266
shmget 29 194; msgget 68 186; semget 64 190; mq_open 240 180; memfd_create 319 279; memfd_secret 447 447
fanotify_init 300 262; modify_ldt 154 -; ioperm 173 -; iopl 172 -; vhangup 153 58; lookup_dcookie 212 18
move_pages 279 239; migrate_pages 256 238; prctl 157 167
chmod 90 -; fchmod 91 52; fchmodat 268 53; fchmodat2 452 452; chown 92 -; fchown 93 55; lchown 94 -; fchownat 260 54
utime 132 -; utimes 235 -; futimesat 261 -; utimensat 280 88; file_setattr 469 469
setxattr 188 5; lsetxattr 189 6; fsetxattr 190 7; setxattrat 463 463
truncate 76 45; fallocate 285 47; socketpair 53 199
removexattr 197 14; lremovexattr 198 15; fremovexattr 199 16; removexattrat 466 466
setpriority 141 140; ioprio_set 251 30; prlimit64 302 261; fcntl 72 25; ioctl 16 29
sched_setscheduler 144 119; sched_setparam 142 118; sched_setattr 314 274; sched_setaffinity 203 122
open 2 -; openat 257 56; openat2 437 437; unlink 87 -; unlinkat 263 35; rmdir 84 -
landlock_create_ruleset 444 444; landlock_add_rule 445 445; landlock_restrict_self 446 446
"""


def syscall_numbers(machine: str | None = None) -> dict[str, int]:
    """Numbers by name on this architecture; empty where they are not known."""
    column = {"x86_64": 1, "aarch64": 2}.get(machine or platform.machine())
    if column is None:
        return {}
    rows = [entry.split() for entry in _TABLE.replace("\n", ";").split(";") if entry.strip()]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


NUMBERS = syscall_numbers()
_libc: Any = ctypes.CDLL(None, use_errno=True)
# Looked up once, in the worker, and not again in each process forked from it. None: not Linux.
_syscall: Any = _libc.syscall
_prctl: Any = getattr(_libc, "prctl", None)
_capset: Any = getattr(_libc, "capset", None)


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def syscall(name: str, *args: object) -> int:
    """Call the kernel by name. Raises OSError, also when the number is not known on this architecture."""
    if name not in NUMBERS:
        raise OSError(38, f"{name}: number not known on {platform.machine()}")
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return _check(_syscall(ctypes.c_long(NUMBERS[name]), *words), name)


def prctl(option: int, *args: object) -> None:
    """prctl(2). Raises OSError."""
    words = [ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args]
    padding = [ctypes.c_ulong(0)] * (4 - len(words))
    _check(_prctl(option, *words, *padding), "prctl")


def keep_capabilities(mask: int) -> None:
    """Give up every capability but those in `mask`. Raises OSError."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    effective_permitted_inheritable = (ctypes.c_uint32 * 6)(mask, mask, 0)
    _check(_capset(header, effective_permitted_inheritable), "capset")


def cpu_clock(pid: int) -> float:
    """CPU seconds used by another process so far, all its threads; 0.0 when it is gone."""
    process_clock = (~pid << 3) | 2  # the formula of clock_getcpuclockid(3)
    try:
        return time.clock_gettime(process_clock)
    except OSError:
        return 0.0
