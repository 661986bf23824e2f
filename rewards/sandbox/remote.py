"""A sandbox on another machine that speaks the SandboxFusion protocol (POST /run_code).

The verdict is made here, or by the checker, as in the local sandbox: outputs are compared on this side, and function
tests run in a process of their own on the server (`remote_driver`), which proves by a secret that it wrote the
verdict. What a program can reach beyond that is the server's affair; SandboxFusion's default isolation is none.

Protocol: https://github.com/bytedance/SandboxFusion, sandbox/server/sandbox_api.py, read at commit 53a6341.
"""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewards.sandbox.checker import verdict
from rewards.sandbox.records import Limits, Program, RunResult, SandboxReport, TestResult

# In the order of their imports.
SHIPPED = ("frames", "values", "instances", "program", "program_object", "arrays", "unjudgeable", "checker")
DRIVER = (Path(__file__).parent / "remote_driver.py").read_text()
NETWORK_SECONDS = 30.0


class RemoteSandbox:
    """Runs programs on a SandboxFusion server at `url`, such as "http://localhost:8080". Same use as `CodeSandbox`.

    A server that cannot be reached, answers nonsense or reports an error of its own gives the status "infrastructure".
    Time limits are wall time there, so `Limits.wall` is what counts. The server keeps the first MiB of an output.

    Raises:
        ValueError: for an address that is not http(s), or max_workers below 1.
    """

    def __init__(self, url: str, max_workers: int = 8, limits: Limits | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the sandbox address must begin with http:// or https://, got '{url}'")
        if max_workers < 1:
            raise ValueError(f"max_workers must be at least 1, got {max_workers}")
        self.url = url.rstrip("/")
        self.max_workers = max_workers
        self.limits = limits or Limits()

    def run(self, programs: Sequence[Program]) -> list[RunResult]:
        """Run each program; results in the order of `programs`.

        Raises:
            ValueError: for function tests of another language than Python.
        """
        if any(program.tests is not None and program.language != "python" for program in programs):
            raise ValueError("function tests are for Python programs; give others inputs and outputs")
        with ThreadPoolExecutor(self.max_workers) as pool:
            return list(pool.map(self._run_one, programs))

    def describe(self) -> SandboxReport:
        """What is known of the protections."""
        weaker = "what holds a program back is the configuration of the server, which cannot be seen from here"
        return SandboxReport("remote", (f"SandboxFusion at {self.url}",), (weaker,))

    def close(self) -> None:
        """Nothing to give back."""

    def _run_one(self, program: Program) -> RunResult:
        if program.tests is None:
            answer = self._post(program.code, program.stdin, program.language)
            return answer if isinstance(answer, RunResult) else _script_result(answer)
        secret = secrets.token_hex(16)
        spec = {name: getattr(program, name) for name in ("setup", "preamble", "entry_point")}
        payload = {
            "secret": secret,
            "modules": {name: (Path(__file__).parent / f"{name}.py").read_text() for name in SHIPPED},
            "code": program.code,
            "spec": {**spec, "tests": list(program.tests)},
            "cpu_seconds": self.limits.cpu_seconds,
        }
        answer = self._post(DRIVER, json.dumps(payload), "python")
        return answer if isinstance(answer, RunResult) else _tests_result(answer, secret, len(program.tests))

    def _post(self, code: str, stdin: str, language: str) -> dict[str, Any] | RunResult:
        """The server's account of the run, or a result that says why there is none."""
        wall, memory = self.limits.wall, self.limits.memory_mb
        body = {"code": code, "language": language, "stdin": stdin, "memory_limit_MB": memory}
        body |= {"run_timeout": wall, "compile_timeout": wall}
        request = urllib.request.Request(
            f"{self.url}/run_code", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=2 * wall + NETWORK_SECONDS) as response:
                answer = json.load(response)
            if answer["status"] == "SandboxError":
                return RunResult("infrastructure", reason=f"sandbox server: {answer['message']}"[:300])
            compiled = answer.get("compile_result")
            if compiled and (compiled["status"] != "Finished" or compiled["return_code"]):
                return RunResult("error", stderr=compiled["stderr"] or "", reason="it does not compile")
            ran = answer["run_result"]
            if ran["status"] not in ("Finished", "TimeLimitExceeded"):
                raise ValueError(f"run_result.status is {ran['status']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            return RunResult("infrastructure", reason=f"sandbox server at {self.url}: {error}"[:300])
        return ran


def _script_result(ran: dict[str, Any]) -> RunResult:
    code = ran.get("return_code")
    stdout, stderr, seconds = ran.get("stdout") or "", ran.get("stderr") or "", ran.get("execution_time") or 0.0
    result = RunResult("ok", stdout=stdout, stderr=stderr, exit_code=code, wall_seconds=seconds)
    if ran["status"] == "TimeLimitExceeded":
        return replace(result, status="timeout", reason="time limit reached")
    if code:
        last_line = result.stderr.strip().rpartition("\n")[2]
        return replace(result, status="error", reason=f"exit code {code}: {last_line}"[:300])
    return result


def _tests_result(ran: dict[str, Any], secret: str, num_tests: int) -> RunResult:
    seconds = ran.get("execution_time") or 0.0
    lines = (ran.get("stdout") or "").splitlines()
    signed = [line.removeprefix(secret) for line in lines if line.startswith(secret)]
    if not signed:
        timeout = ran["status"] == "TimeLimitExceeded"
        reason = "time limit reached" if timeout else "the checker stopped"
        tests = (TestResult(False, f"not reached: {reason}"),) * num_tests
        return RunResult("timeout" if timeout else "error", tests=tests, reason=reason, wall_seconds=seconds)
    return RunResult.from_message(verdict(json.loads(signed[-1])) | {"wall_seconds": seconds})
