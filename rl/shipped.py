"""The configs that come with the package: found by name, listed, copied to be edited. No torch at import.

In a clone they are `configs/`, in an installed wheel `rl/configs/`; the DeepSpeed configs lie in `deepspeed/` there.
"""

from __future__ import annotations

import difflib
from pathlib import Path

_HOME = Path(__file__).resolve().parent
FOLDER = _HOME / "configs" if (_HOME / "configs").is_dir() else _HOME.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Name -> YAML file, by name: `quickstart` is `quickstart.yaml`."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def shipped_deepspeed() -> dict[str, Path]:
    """Name -> DeepSpeed JSON, by name: what `train.deepspeed` can name."""
    return {path.stem: path for path in sorted((FOLDER / "deepspeed").glob("*.json"))}


def find_config(path: str | Path) -> Path:
    """The config file of `--config`: a file of the user, or a shipped config by its name.

    Raises:
        ValueError: there is no such file, in one line with the nearest name.
    """
    path, known = Path(path), shipped_configs()
    plain = path.name == str(path) and not path.suffix
    if path.expanduser().is_file() or (path.is_dir() and not (plain and path.name in known)):
        # A folder is refused by whoever reads it.
        return path
    if plain and path.name in known:
        return known[path.name]
    near = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {near[0]!r}, which comes with denoise-rl?" if near else "denoise-rl configs lists the shipped"
    raise ValueError(f"config file {path} does not exist: {hint}")


def list_lines() -> list[str]:
    """Two lines per shipped config, its name and the first two of the file: a sentence; model size and hardware.

    The last line has the names for `train.deepspeed`.
    """
    known = shipped_configs()
    width = max(map(len, known), default=0)
    lines = []
    for name, path in known.items():
        sentence, needs = (line.lstrip("# ") for line in path.read_text("utf-8").splitlines()[:2])
        lines += [f"{name:{width}}  {sentence}", f"{'':{width}}  {needs}"]
    return [*lines, f"train.deepspeed={' | '.join(shipped_deepspeed())}"]


def copy_config(name: str, folder: str | Path) -> Path:
    """Copy a shipped config, or DeepSpeed config, into a folder, which is made; returns the copy.

    Raises:
        ValueError: there is none of this name, the folder is named like a file, or the file is there already.
    """
    known = shipped_configs() | shipped_deepspeed()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"no config {name!r}: {f'did you mean {near[0]!r}?' if near else 'see denoise-rl configs'}")
    if Path(folder).suffix in (".yaml", ".yml", ".json") or Path(folder).is_file():
        raise ValueError(f"{folder} would be the folder of {known[name].name}: name a folder, and rename the copy")
    copy = Path(folder) / known[name].name
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        with copy.open("xb") as file:
            file.write(known[name].read_bytes())
    except FileExistsError:
        raise ValueError(f"{copy} is there already and stays as it is: give another folder") from None
    return copy
