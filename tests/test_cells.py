"""Cells of an architecture: the table, the predictor, DGPO, the exact law, and searches over graphs."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rl.cli import main
from rl.config import load_config
from rl.estimators.base import Verdicts
from rl.modalities.graph_engine import GraphEngine
from rl.modalities.graph_law import finished_law
from rl.modalities.graph_search import GraphSampler, tilted
from rl.modalities.graphs import Graphs, graph_rows
from rl.modalities.graphs_plan import GraphOptions
from rl.models.graph_policy import GraphModel, kept
from rl.recipes.dgpo import DGPO
from rl.registry import SEARCHES
from rl.tasks import cells
from rl.tasks.cells import OPERATIONS, PAIRS, CellPredictor, CellsTask, cell_of, graph_of
from rl.train.plan import check_run
from rollouts.engines.base import SampleRequest
from rollouts.search.protocol import SearchProblem
from tests.runs import ROOT, lines
from tests.test_graphs import STATES, first_law, small, step_law

CONFIG = str(ROOT / "configs" / "cells_dgpo.yaml")
SHIPPED = importlib.util.find_spec("analognasbench") is not None


def made_up(metric: str = "baseline_accuracy") -> dict[tuple[str, ...], float]:
    """A table of all cells: good operations add up, and the first and the last pair like to be equal."""
    worth = dict(zip(OPERATIONS, (0.0, 0.05, 0.08, 0.1, 0.02), strict=True))
    every = itertools.product(OPERATIONS, repeat=len(PAIRS))
    return {cell: 0.3 + sum(worth[kind] for kind in cell) + 0.05 * (cell[0] == cell[5]) for cell in every}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    known = made_up()
    monkeypatch.setattr(cells, "table", lambda metric="baseline_accuracy": known)
    return known


@pytest.mark.skipif(not SHIPPED, reason="pip install 'denoise-rl[cells]'")
def test_the_packages_table_is_read_in_the_order_of_our_pairs() -> None:
    """A cell whose input does not reach its output guesses one of ten classes. In no other order is that so."""
    known, task = cells.table(), CellsTask()
    assert len(known) == 5**6 and max(known.values()) == pytest.approx(0.940664)
    cut = {cell for cell in known if not task.valid(graph_of(cell))}
    assert len(cut) == 341 and {known[cell] for cell in cut} == {0.1}
    assert min(known[cell] for cell in known.keys() - cut) > 0.35
    assert 2000 < len(task.data()) < 3000 and max(known[cell] for cell in task.data()) < 0.85
    with pytest.raises(ValueError, match="cells have no metric 'f1': baseline_accuracy, ptq_accuracy"):
        cells.table("f1")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cells.table.cache_clear()
    with pytest.raises(ValueError, match=r"task\.name cells reads the table of analog-nasbench: pip install 'denoise"):
        check_run(load_config(CONFIG))


def test_a_pickle_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a class pathlib\._?.*PosixPath, which is not read"):
        cells._PlainUnpickler(io.BytesIO(pickle.dumps(Path("x")))).load()


def test_a_cell_is_its_operations(table: dict[tuple[str, ...], float]) -> None:
    graph = {"nodes": ["sum"] * 4, "edges": [[0, 3, "skip_connect"], [1, 2, "nor_conv_3x3"]]}
    cell = ("none", "none", "skip_connect", "nor_conv_3x3", "none", "none")
    assert cell_of(graph) == cell and graph_of(cell) == graph and CellsTask().valid(graph)
    assert cells.accuracy([graph]) == [pytest.approx(0.3 + 0.05 + 0.1 + 0.05)]
    apart = ("avg_pool_3x3", "none", "none", "none", "none", "nor_conv_1x1")
    through = ("none", "avg_pool_3x3", "none", "none", "none", "nor_conv_1x1")
    assert not CellsTask().valid(graph_of(apart)) and CellsTask().valid(graph_of(through))
    rows = CellsTask(ceiling=0.6).train_examples(0, 3, 200)
    assert all(table[cell_of(row["graph"])] < 0.6 for row in rows)
    assert rows == CellsTask(ceiling=0.6).train_examples(0, 3, 200) != CellsTask(ceiling=0.6).train_examples(0, 4, 200)
    with pytest.raises(ValueError, match=r"task\.params\.ceiling 0\.1 leaves no training cell"):
        CellsTask(ceiling=0.1).data()


def test_the_predictor_finds_a_table_of_pairs_and_averages_over_probabilities(
    table: dict[tuple[str, ...], float],
) -> None:
    predictor, some = CellPredictor(labelled=3000, ridge=1e-3), list(table)[::97]
    found = predictor([], [graph_of(cell) for cell in some])
    np.testing.assert_allclose(found, [table[cell] for cell in some], atol=1e-4)
    torch.manual_seed(0)
    soft = torch.rand(1, 10, 5, dtype=torch.float64).softmax(-1)
    # Two pairs undecided, the others decided: the mean over their 25 cells.
    soft[0, [5, 6, 7, 8]] = torch.eye(5, dtype=torch.float64)[[1, 0, 3, 4]]
    mean = 0.0
    for first, last in itertools.product(range(5), repeat=2):
        cell = tuple(OPERATIONS[kind] for kind in (first, 1, 0, 3, 4, last))
        mean += float(soft[0, 4, first] * soft[0, 9, last]) * table[cell]
    assert float(predictor.on_graphs(soft)) == pytest.approx(mean, abs=1e-4)


def test_dgpo_trains_one_of_equal_graphs_against_running_statistics() -> None:
    recipe = DGPO(rate=0.25, max_advantage=1.2)
    memory = recipe.memory()
    reward = torch.tensor([1.0, 3.0, 1.0, torch.nan, 2.0]).double()
    shown = [b"a", b"b", b"a", b"c", b"d"]
    verdicts = Verdicts(reward, torch.zeros(5, dtype=torch.long), summaries=shown, memory=memory)
    # Graphs a, b, d: mean 2, variance 2/3.
    std = (2 / 3) ** 0.5
    np.testing.assert_allclose(recipe.advantage(verdicts), [-1.2, 1.2, np.nan, np.nan, 0])
    assert memory.numbers == pytest.approx([2, std])
    later = recipe.memory()
    later.restore(json.loads(json.dumps(memory.state())))
    verdicts = Verdicts(reward[:2] + 1, torch.zeros(2, dtype=torch.long), summaries=shown[:2], memory=later)
    # Rewards 2 and 4: a quarter of the way to mean 3 and deviation 1.
    mean, std = 2.25, 0.75 * std + 0.25
    np.testing.assert_allclose(recipe.advantage(verdicts), [(2 - mean) / std, min(1.2, (4 - mean) / std)])
    alike = Verdicts(torch.ones(2).double(), torch.zeros(2, dtype=torch.long), summaries=shown[:2], memory=later)
    assert recipe.advantage(alike).tolist() == [0, 0]
    nothing = Verdicts(reward[3:4], torch.zeros(1, dtype=torch.long), summaries=shown[3:4], memory=later)
    assert recipe.advantage(nothing).isnan().all()
    trajectory = SimpleNamespace(states=np.array([[1, 2], [3, 4]]))
    assert recipe.summary(trajectory) == np.array([3, 4]).tobytes() and not recipe.needs_group


# The exact law.


def test_the_law_is_that_of_the_steps_matrices() -> None:
    model = small()
    states, law = finished_law(model, 2)
    with torch.no_grad():
        expected = first_law(model) @ step_law(model, 2) @ step_law(model, 1)
    assert torch.equal(states, STATES)
    torch.testing.assert_close(law, expected, rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="there are 32768 states, and at most 20000 are listed"):
        finished_law(GraphModel(5, torch.full((15, 2), 0.5).double(), 1, False), 2)


class Independent(GraphModel):
    """The true denoiser of graphs whose places are independent, with the probabilities `law` [S, K]."""

    law: torch.Tensor

    def forward(self, state: torch.Tensor, level: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        stays = kept(level)[:, None, None]
        here = torch.nn.functional.one_hot(state, self.limit.shape[1]).double()
        noise = (here * self.limit).sum(-1, keepdim=True)
        return (self.law * (stays * here + (1 - stays) * noise)).log()


def independent() -> Independent:
    torch.manual_seed(1)
    limit = torch.tensor([[0.7, 0.3]] * 3 + [[0.4, 0.6]] * 3, dtype=torch.float64)
    model = Independent(3, limit, 1, False, width=4, layers=1)
    model.law = torch.rand(6, 2, dtype=torch.float64).mul(3).softmax(-1)
    return model


WORTH = torch.tensor([[0.0, 1.0], [0.5, 0.0], [0.0, -1.0], [0.3, 0.9], [0.0, 2.0], [1.0, 0.2]], dtype=torch.float64)


def test_guidance_by_a_linear_reward_is_the_tilted_law() -> None:
    """Independent places, reward sum of WORTH: p(x) exp(2 r(x)) / Z by enumeration; and TDS has no variance."""
    model, scale, steps = independent(), 2.0, 3
    states, law = finished_law(model, steps)
    torch.testing.assert_close(law, model.law.gather(1, states.T).prod(0), rtol=1e-9, atol=1e-12)
    weight = law * (scale * WORTH.gather(1, states.T).sum(0)).exp()

    def guided(state: torch.Tensor, t: int) -> torch.Tensor:
        times = torch.full((len(state),), t)
        clean = model(state, times / steps, times * 0).softmax(-1)
        return model.posterior(tilted(clean, WORTH, scale), state, times, steps)

    torch.testing.assert_close(finished_law(model, steps, guided)[1], weight / weight.sum(), rtol=1e-9, atol=1e-12)
    problem, search = searched(model, steps), SEARCHES.resolve("tds")
    found = search(num_particles=3, alpha=0.5, value="none", resample_below=0.0).run(
        problem, np.zeros(4, dtype=np.int64), np.arange(4)
    )
    np.testing.assert_allclose(found.log_z, float(weight.sum().log()), rtol=1e-9)
    assert len({t.states.tobytes() for t in problem.sampler.trajectories(found.states)}) > 2


# Searches.


def searched(model: GraphModel, steps: int, together: int = 7) -> SearchProblem:
    engine = GraphEngine(model, GraphOptions(num_inference_steps=steps), torch.device("cpu"), ["graph"], together)
    sampler = GraphSampler(engine, ["graph"])

    def reward(states: Any) -> np.ndarray:
        finished = torch.from_numpy(states.states[:, -1])
        return WORTH.gather(1, finished.T).sum(0).numpy()

    return SearchProblem(sampler, reward, lambda kinds, states: (WORTH * kinds).sum((1, 2)))


def test_a_search_that_only_starts_and_finishes_draws_the_engines_samples() -> None:
    problem = searched(small(), 4)
    sampler = problem.sampler
    ends = problem.finish(sampler.start(np.zeros(9, dtype=np.int64), np.arange(9)))
    expected = sampler.engine.generate([SampleRequest("graph", seed) for seed in range(9)])
    for one, other in zip(sampler.trajectories(ends), expected, strict=True):
        assert np.array_equal(one.states, other.states)
        np.testing.assert_allclose(one.logprob, other.logprob, rtol=1e-9)
    assert sampler.budget.denoiser_evaluations == 36


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("best_of_n", {"num_samples": 4}),
        ("svdd", {"num_candidates": 4}),
        ("smc", {"num_particles": 4, "alpha": 0.3}),
        ("tds", {"num_particles": 4, "alpha": 0.3}),
        ("guidance", {"scale": 3.0}),
        ("dts", {"num_iterations": 6, "alpha": 0.3}),
        ("noise_paths", {"num_paths": 2, "num_renoisings": 2}),
        ("noise_zero_order", {"num_rounds": 2, "num_neighbours": 3}),
    ],
)
def test_every_search_finds_better_graphs_whose_record_is_the_policys(name: str, params: dict[str, Any]) -> None:
    model = small()
    problem = searched(model, 3)
    plain = problem.judge(problem.finish(problem.sampler.start(np.zeros(60, dtype=np.int64), np.arange(60)))).mean()
    found = SEARCHES.resolve(name)(**params).run(problem, np.zeros(60, dtype=np.int64), np.arange(60))
    assert found.reward.mean() > plain + 0.3
    trajectories = problem.sampler.trajectories(found.states)
    with torch.no_grad():
        logprob = graph_rows(trajectories, eager=False).score(model).logprob
    np.testing.assert_allclose(logprob, np.concatenate([t.logprob for t in trajectories]), rtol=1e-9)


def test_noise_is_added_back_as_the_model_adds_it() -> None:
    model = small()
    problem, count = searched(model, 4, together=4000), 4000
    sampler = problem.sampler
    done = problem.finish(sampler.start(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)))
    many = done.select(np.zeros(count, dtype=np.int64))
    noised = sampler.renoise(many, 3, np.arange(count))
    assert set(noised.at) == {1} and not noised.states[:, 2:].any() and not noised.logprob[:, 1:].any()
    last, stays = torch.from_numpy(done.states[0, -1]), float(kept(torch.tensor(3 / 4)))
    expected = stays + (1 - stays) * model.limit.gather(1, last[:, None])[:, 0]
    np.testing.assert_allclose((noised.states[:, 1] == last.numpy()).mean(0), expected, atol=0.03)
    start = sampler.start(np.zeros(count, dtype=np.int64), np.arange(count))
    moved = sampler.perturb(start, 0.5, np.arange(count) + count)
    differs = 0.5 * 2 * model.limit[:, 0] * model.limit[:, 1]
    np.testing.assert_allclose((moved.states[:, 0] != start.states[:, 0]).mean(0), differs, atol=0.03)
    with torch.no_grad():
        likeliest = model(torch.from_numpy(start.states[:5, 0]), torch.ones(5), torch.zeros(5).long()).argmax(-1)
    assert np.array_equal(sampler.x0_hat(start.select(np.arange(5))).states[:, -1], likeliest)


def test_the_whole_command(table: dict[tuple[str, ...], float], tmp_path: Path) -> None:
    small_run = ["sft.steps=4", "sft.batch_size=8", "train.steps=2", "train.group_size=8", "train.epochs=1"]
    small_run += ["sampler.num_inference_steps=3", "task.params.ceiling=0.6"]
    small_run += ["eval={num_inference_steps: [3], num_prompts: 6, every: 0}", f"run.output_dir={tmp_path / 'run'}"]
    assert main(["train", "--config", CONFIG, *small_run]) == 0
    assert all(line["policy/decisions"] % 3 == 0 for line in lines(tmp_path / "run", "train"))
    assert "eval/validity@3" in lines(tmp_path / "run", "eval")[0]
    model = f"model.path={tmp_path / 'run' / 'warm_start'}"
    guided = ["--num-prompts", "3", "--output", str(tmp_path / "found"), "--search", "guidance"]
    predictor = 'reward={functions: [{name: "rl.tasks.cells:CellPredictor", params: {labelled: 100}}]}'
    assert main(["rollout", "--config", CONFIG, model, *small_run[5:7], predictor, *guided]) == 0
    found = [json.loads(line) for line in (tmp_path / "found" / "rollouts.jsonl").read_text().splitlines()]
    assert len(found) == 3 and found[0]["completion"]["nodes"] == ["sum"] * 4


def test_a_reward_without_gradient_cannot_guide() -> None:
    config = load_config(CONFIG)
    with pytest.raises(ValueError, match=r"reward 'rl\.tasks\.cells:accuracy' has no gradient to graphs: give it on"):
        Graphs(config, CellsTask()).soft_reward(None)
