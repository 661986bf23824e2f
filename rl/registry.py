"""Names in a config -> classes: our own by their short name, anybody's as `pkg.module:Class`. Imports nothing else."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any


def resolve(key: str, name: str, known: Mapping[str, str]) -> Any:
    """The class that `name` stands for.

    Args:
        key: where the name stands, `algorithm.name`, for messages.

    Raises:
        ValueError: there is none.
    """
    module, colon, attribute = known.get(name, name).partition(":")
    if not colon:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}, or pkg.module:Class"
        raise ValueError(f"{key} {name!r} does not exist: {hint}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key} {name!r} cannot be imported: {error}") from error


RECIPES = {
    "alignprop": "rl.algorithms.alignprop:AlignPropOptions",
    "b2_diffurl": "rl.algorithms.b2_diffurl:B2DiffuRLOptions",
    "branch_grpo": "rl.algorithms.branch_grpo:BranchGrpoOptions",
    "ddpo": "rl.algorithms.ddpo:DdpoOptions",
    "diffusion_nft": "rl.algorithms.diffusion_nft:DiffusionNftOptions",
    "dpok": "rl.algorithms.ddpo:DpokOptions",
    "find": "rl.algorithms.find:FindOptions",
    "flow_grpo": "rl.algorithms.flow_grpo:FlowGrpoOptions",
    "ctrl": "rl.algorithms.ctrl:CtrlOptions",
    "drakes": "rl.algorithms.drakes:DrakesOptions",
    "tracerl": "rl.algorithms.tracerl:TraceRLOptions",
    "mdpo": "rl.algorithms.mdpo:MDPOOptions",
    "diffu_grpo": "rl.algorithms.diffu_grpo:DiffuGRPOOptions",
    "coupled_grpo": "rl.algorithms.coupled_grpo:CoupledGRPOOptions",
    "unigrpo": "rl.algorithms.unigrpo:UniGRPOOptions",
    "wd1": "rl.algorithms.wd1:WD1Options",
    "spg": "rl.algorithms.spg:SPGOptions",
    "espo": "rl.algorithms.espo:ESPOOptions",
    "gdsd": "rl.algorithms.gdsd:GDSDOptions",
    "d2_stepmerge": "rl.algorithms.d2_stepmerge:D2StepMergeOptions",
    "cj_grpo": "rl.algorithms.cj_grpo:CJGRPOOptions",
    "justgrpo": "rl.algorithms.justgrpo:JustGRPOOptions",
}

DEFAULT = "tracerl"


def options_class(raw: Mapping[str, Any]) -> Any:
    """The options of the recipe that an `algorithm` section names.

    Raises:
        ValueError: no such recipe.
    """
    return resolve("algorithm.name", raw.get("name", DEFAULT), RECIPES)


def parse_options(raw: Mapping[str, Any]) -> Any:
    """Validate an `algorithm` section: `name` (a key of `RECIPES`, or pkg.module:OptionsClass) and its options.

    Raises:
        ValueError: no such recipe, or an option that it does not have or that is out of range.
    """
    return options_class(raw).model_validate({**raw, "name": raw.get("name", DEFAULT)})
