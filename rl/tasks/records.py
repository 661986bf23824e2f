"""Read the records of a data file or of a dataset on the hub: dicts of column -> value, None where it is missing."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl.errors import about
from rl.files import read_text

Record = dict[str, Any]


def read_records(path: str) -> list[Record]:
    """Rows of a `.jsonl`, `.json` (a list), `.csv` or `.parquet` file; the first three may end in `.gz`.

    Every record has the columns of all of them: a cell that its row lacks is None, as in a parquet file. Row 1 is the
    first one behind the header.

    Raises:
        ValueError: one line that names the file and the row: no such file, another ending, not UTF-8, not JSON, a key
            that is there twice, a CSV row of another width, half of a surrogate pair.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"data file {path} does not exist")
    kind = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if kind == ".parquet":
        import datasets

        with about(f"data file {path}"):
            records: Any = [dict(row) for row in datasets.Dataset.from_parquet(str(file))]
    elif kind == ".csv":
        records = _csv_records(read_text(path, "data file"), path)
    elif kind == ".jsonl":
        lines = [line for line in enumerate(read_text(path, "data file").split("\n"), start=1) if line[1].strip()]
        records = [_parse(line, f"{path}:{number}") for number, line in lines]
    elif kind == ".json":
        records = _parse(read_text(path, "data file"), path)
    else:
        raise ValueError(f"data file {path}: the ending must be .jsonl, .json, .csv (each also with .gz) or .parquet")
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"data file {path} must hold rows with named columns, at least one")
    columns = dict.fromkeys(name for record in records for name in record)
    for number, record in enumerate(records, start=1):
        for name, value in record.items():
            if _has_surrogate(value):
                raise ValueError(
                    f"{path}: row {number}: column {name!r} holds half of a surrogate pair, which is no text"
                )
    return [{name: record.get(name) for name in columns} for record in records]


def hub_records(dataset: str, split: str, config: str | None = None, files: Sequence[str] = ()) -> list[Record]:
    """Rows of a dataset on the hub (or in its local cache).

    Args:
        files: read these JSON-lines files of the dataset instead of a split.

    Raises:
        ValueError: it cannot be loaded; the line says how to do without a network.
    """
    import logging

    import datasets

    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it announces every retry; our one line says what matters
    try:
        if files:
            urls = [f"hf://datasets/{dataset}/{name}" for name in files]
            table = datasets.load_dataset("json", data_files=urls, split="train")
        else:
            table = datasets.load_dataset(dataset, config, split=split)
    # Which exception a missing network, dataset or cache raises changes with every release of `datasets`.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"dataset {dataset} cannot be loaded from the hub ({type(error).__name__}: {reason}); "
            f"give its file with --data FILE"
        ) from error
    finally:
        hub.setLevel(level)
    return [dict(row) for row in table]


def _csv_records(text: str, path: str) -> list[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[Record] = []
    header: list[str] = []
    try:
        for fields in reader:
            if not fields:
                continue
            if not header:
                header = fields
                twice = next((name for name in header if header.count(name) > 1), None)
                if twice is not None:
                    raise ValueError(f"{path}:1: the column {twice!r} is there twice: rename one")
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}:{reader.line_num}: row {len(records) + 1} has {len(fields)} fields, the header names "
                    f"{len(header)}: quote a field that holds a comma"
                )
            records.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV: {error}") from None
    return records


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    except KeyError as error:
        raise ValueError(f"{where}: the key {error} is there twice: remove one") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return found


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return any(_has_surrogate(part) for part in (*value, *value.values()))
    return isinstance(value, list) and any(_has_surrogate(part) for part in value)
