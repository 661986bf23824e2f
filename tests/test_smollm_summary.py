"""runs/smollm-SEED/summary.json out of a run's own summary: denoising steps become tokens a forward."""

import json
import runpy
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "smollm_summary.py"


def part(name: str, values: dict[str, float]) -> dict[str, object]:
    quality = {"words": 0.5, "nats": 2.5, "num_words": 12.0, "distinct_frames": 0.9, "repetition": 0.1}
    return {
        name: values,
        f"{name}_quality": {steps: quality | {"nats": value * 10} for steps, value in values.items()},
        f"{name}_unscored": {steps: 6 if steps == "6" else 0 for steps in values},
        f"{name}_interval": {steps: [value - 0.1, value + 0.1] for steps, value in values.items()},
        f"{name}_seconds": 12.34,
    }


def make_run(folder: Path, seed: int, shift: float) -> None:
    run = folder / "train"
    (run / "answers").mkdir(parents=True)
    parts = {
        "baseline": {"24": 0.4},
        "before": {"24": 0.3, "12": 0.2, "6": 0.1},
        "after": {"24": 0.6 + shift, "12": 0.5 + shift, "6": 0.4 + shift},
    }
    found = {"seed": seed, "n_eval": 256, "convert_seconds": 1500.06, "train_seconds": 2000.0}
    for name, values in parts.items():
        found |= part(name, values)
        lines = [
            {"steps": int(s), "prompt": "p", "completion": f"{name} {s}", "reward": 1} for s in values for _ in "ab"
        ]
        (run / "answers" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "summary.json").write_text(json.dumps(found))


def test_steps_become_tokens_a_forward(tmp_path, monkeypatch, capsys) -> None:
    make_run(tmp_path, 3, 0.0)
    monkeypatch.setattr("sys.argv", ["smollm_summary.py", str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ar"] == {"1": {"score": 0.4, "words": 0.5, "nats": 4.0, "n": 256}}
    assert {speed: row["score"] for speed, row in summary["converted"].items()} == {"1": 0.3, "2": 0.2, "4": 0.1}
    assert summary["after"]["4"] == {"score": 0.4, "words": 0.5, "nats": 4.0, "n": 250}
    assert summary["seconds"] == {"ar": 12.3, "convert": 1500.1, "converted": 12.3, "rl": 2000.0, "after": 12.3}
    assert summary["sentences"]["after"]["2"] == ["after 12", "after 12"]
    assert summary["beside"]["converted"]["1"] == {"distinct_frames": 0.9, "repetition": 0.1, "num_words": 12.0}
    assert summary["intervals"]["ar"] == {"1": [0.30000000000000004, 0.5]} and summary["seed"] == 3
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[8] == "| after RL | 4 | 0.400 | 0.500 | 4.000 | 0.900 |"


def test_several_seeds_are_a_mean_with_its_interval(tmp_path, monkeypatch, capsys) -> None:
    """Scores 0.4, 0.5 and 0.6: mean 0.5, half-width 4.303 x 0.1 / sqrt(3)."""
    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        make_run(folder, seed, seed * 0.1)
    monkeypatch.setattr("sys.argv", ["smollm_summary.py", *map(str, folders)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "| after RL | 4 | 0.500 ± 0.248 | 0.500 ± 0.000 | 5.000 ± 2.484 |" in capsys.readouterr().out
    assert all((folder / "summary.json").is_file() for folder in folders)
    assert (folders[0] / "summary.png").is_file() and not (folders[1] / "summary.png").exists()
