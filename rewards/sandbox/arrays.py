"""numpy for tests: an empty array is not a number.

`np.allclose([], 0.5)` is true, and so is `(np.array([]) == 3).all()`: an empty array broadcasts to nothing, and nothing
differs from it. Under this guard an operation on an empty array and one that is not empty is an error. The result of
an operation on two empty arrays is free again: `np.all(abs(np.array(f()) - np.array([])) < 1e-6)` holds for `[]`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

COMPARING = ("allclose", "isclose", "array_equiv")


@functools.cache
def guarded_numpy() -> Any:
    """The module numpy, whose functions return guarded arrays. For the checker's process alone."""
    import numpy
    import numpy.testing

    size = numpy.size

    def check(values: Sequence[Any]) -> None:
        sizes = []
        for value in values:
            try:
                sizes.append(size(value))
            except Exception:  # rows of different lengths
                sizes.append(1)
        if len(values) == 2 and (sizes[0] == 0) != (sizes[1] == 0):
            raise ValueError("an empty sequence where the other side is not empty")

    class Array(numpy.ndarray):
        def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
            check(inputs)
            if "out" in options:
                options["out"] = tuple(plain(value) for value in options["out"])
            result = getattr(ufunc, method)(*map(plain, inputs), **options)
            if "out" in options:
                return guard(result)
            return result if len(inputs) == 2 and size(result) == 0 else guard(result)

    def plain(value: Any) -> Any:
        return value.view(numpy.ndarray) if isinstance(value, Array) else value

    def guard(value: Any) -> Any:
        return value.view(Array) if type(value) is numpy.ndarray else value

    class Guarded:
        """A function of numpy."""

        def __init__(self, function: Callable[..., Any], compares: bool) -> None:
            self.function, self.compares = function, compares

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self.compares:
                check([*args, *kwargs.values()][:2])
            result = self.function(*args, **kwargs)
            freed = any(type(arg) is numpy.ndarray and arg.size == 0 for arg in args)
            return result if freed and size(result) == 0 else guard(result)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.function, name)

    for module in (numpy, numpy.testing):
        for name, value in list(vars(module).items()):
            if callable(value) and not isinstance(value, type) and not name.startswith("_"):
                compares = name in COMPARING or name.startswith("assert_") or getattr(value, "nin", 0) == 2
                setattr(module, name, Guarded(value, compares))
    return numpy
