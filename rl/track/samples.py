"""The worst and the best of the rollouts that a folder has kept: for `denoise-rl inspect` and for the report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.track.jsonl import read_lines

# Of `train`, of `rollout` and of `eval --output`.
FILES = ("samples.jsonl", "rollouts.jsonl", "generations.jsonl")
TEXTS = {"prompt": "prompt", "prompt_id": "prompt", "completion": "answer", "answer": "expected"}
_FACTS = {"num_steps": "denoising steps", "step": "RL step", "decoder": "decoder", "reason": "because"}
_LONGEST = 2000  # characters of a text that are shown


def read_samples(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The kept rollouts of a run, of `rollout --output` or of `eval --output`.

    Raises:
        ValueError: the folder has none, or a line is no JSON.
    """
    path = next((Path(folder) / name for name in FILES if (Path(folder) / name).is_file()), None)
    samples = [] if path is None else read_lines(path)
    if not samples:
        raise ValueError(f"{folder} has no rollouts (a line of {', '.join(FILES)}): give the folder of a run")
    return samples


def worst_and_best(samples: Sequence[Mapping[str, Any]], count: int) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The `count` rollouts of least and of most reward, and as many without a score; none stands in two groups.

    Of equal rewards the later rollouts are taken: they say what the model does now.
    """
    newest = list(reversed(samples))
    # Sorting is stable, so of equal rewards the newest stand first, on both sides.
    scored = sorted((s for s in newest if s["reward"] is not None), key=lambda s: s["reward"])
    half = min(count, len(scored) // 2)
    worst, best = scored[:half], sorted(scored[half:], key=lambda s: -s["reward"])[:count]
    silent = [s for s in newest if s["reward"] is None][:count]
    return [(name, group) for name, group in (("worst", worst), ("best", best), ("without a score", silent)) if group]


def reward_text(reward: float | None, parts: Mapping[str, float | None] | None) -> str:
    """A reward and what it is made of: `reward 0.3 (fluency 0.3, words 0)`, `reward 1 (sudoku)`."""
    whole = "no reward" if reward is None else f"reward {reward:.4g}"
    alone = list((parts or {}).values()) == [reward]
    told = [name if alone else f"{name} {'none' if value is None else f'{value:.4g}'}"
            for name, value in (parts or {}).items()]  # fmt: skip
    return whole + (f" ({', '.join(told)})" if told else "")


def facts(sample: Mapping[str, Any]) -> str:
    """One line about a rollout: its reward, and where it is from."""
    told = [f"{words} {sample[name]}" for name, words in _FACTS.items() if sample.get(name) is not None]
    return ", ".join([reward_text(sample["reward"], sample.get("parts")), *told])


def texts(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The texts of a rollout that there are, each with its name: prompt, answer, expected."""
    found = []
    for field, name in TEXTS.items():
        if sample.get(field) is not None:
            value = sample[field]
            turns = value if isinstance(value, list) else []
            text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns) if turns else str(value)
            cut = f"{text[:_LONGEST]}... ({len(text):,} characters)"
            found.append((name, text if len(text) <= _LONGEST else cut))
    return found


def sample_lines(folder: str | os.PathLike[str], count: int, step: int | None = None) -> list[str]:
    """The lines that `denoise-rl inspect` prints.

    Raises:
        ValueError: see `read_samples`; or no rollout is of RL step `step`.
    """
    samples = read_samples(folder)
    kept = [sample for sample in samples if step is None or sample.get("step") == step]
    if not kept:
        steps = sorted({sample["step"] for sample in samples if "step" in sample})
        has = f"its steps are {steps[0]} to {steps[-1]}" if steps else "its rollouts are of no step: leave --step out"
        raise ValueError(f"{folder} has no rollouts of RL step {step}: {has}")
    lines = [f"{len(kept)} rollouts of {folder}"]
    for group, members in worst_and_best(kept, count):
        for number, sample in enumerate(members, start=1):
            lines += ["", f"{group} {number}: {facts(sample)}"]
            for name, text in texts(sample):
                text = "an image, which the report shows" if text.startswith("data:image/") else text
                lines.append(f"  {name:10}" + text.replace("\n", f"\n  {'':10}"))
    return lines
