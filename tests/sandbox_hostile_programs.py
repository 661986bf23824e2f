"""Programs that try to pass without solving, or to do harm. Run as a program by test_sandbox_hostile.py.

    python tests/sandbox_hostile_programs.py '{"isolation": "auto", "canary": "/folder", "port": 1234, "socket": "/a"}'

Every program faces tests that only the secret answers, so whatever passes is a wrong verdict. Honest ones
follow in the same workers and must pass. Prints one JSON object: the report, the wrong verdicts, the slowest run.
Only the standard library: an ordinary user's interpreter may have nothing else.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rewards.sandbox import CodeSandbox, Limits, Program, RunResult  # noqa: E402

LIMITS = Limits(cpu_seconds=0.3, wall_seconds=2.0, memory_mb=256, output_kb=256, tmp_mb=16, max_threads=16)
SLACK_SECONDS = 12.0  # on a busy machine, over the wall limit
MARK = "secret-"
SECRET = MARK + secrets.token_hex(8)
SEARCH = "MARK = 'sec' + 'ret-'\n"  # so that a search does not find itself

# Each defines f (or should), and is judged by TESTS.
CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "exit builtin": "exit()",
    "raise SystemExit": "raise SystemExit",
    "os._exit": "import os; os._exit(0)",
    "exit in the call": "import sys\ndef f(x): sys.exit(0)",
    "os._exit in the call": "import os\ndef f(x): os._exit(0)",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "AssertionError": "def f(x): raise AssertionError",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)",
    "equal to all": "class A:\n  def __eq__(s, o): return True\n  __hash__ = object.__hash__\ndef f(x): return A()",
    "str equal to all": "class A(str):\n  def __eq__(s, o): return True\n  __hash__ = None\ndef f(x): return A('x')",
    "class equal to all": """
class M(type):
  def __eq__(s, o): return True
class A(metaclass=M): pass
def f(x): return A""",
    "f is a class": "class f:\n  def __init__(s, *a): pass\n  def __eq__(s, o): return True",
    "list equal to all": "class A(list):\n  def __eq__(s, o): return True\ndef f(x): return A()",
    "tuple equal to all": """
from collections import namedtuple
class A(namedtuple('A', 'x')):
    def __eq__(s, o): return True
def f(x): return A(1)""",
    "patch builtins": """
import builtins
for name in ('isinstance', 'AssertionError', 'compile', 'exec', 'print', '__import__', 'all', 'type', 'str'):
    setattr(builtins, name, lambda *a, **k: True)
def f(x): return True""",
    "patch our modules": """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith('rewards') or name in ('json', 'operator', 'ast'):
        for key in list(vars(module)):
            if not key.startswith('__') and callable(vars(module)[key]) and key not in ('send_frame', 'receive_frame'):
                try: setattr(module, key, lambda *a, **k: '')
                except Exception: pass
def f(x): return ''""",
    "patch the checker": """
import rewards.sandbox.checker as c
c.Link.run = lambda *a: ''; c.check = c.verdict = lambda *a, **k: ''
def f(x): return ''""",
    "patch the connection": """
import rewards.sandbox.program as p
old = p.send_frame
p.send_frame = lambda fd, message: old(fd, ['test', True, ''])
def f(x): return 1""",
    "trace": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef f(x): return 1",
    "frames": SEARCH
    + """
import gc, sys
def f(x):
    seen = []
    frame = sys._getframe()
    while frame:
        seen += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    for thing in seen + gc.get_objects() + [vars(m) for m in list(sys.modules.values()) if hasattr(m, '__dict__')]:
        text = repr(thing)[:20000]
        if MARK in text.replace(repr(MARK), ''):
            at = text.replace(repr(MARK), '').index(MARK)
            return text.replace(repr(MARK), '')[at:at + 23]""",
    "own memory": SEARCH
    + """
