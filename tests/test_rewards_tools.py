"""`score_file` and `new_reward`: what `denoise-rl score` and `denoise-rl new-reward` do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewards.tools import new_reward, score_file

ROOT = Path(__file__).resolve().parents[1]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_new_reward_works_as_written(tmp_path):
    reward, test = new_reward(tmp_path / "plugins" / "ends_right")
    assert (reward.name, test.name) == ("ends_right.py", "test_ends_right.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test.name],
        cwd=test.parent, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout
    # Break the reward: its test must notice.
    reward.write_text(reward.read_text().replace("endswith(wanted)", "startswith(wanted)"))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test.name],
        cwd=test.parent, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 1


def test_new_reward_never_overwrites_and_refuses_bad_names(tmp_path):
    reward, _ = new_reward(tmp_path / "mine.py")
    before = reward.read_text()
    with pytest.raises(ValueError, match="exists already"):
        new_reward(tmp_path / "mine")
    assert reward.read_text() == before
    for name, message in (
        ("two words", "cannot name a Python function"),
        ("class", "cannot name"),
        ("json", "standard"),
    ):
        with pytest.raises(ValueError, match=message):
            new_reward(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", "test_mine.py"]


def test_score_file_reports_distribution_failures_and_timing(tmp_path):
    rows = [
        {"question": "2+2", "gold": "4", "samples": ["#### 4", "#### 5", "it is 4"]},
        {"question": "2+3", "gold": "5", "samples": ["#### 5"]},
        {"question": "?", "gold": None, "samples": ["#### 5"]},
    ]
    out = tmp_path / "scored.jsonl"
    report = score_file(
        write(tmp_path / "samples.jsonl", rows),
        "math_answer",
        params={"anchor": "any"},
        columns={"answer": "gold"},
        prompt="question",
        completion="samples",
        output=out,
    )
    assert report.values == [1.0, 0.0, 1.0, 1.0, None]
    assert report.reasons == {"no reference answer": 1}
    text = report.text()
    assert "5 completions, 4 scored" in text
    assert "mean 0.7500" in text
    assert "without score: 1" in text
    assert "verdicts/s" in text
    assert [line.split() for line in text.splitlines()[2:4]] == [["0", "1", "25.0%"], ["1", "3", "75.0%"]]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["score"] for row in written] == report.values
    assert written[4]["reason"] == "no reference answer"
    assert written[0]["samples"] == "#### 4"


def test_score_file_bins_many_values(tmp_path):
    rows = [{"completion": "x", "completion_ids": [0] * size} for size in range(101)]
    report = score_file(
        write(tmp_path / "s.jsonl", rows), "length", params={"max_length": 100}, mode="inline", limit=100
    )
    bins = [line.split()[-2] for line in report.text().splitlines() if "to" in line and "%" in line]
    assert bins == ["10"] * 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"completion": "x"}\n{broken\n', r":2 is not JSON"),
        ('{"answer": "x"}\n', r":1 has no 'completion', it has \['answer'\]"),
        ("\n", "holds no samples"),
        ('{"completion": ' + "9" * 5000 + "}", r":1 is not JSON"),
    ],
)
def test_score_file_names_the_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        score_file(path, "format")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"output": "{}/none/x.jsonl"}, "none does not exist, make it first"),
        ({"output": "{}/in.jsonl"}, "is the file of the samples"),
        ({"path": "{}"}, "is a folder, not a file"),
        ({"path": "{}/latin.jsonl"}, "latin.jsonl:1 is not UTF-8"),
    ],
)
def test_score_file_refuses_before_it_scores(tmp_path, more, message):
    (tmp_path / "in.jsonl").write_text('\ufeff{"completion": "a"}\n', encoding="utf-8")
    (tmp_path / "latin.jsonl").write_text('{"completion": "é"}\n', encoding="latin-1")
    more = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in more.items()}
    with pytest.raises(ValueError, match=message):
        score_file(**{"path": tmp_path / "in.jsonl", "reward": "format", **more})
    assert len(score_file(tmp_path / "in.jsonl", "format", mode="inline").values) == 1


def test_score_file_without_file(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        score_file(tmp_path / "nothing.jsonl", "format")
