"""docs/rewards.md does what it says: its Python runs, its commands succeed, its config is a config."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def loaded_files():
    before, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith("denoise_rl_file_"):
            del sys.modules[name]


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys, loaded_files):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = []
    for language, code in BLOCKS:
        if language == "python":
            file = re.match(r"# file: (\S+)\n", code)
            if file:
                Path(file.group(1)).write_text(code)
            else:
                exec(compile(code, "docs/rewards.md", "exec"), names)
        elif language == "bash":
            for line in code.strip().splitlines():
                program, *arguments = shlex.split(line)
                assert program == "denoise-rl"
                run = subprocess.run(
                    [sys.executable, "-m", "rl.cli", *arguments],
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                    capture_output=True,
                    text=True,
                    timeout=120,
                )
                assert run.returncode == 0, run.stderr
                printed.append(run.stdout)
    assert Path("test_ends_right.py").is_file()
    assert "3 completions, 3 scored" in printed[1]
    assert "mean 0.5000" in printed[1]
    assert "3 completions, 3 scored" in capsys.readouterr().out
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}


def test_the_config_on_the_page_is_valid():
    from rl.sections import RewardConfig

    (section,) = [yaml.safe_load(code)["reward"] for language, code in BLOCKS if language == "yaml"]
    config = RewardConfig(**section)
    assert [part.name for part in config.functions] == ["brevity.py:brevity", "overlong"]