import ctypes
def f(x):
    for thing in (object(), [], 'x' * 100, {}, b'y' * 600):
        start = id(thing) & ~((1 << 18) - 1)
        data = ctypes.string_at(start, 1 << 18)
        at = data.find(MARK.encode())
        while at >= 0:
            found = data[at:at + 23].decode('ascii', 'replace')
            if len(found) == 23 and found[7:].isalnum(): return found
            at = data.find(MARK.encode(), at + 1)""",
    "descriptors": SEARCH
    + """
import os
def f(x):
    for fd in range(5, 64):
        try: data = os.read(fd, 1 << 16)
        except OSError: continue
        if MARK.encode() in data: return data[data.index(MARK.encode()):][:23].decode()""",
    "other processes": SEARCH
    + """
import os
def f(x):
    for pid in ['self', 'thread-self', 1, os.getppid()] + list(range(max(2, os.getpid() - 20), os.getpid() + 20)):
        for name in ('mem', 'environ', 'cmdline', 'fd/0', 'fd/3', 'fd/4', 'maps', 'root/etc/passwd'):
            try: data = open(f'/proc/{pid}/{name}', 'rb').read(1 << 16)
            except (OSError, ValueError, OverflowError): continue
            if MARK.encode() in data: return data[data.index(MARK.encode()):][:23].decode()""",
    "files": SEARCH
    + """
import os
def f(x):
    for top in ('CANARY', '/proc', '/tmp', '/home', '/var', '/root'):
        for path, folders, names in os.walk(top):
            for name in names[:50]:
                try: data = open(os.path.join(path, name), 'rb').read(1 << 14)
                except OSError: continue
                if MARK.encode() in data: return data[data.index(MARK.encode()):][:23].decode()""",
    "forged messages": """
import os, struct
def send(fd, text):
    try: os.write(fd, struct.pack('<I', len(text)) + text.encode())
    except OSError: pass
for fd in [*range(3, 64)]:
    for text in ('["begin",2]', '["test",true,""]', '["test",true,""]', '["done"]'): send(fd, text)
def f(x): return 1""",
    "answers in advance": """
import os, struct
for text in ['["ok",["f"]]'] + ['["ok",true,{},""]'] * 50:
    os.write(4, struct.pack('<I', len(text)) + text.encode())
def f(x): return 1""",
    "strange answers": """
import os, struct
for text in ('["ok",["f"]]', '["ok",{"t":"handle","v":0}]', '["ok",{"t":"callback","v":0},{},""]', '["ok"]', '7', '[]',
             '["ok",{"t":"type","v":"object"},{"-1":[]},5]', '["raise"]', '["stop",1]', '["callback",0,[]]', '{}'):
    os.write(4, struct.pack('<I', len(text)) + text.encode())""",
    "deep answer": """
import os, struct
text = '["ok",["f"]]'
os.write(4, struct.pack('<I', len(text)) + text.encode())
text = '[' * 2000000 + ']' * 2000000
data = struct.pack('<I', len(text)) + text.encode()
while data: data = data[os.write(4, data):]""",
    "endless answer": "import os\nos.write(4, b'\\xff\\xff\\xff\\x03')\nwhile True: os.write(4, b' ' * 65536)",
    "no answer": "import time\ntime.sleep(1e6)",
    "names that lie": """
class N(str):
  def __eq__(s, o): return True
  __hash__ = str.__hash__
globals()[N('g')] = 1""",
    "no names": "globals().clear()",
    "close everything": "import os\nos.closerange(0, 100)\ndef f(x): return 1",
    "redirect the connection": "import os\nos.dup2(1, 4)\ndef f(x): return 1",
    "exception that lies": """
class E(Exception):
    @property
    def args(self): raise ValueError
    def __str__(self): raise ValueError
