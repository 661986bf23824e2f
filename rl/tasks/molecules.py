"""Molecules as graphs: heavy atoms, and bonds that no atom has too many of. No chemistry package judges them.

A graph is valid where it is one piece and no atom has more bonds than its valence; hydrogen fills up the rest. Training
graphs are grown at random, and with `noise` some of their pairs are redrawn, so that a model of them is often wrong.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from rl.tasks.base import Example

VALENCE = {"C": 4, "N": 3, "O": 2, "F": 1}
ORDER = {"none": 0, "single": 1, "double": 2, "triple": 3}
PROMPT = "molecule"


class MoleculesTask:
    """One prompt; what is held out is the noise that a graph starts from."""

    modality = "graphs"
    reward = "rl.tasks.molecules:valid_molecule"
    grid = None
    alphabet = None
    nodes = tuple(VALENCE)
    edges = tuple(ORDER)
    prompts = (PROMPT,)
    directed = False

    def __init__(self, num_nodes: int = 6, graphs: int = 2000, noise: float = 0.2):
        """
        Args:
            num_nodes: atoms of a graph, hydrogen not counted.
            graphs: training graphs that there are.
            noise: share of the pairs of a training graph whose bond is redrawn.
        """
        if num_nodes < 2 or graphs < 1 or not 0 <= noise <= 1:
            raise ValueError("task.params: num_nodes must be at least 2, graphs at least 1, noise in [0, 1]")
        self.num_nodes, self.graphs, self.noise = num_nodes, graphs, noise
        self.data = cache(self._grown)

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        first = (seed * 1_000_003 + step) * count
        return [{"prompt": PROMPT, "graph": self.data((first + i) % self.graphs)} for i in range(count)]

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        return [{"prompt": PROMPT}] * count

    def file_examples(self, path: str) -> list[Example]:
        raise ValueError("the molecules task has no file format: its graphs are grown")

    def _grown(self, number: int) -> dict[str, Any]:
        """Training graph of a number: atoms that bond to one before them, some bonds more, then the noise."""
        rng = random.Random(f"molecule {number}")
        pairs = list(itertools.combinations(range(self.num_nodes), 2))
        graph: dict[str, Any] = {"edges": []}
        while not graph["edges"] or not valid(graph):
            nodes = rng.choices(self.nodes, [6, 2, 2, 1], k=self.num_nodes)
            more = rng.choices(pairs, k=rng.randrange(3))
            bonds = Counter([(rng.randrange(atom), atom) for atom in range(1, self.num_nodes)] + more)
            kinds = {pair: self.edges[min(count, 3)] for pair, count in bonds.items()}
            graph = {"nodes": nodes, "edges": [[*pair, kinds[pair]] for pair in sorted(kinds)]}
        for pair in pairs:
            if rng.random() < self.noise:
                kinds[pair] = rng.choices(self.edges, [10, 3, 1, 0.3])[0]
        return graph | {"edges": [[*pair, kinds[pair]] for pair in pairs if kinds.get(pair, "none") != "none"]}

    def valid(self, graph: dict[str, Any]) -> bool:
        return valid(graph)

    def form(self, graph: dict[str, Any]) -> str:
        """Equal for graphs that are one but for the numbering: colours of nodes, refined by those of their neighbours.

        A few different graphs may share a form, so counts of forms err to the low side.
        """
        colours, around = list(graph["nodes"]), _neighbours(graph)
        for _ in range(len(colours)):
            seen = [sorted(kind + colours[other] for other, kind in own) for own in around]
            texts = [f"{colour} {own}" for colour, own in zip(colours, seen, strict=True)]
            colours = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
        return " ".join(sorted(colours))

    def known_forms(self) -> set[str]:
        """Forms of the valid graphs among the training graphs."""
        return {self.form(graph) for graph in map(self.data, range(self.graphs)) if valid(graph)}


def _neighbours(graph: dict[str, Any]) -> list[list[tuple[int, str]]]:
    """Of every node, its neighbours and the kinds of the edges to them."""
    found: list[list[tuple[int, str]]] = [[] for _ in graph["nodes"]]
    for first, second, kind in graph["edges"]:
        found[first].append((second, kind))
        found[second].append((first, kind))
    return found


def valid(graph: dict[str, Any]) -> bool:
    """Whether the graph is one piece and no atom has more bonds than its valence."""
    around = _neighbours(graph)
    if any(sum(ORDER[k] for _, k in own) > VALENCE[n] for n, own in zip(graph["nodes"], around, strict=True)):
        return False
    reached, ahead = {0}, [0]
    while ahead:
        new = [other for other, _ in around[ahead.pop()] if other not in reached]
        reached |= set(new)
        ahead += new
    return len(reached) == len(graph["nodes"])


def valid_molecule(completions: Sequence[dict[str, Any]], **columns: Any) -> list[float]:
    return [float(valid(graph)) for graph in completions]
