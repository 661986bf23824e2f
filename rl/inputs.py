"""Python objects as the named inputs of a run: rows, rewards and saved objects become what a config can name."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel

from rewards.load import name_of
from rl.tasks.records import ENDINGS, Record, records_at

Reward: TypeAlias = str | Mapping[str, Any] | Callable[..., Any]
Rows: TypeAlias = Any  # datasets.Dataset, a list of dicts, a file, or owner/name[/config][:split] on the hub


class Inputs:
    """The objects of a run that have no name, to be written to its folder `inputs`.

    Attributes:
        pending: path -> what writes it there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.pending: dict[Path, Callable[[Path], object]] = {}

    def named(self, file: str, write: Callable[[Path], object]) -> str:
        """The path that an object will have."""
        self.pending[self.folder / file] = write
        return str(self.folder / file)

    def saved(self, argument: str, found: Any, tokenizer: Any = None) -> str:
        """The folder or name of a policy or tokenizer; an object that is loaded is saved, a policy with its tokenizer.

        Raises:
            ValueError: it cannot be saved.
        """
        if isinstance(found, str | Path):
            return str(found)
        if not hasattr(found, "save_pretrained"):
            raise ValueError(f"{argument} is a {type(found).__name__}: give a folder, a hub name, or a loaded one")

        def write(folder: Path) -> None:
            if hasattr(found, "body") and hasattr(tokenizer, "save_pretrained"):
                from rl.models.load import save_policy

                save_policy(found, tokenizer, folder)
            else:
                found.save_pretrained(folder)

        return self.named(argument, write)

    def write(self) -> None:
        """
        Raises:
            ValueError: the folder is a file, or holds a run that began with other rows.
        """
        if self.folder.parent.is_file():
            raise ValueError(f"run.output_dir {self.folder.parent} is a file: name a folder")
        metrics = self.folder.parent / "metrics.jsonl"
        begun = metrics.is_file() and metrics.stat().st_size > 0
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, write in self.pending.items():
            partial = path.with_name(path.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            write(partial)
            if path.is_dir():
                shutil.rmtree(path)
            elif begun and path.is_file() and path.read_bytes() != partial.read_bytes():
                raise ValueError(
                    f"{path.stem} is not what the run in {self.folder.parent} began with: put it back, or choose "
                    "another run.output_dir"
                )
            partial.replace(path)


def rows_of(given: Rows, argument: str) -> list[Record]:
    """The rows of a dataset.

    Raises:
        ValueError: it is in none of the forms there are, has no rows, or holds something that is no JSON.
    """
    if isinstance(given, str | Path):
        if Path(given).is_dir():
            raise ValueError(f"{argument} {given} is a folder: name a file in it, or give datasets.load_from_disk(...)")
        try:
            return records_at(_source(given, argument))
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error
    if type(given).__name__ == "IterableDataset":
        raise ValueError(
            f"{argument} is an IterableDataset, which a resumed run could not find: name a file or owner/name:split"
            + (" and set options={'task.params.streaming': True}" if argument == "train_dataset" else "")
        )
    if isinstance(given, Mapping) or not isinstance(given, Iterable) or not hasattr(given, "__len__"):
        raise ValueError(
            f"{argument} is a {type(given).__name__}: give a datasets.Dataset with a length (one split), a list of "
            "dicts, a file, or owner/name:split"
        )
    rows = list(given)
    if not rows:
        raise ValueError(f"{argument} is empty: give at least one row")
    wrong = next((number for number, row in enumerate(rows, start=1) if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise ValueError(
            f"{argument} is a {type(given).__name__} whose row {wrong} is a {type(rows[wrong - 1]).__name__}: give a "
            'datasets.Dataset (Dataset.from_pandas, Dataset.from_dict), or a list of dicts {"prompt": ...}'
        )
    return [dict(row) for row in rows]


def stream_name(given: Rows, argument: str) -> str:
    """Where a stream is.

    Raises:
        ValueError: it has no name.
    """
    if not isinstance(given, str | Path):
        raise ValueError(
            f"{argument} is a {type(given).__name__}, and task.params.streaming reads what has a name: give a file or "
            "owner/name:split, or leave streaming out"
        )
    return _source(given, argument)


def _source(given: str | Path, argument: str) -> str:
    """With the split of a dataset on the hub, `train` or `test` where none is said."""
    if str(given).endswith(ENDINGS) or ":" in str(given) or Path(given).exists():
        return str(given)
    return f"{given}:{'train' if argument == 'train_dataset' else 'test'}"


def as_lines(rows: Sequence[Record], argument: str) -> str:
    """Rows as JSON lines; NaN, which is how pandas has a missing cell, is null.

    Raises:
        ValueError: naming the row and the column that holds something else than JSON, or whose name is no text.
    """
    lines = []
    for number, row in enumerate(rows, start=1):
        cells = []
        for name, value in row.items():
            if not isinstance(name, str):
                raise ValueError(f"{argument}: row {number}: the column {name!r} is no text: rename it {str(name)!r}")
            value = None if isinstance(value, float) and value != value else value
            try:
                cells.append(f"{json.dumps(name)}: {json.dumps(value, default=_plain)}")
            except (TypeError, ValueError):
                raise ValueError(
                    f"{argument}: row {number}: column {name!r} holds a {type(value).__name__}, which is no JSON: "
                    "remove the column, or turn it into text"
                ) from None
        lines.append("{" + ", ".join(cells) + "}\n")
    return "".join(lines)


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's."""
    if not hasattr(value, "tolist"):
        raise TypeError
    return value.tolist()


def several(given: Reward | Sequence[Reward]) -> list[Reward]:
    """One reward or a list of them as a list.

    Raises:
        ValueError: there is none, or it is something else.
    """
    if isinstance(given, str | Mapping) or callable(given):
        return [given]
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"reward_funcs is {given!r}: give a function or a name, or a list of them")
    return list(given)


def reward_part(given: Reward, index: int) -> dict[str, Any]:
    """An entry of `reward.functions`; those of `trl.rewards` read chats only, and are given them.

    Raises:
        ValueError: it is neither a name nor a function.
    """
    if isinstance(given, str):
        return {"name": given}
    if isinstance(given, Mapping):
        return dict(given)
    if not callable(given) or hasattr(given, "forward"):
        raise ValueError(
            f"reward_funcs[{index}] is a {type(given).__name__}: give a function or a name; a model that judges is "
            "{'name': 'reward_model', 'params': {'path': ...}}"
        )
    name = name_of(given)
    return {"name": f"trl:{name}" if name.startswith("trl.") else name}


def set_options(raw: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Set options by their names: `{"train.steps": 3}` and `{"train": {"steps": 3}}` do the same."""
    for key, given in options.items():
        value = str(given) if isinstance(given, Path) else copy.deepcopy(given)  # the caller's own stays as it is
        *parents, leaf = key.split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"option {key!r}: {parent!r} is a value, not a section")
        if isinstance(value, Mapping) and isinstance(node.get(leaf), dict) and leaf != "params":
            set_options(node[leaf], value)
        else:
            node[leaf] = dict(value) if isinstance(value, Mapping) else value


def recipe_section(recipe: Any, beside: Mapping[str, Any], wins: Mapping[str, Any]) -> Any:
    """The section `algorithm`: a recipe, its class or its name, and the options given beside it.

    Args:
        wins: dotted options that may contradict the recipe.

    Raises:
        ValueError: another option contradicts the recipe.
    """
    options = {name: value for name, value in beside.items() if name != "name"}
    if isinstance(recipe, Mapping) and "name" in recipe:
        return {**options, **recipe}
    if isinstance(recipe, str | type):
        return {"name": recipe, **options}
    if not isinstance(recipe, BaseModel):
        raise ValueError(f"recipe is a {type(recipe).__name__}: give a recipe, its class, or its name")
    said = recipe.model_dump(include=recipe.model_fields_set)
    for name, value in options.items():
        if said.get(name, value) != value and f"algorithm.{name}" not in wins:
            raise ValueError(f"recipe has {name}={said[name]!r}, and args says {value!r}: give it once")
    return {**recipe.model_dump(), **options} if options else recipe
