"""Graphs before a run: the options of their sampler, and what a task of graphs must have. No torch at import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rl.modalities.base import Modality

if TYPE_CHECKING:
    from rl.config import Config
    from rl.tasks.base import Example


class GraphOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    num_inference_steps: int = Field(8, ge=1, description="Denoising steps (T).")
    noise: Literal["marginal", "uniform"] = Field(
        "marginal", description="What noise draws a kind from: its share among the task's graphs, or all kinds alike."
    )


class GraphsPlan(Modality):
    """What is known of a run of graphs without a model; `rl.modalities.graphs.Graphs` runs it.

    A task of graphs has `num_nodes`, the names of its kinds of nodes (`nodes`) and of edges (`edges`, "no edge" first),
    the `prompts` it asks, and `directed`: whether an edge leads from the earlier node to the later one.
    """

    name = "graphs"
    Options = GraphOptions
    runner = "rl.modalities.graphs:Graphs"

    @classmethod
    def check(cls, config: Config, task: Any, rows: Sequence[Example]) -> None:
        super().check(config, task, rows)
        missing = [name for name in ("num_nodes", "nodes", "edges", "prompts", "directed") if not hasattr(task, name)]
        if missing:
            raise ValueError(f"task.name {config.task.name!r} is about graphs and has no attribute {missing[0]}")
        for row in rows:
            encode(row["graph"], task) if "graph" in row else None


def encode(graph: dict[str, Any], task: Any) -> list[int]:
    """[S]: the kinds of the nodes, then those of all pairs (0, 1), (0, 2), ..., (1, 2), ...

    Example: of the nodes C, N, O and the edges none, single, {"nodes": ["C", "O"], "edges": [[0, 1, "single"]]} is
    [0, 2, 1].

    Raises:
        ValueError: the graph is none of the task's.
    """
    count = len(graph["nodes"])
    if count != task.num_nodes:
        raise ValueError(f"a graph has {count} nodes, and those of the task have {task.num_nodes}")
    place = {pair: count + i for i, pair in enumerate((a, b) for a in range(count) for b in range(a + 1, count))}
    state = [_kind(name, task.nodes, "node") for name in graph["nodes"]] + [0] * len(place)
    for first, second, name in graph["edges"]:
        pair = (first, second) if task.directed else (min(first, second), max(first, second))
        if pair not in place:
            raise ValueError(f"a graph has an edge {first}, {second}: it must join two of {count} nodes, in order")
        state[place[pair]] = _kind(name, task.edges, "edge")
    return state


def _kind(name: str, known: Sequence[str], what: str) -> int:
    if name not in known:
        raise ValueError(f"a graph has a {what} {name!r}, and the task knows {', '.join(known)}")
    return list(known).index(name)
