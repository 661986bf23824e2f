"""Text before a run: what is checked, how many forwards a rollout takes, what memory it needs. No torch at import."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rl.errors import about, reason_of
from rl.modalities.base import Modality
from rl.registry import RECIPES
from rl.tasks.fit import apart_reasons, kept_prompts, unfit_reasons
from rollouts.samplers.options import SamplerOptions, with_changes

if TYPE_CHECKING:
    from rl.config import Config
    from rl.modalities.memory import ModelMemory
    from rl.tasks.base import Example, Task
    from rl.tasks.prompt_images import PromptImages


class TextPlan(Modality):
    """What is known of a text run without a model; `rl.modalities.text.TextModality` runs it."""

    name = "text"
    Options = SamplerOptions
    reward_columns = ("completion_ids", "num_forwards", "num_steps", "reveal_steps")
    unit = "tokens"
    runner = "rl.modalities.text:TextModality"

    @classmethod
    def check(cls, config: Config, task: Task, rows: Sequence[Example]) -> None:
        from rl.models.folder import block_length_message, check_backbone, check_model_folder
        from rl.tasks.prompt_images import encode_prompts

        model, sampler = config.model, config.sampler
        if model.autoregressive:
            raise ValueError("model.autoregressive is for eval and rollout: what is trained here is a diffusion model")
        if config.train.steps and sampler.temperature == 0:
            raise ValueError("sampler.temperature is 0: greedy rollouts carry no gradient, set it above 0 to train")
        if config.sft.masking == "semi_ar" and sampler.block_length is None:
            raise ValueError("sft.masking semi_ar needs sampler.block_length: set the block to mask")
        if config.sft.trajectories is not None and not Path(config.sft.trajectories).is_file():
            raise ValueError(f"sft.trajectories {config.sft.trajectories!r} is not a file")
        if config.sft.trajectories is not None and (config.sft.errors or config.sft.levels):
            what = "errors puts errors into" if config.sft.errors else "levels is about masks of"
            raise ValueError(f"sft.{what} answers, and sft.trajectories imitates recorded ones: set one")
        if config.sft.merge_steps > 1 and config.sft.trajectories is None:
            raise ValueError("sft.merge_steps merges the steps of recorded trajectories: set sft.trajectories")
        shows = "joint" if config.sft.joint else "consistency"
        beside = config.sft.trajectories or config.sft.errors or (config.sft.joint and config.sft.consistency)
        if getattr(config.sft, shows) and (beside or config.sft.masking != "random"):
            raise ValueError(
                f"sft.{shows} reveals masks of answers: it goes with sft.masking random, and without sft.trajectories, "
                "sft.errors and the other of sft.joint and sft.consistency"
            )
        if config.train.block_schedule and model.path is None and model.attention != "block_causal":
            raise ValueError("train.block_schedule needs model.attention block_causal")
        if model.path is not None:
            check_model_folder(model.path)
        elif not model.backbone:
            raise ValueError("model.backbone or model.path is required: there is no model to train")
        elif model.lora.rank:
            raise ValueError(f"model.lora.rank is {model.lora.rank}: adapters need a model to adapt, set model.path")
        else:
            check_backbone(model.backbone)
            if (model.attention == "block_causal") != (model.block_length is not None):
                raise ValueError(block_length_message(model.attention))
        _check_noise(config)
        if model.attn_implementation == "flex_attention":
            from rl.distributed import pick_device

            if pick_device(config.run.device).type == "cpu":
                raise ValueError("model.attn_implementation flex_attention needs a GPU: set it to sdpa")
        tokenizer = open_tokenizer(config, task)
        if tokenizer.mask_token_id is None and model.path is None:
            raise ValueError("model.tokenizer has no mask token: a masked-diffusion model needs one")
        if sampler.constraint is not None:
            _check_constraint(config, tokenizer)
        if sampler.guide is not None:
            _check_guide(config)
        if sampler.joint_steps and config.train.steps:
            raise ValueError(
                "sampler.joint_steps draws tokens that the policy's own forward did not give, and no recipe learns "
                "from them: set it to 0 to train"
            )
        if sampler.choose is not None and config.train.steps and not config.algorithm.trains_choices:
            raise ValueError(
                f"sampler.choose is trained with the tokens of the exact trace, which algorithm.name "
                f"{config.algorithm.name} does not score as it is set: use tracerl, with shrink 1 and without value"
            )
        if sampler.choose is not None and model.autoregressive:
            raise ValueError("sampler.choose is for a diffusion model, and model.autoregressive is true: leave one out")
        if sampler.choose is not None and config.train.block_schedule:
            raise ValueError("train.block_schedule sets blocks, and sampler.choose begins them elsewhere: set it to []")
        context, mask_token_id, block = _shape(config, tokenizer)
        if block is not None or model.path is None:
            _check_decoder(config, tokenizer, block, sampler)
            for steps in () if model.autoregressive else config.eval.num_inference_steps:
                try:
                    _check_decoder(config, tokenizer, block, evaluation_options(config, steps))
                except ValueError as error:
                    told = reason_of(error.errors()[0]) if isinstance(error, ValidationError) else error
                    raise ValueError(f"an evaluation in {steps} steps ({_sources(config)}): {told}") from None
        vision = vision_of(config)
        if vision is not None:
            _check_vision(config)
        if mask_token_id is not None:
            review(config, task, tokenizer, mask_token_id, context, block, vision)
            if getattr(task, "files", ()):
                return
        longest = max(len(ids) for ids in encode_prompts(tokenizer, rows, config.task.chat, vision))
        if context and longest + sampler.gen_length > context:
            raise ValueError(
                f"a prompt of {longest} tokens plus sampler.gen_length {sampler.gen_length} does not fit the model's "
                f"{context} positions: raise model.backbone's positions"
            )

    @classmethod
    def forwards(cls, config: Config) -> tuple[float, bool]:
        """Every number of denoising steps the run will use must divide over every block length it will use."""
        sampler, train = config.sampler, config.train
        own = sampler.block_length or (config.model.block_length if config.model.path is None else None)
        if sampler.choose is not None and sampler.choose.block_length:
            own = None
        counts = {
            "sampler.num_inference_steps": [sampler.num_inference_steps],
            "eval.num_inference_steps": config.eval.num_inference_steps,
            "eval.viewer_steps": [config.eval.viewer_steps] if config.eval.viewer_steps else [],
            "train.mixed_steps": train.mixed_steps,
        }
        for block in {own, *(stage.rollout for stage in train.block_schedule)}:
            options = sampler.model_copy(update={"block_length": block})
            for name, values in counts.items():
                for steps in values:
                    try:
                        options.steps_per_block(steps)
                    except ValueError as error:
                        raise ValueError(f"{name} has {steps}: {error}") from None
        # A step count that divides is taken as it is: blocks x steps of a block.
        drawn = train.mixed_steps or [sampler.num_inference_steps]
        if sampler.corrector:
            drawn = [2 * steps - 1 for steps in drawn]
        return sum(drawn) / len(drawn), sampler.cfg_scale != 0

    @classmethod
    def engine_needs(cls, config: Config) -> dict[str, str]:
        needs = {}
        if config.sampler.reviser != "none":
            needs["remasking"] = f"sampler.reviser {config.sampler.reviser}"
        if config.sampler.record_x0:
            needs["x0"] = "sampler.record_x0"
        if config.sampler.constraint is not None:
            needs["constraints"] = "sampler.constraint"
        if vision_of(config) is not None:
            needs["images"] = "model.vision"
        if config.sampler.guide is not None:
            needs["guides"] = "sampler.guide"
        if config.sampler.choose is not None or config.sampler.joint_steps:
            needs["choices"] = "sampler.joint_steps" if config.sampler.joint_steps else "sampler.choose"
        return needs

    @classmethod
    def memory(cls, config: Config, ranks: int, prompt_length: int, half: bool) -> ModelMemory:
        from rl.modalities.text_memory import text_memory

        return text_memory(config, ranks, prompt_length, half)


def open_tokenizer(config: Config, task: Task) -> Any:
    """The tokenizer of a run, see `load_tokenizer`; what is wrong with it is said of the option it comes from."""
    from rl.models.tokenizers import load_tokenizer

    model = config.model
    with about(f"model.tokenizer {model.tokenizer!r}" if model.tokenizer else f"model.path {model.path!r}"):
        return load_tokenizer(model, task)


def review(
    config: Config,
    task: Task,
    tokenizer: Any,
    mask_token_id: int,
    max_length: int | None,
    block_length: int | None,
    vision: PromptImages | None = None,
) -> None:
    """Refuse the examples of the task's files that cannot be used, or leave them out (`task.unfit`).

    A prompt of a file must not be one of a later file: what is trained on does not measure, nor does what settings
    were chosen by.

    Raises:
        ValueError: one line with the file and the row.
    """
    files = list(getattr(task, "files", ()))
    for index, file in enumerate(files):
        # The first file is trained on; the supervised stage imitates its answers.
        imitated = index == 0 and config.sft.steps > 0 and config.sft.trajectories is None
        look = partial(
            unfit_reasons, tokenizer=tokenizer, chat=config.task.chat, mask_token_id=mask_token_id,
            gen_length=config.sampler.gen_length, max_length=max_length, block_length=block_length,
            with_answers=imitated, vision=vision,
        )  # fmt: skip
        kept = kept_prompts(files[index + 1 :], file.path)
        file.review(partial(apart_reasons, look=look, kept=kept), config.task.unfit == "drop")


def vision_of(config: Config) -> PromptImages | None:
    """How the prompts of a run hold images; None without a vision tower."""
    from rl.models.folder import is_url, prompt_images, read_config

    model = config.model
    if model.path is None or is_url(model.path):
        return prompt_images(model)
    described: dict[str, Any] = {}
    # A folder that cannot be read is refused with the model.
    with contextlib.suppress(OSError, ValueError):
        described = read_config(model.path)
    return prompt_images(model, described)


def _check_vision(config: Config) -> None:
    """Refuse what does not go with images in prompts."""
    refused = {
        "model.autoregressive": config.model.autoregressive,
        "model.noise uniform": config.model.noise == "uniform",
        "sft.trajectories": config.sft.trajectories is not None,
        "rollout.compile": config.rollout.compile,
        f"algorithm.name {config.algorithm.name} with a gradient through the sampler": config.algorithm.reward_gradient,
    }
    for key, wrong in refused.items():
        if wrong:
            raise ValueError(f"{key} does not go with images in prompts (model.vision): leave it out")


def _check_constraint(config: Config, tokenizer: Any) -> None:
    """Raise ValueError where no response can match the constraint, or something of the run does not go with it."""
    from rl.models.vocabulary import compiled_constraint, excluded_ranges

    sampler = config.sampler
    if config.eval.baseline or config.eval.backslide:
        name = "baseline" if config.eval.baseline else "backslide"
        raise ValueError(f"eval.{name} does not go with sampler.constraint, which it does not keep to: leave it out")
    excluded = excluded_ranges(tokenizer, max(tokenizer.get_vocab().values()) + 1, config.model.never_generate)
    reason = compiled_constraint(sampler.constraint, tokenizer, excluded).refusal(sampler.gen_length)
    if reason is not None:
        raise ValueError(f"sampler.constraint cannot be met: {reason}")


def _check_guide(config: Config) -> None:
    """Raise ValueError where the guide is not there, or its tokens would be taken for the policy's."""
    from rewards.causal_lm import resolve
    from rl.models.folder import is_url

    guide = config.sampler.guide
    assert guide is not None
    if config.model.autoregressive:
        raise ValueError("sampler.guide guides a diffusion model, and model.autoregressive is true: leave one out")
    if vision_of(config) is not None:
        raise ValueError("sampler.guide reads text, and model.vision puts images into prompts: leave one out")
    if config.train.steps and guide.rule == "energy":
        raise ValueError(
            "sampler.guide.rule energy writes tokens that the policy did not draw, and no recipe learns from them: "
            "train with agree, or without a guide"
        )
    if not is_url(guide.model):
        resolve(guide.model)


