"""Names in a config become classes: short names, addresses, entry points, classes; one line where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rl.errors import about, is_message
from rl.files import write_json, write_whole
from rl.registry import FAMILIES, MODALITIES, RECIPES, SEARCHES, TASKS, Table
from rl.tasks.load import load_task

TABLES = [RECIPES, TASKS, MODALITIES, FAMILIES, SEARCHES]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "plug.py").write_text("class Thing:\n    pass\ndef fails():\n    raise ValueError('set it to 3')\n")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "inside.py").write_text("from pack.deep import fails\nclass Thing:\n    pass\n")
    (tmp_path / "pack" / "deep.py").write_text("def fails():\n    raise ValueError('set it to 4')\n")
    return tmp_path


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.key)
def test_every_kind_takes_names_addresses_and_classes(table: Table, folder: Path) -> None:
    for name in table.known:
        assert isinstance(table.resolve(name), type)
    thing = table.resolve("plug.py:Thing")
    assert thing.__name__ == "Thing"
    assert table.resolve(str(folder / "plug.py") + ":Thing") is thing, "one file is one module, however it is named"
    assert table.resolve("pack.inside:Thing").__module__ == "pack.inside"
    assert table.resolve(thing) is thing


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.key)
def test_an_entry_point_is_a_name(table: Table, folder: Path) -> None:
    metadata = folder / "plug-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{table.group}]\nthing = plug:Thing\ngone = plug:Gone\n")
    sys.path.insert(0, str(folder))
    assert table.resolve("thing").__name__ == "Thing"
    assert "thing" in table.names()
    with pytest.raises(ValueError, match=r"'gone': the entry point 'plug:Gone' cannot be imported"):
        table.resolve("gone")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("plug.py:Thong", "plug.py has no 'Thong'; did you mean 'Thing'?"),
        ("plugg.py:Thing", "no file"),
        ("nowhere.at_all:Thing", "cannot import 'nowhere.at_all'"),
        ("xyzzy", "known: "),
    ],
)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.key)
def test_a_misspelt_address_is_one_line_that_names_the_option(table: Table, name: str, says: str, folder: Path) -> None:
    with pytest.raises(ValueError) as error:
        table.resolve(name)
    assert says in str(error.value)
    assert str(error.value).startswith(f"{table.key} {name!r}")
    assert "\n" not in str(error.value)
    assert is_message(error.value)


def test_a_misspelt_name_is_answered_with_the_nearest(folder: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'tracerl'"):
        RECIPES.resolve("tracer1")
    with pytest.raises(ValueError, match="did you mean 'sudoku'"):
        load_task("sudoko", {})


@pytest.mark.parametrize("address", ["plug.py:fails", "pack.inside:fails"])
def test_what_a_plugin_raises_is_a_message_also_from_its_other_files(address: str, folder: Path) -> None:
    fails = RECIPES.resolve(address)
    with pytest.raises(ValueError, match=r"^set it to [34]$") as error, about("some.option"):
        fails()
    assert is_message(error.value)


def test_what_python_raises_in_a_plugin_is_no_message(folder: Path) -> None:
    (folder / "bug.py").write_text("def fails():\n    return int('a')\n")
    fails = RECIPES.resolve("bug.py:fails")
    with pytest.raises(ValueError) as error:
        fails()
    assert not is_message(error.value)


def test_a_file_is_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = write_json(tmp_path / "value.json", {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n'

    def half(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device.*value\.json"):
        write_whole(path, half)
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]
