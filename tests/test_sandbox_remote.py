"""The remote sandbox against a local server that speaks the SandboxFusion protocol and really runs what it is sent."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rewards.code_tests import CodeTests
from rewards.sandbox import Limits, Program, RemoteSandbox

LIMITS = Limits(cpu_seconds=2, wall_seconds=6)


def run_command(request: dict[str, Any]) -> dict[str, Any]:
    """What the server's runner does, without any isolation: only harmless programs here."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", request["code"]],
            input=(request["stdin"] or "").encode(),
            capture_output=True,
            timeout=request["run_timeout"],
        )
    except subprocess.TimeoutExpired as late:
        return {"status": "TimeLimitExceeded", "execution_time": 1.0, "stdout": (late.stdout or b"").decode()}
    texts = {"stdout": done.stdout.decode(), "stderr": done.stderr.decode()}
    return {"status": "Finished", "execution_time": 0.1, "return_code": done.returncode, **texts}


class Server(BaseHTTPRequestHandler):
    requests: list[dict[str, Any]] = []  # noqa: RUF012
    answer: bytes | None = None

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append({"path": self.path, **request})
        answer: dict[str, Any] = {"message": "", "compile_result": None, "executor_pod_name": None, "files": {}}
        if self.answer is None:
            result = run_command(request)
            good = result["status"] == "Finished" and result["return_code"] == 0
            answer |= {"status": "Success" if good else "Failed", "run_result": result}
        body = self.answer if self.answer is not None else json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Server, "requests", [])
    monkeypatch.setattr(Server, "answer", None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_scripts(url: str) -> None:
    sandbox = RemoteSandbox(url, limits=LIMITS)
    good, bad, late = sandbox.run(
        [
            Program("print(int(input()) + 1)", stdin="41"),
            Program("print(1)\nraise ValueError('no')"),
            Program("print(1, flush=True)\nwhile True: pass"),
        ]
    )
    assert (good.status, good.stdout, good.exit_code) == ("ok", "42\n", 0)
    assert (bad.status, bad.reason) == ("error", "exit code 1: ValueError: no")
    assert (late.status, late.stdout) == ("timeout", "1\n")
    request = next(request for request in Server.requests if request["stdin"] == "41")
    assert request["path"] == "/run_code"
    assert (request["language"], request["run_timeout"], request["memory_limit_MB"]) == ("python", 6, 1024)


def test_function_tests_are_judged_by_a_process_of_their_own(url: str) -> None:
    secret = "value-5281"
    tests = [f"assert f(2) == {secret!r}"]
    cheats = {
        "exit": "import sys; sys.exit(0)",
        "os._exit": "import os; os._exit(0)",
        "exit in the call": "def f(x): exit(0)",
        "equal to all": "class A:\n  def __eq__(s, o): return True\ndef f(x): return A()",
        "claims": 'print([["begin", 1], ["test", True, ""], ["done"]], flush=True)\ndef f(x): print("ok")',
        "other process": """
import os
def f(x):
    for pid in (os.getppid(), os.getpid()):
        for name in ('cmdline', 'environ', 'fd/0', 'fd/1'):
            try: data = open(f'/proc/{pid}/{name}', 'rb').read(1 << 16)
            except OSError: continue
            if b'value-' in data.replace(b"b'value-", b''): return 'value-5281'""",
        "memory": "import gc\ndef f(x): return next((o for o in gc.get_objects() if 'value-52' in repr(o)[:99999]), 0)",
    }
    programs = [Program(code, tests=tests) for code in cheats.values()]
    programs += [Program("def f(x): return 'value-' + str(5279 + x)", tests=tests)]
    results = RemoteSandbox(url, max_workers=2, limits=LIMITS).run(programs)
    for name, result in zip(cheats, results, strict=False):
        assert result.has_verdict and not result.passed, f"{name}: {result}"
        assert len(result.tests) == 1
    assert results[-1].passed, results[-1]
    # What the program's process was started from holds neither the tests nor the program's name for them.
    assert all(secret not in request["code"] for request in Server.requests)


def test_more_of_function_tests(url: str) -> None:
    mixed, late, broken, uncalled = RemoteSandbox(url, max_workers=2, limits=LIMITS).run(
        [
            Program("def f(x): x.append(1); return x", tests=["a = []; f(a); assert a == [1]", "assert f([]) == []"]),
            Program("def f(x):\n  while True: pass", tests=["f(1)", "f(2)"]),
            Program("def f(x): return x", tests=["assert f(1) =="]),
            Program("def f(x): return x", tests=["assert True"]),
        ]
    )
    assert [test.passed for test in mixed.tests] == [True, False] and mixed.status == "ok"
    assert [test.passed for test in late.tests] == [False, False] and late.has_verdict
    assert broken.status == uncalled.status == "invalid"


@pytest.mark.parametrize(
    "answer",
    [
        b"not json",
        b"{}",
        b'{"status": "SandboxError", "message": "no space left"}',
        b'{"status": "Success", "run_result": null}',
        b'{"status": "Success", "run_result": {"status": "Error", "stderr": "x"}}',
        b"[1]",
    ],
)
def test_a_server_in_trouble_is_no_verdict(url: str, answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "answer", answer)
    script, tests = RemoteSandbox(url, limits=LIMITS).run([Program("print(1)"), Program("f = 1", tests=["f"])])
    assert script.status == tests.status == "infrastructure"
    assert url in script.reason or "no space left" in script.reason


def test_a_forged_verdict_without_the_secret_does_not_count(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = json.dumps([["begin", 1], ["test", True, ""], ["done"]])
    ran = {"status": "Finished", "return_code": 0, "stdout": f"\n{'0' * 32}{verdict}\n", "stderr": ""}
    monkeypatch.setattr(Server, "answer", json.dumps({"status": "Success", "run_result": ran}).encode())
    (result,) = RemoteSandbox(url, limits=LIMITS).run([Program("def f(): return 1", tests=["assert f() == 1"])])
    assert result.has_verdict and not result.passed


def test_a_server_that_is_not_there_is_no_verdict() -> None:
    (result,) = RemoteSandbox("http://127.0.0.1:1", limits=LIMITS).run([Program("print(1)")])
    assert result.status == "infrastructure"
    assert "127.0.0.1:1" in result.reason


def test_other_languages_compile_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = {"status": "Finished", "return_code": 1, "stderr": "main.go:1: syntax error"}
    monkeypatch.setattr(
        Server, "answer", json.dumps({"status": "Failed", "compile_result": compiled, "run_result": None}).encode()
    )
    (result,) = RemoteSandbox(url, limits=LIMITS).run([Program("package", language="go")])
    assert (result.status, result.reason) == ("error", "it does not compile")
    assert "syntax error" in result.stderr
    with pytest.raises(ValueError, match="function tests are for Python"):
        RemoteSandbox(url).run([Program("package", tests=["f()"], language="go")])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="must begin with http"):
        RemoteSandbox("localhost:8080")
    with pytest.raises(ValueError, match="max_workers must be at least 1"):
        RemoteSandbox("http://localhost:8080", max_workers=0)


def test_the_reward_uses_it(url: str) -> None:
    with CodeTests(sandbox_url=url, timeout_seconds=2) as reward:
        assert "remote" in str(reward.sandbox.describe())
        scores = reward(
            prompts=["", ""],
            completions=["print(int(input()) * 2)", "print(4)"],
            inputs=[["2", "3"], ["2", "3"]],
            outputs=[["4", "6"], ["4", "6"]],
        )
    assert [score.value for score in scores] == [1.0, 0.0]
