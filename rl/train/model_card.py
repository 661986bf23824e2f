"""The model card of a trained model: how it was made, what came out, under what licence its base is. No torch."""

from __future__ import annotations

import contextlib
import json
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rl.config import Config, save_config
from rl.files import write_whole
from rl.models.folder import is_hub_name
from rl.track.verdict import compare, judge_line, measure, read_summary, verdict_line

_CONFIG = "denoise_rl.yaml"


def write_card(folder: str | Path, config: Config) -> Path:
    """Write README.md, and the config, beside a saved model; numbers are those of the run folder, if it has some."""
    folder, run = Path(folder), Path(config.run.output_dir)
    save_config(config, folder / _CONFIG)
    base, train = config.model.path, config.train
    summary = read_summary(run)
    licence = base_licence(base) if base else None
    head: dict[str, Any] = {"library_name": "denoise-rl", "tags": ["denoise-rl", "diffusion", config.algorithm.name]}
    if base and not Path(base).exists() and is_hub_name(base):
        head["base_model"] = base
    if licence:
        head["license"] = licence
    recipe = config.algorithm.model_dump(exclude_defaults=True, exclude={"name"})
    said = "".join(f", {name} {value}" for name, value in recipe.items())
    rewards = [f"{part.weight:g} x `{part.name}`" for part in config.reward.functions]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {run.name}\n",
        f"A diffusion model trained by reinforcement learning with denoise-rl {version('denoise-rl')}.\n",
        "| | |\n|---|---|",
        f"| base | {f'`{base}`' if base else 'trained from scratch'} |",
        f"| recipe | `{config.algorithm.name}`{said} |",
        f"| rewards | {' + '.join(rewards) or 'that of the task'} |",
        f"| steps | {summary.get('train_steps', 0)} of {train.steps}, each {train.prompts_per_step} prompts x "
        f"{train.group_size} rollouts; seed {config.run.seed} |",
        f"| data | task `{config.task.name}`{_data(run)} |",
        f"| licence of the base | {licence or 'not found: see the base model'} |\n",
        f"## Again\n\n    {shlex.join(['denoise-rl', 'train', '--config', _CONFIG])}\n",
    ]
    rows = [row for row in compare(summary) if row.after is not None]
    if rows:
        parts += [
            "## Numbers\n",
            f"{measure(summary)} on {summary['n_eval']} held-out prompts, 95 % intervals. {judge_line(summary)}\n",
            "| denoising steps | before | after | verdict |\n|---|---|---|---|",
            *(
                f"| {row.steps} | {_share(row.before, row.before_interval)} | "
                f"{_share(row.after, row.after_interval)} | {row.verdict} |"
                for row in rows
            ),
            f"\n{verdict_line(summary)}\n",
        ]
    return write_whole(folder / "README.md", "\n".join(parts))


def base_licence(path: str) -> str | None:
    """What the model card of a folder or hub name says its licence is; None where it says nothing, or none is found."""
    from huggingface_hub import ModelCard

    card = Path(path) / "README.md"
    if not card.is_file() and (Path(path).exists() or not is_hub_name(path)):
        return None
    # The hub may not be reached, or have no card.
    with contextlib.suppress(Exception):
        return ModelCard.load(card if card.is_file() else path).data.license
    return None


def _data(run: Path) -> str:
    """The data files that the run began with."""
    file = run / "data.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    return "".join(f", `{Path(path).name}` (sha256 {digest[:12]})" for path, digest in found.values())


def _share(value: float | None, interval: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
