"""GDPO: policy gradient on graphs, eager (the finished graph is read off every step) or exact (its own next state is).

Liu et al. 2024, "Graph Diffusion Policy Optimization" (arXiv 2402.16302), the eager policy gradient: over the steps of
a rollout, the sum of A grad log p(G_0 | G_t), where G_0 is the rollout's own finished graph and p the prediction of the
clean graph. Advantages are rewards, centred and divided by their deviation, within [-5, 5]. `graph_ddpo` is what the
paper compares it with: the sum of A grad log p(G_{t-1} | G_t), which is the gradient of the expected reward.

Departs from the published code: log p is the sum over nodes and edges (it takes means, with 5 times the weight for
edges); all steps are trained (a random fifth there); statistics are a group's (the whole step's there).
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
