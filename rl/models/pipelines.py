"""Which pipelines of diffusers we can train, told from their index alone: before weights, and without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
LORA_INDEX = "lora_policy.json"
NOISE_INDEX = "initial_noise.json"
CLASS_NAME = "ClassPolicy"  # of the built-in image model, in the place of a pipeline's class

# Solvers of one kind of noise schedule (betas), which DDIM and DDPM can take the place of.
_BETAS = tuple(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"),
        *("DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
        *("DEISMultistep", "UniPCMultistep"),
    )
)
_FLOW = ("FlowMatchEulerDiscreteScheduler",)

# Class of a pipeline -> schedulers that its steps can be made from; `rl.models.diffusers_load` has the classes.
SCHEDULERS = {
    "StableDiffusionPipeline": _BETAS,
    "StableDiffusionXLPipeline": _BETAS,
    "StableDiffusion3Pipeline": _FLOW,
    "FluxPipeline": _FLOW,
    "Flux2KleinPipeline": _FLOW,
    "QwenImagePipeline": _FLOW,
    "SanaPipeline": ("DPMSolverMultistepScheduler", *_FLOW),
    "ZImagePipeline": _FLOW,
}

# Beginnings of the names of parts that a pipeline cannot be without: those with weights, and others.
_NETWORKS, _OTHERS = ("unet", "transformer", "vae", "text_encoder"), ("tokenizer", "scheduler")

# Class of a pipeline, or of the built-in model's network -> the names of `sampler.cache` that its denoiser can have.
# The others fail in diffusers, find nothing to hook, or would split a batch wrongly (`tests/test_latent_cache.py`).
CACHED: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("pab", "taylor_seer", "faster_cache"),
    "StableDiffusionXLPipeline": ("pab", "taylor_seer"),
    "StableDiffusion3Pipeline": ("mag_cache", "pab", "taylor_seer", "faster_cache"),
    "FluxPipeline": ("first_block", "mag_cache", "pab", "taylor_seer", "faster_cache"),
    "Flux2KleinPipeline": ("mag_cache", "pab", "taylor_seer"),
    "QwenImagePipeline": ("first_block", "mag_cache", "pab", "taylor_seer"),
    "SanaPipeline": ("pab", "taylor_seer", "faster_cache"),
    "ZImagePipeline": ("pab", "taylor_seer"),
    "UNet2DModel": ("pab",),
    "WordDenoiser": ("first_block", "mag_cache", "pab", "taylor_seer"),
}


def check_cache(owner: str, cache: Mapping[str, Any] | None) -> None:
    """Refuse a `sampler.cache` that a pipeline class, or a network of the built-in model, cannot have.

    Raises:
        ValueError: it cannot.
    """
    owner = {"word_denoiser": "WordDenoiser"}.get(owner, owner)
    if cache is not None and cache["name"] not in CACHED.get(owner, ()):
        known = ", ".join(CACHED.get(owner, ())) or "none"
        raise ValueError(f"sampler.cache {cache['name']} is not for a {owner}, which can have {known}")


def check_pipeline(path: str, index: Mapping[str, Any], kind: str | None = None) -> None:
    """Refuse a pipeline by the content of its model_index.json.

    Args:
        kind: `sampler.kind`, to be held against the pipeline's noise schedule; None looks at the pipeline alone.

    Raises:
        ValueError: an unknown pipeline, one with a scheduler of another kind, one whose schedule `kind` cannot take,
            or a folder that lacks a part.
    """
    name = index.get("_class_name")
    if name not in SCHEDULERS:
        raise ValueError(f"model.path {path!r} is a {name}: known pipelines are {', '.join(SCHEDULERS)}")
    known = SCHEDULERS[name]
    scheduler = (index.get("scheduler") or [None, None])[1]
    if scheduler not in known:
        raise ValueError(
            f"model.path {path!r} is a {name} with a {scheduler}, from which no steps with a density can be made: give "
            f"it one of {', '.join(known)}"
        )
    if kind not in (None, "dpm_solver") and str(kind).startswith("flow") != (known is not _BETAS):
        needed = "ddim or ddpm" if known is _BETAS else "flow_sde, flow_cps or flow_stochastic"
        raise ValueError(f"sampler.kind {kind!r} is not for a {name}: set it to {needed}")
    for part, given in index.items():
        folder, is_network = Path(path) / part, part.startswith(_NETWORKS)
        if not Path(path).is_dir() or not isinstance(given, list) or not given[-1]:
            continue  # of the hub, which the loader asks; an option; or a part that the pipeline leaves out
        if (is_network or part.startswith(_OTHERS)) and not folder.is_dir():
            raise ValueError(f"model.path {path!r} is incomplete: its folder {part} is missing")
        if is_network and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            raise ValueError(f"model.path {path!r} is incomplete: its folder {part} has no weights")


def check_folder(path: str, kind: str, cache: Mapping[str, Any] | None = None) -> None:
    """`check_pipeline` and `check_cache` of a folder: a pipeline, adapters or learned noise for one, or the built-in
    model. The loader sees to names on the hub.

    Raises:
        ValueError: see `check_pipeline`; or `path` is none of these.
    """
    folder = Path(path)
    for name in (NOISE_INDEX, LORA_INDEX):
        if (folder / name).is_file():
            return check_folder(_read_index(folder / name)["base"], kind, cache)
    # The first half of a name on the hub is no folder here.
    if not folder.is_dir() and (folder.is_file() or path.count("/") != 1 or folder.parent.is_dir()):
        raise ValueError(f"model.path {path!r} is no folder of a pipeline, and no owner/name of the hub")
    if folder.is_dir() and not (folder / INDEX).is_file():
        raise ValueError(f"model.path {path!r} is incomplete: {INDEX} is missing")
    if folder.is_dir():
        index = _read_index(folder / INDEX)
        built_in = index.get("_class_name") == CLASS_NAME
        if not built_in:
            check_pipeline(path, index, kind)
        check_cache(index["unet"][1] if built_in else index["_class_name"], cache)


def _read_index(file: Path) -> dict[str, Any]:
    try:
        index = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"model.path: {file} is not JSON: {error}") from None
    if not isinstance(index, dict):
        raise ValueError(f"model.path: {file} must hold names of parts, and holds a {type(index).__name__}")
    return index
