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

# Class of a pipeline -> schedulers that its steps can be made from; `rl.models.diffusers_families` has the classes.
SCHEDULERS = {
    "StableDiffusionPipeline": _BETAS,
    "StableDiffusionXLPipeline": _BETAS,
    "StableDiffusion3Pipeline": _FLOW,
    "FluxPipeline": _FLOW,
    "SanaPipeline": ("DPMSolverMultistepScheduler", *_FLOW),
    "ZImagePipeline": _FLOW,
}


def check_pipeline(path: str, index: Mapping[str, Any], kind: str | None = None) -> None:
    """Refuse a pipeline by the content of its model_index.json.

    Args:
        kind: `sampler.kind`, to be held against the pipeline's noise schedule; None looks at the pipeline alone.

    Raises:
        ValueError: an unknown pipeline, one with a scheduler of another kind, or one whose schedule `kind` cannot take.
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


def check_folder(path: str, kind: str) -> None:
    """`check_pipeline` of a pipeline's folder, or of adapters or learned noise for one; the loader sees to other names.

    Raises:
        ValueError: see `check_pipeline`.
    """
    folder = Path(path)
    for name in (NOISE_INDEX, LORA_INDEX):
        if (folder / name).is_file():
            return check_folder(json.loads((folder / name).read_text())["base"], kind)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        if index.get("_class_name") != CLASS_NAME:
            check_pipeline(path, index, kind)
