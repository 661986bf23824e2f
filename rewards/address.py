"""Python objects named by a string: `package.module:name`, `path/to/file.py:name`, or a setuptools entry point.

Rewards, recipes, tasks, modalities, model families and searches are all found this way. No torch at import.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.call import one_line
from rewards.signature import nearest

# Where the code of plugins lies that were loaded by address: files, and folders of packages. A ValueError that is
# raised there is a message for the user, like one of ours.
PLUGIN_PLACES: set[Path] = set()
_OURS = [Path(__file__).resolve().parents[1] / package for package in ("rl", "rewards", "rollouts")]


def load_address(spec: str, what: str) -> Any:
    """The object that `package.module:name` or `path/to/file.py:name` names.

    Args:
        what: what the object is, for messages: `reward 'my.py:f'`, `algorithm.name 'my.py:F'`.

    Raises:
        ValueError: one line: not of that form, no such file or module, or no such name in it.
    """
    location, separator, attribute = spec.rpartition(":")
    if not separator:
        raise ValueError(f"{what} must have the form package.module:name or path/file.py:name")
    module = _module_from_file(location, what) if location.endswith(".py") else _module(location, what)
    if not hasattr(module, attribute):
        names = [name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")]
        near = nearest(attribute, names)
        hint = f"; did you mean '{near}'?" if near else ""
        raise ValueError(f"{what}: {location} has no '{attribute}'{hint}")
    found = getattr(module, attribute)
    _remember(found, module)
    return found


def entry_points(group: str) -> dict[str, Any]:
    """Name -> entry point of the installed distributions, for a group such as `denoise_rl.rewards`."""
    from importlib.metadata import entry_points  # slow to import, and names of our own need none

    return {point.name: point for point in entry_points(group=group)}


def load_entry_point(point: Any, what: str) -> Any:
    """The object of an entry point.

    Raises:
        ValueError: its module cannot be imported, or lacks it.
    """
    try:
        found = point.load()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what}: the entry point {point.value!r} cannot be imported: {one_line(error)}") from error
    _remember(found, sys.modules[point.value.split(":")[0]])
    return found


def is_ours(path: Path) -> bool:
    """Whether a source file belongs to this project."""
    return any(folder in path.parents for folder in _OURS)


def is_plugin(path: Path) -> bool:
    """Whether a source file belongs to a plugin that was loaded by address or entry point."""
    return any(path == place or place in path.parents for place in PLUGIN_PLACES) and not is_ours(path)


def place_in_plugin(error: BaseException) -> str:
    """The line of a plugin in which an error arose: `own_task.py, line 5, in Task.train_examples`.

    Libraries that the plugin called count as the plugin; the place is "" where it called our code and the error arose
    there, and where there is no plugin.
    """
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename).resolve()
        if is_ours(file):
            place = ""
        elif is_plugin(file):
            place = f"{file.name}, line {line}, in {frame.f_code.co_qualname}"
    return place


def _remember(found: Any, module: ModuleType) -> None:
    for name in {module.__name__, getattr(found, "__module__", None) or module.__name__}:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file:
            path = Path(file).resolve()
            root = sys.modules.get(name.split(".")[0])
            package = "." in name and getattr(root, "__file__", None)
            PLUGIN_PLACES.add(Path(package).resolve().parent if package else path)


def _module(name: str, what: str) -> ModuleType:
    # A console script does not have the working folder on its path; `python -m` and TRL do.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{what}: cannot import '{name}': {error}") from error
    except (Exception, SystemExit) as error:
        if name.split(".")[0] in [folder.name for folder in _OURS]:
            raise
        raise ValueError(f"{what}: cannot import '{name}': {_in_import(error)}") from error


def _in_import(error: BaseException) -> str:
    """`KeyError: 'a' (own.py, line 3)`: an error and the line of the module, or of what it imports, that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"]
    return one_line(error) + (f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else "")


def _module_from_file(location: str, what: str) -> ModuleType:
    """The module in a file; `from .sibling import x` and `from ..package import x` work in it.

    A file beside an `__init__.py` gets the names of the packages around it. These are empty stand-ins: no `__init__.py`
    runs but one named itself.
    """
    path = Path(location).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"{what}: no file {path}")
    folders, stem = [path.parent], path.stem
    while (folders[0] / "__init__.py").is_file():
        folders.insert(0, folders[0].parent)
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"denoise_rl_file_{stem}_{digest}"
    if len(folders) > 1:
        name = f"denoise_rl_package_{digest}"
        names = [folder.name for folder in folders[1:]] + ([] if stem == "__init__" else [stem.replace(".", "_")])
        for folder, child in zip(folders, names, strict=False):
            sys.modules.setdefault(name, ModuleType(name)).__path__ = [str(folder)]
            name += f".{child}"
    if name in sys.modules:
        return sys.modules[name]
    for place in (folders[-1], folders[0]):
        if str(place) not in sys.path:
            sys.path.append(str(place))  # at the end: helpers beside the file are found, nothing is shadowed
    inside = [str(path.parent)] if len(folders) == 1 or stem == "__init__" else None
    module_spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=inside)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    PLUGIN_PLACES.add(path)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{what}: cannot import {path}: {_in_import(error)}") from error
    return module
