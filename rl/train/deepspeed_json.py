"""The DeepSpeed configs that `train.deepspeed` can name. No torch at import."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _built_in(stage: int, half: bool = False, offload: Sequence[str] = ()) -> dict[str, Any]:
    """A DeepSpeed config; `offload` keeps those states ("optimizer", "param") in host memory."""
    config: dict[str, Any] = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": half}}
    for states in offload:
        config["zero_optimization"][f"offload_{states}"] = {"device": "cpu"}
    if offload:
        # DeepSpeed's own CPU Adam would be compiled at the first start; torch's fused one needs no compiler.
        config["zero_force_ds_cpu_optimizer"] = False
    return config | {"steps_per_print": 10**9}


# What an installed package can name without a file beside it; configs/deepspeed/ holds the same as files.
BUILT_IN: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": _built_in(stage) for stage in range(4)},
    **{f"zero{stage}_bf16": _built_in(stage, True) for stage in range(4)},
    "zero2_offload": _built_in(2, offload=["optimizer"]),
    "zero2_bf16_offload": _built_in(2, True, ["optimizer"]),
    "zero3_bf16_offload": _built_in(3, True, ["optimizer"]),
    "zero3_bf16_offload_all": _built_in(3, True, ["optimizer", "param"]),
}


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """The DeepSpeed JSON as a dict, or one of `BUILT_IN`.

    Raises:
        ValueError: missing or invalid file, or a key that is decided elsewhere.
    """
    if path in BUILT_IN:
        return copy.deepcopy(BUILT_IN[path])
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"train.deepspeed file {path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"train.deepspeed file {path} is not valid JSON: {error}") from None
    for key in ("optimizer", "scheduler", "gradient_clipping"):
        if key in config:
            raise ValueError(f"train.deepspeed file {path} sets {key!r}: remove it, the optimizer section decides it")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if key in config:
            raise ValueError(f"train.deepspeed file {path} sets {key!r}: remove it, batch sizes come from the config")
    if config.get("fp16", {}).get("enabled", False) and config.get("zero_optimization", {}).get("stage", 0) == 0:
        # DeepSpeed divides the gradients by a loss scale there that it never multiplied the loss by.
        raise ValueError(f"train.deepspeed file {path} sets fp16 without ZeRO: set stage 1 or more, or bf16")
    return config


def half_precision(config: dict[str, Any]) -> bool:
    """Whether a DeepSpeed config computes in 16 bits."""
    return any(config.get(kind, {}).get("enabled", False) for kind in ("bf16", "fp16"))
