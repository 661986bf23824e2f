"""Options of sampling with a gradient (`rollouts/samplers/relaxed.py`). No torch at import."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RelaxedOptions(BaseModel):
    """Sampling with a gradient (`rollouts/samplers/relaxed.py`)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    relaxed_steps: int = Field(10, ge=1, description="Last steps that the reward's gradient passes through.")
    temperature: float = Field(1.0, gt=0, description="Gumbel-softmax temperature of the relaxed steps.")
    final_temperature: float | None = Field(
        None, gt=0, description="Temperature of the last relaxed step, reached geometrically; null keeps it constant."
    )
    kl_weight: Literal["path", "released"] = Field(
        "path", description="The KL of the two samplers' paths, or the weighting of the released DRAKES code."
    )
    carry_over: Literal["exact", "released"] = Field(
        "exact", description="How undecided mass is kept: as the schedule has it, or as the released code does."
    )
    straight_through: bool = Field(True, description="Make the finished sample one-hot in the forward pass.")
    checkpoint: bool = Field(False, description="Recompute relaxed steps in the backward pass instead of keeping them.")
