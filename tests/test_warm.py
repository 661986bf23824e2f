"""The processes of tests/warm.py are as real as new ones: output, exit codes, signals, environment, folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import runs, warm

SCRIPT = """
import os, signal, sys, threading, time
print(os.getcwd(), os.environ["WHO"], sys.argv[1], os.environ.get("LEFT"), threading.active_count())
print("torch" in sys.modules, "deepspeed" in sys.modules, file=sys.stderr)
{"fails": lambda: 1 / 0, "dies": lambda: os.kill(os.getpid(), signal.SIGKILL), "hangs": lambda: time.sleep(99),
 "ends": lambda: sys.exit(int(os.environ["WHO"]))}[sys.argv[1]]()
"""


def test_a_child_is_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEFT", "out")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    both = [{**runs.clean_env(), "WHO": who} for who in ("0", "7")]
    for environment in both:
        del environment["LEFT"]
    ended = warm.run([str(script), "ends"], tmp_path, 60, both)
    assert ended == [(code, f"{tmp_path} {code} ends None 1\n", "True True\n") for code in (0, 7)]
    ((code, _, stderr),) = warm.run([str(script), "fails"], tmp_path, 60, both[:1])
    assert code == 1 and "ZeroDivisionError" in stderr
    ((code, stdout, _),) = warm.run([str(script), "dies"], tmp_path, 60, both[:1])
    assert code == -9 and stdout.startswith(str(tmp_path))
    with pytest.raises(AssertionError, match=rf"hangs: {script} hangs\n.*{tmp_path} 0 hangs"):
        warm.run([str(script), "hangs"], tmp_path, 5, both[:1])
