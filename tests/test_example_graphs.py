"""docs/examples/graphs.py: a modality in one file, through the real command and against enumeration."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from docs.examples import graphs
from rl.cli import main
from rl.config import load_config
from rl.tasks.load import modality_class, modality_of
from rl.train.plan import check_run
from rollouts.engines.base import SampleRequest
from tests.runs import ROOT, cli, lines, series

FILE = f"{ROOT}/docs/examples/graphs.py"


def arguments(folder: Path, *overrides: str) -> list[str]:
    config = yaml.safe_load((ROOT / "docs" / "examples" / "graphs.yaml").read_text())
    config["run"]["output_dir"] = str(folder / "run")
    config["task"]["name"], config["algorithm"]["name"] = f"{FILE}:BondTask", f"{FILE}:GraphPPO"
    path = folder / "graphs.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path), *overrides]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    result = cli("train", *arguments(folder, "train.steps=20"))
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_bonds_are_learned_with_log_probs_equal_to_the_samplers(trained: Path) -> None:
    reward = series(trained, "train", "reward/mean")
    assert 0.2 < reward[0] < 0.3 and min(reward[-5:]) > 0.95
    # Sampler and learner score batches of other sizes: what is left is rounding.
    gaps = [line["policy/logprob_gap_max"] for line in lines(trained, "train") if line["policy/decisions"]]
    assert len(gaps) >= 10 and max(gaps) < 1e-6
    assert lines(trained, "train")[0]["cost/sequence_forwards"] == 128 * 4 * 3
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["before"]["4"] < 0.1 and summary["after"]["4"] > 0.9
    sample = json.loads((trained / "samples.jsonl").read_text().splitlines()[-1])
    assert len(sample["completion"]["atoms"]) == 5 and sample["completion"]["bonds"][0][2] == sample["prompt"]
    assert "bonds" in (trained / "report.html").read_text()


def test_a_checkpoint_and_trajectories_are_read_back(trained: Path, tmp_path: Path) -> None:
    """A rollout of the saved policy is the sampler's own again, with what `Modality` writes to disk."""
    saved = f"model.path={trained / 'checkpoints' / 'step_20' / 'hf'}"
    output = ["--output", str(tmp_path / "out"), "--num-prompts", "3", "--group-size", "2"]
    assert main(["rollout", *arguments(tmp_path, saved), *output]) == 0
    config = load_config(tmp_path / "graphs.yaml", [saved, "eval.sampler={num_atoms: 3}"])
    task: Any = modality_of(f"{FILE}:BondTask")
    modality = task.open(config, graphs.BondTask())
    model = modality.load_model()
    assert modality.evaluation_options(7).model_dump() == {"num_inference_steps": 7, "num_atoms": 3}
    kept = modality.load_trajectories(tmp_path / "out" / "trajectories.npz")
    assert len(kept) == 6 and {t.prompt for t in kept} == {1, 2, 3}
    rows = config.algorithm.rows(kept, model)
    assert torch.equal(rows.latent[1], torch.from_numpy(kept[0].states[1]))
    np.testing.assert_allclose(rows.score(model).logprob.detach(), rows.sampler_logprob, rtol=0, atol=1e-6)
    assert all(
        right > 0.9 for right in graphs.right_bonds([graphs.BONDS[t.prompt] for t in kept], modality.completions(kept))
    )


def test_the_step_is_bayes_rule_on_the_noise() -> None:
    """Two places, T = 3: q(x_{t-1} | x_t) from transition matrices, summed over the clean kinds."""
    torch.manual_seed(0)
    model = graphs.GraphModel(2)
    state, prompt, num_steps = torch.tensor([[0, 3, 1], [2, 2, 2]]), torch.tensor([1, 3]), 3
    for t in (3, 2, 1):
        clean = model(state, torch.full((2,), t / num_steps), prompt).double().softmax(-1)
        found = graphs.next_kinds(model, state, torch.full((2,), t), num_steps, prompt)

        def noise(kept: float) -> torch.Tensor:
            """[K, K]: from kind to kind."""
            return kept * torch.eye(4, dtype=torch.float64) + (1 - kept) / 4

        before, now = noise(1 - (t - 1) / num_steps), noise(1 - t / num_steps)
        step = torch.linalg.solve(before, now)  # the step leads from the noise before it to the noise after it
        for graph, place in np.ndindex(2, 3):
            x = state[graph, place]
            posterior = torch.stack([before[k] * step[:, x] / now[k, x] for k in range(4)])
            torch.testing.assert_close(found[graph, place], clean[graph, place] @ posterior)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_the_numbering_of_atoms_does_not_matter() -> None:
    torch.manual_seed(0)
    model, order = graphs.GraphModel(4), [2, 0, 3, 1]
    state = torch.randint(0, 4, (1, 10))
    pairs = [model.pairs.index(tuple(sorted((order[i], order[j])))) for i, j in model.pairs]  # type: ignore[arg-type]
    moved = torch.tensor([*order, *(4 + p for p in pairs)])
    left, prompt = torch.tensor([0.5]), torch.tensor([2])
    torch.testing.assert_close(model(state[:, moved], left, prompt), model(state, left, prompt)[:, moved])


