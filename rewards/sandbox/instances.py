"""Objects of classes that the task defines (a linked list's node), which both sides have and which cross by value.

A table of their states goes in front of the value, so that cycles and long chains cross, and the same object is the
same on each side: {"t": "graph", "v": [[[0, "Node", [["val", 1], ["next", {"t": "instance", "v": 0}]]]], VALUE]}.
Standard library only: runs inside the sandbox.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Iterator
from typing import Any

from rewards.sandbox.values import Other, TransferError, decode, encode, merged


class Instances:
    """The instances that one side has seen, by number: one side counts up from 0, the other down from -1."""

    def __init__(self, first: int, find_class: Callable[[str], type]) -> None:
        self.next, self.step, self.find_class = first, 1 if first >= 0 else -1, find_class
        self.objects: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}
        self.waiting: list[int] = []
        self.arrived: dict[int, Any] = {}

    def pack(self, value: Any, other: Other) -> Any:
        """`encode`, with the states of all instances that can be reached."""
        self.waiting = []
        node = encode(value, other)
        table: dict[int, Any] = {}
        while self.waiting:
            number = self.waiting.pop()
            if number not in table:
                table[number] = ()
                item = self.objects[number]
                state = [[name, encode(part, other)] for name, part in state_of(item)]
                table[number] = [number, type(item).__name__, state]
        return {"t": "graph", "v": [list(table.values()), node]} if table else node

    def refer(self, item: Any) -> Any:
        """The node of an instance inside of `pack`."""
        if isinstance(item, enum.Enum):
            return {"t": "member", "v": [type(item).__name__, item.name]}
        number = self.numbers.get(id(item))
        if number is None:
            number, self.next = self.next, self.next + self.step
            self._keep(number, item)
        self.waiting.append(number)
        return {"t": "instance", "v": number}

    def unpack(self, node: Any, handle: Other) -> Any:
        """The value of a node whose tag is one of the three above. Raises TransferError."""
        try:
            if node["t"] == "instance":
                return self.objects[node["v"]]
            if node["t"] == "member":
                kind = self.find_class(node["v"][0])
                return kind.__members__[node["v"][1]]  # type: ignore[attr-defined]
            table, value = node["v"]
            for number, name, _ in table:
                if number not in self.objects:
                    self._keep(number, object.__new__(self.find_class(name)))
            for number, _, state in table:
                self.arrived[number] = self.objects[number]
                set_state(self.objects[number], {name: decode(part, handle) for name, part in state})
            return decode(value, handle)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TransferError(f"no instance: {error}") from None

    def _keep(self, number: int, item: Any) -> None:
        self.objects[number] = item  # kept alive, so its id stays its own
        self.numbers[id(item)] = number


def is_state(kind: type, name: str) -> bool:
    """Whether a name can be data of an instance: no method, property or special name of its class."""
    found = getattr(kind, name, None)
    behaviour = hasattr(type(found), "__get__") and not isinstance(found, types.MemberDescriptorType)
    return not behaviour and not name.startswith("__")


def state_of(item: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an instance, from its `__dict__` and its slots."""
    kind = type(item)
    slots = [base.__dict__.get("__slots__", ()) for base in kind.__mro__]
    names = [name for group in slots for name in ([group] if isinstance(group, str) else group)]
    for name in [*getattr(item, "__dict__", ()), *names]:
        if isinstance(name, str) and is_state(kind, name) and hasattr(item, name):
            yield name, getattr(item, name)


def set_state(item: Any, state: dict[str, Any]) -> None:
    """Make these the attributes of an instance."""
    before = dict(state_of(item))
    for name in before.keys() - state.keys():
        object.__delattr__(item, name)
    for name, value in state.items():
        if is_state(type(item), name):
            object.__setattr__(item, name, merged(before.get(name), value))