def _check_noise(config: Config) -> None:
    """Refuse what needs masks, where the model's noise is uniform."""
    from rl.models.families import family_of
    from rl.models.families.diffusion_gemma import DiffusionGemma
    from rl.models.folder import local_config

    model, recipe = config.model, config.algorithm
    file = local_config(model.path) if model.path is not None else None
    # What only loading will tell is taken from what the config says of the model, for the memory plan.
    described: dict[str, Any] = {"noise": model.noise} if model.path is None else dict(model.backbone)
    # A file that is no JSON is refused with the model's tokenizer.
    with contextlib.suppress(json.JSONDecodeError):
        described = json.loads(file.read_text()) if file else described
    if isinstance(family_of(described, model.family), DiffusionGemma):
        described = DiffusionGemma().fields(described)
    canvas_length: int | None = described.get("canvas_length")
    noise = described.get("noise", "absorbing" if described else None)
    if noise is not None:
        check_recipe(config, "canvas" if canvas_length else noise)
    if noise != "uniform":
        if described:
            config.sampler.check_absorbing()
        return
    config.sampler.check_uniform(canvas_length)
    with_changes(config.sampler, config.eval.sampler).check_uniform(canvas_length)
    if config.train.steps and config.sampler.last_step != "draw":
        raise ValueError("sampler.last_step argmax decides tokens without a log-prob: train with draw")
    refused = {
        "model.attention": model.attention != "full",
        "sft.errors": config.sft.errors > 0,
        "sft.consistency": config.sft.consistency > 0,
        "sft.joint": config.sft.joint,
        "sft.levels": config.sft.levels is not None,
        "eval.backslide": config.eval.backslide,
        "rollout.engine": config.rollout.engine == "server",
        "rollout.cache": config.rollout.cache != "none",
        "algorithm.shrink": config.train.steps > 0 and getattr(recipe, "shrink", 1) > 1,
    }
    for key, wrong in refused.items():
        if wrong:
            raise ValueError(f"{key} needs masks that are revealed, and the model's noise is uniform: leave it out")


