"""Graphs: the posterior against matrices, the law and both gradients of 3-node graphs by enumeration, the task."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rewards.load import load_reward
from rl.cli import main
from rl.config import load_config
from rl.estimators.base import Verdicts
from rl.modalities.graphs import CleanRows, Graphs, StepRows, graph_rows
from rl.modalities.graphs_plan import GraphOptions, encode
from rl.models.graph_policy import GraphModel, drawn, kept
from rl.recipes.gdpo import GDPO, GraphDDPO
from rl.tasks.molecules import MoleculesTask, valid, valid_molecule
from rl.train.plan import check_run
from rollouts.engines.base import SampleRequest
from tests.runs import ROOT, lines

CONFIG = str(ROOT / "configs" / "molecules_gdpo.yaml")
STATES = torch.tensor(list(itertools.product(range(2), repeat=6)))  # [64, 6]: three nodes, three pairs, two kinds
T = 2


def small(directed: bool = False, seed: int = 0) -> GraphModel:
    """Three nodes; noise draws kind 1 of a node with probability 0.3 and an edge with 0.6."""
    torch.manual_seed(seed)
    limit = torch.tensor([[0.7, 0.3]] * 3 + [[0.4, 0.6]] * 3, dtype=torch.float64)
    model = GraphModel(3, limit, 1, directed, width=8, layers=2)
    with torch.no_grad():
        for head in (model.node_head, model.edge_head):
            head.weight.mul_(4)
    return model.double()


def step_law(model: GraphModel, t: int) -> torch.Tensor:
    """[64, 64]: from every state at time t to every one at t - 1."""
    zeros = torch.zeros(64, dtype=torch.long)
    kinds = model.denoise(STATES, torch.full((64,), t), T, zeros)
    places = torch.arange(6)
    return torch.stack([kinds[:, places, state].prod(-1) for state in STATES], dim=1)


def first_law(model: GraphModel) -> torch.Tensor:
    """[64], of the noise."""
    return torch.stack([model.limit[torch.arange(6), state].prod() for state in STATES])


@pytest.fixture
def model() -> GraphModel:
    return small()


def test_the_step_is_bayes_rule_on_the_noise(model: GraphModel) -> None:
    """q(x_{t-1} | x_t) from transition matrices of the marginal noise, summed over the clean kinds."""
    state, steps, prompt = STATES[[5, 44]], 3, torch.zeros(2, dtype=torch.long)
    for t in (3, 2, 1):
        clean = model(state, torch.full((2,), t / steps), prompt).softmax(-1)
        found = model.denoise(state, torch.full((2,), t), steps, prompt)

        def noise(limit: torch.Tensor, level: float) -> torch.Tensor:
            stays = kept(torch.tensor(level))
            return stays * torch.eye(2, dtype=torch.float64) + (1 - stays) * limit

        for graph, place in np.ndindex(2, 6):
            limit = model.limit[place]
            before, now = noise(limit, (t - 1) / steps), noise(limit, t / steps)
            step = torch.linalg.solve(before, now)  # from the noise before it to the noise after it
            x = state[graph, place]
            posterior = torch.stack([before[k] * step[:, x] / now[k, x] for k in range(2)])
            torch.testing.assert_close(found[graph, place], clean[graph, place] @ posterior, rtol=1e-6, atol=1e-9)
    assert float(kept(torch.tensor(0.0))) == 1 and float(kept(torch.tensor(1.0))) == 0


def sampled(model: GraphModel, count: int, steps: int = T, together: int = 20_000) -> Any:
    graphs = Graphs(*facade(steps, together=together))
    engine = graphs.engine(model, GraphOptions(num_inference_steps=steps), torch.device("cpu"))
    return engine.generate([SampleRequest("graph", seed) for seed in range(count)])


def facade(steps: int = T, task: Any = None, noise: str = "uniform", together: int = 256) -> tuple[Any, Any]:
    task = task or SimpleNamespace(
        num_nodes=3, nodes=("a", "b"), edges=("none", "edge"), prompts=("graph",), directed=False
    )
    options = GraphOptions(num_inference_steps=steps, noise=noise)
    return SimpleNamespace(sampler=options, rollout=SimpleNamespace(max_batch_size=together)), task


def test_the_law_of_finished_graphs_is_that_of_dynamic_programming(model: GraphModel) -> None:
    with torch.no_grad():
        law = first_law(model)
        for t in range(T, 0, -1):
            law = law @ step_law(model, t)
    assert float(law.sum()) == pytest.approx(1) and law.max() > 3 * law.median()
    count = 20_000
    final = np.stack([t.states[-1] for t in sampled(model, count)])
    found = np.bincount(final @ (2 ** np.arange(5, -1, -1)), minlength=64) / count
    deviation = (law * (1 - law) / count).sqrt().numpy()
    assert (np.abs(found - law.numpy()) / deviation).max() < 4.5


def reward(state: torch.Tensor) -> torch.Tensor:
    """[64]: 1 for the graphs of at least two edges between nodes of one kind each, and 0.3 for node 0 of kind 1."""
    return (state[:, 3:].sum(1) >= 2).double() + 0.3 * state[:, 0]


def every_path(model: GraphModel) -> tuple[list[Any], torch.Tensor]:
    """All 64^3 trajectories as one batch of indices [64^3, 3], and their probabilities."""
    with torch.no_grad():
        first, second, third = first_law(model), step_law(model, 2), step_law(model, 1)
    index = torch.cartesian_prod(torch.arange(64), torch.arange(64), torch.arange(64))
    a, b, c = index.T
    return [index], first[a] * second[a, b] * third[b, c]


def rows_of(index: torch.Tensor, eager: bool) -> StepRows | CleanRows:
    """The rows of a recipe for trajectories given as indices [M, 3] of states, without sampling them."""
    trajectories = [
        SimpleNamespace(states=STATES[own].numpy(), logprob=np.zeros(T), prompt=0, num_steps=T) for own in index
    ]
    return graph_rows(trajectories, eager)  # type: ignore[arg-type]


def test_the_exact_gradient_is_that_of_the_expected_reward_and_the_eager_one_points_its_way(model: GraphModel) -> None:
    """Both by enumeration. Weights of pairs of states are summed first: a decision is scored once, not 64 times."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    law = first_law(model) @ step_law(model, 2) @ step_law(model, 1)
    wanted = torch.autograd.grad((law * reward(STATES)).sum(), parameters, allow_unused=True)
    [index], probability = every_path(model)
    credit = probability * reward(STATES[index[:, 2]])
    gradients = []
    for eager in (False, True):
        table = torch.zeros(T, 64, 64, dtype=torch.float64)
        for step in range(T):
            other = index[:, 2] if eager else index[:, step + 1]
            table[step].view(-1).index_add_(0, index[:, step] * 64 + other, credit)
        pairs = torch.cartesian_prod(torch.arange(64), torch.arange(64))
        total: Any = 0.0
        for step in range(T):
            # A trajectory that has the pair at this step; what it does elsewhere is not scored here.
            chosen = torch.stack([pairs[:, 0]] * 2 + [pairs[:, 1]], dim=1)
            if not eager and step == 0:
                chosen = torch.stack([pairs[:, 0], pairs[:, 1], pairs[:, 1]], dim=1)
            rows = rows_of(chosen, eager)
            logprob = rows.score(model).logprob[rows.step == step]
            total = total + (table[step].flatten() * logprob).sum()
        gradients.append(torch.autograd.grad(total, parameters, allow_unused=True))
    for one, other in zip(wanted, gradients[0], strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)
    exact, eager_ = (torch.cat([g.flatten() for g in own if g is not None]) for own in gradients)
    cosine = float(torch.nn.functional.cosine_similarity(exact, eager_, dim=0))
    assert exact.norm() > 1e-2 and 0.3 < cosine < 0.999


