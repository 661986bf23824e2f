"""The configs that come with the package: listed, found by name, copied; a mistake is met with the nearest name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from rl import shipped
from rl.cli import main
from rl.config import load_config
from rl.train.deepspeed_json import BUILT_IN

ROOT = Path(__file__).resolve().parents[1]


def test_every_shipped_config_is_listed_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert all(line.endswith(".") for line in lines)
    # Below every sentence: how large the model is, and what trains it.
    needs = re.compile(r" +[\d.]+ [MB] parameters(, .+)?; .*(CPU cores?|GPUs? of \d+ GB)(, .+)?\.")
    assert [line for line in lines[1::2] if not needs.fullmatch(line)] == []
    assert last.removeprefix("train.deepspeed=").split(" | ") == sorted(BUILT_IN)


def test_launch_becomes_the_deepspeed_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/test_distributed.py` runs it; here all of its options, and what it refuses before any rank starts."""
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, words: started.append(words))
    devices = ["--num-nodes", "2", "--num-gpus", "8", "--hostfile", "hosts", "--master-port", "29501"]
    main(["launch", *devices, "--config", "quickstart", "train.steps=1", "--train.epochs", "1"])
    main(["launch", "--include", "localhost:0,1", "--config", "quickstart"])
    expected = "--num_gpus 8 --num_nodes 2 --hostfile hosts --master_port 29501"
    train = "--no_local_rank --module rl.cli train --config quickstart"
    assert [" ".join(words[3:]) for words in started] == [
        f"{expected} {train} train.steps=1 train.epochs=1",
        f"--include localhost:0,1 {train}",
    ]
    assert all(words[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"] for words in started)
    for words in (["--num-gpus", "0"], ["--config", "quickstar"], ["train.stepz=1"], ["--gpus", "2"]):
        assert main(["launch", *words]) == 2
    assert len(started) == 2


def test_a_file_of_the_user_comes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart") == load_config(ROOT / "configs" / "quickstart.yaml")
    # A folder of the name is no config file.
    (tmp_path / "quickstart").mkdir()
    assert load_config("quickstart").task.name == "sudoku"
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text("task: {name: countdown}\n")
    assert load_config("quickstart").task.name == "countdown"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["check", "--config", "quickstar"], "config file quickstar does not exist: did you mean 'quickstart', which"),
        # Names are looked up without folder and suffix; those who type a path learn the name.
        (["check", "--config", "configs/dna_drakes.yaml"], "does not exist: did you mean 'dna_drakes', which"),
        (["check", "--config", "quickstart.yaml"], "does not exist: did you mean 'quickstart', which"),
        (
            ["check", "--config", "elsewhere/quickstart"],
            "elsewhere/quickstart does not exist: did you mean 'quickstart'",
        ),
        (["check", "--config", "zzz"], "config file zzz does not exist: denoise-rl configs lists the shipped"),
        (["init", "quikstart"], "no config 'quikstart': did you mean 'quickstart'?"),
        (["init", "zzz"], "no config 'zzz': see denoise-rl configs"),
        (["init", "../quickstart"], "no config '../quickstart': did you mean 'quickstart'?"),
        (["init", "quickstart", "my.yaml"], "my.yaml would be the folder of quickstart.yaml: name a folder"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(
    words: list[str],
    answer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert answer in line
    assert not list(tmp_path.iterdir())


def test_init_copies_and_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "quickstart"]) == 0
    copy = tmp_path / "quickstart.yaml"
    assert copy.read_bytes() == (ROOT / "configs" / "quickstart.yaml").read_bytes()
    copy.write_text("mine")
    assert main(["init", "quickstart"]) == 2
    assert copy.read_text() == "mine"
    assert shipped.copy_config("sd15_b2", tmp_path / "a" / "b") == tmp_path / "a" / "b" / "sd15_b2.yaml"
