"""Options shared by the recipes that score a rollout's own steps. No torch at import."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.recipes.options import Recipe, RecipeOptions


class TraceRecipeOptions(RecipeOptions):
    scope: Literal["canvas", "answer"] = Field(
        "canvas", description="Tokens trained: all that were revealed, or those of the answer up to its end token."
    )

    def trace_recipe(self, equal_steps: bool = False, **settings: Any) -> Recipe:
        """Group advantage and clipped loss on the tokens of the trace.

        Args:
            equal_steps: every step of a rollout counts the same, whatever number of tokens it revealed.
            settings: of `rl.estimators.trace_rows.trace_rows`.
        """
        from rl.estimators.trace_decisions import answer_only, num_answered, with_equal_steps
        from rl.estimators.trace_rows import trace_rows

        def rows(trajectories: Any, model: Any, block: Any = None, steps: Any = None) -> Any:
            scored = trace_rows(trajectories, model, block, steps, **settings)
            if self.scope == "answer":
                scored = answer_only(scored, trajectories)
            return with_equal_steps(scored) if equal_steps else scored

        recipe = self.token_recipe(rows)
        if self.scope == "answer":
            recipe.num_decisions = num_answered
        return recipe