def test_rows_say_what_each_step_is_scored_on(model: GraphModel) -> None:
    trajectories = sampled(model, 5, steps=3)
    steps, clean = (recipe().rows(trajectories, model) for recipe in (GraphDDPO, GDPO))
    assert steps.timestep.tolist() == clean.timestep.tolist() == [3, 2, 1] * 5
    assert steps.trajectory.tolist() == [i for i in range(5) for _ in range(3)] and clean.sampler_logprob is None
    assert torch.equal(steps.drawn[4], torch.from_numpy(trajectories[1].states[2]))
    assert torch.equal(clean.clean[3:6], torch.from_numpy(trajectories[1].states[3]).expand(3, 6))
    kinds = model(clean.latent[4:5], torch.tensor([2 / 3]), torch.tensor([0])).softmax(-1)[0].detach()
    by_hand = sum(float(kinds[place, kind].log()) for place, kind in enumerate(trajectories[1].states[3]))
    assert float(clean.score(model).logprob[4].detach()) == pytest.approx(by_hand)
    assert GDPO().old_logprob == "on_policy" and GraphDDPO().old_logprob == "sampler"
    verdicts = Verdicts(torch.tensor([0.0] * 49 + [1.0]).double(), torch.zeros(50, dtype=torch.long))
    assert GDPO().advantage(verdicts).max() == 5 and GDPO(max_advantage=9.0).advantage(verdicts).max() > 6


