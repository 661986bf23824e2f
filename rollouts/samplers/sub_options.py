"""Options of a decoder that are sections of their own."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ConstraintOptions(BaseModel):
    """What every response must match; one of the four (docs/constraints.md)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    regex: str | None = Field(None, description="Regular expression (Rust's syntax) that the whole response matches.")
    json_schema: dict[str, Any] | str | None = Field(
        None, description="JSON schema that the response is valid under, or the path of a file with it."
    )
    scaffold: str | None = Field(
        None,
        description="Text that is placed before the first step, with slots <N> or <N:regex> of N tokens to fill in: "
        '{"city": "<6:[a-z ]+>"}. A value shorter than its slot is followed by pad tokens.',
    )
    graph: dict[str, list[str]] | str | None = Field(
        None,
        description="Token -> tokens that may follow it, or the path of a JSON file with that; <start> and <end> stand "
        "for the two ends of a response.",
    )

    @model_validator(mode="after")
    def _one(self) -> ConstraintOptions:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"sampler.constraint takes one of {', '.join(type(self).model_fields)}, got {given or 'none'}"
            )
        return self


class GuideOptions(BaseModel):
    """An autoregressive model that reads what the policy would write (`rollouts/samplers/guide.py`)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    model: str = Field(
        description="Causal language model with the policy's tokens: folder, hub name, .gguf file, package:NAME/FILE, "
        "or http://HOST:PORT of a vLLM server."
    )
    rule: Literal["agree", "energy"] = Field(
        "agree",
        description="Reveal the policy's draws as far as the guide agrees (guided diffusion), or take one of several "
        "fillings by importance weights (EDLM).",
    )
    top: int = Field(2, ge=1, description="Agree: a draft is among this many of the guide's likeliest tokens.")
    relative: float = Field(0.5, gt=0, le=1, description="Agree: and has this share of the likeliest's probability.")
    candidates: int = Field(8, ge=1, description="Energy: fillings drawn at every step; 1 is no guide.")
    temperature: float = Field(1.0, gt=0, description="Energy: temperature of the importance weights.")
    share: float = Field(1.0, gt=0, le=1, description="Energy: weigh in this share of a block's steps, the first ones.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Weights of a guide in this process.")
    batch_size: int = Field(16, ge=1, description="Answers that the guide reads in one forward or request.")


class ChooseOptions(BaseModel):
    """What a head of the policy chooses before a block (`rollouts/engines/choosing.py`); one of the two."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    block_length: list[int] | None = Field(None, min_length=2, description="Lengths of the next block (CtrlDiff).")
    bound: list[float] | None = Field(
        None,
        min_length=2,
        description="Values of the selector's threshold, factor or entropy_bound, for a block (DiFFPO).",
    )

    @model_validator(mode="after")
    def _one(self) -> ChooseOptions:
        if (self.block_length is None) == (self.bound is None):
            raise ValueError("sampler.choose takes one of block_length and bound")
        if len(set(self.values)) < len(self.values):
            raise ValueError(f"sampler.choose takes each value once, got {self.values}")
        if min(self.values) <= 0:
            raise ValueError(f"sampler.choose takes numbers above 0, got {min(self.values)}")
        return self

    @property
    def values(self) -> list[Any]:
        return list(self.block_length or self.bound or [])