def f(x): raise E""",
    "exception named SystemExit": "class SystemExit(Exception): pass\ndef f(x): raise SystemExit",
    "recursion": "def f(x): return f(x)",
    "deep data": "def f(x):\n  a = []\n  for i in range(100000): a = [a]\n  return a",
    "circular data": "def f(x):\n  a = []\n  a.append(a)\n  return a",
    "stack overflow": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return eval('f(x)', globals(), {'x': x})",
    "syntax error": "def f(x) return 1",
    "null byte": "x = '\0'",
    "deep source": "x = " + "(" * 50000 + ")" * 50000,
    "lone surrogate": "x = '\ud800'",
    "crash": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "suspend": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass",
    "kill the parent": """
import os, signal
for pid in (os.getppid(), 1, -1, 0, os.getppid() - 1):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
def f(x): return 1""",
    "ignore signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "loop": "while True: pass",
    "loop in the call": "def f(x):\n  while True: pass",
    "loop that catches": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "loop in a thread": """
import threading
threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()
while 1: pass""",
    "loop at exit": "import atexit\n@atexit.register\ndef g():\n  while True: pass\nraise SystemExit",
    "endless generator": "def f(x):\n  while True: yield x",
    "endless output": "while True: print('x' * 10000)",
    "endless errors": "import sys\nwhile True: print('x' * 10000, file=sys.stderr)",
    "endless output in the call": "def f(x):\n  while True: print('x' * 10000)",
    "memory": "x = bytearray(10**11)",
    "memory slowly": "x = []\nwhile True: x.append(bytearray(10**7))",
    "memory in the checker": "def f(x): return [0] * (3 * 10**7)",
    "memory by mapping": "import mmap\nx = [mmap.mmap(-1, 10**7) for _ in range(10**5)]",
    "memory in files": """
import ctypes, os
kept = []
while True:
    kept.append(os.memfd_create('x'))
    os.write(kept[-1], bytes(10**7))""",
    "disk": """
import os
for i in range(10**6):
    with open(f'x{i}', 'wb') as file:
        for _ in range(16): file.write(os.urandom(10**6))""",
    "deep folders": """
import os
for i in range(200):
    os.chdir(os.environ['HOME'])
    for j in range(400):
        os.mkdir(f'x{i}'); os.chdir(f'x{i}')
def f(x): return 1""",
    "deeper and deeper": "import os\nwhile True: os.mkdir('x'); os.chdir('x')",
    "many folders": "import os\nfor i in range(10**9): os.mkdir(f'x{i}')",
    "closed folders": """
import os
for i in range(100):
    os.mkdir(f'x{i}', 0)
    os.makedirs(f'y{i}/z/z')
    os.symlink('CANARY', f'y{i}/link')
def f(x): return 1""",
    "disk at once": """
import os
kept = []
for i in range(40):
    kept.append(os.open(f'x{i}', os.O_CREAT | os.O_RDWR))
    try: os.posix_fallocate(kept[-1], 0, 16 << 20)
    except OSError: pass
while True: pass""",
    "disk out of sight": """
import mmap, os
kept = []
for i in range(10**6):
    if i % 2: fd = os.open('x', os.O_CREAT | os.O_RDWR)
    else:
        try: fd = os.open('.', os.O_TMPFILE | os.O_RDWR)
        except OSError: continue
    for _ in range(16): os.write(fd, bytes(10**6))
    kept.append(mmap.mmap(fd, 4096))
    os.close(fd)
    for action in (lambda: os.unlink('x'), lambda: os.rename('x', 'y')):
        try: action()
        except OSError: pass""",
    "write anywhere": """
import os
for top, folders, names in os.walk('/'):
    if top.count('/') > 4: folders.clear()
    if top.startswith((os.environ['HOME'], '/proc')): continue
    try: os.mkdir(os.path.join(top, 'sandbox_was_here'))
    except OSError: continue
    open('/dev/null/' + top)
def f(x): return 1""",
    "fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "raw fork bomb": """
import ctypes
libc = ctypes.CDLL(None)
while True:
  for n in (56, 57, 58, 435, 220): libc.syscall(n, 17, 0, 0, 0, 0)""",
    "thread bomb": """