def check_recipe(config: Config, noise: str) -> None:
    """Raise ValueError where the recipe does not train models of this kind of noise (`AnyRecipe.noises`)."""
    recipe = config.algorithm
    if not config.train.steps or noise in recipe.noises:
        return
    classes = {name: RECIPES.resolve(name) for name in RECIPES.known}
    able = [name for name, own in classes.items() if own.modality == "text" and noise in own.noises]
    scores = "masks" if recipe.noises == ("absorbing",) else f"{recipe.noises[0]} noise"
    found = "uniform, in canvases" if noise == "canvas" else noise
    raise ValueError(
        f"algorithm.name {recipe.name!r} scores {scores}, and the model's noise is {found}: choose one of "
        f"{', '.join(able)}"
    )


def _sources(config: Config) -> str:
    """Where the decoder of an evaluation comes from."""
    given = {"sampler": True, "eval.sampler": config.eval.sampler, "eval.backslide": config.eval.backslide}
    return " and ".join(name for name, present in given.items() if present)


def evaluation_options(config: Config, num_inference_steps: int) -> SamplerOptions:
    """The decoder of an evaluation: `sampler`, greedy, with `eval.sampler` over it."""
    sampler, given = config.sampler, config.eval.sampler
    # Several draws of a greedy policy are one.
    weighed = sampler.guide is not None and sampler.guide.rule == "energy"
    changed = {
        "temperature": sampler.temperature if weighed else 0.0,
        **given,
        "num_inference_steps": num_inference_steps,
        "record_x0": config.eval.backslide,
    }
    if sampler.final_temperature is not None:
        # DiffusionGemma's decoder is its temperatures; only its last step is greedy.
        changed |= {"temperature": sampler.temperature, "last_step": "argmax", **given}
    return with_changes(sampler, changed)


