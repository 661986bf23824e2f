"""Recipes. A recipe is one class for one paper; its docstring says which choices it makes, and what it departs from.

A config's `algorithm` section names the class and becomes an object of it (`rl.config.Config.algorithm`), so reading a
config imports the class. Importing torch takes a second and a half of CPU: the methods import what needs it, so that
`denoise-rl train --options` and `--dry-run` answer in a quarter of a second. A recipe in a file of your own may import
what it likes at the top.

Every recipe is here by the name of its class, loaded when it is asked for: `from rl.recipes import TraceRL`.
"""

from __future__ import annotations

from typing import Any

from rewards.address import load_address
from rl.registry import RECIPES


def __getattr__(name: str) -> Any:
    for address in RECIPES.known.values():
        if address.endswith(f":{name}"):
            return load_address(address, f"recipe {name}")
    raise AttributeError(f"module 'rl.recipes' has no attribute {name!r}")
