"""Records in one `.npz` file without pickle: arrays, and a JSON header that says what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_records(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    items: Sequence[Mapping[str, Any]],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Write a header of JSON items and their arrays. The file appears only when it is complete."""
    header = {"format": f"denoise-rl {kind}", "version": version, "items": list(items)}
    everything = {**arrays, "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **everything)  # type: ignore[arg-type]
    os.replace(partial, path)


def read_records(path: str | os.PathLike[str], kind: str, version: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The items and arrays that `write_records` wrote.

    Raises:
        ValueError: the file holds something else, or another version of it.
    """
    with np.load(path, allow_pickle=False) as data:
        if "header" not in data:
            raise ValueError(f"{path} is not a trajectory file: it has no header")
        header = json.loads(bytes(data["header"]).decode())
        if header.get("format") != f"denoise-rl {kind}":
            raise ValueError(f"{path} holds {header.get('format')}, not denoise-rl {kind}")
        if header.get("version") != version:
            raise ValueError(f"{path} has trajectory format {header.get('version')}, this code reads {version}")
        arrays = {name: data[name] for name in data.files if name != "header"}
    return header["items"], arrays


def write_dataclasses(path: str | os.PathLike[str], kind: str, records: Sequence[Any]) -> None:
    """Write dataclasses whose fields are arrays and plain JSON values."""
    fields = [vars(record) for record in records]
    items = [{k: v for k, v in own.items() if not isinstance(v, np.ndarray)} for own in fields]
    arrays = {f"{i}/{k}": v for i, own in enumerate(fields) for k, v in own.items() if isinstance(v, np.ndarray)}
    write_records(path, kind, 1, items, arrays)


def read_dataclasses(path: str | os.PathLike[str], kind: str, cls: Any) -> list[Any]:
    """The records of class `cls` that `write_dataclasses` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    items, arrays = read_records(path, kind, 1)
    for name, array in arrays.items():
        index, _, field = name.partition("/")
        items[int(index)][field] = array
    return [cls(**item) for item in items]
