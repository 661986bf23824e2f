"""Load a policy from a diffusers pipeline, or from a folder of adapters of one."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rewards.weights import first_line
from rl.model_section import LoraOptions, PipelineConfig
from rl.models.diffusers_families import Flux, Sana, StableDiffusion, StableDiffusion3, StableDiffusionXL, ZImage
from rl.models.diffusers_policy import WEIGHTS, DiffusersPolicy
from rl.models.diffusers_qwen import Flux2Klein, QwenImage
from rl.models.pipelines import LORA_INDEX, check_pipeline

_ALL = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Flux2Klein, QwenImage, Sana, ZImage)
FAMILIES: dict[str, type[DiffusersPolicy]] = {family.pipeline_class: family for family in _ALL}


def load_diffusers_policy(
    path: str, options: PipelineConfig, lora: LoraOptions | None = None, seed: int = 0
) -> DiffusersPolicy:
    """A policy from a pipeline's folder or hub name, or from a folder of `save_pretrained`, in eval mode.

    Args:
        lora: may be left out for a policy saved with adapters, which has its own.
        seed: draws the initial weights of new adapters.

    Raises:
        ValueError: the folder is missing or incomplete, or the pipeline or its scheduler is of no known kind.
    """
    lora = lora or LoraOptions()
    adapters = Path(path) / LORA_INDEX
    if adapters.is_file():
        return _load_lora(path, json.loads(adapters.read_text()), options, lora)
    import diffusers

    try:
        with _quiet():
            index = diffusers.DiffusionPipeline.load_config(path)
            name = index["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(path, error) from error
    check_pipeline(path, index)
    family = FAMILIES[name]
    parts: dict[str, Any] = dict.fromkeys(family.without)
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    try:
        with _quiet():
            pipeline = getattr(diffusers, name).from_pretrained(path, dtype=getattr(torch, options.dtype), **parts)
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot_load(path, error) from error
    torch.manual_seed(seed)
    # A folder is remembered by its full path: the adapters must find it from wherever they are loaded.
    return family(pipeline, options, lora, str(Path(path).resolve()) if Path(path).is_dir() else path).eval()


def _load_lora(path: str, index: dict[str, Any], options: PipelineConfig, lora: LoraOptions) -> DiffusersPolicy:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = Path(path) / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"model.path {path!r} is incomplete: {WEIGHTS} is missing")
    rank, alpha, targets = (index["lora"][name] for name in ("rank", "alpha", "target_modules"))
    if lora.rank not in (0, rank):
        raise ValueError(f"model.lora.rank is {lora.rank}, the adapters in {path!r} have rank {rank}")
    own = LoraOptions(rank=rank, alpha=alpha, targets=targets, dora=index["lora"].get("dora", False))
    if lora.rank and lora.dora != own.dora:
        raise ValueError(f"model.lora.dora is {str(lora.dora).lower()}, and the adapters in {path!r} say otherwise")
    policy = load_diffusers_policy(index["base"], options, own)
    prefix = f"{policy.denoiser_name}."
    state = {name.removeprefix(prefix): values for name, values in load_file(weights).items()}
    wrong = sorted(policy.lora_state().keys() ^ state.keys())
    if wrong:
        raise ValueError(f"model.path {path!r}: its adapters do not fit {index['base']!r}, {wrong[0]} first")
    set_peft_model_state_dict(policy.denoiser, state)
    return policy


def _cannot_load(path: str, error: Exception) -> ValueError:
    return ValueError(f"model.path {path!r} cannot be loaded as a diffusers pipeline: {first_line(error)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' progress bars, its advice on safety checkers, and its use of a retired hub argument."""
    from diffusers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument", category=UserWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
