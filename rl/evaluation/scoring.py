"""Judge completions with the rewards of a config, now or again later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from rewards.run import RewardRunner
from rewards.table import ScoreTable
from rl.evaluation.figures import Figures, figures
from rl.evaluation.generations import Generation, GenerationFolder
from rl.evaluation.settings import file_hash, saved_template, texts_hash
from rl.sections import RewardConfig, RewardPartConfig
from rl.tasks.base import Example, reward_columns
from rl.tasks.benchmarks import BenchmarkTask
from rl.tasks.load import load_task
from rl.tasks.templates import Template
from rl.train.judge import reward_runner


def judge_of(config: RewardConfig, task: Any, reward: str | Mapping[str, Any] | None) -> RewardConfig:
    """The reward section of an evaluation: the reward that is named, else `RewardConfig.judges`.

    Failed verdicts do not end an evaluation, however many
    they are, since generations cost too much to lose: they are counted and shown.

    Args:
        config: mode, workers and time limit are taken from it.
        reward: a name, or a mapping with `name` and `params`; also either as YAML.

    Raises:
        ValueError: `reward` is neither.
    """
    part: Any = yaml.safe_load(reward) if isinstance(reward, str) and reward.startswith("{") else reward
    if not isinstance(part, Mapping):
        own = None if part else config.judges(task.reward)
        if own and len(own) > 1:
            raise ValueError("the task has no verifier and reward.functions several rewards: choose one by --reward")
        part = own[0].model_dump(include={"name", "params", "columns"}) if own else {"name": part}
    if not part.keys() <= {"name", "params", "columns"} or "name" not in part:
        raise ValueError(f"--reward {reward!r} must be a name, or {{name: NAME, params: {{...}}, columns: {{...}}}}")
    functions = [
        RewardPartConfig(name=part["name"], params=part.get("params") or {}, columns=part.get("columns") or {})
    ]
    return config.model_copy(update={"functions": functions, "max_failure_share": 1.0})


def reward_settings(config: RewardConfig) -> dict[str, Any]:
    """The one reward of `judge_of`, for settings."""
    return {"name": config.functions[0].name, "params": config.functions[0].params}


def load_examples(task: Any, file: str | None, limit: int | None, num_prompts: int) -> list[Example]:
    """The problems: of a file, of the benchmark, or the first `num_prompts` held-out ones of a task that draws them.

    Every example gets a `prompt_id` (its index) if it has none.

    Raises:
        ValueError: there are none, or two share an id.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    if file:
        examples = task.file_examples(file)
    elif isinstance(task, BenchmarkTask):
        examples = task.all_examples()
    else:
        examples = task.heldout_examples(num_prompts)
    examples = [{"prompt_id": str(index), **example} for index, example in enumerate(examples[:limit])]
    if not examples:
        raise ValueError("there is no problem to evaluate on: raise eval.num_prompts")
    seen: set[str] = set()
    for example in examples:
        if example["prompt_id"] in seen:
            raise ValueError(f"two problems have the id {example['prompt_id']!r}")
        seen.add(example["prompt_id"])
    return examples


def as_asked(examples: Sequence[Example], template: Template) -> list[Example]:
    """The examples with the template's text as their prompt: what rewards are told, without chat markup."""
    return [example | {"prompt": template.render(example)} for example in examples]


def score(
    rewards: RewardRunner,
    cut: Callable[[str], str] | None,
    examples: Sequence[Example],
    generations: Sequence[Generation],
    columns: Mapping[str, list[Any]],
) -> ScoreTable:
    """Give every generation its reward, or the reason why it has none.

    Args:
        cut: the part of a completion that is judged; None judges all of it.
        examples: example i is the problem of generation i.
        columns: more columns for the rewards, [M] values each.
    """
    judged = [cut(generation.completion) if cut else generation.completion for generation in generations]
    table = rewards.score(
        [example["prompt"] for example in examples], judged, reward_columns(examples, columns) | dict(columns)
    )
    for index, (generation, value) in enumerate(zip(generations, table.values, strict=True)):
        generation.reward = value
        generation.reason = None if value is not None else _reason(table, index)
        parts = [scores[index].metrics for scores in table.parts.values()]
        generation.metrics = {name: float(x) for part in parts for name, x in part.items() if math.isfinite(x)}
    return table


def _columns(generations: Sequence[Generation]) -> dict[str, list[Any]]:
    """The columns that the modality gave to rewards when these were sampled."""
    steps = [generation.steps for generation in generations]
    return {
        "completion_ids": [generation.completion_ids for generation in generations],
        "num_forwards": steps,
        "num_steps": steps,
        "reveal_steps": [generation.reveal_steps for generation in generations],
    }


def _reason(table: ScoreTable, index: int) -> str:
    verdicts = [scores[index] for scores in table.parts.values() if scores[index].value is None]
    failed = [verdict for verdict in verdicts if verdict.failed] or verdicts
    return str(failed[0].reason) if failed else "no reward applies"


def rescore(
    path: str,
    data: str | None,
    reward: str | None,
    config: RewardConfig,
    ks: Sequence[int] = (),
) -> tuple[GenerationFolder, dict[str, Figures], Template, list[Example]]:
    """Judge the generations of a folder again, and put the new verdicts and figures in the place of the old.

    Args:
        data: the problems' file, where it has moved or its references have been corrected.
        reward: another reward than the folder's.
        config: mode, workers and time limit of rewards.
        ks: see `figures`.

    Raises:
        ValueError: no such folder, or the problems are not those of the generations.
    """
    folder = GenerationFolder(path)
    settings = folder.settings
    task = load_task(settings["task"]["name"], settings["task"]["params"])
    source, template = settings["data"], saved_template(settings["template"])
    file = data or source["file"]
    examples = as_asked(load_examples(task, file, source["limit"], source["num_problems"]), template)
    if texts_hash(example["prompt"] for example in examples) != source["prompts_sha256"]:
        raise ValueError(f"{file or source['origin']} does not hold the problems that {folder.path} was made with")
    judge = judge_of(config, task, reward or settings["reward"])
    folder.open(settings)
    try:
        generations = folder.generations()
        by_id = {example["prompt_id"]: example for example in examples}
        # A prompt that was too long to answer keeps its reason.
        sampled = [generation for generation in generations if generation.steps]
        with reward_runner(judge.functions, judge) as rewards:
            if sampled:
                problems = [by_id[generation.prompt_id] for generation in sampled]
                score(rewards, template.cut, problems, sampled, _columns(sampled))
        folder.replace(generations)
        settings["reward"] = reward_settings(judge)
        settings["data"] |= {"file": file, "sha256": file_hash(file) if file else None}
        folder.write("settings.json", settings)
        return folder, write_results(folder, ks), template, examples
    finally:
        folder.close()


def write_results(folder: GenerationFolder, ks: Sequence[int] = ()) -> dict[str, Figures]:
    """Figures of every decoder in a folder, also written to its results.json."""
    settings = folder.settings
    generations, batches = folder.generations(), folder.batches()
    results = {}
    for name in settings["decoders"]:
        own = [generation for generation in generations if generation.decoder == name]
        spent = [batch for batch in batches if batch.decoder == name]
        results[name] = figures(own, spent, ks)
    summary: Mapping[str, Any] = {
        "task": settings["task"]["name"],
        "template": settings["template"]["name"],
        "reward": settings["reward"],
        "num_problems": settings["data"]["num_problems"],
        "samples": settings["samples"],
        "results": {name: figure.as_json() for name, figure in results.items()},
    }
    folder.write("results.json", summary)
    return results
