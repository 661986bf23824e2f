"""Diffusion tree sampling (DTS) and search (DTS*), Jain et al. 2025, arXiv 2506.20701.

A node is a state. One iteration descends from the root: while a node has its full number of children, C n^a after n
visits (progressive widening), it goes on to one of them; then one more child is drawn from the policy and denoised to
the end, every state on the way joining the tree. The reward there is backed up along the path: the value of a node is
alpha log of the *uniform* mean of exp(value / alpha) over its draws, because they are independent draws of the policy,
however often each was visited.

Departure: where two draws can be equal (tokens), equal children are one node that counts as often as it was drawn. The
paper keeps them apart. On the 27 samples of tests/test_search.py the law of its trees then stays 0.11 to 0.13 (total
variation) away from the tilted law between 100 and 1,000 iterations, because the number of children, n^0.8, grows
nearly as fast as the visits that would correct their values, and a child that began badly is not visited again.

DTS descends to a child with probability proportional to exp(value / alpha), and samples the finished tree in the same
way: as the tree grows the samples follow p(x) exp(r(x) / alpha). DTS* descends to the largest value plus an
exploration bonus and returns where the largest values lead.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from rollouts.search.protocol import Search, SearchProblem, SearchResult, split


class TreeSearch(Search):
    """Options that both share."""

    num_iterations: int = Field(32, ge=1, description="Descents into the tree; each adds one way to a finished sample.")
    alpha: float = Field(1.0, gt=0, description="The target is p(x) exp(reward / alpha).")
    widening: float = Field(2.0, gt=0, description="C of the bound C n^a on the children of a node visited n times.")
    widening_power: float = Field(0.8, gt=0, le=1, description="Exponent a of that bound.")
    branch_steps: list[int] | None = Field(
        None, description="Denoising steps at which the tree may branch, the first is 0; null branches at all."
    )
    backup: Literal["soft", "max"] = Field(
        "soft", description="Value of a node from its children: alpha log mean exp(value / alpha), or the best."
    )


class Node:
    """A state in the tree: entry `index` of the batch it was made in; no batch at a root above random starts."""

    __slots__ = ("batch", "by_key", "children", "depth", "done", "draws", "index", "value", "visits")

    def __init__(self, batch: Any | None, index: int, depth: int):
        self.batch, self.index = batch, index
        self.depth = depth
        self.done = batch is not None and bool(batch.done[index])
        self.children: list[Node] = []
        # How often each child was drawn, and where a child of a given key is.
        self.draws: list[int] = []
        self.by_key: dict[Any, int] = {}
        self.value = 0.0
        self.visits = 0

    def is_full(self, options: TreeSearch) -> bool:
        """Whether a descent goes on to a child instead of adding one."""
        limit = 1.0
        if options.branch_steps is None or self.depth in options.branch_steps or self.batch is None:
            limit = options.widening * max(self.visits, 1) ** options.widening_power
        return sum(self.draws) >= limit

    def drawn(self, batch: Any, index: int, key: Any) -> Node:
        """The child that a draw of the policy gave; `key` is None where no two draws are alike."""
        place = self.by_key.get(key) if key is not None else None
        if place is None:
            place = len(self.children)
            self.children.append(Node(batch, index, self.depth + 1))
            self.draws.append(0)
            self.by_key[key] = place
        self.draws[place] += 1
        return self.children[place]

    def back_up(self, options: TreeSearch) -> None:
        """Count a visit, and the value of the children."""
        self.visits += 1
        if self.children:
            values = [child.value for child in self.children]
            top = max(values)
            self.value = top
            if options.backup == "soft" and math.isfinite(top):
                weights = [n * math.exp((v - top) / options.alpha) for v, n in zip(values, self.draws, strict=True)]
                mean = math.fsum(weights) / sum(self.draws)
                self.value = top + options.alpha * math.log(mean)


# Which child a descent takes.
Choose = Callable[[Node, random.Random], Node]


def sampled_child(alpha: float) -> Choose:
    """A draw with probability proportional to exp(value / alpha)."""

    def choose(node: Node, rng: random.Random) -> Node:
        top = max(child.value for child in node.children)
        if not math.isfinite(top):
            return rng.choices(node.children, node.draws)[0]
        weights = [n * math.exp((c.value - top) / alpha) for c, n in zip(node.children, node.draws, strict=True)]
        return rng.choices(node.children, weights)[0]

    return choose


def best_child(exploration: float) -> Choose:
    """The child of largest value plus exploration * sqrt(log n_parent / n_child)."""

    def choose(node: Node, rng: random.Random) -> Node:
        log_visits = math.log(max(node.visits, 1))
        return max(node.children, key=lambda c: c.value + exploration * math.sqrt(log_visits / max(c.visits, 1)))

    return choose


def grow(
    problem: SearchProblem, row: np.ndarray, seed: np.ndarray, options: TreeSearch, choose: Choose
) -> tuple[list[Node], list[random.Random]]:
    """One tree per request, all growing at once, and the randomness of each.

    Cost per iteration: one denoiser evaluation per draw, that is per step from the expanded node to the end, and one
    reward evaluation unless the finished sample is known.
    """
    sampler = problem.sampler
    rngs = [random.Random(int(s)) for s in seed]
    if sampler.random_start:
        roots = [Node(None, 0, -1) for _ in row]
    else:
        start = sampler.start(row, seed)
        roots = [Node(start, i, 0) for i in range(len(row))]
    for turn in range(options.num_iterations):
        paths = [[root] for root in roots]
        seeds = split(seed, turn)
        step = 0
        while True:
            for path, rng in zip(paths, rngs, strict=True):
                while not path[-1].done and path[-1].is_full(options):
                    path.append(choose(path[-1], rng))
            ahead = [i for i, path in enumerate(paths) if not path[-1].done]
            if not ahead:
                break
            # A new node has no children, so from the first one on this is a plain roll-out.
            noises = split(seeds[ahead], step)
            parents = [paths[i][-1] for i in ahead]
            if parents[0].batch is None:
                states = sampler.start(row[ahead], noises)
            else:
                states = sampler.candidates(_states(sampler, parents), noises[:, None])
            for j, (i, parent, key) in enumerate(zip(ahead, parents, sampler.keys(states), strict=True)):
                paths[i].append(parent.drawn(states, j, key))
            step += 1
        leaves = [path[-1] for path in paths if not path[-1].visits]
        if leaves:
            for leaf, reward in zip(leaves, problem.judge(_states(sampler, leaves)), strict=True):
                leaf.value = float(reward)
        for path in paths:
            for node in reversed(path):
                node.back_up(options)
    return roots, rngs


def _states(sampler: Any, nodes: Sequence[Node]) -> Any:
    """The states of some nodes as one batch, in their order."""
    batches: dict[int, list[int]] = {}
    for place, node in enumerate(nodes):
        batches.setdefault(id(node.batch), []).append(place)
    parts, order = [], []
    for places in batches.values():
        batch = nodes[places[0]].batch
        assert batch is not None
        parts.append(batch.select(np.array([nodes[place].index for place in places])))
        order += places
    return parts[0] if len(parts) == 1 else sampler.join(parts).select(np.argsort(order))


def _leaf(root: Node, rng: random.Random, choose: Choose) -> Node:
    node = root
    while not node.done:
        node = choose(node, rng)
    return node


def _result(problem: SearchProblem, leaves: Sequence[Node], request: np.ndarray) -> SearchResult:
    states = _states(problem.sampler, leaves)
    return SearchResult(states, request, np.array([leaf.value for leaf in leaves]), problem.budget)


class Dts(TreeSearch):
    num_samples: int = Field(1, ge=1, description="Samples drawn from the finished tree.")

    def run(self, problem: SearchProblem, row: np.ndarray, seed: np.ndarray) -> SearchResult:
        """`num_samples` samples per request, drawn from its tree (the same leaf may come more than once)."""
        choose = sampled_child(self.alpha)
        roots, rngs = grow(problem, row, seed, self, choose)
        leaves = [
            _leaf(root, rng, choose) for root, rng in zip(roots, rngs, strict=True) for _ in range(self.num_samples)
        ]
        return _result(problem, leaves, np.repeat(np.arange(len(row)), self.num_samples))


class DtsStar(TreeSearch):
    backup: Literal["soft", "max"] = Field(
        "max", description="Value of a node from its children: alpha log mean exp(value / alpha), or the best."
    )
    exploration: float = Field(
        1.0, ge=0, description="Factor of sqrt(log parent visits / child visits) in the choice of a child."
    )

    def run(self, problem: SearchProblem, row: np.ndarray, seed: np.ndarray) -> SearchResult:
        """One sample per request, where the largest values lead."""
        roots, rngs = grow(problem, row, seed, self, best_child(self.exploration))
        leaves = [_leaf(root, rng, best_child(0.0)) for root, rng in zip(roots, rngs, strict=True)]
        return _result(problem, leaves, np.arange(len(row)))
