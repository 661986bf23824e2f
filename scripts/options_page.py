"""Write docs/options.md, the reference of every option, from the classes that hold them: `make options`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rl.config import Config, option_choices
from rl.recipes.base import AnyRecipe, Recipe
from rl.registry import MODALITIES, RECIPES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"
HEAD = """# Every option

Written by `make options` from the classes that read a config; a test compares. An option is set in the YAML file
(`train: {steps: 10}`) or behind it (`train.steps=10`). `denoise-rl train --config FILE --options` lists those of one
config. `algorithm.name` is the name of a recipe, `tracerl` when not given; `task.name` decides what `sampler` has.
"""
NAMES = {int: "integer", float: "number", str: "text", bool: "true, false", Any: "anything", type(None): "null"}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def options_page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for name, field in Config.model_fields.items():
        if name == "sampler":
            for modality in MODALITIES.known:
                parts.append(_table(f"sampler, for {modality}", name, MODALITIES.resolve(modality).Options))
        elif name == "algorithm":
            parts += _recipes()
        else:
            parts.append(_table(name, name, _sections(field.annotation)[0]))
    return "\n".join(parts)


def _recipes() -> list[str]:
    """The options that every policy gradient has, then of each recipe those that it adds or gives another default."""
    keys = [key for key in Recipe.model_fields if key != "name"]
    parts = [_table("algorithm, in every policy gradient", "algorithm", Recipe, keys)]
    for name in RECIPES.known:
        recipe = RECIPES.resolve(name)
        base = Recipe if issubclass(recipe, Recipe) else AnyRecipe
        own = [key for key in recipe.model_fields if _rows("", recipe, [key]) != _rows("", base, [key])]
        parts.append(_table(f"algorithm, {name}", "algorithm", recipe, [key for key in own if key != "name"]))
    return parts


def _table(title: str, prefix: str, section: type[BaseModel], keys: list[str] | None = None) -> str:
    rows = _rows(prefix, section, keys)
    head = ["| option | default | allowed | meaning |", "|---|---|---|---|"] if rows else ["No options of its own."]
    return "\n".join([f"## {title}", "", *head, *rows, ""])


def _rows(prefix: str, section: type[BaseModel], keys: list[str] | None = None) -> list[str]:
    rows: list[str] = []
    for name, field in section.model_fields.items():
        if keys is not None and name not in keys:
            continue
        inner, entries = _sections(field.annotation), get_origin(field.annotation) in (list, dict)
        if not inner or entries:
            rows.append(_row(f"{prefix}.{name}", field))
        for part in inner:
            rows += _rows(f"{prefix}.{name}" + ("[]" if entries else ""), part)
    return rows


def _row(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_yaml(field.get_default())}`"
    bounds = [f"{sign} {getattr(m, key):g}" for m in field.metadata for key, sign in SIGNS.items() if hasattr(m, key)]
    choices = ", ".join(_yaml(value) for value in option_choices(field.annotation))
    several = "any of " if get_origin(field.annotation) is list else ""
    allowed = several + choices if choices else ", ".join([_type(field.annotation), *bounds])
    return f"| `{key}` | {default} | {allowed} | {(field.description or '').replace('|', chr(92) + '|')} |"


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The classes of options inside a type: of `list[RewardPart]`, RewardPart."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _sections(part)]


def _type(annotation: Any) -> str:
    parts = get_args(annotation)
    if annotation in NAMES:
        return NAMES[annotation]
    if _sections(annotation) == [annotation]:
        return "mapping"
    if get_origin(annotation) is dict:
        return "mapping"
    if get_origin(annotation) in (list, tuple):
        return f"list of {_type(parts[0])}"
    return " or ".join(_type(part) for part in parts) or annotation.__name__


def _yaml(value: Any) -> str:
    if value is PydanticUndefined or isinstance(value, str):
        return str(value) if value else "''"
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).split("\n")[0]


if __name__ == "__main__":
    PAGE.write_text(options_page(), "utf-8")
