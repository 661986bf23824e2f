"""The wheel holds the three packages, installs elsewhere and brings the command."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_installs_and_imports_from_another_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    (wheel,) = tmp_path.glob("denoise_rl-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"rl", "rewards", "rollouts"}
    # The report is rendered from a template that is no Python file.
    assert "rl/track/report.html.jinja" in names

    home = tmp_path / "home"
    venv.create(home, with_pip=False)
    site = next((home / "lib").glob("python*")) / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, timeout=200)
    # The dependencies of this environment behind the installed wheel, and nothing of the working tree.
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    code = "import rl, rewards, rollouts, rl.cli; print(rl.__file__); raise SystemExit(rl.cli.main(['check']))"
    result = subprocess.run(
        [str(home / "bin" / "python"), "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert result.stdout.strip().startswith(str(site)), result.stdout + result.stderr
    # The command runs; a config without a model is refused in one line.
    assert result.returncode == 2 and "model.backbone or model.path is required" in result.stderr, result.stderr
