"""The wheel holds the three packages and their configs, installs elsewhere and brings the command."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = str(image_sources(folder / "src"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), source]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    (found,) = folder.glob("denoise_rl-*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path) -> tuple[Path, Path]:
    """The interpreter of a new environment with the wheel, and where that is installed.

    The dependencies are those of this environment, behind the installed wheel; nothing is of the working tree.
    """
    home = wheel.parent / "home"
    venv.create(home, with_pip=False)
    site = next((home / "lib").glob("python*")) / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, timeout=200)
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return home / "bin" / "python", site


def use(python: tuple[Path, Path], folder: Path, commands: list[tuple[list[str], int, str]]) -> list[str]:
    """Run commands (words, exit code, what the answer holds) from a folder in one process; gives what each said."""
    code = (
        "import sys, rl, rewards, rollouts, rl.cli; sys.stderr = sys.stdout; print(rl.__file__)\n"
        f"for words in {[words for words, _, _ in commands]}: print('\\nexit code', rl.cli.main(words))"
    )
    result = subprocess.run(
        [str(python[0]), "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=1000
    )
    assert result.stdout.startswith(str(python[1])), result.stdout + result.stderr
    answers = result.stdout.split("\nexit code ")
    for number, (words, exit_code, text) in enumerate(commands):
        assert text in answers[number], (words, answers[number], result.stderr)
        assert answers[number + 1].splitlines()[0] == str(exit_code), (words, answers)
    return answers


def test_the_wheel_installs_and_is_used_from_an_empty_folder(
    wheel: Path, python: tuple[Path, Path], tmp_path: Path
) -> None:
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

    use(python, tmp_path, FROM_A_WHEEL)
    # Looking at a config leaves nothing behind.
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.release
def test_it_installs_from_git(tmp_path: Path) -> None:
    """`pip install git+...`: what a repository holds is enough, configs included."""
    source, site = image_sources(tmp_path / "src"), tmp_path / "site"
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=source, check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
    ]
    subprocess.run([*pip, f"git+file://{source}"], check=True, cwd=tmp_path, timeout=200)
    assert (site / "rl" / "configs" / "quickstart.yaml").is_file() and (site / "bin" / "denoise-rl").is_file()


@pytest.mark.release
def test_a_new_user_trains_evaluates_and_chats_without_a_clone(python: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = ["--config", "quickstart.yaml"], "runs/quickstart"
    small = "sft.steps=3 sft.batch_size=8 train.steps=2 train.prompts_per_step=4 train.group_size=2 eval.every=1"
    sizes = [*small.split(), "eval.num_prompts=8", "eval.every_prompts=8", "goal=null", "run.num_threads=1"]
    words = [
        (["init", "quickstart"], 0, "quickstart.yaml"),
        (["train", *config, *sizes], 0, "report.html"),
        (["eval", *config, f"model.path={run}", *sizes], 0, "n=8  unscored=0"),
        (["chat", run, "--prompt", "0341000400000000=", "sampler.gen_length=8"], 0, ""),
        (
            ["chat", run, "--prompt", "words"],
            2,
            "prompt 1: text 1 of 1, 'words', holds 'w', which the tokenizer has no",
        ),
        (["inspect", run, "--n", "1"], 0, "worst 1: reward 0 (sudoku)"),
    ]
    answers = use(python, tmp_path, words)
    assert re.fullmatch(r"0\s*[0-4=]{0,8}", answers[3].strip()), answers[3]
    page = (tmp_path / run / "report.html").read_text()
    assert re.search(r" in (row|column|box) \d<", page) and "verdicts of sudoku" in page
