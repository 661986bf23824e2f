"""Completions of a code benchmark in the formats that the benchmarks' own scorers read.

human-eval      JSON lines of {task_id, completion}: `evaluate_functional_correctness FILE`
evalplus        JSON lines of {task_id, solution}: `evalplus.evaluate --dataset humaneval --samples FILE`
livecodebench   a list of {question_id, code_list}: `lcb_runner.runner.custom_evaluator --custom_output_file FILE`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rewards.code_tests import extract_code
from rl.evaluation.generations import Generation, GenerationFolder
from rl.tasks.base import Example
from rl.tasks.templates import Template

# format -> the tasks it is for
FORMATS = {
    "human-eval": ("humaneval",),
    "evalplus": ("humaneval", "mbpp"),
    "livecodebench": ("livecodebench",),
}


def check_format(name: str, task: str) -> None:
    """Raise ValueError when there is no such format, or not for this task."""
    if name not in FORMATS:
        raise ValueError(f"--export {name!r} does not exist: choose from {', '.join(FORMATS)}")
    if task not in FORMATS[name]:
        raise ValueError(f"--export {name} is for the task {' or '.join(FORMATS[name])}, not for {task}")


def export_samples(folder: GenerationFolder, name: str, template: Template, examples: Sequence[Example]) -> list[Path]:
    """Write one file per decoder into the folder.

    A problem without any completion is in no file; one that was too long to ask has an empty completion.

    Args:
        name: a key of `FORMATS`.
        template: the one that the completions were asked with; it says where they end.
        examples: the problems.

    Returns:
        the files, `human-eval-static@8.jsonl`.

    Raises:
        ValueError: no such format, or not for this task.
    """
    settings = folder.settings
    check_format(name, settings["task"]["name"])
    generations = folder.generations()
    files = []
    for decoder in settings["decoders"]:
        own = [generation for generation in generations if generation.decoder == decoder]
        if name == "livecodebench":
            path = folder.path / f"{name}-{decoder}.json"
            path.write_text(json.dumps(_livecodebench(own, template, examples), indent=1) + "\n")
        else:
            path = folder.path / f"{name}-{decoder}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in _lines(own, name, template, examples)))
        files.append(path)
    return files


def program_of(example: Example, template: Template, completion: str) -> str:
    """The program that a completion means: its code, after the problem's own text where it only continues that."""
    code = extract_code(template.cut(completion))
    prefix = example.get("code_prefix")
    return f"{prefix}{code}" if prefix and not template.chat else code


def _lines(
    generations: Sequence[Generation], name: str, template: Template, examples: Sequence[Example]
) -> list[dict[str, str]]:
    by_id = {example["prompt_id"]: example for example in examples}
    lines = []
    for generation in generations:
        example = by_id[generation.prompt_id]
        if name == "evalplus":
            answer = {"solution": program_of(example, template, generation.completion)}
        else:
            code = extract_code(template.cut(generation.completion))
            # human-eval puts the completion directly after the prompt.
            answer = {"completion": code if not template.chat else f"\n{code}"}
        lines.append({"task_id": generation.prompt_id, **answer})
    return lines


def _livecodebench(
    generations: Sequence[Generation], template: Template, examples: Sequence[Example]
) -> list[dict[str, object]]:
    codes: dict[str, list[str]] = {example["prompt_id"]: [] for example in examples}
    for generation in sorted(generations, key=lambda generation: generation.sample):
        codes[generation.prompt_id].append(extract_code(template.cut(generation.completion)))
    return [{"question_id": prompt_id, "code_list": code_list} for prompt_id, code_list in codes.items() if code_list]
