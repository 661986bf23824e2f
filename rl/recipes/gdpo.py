"""GDPO: policy gradient on graphs, eager (the finished graph is read off every step) or exact (its own next state is).

Liu et al. 2024, "Graph Diffusion Policy Optimization" (arXiv 2402.16302), the eager policy gradient: over the steps of
a rollout, the sum of A grad log p(G_0 | G_t), where G_0 is the rollout's own finished graph and p the prediction of the
clean graph. Advantages are rewards, centred and divided by their deviation, within [-5, 5]. `graph_ddpo` is what the
paper compares it with: the sum of A grad log p(G_{t-1} | G_t), which is the gradient of the expected reward.

Departs from the published code: log p is the sum over nodes and edges (it takes means, with 5 times the weight for
edges); all steps are trained (a random fifth there); statistics are a group's (the whole step's there).

Liuliakov et al. 2026, "DGPO" (arXiv 2602.19261), read in its authors' code: the eager gradient on directed acyclic
graphs (`task.directed`: topological order, positional encoding). Of equal graphs of a step one is trained, and rewards
are compared with running statistics. The same departures, and no layers are frozen (three quarters of them there).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from rl.batch import Tensor
from rl.estimators.base import Verdicts
from rl.recipes.base import Recipe


class GraphDDPO(Recipe, defaults={"scale": "std"}):
    modality: ClassVar[str] = "graphs"
    eager: ClassVar[bool] = False

    max_advantage: float = Field(5.0, gt=0, description="Bound on the absolute advantage.")

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.modalities.graphs import graph_rows

        return graph_rows(trajectories, self.eager)

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        return trajectory.num_steps

    def advantage(self, verdicts: Verdicts) -> Tensor:
        return super().advantage(verdicts).clamp(-self.max_advantage, self.max_advantage)


class GDPO(GraphDDPO):
    eager = True

    old_logprob: Literal["on_policy", "recompute"] = Field(  # type: ignore[assignment]
        "on_policy",
        description="Denominator of the ratio: today's own value, so that nothing is clipped, as published, or the "
        "value before the first update. The sampler draws another thing and has none.",
    )


class RunningStatistics:
    """Mean and standard deviation of rewards, moved a part of the way to those of every step; a memory."""

    def __init__(self) -> None:
        self.numbers: list[float] = []

    def moved(self, mean: float, std: float, rate: float) -> list[float]:
        """[mean, standard deviation] after a step; the first step's are its own."""
        before = self.numbers or [mean, std]
        self.numbers = [(1 - rate) * old + rate * new for old, new in zip(before, (mean, std), strict=True)]
        return self.numbers

    def state(self) -> dict[str, Any]:
        return {"numbers": self.numbers}

    def restore(self, state: dict[str, Any]) -> None:
        self.numbers = list(state["numbers"])


class DGPO(GDPO):
    rate: float = Field(0.1, gt=0, le=1, description="Share of the way that running statistics move to a step's.")

    @property
    def needs_group(self) -> bool:
        return False

    def memory(self) -> RunningStatistics:
        return RunningStatistics()

    def summary(self, trajectory: Any) -> bytes:
        return bytes(trajectory.states[-1].tobytes())

    def advantage(self, verdicts: Verdicts) -> Tensor:
        """[M], of the first of equal graphs; NaN for the others, and where there is no reward."""
        import torch

        first: dict[bytes, int] = {}
        for index in (~verdicts.reward.isnan()).nonzero().flatten().tolist():
            first.setdefault(verdicts.summaries[index], index)
        kept = list(first.values())
        advantage, reward = torch.full_like(verdicts.reward, torch.nan), verdicts.reward[kept]
        if kept:
            mean, std = verdicts.memory.moved(float(reward.mean()), float(reward.std(correction=0)), self.rate)
            spread = float(reward.max() - reward.min())
            # Equal rewards have no better and no worse.
            advantage[kept] = (reward - mean) / max(std, 1e-8) if spread > 1e-8 else 0.0
        return advantage.clamp(-self.max_advantage, self.max_advantage)
