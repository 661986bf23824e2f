"""Cells of neural networks, in the space of NAS-Bench-201, judged by a table of accuracies (extra `cells`).

Dong and Yang 2020 (arXiv 2001.00326): a cell has four nodes, and each of the pairs (0, 1), (0, 2), (0, 3), (1, 2),
(1, 3), (2, 3) one of five operations, from the earlier node to the later one. That makes 5^6 = 15,625 cells.

No package ships NAS-Bench-201's own accuracies. Those here are of AnalogNAS-Bench (arXiv 2506.18495), which trained all
of these cells on CIFAR-10 anew. Its package on PyPI holds the table as a pickle, of which plain values are read alone.
"""

from __future__ import annotations

import importlib.util
import itertools
import pickle
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from rl.tasks.base import Example

if TYPE_CHECKING:
    import torch

PROMPT = "cell"
NUM_NODES = 4
PAIRS = list(itertools.combinations(range(NUM_NODES), 2))
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
# The table's numbers of the operations, in its order.
_NUMBERED = ("skip_connect", "none", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3")
Cell = tuple[str, ...]


class _PlainUnpickler(pickle.Unpickler):
    """Reads the table's two records as bare attributes, and refuses any other class."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "analognasbench.data":
            return SimpleNamespace
        raise ValueError(f"the table of analog-nasbench names a class {module}.{name}, which is not read")


@cache
def table(metric: str = "baseline_accuracy") -> dict[Cell, float]:
    """The operations of the pairs, in the order of `PAIRS` -> accuracy in [0, 1].

    Raises:
        ValueError: the package is missing, or has no such number.
    """
    found = importlib.util.find_spec("analognasbench")
    if found is None or found.origin is None:
        raise ValueError("task.name cells reads the table of analog-nasbench: pip install 'denoise-rl[cells]'")
    with (Path(found.origin).parent / "data.anb").open("rb") as file:
        rows = _PlainUnpickler(file).load()
    first = next(iter(rows.values()))
    if not isinstance(getattr(first, metric, None), float):
        known = ", ".join(name for name, value in vars(first).items() if isinstance(value, float))
        raise ValueError(f"cells have no metric {metric!r}: {known}")
    return {tuple(_NUMBERED[op] for op in key): getattr(row, metric) / 100 for key, row in rows.items()}


def cell_of(graph: Mapping[str, Any]) -> Cell:
    """The operations of the pairs of a graph; "none" where it has no edge."""
    given = {(first, second): kind for first, second, kind in graph["edges"]}
    return tuple(given.get(pair, "none") for pair in PAIRS)


def accuracy(
    completions: Sequence[Mapping[str, Any]], metric: str = "baseline_accuracy", **columns: Any
) -> list[float]:
    """Accuracy of the network of each cell, looked up."""
    known = table(metric)
    return [known[cell_of(graph)] for graph in completions]


class CellsTask:
    """One prompt; the training cells are those that are worse than a ceiling."""

    modality = "graphs"
    reward = None
    grid = None
    alphabet = None
    num_nodes = NUM_NODES
    nodes = ("sum",)
    edges = OPERATIONS
    prompts = (PROMPT,)
    directed = True

    def __init__(self, ceiling: float = 0.85, metric: str = "baseline_accuracy"):
        """
        Args:
            ceiling: accuracy below which training cells lie; above 1 all cells are training cells.
            metric: which accuracy of the table it is about.
        """
        self.ceiling, self.metric = ceiling, metric
        self.data = cache(self._data)

    def _data(self) -> list[Cell]:
        found = [cell for cell, value in table(self.metric).items() if value < self.ceiling]
        if not found:
            raise ValueError(f"task.params.ceiling {self.ceiling} leaves no training cell: raise it")
        return found

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        chosen = np.random.default_rng([seed, step]).integers(len(self.data()), size=count)
        return [{"prompt": PROMPT, "graph": graph_of(self.data()[i])} for i in chosen]

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        return [{"prompt": PROMPT}] * count

    def file_examples(self, path: str) -> list[Example]:
        raise ValueError("the cells task has no file format: its cells are those of the table")

    def valid(self, graph: Mapping[str, Any]) -> bool:
        """Whether the input reaches the output."""
        reached = {0}
        for (first, second), kind in zip(PAIRS, cell_of(graph), strict=True):
            if kind != "none" and first in reached:
                reached.add(second)
        return NUM_NODES - 1 in reached

    def form(self, graph: Mapping[str, Any]) -> Cell:
        return cell_of(graph)

    def known_forms(self) -> set[Cell]:
        return set(self.data())


def graph_of(cell: Cell) -> dict[str, Any]:
    edges = [[*pair, kind] for pair, kind in zip(PAIRS, cell, strict=True) if kind != "none"]
    return {"nodes": list(CellsTask.nodes) * NUM_NODES, "edges": edges}


class CellPredictor:
    """A differentiable guess of the accuracy, fitted to some labelled cells: what a predictor guides towards.

    Ridge regression on the operation of every pair and on the operations of every two pairs. Of probabilities it gives
    the mean over independent pairs.
    """

    differentiable = True

    def __init__(self, labelled: int = 500, ridge: float = 3.0, seed: int = 0, metric: str = "baseline_accuracy"):
        """
        Args:
            labelled: cells of the table, drawn at random, that it is fitted to.
            ridge: weight of the squared coefficients.
        """
        import torch

        known = table(metric)
        cells = [list(known)[i] for i in np.random.default_rng(seed).permutation(len(known))[:labelled]]
        one_hot = np.eye(len(OPERATIONS))[[[OPERATIONS.index(kind) for kind in cell] for cell in cells]]
        features = _features(torch.from_numpy(one_hot)).numpy()
        value = np.array([known[cell] for cell in cells])
        self.mean, center = float(value.mean()), features.mean(0)
        centred = features - center
        weight = np.linalg.solve(
            centred.T @ centred + ridge * np.eye(features.shape[1]), centred.T @ (value - self.mean)
        )
        self.weight, self.shift = torch.from_numpy(weight), float(center @ weight)
        self.__name__ = "cell_predictor"

    def on_graphs(self, probabilities: torch.Tensor) -> torch.Tensor:
        """[B], of the kinds [B, S, K] of nodes and pairs, with gradient."""
        pairs = probabilities[:, NUM_NODES:, : len(OPERATIONS)].double()
        return _features(pairs) @ self.weight.to(pairs.device) - self.shift + self.mean

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Mapping[str, Any]], **columns: Any) -> list[float]:
        import torch

        kinds = torch.tensor([[OPERATIONS.index(kind) for kind in cell_of(graph)] for graph in completions])
        one_hot = torch.nn.functional.one_hot(kinds, len(OPERATIONS))
        nodes = one_hot.new_zeros(len(one_hot), NUM_NODES, len(OPERATIONS))
        return self.on_graphs(torch.cat([nodes, one_hot], dim=1)).tolist()


def _features(pairs: torch.Tensor) -> torch.Tensor:
    """[B, 6 K + 15 K^2] of kinds [B, 6, K]: each pair's own, and products of every two pairs'."""
    import torch

    first, second = torch.tensor(list(itertools.combinations(range(pairs.shape[1]), 2))).T
    products = pairs[:, first, :, None] * pairs[:, second, None, :]
    return torch.cat([pairs.flatten(1), products.flatten(1)], dim=1)
