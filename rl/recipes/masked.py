"""What the recipes on artificial masks share: options, and the recipe around a draw of masked copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rl.recipes.options import Recipe, RecipeOptions

if TYPE_CHECKING:
    import torch

    from rl.estimators.base import Rows, Verdicts
    from rl.estimators.masked_copies import Draw


class MaskedOptions(RecipeOptions):
    """Options of recipes that score an answer in masked copies of it (`rl/estimators/masked_copies.py`)."""

    aggregation: Literal["token_mean", "trajectory_mean", "constant"] = Field(
        "trajectory_mean", description="How decisions are averaged into the loss."
    )
    old_logprob: Literal["recompute", "on_policy"] = Field(
        "recompute", description="Denominator of the ratio; the sampler visited none of these states and has none."
    )
    scope: Literal["answer", "canvas"] = Field(
        "answer", description="Tokens scored: up to the first end token, or all that was decoded."
    )
    prompt_mask: float = Field(
        0.0, ge=0, lt=1, description="Probability that a copy hides a prompt token (full attention)."
    )

    def engine_needs(self) -> set[str]:
        """Nothing: copies are masked anew, how the answer came about does not matter; what stands behind it may."""
        return {"step_maps"} if self.scope == "canvas" else set()

    def masked_recipe(
        self,
        draw: Draw,
        decide: Callable[..., Rows],
        per_token: bool = False,
        advantage: Callable[[Verdicts], torch.Tensor] | None = None,
        loss: Callable[..., Any] | None = None,
    ) -> Recipe:
        """A recipe whose rows are the copies of `draw`.

        Args:
            decide: (rows, weight of every read, answer lengths) -> decisions.
            per_token: each answer token is a decision of its own in the mean; otherwise an answer counts once, whatever
                is made of it.
        """
        from rl.estimators.masked_copies import copy_rows, scope_positions

        def length(trajectory: Any, steps: Any = None) -> int:
            return len(scope_positions(trajectory, self.scope))

        def rows(trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Rows:
            read, weight = copy_rows(trajectories, model, draw, self.scope, self.prompt_mask, iteration, block)
            return decide(read, weight, [length(t) for t in trajectories])

        return Recipe(
            rows=rows,
            advantage=advantage or self.group_advantage(),
            loss=loss or self.policy_loss(),
            needs_reference=self.kl_to == "reference",
            old_logprob=self.old_logprob,
            aggregation=self.aggregation,
            num_decisions=length if per_token else lambda trajectory, steps: 1,
            redraw=True,
        )
