"""Recipes that score an answer in masked copies of it (`rl/estimators/masked_copies.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from rl.batch import Tensor
from rl.config import Config
from rl.estimators.base import Rows
from rl.estimators.draws import Copy, check_prompt_mask, scope_positions
from rl.recipes.base import Recipe


class MaskedRecipe(Recipe, defaults={"aggregation": "trajectory_mean"}):
    """A subclass says which copies it draws, and what it makes of them."""

    redraw = True
    # Each answer token is a decision of its own; otherwise an answer counts once, whatever is made of it.
    per_token: ClassVar[bool] = False

    old_logprob: Literal["recompute", "on_policy"] = Field(
        "recompute", description="Denominator of the ratio; the sampler visited none of these states and has none."
    )
    scope: Literal["answer", "canvas"] = Field(
        "answer", description="Tokens scored: up to the first end token, or all that was decoded."
    )
    prompt_mask: float = Field(
        0.0, ge=0, lt=1, description="Probability that a copy hides a prompt token (full attention)."
    )

    def check(self, config: Config) -> None:
        # A model's own folder says it when it is loaded.
        model = config.model
        causal = model.attention == "block_causal" if model.path is None else model.convert.block_length is not None
        check_prompt_mask("block_causal" if causal else "full", self.prompt_mask)

    def prepare(self, run: Any) -> None:
        check_prompt_mask(run.model.attention, self.prompt_mask)

    def engine_needs(self) -> set[str]:
        """Nothing: copies are masked anew, how the answer came about does not matter; what stands behind it may."""
        return {"step_maps"} if self.scope == "canvas" else set()

    def copies(self, places: np.ndarray, rng: np.random.Generator, level: float) -> list[Copy]:
        """Masked copies of one answer, a `rl.estimators.draws.Draw`."""
        raise NotImplementedError(f"recipe {self.name} has no copies()")

    def decide(self, rows: Any, weight: Tensor, lengths: Sequence[int]) -> Any:
        """Decisions from the reads of all copies, the weight of every read, and the answers' lengths."""
        from rl.estimators.combine import per_token
        from rl.estimators.masked_copies import answer_decisions

        return per_token(rows, weight) if self.per_token else answer_decisions(rows, weight, lengths)

    def length(self, trajectory: Any) -> int:
        return len(scope_positions(trajectory, self.scope))

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Rows:
        from rl.estimators.masked_copies import copy_rows

        rows, weight = copy_rows(trajectories, model, self.copies, self.scope, self.prompt_mask, iteration, block)
        return self.decide(rows, weight, [self.length(t) for t in trajectories])

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        return self.length(trajectory) if self.per_token else 1
