"""Options of every search, by name. Importing this module needs no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class SearchOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BestOfNOptions(SearchOptions):
    num_samples: int = Field(16, ge=1, description="Samples drawn for the one that is kept.")


class ValueOptions(SearchOptions):
    """How a half-denoised state is valued."""

    value: Literal["posterior_mean", "monte_carlo"] = Field(
        "posterior_mean",
        description="Reward of the most likely end (one forward), or of ends sampled from the state.",
    )
    num_rollouts: int = Field(1, ge=1, description="Ends sampled per state by the value monte_carlo.")


class SvddOptions(ValueOptions):
    num_candidates: int = Field(10, ge=1, description="Next states drawn at every step, of which one is taken.")
    alpha: float = Field(
        0.0, ge=0, description="Temperature of the choice among candidates; 0 takes the one of highest value."
    )


class SmcOptions(ValueOptions):
    value: Literal["posterior_mean", "monte_carlo", "none"] = Field(  # type: ignore[assignment]
        "posterior_mean",
        description="Weight of a particle on its way: as in the other searches, or none until it is finished.",
    )
    num_particles: int = Field(16, ge=1, description="Particles of a population; each request has its own.")
    alpha: float = Field(1.0, gt=0, description="The target is p(x) exp(reward / alpha).")
    resample_below: float = Field(
        0.5, ge=0, le=1, description="Resample when the effective share of particles falls below this; 1 always does."
    )
    keep: Literal["one", "all"] = Field(
        "one", description="Return one particle drawn by weight, or the whole population with its weights."
    )


class GuidanceOptions(SearchOptions):
    scale: float = Field(1.0, ge=0, description="Factor of the reward gradient in the log-probabilities of a step.")


class TdsOptions(SmcOptions):
    scale: float | None = Field(
        None, ge=0, description="Factor of the reward gradient in the proposal; null takes 1 / alpha."
    )


class TreeOptions(SearchOptions):
    num_iterations: int = Field(32, ge=1, description="Descents into the tree; each adds one way to a finished sample.")
    alpha: float = Field(1.0, gt=0, description="The target is p(x) exp(reward / alpha).")
    widening: float = Field(2.0, gt=0, description="C of the bound C n^a on the children of a node visited n times.")
    widening_power: float = Field(0.8, gt=0, le=1, description="Exponent a of that bound.")
    branch_steps: list[int] | None = Field(
        None, description="Denoising steps at which the tree may branch, the first is 0; null branches at all."
    )
    backup: Literal["soft", "max"] = Field(
        "soft", description="Value of a node from its children: alpha log mean exp(value / alpha), or the best."
    )


class DtsOptions(TreeOptions):
    num_samples: int = Field(1, ge=1, description="Samples drawn from the finished tree.")


class DtsStarOptions(TreeOptions):
    backup: Literal["soft", "max"] = Field(
        "max", description="Value of a node from its children: alpha log mean exp(value / alpha), or the best."
    )
    exploration: float = Field(
        1.0, ge=0, description="Factor of sqrt(log parent visits / child visits) in the choice of a child."
    )


class ZeroOrderOptions(SearchOptions):
    num_rounds: int = Field(4, ge=1, description="Rounds of neighbours after the first sample.")
    num_neighbours: int = Field(4, ge=1, description="Neighbours of the pivot noise per round.")
    share: float = Field(0.25, gt=0, le=1, description="Share of the noise that a neighbour redraws.")


class PathsOptions(ValueOptions):
    num_paths: int = Field(4, ge=1, description="Paths that are kept.")
    num_renoisings: int = Field(4, ge=1, description="Noised copies made of every path per round.")
    start_steps: int = Field(1, ge=1, description="Denoising steps before the first round.")
    renoise_steps: int = Field(1, ge=1, description="Steps that a copy is noised back by.")
    denoise_steps: int = Field(2, ge=2, description="Steps that a copy is denoised by; more than renoise_steps.")

    @model_validator(mode="after")
    def _moves_on(self) -> PathsOptions:
        if self.denoise_steps <= self.renoise_steps:
            raise ValueError(
                f"denoise_steps ({self.denoise_steps}) must be larger than renoise_steps ({self.renoise_steps})"
            )
        return self


SEARCHES: dict[str, type[SearchOptions]] = {
    "best_of_n": BestOfNOptions,
    "svdd": SvddOptions,
    "smc": SmcOptions,
    "tds": TdsOptions,
    "guidance": GuidanceOptions,
    "dts": DtsOptions,
    "dts_star": DtsStarOptions,
    # Random search over noises is best-of-N under another name.
    "noise_random": BestOfNOptions,
    "noise_zero_order": ZeroOrderOptions,
    "noise_paths": PathsOptions,
}


def parse_search(name: str, params: dict[str, Any]) -> SearchOptions:
    """The options of a search.

    Raises:
        ValueError: one line naming the search or the option, and the fix.
    """
    if name not in SEARCHES:
        raise ValueError(f"search {name!r} does not exist: choose one of {', '.join(SEARCHES)}")
    try:
        return SEARCHES[name].model_validate(params)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(SEARCHES[name].model_fields)
            raise ValueError(f"search {name} has no option {key!r}: it has {known}") from None
        message = first["msg"].removeprefix("Value error, ")
        where = f"option {key!r} of search {name}" if key else f"search {name}"
        raise ValueError(f"{where}: {message}, got {first['input']!r}") from None
