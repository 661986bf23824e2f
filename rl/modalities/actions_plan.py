"""Actions before a run: the options of their sampler, and how many forwards an episode takes. No torch at import."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from rl.modalities.base import Modality

if TYPE_CHECKING:
    from rl.config import Config
    from rl.tasks.base import Example


class ActionOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    num_inference_steps: int = Field(5, ge=1, description="Denoising steps of a chunk (T).")
    chunk_length: int = Field(4, ge=1, description="Actions of a chunk (H), done one after the other without a look.")
    max_actions: int = Field(100, ge=1, description="Actions after which an episode is cut.")
    min_std: float = Field(0.1, gt=0, description="Least standard deviation of a denoising step, in units of [-1, 1].")
    bins: int = Field(
        0, ge=0, description="Values that each entry of an action is quantised to (E0); 0 leaves it continuous."
    )

    @property
    def max_steps(self) -> int:
        """Denoising steps of the longest episode."""
        return math.ceil(self.max_actions / self.chunk_length) * self.num_inference_steps


class ActionsPlan(Modality):
    """What is known of a run of actions without a model; `rl.modalities.actions.Actions` runs it."""

    name = "actions"
    Options = ActionOptions
    runner = "rl.modalities.actions:Actions"

    @classmethod
    def check(cls, config: Config, task: Any, rows: Sequence[Example]) -> None:
        super().check(config, task, rows)
        task.space(config.sampler.bins)

    @classmethod
    def forwards(cls, config: Config) -> tuple[float, bool]:
        return config.sampler.max_steps, False
