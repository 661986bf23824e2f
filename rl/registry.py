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
    "alignprop": "rl.recipes.alignprop:AlignPropOptions",
    "b2_diffurl": "rl.recipes.b2_diffurl:B2DiffuRLOptions",
    "branch_grpo": "rl.recipes.branch_grpo:BranchGrpoOptions",
    "ddpo": "rl.recipes.ddpo:DdpoOptions",
    "diffusion_nft": "rl.recipes.diffusion_nft:DiffusionNftOptions",
    "dpok": "rl.recipes.ddpo:DpokOptions",
    "find": "rl.recipes.find:FindOptions",
    "flow_grpo": "rl.recipes.flow_grpo:FlowGrpoOptions",
    "ctrl": "rl.recipes.ctrl:CtrlOptions",
    "drakes": "rl.recipes.drakes:DrakesOptions",
    "tracerl": "rl.recipes.tracerl:TraceRLOptions",
    "mdpo": "rl.recipes.mdpo:MDPOOptions",
    "diffu_grpo": "rl.recipes.diffu_grpo:DiffuGRPOOptions",
    "coupled_grpo": "rl.recipes.coupled_grpo:CoupledGRPOOptions",
    "unigrpo": "rl.recipes.unigrpo:UniGRPOOptions",
    "wd1": "rl.recipes.wd1:WD1Options",
    "spg": "rl.recipes.spg:SPGOptions",
    "espo": "rl.recipes.espo:ESPOOptions",
    "gdsd": "rl.recipes.gdsd:GDSDOptions",
    "d2_stepmerge": "rl.recipes.d2_stepmerge:D2StepMergeOptions",
    "cj_grpo": "rl.recipes.cj_grpo:CJGRPOOptions",
    "justgrpo": "rl.recipes.justgrpo:JustGRPOOptions",
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
