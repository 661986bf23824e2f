"""The numbers a config implies, and the checks that need no training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards.load import downloads, load_reward
from rewards.signature import missing_columns
from rl.config import Config
from rl.errors import about
from rl.models.families import open_family
from rl.sections import FilterConfig
from rl.tasks.base import CALL_ARGUMENTS, Example, Task, column_names
from rl.tasks.load import load_task, modality_class, modality_of
from rl.train.deepspeed_json import read_deepspeed_config
from rl.train.same_run import check_same_run
from rollouts.engines.base import IN_PROCESS, RAY_WORKERS, require
from rollouts.engines.server.options import check_server

# Options that say nothing where the gradient is a reward's, the value that says so, and why.
_GRADIENT_WITHOUT: dict[str, tuple[Any, str]] = {
    "train.updates_per_step": (1, "samples anew for every update"),
    "train.epochs": (1, "samples anew for every update"),
    "train.mixed_steps": ([], "samples with one number of steps"),
    "train.block_schedule": ([], "samples without blocks"),
    "train.max_logprob_gap": (None, "has no recorded log-probs"),
    "filters.drop_zero_variance": (False, "learns from every sample"),
    "filters.accuracy_low": (FilterConfig().accuracy_low, "learns from every sample"),
    "filters.accuracy_high": (FilterConfig().accuracy_high, "learns from every sample"),
    "filters.drop_overlong": (False, "learns from every sample"),
    "filters.refill_rounds": (0, "learns from every sample"),
}


def plan_lines(config: Config, ranks: int | None = None) -> list[str]:
    """Derived batch numbers, one sentence each.

    Args:
        ranks: number of ranks; the launcher's when None.

    Raises:
        ValueError: the batch does not divide over ranks and micro-batches, or a number of steps over blocks.
    """
    forwards, guided = modality_of(config.task.name).forwards(config)
    world = ranks or int(os.environ.get("WORLD_SIZE", "1"))
    train = config.train
    lines = [f"run {config.run.output_dir}, task {config.task.name}, seed {config.run.seed}, {world} rank(s)"]
    if config.convert.steps:
        lines.append(f"convert: {config.convert.steps} updates of {config.convert.batch_size} texts")
    if config.sft.steps:
        lines.append(f"sft: {config.sft.steps} updates of {config.sft.batch_size} sequences")
    if train.steps:
        check_batch(config, world)
        trajectories = train.prompts_per_step * train.group_size
        per_update = trajectories // train.updates_per_step // world
        micro = -(-per_update // train.micro_batch_size)
        updates = train.steps * train.updates_per_step * train.epochs
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


def check_run(config: Config, new: bool = True) -> list[str]:
    """Everything that can be found wrong before a model is built.

    Args:
        new: also refuse to write over another run.

    Returns:
        notes for the user: rows that will be left out, and what rewards download.

    Raises:
        ValueError: one line naming the field and the fix.
    """
    plan_lines(config)
    if "RANK" in os.environ:
        from rl.distributed import launched

        launched()
    if config.run.device not in ("auto", "cpu"):
        # Only a GPU needs torch here, whose import takes longer than everything else.
        from rl.distributed import pick_device

        with about(f"run.device {config.run.device!r}"):
            pick_device(config.run.device)
    with about(f"train.deepspeed file {config.train.deepspeed}"):
        stage = read_deepspeed_config(config.train.deepspeed).get("zero_optimization", {}).get("stage", 0)
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"train.deepspeed file {config.train.deepspeed}: stage {stage!r} must be 0, 1, 2 or 3")
    with about(f"task.name {config.task.name!r} with task.params {config.task.params}"):
        task = load_task(config.task.name, config.task.params)
        rows = task.heldout_examples(1) + task.train_examples(config.run.seed, 0, 1)
    if not rows:
        raise ValueError("the task has no rows: check task.params")
    modality = modality_class(task)
    if config.train.steps:
        _check_recipe(config)
        check_engine(config)
    for key, family in (("model.family", config.model.family), ("rollout.server.layout", config.rollout.server.layout)):
        if family is not None:
            open_family(family, key)
    if config.goal is not None and config.goal.steps not in config.eval.num_inference_steps:
        raise ValueError(f"goal.steps {config.goal.steps} is not in eval.num_inference_steps: add it there")
    notes = _check_rewards(config, task, rows, modality.reward_columns)
    if config.rollout.engine == "server":
        if modality.name != "text":
            raise ValueError(
                f"rollout.engine server samples text, and task.name {config.task.name!r} is about {modality.name}"
            )
        check_server(config.rollout.server, config.sampler)
    modality.check(config, task, rows)
    if new:
        check_folder(config)
    return [*(file.note for file in getattr(task, "files", ()) if file.note), *notes]


def check_folder(config: Config) -> None:
    """Raise ValueError where a run would write over another one, or go on from a different one."""
    if config.run.resume:
        check_same_run(config)
    elif int(os.environ.get("RANK", "0")) == 0:
        metrics = Path(config.run.output_dir) / "metrics.jsonl"
        # A start that failed leaves an empty file: there is nothing in it to lose.
        if metrics.exists() and metrics.stat().st_size:
            raise ValueError(
                f"run.output_dir {config.run.output_dir} already holds a run: choose another folder, delete it, or set "
                "run.resume=true"
            )


def engine_needs(config: Config) -> dict[str, str]:
    """What the run needs of its engine (keys of `rollouts.engines.base.NEEDS`) -> the option that needs it."""
    recipe = config.algorithm
    needs = {name: f"algorithm.name {recipe.name}" for name in sorted(recipe.engine_needs())}
    needs |= modality_of(config.task.name).engine_needs(config)
    if config.train.mixed_steps:
        needs["request_steps"] = "train.mixed_steps"
    if config.rollout.asynchronous:
        needs["asynchronous"] = "rollout.asynchronous"
        if config.rollout.max_importance_weight is not None:
            needs.setdefault("sampled_logprobs", "rollout.max_importance_weight")
    return needs


def check_engine(config: Config) -> None:
    """What of the rollout engine can be found wrong before anything is started.

    Raises:
        ValueError: one line naming the field and the fix.
    """
    rollout = config.rollout
    if rollout.quantize != "none" and rollout.engine != "in_process":
        raise ValueError(
            f"rollout.quantize {rollout.quantize} is for rollout.engine in_process: set it to none, or let the servers "
            "quantize"
        )
    if rollout.compile:
        modality = modality_of(config.task.name).name
        if rollout.engine != "in_process":
            raise ValueError(f"rollout.compile is for rollout.engine in_process, got {rollout.engine}: set it to false")
        if modality != "text":
            raise ValueError(
                f"rollout.compile is for text, and task.name {config.task.name!r} is about {modality}: set it to false"
            )
        if config.model.attn_implementation != "sdpa":
            raise ValueError(
                "rollout.compile needs model.attn_implementation sdpa: set it, or rollout.compile to false"
            )
    known = {"in_process": IN_PROCESS, "ray": RAY_WORKERS}
    # A server says what it can do when it is asked.
    if rollout.engine in known:
        require(rollout.engine, known[rollout.engine], engine_needs(config))
    if not rollout.asynchronous:
        return
    if config.filters.refill_rounds:
        raise ValueError(
            "filters.refill_rounds depends on rewards that come after the next step's rollouts have begun: set it to "
            "0, or rollout.asynchronous to false"
        )
    if config.train.block_schedule:
        raise ValueError("train.block_schedule changes the decoder between steps: set rollout.asynchronous to false")
    per_step = config.train.updates_per_step * config.train.epochs
    if config.staleness_limit() < per_step:
        raise ValueError(
            f"rollout.max_staleness ({config.staleness_limit()}) is less than the {per_step} update(s) of an RL step, "
            "by which asynchronous rollouts are always behind: raise it, or set rollout.asynchronous to false"
        )


def check_modality(recipe: Any, config: Config) -> None:
    """Raise ValueError when a recipe does not train the modality of the config's task."""
    modality = modality_of(config.task.name).name
    if recipe.modality != modality:
        raise ValueError(
            f"algorithm.name {recipe.name!r} trains {recipe.modality}, and task.name {config.task.name!r} is about "
            f"{modality}: choose another algorithm"
        )


