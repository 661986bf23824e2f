"""Reward processes against hostile rewards: the trainer goes on, others keep their scores, nothing is left behind."""

import glob
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from rewards import RewardFailureError, RewardPart, RewardRunner
from rewards.child import TOKEN_VARIABLE, WorkerLostError, processes_with_token
from rewards.jobs import Batch, Job

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="process hygiene is checked through /proc")

HOSTILE = """
import ctypes, os, signal, sys, time

KEPT = []

def write_pid(path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\\n")

def act(word, path):
    if word == "sleep":
        if path:
            write_pid(path)
        time.sleep(600)
    if word == "spin":
        while True:
            pass
    if word == "deaf":  # ignores what can be ignored
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGXCPU):
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    if word == "os._exit":
        os._exit(0)
    if word == "sys.exit":
        sys.exit(0)
    if word == "abort":
        os.abort()
    if word == "segfault":
        ctypes.string_at(0)
    if word == "kill parent group":
        os.killpg(0, signal.SIGKILL)
    if word == "print":
        line = "x" * 2**20
        for _ in range(1024):
            print(line)
        os.write(1, line.encode())
        os.write(2, line.encode())
    if word == "fork":
        os.fork()  # both return
    if word == "fork and raise":
        if os.fork() == 0:
            raise ValueError("the child of a reward")
    if word == "fork storm":
        for _ in range(150):
            if os.fork() == 0:
                time.sleep(600)
        time.sleep(600)
    if word == "daemon":
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                write_pid(path)
                time.sleep(600)
            os._exit(0)
        os.wait()
        while not os.path.exists(path):
            time.sleep(0.01)
    if word == "memory":
        KEPT.append(bytearray(8 * 2**30))
    if word == "garbage":  # into every descriptor it can find
        for number in map(int, os.listdir("/proc/self/fd")):
            if number < 3:
                continue
            try:
                os.write(number, b"\\xff" * 100)
            except OSError:
                pass
    if word == "close":
        os.closerange(0, 65536)  # the socket keeps the number it had in the trainer, which may be high
    if word == "raise":
        raise RuntimeError("broken reward")
    if word == "recursion":
        act(word, path)

def reward(prompts, completions, path="", **columns):
    for word in completions:
        act(word, path)
    return [float(os.getpid() > 0)] * len(completions)

def leak(prompts, completions, megabytes=150, **columns):
    KEPT.append(bytearray(megabytes * 2**20))
    return [float(os.getpid())] * len(completions)

def litter(prompts, completions, **columns):
    for _ in completions:
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)
    return [float(os.getpid())] * len(completions)

def pid(prompts, completions, **columns):
    return [float(os.getpid())] * len(completions)

def slow_import_state(prompts, completions, **columns):
    return [float("torch" in sys.modules)] * len(completions)
"""


@pytest.fixture
def hostile(tmp_path):
    path = tmp_path / "hostile.py"
    path.write_text(textwrap.dedent(HOSTILE))
    return path


