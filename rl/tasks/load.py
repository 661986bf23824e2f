"""Tasks by name: ours, a benchmark, a reasoning-gym task, or anybody's class by its address or entry point."""

from __future__ import annotations

import difflib
import inspect
from typing import Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from rl.registry import MODALITIES, TASKS
from rl.tasks.base import Task
from rl.tasks.benchmarks import BENCHMARKS, BenchmarkTask
from rl.tasks.gym import GymTask, gym_tasks

_GYM = "reasoning_gym:"


def load_task(name: str, params: dict[str, Any]) -> Task:
    """Build the task that `task.name` and `task.params` describe.

    Args:
        name: a name of `rl.registry.TASKS` or `BENCHMARKS`, an address, `reasoning_gym:NAME`, or a reasoning-gym
            task's NAME where nothing else has it.

    Raises:
        ValueError: unknown name or parameter.
    """
    cls, first = _class_and_name(name)
    old = next((word for word in ("train_rows", "heldout_rows", "file_rows") if hasattr(cls, word)), None)
    if old is not None:
        raise ValueError(f"task.name {name!r}: its method {old} is now called {old.removesuffix('rows')}examples")
    known = list(inspect.signature(cls).parameters)[len(first) :]
    for key in params:
        if key not in known:
            raise ValueError(f"task.params has unknown key {key!r}; {name} takes {', '.join(known) or 'none'}")
    _check_types(cls, params)
    return cls(*first, **params)


def _check_types(cls: Any, params: dict[str, Any]) -> None:
    """Hold parameters against the annotations of the constructor; what has none, or one of no data, passes."""
    try:
        hints = get_type_hints(cls.__init__)
    except NameError:  # of a name that is imported for type checkers alone
        return
    for name in params.keys() & hints.keys():
        try:
            TypeAdapter(hints[name]).validate_python(params[name])
        except PydanticUserError:  # a type that pydantic has no check for
            continue
        except ValidationError as error:
            raise ValueError(f"task.params.{name}: {error.errors()[0]['msg']}, got {params[name]!r}") from None


def task_class(name: str) -> Any:
    """The class of a task, without building it.

    Raises:
        ValueError: unknown name.
    """
    return _class_and_name(name)[0]


def _class_and_name(name: str) -> tuple[Any, tuple[str, ...]]:
    """The class, and the arguments that its name stands for."""
    if name in BENCHMARKS:
        return BenchmarkTask, (name,)
    if name.startswith(_GYM):
        return GymTask, (name.removeprefix(_GYM),)
    if TASKS.has(name):
        return TASKS.resolve(name), ()
    if name in gym_tasks():
        return GymTask, (name,)
    known = [*TASKS.names(), *BENCHMARKS]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else f"; known tasks: {', '.join(known)}, reasoning_gym:NAME"
    raise ValueError(f"task.name {name!r} does not exist{hint}")


def modality_class(task: Any) -> Any:
    """The modality of a task, by its attribute `modality`: a name, an address, or the class; text where it has none.

    Args:
        task: a task or its class.

    Raises:
        ValueError: there is no such modality.
    """
    if hasattr(task, "medium") and not hasattr(task, "modality"):
        name = getattr(task, "__name__", type(task).__name__)
        raise ValueError(
            f"the attribute medium of task {name} is now called modality: write modality = {task.medium!r}"
        )
    return MODALITIES.resolve(getattr(task, "modality", "text"))


def modality_of(name: str) -> Any:
    """The modality of the task that `task.name` names, without building it."""
    return modality_class(task_class(name))