@pytest.mark.parametrize("directed", [False, True])
def test_the_numbering_of_nodes_matters_where_edges_lead_from_one_to_the_next(directed: bool) -> None:
    model, order = small(directed), [2, 0, 1]
    pairs = list(itertools.combinations(range(3), 2))
    moved = torch.tensor([*order, *(3 + pairs.index(tuple(sorted((order[i], order[j])))) for i, j in pairs)])
    state, level, prompt = STATES[[11, 37]], torch.full((2,), 0.5), torch.zeros(2, dtype=torch.long)
    model.float()
    one, other = model(state[:, moved], level, prompt), model(state, level, prompt)[:, moved]
    assert torch.allclose(one, other, atol=1e-5) != directed


def test_no_place_becomes_what_it_cannot_be() -> None:
    """Four kinds of nodes and two of edges share a table; the noise of the data is counted in it."""
    task = SimpleNamespace(
        num_nodes=3, nodes=("a", "b", "c", "d"), edges=("none", "edge"), prompts=("graph",), directed=False,
        train_examples=lambda seed, step, count: [{"graph": {"nodes": ["a", "a", "d"], "edges": [[0, 2, "edge"]]}}] * 7,
    )  # fmt: skip
    config, _ = facade(4, task, "marginal")
    torch.manual_seed(0)
    model = Graphs(config, task).new_model()
    # One more than counted: of 21 nodes 14 and 7, of 21 edges 7.
    torch.testing.assert_close(model.limit[0], torch.tensor([15, 1, 1, 8]).double() / 25)
    torch.testing.assert_close(model.limit[5], torch.tensor([15, 8, 0, 0]).double() / 23)
    engine = Graphs(config, task).engine(model, config.sampler, torch.device("cpu"))
    states = np.stack([t.states for t in engine.generate([SampleRequest("graph", seed) for seed in range(300)])])
    assert states[:, :, 3:].max() == 1 and states[:, :, :3].max() == 3
    rows = GraphDDPO().rows(
        [SimpleNamespace(states=s, logprob=np.zeros(4), prompt=0, num_steps=4) for s in states], model
    )
    assert rows.score(model).logprob.isfinite().all() and rows.score(model).entropy.isfinite().all()
    assert drawn(torch.tensor([[0.25, 0.75, 0, 0]]), torch.tensor([1 - 2**-53])).item() == 1


def test_a_rollout_does_not_depend_on_what_shares_its_batch(model: GraphModel) -> None:
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    together, alone = sampled(model, 40), sampled(model, 40, together=15)
    assert sizes == [40] * T + [15] * T + [15] * T + [10] * T
    assert all(np.array_equal(one.states, other.states) for one, other in zip(together, alone, strict=True))
    assert len({t.states.tobytes() for t in together}) > 20


