"""`trl.GRPOConfig` and `peft.LoraConfig` as options of ours: a field is mapped, or refused by name.

The table is in docs/python_api.md. No trl at import: whoever has a GRPOConfig has imported it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# Fields whose value is an option of ours, also where it is TRL's default.
COPIED = {
    "output_dir": "run.output_dir",
    "seed": "run.seed",
    "ddp_timeout": "run.collective_timeout_seconds",
    "max_completion_length": "sampler.gen_length",
    "temperature": "sampler.temperature",
    "top_p": "sampler.top_p",
    "top_k": "sampler.top_k",
    "num_generations": "train.group_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "num_iterations": "train.epochs",
    "learning_rate": "train.optimizer.lr",
    "adam_epsilon": "train.optimizer.eps",
    "weight_decay": "train.optimizer.weight_decay",
    "max_grad_norm": "train.optimizer.max_grad_norm",
    "mask_truncated_completions": "filters.drop_overlong",
}
# Fields of the algorithm: the recipe has the value, unless the field differs from its default.
_ALGORITHM = {"epsilon": "clip_low", "epsilon_high": "clip_high", "entropy_coef": "entropy_coef"}
_LOSSES = {"grpo": "trajectory_mean", "bnpo": "token_mean", "dapo": "token_mean", "dr_grpo": "constant"}
_SCALES = {"group": "std", "batch": "reward_std", "none": "none"}
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "constant_with_warmup": "constant_with_warmup",
}
# Values that say what is so anyway.
_SAME_HERE: dict[str, tuple[Any, ...]] = {
    "logging_steps": (1,),
    "logging_first_step": (True,),
    "log_completions": (True,),
    "eval_on_start": (True,),
    "disable_dropout": (True,),
    "optim": ("adamw_torch",),
    "use_bias_correction_kl": (False,),
    "do_train": (True,),
    "do_eval": (True,),
    # What GRPOConfig makes of other fields.
    "accelerator_config": (),
    "dataloader_pin_memory": (False,),
    "debug": ([],),
    "disable_tqdm": (False,),
    "pad_to_multiple_of": (None,),
}
_READ = {
    *("adam_beta1", "adam_beta2", "lr_scheduler_type", "warmup_steps", "bf16", "deepspeed", "use_cpu"),
    *("gradient_accumulation_steps", "generation_batch_size", "steps_per_generation", "max_steps", "num_train_epochs"),
    *("save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps", "report_to"),
    *("beta", "loss_type", "scale_rewards", "reward_weights", "hub_model_id", "hub_private_repo", "hub_token"),
    # The first is the old name of the second, which GRPOConfig sets to the same value.
    *("resume_from_checkpoint", "gradient_checkpointing", "activation_checkpointing"),
    # For callbacks, such as transformers' EarlyStoppingCallback.
    *("metric_for_best_model", "greater_is_better"),
}
_HINTS = {
    "push_to_hub": "call trainer.push_to_hub() after training",
    "fp16": "name a DeepSpeed JSON with fp16 in args.deepspeed",
    "run_name": "the run is called like its folder, args.output_dir",
    "per_device_eval_batch_size": "options={'rollout.max_batch_size': ...} says what is decoded together",
    "use_vllm": "options={'rollout.engine': 'server'} samples from a server",
    "logging_steps": "every step is logged",
    "lr_scheduler_kwargs": "options={'train.optimizer.schedule': ...} has no further arguments",
}


def is_grpo_config(args: Any) -> bool:
    """Whether this is a `trl.GRPOConfig`, or derived from one."""
    return any(f"{cls.__module__}.{cls.__name__}".startswith("trl.") for cls in type(args).__mro__) and hasattr(
        args, "num_generations"
    )


def grpo_options(args: Any, num_rows: int | None) -> dict[str, Any]:
    """Dotted options of ours for a `trl.GRPOConfig`.

    Args:
        num_rows: rows of the training dataset, which `num_train_epochs` counts in; None for a stream.

    Raises:
        ValueError: a field that differs from its default has no counterpart here.
    """
    changed = {field.name for field in dataclasses.fields(args) if _differs(args, field)}
    known = {*COPIED, *_ALGORITHM, *_READ}
    for name in sorted(changed - known):
        value = getattr(args, name)
        if value not in _SAME_HERE.get(name, ()) and name != "accelerator_config":
            raise ValueError(
                f"args.{name} is {getattr(value, 'value', value)!r}, which has no counterpart here: leave it out"
                + (f" ({_HINTS[name]})" if name in _HINTS else "")
            )
    options = {ours: getattr(args, theirs) for theirs, ours in COPIED.items()}
    options["model.gradient_checkpointing"] = getattr(args, "activation_checkpointing", args.gradient_checkpointing)
    options["train.optimizer.betas"] = (args.adam_beta1, args.adam_beta2)
    options["train.optimizer.schedule"] = _of(_SCHEDULES, "lr_scheduler_type", str(args.lr_scheduler_type.value))
    options["train.deepspeed"] = args.deepspeed or ("zero0_bf16" if args.bf16 else "zero0")
    if args.use_cpu:
        options["run.device"] = "cpu"
    options |= _batches(args, num_rows)
    options |= _intervals(args, changed)
    options["run.services"] = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to)
    options |= {f"algorithm.{ours}": getattr(args, name) for name, ours in _ALGORITHM.items() if name in changed}
    if "epsilon" in changed and "epsilon_high" not in changed:
        options["algorithm.clip_high"] = args.epsilon
    if "loss_type" in changed:
        options["algorithm.aggregation"] = _of(_LOSSES, "loss_type", args.loss_type)
    if "scale_rewards" in changed:
        options["algorithm.scale"] = _of(_SCALES, "scale_rewards", args.scale_rewards)
    if args.beta and getattr(args, "use_bias_correction_kl", False):
        raise ValueError(
            "args.use_bias_correction_kl is True, and the KL of args.beta is not multiplied by the ratio here: set it "
            "to False"
        )
    if args.beta:
        options |= {"algorithm.kl_to": "reference", "algorithm.kl_coef": args.beta}
    return options


def _differs(args: Any, field: dataclasses.Field[Any]) -> bool:
    factory: Any = field.default_factory
    default = factory() if factory is not dataclasses.MISSING else field.default
    return bool(getattr(args, field.name) != default)


def _of(table: Mapping[str, str], name: str, value: str) -> str:
    if value not in table:
        raise ValueError(f"args.{name} {value!r} has no counterpart here: choose from {', '.join(table)}")
    return table[value]


def _batches(args: Any, num_rows: int | None) -> dict[str, Any]:
    """TRL counts optimizer updates and completions; an RL step here is a batch of generations and its updates."""
    prompts = args.generation_batch_size // args.num_generations
    updates, rest = divmod(args.steps_per_generation, args.gradient_accumulation_steps)
    if rest:
        raise ValueError(
            f"args.steps_per_generation ({args.steps_per_generation}) must be a multiple of "
            f"args.gradient_accumulation_steps ({args.gradient_accumulation_steps})"
        )
    per_step = updates * args.num_iterations
    if args.max_steps > 0:
        steps, rest = divmod(args.max_steps, per_step)
        if rest:
            raise ValueError(
                f"args.max_steps ({args.max_steps}) must be a multiple of the {per_step} updates that a batch of "
                "generations is learned from (steps_per_generation / gradient_accumulation_steps * num_iterations)"
            )
    elif num_rows is None:
        raise ValueError(
            "args.num_train_epochs counts the rows of train_dataset, and a stream has no length: set max_steps"
        )
    else:
        steps = math.ceil(args.num_train_epochs * max(num_rows // prompts, 1))
    warmup = args.warmup_steps
    return {
        "train.prompts_per_step": prompts,
        "train.updates_per_step": updates,
        "train.steps": steps,
        "train.optimizer.warmup_steps": math.ceil(warmup * steps * per_step) if warmup < 1 else int(warmup),
    }


def _intervals(args: Any, changed: set[str]) -> dict[str, Any]:
    """When to save and to evaluate; TRL's default of 500 updates is not asked to fit."""
    per_step = args.steps_per_generation // args.gradient_accumulation_steps * args.num_iterations
    found: dict[str, Any] = {}
    if args.save_total_limit is not None:
        found["checkpoint.keep"] = args.save_total_limit
    kinds = {
        "save": ("checkpoint.every", args.save_steps),
        "eval": ("eval.every", args.eval_steps or args.logging_steps),
    }
    for kind, (option, interval) in kinds.items():
        strategy = str(getattr(args, f"{kind}_strategy").value)
        if strategy == "no":
            found[option] = 0
        elif strategy != "steps":
            raise ValueError(f"args.{kind}_strategy {strategy!r} has no counterpart here: choose from no, steps")
        elif interval < 1 or (interval % per_step and f"{kind}_steps" in changed):
            raise ValueError(
                f"args.{kind}_steps ({interval}) must be a multiple of the {per_step} updates of an RL step"
            )
        else:
            found[option] = math.ceil(interval / per_step)
    return found


# Fields of a LoraConfig that say nothing about the adapters, or what a policy's adapters are anyway.
_LORA_READ = {"r", "lora_alpha", "target_modules", "lora_dropout", "task_type", "peft_type", "peft_version"}


def lora_options(config: Any) -> dict[str, Any]:
    """Dotted options of ours for a `peft.LoraConfig`.

    Raises:
        ValueError: it is none, or a field that differs from its default has no counterpart here.
    """
    if type(config).__name__ != "LoraConfig":
        raise ValueError(f"peft_config is a {type(config).__name__}: only a LoraConfig is known here")
    plain = type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _LORA_READ and value != getattr(plain, field.name):
            raise ValueError(f"peft_config.{field.name} is {value!r}, which has no counterpart here: leave it out")
    targets = config.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        raise ValueError(
            f"peft_config.target_modules {targets!r} is a pattern: give a list of the ends of layers' names"
        )
    return {
        "model.lora.rank": config.r,
        "model.lora.alpha": config.lora_alpha,
        "model.lora.targets": None if targets in (None, "all-linear") else sorted(targets),
        "model.lora.dropout": config.lora_dropout,
    }