def tokens(runner):
    return [child.token for child in runner._pool._children]


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def stops(pid, seconds=10.0):
    """A killed process needs a moment to go."""
    until = time.monotonic() + seconds
    while running(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not running(pid)


# word -> part of the reason, None where the completion keeps its score
WORDS = {
    "sleep": "timeout after 1.5 s",
    "spin": "timeout",
    "deaf": "timeout",
    "os._exit": "exited with code 0",
    "sys.exit": "SystemExit",
    "abort": "died of SIGABRT",
    "segfault": "died of SIGSEGV",
    "kill parent group": "died of SIGKILL",
    "print": None,
    "fork": None,
    "fork and raise": None,
    "fork storm": "processes running",
    "memory": "MemoryError",
    "garbage": "answer",
    "close": "",
    "raise": "RuntimeError: broken reward",
    "recursion": "RecursionError",
}


def test_every_hostile_word_costs_only_its_own_score(hostile, capfd):
    started = time.monotonic()
    with RewardRunner(
        [RewardPart(f"{hostile}:reward")],
        mode="process",
        num_workers=2,
        timeout_seconds=2.5,
        max_failure_share=1.0,
        memory_mb=2048,
    ) as runner:
        # A storm takes a moment to be counted; only the sleepers need the timeout itself.
        runner._pool.timeout_seconds = 1.5
        for word, reason in WORDS.items():
            if word == "fork storm":
                runner._pool.timeout_seconds = 20.0
            table = runner.score([""] * 6, ["fine", "fine", word, "fine", "fine", "fine"])
            runner._pool.timeout_seconds = 1.5
            others = table.values[:2] + table.values[3:]
            assert others == [1.0] * 5, (word, table.parts["reward"])
            score = table.parts["reward"][2]
            if reason is None:
                assert score.value == 1.0, (word, score)
            else:
                assert score.failed, word
                assert reason in score.reason, (word, score.reason)
            assert runner.score([""] * 4, ["fine"] * 4).values == [1.0] * 4, f"not healthy after {word}"
        left = tokens(runner)
    assert [processes_with_token(token) for token in left] == [[], []]
    assert time.monotonic() - started < 240
    # Of two gigabytes printed, 64 KiB per worker process were shown.
    shown = capfd.readouterr()
    assert len(shown.out) == 0
    assert 60_000 < len(shown.err) < 20 * 70_000
    assert "further output dropped" in shown.err


def test_a_daemon_dies_with_the_runner(hostile, tmp_path):
    path = tmp_path / "daemon_pid"
    part = RewardPart(f"{hostile}:reward", params={"path": str(path)})
    with RewardRunner([part], mode="process") as runner:
        assert runner.score([""], ["daemon"]).values == [1.0]
        daemon = int(path.read_text())
        assert running(daemon)
    assert stops(daemon)


def test_a_daemon_of_a_crashed_worker_dies_too(hostile, tmp_path):
    path = tmp_path / "daemon_pid"
    part = RewardPart(f"{hostile}:reward", params={"path": str(path)}, batch_size=2)
    with RewardRunner([part], mode="process", max_failure_share=1.0) as runner:
        runner.score([""], ["daemon"])
        daemon = int(path.read_text())
        assert running(daemon)
        runner.score([""], ["os._exit"])
        assert stops(daemon)


def test_a_leaking_worker_is_replaced_before_it_fails(hostile):
    with RewardRunner(
        [RewardPart(f"{hostile}:leak", params={"megabytes": 80})], mode="process", memory_mb=300, max_failure_share=0.0
    ) as runner:
        workers = {runner.score([""], ["a"]).values[0] for _ in range(6)}
    assert 2 <= len(workers) < 6  # replaced now and then, not every time


def test_a_littering_worker_is_replaced(hostile):
    with RewardRunner([RewardPart(f"{hostile}:litter")], mode="process", max_failure_share=0.0) as runner:
        first = runner.score([""] * 16, ["a"] * 16).values[0]
        assert runner.score([""] * 20, ["a"] * 20).values[0] == first  # 16 left so far
        token = tokens(runner)[0]
        assert runner.score([""], ["a"]).values[0] != first
        assert processes_with_token(token) == []


def test_workers_are_reused_and_there_are_as_many_as_asked_for(hostile):
    part = RewardPart(f"{hostile}:pid", batch_size=1)
    with RewardRunner([part], mode="process", num_workers=2) as runner:
        workers = {value for _ in range(5) for value in runner.score([""] * 8, ["a"] * 8).values}
    assert len(workers) <= 2
    assert os.getpid() not in workers


def test_a_hanging_reward_stops_the_run_when_it_is_the_rule(hostile):
    with (
        RewardRunner([RewardPart(f"{hostile}:reward")], mode="process", timeout_seconds=0.5, num_workers=2) as runner,
        pytest.raises(RewardFailureError, match=r"reward 'reward' failed on 2 of its latest 2 .* timeout after 0.5 s"),
    ):
        runner.score([""] * 8, ["sleep"] * 8)


def test_the_runner_survives_its_own_exception(hostile):
    """Leaving a batch early kills what is still busy; the next batch is served by fresh workers."""
    part = RewardPart(f"{hostile}:reward", batch_size=1)
    with RewardRunner([part], mode="process", timeout_seconds=30, num_workers=2, max_failure_share=0.0) as runner:
        started = time.monotonic()
        with pytest.raises(RewardFailureError, match="broken reward"):
            runner.score([""] * 2, ["sleep", "raise"])
        assert time.monotonic() - started < 20
        assert runner.score([""] * 4, ["fine"] * 4).values == [1.0] * 4


def test_loading_errors_come_back_as_one_line(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'sudoku'"), RewardRunner([RewardPart("sudok")], mode="process"):
        pass
    crash = tmp_path / "crash.py"
    crash.write_text("import os\nos._exit(7)\n")
    with (
        pytest.raises(RuntimeError, match="exited with code 7"),
        RewardRunner([RewardPart(f"{crash}:f")], mode="process"),
    ):
        pass


def test_the_same_verdicts_as_inline():
    grid = "1234341221434321"
    completions = [grid, grid[::-1], "0" * 16, "nonsense"] * 10
    columns = {"puzzle": ["1" + "0" * 15] * 40}
    tables = []
    for mode in ("inline", "process"):
        with RewardRunner([RewardPart("sudoku")], mode=mode, num_workers=2) as runner:
            tables.append(runner.score([""] * 40, completions, columns))
    assert tables[0].values == tables[1].values
    assert tables[0].parts == tables[1].parts
    assert {1.0, 0.0} == set(tables[0].values)


def test_parts_may_run_in_different_places(hostile):
    parts = [RewardPart(f"{hostile}:pid", mode="inline", label="here"), RewardPart(f"{hostile}:pid", label="there")]
    with RewardRunner(parts, mode="process") as runner:
        table = runner.score([""], ["a"])
    assert table.parts["here"][0].value == os.getpid()
    assert table.parts["there"][0].value != os.getpid()


def test_workers_do_not_import_the_main_script(tmp_path, hostile):
    """multiprocessing's spawn would import it again: slow with torch, endless without a main guard."""
    script = tmp_path / "train_without_guard.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.getcwd()!r})
        sys.modules["torch"] = type(sys)("torch")
        from rewards import RewardPart, RewardRunner
        print("started")
        with RewardRunner([RewardPart({str(hostile)!r} + ":slow_import_state")], mode="process") as runner:
            print(runner.score([""], ["a"]).values)
        """)
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split("\n")[:2] == ["started", "[0.0]"]


def test_busy_workers_die_with_a_killed_trainer(tmp_path, hostile):
    path = tmp_path / "worker_pid"
    script = tmp_path / "trainer.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.getcwd()!r})
        from rewards import RewardPart, RewardRunner
        part = RewardPart({str(hostile)!r} + ":reward", params={{"path": {str(path)!r}}})
        with RewardRunner([part], mode="process", timeout_seconds=500) as runner:
            runner.score([""], ["sleep"])
        """)
    )
    trainer = subprocess.Popen([sys.executable, str(script)])
    while not path.exists() or not path.read_text().endswith("\n"):
        time.sleep(0.05)  # until the reward runs; pytest's timeout ends this if it never does
    worker = int(path.read_text())
    assert running(worker)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert stops(worker, seconds=60.0)