def test_the_supervised_stage_noises_as_the_sampler_undoes() -> None:
    task: Any = MoleculesTask(num_nodes=4)
    config, _ = facade(5, task, "marginal")
    modality = Graphs(config, task)
    torch.manual_seed(0)
    model = modality.new_model()
    examples = task.train_examples(0, 0, 400)
    rows, weight = modality.supervised(model, examples, slice(0, 400), [1])
    part, own = modality.supervised(model, examples, slice(100, 150), [1])
    assert torch.equal(rows.latent[100:150], part.latent) and torch.equal(weight[100:150], own)
    assert rows.clean[7].tolist() == encode(examples[7]["graph"], task)
    late, early = rows.timestep == 5, rows.timestep == 1
    differs = (rows.latent != rows.clean).double().mean(1)
    # At time T nothing of the graph is left, and its places agree by chance alone.
    chance = 1 - (model.limit.gather(1, rows.clean[late].T)).mean()
    assert differs[late].mean() == pytest.approx(float(chance), abs=0.05) and differs[early].mean() < 0.1


@pytest.mark.parametrize(
    ("nodes", "edges", "expected"),
    [
        ("CO", [[0, 1, "double"]], True),
        ("CO", [[0, 1, "triple"]], False),
        ("CCC", [[0, 1, "single"]], False),
        ("FCF", [[0, 1, "single"], [1, 2, "single"]], True),
        ("CFC", [[0, 1, "single"], [1, 2, "single"]], False),
        ("CCC", [[0, 1, "double"], [1, 2, "double"], [0, 2, "single"]], True),
        ("CCN", [[0, 1, "double"], [1, 2, "double"], [0, 2, "triple"]], False),
    ],
)
def test_valid_molecules_by_hand(nodes: str, edges: list[Any], expected: bool) -> None:
    graph = {"nodes": list(nodes), "edges": edges}
    assert valid(graph) is expected and valid_molecule([graph]) == [float(expected)]


def test_rdkit_and_the_valences_agree_on_every_graph_of_three_atoms() -> None:
    """4,096 graphs, but for 24: RDKit reads N=N#N and its like, a nitrogen of five bonds, as two charged atoms.

    QED is that of the same molecule written as SMILES, and 0 where there is no molecule.
    """
    chem = pytest.importorskip("rdkit.Chem")
    from rdkit.Chem import QED

    task, pairs = MoleculesTask(num_nodes=3), list(itertools.combinations(range(3), 2))
    graphs = [
        {"nodes": list(nodes), "edges": [[*p, k] for p, k in zip(pairs, kinds, strict=True) if k != "none"]}
        for nodes in itertools.product(task.nodes, repeat=3)
        for kinds in itertools.product(task.edges, repeat=3)
    ]
    theirs = load_reward("rdkit_valid")(prompts=[], completions=graphs)
    pairs_ = zip(graphs, valid_molecule(graphs), theirs, strict=True)
    differ = [(graph, one, other) for graph, one, other in pairs_ if one != other]
    assert sum(theirs) == 472 and len(differ) == 24
    for graph, one, other in differ:
        assert (one, other) == (0.0, 1.0) and {kind for *_, kind in graph["edges"]} == {"double", "triple"}
        [middle] = set(graph["edges"][0][:2]) & set(graph["edges"][1][:2])
        assert graph["nodes"][middle] == "N"
    ethanol = {"nodes": ["O", "C", "C"], "edges": [[0, 1, "single"], [1, 2, "single"]]}
    parts = {"nodes": ["O", "C", "C"], "edges": [[0, 1, "single"]]}
    found = load_reward("qed")(prompts=[], completions=[ethanol, parts])
    assert found == [pytest.approx(QED.qed(chem.MolFromSmiles("CCO"))), 0.0] and 0.3 < found[0] < 0.5


@pytest.mark.parametrize("name", ["qed", "rdkit_valid"])
def test_a_missing_rdkit_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ValueError, match=rf"reward '{name}' needs RDKit: pip install 'denoise-rl\[molecules\]'"):
        load_reward(name)