def _check_decoder(config: Config, tokenizer: Any, block: int | None, sampler: SamplerOptions) -> None:
    """Refuse a decoder that the model's attention does not go with, before there is a model."""
    from rollouts.engines.fitted_options import fitted_options

    model = config.model
    if sampler.block_length is None and not config.train.steps:
        # There is no rollout, whose steps would have to divide over the model's blocks.
        sampler = sampler.model_copy(update={"block_length": block})
    described = SimpleNamespace(
        attention="full" if block is None else "block_causal",
        block_length=block,
        noise=model.noise,
        choice_head=None if model.choices is None else SimpleNamespace(out_features=model.choices),
        joint_head=model.joint_head or None,
    )
    fitted_options(sampler, described, config.rollout.cache, tokenizer.eos_token_id)


def _shape(config: Config, tokenizer: Any) -> tuple[int | None, int | None, int | None]:
    """Positions, mask token and block length of the model a config describes; None where only loading it will tell."""
    model = config.model
    backbone, mask_token_id = model.backbone, tokenizer.mask_token_id
    block = model.block_length if model.attention == "block_causal" else None
    if model.path is not None:
        from rl.models.folder import local_config, shape_of

        file = local_config(model.path)
        if file is None:
            return None, mask_token_id, None
        with about(f"model.path {model.path!r}"):
            return shape_of(json.loads(file.read_text()), model, mask_token_id)
    return backbone.get("max_position_embeddings", backbone.get("n_positions")), mask_token_id, block
