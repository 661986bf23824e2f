"""Names in a config -> classes: ours by a short name, anybody's by an address or a setuptools entry point.

An address is `path/to/file.py:Class` or `package.module:Class`. In Python a class may stand in place of its name.
This module imports nothing of `rl`, so that everything may import it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewards.address import entry_points, load_address, load_entry_point


@dataclass(frozen=True)
class Table:
    """The classes of one kind that a config can name.

    Attributes:
        key: the option that names one, for messages.
        group: setuptools entry points that add names.
        known: name -> address of our own.
    """

    key: str
    group: str
    known: Mapping[str, str]

    def names(self) -> list[str]:
        """All short names: ours, and those of installed distributions."""
        return [*self.known, *(name for name in entry_points(self.group) if name not in self.known)]

    def has(self, name: str) -> bool:
        """Whether `resolve` would look for a class, and not refuse a misspelt name."""
        return name in self.known or ":" in name or name in entry_points(self.group)

    def resolve(self, name: Any) -> Any:
        """The class that a name or an address stands for; what is no text is the class itself.

        Raises:
            ValueError: there is none, in one line with the nearest name.
        """
        if not isinstance(name, str):
            return name
        what = f"{self.key} {name!r}"
        if name in self.known:
            return load_address(self.known[name], what)
        if ":" in name:
            return load_address(name, what)
        plugins = entry_points(self.group)
        if name in plugins:
            return load_entry_point(plugins[name], what)
        names = self.names()
        near = difflib.get_close_matches(name, names, n=1)
        known = f"known: {', '.join(names)}, file.py:Class or package.module:Class"
        raise ValueError(f"{what} does not exist: {f'did you mean {near[0]!r}?' if near else known}")


RECIPES = Table(
    "algorithm.name",
    "denoise_rl.recipes",
    {
        "alignprop": "rl.recipes.alignprop:AlignProp",
        "awm": "rl.recipes.awm:AWM",
        "b2_diffurl": "rl.recipes.b2_diffurl:B2DiffuRL",
        "branch_grpo": "rl.recipes.branch_grpo:BranchGRPO",
        "ddpo": "rl.recipes.ddpo:DDPO",
        "diffusion_dpo": "rl.recipes.diffusion_dpo:DiffusionDPO",
        "diffusion_nft": "rl.recipes.diffusion_nft:DiffusionNFT",
        "dppo": "rl.recipes.dppo:DPPO",
        "diffusion_opd": "rl.recipes.diffusion_opd:DiffusionOPD",
        "dpok": "rl.recipes.ddpo:DPOK",
        "find": "rl.recipes.find:FIND",
        "flow_dppo": "rl.recipes.flow_dppo:FlowDPPO",
        "flow_grpo": "rl.recipes.flow_grpo:FlowGRPO",
        "dgpo": "rl.recipes.dgpo:DGPO",
        "gdpo": "rl.recipes.gdpo:GDPO",
        "graph_ddpo": "rl.recipes.gdpo:GraphDDPO",
        "grpo_guard": "rl.recipes.grpo_guard:GRPOGuard",
        "mix_grpo": "rl.recipes.mix_grpo:MixGRPO",
        "v_grpo": "rl.recipes.v_grpo:VGRPO",
        "class_tokens": "rl.recipes.class_tokens:ClassTokens",
        "ctrl": "rl.recipes.ctrl:CTRL",
        "drakes": "rl.recipes.drakes:DRAKES",
        "tracerl": "rl.recipes.tracerl:TraceRL",
        "mdpo": "rl.recipes.mdpo:MDPO",
        "bgpo": "rl.recipes.bgpo:BGPO",
        "ebpo": "rl.recipes.ebpo:EBPO",
        "egspo": "rl.recipes.egspo:EGSPO",
        "rspo": "rl.recipes.rspo:RSPO",
        "lightningrl": "rl.recipes.lightningrl:LightningRL",
        "trafl": "rl.recipes.trafl:TraFL",
        "vrpo": "rl.recipes.vrpo:VRPO",
        "opd": "rl.recipes.opd:OPD",
        "d_opsd": "rl.recipes.d_opsd:DOPSD",
        "diffu_grpo": "rl.recipes.diffu_grpo:DiffuGRPO",
        "coupled_grpo": "rl.recipes.coupled_grpo:CoupledGRPO",
        "unigrpo": "rl.recipes.unigrpo:UniGRPO",
        "wd1": "rl.recipes.wd1:WD1",
        "spg": "rl.recipes.spg:SPG",
        "espo": "rl.recipes.espo:ESPO",
        "gdsd": "rl.recipes.gdsd:GDSD",
        "d2_stepmerge": "rl.recipes.d2_stepmerge:D2StepMerge",
        "rediff": "rl.recipes.rediff:ReDiff",
        "cj_grpo": "rl.recipes.cj_grpo:CJGRPO",
        "justgrpo": "rl.recipes.justgrpo:JustGRPO",
        "udm_grpo": "rl.recipes.udm_grpo:UDMGRPO",
        "dflow_grpo": "rl.recipes.dflow_grpo:DFlowGRPO",
    },
)

TASKS = Table(
    "task.name",
    "denoise_rl.tasks",
    {
        "sudoku": "rl.tasks.sudoku:SudokuTask",
        "countdown": "rl.tasks.countdown:CountdownTask",
        "antibody": "rl.tasks.antibody:AntibodyTask",
        "dna": "rl.tasks.dna:DnaTask",
        "prompts": "rl.tasks.prompts:PromptsTask",
        "jsonl": "rl.tasks.jsonl:JsonlTask",
        "control": "rl.tasks.control:ControlTask",
        "cells": "rl.tasks.cells:CellsTask",
        "molecules": "rl.tasks.molecules:MoleculesTask",
        "digits": "rl.tasks.digits:DigitsTask",
        "words": "rl.tasks.words:WordsTask",
        "words_image": "rl.tasks.words_image:WordsImageTask",
        "extract": "rl.tasks.extract:ExtractTask",
        "needle": "rl.tasks.needle:NeedleTask",
        "read_number": "rl.tasks.read_number:ReadNumberTask",
        "sums": "rl.tasks.templated:SumsTask",
        "stories": "rl.tasks.templated:StoriesTask",
        "instructions": "rl.tasks.templated:InstructionsTask",
        "one_liners": "rl.tasks.templated:OneLinerTask",
    },
)

MODALITIES = Table(
    "the task's modality",
    "denoise_rl.modalities",
    {
        "text": "rl.modalities.text_plan:TextPlan",
        "images": "rl.modalities.images_plan:ImagesPlan",
        "actions": "rl.modalities.actions_plan:ActionsPlan",
        "graphs": "rl.modalities.graphs_plan:GraphsPlan",
    },
)

FAMILIES = Table(
    "model.family",
    "denoise_rl.families",
    {
        "llada": "rl.models.families.llada:Llada",
        "dream": "rl.models.families.dream:Dream",
        "sdar": "rl.models.families.sdar:Sdar",
        "llada_moe": "rl.models.families.llada_moe:LladaMoe",
        "llada2": "rl.models.families.llada2:Llada2",
        "sdar_moe": "rl.models.families.sdar:SdarMoe",
        "diffusion_gemma": "rl.models.families.diffusion_gemma:DiffusionGemma",
        "llama": "rl.models.families.causal:Llama",
        "qwen2": "rl.models.families.causal:Qwen2",
        "qwen3": "rl.models.families.causal:Qwen3",
        "mistral": "rl.models.families.causal:Mistral",
        "gemma": "rl.models.families.causal:Gemma",
        "llava": "rl.models.families.llava:Llava",
        "llava_hub": "rl.models.families.llava:LlavaHub",
        "gpt_neox": "rl.models.families.causal:GPTNeoX",
    },
)

SEARCHES = Table(
    "search",
    "denoise_rl.searches",
    {
        "best_of_n": "rollouts.search.best_of_n:BestOfN",
        "svdd": "rollouts.search.svdd:Svdd",
        "smc": "rollouts.search.smc:Smc",
        "tds": "rollouts.search.smc:Tds",
        "guidance": "rollouts.search.guidance:Guidance",
        "dts": "rollouts.search.tree:Dts",
        "dts_star": "rollouts.search.tree:DtsStar",
        # Random search over noises is best-of-N under another name.
        "noise_random": "rollouts.search.best_of_n:BestOfN",
        "noise_zero_order": "rollouts.search.noise_search:ZeroOrder",
        "noise_paths": "rollouts.search.noise_search:Paths",
        "noise_gradient": "rollouts.search.noise_search:Gradient",
        "failures": "rollouts.search.noise_search:Failures",
    },
)

DEFAULT = "tracerl"


def recipe_class(raw: Mapping[str, Any]) -> Any:
    """The class of the recipe that an `algorithm` section names.

    Raises:
        ValueError: no such recipe.
    """
    return RECIPES.resolve(raw.get("name", DEFAULT))


def parse_recipe(raw: Mapping[str, Any]) -> Any:
    """The recipe of an `algorithm` section: `name` (a name of `RECIPES`, an address, or a class) and its options.

    Raises:
        ValueError: no such recipe, or an option that it does not have or that is out of range.
    """
    name = raw.get("name", DEFAULT)
    # A class knows its own name.
    options = {**raw, "name": name} if isinstance(name, str) else {key: raw[key] for key in raw if key != "name"}
    found = recipe_class(raw)
    if not hasattr(found, "model_validate"):
        raise ValueError(
            f"algorithm.name {name!r} is a {type(found).__name__}: derive a class from rl.recipes.base.Recipe"
        )
    try:
        return found.model_validate(options)
    except TypeError as error:
        if "__init__()" not in str(error):
            raise
        raise ValueError(f"algorithm.name {name!r}: {error}: options of a recipe are fields of its class") from error
