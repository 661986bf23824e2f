"""What recipes on pairs share: best against worst rollout of a prompt, or the rows of a file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.batch import Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.base import AnyRecipe


class PairedRecipe(AnyRecipe):
    """Pairs are the best and the worst rollout of every prompt (`pairs: null`; prompts whose rewards are equal have
    none), or rows of a file with `prompt`, `chosen` and `rejected` (`rl/tasks/preferences.py`).

    Stands before another recipe in the bases of a class: `class VRPO(PairedRecipe, MaskedRecipe)`.
    """

    old_logprob: Literal["on_policy"] = Field("on_policy", description="No ratio: a pair is compared with itself.")
    kl_to: Literal["none"] = Field("none", description="The loss holds to the starting policy by itself.")
    pairs: str | None = Field(
        None,
        description="File of pairs (prompt, chosen, rejected); null pairs the rollouts of every prompt. Of images the "
        "sides are files: pictures, or .npy latents.",
    )

    @property
    def needs_reference(self) -> bool:
        return True

    def requires(self, config: Config) -> dict[str, Any]:
        of_file = {"train.group_size": 2, "rollout.engine": "in_process", "rollout.asynchronous": False}
        return {"filters.drop_overlong": False, **(of_file if self.pairs else {})}

    def check(self, config: Config) -> None:
        from rl.tasks.preferences import read_pairs

        super().check(config)
        if self.pairs:
            read_pairs(self.pairs)
        if config.train.micro_batch_size % 2:
            raise ValueError(
                f"train.micro_batch_size ({config.train.micro_batch_size}) must be even: a pair is scored together"
            )

    @property
    def preference_file(self) -> str | None:
        return self.pairs

    def advantage(self, verdicts: Verdicts) -> Tensor:
        """+1 for the best rollout of a prompt, -1 for the worst, NaN for the others."""
        from rl.advantages import best_and_worst

        return best_and_worst(verdicts.reward, verdicts.group)
