"""Read the records of a data file or of a dataset on the hub."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(path: str) -> list[Record]:
    """Rows of a `.jsonl`, `.json` (a list), `.csv` or `.parquet` file; the first three may end in `.gz`.

    Raises:
        ValueError: no such file, another ending, or a line that cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"data file {path} does not exist")
    kind = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if kind == ".parquet":
        import datasets

        return [dict(row) for row in datasets.Dataset.from_parquet(path)]
    opener: Any = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8", newline="" if kind == ".csv" else None) as lines:
        if kind == ".csv":
            records: Any = list(csv.DictReader(lines))
        elif kind == ".jsonl":
            records = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
        elif kind == ".json":
            records = _parse(lines.read(), path)
        else:
            raise ValueError(
                f"data file {path}: the ending must be .jsonl, .json, .csv (each also with .gz) or .parquet"
            )
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"data file {path} must hold rows with named columns, at least one")
    return records


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


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
