"""What stands in the checker for an object of the program. Standard library only: runs inside the sandbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

COMPARISONS_AND_ARITHMETIC = "lt le gt ge add sub mul truediv floordiv mod pow matmul and or xor"
DELEGATED = "len str repr int float index iter next getitem delitem enter copy"


class ProgramObject:
    """Stands for an object that lives in the program: a function, a class, an instance, a generator."""

    __slots__ = ("_link", "_number")
    _link: Any  # the checker.Link
    _number: int

    def __init__(self, link: Any, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.call({"t": "handle", "v": self._number}, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__", "__dict__", "__qualname__"):
            raise AttributeError(name)
        return self._link.operate("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.operate("setattr", self, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProgramObject) and self._link.operate("eq", self, other) is True

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, ProgramObject) or self._link.operate("ne", self, other) is True

    def __hash__(self) -> int:
        return hash(("program", self._number))

    def __bool__(self) -> bool:
        return self._link.operate("bool", self) is True

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, ProgramObject) and self._link.operate("isinstance", instance, self) is True

    def __contains__(self, item: Any) -> NoReturn:
        raise TypeError("`in` an object of the program: its answer would be the program's own word")

    def __setitem__(self, key: Any, value: Any) -> None:
        self._link.operate("setitem", self, key, value)

    def __exit__(self, *exception: Any) -> None:
        self._link.operate("exit", self)

    def __deepcopy__(self, memo: Any) -> Any:
        return self._link.operate("deepcopy", self)


def _unary(name: str) -> Callable[..., Any]:
    return lambda self, *args: self._link.operate(name, self, *args)


def _binary(name: str) -> Callable[[Any, Any], Any]:
    def apply(self: Any, other: Any) -> Any:
        return self._link.operate(name, self, other) if isinstance(other, ProgramObject) else NotImplemented

    return apply


for _name in DELEGATED.split():
    setattr(ProgramObject, f"__{_name}__", _unary(_name))
for _name in COMPARISONS_AND_ARITHMETIC.split():
    setattr(ProgramObject, f"__{_name}__", _binary(_name))


def exception_class(name: str, base: type[Exception], number: int) -> type[Exception]:
    """A class for the exceptions of one class of the program, whose handle is `number`.

    An instance that came from the program has `_object`, the program's own, and `_text`, what it shows.
    """

    def ask(error: Any, attribute: str) -> Any:  # such as a property
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        return getattr(error.__dict__["_object"], attribute)

    def text(error: Any) -> str:
        return error.__dict__.get("_text") or base.__str__(error)

    return type(name, (base,), {"__program_class__": number, "__getattr__": ask, "__str__": text})
