"""Diffusion tree sampling (DTS) and search (DTS*), Jain et al. 2025, arXiv 2506.20701.

A node is a state. One iteration descends from the root: while a node has its full number of children, C n^a after n
visits (progressive widening), it goes on to one of them; then one more child is drawn from the policy and denoised to
the end, every state on the way joining the tree. The reward there is backed up along the path: the value of a node is
alpha log of the *uniform* mean of exp(value / alpha) over its children, because they are independent draws of the
policy, however often each was visited.

DTS descends to a child with probability proportional to exp(value / alpha), and samples the finished tree in the same
way: as the tree grows the samples follow p(x) exp(r(x) / alpha). DTS* descends to the largest value plus an
exploration bonus and returns where the largest values lead.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rollouts.search.options import DtsOptions, DtsStarOptions, TreeOptions
from rollouts.search.protocol import Problem, SearchResult, split


class Node:
    """A state in the tree; `state` is a batch of one, None at a root above random starts."""

    __slots__ = ("children", "depth", "done", "state", "value", "visits")

    def __init__(self, state: Any | None, depth: int):
        self.state = state
        self.depth = depth
        self.done = state is not None and bool(state.done[0])
        self.children: list[Node] = []
        self.value = 0.0
        self.visits = 0

    def is_full(self, options: TreeOptions) -> bool:
        """Whether a descent goes on to a child instead of adding one."""
        limit = 1.0
        if options.branch_steps is None or self.depth in options.branch_steps or self.state is None:
            limit = options.widening * max(self.visits, 1) ** options.widening_power
        return len(self.children) >= limit

    def back_up(self, options: TreeOptions) -> None:
        """Count a visit, and the value of the children."""
        self.visits += 1
        if self.children:
            values = [child.value for child in self.children]
            top = max(values)
            self.value = top
            if options.backup == "soft" and math.isfinite(top):
                mean = math.fsum(math.exp((v - top) / options.alpha) for v in values) / len(values)
                self.value = top + options.alpha * math.log(mean)


# Which child a descent takes.
Choose = Callable[[Node, random.Random], Node]


def sampled_child(alpha: float) -> Choose:
    """A child with probability proportional to exp(value / alpha)."""

    def choose(node: Node, rng: random.Random) -> Node:
        top = max(child.value for child in node.children)
        if not math.isfinite(top):
            return rng.choice(node.children)
        return rng.choices(node.children, [math.exp((child.value - top) / alpha) for child in node.children])[0]

    return choose


def best_child(exploration: float) -> Choose:
    """The child of largest value plus exploration * sqrt(log n_parent / n_child)."""

    def choose(node: Node, rng: random.Random) -> Node:
        log_visits = math.log(max(node.visits, 1))
        return max(node.children, key=lambda c: c.value + exploration * math.sqrt(log_visits / max(c.visits, 1)))

    return choose


def grow(
    problem: Problem, row: np.ndarray, seed: np.ndarray, options: TreeOptions, choose: Choose
) -> tuple[list[Node], list[random.Random]]:
    """One tree per request, all growing at once, and the randomness of each.

    Cost per iteration: one denoiser evaluation per step from the expanded node to the end, and one reward evaluation;
    nothing when the descent ends in a finished sample.
    """
    sampler = problem.sampler
    rngs = [random.Random(int(s)) for s in seed]
    if sampler.random_start:
        roots = [Node(None, -1) for _ in row]
    else:
        start = sampler.start(row, seed)
        roots = [Node(start.select(np.array([i])), 0) for i in range(len(row))]
    for turn in range(options.num_iterations):
        paths = [_descend(root, rng, options, choose) for root, rng in zip(roots, rngs, strict=True)]
        ahead = [i for i, path in enumerate(paths) if not path[-1].done]
        seeds = split(seed, 0, turn)
        step = 0
        while ahead:
            noises = split(seeds[ahead], step)
            parents = [paths[i][-1] for i in ahead]
            if parents[0].state is None:
                states = sampler.start(row[ahead], noises)
            else:
                states = sampler.candidates(sampler.join([parent.state for parent in parents]), noises[:, None])
            for j, (i, parent) in enumerate(zip(ahead, parents, strict=True)):
                child = Node(states.select(np.array([j])), parent.depth + 1)
                parent.children.append(child)
                paths[i].append(child)
            ahead = [i for i in ahead if not paths[i][-1].done]
            step += 1
        leaves = [path[-1] for path in paths if not path[-1].visits]
        if leaves:
            for leaf, reward in zip(leaves, problem.judge(sampler.join([n.state for n in leaves])), strict=True):
                leaf.value = float(reward)
        for path in paths:
            for node in reversed(path):
                node.back_up(options)
    return roots, rngs


def _descend(root: Node, rng: random.Random, options: TreeOptions, choose: Choose) -> list[Node]:
    path = [root]
    while not path[-1].done and path[-1].is_full(options):
        path.append(choose(path[-1], rng))
    return path


def _leaf(root: Node, rng: random.Random, choose: Choose) -> Node:
    node = root
    while not node.done:
        node = choose(node, rng)
    return node


def _result(problem: Problem, leaves: Sequence[Node], request: np.ndarray) -> SearchResult:
    states = problem.sampler.join([leaf.state for leaf in leaves])
    return SearchResult(states, request, np.array([leaf.value for leaf in leaves]), problem.budget)


def dts(problem: Problem, row: np.ndarray, seed: np.ndarray, options: DtsOptions) -> SearchResult:
    """`num_samples` samples per request, drawn from its tree (the same leaf may come more than once)."""
    choose = sampled_child(options.alpha)
    roots, rngs = grow(problem, row, seed, options, choose)
    leaves = [
        _leaf(root, rng, choose) for root, rng in zip(roots, rngs, strict=True) for _ in range(options.num_samples)
    ]
    return _result(problem, leaves, np.repeat(np.arange(len(row)), options.num_samples))


def dts_star(problem: Problem, row: np.ndarray, seed: np.ndarray, options: DtsStarOptions) -> SearchResult:
    """One sample per request, where the largest values lead."""
    roots, rngs = grow(problem, row, seed, options, best_child(options.exploration))
    leaves = [_leaf(root, rng, best_child(0.0)) for root, rng in zip(roots, rngs, strict=True)]
    return _result(problem, leaves, np.arange(len(row)))
