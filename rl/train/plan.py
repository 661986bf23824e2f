"""The numbers a config implies, and the checks that need no training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.config import Config, load_config
from rl.errors import about

if TYPE_CHECKING:
    from rl.tasks.base import Task


def plan_lines(config: Config, ranks: int | None = None) -> list[str]:
    """Derived batch numbers, one sentence each.

    Args:
        ranks: number of ranks; the launcher's when None.

    Raises:
        ValueError: the batch does not divide over ranks and micro-batches.
    """
    if modality_of(config) == "text":
        _check_steps(config)
    world = ranks or int(os.environ.get("WORLD_SIZE", "1"))
    train = config.train
    lines = [f"run {config.run.output_dir}, task {config.task.name}, seed {config.run.seed}, {world} rank(s)"]
    if config.sft.steps:
        lines.append(f"sft: {config.sft.steps} updates of {config.sft.batch_size} sequences")
    if train.steps:
        check_batch(config, world)
        trajectories = train.prompts_per_step * train.group_size
        per_update = trajectories // train.updates_per_step // world
        micro = -(-per_update // train.micro_batch_size)
        updates = train.steps * train.updates_per_step * train.epochs
        if modality_of(config) == "images":
            forwards: float = config.image_sampler.num_inference_steps
            guided = config.image_sampler.guidance_scale != 1
        else:
            counts = train.mixed_steps or [config.sampler.num_inference_steps]
            forwards = sum(config.sampler.steps_per_block(n) * _num_blocks(config) for n in counts) / len(counts)
            guided = config.sampler.cfg_scale != 0
        lines += [
            f"rl: {train.steps} steps of {train.prompts_per_step} prompts x {train.group_size} rollouts = "
            f"{trajectories} trajectories per step",
            f"rl: {train.updates_per_step} x {train.epochs} optimizer update(s) per step, {updates} in all, "
            f"{per_update} trajectories per update and rank in at most {micro} micro-batch(es) of "
            f"{train.micro_batch_size}",
            f"rl: {forwards:g} denoising steps per rollout on average, "
            f"at most {int(forwards * trajectories * train.steps) * (1 + guided)} sequence forwards to sample in all",
        ]
    return lines


def check_batch(config: Config, world: int) -> None:
    """Raise ValueError when prompts or trajectories do not divide over updates, ranks and micro-batches."""
    train = config.train
    share = train.updates_per_step * world
    if train.prompts_per_step % share:
        raise ValueError(
            f"train.prompts_per_step ({train.prompts_per_step}) must be a multiple of train.updates_per_step x ranks "
            f"({train.updates_per_step} x {world})"
        )
    per_rank = train.prompts_per_step * train.group_size // share
    if per_rank > train.micro_batch_size and per_rank % train.micro_batch_size:
        raise ValueError(
            f"train.micro_batch_size ({train.micro_batch_size}) must divide the {per_rank} trajectories of an update "
            "on a rank"
        )


def check_run(config: Config, new: bool = True) -> None:
    """Everything that can be found wrong before a model is built.

    Args:
        new: also refuse to write over another run.

    Raises:
        ValueError: one line naming the field and the fix.
    """
    from rl.models.families import open_family
    from rl.tasks.load import load_task
    from rl.train.distributed import pick_device
    from rl.train.engines import check_engine
    from rl.train.learner import read_deepspeed_config
    from rollouts.engines.server.options import check_server

    plan_lines(config)
    with about(f"run.device {config.run.device!r}"):
        pick_device(config.run.device)
    with about(f"train.deepspeed file {config.train.deepspeed}"):
        stage = read_deepspeed_config(config.train.deepspeed).get("zero_optimization", {}).get("stage", 0)
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"train.deepspeed file {config.train.deepspeed}: stage {stage!r} must be 0, 1, 2 or 3")
    if config.train.steps and config.sampler.temperature == 0:
        raise ValueError("sampler.temperature is 0: greedy rollouts carry no gradient, set it above 0 to train")
    options = config.algorithm
    for key, value in options.requires(config).items():
        section, name = key.split(".")
        if getattr(getattr(config, section), name) != value:
            wanted = str(value).lower() if isinstance(value, bool) else value
            raise ValueError(f"algorithm.name {options.name} needs {key}={wanted}: set it")
    if config.train.steps:
        check_engine(config)
    for key, family in (("model.family", config.model.family), ("rollout.server.layout", config.rollout.server.layout)):
        if family is not None:
            open_family(family, key)
    if config.goal is not None and config.goal.steps not in config.eval.num_inference_steps:
        raise ValueError(f"goal.steps {config.goal.steps} is not in eval.num_inference_steps: add it there")
    if config.sft.masking == "semi_ar" and config.sampler.block_length is None:
        raise ValueError("sft.masking semi_ar needs sampler.block_length: set the block to mask")
    if config.sft.trajectories is not None and not Path(config.sft.trajectories).is_file():
        raise ValueError(f"sft.trajectories {config.sft.trajectories!r} is not a file")
    if config.train.block_schedule and config.model.path is None and config.model.attention != "block_causal":
        raise ValueError("train.block_schedule needs model.attention block_causal")
    old = getattr(options, "old_logprob", None)
    if old == "sampler" and any(stage.train != stage.rollout for stage in config.train.block_schedule):
        raise ValueError(
            "train.block_schedule scores other states than were sampled: set algorithm.old_logprob to recompute"
        )
    from rewards.load import load_reward

    with about(f"task.name {config.task.name!r} with task.params {config.task.params}"):
        task = load_task(config.task.name, config.task.params)
        rows = task.heldout_rows(1) + task.train_rows(config.run.seed, 0, 1)
    if not rows:
        raise ValueError("the task has no rows: check task.params")
    for part in config.reward.functions:
        with about(f"reward.functions {part.name!r}"):
            load_reward(part.name, part.params)
        if part.normalize != "none" and config.train.steps and getattr(options.build(), "needs_step_rewards", False):
            raise ValueError(
                f"reward.functions {part.name!r} has normalize {part.normalize}, but algorithm.name {options.name} "
                "compares the rewards of steps with each other: set normalize to none"
            )
    if not config.reward.functions:
        load_reward(task.reward, {})
    modality = getattr(task, "modality", "text")
    if config.train.steps and options.modality != modality:
        raise ValueError(
            f"algorithm.name {options.name!r} trains {options.modality}, and task.name {config.task.name!r} is about "
            f"{modality}: choose another algorithm"
        )
    if config.rollout.engine == "server":
        if modality != "text":
            raise ValueError(
                f"rollout.engine server samples text, and task.name {config.task.name!r} is about {modality}"
            )
        check_server(config.rollout.server, config.sampler)
    if modality == "images":
        _check_images(config)
    else:
        _check_text(config, task, [row["prompt"] for row in rows])
    if new and config.run.resume:
        _check_same_run(config)
    if new and not config.run.resume and int(os.environ.get("RANK", "0")) == 0:
        metrics = Path(config.run.output_dir) / "metrics.jsonl"
        # A start that failed leaves an empty file: there is nothing in it to lose.
        if metrics.exists() and metrics.stat().st_size:
            raise ValueError(
                f"run.output_dir {config.run.output_dir} already holds a run: choose another folder, delete it, or set "
                "run.resume=true"
            )


def _check_text(config: Config, task: Task, prompts: Sequence[str]) -> None:
    from rl.models.load import check_model_folder, load_tokenizer

    if config.model.path is not None:
        check_model_folder(config.model.path)
    elif not config.model.backbone:
        raise ValueError("model.backbone or model.path is required: there is no model to train")
    elif config.model.lora.rank:
        raise ValueError(f"model.lora.rank is {config.model.lora.rank}: adapters need a model to adapt, set model.path")
    with about(tokenizer_field(config)):
        tokenizer = load_tokenizer(config.model, task)
    if config.task.chat:
        from rl.tasks.templates import chat_prompt

        prompts = [chat_prompt(tokenizer, prompt) for prompt in prompts]
    longest = max(len(tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in prompts)
    context = _context(config)
    if context and longest + config.sampler.gen_length > context:
        raise ValueError(
            f"a prompt of {longest} tokens plus sampler.gen_length {config.sampler.gen_length} does not fit the "
            f"model's {context} positions: raise model.backbone's positions"
        )


def _check_images(config: Config) -> None:
    """Raise ValueError when the options of an image run contradict themselves."""
    if config.train.mixed_steps:
        raise ValueError("train.mixed_steps is for text: set image_sampler.num_inference_steps")
    if config.sft.trajectories is not None:
        raise ValueError("sft.trajectories is for text: images are fitted to the task's own")
    path = config.model.path
    if path is not None and not Path(path).is_dir() and path.startswith((".", "/")):
        raise ValueError(f"model.path {path!r} is not a folder")
    check: Any = getattr(config.algorithm, "check_sampler", None)
    if config.train.steps and check is not None:
        check(config.image_sampler.num_inference_steps, config.train.group_size)


def modality_of(config: Config) -> str:
    """The modality of the config's task, without building it."""
    from rl.tasks.load import task_class

    with about(f"task.name {config.task.name!r}"):
        return getattr(task_class(config.task.name), "modality", "text")


