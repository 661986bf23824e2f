"""The wheel holds the three packages and their configs, installs elsewhere and brings the command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Run from an empty folder in one process: arguments, exit code, and what the answer holds.
FROM_A_WHEEL = [
    (["check"], 2, "model.backbone or model.path is required"),
    (["configs"], 0, "4x4 Sudoku in a few denoising steps, from nothing"),
    (["train", "--config", "quickstart", "--dry-run", "train.deepspeed=zero2_bf16"], 0, "trajectories per step"),
    (["train", "--config", "quikstart", "--dry-run"], 2, "config file quikstart does not exist: did you mean"),
    (["init", "quickstart", "mine"], 0, "mine/quickstart.yaml"),
    (["init", "quickstart", "mine"], 2, "mine/quickstart.yaml is there already"),
    (["init", "zero3_bf16", "mine"], 0, "mine/zero3_bf16.json"),
    (["check", "--config", "mine/quickstart.yaml", "train.deepspeed=mine/zero3_bf16.json"], 0, "config ok"),
]


def image_sources(folder: Path) -> Path:
    """What the Dockerfile copies into its image before it installs: a wheel must come of no more than that."""
    folder.mkdir()
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "/work" not in line:
            *sources, target = line.split()[1:]
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, folder / target)
    return folder


def test_the_wheel_installs_and_is_used_from_an_empty_folder(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(image_sources(tmp_path / "src")),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    (wheel,) = tmp_path.glob("denoise_rl-*.whl")
    assert f"\nversion: {wheel.name.split('-')[1]}\n" in (ROOT / "CITATION.cff").read_text()
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"rl", "rewards", "rollouts"}
    # The report is rendered from a template that is no Python file.
    assert "rl/track/report.html.jinja" in names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    files = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert {name for name in names if name.startswith("rl/configs/")} == {f"rl/{name}" for name in files}
    assert all(archive.read(f"rl/{name}") == path.read_bytes() for name, path in files.items())

    home, empty = tmp_path / "home", tmp_path / "empty"
    empty.mkdir()
    venv.create(home, with_pip=False)
    site = next((home / "lib").glob("python*")) / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, timeout=200)
    # The dependencies of this environment behind the installed wheel, and nothing of the working tree.
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    code = (
        "import sys, rl, rewards, rollouts, rl.cli; sys.stderr = sys.stdout; print(rl.__file__)\n"
        f"for words in {[words for words, _, _ in FROM_A_WHEEL]}: print('\\nexit code', rl.cli.main(words))"
    )
    result = subprocess.run(
        [str(home / "bin" / "python"), "-I", "-c", code], cwd=empty, capture_output=True, text=True, timeout=250
    )
    assert result.stdout.startswith(str(site)), result.stdout + result.stderr
    answers = result.stdout.split("\nexit code ")
    for number, (words, exit_code, text) in enumerate(FROM_A_WHEEL):
        assert text in answers[number], (words, answers[number])
        assert answers[number + 1].splitlines()[0] == str(exit_code), (words, answers)
    # Looking at a config leaves nothing behind.
    assert [path.name for path in empty.iterdir()] == ["mine"]