def _check_recipe(config: Config) -> None:
    """Raise ValueError when the recipe cannot train the task's modality, or not with the other sections as they are."""
    recipe = config.algorithm
    check_modality(recipe, config)
    for key, value in recipe.requires(config).items():
        section, name = key.split(".")
        if name not in type(getattr(config, section)).model_fields:
            raise ValueError(f"algorithm.name {recipe.name} requires {key}, which is no option: mend its requires()")
        if getattr(getattr(config, section), name) != value:
            wanted = str(value).lower() if isinstance(value, bool) else value
            raise ValueError(f"algorithm.name {recipe.name} needs {key}={wanted}: set it")
    if config.train.group_size == 1 and recipe.needs_group:
        value = ", or set algorithm.value" if "value" in type(recipe).model_fields else ""
        raise ValueError(
            f"train.group_size 1 leaves algorithm.name {recipe.name} no other rollout of the prompt to compare with: "
            f"set it to 2 or more{value}"
        )
    old = getattr(recipe, "old_logprob", None)
    if old == "sampler" and any(stage.train != stage.rollout for stage in config.train.block_schedule):
        raise ValueError(
            "train.block_schedule scores other states than were sampled: set algorithm.old_logprob to recompute"
        )
    for part in config.reward.functions:
        if part.normalize != "none" and recipe.needs_step_rewards:
            raise ValueError(
                f"reward.functions {part.name!r} has normalize {part.normalize}, but algorithm.name {recipe.name} "
                "compares the rewards of steps with each other: set normalize to none"
            )
    if recipe.reward_gradient:
        _check_reward_gradient(config)
    recipe.check(config)


