"""Read the records of a data file or of a dataset on the hub: dicts of column -> value, None where it is missing."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import about
from rl.files import read_text

if TYPE_CHECKING:
    import datasets

Record = dict[str, Any]
ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".gz")


def records_at(source: str) -> list[Record]:
    """Rows of a file (`read_records`), or of a dataset on the hub: `owner/name:split`, `owner/name/config:split`."""
    return hub_records(*_hub_name(source)) if _is_hub_split(source) else read_records(source)


def stream_at(source: str) -> datasets.IterableDataset:
    """The same rows, read one after the other whenever somebody goes through them, and never held together.

    Args:
        source: see `records_at`; a file may be a pattern, `data/*.parquet`, whose files are shards. A cell that its row
            lacks is missing here.

    Raises:
        ValueError: there is no such file, it has another ending, or the hub does not give it. A row that cannot be read
            is an error when it is reached.
    """
    import datasets

    if _is_hub_split(source):
        return _hub_table(*_hub_name(source), streaming=True)
    files = sorted(glob.glob(str(Path(source).expanduser())))
    if not files:
        raise ValueError(f"data file {source} does not exist")
    if source.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    if not source.removesuffix(".gz").endswith((".jsonl", ".csv")):
        raise ValueError(f"data file {source}: a stream is .jsonl, .csv (each also with .gz) or .parquet")
    return datasets.IterableDataset.from_generator(_streamed, gen_kwargs={"files": files})


def _streamed(files: list[str]) -> Iterator[Record]:
    for path in files:
        opened = gzip.open if path.endswith(".gz") else open
        with about(f"data file {path}"), opened(path, "rt", encoding="utf-8-sig", newline="") as lines:
            if path.removesuffix(".gz").endswith(".csv"):
                yield from _csv_records(lines, path)
            else:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        record = _parse(line, f"{path}:{number}")
                        if not isinstance(record, dict):
                            raise ValueError(f"{path}:{number}: a row must have named columns")
                        _check_text(record, f"{path}:{number}")
                        yield {name: _cell(value) for name, value in record.items()}


def _is_hub_split(source: str) -> bool:
    return ":" in source and not source.endswith(ENDINGS)


def _hub_name(source: str) -> tuple[str, str, str | None]:
    name, _, split = source.partition(":")
    parts = name.split("/")
    if len(parts) < 3 or Path(name).is_dir():
        return name, split, None
    return "/".join(parts[:2]), split, "/".join(parts[2:])


def read_records(path: str) -> list[Record]:
    """Rows of a `.jsonl`, `.json` (a list), `.csv` or `.parquet` file; the first three may end in `.gz`.

    Every record has the columns of all of them: a cell that its row lacks, or that is NaN, is None. Row 1 is the
    first one behind the header.

    Raises:
        ValueError: one line that names the file and the row: no such file, another ending, not UTF-8, not JSON, a key
            that is there twice, a CSV row of another width, half of a surrogate pair.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        below = "" if file.is_absolute() else f" in {Path.cwd()}"
        raise ValueError(f"data file {path} {'is a folder' if file.is_dir() else f'does not exist{below}'}")
    kind = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if kind == ".parquet":
        import datasets

        with about(f"data file {path}"):
            records: Any = [dict(row) for row in datasets.Dataset.from_parquet(str(file))]
    elif kind == ".csv":
        records = list(_csv_records(io.StringIO(read_text(path, "data file"), newline=""), path))
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
        _check_text(record, f"{path}: row {number}")
    return [{name: _cell(record.get(name)) for name in columns} for record in records]


def hub_records(dataset: str, split: str, config: str | None = None, files: Sequence[str] = ()) -> list[Record]:
    """Rows of a dataset on the hub (or in its local cache).

    Args:
        files: read these JSON-lines files of the dataset instead of a split.

    Raises:
        ValueError: it cannot be loaded; the line says how to do without a network.
    """
    return [dict(row) for row in _hub_table(dataset, split, config, files)]


def _hub_table(
    dataset: str, split: str, config: str | None = None, files: Sequence[str] = (), streaming: bool = False
) -> Any:
    import logging

    import datasets

    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it announces every retry; our one line says what matters
    try:
        if files:
            urls = [f"hf://datasets/{dataset}/{name}" for name in files]
            return datasets.load_dataset("json", data_files=urls, split="train", streaming=streaming)
        return datasets.load_dataset(dataset, config, split=split, streaming=streaming)
    # Which exception a missing network, dataset or cache raises changes with every release of `datasets`.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"dataset {dataset} cannot be loaded from the hub ({type(error).__name__}: {reason}); "
            f"give a file in its place (--data FILE)"
        ) from error
    finally:
        hub.setLevel(level)


def _csv_records(lines: Iterable[str], path: str) -> Iterator[Record]:
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    row = 0
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
            row += 1
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}:{reader.line_num}: row {row} has {len(fields)} fields, the header names "
                    f"{len(header)}: quote a field that holds a comma"
                )
            yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV with commas: {error}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except KeyError as error:
        raise ValueError(f"{where}: the key {error} is there twice: remove one") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return found


def _cell(value: Any) -> Any:
    """A cell; NaN, which is how pandas writes a missing one, is None."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _check_text(record: Record, where: str) -> None:
    for name, value in record.items():
        if _has_surrogate(value):
            raise ValueError(f"{where}: column {name!r} holds half of a surrogate pair, which is no text")


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return any(_has_surrogate(part) for part in (*value, *value.values()))
    return isinstance(value, list) and any(_has_surrogate(part) for part in value)
