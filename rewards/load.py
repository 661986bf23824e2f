"""Find a reward by name. A reward is always named by a string, so that a worker process can load it itself.

Accepted names:

    sudoku                          shipped with this package (`NAMES`)
    my_plugin                       entry point in the group `denoise_rl.rewards` of an installed distribution
    package.module:function         any importable module (the working folder counts)
    path/to/file.py:function        any file
    trl:accuracy_reward             any function of `trl.rewards`; trl:path/to/file.py:function gives one of yours chats
    verl:path/to/file.py:function   a verl `compute_score`
    verifiers:module:NAME           a reward function, rubric, environment or `load_environment` of verifiers
    reasoning_gym:countdown         the verifier of a reasoning-gym task

One rule for parameters: **a class, or a name that ends in `()`, is called once with the parameters and the result
is the reward; a function gets them as keyword arguments of every call.**
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Mapping
from typing import Any

from rewards.adapters import OneByOne, TrlReward, VerifiersReward, VerlReward
from rewards.address import entry_points, load_address, load_entry_point
from rewards.score import RewardFunction
from rewards.signature import check_params, check_takes_columns, nearest, reward_name
from rewards.weights import hub_names

ENTRY_POINT_GROUP = "denoise_rl.rewards"

NAMES = {
    "aesthetic": "rewards.aesthetic:Aesthetic",
    "chunk_judge": "rewards.chunk_judge:ChunkJudge",
    "clip_match": "rewards.clip_score:ClipMatch",
    "clip_score": "rewards.clip_score:ClipScore",
    "code_tests": "rewards.code_tests:CodeTests",
    "countdown": "rewards.countdown:countdown",
    "digit_classifier": "rewards.digits:DigitClassifier",
    "digit_judge": "rewards.digits:DigitJudge",
    "fluency": "rewards.fluency:Fluency",
    "format": "rewards.format_tags:FormatReward",
    "hpsv2": "rewards.preference_models:Hpsv2",
    "image_classifier": "rewards.image_classifier:ImageClassifier",
    "image_reward": "rewards.preference_models:ImageReward",
    "json_fields": "rewards.json_fields:json_fields",
    "jpeg_compressibility": "rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "rewards.jpeg:jpeg_incompressibility",
    "hydropathy": "rewards.protein:Hydropathy",
    "level_logprob": "rewards.levels:LevelLogprob",
    "level_reached": "rewards.levels:LevelReached",
    "instructions": "rewards.instructions:instructions",
    "keyword_fluency": "rewards.keywords:KeywordFluency",
    "keyword_sentence": "rewards.keywords:KeywordSentence",
    "length": "rewards.length:length",
    "llm_judge": "rewards.llm_judge:LlmJudge",
    "math_answer": "rewards.math_answer:MathAnswer",
    "mmd": "rewards.mmd:MMD",
    "motif_activity": "rewards.motifs:MotifActivity",
    "net_charge": "rewards.protein:NetCharge",
    "ocr": "rewards.ocr:Ocr",
    "overlong": "rewards.length:overlong",
    "pickscore": "rewards.clip_score:PickScore",
    "pseudo_likelihood": "rewards.pseudo_likelihood:PseudoLikelihood",
    "qed": "rewards.molecules:Qed",
    "rdkit_valid": "rewards.molecules:RdkitValid",
    "reasoning_gym": "rewards.gym_task:ReasoningGymReward",
    "residue_content": "rewards.protein:ResidueContent",
    "reward_model": "rewards.reward_model:RewardModel",
    "sequence_oracle": "rewards.sequence_oracle:SequenceOracle",
    "similarity": "rewards.similarity:Similarity",
    "sudoku": "rewards.sudoku:sudoku",
    "tf_binding": "rewards.tf_binding:TfBinding",
    "tokens_per_forward": "rewards.length:tokens_per_forward",
    "vlm_judge": "rewards.vlm_judge:VlmJudge",
}


# Functions of this process that have no address (`name_of`), by `python:NAME`.
_LOCAL: dict[str, Any] = {}

ADAPTERS: dict[str, type[OneByOne]] = {"verl": VerlReward, "verifiers": VerifiersReward}


class BoundReward:
    """A reward function with its parameters; picklable, and named like the function."""

    def __init__(self, function: RewardFunction, params: Mapping[str, Any]) -> None:
        self.function = function
        self.params = dict(params)
        self.__name__ = reward_name(function)

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> Any:
        # functools.partial would let a dataset column silently override a parameter of the config.
        clash = sorted(self.params.keys() & columns.keys())
        if clash:
            raise ValueError(f"`{clash[0]}` is both a dataset column and a parameter of {self.__name__}; rename one")
        return self.function(prompts=prompts, completions=completions, **self.params, **columns)


def load_reward(spec: str, params: Mapping[str, Any] | None = None) -> RewardFunction:
    """The reward named `spec` with its parameters bound.

    Args:
        spec: a name of one of the forms listed at the top of this module.
        params: parameters from the config.

    Raises:
        ValueError: one line naming what is wrong: unknown name (with the nearest one), file or attribute not
            found, unknown parameter (with the nearest one), a reward that does not take `**columns`.
    """
    params = dict(params or {})
    target, is_factory = (spec[:-2], True) if spec.endswith("()") else (spec, False)
    kind, _, rest = target.partition(":")
    if kind == "reasoning_gym" and rest:
        target, params = kind, {"task": rest, **params}
    elif kind in ADAPTERS or (kind == "trl" and ":" in rest):
        target = rest
    elif kind == "trl":
        target = f"trl.rewards:{rest}"

    found = _find(target)
    if is_factory or inspect.isclass(found) or (kind == "verifiers" and target.endswith(":load_environment")):
        check_params(spec, found, params, called_once=True)
        found = found(**params)
        params = {}
    if kind in ADAPTERS:
        check_params(spec, found, params, called_once=False, takes_any=True)
        return ADAPTERS[kind](found, params)
    if not callable(found):
        raise ValueError(f"reward '{spec}' is a {type(found).__name__}, not something that can be called")
    check_params(spec, found, params, called_once=False)
    check_takes_columns(spec, found)
    reward = BoundReward(found, params) if params else found
    return TrlReward(reward) if kind == "trl" else reward


def downloads(spec: str, params: Mapping[str, Any]) -> list[str]:
    """Hub names of a shipped reward with these parameters, and checkpoints that its package fetches."""
    return hub_names(load_address(NAMES[spec], spec), params) if spec in NAMES else []


def name_of(function: Any) -> str:
    """A name by which `load_reward` finds a function, class or object: its address, or `python:NAME` without one.

    What has no address is found in this process alone: a lambda, a function of a notebook or script.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module != "__main__" and getattr(sys.modules.get(module or ""), name, None) is function:
        return f"{module}:{name}"
    plain = reward_name(function).strip("<>")
    for count in itertools.count(1):
        name = plain if count == 1 else f"{plain}_{count}"
        if _LOCAL.setdefault(name, function) is function:
            break
    return f"python:{name}"


def known_names() -> list[str]:
    """All short names: shipped rewards and entry points of installed distributions."""
    return sorted({*NAMES, *entry_points(ENTRY_POINT_GROUP)})


def _find(spec: str) -> Any:
    what = f"reward '{spec}'"
    if spec in NAMES:
        return load_address(NAMES[spec], what)
    plugins = entry_points(ENTRY_POINT_GROUP)
    if spec in plugins:
        return load_entry_point(plugins[spec], what)
    if spec.startswith("python:"):
        if spec[7:] not in _LOCAL:
            raise ValueError(f"{what} was a Python object of another process: name it as file.py:{spec[7:]}")
        return _LOCAL[spec[7:]]
    if ":" not in spec:
        near = nearest(spec, known_names())
        raise ValueError(f"unknown reward '{spec}'; did you mean '{near}'? (or name it as module:function)")
    return load_address(spec, what)
