"""`denoise-rl rollout --search`: any policy and reward of the framework, real files, one clear line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rl.cli import main
from rl.registry import SEARCHES
from rollouts.trajectory import load_trajectories
from tests import runs

# Few evaluations each: the laws are in tests/test_search.py.
PARAMS: dict[str, dict[str, Any]] = {
    "best_of_n": {"num_samples": 3},
    "svdd": {"num_candidates": 2},
    "smc": {"num_particles": 3, "keep": "all"},
    "dts": {"num_iterations": 3},
    "dts_star": {"num_iterations": 3},
    "noise_random": {"num_samples": 3},
    "noise_zero_order": {"num_rounds": 2, "num_neighbours": 2},
    "noise_paths": {"num_paths": 2, "num_renoisings": 2},
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Config of a small trained model whose reward is not constant."""
    folder = tmp_path_factory.mktemp("model")
    arguments = runs.tiny_config(folder)
    assert main(["sft", *arguments]) == 0
    return [*arguments, f"model.path={folder / 'run' / 'model'}"]


@pytest.mark.parametrize("name", list(PARAMS))
def test_every_search_runs_on_text(name: str, setup: list[str], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = ["rollout", *setup, "--num-prompts", "3", "--group-size", "2", "--output", str(out), "--search", name]
    assert main([*words, "--search-params", json.dumps(PARAMS[name])]) == 0
    lines = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    summary = json.loads((out / "search.json").read_text())
    trajectories = load_trajectories(out / "trajectories.npz")
    count = 18 if name == "smc" else 6
    assert len(lines) == len(trajectories) == summary["num_samples"] == count
    assert [line["request"] for line in lines] == sorted(list(range(6)) * (count // 6))
    scope: dict[str, Any] = {}
    exec(runs.REWARD, scope)
    judged = scope["dense"]([line["prompt"] for line in lines], [line["completion"] for line in lines])
    assert [line["reward"] for line in lines] == judged
    assert summary["num_requests"] == 6
    assert {k: summary["params"][k] for k in PARAMS[name]} == PARAMS[name]
    spent = summary["budget"]
    assert f"{spent['denoiser_evaluations'] / 6:.1f} denoiser and {spent['reward_evaluations'] / 6:.1f} reward" in (
        capsys.readouterr().out
    )
    if name == "best_of_n":
        # Four steps a sample: a hand count of the whole command.
        assert (spent["denoiser_evaluations"], spent["reward_evaluations"]) == (6 * 3 * 4, 6 * 3)
    if name == "smc":
        assert sum(line["weight"] for line in lines) == pytest.approx(6)
        assert len(summary["log_z"]) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--search", "best_of"], "search 'best_of' does not exist: did you mean 'best_of_n'?"),
        (["--search", "svdd", "--search-params", "{candidates: 3}"], "search svdd has no option 'candidates'"),
        (["--search", "svdd", "--search-params", "{alpha: -1}"], "option 'alpha' of search svdd"),
        (["--search", "svdd", "--search-params", "[1"], "--search-params: '[1' is not valid YAML"),
        (["--search", "svdd", "--search-params", "3"], "--search-params: '3' must be a mapping"),
        (["--search", "noise_paths", "--search-params", "{renoise_steps: 2}"], "must be larger than renoise_steps (2)"),
        (["--search-params", "{}"], "--search-params belongs to --search NAME"),
        (["--search", "svdd", "rollout.cache=prefix"], "set rollout.cache to none"),
        (["--search", "svdd", "reward.functions=[{name: sudoku, normalize: group}]"], "needs normalize=none"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value[-1:]),
)
def test_bad_input_is_one_line(words: list[str], message: str, setup: list[str], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["rollout", *setup, "--output", str(out), *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not out.exists()


OWN = """
import numpy as np
from pydantic import Field
from rollouts.search.protocol import Search, SearchResult, fan

class Worst(Search):
    num_samples: int = Field(2, description="Samples.")

    def run(self, problem, row, seed):
        row, seed = np.repeat(row, self.num_samples), fan(seed, self.num_samples).ravel()
        states = problem.finish(problem.sampler.start(row, seed))
        reward = problem.judge(states).reshape(-1, self.num_samples)
        request, worst = np.arange(len(reward)), reward.argmin(1)
        return SearchResult(states.select(request * self.num_samples + worst), request, reward.min(1), problem.budget)

class Other:
    pass
"""


def test_a_search_of_your_own_by_its_address(setup: list[str], tmp_path: Path, capsys: Any) -> None:
    """The worst of the samples that best_of_n sees: the same noise, judged the other way round."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    rewards = {}
    for name in ("best_of_n", f"{file}:Worst"):
        out = tmp_path / name.rpartition(":")[2]
        words = ["rollout", *setup, "--num-prompts", "12", "--output", str(out), "--search", name]
        assert main([*words, "--search-params", "{num_samples: 4}"]) == 0
        rewards[name] = [json.loads(line)["reward"] for line in (out / "rollouts.jsonl").read_text().splitlines()]
        assert json.loads((out / "search.json").read_text())["search"] == name
    best, worst = rewards.values()
    # Some prompts of this reward are worth the same whatever is answered.
    differ = [low < high for low, high in zip(worst, best, strict=True) if low != high]
    assert differ and all(differ)
    capsys.readouterr()
    for name, message in (
        (f"{file}:Worse", "has no 'Worse'; did you mean 'Worst'?"),
        (f"{file}:Other", "is no subclass of rollouts.search.protocol.Search"),
    ):
        assert main(["rollout", *setup, "--output", str(tmp_path / "none"), "--search", name]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_every_option_has_one_sentence() -> None:
    for name in SEARCHES.names():
        for field in SEARCHES.resolve(name).model_fields.values():
            assert field.description and field.description.endswith(".")
