"""A config: a YAML file, a short diff on the defaults of `rl.sections`, plus dotted overrides (`train.steps=10`).

An unknown key is an error that names the nearest valid one. Importing this module needs no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from rl.errors import reason_of
from rl.files import read_text, write_whole
from rl.model_section import ModelConfig
from rl.registry import parse_recipe, recipe_class
from rl.sections import (
    AlignConfig,
    CheckpointConfig,
    EvalConfig,
    FilterConfig,
    GoalConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    Section,
    TaskConfig,
    TrainConfig,
)
from rl.shipped import find_config
from rl.stage_sections import ConvertConfig, SftConfig
from rl.tasks.load import modality_of
from rollouts.samplers.latent_options import LatentSamplerOptions
from rollouts.samplers.options import preset_parts


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    sampler: Any = Field({}, description="Options of the sampler (see the task's modality).")
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    convert: ConvertConfig = ConvertConfig()
    sft: SftConfig = SftConfig()
    train: TrainConfig = TrainConfig()
    filters: FilterConfig = FilterConfig()
    # The recipe itself; which class it is stands in the section's `name` (`rl.registry`).
    algorithm: Any = Field({}, description="Recipe name and its options (see rl/recipes).")
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    align: AlignConfig = AlignConfig()
    goal: GoalConfig | None = Field(None, description="What the run sets out to show; the report says if it did.")

    def __reduce__(self) -> Any:
        """Another process finds the classes of sampler and recipe by name, wherever their files lie."""
        return Config.model_validate, (self.model_dump(),)

    def staleness_limit(self) -> int:
        """Optimizer updates by which the weights that sampled may lie behind the learner's."""
        if self.rollout.max_staleness is not None:
            return self.rollout.max_staleness
        return self.train.updates_per_step * self.train.epochs if self.rollout.asynchronous else 0

    def of_baseline(self) -> Config:
        """The config of `eval.baseline` in the place of the model: same task, rewards and lengths."""
        # The end token and the tokenizer are the baseline's own.
        dtype = self.model.autoregressive_dtype
        model = ModelConfig(path=self.eval.baseline, autoregressive=True, autoregressive_dtype=dtype)
        evaluation = self.eval.model_copy(update={"baseline": None, "backslide": False})
        return self.model_copy(update={"model": model, "eval": evaluation})

    def evaluation_steps(self) -> list[int]:
        """Step counts to evaluate at: of an autoregressive model one, a step for every token."""
        return [self.sampler.gen_length] if self.model.autoregressive else self.eval.num_inference_steps

    def main_metric(self, measure: str) -> str:
        """The evaluation that stands for a run: at the sampler's step count where it is evaluated, else at the first.

        Example: `accuracy@4`.

        Args:
            measure: as summary.json has it, `accuracy` or `mean NAME`.
        """
        counts, own = self.evaluation_steps(), getattr(self.sampler, "num_inference_steps", None)
        return f"{measure.removeprefix('mean ')}@{own if own in counts else counts[0]}"

    @model_validator(mode="after")
    def _autoregressive_fits(self) -> Config:
        if (self.model.autoregressive or self.eval.baseline) and modality_of(self.task.name).name != "text":
            name = "model.autoregressive" if self.model.autoregressive else "eval.baseline"
            raise ValueError(f"{name} is for text, and task.name {self.task.name!r} is not: leave it out")
        if self.model.autoregressive and self.eval.backslide:
            raise ValueError(
                "eval.backslide needs x0 predictions, which model.autoregressive has none of: set it to false"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_sampler(cls, raw: Any) -> Any:
        return _without_image_sampler(raw) if isinstance(raw, dict) and "image_sampler" in raw else raw

    @field_validator("sampler", mode="before")
    @classmethod
    def _of_the_modality(cls, value: Any, info: ValidationInfo) -> Any:
        # Without a valid task there is another error already.
        return modality_of(info.data["task"].name).Options.model_validate(value) if "task" in info.data else value

    @field_validator("algorithm")
    @classmethod
    def _recipe(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return parse_recipe(value)
        if not isinstance(value, BaseModel):
            raise ValueError(f"algorithm is {value!r}: it holds options, set the recipe's name in algorithm.name")
        return value

    @model_validator(mode="after")
    def _patient_enough(self) -> Config:
        if self.reward.outage_seconds >= self.run.collective_timeout_seconds:
            raise ValueError(
                f"reward.outage_seconds ({self.reward.outage_seconds:g}) must be below run.collective_timeout_seconds "
                f"({self.run.collective_timeout_seconds:g}): other ranks wait no longer"
            )
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text, and of a key that is there twice the last one: everybody who types it means a
    number, and nobody means the second section alone."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice: remove one", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _value(text: str) -> Any:
    """A value on the command line: YAML, or else the text itself."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file, then the overrides.

    Args:
        path: YAML file, the name of a shipped config (`quickstart`), or None.
        overrides: `a.b=c`; values are parsed as YAML.

    Raises:
        ValueError: one line naming the key and the fix.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        path = find_config(path)
        text = read_text(path, "config file")
        try:
            raw = yaml.load(text, _Loader) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"config file {path} must hold a mapping of sections")
    # A preset given here replaces the parts the file chose; what is given beside it wins, in whatever order.
    for override in sorted(overrides, key=lambda text: not text.startswith("sampler.preset=")):
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r} must have the form section.key=value")
        node = raw
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {override!r}: {parent!r} is a value, not a section")
        node[leaf] = _value(value)
        if key == "sampler.preset" and node[leaf] is not None:
            node.update(preset_parts(str(node[leaf])))
    return validate(_at_home(raw))


def _at_home(value: Any) -> Any:
    """Paths that begin with `~/`, wherever a value is one, in the user's home: no shell has replaced it in a file."""
    if isinstance(value, dict):
        return {key: _at_home(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_at_home(part) for part in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def _without_image_sampler(raw: dict[str, Any]) -> dict[str, Any]:
    """A config from the time when the sampler of images had a section of its own: it becomes `sampler`.

    Raises:
        ValueError: both sections are given, or the section of images for another modality.
    """
    rest = {key: value for key, value in raw.items() if key != "image_sampler"}
    old, new, modality = raw["image_sampler"] or {}, raw.get("sampler") or {}, _modality(raw).name
    # The config that a run saved had both sections whole; the one of the other modality was never read.
    if modality == "images" and (not new or "gen_length" in new):
        return {**rest, "sampler": old}
    plain = LatentSamplerOptions().model_dump()
    if modality != "images" and {**plain, **old} == plain:
        return rest
    raise ValueError(f"image_sampler is now called sampler, here that of {modality}: move the options there")


def _modality(raw: dict[str, Any]) -> Any:
    return modality_of((raw.get("task") or {}).get("name", TaskConfig().name))


def validate(raw: dict[str, Any]) -> Config:
    """The config of some sections.

    Raises:
        ValueError: one line naming the key and the fix.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        path = [part for part in first["loc"] if not isinstance(part, int)]
        key = ".".join(str(part) for part in path)
        if first["type"] == "extra_forbidden":
            names = _section_keys(path[:-1], raw)
            near = difflib.get_close_matches(str(path[-1]), names, n=1)
            where = ".".join(str(part) for part in path[:-1]) or "the top level"
            where += f" for {_modality(raw).name}" if where == "sampler" else ""
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
            raise ValueError(f"unknown config key {key!r}: {hint} (keys of {where})") from None
        if first["type"] == "missing":
            raise ValueError(f"config key {key!r} is required: {_description(path, raw)}") from None
        if first["type"] in ("model_type", "model_attributes_type") and path:
            names = _section_keys(path, raw)
            one = f"{key}.{names[0]}" if names else key
            raise ValueError(f"config key {key!r} is a section, not a value: set a key of it, such as {one}") from None
        message = reason_of(first)
        if key and key not in message:
            message = f"config key {key!r}: {message}, got {first['input']!r}"
        raise ValueError(message) from None


def _section(path: Sequence[Any], raw: dict[str, Any]) -> type[BaseModel] | None:
    """The class that holds the keys under `path`; recipe and task decide for `algorithm` and `sampler`."""
    section: Any = Config
    if path and path[0] == "algorithm":
        section, path = recipe_class(raw["algorithm"]), path[1:]
    elif path and path[0] == "sampler":
        section, path = _modality(raw).Options, path[1:]
    for part in path:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next((a for a in options if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if section is None:
            return None
    return section


def _section_keys(path: Sequence[Any], raw: dict[str, Any]) -> list[str]:
    section = _section(path, raw)
    return list(section.model_fields) if section else []


def _description(path: Sequence[Any], raw: dict[str, Any]) -> str:
    section = _section(path[:-1], raw)
    field = section.model_fields.get(path[-1]) if section else None
    return (field.description or "") if field else ""


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config, every key included, as YAML."""
    write_whole(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def option_help(config: Config) -> list[tuple[str, str, str]]:
    """(key, default, sentence) of every option, those of the config's recipe and modality among them.

    The sentence ends with the allowed values, where an option is a choice.
    """
    lines: list[tuple[str, str, str]] = []
    chosen = {"sampler": type(config.sampler), "algorithm": type(config.algorithm)}

    def visit(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            nested = field.annotation if prefix else chosen.get(name, field.annotation)
            if isinstance(nested, type) and issubclass(nested, BaseModel):
                visit(nested, f"{prefix}{name}.")
            else:
                default = "required" if field.is_required() else repr(field.get_default())
                if prefix + name == "algorithm.name":  # a class in a file has no name of its own to be shown
                    default = repr(config.algorithm.name)
                choices = ", ".join(str(value) for value in option_choices(field.annotation))
                text = (field.description or "") + (f" [{choices}]" if choices else "")
                lines.append((prefix + name, default, text))

    visit(Config, "")
    return lines


def option_choices(annotation: Any) -> list[Any]:
    """The values of the Literals in a type: of `list[Literal["a", "b"]] | None`, a and b."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in option_choices(part)]
