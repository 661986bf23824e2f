"""VRPO: direct preference optimisation on pairs of answers, with evidence lower bounds in place of log-likelihoods.

Zhu et al. 2025, "LLaDA 1.5: Variance-Reduced Preference Optimization for Large Language Diffusion Models" (arXiv
2505.19223): -log sigmoid(beta (B(y_w) - B_ref(y_w)) - beta (B(y_l) - B_ref(y_l))), B an estimate of an answer's bound.
Its variance makes the loss biased, so n draws have n mask ratios with one mask each, and policy and reference see the
same masks (antithetic sampling).

Pairs are the best and the worst rollout of every prompt (`pairs: null`; prompts whose rewards are equal have none), or
rows of a file with `prompt`, `chosen` and `rejected` (`rl/tasks/preferences.py`).

Choices: n = 8; beta = 0.1 (we do not know the published one). Departs: mask ratios are stratified over the n draws,
not independent; the pairs of rollouts are an addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from rl.batch import DecisionBatch, LossOutput, Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.estimators.draws import Copy, block_masks
from rl.recipes.masked import MaskedRecipe


class VRPO(MaskedRecipe):
    old_logprob: Literal["on_policy"] = Field("on_policy", description="No ratio: a pair is compared with itself.")
    kl_to: Literal["none"] = Field("none", description="The loss holds to the starting policy by itself.")
    beta: float = Field(0.1, gt=0, description="Inverse temperature of the preference.")
    draws: int = Field(8, ge=1, description="Mask ratios per answer (n).")
    pairs: str | None = Field(
        None, description="File of pairs (prompt, chosen, rejected); null pairs the rollouts of every prompt."
    )

    @property
    def needs_reference(self) -> bool:
        return True

    def requires(self, config: Config) -> dict[str, Any]:
        of_file = {"train.group_size": 2, "rollout.engine": "in_process", "rollout.asynchronous": False}
        return {"filters.drop_overlong": False, **(of_file if self.pairs else {})}

    def check(self, config: Config) -> None:
        from rl.tasks.preferences import read_pairs

        if self.pairs:
            read_pairs(self.pairs)
        if config.train.micro_batch_size % 2:
            raise ValueError(
                f"train.micro_batch_size ({config.train.micro_batch_size}) must be even: a pair is scored together"
            )

    @property
    def preference_file(self) -> str | None:
        return self.pairs

    def copies(self, places: Any, rng: Any, level: float) -> list[Copy]:
        return block_masks(places, rng, level, self.draws)

    def decide(self, rows: Any, weight: Tensor, lengths: Sequence[int]) -> Any:
        from rl.estimators.masked_copies import answer_decisions

        return answer_decisions(rows, weight / self.draws, [1] * len(lengths))

    def advantage(self, verdicts: Verdicts) -> Tensor:
        """+1 for the best rollout of a prompt, -1 for the worst, NaN for the others."""
        from rl.advantages import best_and_worst

        return best_and_worst(verdicts.reward, verdicts.group)

    def loss(self, batch: DecisionBatch) -> LossOutput:
        from rl.losses.preference import preference_loss

        output = preference_loss(batch, self.beta)
        return LossOutput(output.loss - self.entropy_coef * batch.entropy, output.metrics)
