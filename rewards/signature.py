"""The arguments that a function names: to report mistakes, and to call the functions of other frameworks."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

RESERVED = {"prompts", "completions", "self", "args", "kwargs"}
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name a user most likely meant: one that contains `name`, else the most similar; None without names."""
    known = sorted(names)
    inside = [other for other in known if name and name in other]
    return inside[0] if inside else next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.0)), None)


def reward_name(function: Any) -> str:
    """Name for logs: the function's own, or the class name of a callable object."""
    return getattr(function, "__name__", type(function).__name__)


def parameters(function: Any) -> list[inspect.Parameter]:
    """The parameters of a callable; of a builtin without signature, `**columns` alone."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


def check_params(
    spec: str, function: Any, params: Mapping[str, Any], called_once: bool, takes_any: bool = False
) -> None:
    """Refuse parameters that `function` does not have.

    Args:
        spec: name of the reward, for the message.
        function: what the parameters go to.
        params: the parameters.
        called_once: True for a class or factory, whose `**kwargs` take whatever the config says; in a function
            `**columns` is for the dataset.
        takes_any: True where `**kwargs` of a function take parameters too, as in verl.

    Raises:
        ValueError: naming the parameter and the nearest one there is.
    """
    found = parameters(function)
    valid = [parameter.name for parameter in found if parameter.kind in NAMED and parameter.name not in RESERVED]
    takes_any |= called_once
    takes_any &= any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found)
    for name in params:
        if takes_any or name in valid:
            continue
        near = nearest(name, valid)
        hint = f"; did you mean '{near}'?" if near else "; it takes none"
        raise ValueError(f"reward '{spec}' has no parameter '{name}'{hint}")
    if called_once:
        missing = [p.name for p in found if p.kind in NAMED and p.default is p.empty and p.name not in params]
        if missing:
            raise ValueError(f"reward '{spec}' needs the parameter '{missing[0]}'")


def accepted(function: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that a function names, or all of them when it takes `**kwargs`."""
    found = parameters(function)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found):
        return dict(arguments)
    names = {parameter.name for parameter in found if parameter.kind in NAMED}
    return {name: value for name, value in arguments.items() if name in names}


def check_takes_columns(spec: str, function: Any) -> None:
    """Refuse a reward without `**columns`: it would break on the first dataset with another column.

    Raises:
        ValueError: naming the reward and the fix.
    """
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters(function)):
        raise ValueError(f"reward '{spec}' must accept every dataset column: add **columns to its arguments")


def missing_columns(function: Any, given: Mapping[str, Any]) -> list[str]:
    """Required arguments of a reward that are neither among the columns `given` nor bound as parameters."""
    bound: set[str] = set(given) | RESERVED
    while hasattr(function, "function"):  # BoundReward, TrlReward, AsTrlReward
        bound |= set(getattr(function, "params", {}))
        function = function.function
    found = parameters(function)
    return [p.name for p in found if p.kind in NAMED and p.default is p.empty and p.name not in bound]