def test_a_rollout_does_not_depend_on_what_shares_its_batch() -> None:
    torch.manual_seed(0)
    engine = graphs.GraphEngine(graphs.GraphModel(5), graphs.GraphOptions(), torch.device("cpu"))
    requests = [SampleRequest("single", seed) for seed in range(40)]
    together, alone = engine.generate(requests), engine.generate(requests[7:8])[0]
    assert np.array_equal(together[7].states, alone.states) and not np.array_equal(
        together[7].states, together[8].states
    )
    first = np.stack([t.states[0] for t in engine.generate([SampleRequest("single", seed) for seed in range(2000)])])
    # The noise a graph starts from: each kind as often, to four standard deviations.
    assert abs(np.bincount(first.ravel()) / first.size - 0.25).max() < 4 * (0.25 * 0.75 / first.size) ** 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.eta=1", "known keys: num_inference_steps, num_atoms (keys of sampler for graphs)"),
        ("train.mixed_steps=[2]", "train.mixed_steps is for text, and task.name"),
        ("train.block_schedule=[{from_step: 0, rollout: 1, train: 1}]", "train.block_schedule is for text"),
        ("sft.masking=semi_ar", "sft.masking semi_ar is for text"),
        ("algorithm={name: tracerl}", "algorithm.name 'tracerl' trains text, and task.name"),
        ("rollout={engine: server, server: {urls: ['http://x']}}", "rollout.engine server samples text"),
        ("model.path=./nowhere", "model.path './nowhere' is not a folder"),
    ],
)
def test_what_graphs_cannot_do_is_one_line(override: str, message: str, tmp_path: Path) -> None:
    words = arguments(tmp_path)
    with pytest.raises(ValueError) as error:
        check_run(load_config(words[1], [override]))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sft", "sft.steps=1"], "sft.steps: graphs have no supervised stage, set it to 0"),
        (["rollout", "--search", "best_of_n"], "--search is not known for graphs: write Graphs.search_sampler"),
        (["eval", "--decoding", "static"], "generations are kept of text, and task.name"),
        (["check", "--plan"], "--plan is not known for graphs: write Graphs.memory"),
    ],
)
def test_what_graphs_do_not_have_is_one_line(
    command: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = f"model.path={trained / 'checkpoints' / 'step_20' / 'hf'}"
    output = [saved, "--output", str(tmp_path / "out")] if command[0] == "rollout" else []
    assert main([command[0], *arguments(tmp_path), *command[1:], *output]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"denoise-rl: {message}") and error.count("\n") == 1


def test_a_task_names_its_modality_by_class_by_address_or_by_name() -> None:
    class Task(graphs.BondTask):
        pass

    assert modality_class(Task) is graphs.Graphs
    for modality in (f"{FILE}:Graphs", "docs.examples.graphs:Graphs"):
        Task.modality = modality  # type: ignore[assignment]
        assert modality_class(Task()).name == "graphs"
    Task.modality = "imagse"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"the task's modality 'imagse' does not exist: did you mean 'images'\?"):
        modality_class(Task)

    class Old:
        medium = "images"

    for task in (Old, Old()):
        with pytest.raises(ValueError, match="task Old is now called modality: write modality = 'images'"):
            modality_class(task)


def test_another_process_reads_the_config_whose_classes_lie_in_a_file(tmp_path: Path) -> None:
    """As rollout workers get it: pickled, where nobody has imported the file yet."""
    words = arguments(tmp_path)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(load_config(words[1], ["sampler.num_atoms=7"])))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).sampler.num_atoms)"
    words = [sys.executable, "-c", code, str(tmp_path / "config.pickle")]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout == "7\n"
