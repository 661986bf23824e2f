"""d-OPSD: the policy is its own teacher, which is shown a right answer behind the canvas.

Luo et al. 2026, "Learning from the Self-future: On-policy Self-distillation for dLLMs" (arXiv 2606.18195). At every
step of a rollout the teacher sees the same canvas followed by a right answer that the policy wrote itself; the loss is
the KL between teacher and policy on the teacher's top-k tokens, averaged over the tokens of a step, then over steps.

A rollout that is right is shown its own answer, a wrong one the first right answer of its prompt; prompts without any
are left out. The teacher has the weights before the first update of the RL step (`teacher: old`), or those that RL
started from. Needs full attention: a block-causal model never sees what stands behind a block.

Departs, or is not known to us: we read the abstract and notes on the paper. Its k, its direction of the KL, how much
of the answer is shown (`shown_tokens`), and which weights the teacher has, are choices of ours.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field, PrivateAttr

from rl.batch import Tensor
from rl.estimators.base import Verdicts
from rl.recipes.distilled import DistilledRecipe


class DOPSD(DistilledRecipe, defaults={"aggregation": "trajectory_step_mean", "targets": "committed", "top": 32}):
    teacher: Literal["old", "reference"] = Field("old", description="Weights of the teacher.")
    shown_tokens: int | None = Field(
        None, ge=1, description="Tokens shown, from the end of the right answer; null shows all of it."
    )
    right: float = Field(1.0, description="Reward from which an answer counts as right.")
    _shown: dict[int, np.ndarray] = PrivateAttr(default_factory=dict)

    @property
    def anchor(self) -> Literal["none", "old", "reference"]:
        return self.teacher

    @property
    def needs_reference(self) -> bool:
        return self.teacher == "reference" or super().needs_reference

    def prepare(self, run: Any) -> None:
        if run.model.attention != "full":
            raise ValueError(
                "algorithm.name d_opsd shows the teacher what follows the canvas, which a block-causal model does not "
                "see: use opd, or a model with full attention"
            )

    def summary(self, trajectory: Any) -> Any:
        return trajectory.seed, trajectory.response_ids()[-(self.shown_tokens or 0) :]

    def advantage(self, verdicts: Verdicts) -> Tensor:
        """Every rollout of a prompt that was answered rightly is trained."""
        self._shown.clear()
        first: dict[int, np.ndarray] = {}
        columns = list(zip(verdicts.group.tolist(), verdicts.reward.tolist(), verdicts.summaries, strict=True))
        for group, reward, (seed, answer) in columns:
            if reward >= self.right:
                self._shown[seed] = answer
                first.setdefault(group, answer)
        for group, _, (seed, _) in columns:
            if group in first:
                self._shown.setdefault(seed, first[group])
        known = verdicts.group.new_tensor([seed in self._shown for _, _, (seed, _) in columns]).bool()
        return super().advantage(verdicts).masked_fill(~known, float("nan"))

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.taught import shown_rows

        rows = super().rows(trajectories, model, block, steps, iteration)
        nothing = np.zeros(0, dtype=np.int64)
        suffixes = [self._shown.get(trajectory.seed, nothing) for trajectory in trajectories]
        shown = shown_rows(rows, suffixes, self.divergence, self.top)
        if int(shown.shown.position_ids.max()) >= model.max_length:
            raise ValueError(
                f"algorithm.shown_tokens: canvas and right answer are longer than the model's {model.max_length} "
                "positions: show fewer tokens"
            )
        return shown
