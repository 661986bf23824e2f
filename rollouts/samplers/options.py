"""Every choice a masked-diffusion decoder is made of, once."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollouts.samplers.presets import PRESETS
from rollouts.samplers.sub_options import ChooseOptions, ConstraintOptions, GuideOptions

# What a preset chooses. Everything else (lengths, steps, blocks, temperature, guidance) is left to the user.
PARTS = (
    "quota",
    "score",
    "score_from",
    "order_temperature",
    "eos_confidence",
    "window",
    "selector",
    "threshold",
    "factor",
    "entropy_bound",
    "memory",
    "reviser",
    "running_confidence",
    "revise_scope",
    "remdm_cap",
    "edit_threshold",
    "max_post_steps",
    "verify",
)
_IN_UNIT_INTERVAL = ("probability", "max_probability", "margin")
Selector = Literal[
    "top_n", "threshold", "dynamic", "left_most", "factor", "entropy_bound", "entropy_sum", "bernoulli", "consistent"
]  # fmt: skip


class SamplerOptions(BaseModel):
    """A decoder: quota x token sampler x score x selector x reviser, on a block schedule."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    preset: str | None = Field(
        None, description="Published decoder whose parts to take (docs/decoders.md); options given beside it win."
    )
    gen_length: int = Field(16, ge=1, description="Response tokens to generate.")
    num_inference_steps: int = Field(
        4, ge=1, description="Denoising steps for the whole response, split evenly over its blocks."
    )
    block_length: int | None = Field(
        None,
        ge=1,
        description="Decode in blocks of this many tokens, left to right; null decodes the response at once.",
    )
    temperature: float = Field(1.0, ge=0, description="Token sampling temperature; 0 is greedy.")
    final_temperature: float | None = Field(
        None,
        ge=0,
        description="Canvas models (DiffusionGemma): the temperature falls in even steps from sampler.temperature to "
        "this, which would come after the last; null keeps it.",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus filter; 1 keeps every token.")
    top_k: int = Field(0, ge=0, description="Keep the k most likely tokens; 0 keeps all.")
    cfg_scale: float = Field(
        0.0, ge=0, description="Classifier-free guidance against the masked prompt (full attention); 0 is none."
    )
    quota: Literal["even", "block", "linear", "cosine", "dream", "doubling"] = Field(
        "even", description="How many positions each step of a block reveals (docs/decoders.md)."
    )
    score: Literal["probability", "max_probability", "margin", "neg_entropy", "random"] = Field(
        "probability",
        description="What ranks masked positions for revealing; probability is the drawn token's, max_probability the "
        "most likely one's.",
    )
    score_from: Literal["model", "sampling"] = Field(
        "model",
        description="Distribution the score is read from: the model's (temperature 1, unfiltered) or the sampling one; "
        "at temperature 0 that is the model's after top_p and top_k.",
    )
    order_temperature: float = Field(
        0.0, ge=0, description="Draw positions with probability softmax(score / this) instead of the best; 0 does not."
    )
    eos_confidence: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor on an end token's score at a block's first step, rising linearly to 1 at its last.",
    )
    window: int | None = Field(
        None,
        ge=1,
        description="Only this many masked positions of a block, the left-most, may be revealed (DCD); null is all.",
    )
    selector: Selector = Field(
        "top_n",
        description="Which positions a step reveals: the quota's best, all above threshold (at least one), "
        "above threshold or else the quota's best, the left-most, as many as factor or entropy_bound allow, each "
        "on its own with Dream's probability 1 - s/t, or all whose prediction did not change (CCD).",
    )
    threshold: float = Field(0.9, gt=0, le=1, description="Score bound of the threshold and dynamic selectors.")
    factor: float = Field(
        1.0,
        gt=0,
        description="The factor selector reveals the n most confident while (n + 1)(1 - n-th score) < factor.",
    )
    entropy_bound: float = Field(
        0.1,
        gt=0,
        description="Nats: bound on the revealed positions' entropies without the largest (selector entropy_bound) or "
        "with it (entropy_sum).",
    )
    memory: int = Field(
        4, ge=1, description="Selector consistent: best positions whose most likely tokens the next step remembers."
    )
    stop_entropy: float | None = Field(
        None,
        gt=0,
        description="Canvas models: a canvas is finished early by the step whose most likely tokens are those of the "
        "step before, with a mean entropy below this (nats); null takes all steps.",
    )
    last_step: Literal["draw", "argmax"] = Field(
        "draw",
        description="Selector entropy_bound under uniform noise: whether a canvas's last step draws its tokens, which "
        "training needs, or takes the most likely.",
    )
    transition: Literal["posterior", "euler"] = Field(
        "posterior",
        description="Uniform noise: what a step draws tokens from, the posterior, or an Euler step of the flow.",
    )
    corrector: int = Field(
        0,
        ge=0,
        description="Uniform noise: positions that a corrector redraws after every step but the last, with one forward "
        "more (predictor-corrector); 0 is none.",
    )
    reviser: Literal["none", "rcr", "arpc", "remdm", "edit"] = Field(
        "none",
        description="Take revealed tokens back: running-confidence remasking, BlockGen's corrector by the model's "
        "reading from left to right, ReMDM's random remasking, or LLaDA2.1's token editing.",
    )
    running_confidence: Literal["max", "last"] = Field(
        "max", description="What rcr ranks a position by: its highest score so far (paper) or its last (code)."
    )
    revise_scope: Literal["block", "all_previous"] = Field(
        "block", description="Tokens rcr and remdm may take back: the current block's, or earlier blocks' too."
    )
    remdm_cap: float = Field(0.02, gt=0, le=1, description="Upper bound of ReMDM's remasking probability.")
    edit_threshold: float = Field(
        0.5, ge=0, lt=1, description="A drawn token replaces another one when its probability exceeds this (edit)."
    )
    max_post_steps: int = Field(16, ge=0, description="Steps of a complete block in which tokens are still edited.")
    constraint: ConstraintOptions | None = Field(
        None, description="What every response must match (docs/constraints.md); null lets it be anything."
    )
    guide: GuideOptions | None = Field(
        None, description="Autoregressive model that guides the decoder (docs/decoders.md); null is none."
    )
    choose: ChooseOptions | None = Field(
        None,
        description="Let the policy choose each block's length, or the selector's bound, and learn to "
        "(docs/decoders.md); null chooses nothing.",
    )
    joint_steps: int = Field(
        0,
        ge=0,
        description="After each forward, so many steps of the block by the model's joint head alone "
        "(docs/decoders.md); 0 is none.",
    )
    verify: bool = Field(
        False,
        description="Draft each block of a block-causal model in one step and verify it from left to right with the "
        "same model at block length 1 (S2D2, docs/decoders.md); quota, score and selector have no part in it.",
    )
    record_x0: bool = Field(
        False, description="Also record the x0 prediction of every step, its confidences and log-probs (MDPO)."
    )

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") is not None:
            return {**_preset(given["preset"]), **given}
        return given

    @model_validator(mode="after")
    def _parts_fit(self) -> SamplerOptions:
        self.steps_per_block()
        if self.selector in ("threshold", "dynamic", "factor") and self.score == "neg_entropy":
            raise ValueError(
                f"sampler.threshold compares probabilities: with score neg_entropy set sampler.selector top_n, not "
                f"{self.selector}"
            )
        if self.selector in ("entropy_bound", "entropy_sum") and self.score != "neg_entropy":
            raise ValueError(f"sampler.selector {self.selector} bounds entropies: set sampler.score to neg_entropy")
        if self.order_temperature and (
            self.selector != "top_n" or self.reviser in ("rcr", "arpc") or self.score == "random"
        ):
            raise ValueError(
                "sampler.order_temperature draws the quota's positions by their scores: it needs selector top_n, a "
                "score other than random, and no reviser rcr or arpc"
            )
        if self.eos_confidence < 1 and self.score not in _IN_UNIT_INTERVAL:
            raise ValueError(
                f"sampler.eos_confidence scales probabilities: set sampler.score to one of {_IN_UNIT_INTERVAL}"
            )
        if self.reviser in ("rcr", "arpc") and self.selector != "top_n":
            raise ValueError(
                f"sampler.reviser {self.reviser} keeps the quota's most confident: set sampler.selector to top_n"
            )
        if self.window is not None and self.reviser != "none":
            raise ValueError(f"sampler.window counts masks, which sampler.reviser {self.reviser} changes: unset one")
        if self.reviser == "remdm" and self.selector != "bernoulli":
            raise ValueError("sampler.reviser remdm reveals and remasks at random: set sampler.selector to bernoulli")
        for name, plain in (("reviser", "none"), ("record_x0", False), ("constraint", None)):
            if self.verify and getattr(self, name) != plain:
                raise ValueError(f"sampler.verify does not go with sampler.{name}: unset one of them")
        for name, plain in (("reviser", "none"), ("record_x0", False)):
            if self.constraint is not None and getattr(self, name) != plain:
                raise ValueError(
                    f"sampler.constraint keeps every token that it decided: sampler.{name} {getattr(self, name)} does "
                    f"not go with it, set it to {str(plain).lower()}"
                )
        without = (("reviser", "none"), ("record_x0", False), ("constraint", None), ("verify", False), ("guide", None))
        alone: dict[str, Any] = {
            "guide": without,
            "choose": without,
            "joint_steps": (("choose", None), ("cfg_scale", 0.0), *without),
        }
        for name, others in alone.items():
            for other, plain in others:
                if name != other and getattr(self, name) and getattr(self, other) != plain:
                    raise ValueError(f"sampler.{name} does not go with sampler.{other}: unset one of them")
        if self.choose is not None:
            self._check_choose(self.choose)
        if self.guide is not None and self.guide.rule == "energy" and self.temperature == 0:
            raise ValueError("sampler.guide.rule energy weighs several draws: set sampler.temperature above 0")
        return self

    def _check_choose(self, choose: ChooseOptions) -> None:
        if self.follows_time:
            raise ValueError(
                "sampler.choose needs steps that reveal something: set sampler.quota to even, cosine or doubling, and "
                "sampler.selector to another than bernoulli"
            )
        if choose.block_length and self.block_length is not None:
            raise ValueError("sampler.choose.block_length chooses every block's: leave sampler.block_length out")
        if choose.block_length and sum(length >= self.gen_length for length in choose.block_length) > 1:
            raise ValueError(
                f"sampler.choose.block_length {choose.block_length} has two lengths that hold the whole answer of "
                f"sampler.gen_length {self.gen_length}: keep one"
            )
        bounded = ("threshold", "dynamic", "factor", "entropy_bound", "entropy_sum")
        if choose.bound and self.selector not in bounded:
            raise ValueError(
                f"sampler.choose.bound needs a selector that has one: set sampler.selector to one of {bounded}"
            )
        if choose.bound and self.selector in ("threshold", "dynamic") and max(choose.bound) > 1:
            raise ValueError(
                f"sampler.choose.bound has {max(choose.bound)}, and no score of a {self.selector} is above 1"
            )

    @property
    def random_order(self) -> bool:
        """Whether which positions are revealed is drawn too, also when tokens are greedy."""
        return self.score == "random" or self.order_temperature > 0 or self.selector == "bernoulli"

    @property
    def follows_time(self) -> bool:
        """Whether the schedule counts all its steps, also where fewer are masked: a step may then reveal nothing."""
        return self.quota in ("block", "linear", "dream") or self.selector == "bernoulli"

    @property
    def remembers(self) -> bool:
        """Whether a step depends on numbers of the steps before it (`StepState.running`)."""
        return self.reviser == "rcr" or self.selector == "consistent"

    @property
    def reach_back(self) -> bool:
        """Whether a reviser may change blocks before the current one."""
        return self.reviser in ("rcr", "remdm") and self.revise_scope == "all_previous"

    def steps_per_block(self, num_inference_steps: int | None = None) -> int:
        """Denoising steps each block gets.

        Raises:
            ValueError: there is no step at all, or the steps or the length do not divide over the blocks.
        """
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
        if self.block_length is None:
            return steps
        if self.gen_length % self.block_length:
            raise ValueError(
                f"sampler.gen_length ({self.gen_length}) must be a multiple of "
                f"sampler.block_length ({self.block_length})"
            )
        num_blocks = self.gen_length // self.block_length
        if steps % num_blocks:
            raise ValueError(
                f"sampler.num_inference_steps ({steps}) must be a multiple of the {num_blocks} blocks of the response"
            )
        return steps // num_blocks

    def check_uniform(self, canvas_length: int | None = None) -> None:
        """Raise ValueError for an option that reveals masks: a model of uniform noise has none.

        Args:
            canvas_length: of a model that denoises canvases.
        """
        names = {"preset", "block_length", "cfg_scale", "record_x0", "constraint", "guide", "choose", "joint_steps"}
        names |= set(PARTS)
        for name, plain in (("corrector", 0), ("transition", "posterior")):
            if self.selector == "entropy_bound" and getattr(self, name) != plain:
                raise ValueError(f"sampler.{name} is for ancestral steps: unset it, or sampler.preset entropy_bound")
        if self.corrector > self.gen_length:
            raise ValueError(f"sampler.corrector is {self.corrector}, above sampler.gen_length {self.gen_length}")
        if self.selector == "entropy_bound":
            names -= {"preset", "selector", "score", "score_from", "entropy_bound"}
        elif canvas_length:
            raise ValueError("the model denoises canvases by their entropy: set sampler.preset to entropy_bound")
        elif self.last_step != "draw":
            raise ValueError("sampler.last_step argmax needs sampler.preset entropy_bound: leave it out")
        for name in sorted(names):
            if getattr(self, name) != SamplerOptions.model_fields[name].default:
                raise ValueError(
                    f"sampler.{name} is for absorbing noise, whose masks are revealed, and the model's noise is "
                    "uniform: leave it out, or set sampler.preset to entropy_bound"
                )
        self._check_canvas(canvas_length)

    def _check_canvas(self, canvas_length: int | None) -> None:
        for name in ("final_temperature", "stop_entropy"):
            if not canvas_length and getattr(self, name) is not None:
                raise ValueError(f"sampler.{name} is for models that denoise canvases (DiffusionGemma): leave it out")
        if canvas_length and self.gen_length % canvas_length:
            raise ValueError(
                f"sampler.gen_length ({self.gen_length}) must be a multiple of the model's canvas of {canvas_length}"
            )
        if canvas_length:
            self.model_copy(update={"block_length": canvas_length}).steps_per_block()

    def check_absorbing(self) -> None:
        """Raise ValueError for an option of uniform noise alone."""
        for name in ("last_step", "corrector", "transition"):
            if getattr(self, name) != SamplerOptions.model_fields[name].default:
                raise ValueError(
                    f"sampler.{name} {getattr(self, name)} is for uniform noise, the model's is absorbing: leave it out"
                )
        self._check_canvas(None)

    def distribution(self) -> dict[str, Any]:
        """The settings a learner needs to score the recorded tokens; guidance only where there is some."""
        settings: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        constraint = {} if self.constraint is None else {"constraint": self.constraint.model_dump(exclude_none=True)}
        falls = {} if self.final_temperature is None else {"final_temperature": self.final_temperature}
        kept = {name: getattr(self, name) for name in ("cfg_scale", "corrector") if getattr(self, name)}
        kept |= {} if self.transition == "posterior" else {"transition": self.transition}
        return settings | falls | kept | constraint

    def decoder(self) -> dict[str, Any]:
        """The preset's name and every part: the rule that chose positions, as a trajectory records it."""
        guide = {} if self.guide is None else {"guide": self.guide.model_dump()}
        choose = {} if self.choose is None else {"choose": self.choose.model_dump(exclude_none=True)}
        joint = {"joint_steps": self.joint_steps} if self.joint_steps else {}
        return {name: getattr(self, name) for name in ("preset", *PARTS)} | guide | choose | joint


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(PRESETS)}"
        raise ValueError(f"sampler.preset {name!r} does not exist: {hint}")
    return PRESETS[name]


def preset_parts(name: str) -> dict[str, Any]:
    """The preset's name and a value for every part, to lay over options that were already resolved.

    Raises:
        ValueError: there is no such preset.
    """
    defaults = {part: SamplerOptions.model_fields[part].default for part in PARTS}
    return {"preset": name, **defaults, **_preset(name)}


def with_changes(options: SamplerOptions, changes: dict[str, Any]) -> SamplerOptions:
    """Resolved options with some changed; a preset among them replaces every part that is not given beside it."""
    parts = preset_parts(changes["preset"]) if changes.get("preset") is not None else {}
    return SamplerOptions.model_validate({**options.model_dump(), **parts, **changes})
