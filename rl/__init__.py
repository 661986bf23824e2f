"""denoise-rl: reinforcement learning for diffusion models. Importing this package is instant.

The Python interface, loaded when it is asked for (docs/python_api.md): `Trainer`, and the functions `sample`,
`logprobs`, `score` and `evaluate`. Recipes are in `rl.recipes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl.functions import evaluate, logprobs, sample, score
    from rl.trainer import Trainer

__version__ = "0.2.0"
__all__ = ["Trainer", "evaluate", "logprobs", "sample", "score"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("rl.trainer" if name == "Trainer" else "rl.functions"), name)
