"""ReDiff: an expert corrects the policy's own drafts, and the policy learns to revise them.

Ji et al. 2025, "From Denoising to Refining" (arXiv 2510.19871), after a supervised stage with `sft.errors`: the loss is
-log p(correction | draft), the draft visible (`rl/estimators/revision.py`), the mean over all fitted tokens of a step.
`sampler.reviser: edit` makes use of it. Drafts without a correction are left out and counted.

Departs: published, wrong tokens alone are fitted (`fit: wrong`) beside ordinary samples, which keep right tokens; with
none here, `fit: all` does that (docs/experiments/rediff.md). Drafts are fresh at every step, synthetic errors random.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field, PrivateAttr

from rl.batch import DecisionBatch, LossOutput, Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.base import Recipe


class ReDiff(Recipe):
    old_logprob: Literal["on_policy"] = Field("on_policy", description="There is no ratio: corrections are imitated.")
    expert: str = Field(
        "answer",
        description="Who corrects: answer (the row's own), sudoku, or file.py:function or pkg.module:function of "
        "(prompts, completions, **columns) that returns corrected texts, None for no correction.",
    )
    fit: Literal["wrong", "all"] = Field("all", description="Tokens of a draft that are fitted: all, or wrong alone.")
    _corrections: dict[int, Any] = PrivateAttr(default_factory=dict)

    def requires(self, config: Config) -> dict[str, Any]:
        return {"filters.drop_zero_variance": False}

    def check(self, config: Config) -> None:
        from rl.tasks.experts import expert_of

        expert_of(self.expert)

    def engine_needs(self) -> set[str]:
        return set()

    @property
    def needs_group(self) -> bool:
        return False

    def look_at(self, run: Any, rollouts: Any) -> None:
        from rl.estimators.revision import corrections_of
        from rl.tasks.experts import expert_texts

        texts = expert_texts(self.expert, rollouts.examples, rollouts.completions)
        drafts = rollouts.trajectories
        found, right, uncorrected = corrections_of(drafts, texts, run.tokenizer, self.fit == "all")
        self._corrections = {drafts[index].seed: correction for index, correction in found.items()}
        for index in set(range(len(texts))) - set(found):
            rollouts.counted[index] = False
        rollouts.filtered |= {"filters/right": float(right), "filters/uncorrected": float(uncorrected)}

    def advantage(self, verdicts: Verdicts) -> Tensor:
        return verdicts.reward.nan_to_num() * 0.0

    def correction(self, trajectory: Any) -> Any:
        own = trajectory.response_ids()
        # A spare one (`Modality.smallest_trajectory`), which nobody looked at, is read as it is.
        return self._corrections.get(trajectory.seed, (np.arange(len(own)), own))

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.revision import revision_rows

        return revision_rows(trajectories, [self.correction(t) for t in trajectories], model, block)

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        return len(self.correction(trajectory)[0])

    def loss(self, batch: DecisionBatch) -> LossOutput:
        # Advantages are 0, which leaves the entropy bonus and the KL to another policy.
        rest = super().loss(batch)
        return LossOutput(rest.loss - batch.logprob, rest.metrics | {"revision_nll": -batch.logprob.detach()})
