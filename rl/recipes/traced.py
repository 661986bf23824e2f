"""Recipes that score a rollout's own steps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.recipes.base import Recipe


class TracedRecipe(Recipe):
    """Every revealed token is a decision, scored in the canvas in which it was revealed."""

    scope: Literal["canvas", "answer"] = Field(
        "canvas", description="Tokens trained: all that were revealed, or those of the answer up to its end token."
    )

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        return self.traced(trajectories, model, block, steps)

    def traced(self, trajectories: Any, model: Any, block: Any, steps: Any, **settings: Any) -> Any:
        """The decisions in scope of `rl.estimators.trace_rows.trace_rows` with these settings."""
        from rl.estimators.trace_rows import answer_only, trace_rows

        rows = trace_rows(trajectories, model, block, steps, **settings)
        return answer_only(rows, trajectories) if self.scope == "answer" else rows

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        from rl.estimators.trace_rows import num_answered

        return num_answered(trajectory) if self.scope == "answer" else super().num_decisions(trajectory)
