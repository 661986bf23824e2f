"""Recipes that score a rollout's own steps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.recipes.base import Recipe


class TracedRecipe(Recipe):
    """Every revealed token is a decision, scored in the canvas in which it was revealed."""

    aggregation: Literal["token_mean", "trajectory_mean", "constant", "step_mean", "trajectory_step_mean"] = Field(  # type: ignore[assignment]
        "token_mean",
        description="How decisions are averaged into the loss. step_mean: over the tokens of a step, then over all "
        "steps; trajectory_step_mean: over the tokens of a step, the steps of a rollout, the rollouts.",
    )
    scope: Literal["canvas", "answer"] = Field(
        "canvas", description="Tokens trained: all that were revealed, or those of the answer up to its end token."
    )

    @property
    def layout(self) -> dict[str, Any]:
        """Arguments of `rl.estimators.trace_rows.trace_rows`: which steps share a state, what shares a row."""
        return {}

    @property
    def trains_choices(self) -> bool:
        plain = self.layout.keys() <= {"shrink", "pack_to"} and self.layout.get("shrink", 1) == 1
        return plain and self.critic() is None

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.trace_rows import answer_only, trace_rows, with_equal_steps

        rows = trace_rows(trajectories, model, block, steps, **self.layout)
        if self.scope == "answer":
            rows = answer_only(rows, trajectories)
        if not self.aggregation.endswith("step_mean"):
            return rows
        return with_equal_steps(rows, [self.trained(t) for t in trajectories], self.aggregation != "step_mean")

    def trained(self, trajectory: Any) -> Any:
        """int64 [U]: the merged step of every decision."""
        from rl.estimators.trace_rows import trained_steps

        merging = {name: value for name, value in self.layout.items() if name != "pack_to"}
        return trained_steps(trajectory, answer=self.scope == "answer", **merging)

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        """What the loss is a mean over: tokens, or their steps."""
        trained = self.trained(trajectory)
        return len(set(trained.tolist())) if self.aggregation == "step_mean" else len(trained)
