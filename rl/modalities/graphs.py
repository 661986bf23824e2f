"""Graphs: kinds of nodes and edges, denoised step by step (`rl/models/graph_policy.py`).

`rl/recipes/gdpo.py` trains them.

Shape legend: B graphs, U scored steps, S places of a state, K kinds, T denoising steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rewards.load import load_reward
from rl.estimators.base import Scores
from rl.estimators.latent_rows import LatentRows
from rl.modalities.graph_engine import GraphEngine, GraphTrajectory, chosen
from rl.modalities.graph_search import GraphSampler
from rl.modalities.graphs_plan import GraphsPlan, encode
from rl.models.graph_policy import GraphModel, drawn, kept
from rl.tasks.base import Example

DATA_GRAPHS = 2000  # that marginal noise is counted in


@dataclass(kw_only=True)
class StepRows(LatentRows):
    """U recorded steps; `latent` int64 [U, S] is the state before one, `drawn` [U, S] the one after it."""

    drawn: torch.Tensor
    num_steps: int

    def score(self, model: GraphModel) -> Scores:
        kinds = model.denoise(self.latent, self.timestep, self.num_steps, self.conditioning["prompt"])
        return Scores(chosen(kinds, self.drawn).log().sum(-1), _entropy(kinds))


@dataclass(kw_only=True)
class CleanRows(LatentRows):
    """U states int64 [U, S]; a decision is the clean graph [U, S] that a state is said to come from."""

    clean: torch.Tensor
    num_steps: int

    def score(self, model: GraphModel) -> Scores:
        kinds = model(self.latent, self.timestep / self.num_steps, self.conditioning["prompt"]).double().log_softmax(-1)
        return Scores(chosen(kinds, self.clean).sum(-1), _entropy(kinds.exp()))


def _entropy(kinds: torch.Tensor) -> torch.Tensor:
    """[B], nats, of [B, S, K] independent places."""
    return -(kinds * kinds.clamp_min(1e-30).log()).sum((-1, -2))


def graph_rows(trajectories: Sequence[GraphTrajectory], eager: bool) -> StepRows | CleanRows:
    """A decision for every denoising step: the next state, or the finished graph with `eager`."""
    count = trajectories[0].num_steps
    owner, step = torch.arange(len(trajectories) * count) // count, torch.arange(count).repeat(len(trajectories))
    states = torch.from_numpy(np.stack([t.states for t in trajectories]))
    common: dict[str, Any] = {
        "latent": states[owner, step],
        "timestep": count - step,
        "conditioning": {"prompt": torch.tensor([t.prompt for t in trajectories])[owner]},
        "trajectory": owner,
        "step": step,
        "num_steps": count,
    }
    if eager:
        return CleanRows(clean=states[owner, -1], **common)
    logprob = torch.from_numpy(np.concatenate([t.logprob for t in trajectories]))
    return StepRows(drawn=states[owner, step + 1], sampler_logprob=logprob, **common)


class Graphs(GraphsPlan):
    Trajectory = GraphTrajectory

    def new_model(self) -> GraphModel:
        task = self.task
        return GraphModel(task.num_nodes, self._limit(), len(task.prompts), task.directed)

    def _limit(self) -> torch.Tensor:
        """float64 [S, K], see `GraphModel`."""
        nodes, sizes = self.task.num_nodes, (len(self.task.nodes), len(self.task.edges))
        count = torch.zeros(2, max(sizes), dtype=torch.float64)
        for own, size in zip(count, sizes, strict=True):
            own[:size] = 1
        if self.config.sampler.noise == "marginal":
            states = torch.tensor([self._state(row) for row in self.task.train_examples(0, 0, DATA_GRAPHS)])
            for own, part in zip(count, (states[:, :nodes], states[:, nodes:]), strict=True):
                own += torch.bincount(part.flatten(), minlength=len(own))
        share = count / count.sum(-1, keepdim=True)
        return share.repeat_interleave(torch.tensor([nodes, nodes * (nodes - 1) // 2]), dim=0)

    def engine(self, model: Any, options: Any, device: torch.device) -> GraphEngine:
        return GraphEngine(model, options, device, self.task.prompts, self.config.rollout.max_batch_size)

    def completions(self, trajectories: Sequence[GraphTrajectory]) -> list[dict[str, Any]]:
        """{"nodes": ["C", "C", "O"], "edges": [[0, 1, "single"], ...]}, pairs without an edge left out."""
        task, count = self.task, self.task.num_nodes
        pairs = list(itertools.combinations(range(count), 2))
        return [
            {
                "nodes": [task.nodes[kind] for kind in t.states[-1][:count]],
                "edges": [[*p, task.edges[k]] for p, k in zip(pairs, t.states[-1][count:], strict=True) if k],
            }
            for t in trajectories
        ]

    def search_sampler(self, engine: GraphEngine, rows: Sequence[Example]) -> GraphSampler:
        return GraphSampler(engine, [row["prompt"] for row in rows])

    def soft_reward(self, run: Any) -> Callable[[torch.Tensor, Sequence[Example]], torch.Tensor]:
        """The weighted sum of rewards that have `on_graphs(kinds [B, S, K])` -> [B], with gradient.

        Raises:
            ValueError: a reward has no gradient.
        """
        parts = [part for part in self.config.reward.trained(self.task.reward) if part.weight]
        rewards = [(load_reward(part.name, part.params), part.weight) for part in parts]
        for (reward, _), part in zip(rewards, parts, strict=True):
            if not hasattr(reward, "on_graphs"):
                raise ValueError(f"reward {part.name!r} has no gradient to graphs: give it on_graphs (docs/graphs.md)")
        return lambda kinds, rows: torch.stack([weight * reward.on_graphs(kinds) for reward, weight in rewards]).sum(0)  # type: ignore[attr-defined]

    def _state(self, row: Example) -> list[int]:
        if "graph" not in row:
            raise ValueError(
                "sft and marginal noise need rows with a column graph: set sft.steps=0, sampler.noise=uniform"
            )
        return encode(row["graph"], self.task)

    def supervised(
        self, model: Any, rows: Sequence[Example], part: slice, seed: Sequence[int]
    ) -> tuple[CleanRows, torch.Tensor]:
        """Every graph at a random time of its noise, whose clean kinds are to be told."""
        rng, steps = np.random.default_rng(list(seed)), self.config.sampler.num_inference_steps
        clean = torch.tensor([self._state(row) for row in rows])
        t = torch.from_numpy(rng.integers(1, steps + 1, len(rows)))
        stays = torch.from_numpy(rng.random(clean.shape)) < kept(t / steps)[:, None]
        noised = clean.where(stays, drawn(model.limit.cpu(), torch.from_numpy(rng.random(clean.shape))))
        asked = torch.tensor([list(self.task.prompts).index(row["prompt"]) for row in rows])
        index = torch.arange(len(clean[part]))
        fitted = CleanRows(
            latent=noised[part],
            clean=clean[part],
            timestep=t[part],
            conditioning={"prompt": asked[part]},
            trajectory=index,
            step=torch.zeros_like(index),
            num_steps=steps,
        )
        return fitted, torch.full((len(index),), 1.0 / clean.numel(), dtype=torch.float64)

    def measure(
        self, rows: Sequence[Example], completions: Sequence[Any], rewards: Sequence[float]
    ) -> dict[str, float]:
        """Shares of the valid graphs that differ from one another, and that the task's data do not hold.

        The task may have `form(graph)`, equal for graphs that are one but for the numbering of their nodes, and
        `known_forms()`, those of its data. It may say by `valid(graph)` which graphs are valid; the share of these is
        reported then. By default those are of reward 1.
        """
        judged = hasattr(self.task, "valid")
        valid = [
            graph
            for graph, reward in zip(completions, rewards, strict=True)
            if (self.task.valid(graph) if judged else reward >= 1)
        ]
        measured = {"validity": len(valid) / len(completions)} if judged and len(completions) else {}
        if not hasattr(self.task, "form") or not valid:
            return measured
        forms = {self.task.form(graph) for graph in valid}
        novel = forms - self.task.known_forms()
        return measured | {"uniqueness": len(forms) / len(valid), "novelty": len(novel) / len(forms)}