def test_a_form_is_of_the_graph_and_not_of_its_numbering() -> None:
    task = MoleculesTask(num_nodes=5, graphs=200)
    rng = np.random.default_rng(0)
    for number in range(20):
        graph, order = task.data(number), rng.permutation(5)
        again = {
            "nodes": [graph["nodes"][list(order).index(i)] for i in range(5)],
            "edges": [[*sorted((int(order[a]), int(order[b]))), kind] for a, b, kind in graph["edges"]],
        }
        assert task.form(graph) == task.form(again)
    chain = {"nodes": ["C"] * 4, "edges": [[0, 1, "single"], [1, 2, "single"], [2, 3, "single"]]}
    star = {"nodes": ["C"] * 4, "edges": [[0, 1, "single"], [0, 2, "single"], [0, 3, "single"]]}
    double = {"nodes": ["C"] * 4, "edges": [[0, 1, "double"], [1, 2, "single"], [2, 3, "single"]]}
    assert len({task.form(graph) for graph in (chain, star, double)}) == 3
    share = np.mean([valid(task.data(i)) for i in range(200)])
    assert 0.3 < share < 0.7 and np.mean([valid(MoleculesTask(noise=0).data(i)) for i in range(50)]) == 1
    graphs: Sequence[Any] = [chain, chain, star, {"nodes": ["C"] * 4, "edges": []}]
    small_task: Any = SimpleNamespace(form=task.form, known_forms=lambda: {task.form(star)})
    measured = Graphs(*facade(task=small_task)).measure([], graphs, [1, 1, 1, 0])
    assert measured == {"uniqueness": pytest.approx(2 / 3), "novelty": 0.5}
    # A task that can tell is asked, whatever the reward is: the fourth graph is none, though it is rewarded.
    small_task.valid = valid
    measured = Graphs(*facade(task=small_task)).measure([], graphs, [0, 0, 0, 1])
    assert measured == {"validity": 0.75, "uniqueness": pytest.approx(2 / 3), "novelty": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.params.num_nodes=1", "num_nodes must be at least 2"),
        ("sampler.noise=absorbing", "sampler.noise"),
        ("algorithm={name: dppo}", "algorithm.name 'dppo' trains actions, and task.name 'molecules' is about graphs"),
    ],
)
def test_bad_input_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_run(load_config(CONFIG, [override]))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"nodes": ["C"], "edges": []}, "a graph has 1 nodes, and those of the task have 2"),
        ({"nodes": ["C", "Xe"], "edges": []}, "a graph has a node 'Xe', and the task knows C, N, O, F"),
        ({"nodes": ["C", "C"], "edges": [[0, 1, "ionic"]]}, "a graph has a edge 'ionic'"),
        ({"nodes": ["C", "C"], "edges": [[1, 1, "single"]]}, "a graph has an edge 1, 1: it must join two of 2 nodes"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused_by_name(graph: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(graph, MoleculesTask(num_nodes=2))


def test_a_model_of_other_graphs_is_refused_by_name(tmp_path: Path) -> None:
    config = load_config(CONFIG, ["sampler.noise=uniform", f"model.path={tmp_path}"])
    other = Graphs(config, MoleculesTask(num_nodes=4))
    other.save_model(other.new_model(), tmp_path)
    wrong = (
        rf"^model\.path '{tmp_path}' is no model of task molecules as it is set: size mismatch for limit: .*\[10, 4\]"
    )
    with pytest.raises(ValueError, match=wrong) as error:
        Graphs(config, MoleculesTask(num_nodes=6)).load_model()
    assert "\n" not in str(error.value)
    assert other.load_model().num_nodes == 4


@pytest.mark.parametrize("recipe", ["gdpo", "graph_ddpo"])
def test_the_whole_command(recipe: str, tmp_path: Path) -> None:
    small_run = [
        "sft.steps=4",
        "sft.batch_size=8",
        "train.steps=2",
        "train.group_size=8",
        "sampler.num_inference_steps=3",
    ]
    small_run += ["task.params={num_nodes: 3, graphs: 20}", "eval={num_inference_steps: [3], num_prompts: 6, every: 0}"]
    small_run += [f"algorithm={{name: {recipe}}}", f"run.output_dir={tmp_path / 'run'}"]
    assert main(["train", "--config", CONFIG, *small_run]) == 0
    found = lines(tmp_path / "run", "train")
    assert all(line["policy/decisions"] % 24 == 0 and line["policy/decisions"] for line in found)
    if recipe == "graph_ddpo":
        assert max(line["policy/logprob_gap_max"] for line in found) < 1e-5
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert len(sample["completion"]["nodes"]) == 3