import threading, time
while True:
  try: threading.Thread(target=time.sleep, args=(9,)).start()
  except RuntimeError: pass""",
    "subprocess": """
import subprocess
print(subprocess.run(['/bin/sh', '-c', 'echo x > CANARY/made']))""",
    "os.system": "import os\nos.system('echo x > CANARY/made')",
    "multiprocessing": "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
    "daemon": """
import os, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                try: open('CANARY/alive', 'a').write('x')
                except OSError: pass
                time.sleep(0.05)
        os._exit(0)
except OSError: pass
def f(x): return 1""",
    "delete files": """
import os, shutil
for action in (lambda: os.remove('CANARY/file'), lambda: open('CANARY/file', 'w').close(),
               lambda: os.chmod('CANARY', 0),
               lambda: os.rename('CANARY/file', 'CANARY/gone'), lambda: shutil.rmtree('CANARY'),
               lambda: os.symlink('CANARY/file', 'CANARY/link'), lambda: open('CANARY/made', 'w').close(),
               lambda: open(os.path.dirname(os.__file__) + '/sandbox_was_here.py', 'w').close(),
               lambda: os.truncate('CANARY/file', 0), lambda: os.mkdir('CANARY/folder'),
               lambda: (os.symlink('CANARY', 'way'), open('way/made', 'w'))):
    try: action()
    except OSError: pass
def f(x): return 1""",
    "meddle with other processes": """
import fcntl, os, resource, signal, socket
read, write = os.pipe()
one, two = socket.socketpair()
for pid in {os.getppid(), *range(max(2, os.getppid() - 40), os.getppid() + 40)} - {os.getpid()}:
    for action in (lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0)), lambda: os.setpriority(0, pid, 19),
                   lambda: os.sched_setaffinity(pid, {0}), lambda: os.kill(pid, signal.SIGKILL),
                   lambda: (fcntl.fcntl(read, fcntl.F_SETOWN, pid), fcntl.fcntl(read, fcntl.F_SETSIG, signal.SIGKILL),
                            fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC), os.write(write, b'x')),
                   lambda: (fcntl.ioctl(one, 0x8901, pid.to_bytes(4, 'little')), two.send(b'x'))):
        try: action()
        except (OSError, AttributeError): pass
def f(x): return 1""",
    "change files without writing": """
import os, shutil
paths = ['CANARY', 'CANARY/file', os.__file__]
for path in paths:
    for action in (lambda: os.chmod(path, 0), lambda: os.chown(path, 12345, 12345), lambda: os.utime(path, (1, 1)),
                   lambda: os.setxattr(path, 'user.x', b'x'), lambda: os.link(path, 'CANARY/made'),
                   lambda: os.fchmod(os.open(path, os.O_RDONLY), 0), lambda: os.utime(os.open(path, 0), (1, 1))):
        try: action()
        except OSError: pass
def f(x): return 1""",
    "network": """
import socket
for family, kind, address in ((socket.AF_INET, socket.SOCK_STREAM, ('127.0.0.1', PORT)),
                              (socket.AF_INET6, socket.SOCK_STREAM, ('::1', PORT)),
                              (socket.AF_INET, socket.SOCK_DGRAM, ('127.0.0.1', PORT))):
    try:
        s = socket.socket(family, kind); s.connect(address); s.sendall(b'hello')
    except OSError: pass
import urllib.request
try: urllib.request.urlopen('http://127.0.0.1:PORT/')
except OSError: pass
def f(x): return 1""",
    "socket pair": """
import socket
for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
    try: one, two = socket.socketpair(socket.AF_UNIX, kind)
    except OSError: continue
    for action in (lambda: one.sendto(b'hello', 'SOCKET'), lambda: one.sendmsg([b'hello'], [], 0, 'SOCKET'),
                   lambda: one.connect('SOCKET'), lambda: one.send(b'hello')):
        try: action()
        except OSError: pass