def _check_reward_gradient(config: Config) -> None:
    """Raise ValueError when an option is set that a reward gradient would not heed."""
    for key, (value, why) in _GRADIENT_WITHOUT.items():
        section, name = key.split(".")
        found = getattr(getattr(config, section), name)
        if found != value:
            wanted = "null" if value is None else str(value).lower()
            raise ValueError(f"{key} is {str(found).lower()}: a reward gradient {why}, set it to {wanted}")
    for part in config.reward.functions:
        if part.normalize != "none":
            raise ValueError(
                f"reward.functions: normalize of {part.name!r} is {part.normalize}: a reward gradient has no groups, "
                "set it to none"
            )


def _check_rewards(config: Config, task: Task, rows: Sequence[Example], given: Sequence[str]) -> list[str]:
    """Load the rewards, and hold what they need against the columns of the dataset and those `given` by the modality.

    Returns:
        a note for every download that a reward needs.

    Raises:
        ValueError: a reward cannot be loaded or lacks a column, or a column has a name of the trainer's.
    """
    files = getattr(task, "files", ())
    trained_on, *judged_on = [(file.path, file.examples) for file in files] or [("the task", rows)]
    uses = (
        ("reward.functions" if config.reward.functions else "the task's reward", config.reward.trained, [trained_on]),
        ("the verifier", config.reward.judges, judged_on or [trained_on]),
    )
    notes: list[str] = []
    for use, parts, sources in uses:
        for part in parts(task.reward):
            with about(f"{use} {part.name!r}"):
                reward = load_reward(part.name, part.params)
            for source, examples in sources:
                names = column_names(examples, given, source)
                known = {*names, *given, *CALL_ARGUMENTS}
                missing = [name for name in part.columns.values() if name not in known]
                missing += missing_columns(reward, dict.fromkeys(known | part.columns.keys()))
                if missing:
                    raise ValueError(
                        f"{use} {part.name!r} needs the column {missing[0]!r} (or params with it), and {source} has "
                        f"{', '.join(names) or 'none'} beside the prompt"
                    )
            notes += [
                f"reward {part.name!r} needs {what}, downloaded once" for what in downloads(part.name, part.params)
            ]
    return list(dict.fromkeys(notes))
