"""Run code nobody trusts, and get a verdict that the code cannot make for itself. See docs/sandbox.md."""

from rewards.sandbox.pool import CodeSandbox, SandboxError
from rewards.sandbox.records import Limits, Program, RunResult, SandboxReport, TestResult
from rewards.sandbox.remote import RemoteSandbox

__all__ = [
    "CodeSandbox",
    "Limits",
    "Program",
    "RemoteSandbox",
    "RunResult",
    "SandboxError",
    "SandboxReport",
    "TestResult",
    "describe_sandbox",
]


def describe_sandbox(isolation: str = "auto") -> SandboxReport:
    """Which protections this machine allows, as a worker finds them. Raises SandboxError where it has none."""
    with CodeSandbox(max_workers=1, isolation=isolation) as sandbox:
        return sandbox.describe()