def f(x): return 1""",
    "privileges": """
import ctypes, os, resource
libc = ctypes.CDLL(None)
for action in (lambda: os.setuid(0), lambda: os.setgroups([0]), lambda: os.chroot('.'),
               lambda: libc.unshare(0x10000000),
               lambda: libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), lambda: libc.umount2(b'/tmp', 2),
               lambda: libc.ptrace(16, os.getppid(), 0, 0), lambda: libc.prctl(1, 0), lambda: libc.prctl(4, 1),
               lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)), lambda: os.nice(-20),
               lambda: resource.setrlimit(resource.RLIMIT_NPROC, (-1, -1)), lambda: os.mknod('x', 0o60666, 2049)):
    try: action()
    except (OSError, ValueError): pass
assert os.getuid() != 0
x = bytearray(10**9)""",
}
TESTS = [f"assert f(2) == {SECRET!r}", f"assert {SECRET!r} == f(2)", f"assert f(lambda: 1)[:7] == {SECRET!r}[:7]"]

# name: (code, tests) for cheats that need tests of a certain form.
CHEATS_ON = {
    "number that lies": (
        "class N:\n  def __sub__(s, o): return 0.0\n  __rsub__ = __sub__\n  def __abs__(s): return 0.0\n"
        "  def __lt__(s, o): return True\n  __gt__ = __le__ = __ge__ = __lt__\ndef f(x): return N()",
        ["assert abs(f(2) - 3.25) < 1e-6", "assert 3 < f(2) < 4", "import math\nassert math.isclose(f(1), 3.25)"],
    ),
    "container that lies": (
        "class C:\n  def __contains__(s, o): return True\n  def __getitem__(s, i): return s\n"
        "  def __iter__(s): return iter([])\n  def __len__(s): return 1\ndef f(x): return C()",
        ["assert 17 in f(2)", "assert f(2)[0] == 17", "assert sorted(f(2)) == [17]", "assert set(f(2)) == {17}"],
    ),
    "truth that lies": (
        "def f(x): return lambda: 0",
        ["assert f(2) is True", "assert f(2) == True", "assert f(2)() == 1"],
    ),
    "end of a loop": (
        "def f(x): raise StopIteration",
        ["for got, want in zip(map(f, [1, 2]), [3, 4]): assert got == want", "assert all(v == 1 for v in map(f, [1]))"],
    ),
    "redefined builtins": (
        "abs = round = len = sum = lambda *a: 0\nall = any = isinstance = lambda *a: True\n"
        "sorted = list = set = str = tuple = lambda *a: 'same'\nAssertionError = Exception\ndef f(x): return 9",
        [
            "assert abs(f(2) - 3.25) < 1e-6",
            "assert sorted(f([2])) == [17]",
            "assert set(f(2)) == {17}",
            "assert all([f(2) == 1])",
            "assert str(f(2)) == '1'",
            "assert isinstance(f(2), str)",
        ],
    ),
    "redefined modules": (
        "import operator, unittest.mock\nmath = unittest.mock\nnp = unittest.mock\nisclose = lambda *a: True\n"
        "class ANY:\n  def __eq__(s, o): return True\nCounter = lambda *a: ANY()\ndef f(x): return 9",
        [
            "assert math.isclose(f(2), 3.25)",
            "import math\nassert math.isclose(f(2), 3.25)",
            "from collections import Counter\nassert Counter([f(2)]) == Counter([1])",
        ],
    ),
    "caught exit": ("def f(x): exit()", ["try:\n  f(2)\nexcept BaseException: pass"]),
    "caught death": ("import os\ndef f(x): os._exit(0)", ["try:\n  f(2)\nexcept BaseException: pass"]),
    "empty array": (
        "try:\n  import numpy as np\n  f = lambda x: np.array([])\nexcept ImportError: f = lambda x: []",
        ["g = f(2)\nassert len(g) != 1 and (g == 3.25).all()"],
    ),
    "changed arguments": (
        "def f(x): x[:] = [[1, 2]] * len(x); return x",
        ["want = [[3]]\ngiven = [list(w) for w in want]\nassert f(given) == want"],
    ),
}

# name: (code, input, wanted output) for cheats on standard output.
SCRIPTS = {
    "silent exit": ("import sys; sys.exit(0)", "1", "2"),
    "claims": ("print('All tests passed'); print('OK'); print('[\"test\", true, \"\"]')", "1", "2"),
    "os._exit before the flush": ("import os\nprint(input())\nos._exit(0)", "2", "2"),
    "right, then crash": ("print(2, flush=True)\nraise ValueError", "1", "2"),
    "right, then endless": ("print(2, flush=True)\nwhile True: pass", "1", "2"),
    "right, then too much": ("print(2, flush=True)\nwhile True: print(' ' * 9999)", "1", "2"),
    "right, exit code": ("print(2)\nexit(3)", "1", "2"),
    "search for the output": (
        SEARCH + "import gc\nprint([o for o in gc.get_objects() if MARK in repr(o)[:9999]][:1])",
        "1",
        SECRET,
    ),
}

HONEST = [
    (Program("def f(x): return [x, {x: (x, None)}]", tests=["assert f(2) == [2, {2: (2, None)}]"]), ""),
    (Program("import sys\nprint(sum(map(int, sys.stdin.read().split())))", stdin="1 2 3"), "6\n"),
]


def cases(canary: str, port: int, path: str) -> dict[str, tuple[Program, str | None]]:
    """Programs by name; the text is the output a script must not produce."""
    found: dict[str, tuple[Program, str | None]] = {}
    for name, code in CHEATS.items():
        found[name] = Program(code, tests=TESTS), None
    for name, (code, tests) in CHEATS_ON.items():
        for number, test in enumerate(tests):
            found[f"{name} {number}"] = Program(code, tests=[test]), None
    for name, (code, stdin, wanted) in SCRIPTS.items():
        found[name] = Program(code, stdin=stdin), wanted
    values = {"CANARY": canary, "PORT": str(port), "SOCKET": path}
    for name, (program, wanted) in found.items():
        code = program.code
        for word, value in values.items():
            code = code.replace(word, value)
        found[name] = Program(code, program.stdin, program.tests), wanted
    return found


def passed(result: RunResult, wanted: str | None) -> bool:
    """Whether the program got anything out of it: a single test is too much."""
    if wanted is None:
        return any(test.passed for test in result.tests)
    return result.status == "ok" and result.stdout.split() == wanted.split()


def main() -> None:
    options = json.loads(sys.argv[1])
    only = options.get("only")
    wrong, slowest = [], 0.0
    with CodeSandbox(max_workers=2, limits=LIMITS, isolation=options["isolation"]) as sandbox:
        report = sandbox.describe()
        programs = cases(options["canary"], options["port"], options["socket"])
        names = list(only or programs)
        start = time.monotonic()
        results = sandbox.run([programs[name][0] for name in names])
        for name, result in zip(names, results, strict=True):
            slowest = max(slowest, result.wall_seconds)
            if passed(result, programs[name][1]) or not result.has_verdict:
                wrong.append(f"{name}: {result}"[:600])
            if result.wall_seconds > LIMITS.wall + SLACK_SECONDS:
                wrong.append(f"{name}: took {result.wall_seconds:.1f} s")
        sandbox.limits = Limits()
        for program, output in HONEST * 3:
            (result,) = sandbox.run([program])
            if not (result.passed or (output and result.stdout == output)):
                wrong.append(f"honest: {result}"[:600])
        total = time.monotonic() - start
    summary = {"isolation": report.isolation, "layers": report.layers, "missing": report.missing, "wrong": wrong}
    print(json.dumps({**summary, "programs": len(names), "slowest": slowest, "seconds": total}))


if __name__ == "__main__":
    main()