def _check_same_run(config: Config) -> None:
    """A run goes on with the settings it began with; only where and how long it runs may change."""
    saved = Path(config.run.output_dir) / "config.yaml"
    if not saved.is_file():
        return
    before = load_config(saved)
    sampling = ("model", "task", "sampler", "image_sampler", "rollout")
    # Of the engine only what the numbers depend on: where rollouts are sampled may change.
    rollout = {"asynchronous", "cache"} | ({"max_importance_weight"} if config.rollout.asynchronous else set())
    for section in (*sampling, "reward", "sft", "train", "filters", "algorithm"):
        old, now = (getattr(settings, section).model_dump() for settings in (before, config))
        free = set(now) - rollout if section == "rollout" else {"max_seconds", "steps"}
        key = next((name for name in now if name not in free and old.get(name) != now[name]), None)
        if key is not None:
            raise ValueError(
                f"run.resume: {section}.{key} is {now[key]!r} and the run in {config.run.output_dir} began with "
                f"{old.get(key)!r}: set it back, or choose another run.output_dir"
            )
    if before.run.seed != config.run.seed:
        raise ValueError(f"run.resume: run.seed is {config.run.seed} and the run began with {before.run.seed}")


def _check_steps(config: Config) -> None:
    """Every number of denoising steps the run will use must divide over every block length it will use."""
    own = config.sampler.block_length or (config.model.block_length if config.model.path is None else None)
    blocks = {own, *(stage.rollout for stage in config.train.block_schedule)}
    viewer = [config.eval.viewer_steps] if config.eval.viewer_steps else []
    counts = {
        "sampler.num_inference_steps": [config.sampler.num_inference_steps],
        "eval.num_inference_steps": config.eval.num_inference_steps,
        "eval.viewer_steps": viewer,
        "train.mixed_steps": config.train.mixed_steps,
    }
    for block in blocks:
        options = config.sampler.model_copy(update={"block_length": block})
        for name, values in counts.items():
            for steps in values:
                try:
                    options.steps_per_block(steps)
                except ValueError as error:
                    raise ValueError(f"{name} has {steps}: {error}") from None


def tokenizer_field(config: Config) -> str:
    """The option that a tokenizer comes from, for messages."""
    return (
        f"model.tokenizer {config.model.tokenizer!r}" if config.model.tokenizer else f"model.path {config.model.path!r}"
    )


def _context(config: Config) -> int | None:
    """Positions of the model a config describes; None when only loading it will tell."""
    backbone = config.model.backbone
    file = Path(config.model.path or "") / "config.json"
    if config.model.path is not None:
        if not file.is_file():
            return None
        with about(f"model.path {config.model.path!r}"):
            from rl.models.load import backbone_of

            backbone = backbone_of(json.loads(file.read_text()), config.model.family)
    return backbone.get("max_position_embeddings", backbone.get("n_positions"))


def _num_blocks(config: Config) -> int:
    return 1 if config.sampler.block_length is None else config.sampler.gen_length // config.sampler.block_length