def test_the_kernel_ends_a_spinning_reward_even_when_nobody_watches(hostile):
    """The CPU limit: 1 s allowed, plus 1; the runner that would enforce the wall limit is asleep here."""
    with RewardRunner([RewardPart(f"{hostile}:reward")], mode="process", timeout_seconds=1.0) as runner:
        child = runner._pool._children[0]
        runner._pool._send(child, Job(0, [0]), Batch([""], ["spin"], {}))
        assert child.process.wait(timeout=60) == -signal.SIGXCPU
        with pytest.raises(WorkerLostError, match="timeout: CPU time limit exceeded"):
            child.poll()
        assert runner.score([""], ["fine"]).values == [1.0]


def test_a_column_that_cannot_travel_is_named_as_the_users_mistake(hostile):
    with (
        RewardRunner([RewardPart(f"{hostile}:pid")], mode="process") as runner,
        pytest.raises(ValueError, match=r"cannot be sent to a reward process .* mode='inline'"),
    ):
        runner.score([""], ["a"], {"image": [lambda: None]})


def test_large_batches_pass_through_the_pipe(hostile):
    with RewardRunner([RewardPart(f"{hostile}:pid")], mode="process", num_workers=2) as runner:
        table = runner.score(["p" * 100_000] * 64, ["c" * 100_000] * 64, {"completion_ids": [list(range(5000))] * 64})
    assert None not in table.values


def test_no_worker_of_this_suite_is_left():
    """Runs last in this file: whatever the tests above did, nothing of ours is alive."""
    left = []
    for path in glob.glob("/proc/self/task/*/children"):
        with open(path) as file:
            left += [pid for pid in file.read().split() if is_worker(pid)]
    assert left == []


def is_worker(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"{TOKEN_VARIABLE}=".encode() in file.read()
    except OSError:
        return False


SLOW_IMPORT = """
def lazily(prompts, completions, **columns):
    import {module}
    return [float({module}.VALUE)] * len(completions)

def hangs_after(prompts, completions, **columns):
    import {module}
    import time
    time.sleep(600)

def forever(prompts, completions, **columns):
    import importlib
    importlib.import_module("never_ends_{module}")
"""


def test_an_import_inside_a_reward_is_no_scoring_time(tmp_path):
    """A reward that imported torch in its body was killed at every call, and its worker started again each time."""
    (tmp_path / "slow_import_a.py").write_text(
        "import time\nend = time.process_time() + 2.5\nwhile time.process_time() < end:\n    pass\nVALUE = 3\n"
    )
    (tmp_path / "never_ends_slow_import_a.py").write_text("import time\ntime.sleep(600)\n")
    path = tmp_path / "lazy_reward.py"
    path.write_text(SLOW_IMPORT.format(module="slow_import_a"))
    limits = {"mode": "process", "timeout_seconds": 0.8, "max_failure_share": 1.0, "load_seconds": 20.0}
    with RewardRunner([RewardPart(f"{path}:lazily")], **limits) as runner:
        first = tokens(runner)
        assert runner.score([""] * 2, ["a", "b"]).values == [3.0, 3.0]
        assert runner.score([""], ["a"]).values == [3.0]
        assert tokens(runner) == first  # the same process
    with RewardRunner([RewardPart(f"{path}:hangs_after")], **limits) as runner:
        started = time.monotonic()
        assert runner.score([""], ["a"]).parts["hangs_after"][0].reason == "timeout after 0.8 s"
        assert time.monotonic() - started < 15
    with RewardRunner([RewardPart(f"{path}:forever")], **{**limits, "load_seconds": 4.0}) as runner:
        assert runner.score([""], ["a"]).values == [None]
