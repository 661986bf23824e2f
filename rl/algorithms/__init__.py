"""Recipes. A recipe file says which paper it is, which choices it makes, and what it departs from.

A recipe is a class of options with a `build()` that picks an estimator, an advantage and a loss; the
table below is the only registry. Importing this package needs no torch.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from rl.algorithms.options import AnyRecipeOptions

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


def options_class(raw: dict[str, Any]) -> type[AnyRecipeOptions]:
    """The options of the recipe that an `algorithm` section names.

    Raises:
        ValueError: no such recipe.
    """
    name = raw.get("name", DEFAULT)
    target = RECIPES.get(name, name)
    if ":" not in target:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known recipes: {', '.join(RECIPES)}"
        raise ValueError(f"algorithm.name {name!r} does not exist: {hint}")
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def parse_options(raw: dict[str, Any]) -> AnyRecipeOptions:
    """Validate an `algorithm` section: `name` (a key of `RECIPES`, or pkg.module:OptionsClass) and its options.

    Raises:
        ValueError: no such recipe, or an option that it does not have or that is out of range.
    """
    return options_class(raw).model_validate({**raw, "name": raw.get("name", DEFAULT)})
