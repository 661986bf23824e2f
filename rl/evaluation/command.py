"""`denoise-rl eval`: count answers or keep them, judge kept ones again, export them, and say what came out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rl.config import Config, load_config
from rl.errors import about
from rl.evaluation.accuracy import Accuracy, evaluate, task_measures
from rl.evaluation.benchmark import EvalPlan, default_folder, run_benchmark
from rl.evaluation.export_samples import check_format, export_samples
from rl.evaluation.figures import Figures, table
from rl.evaluation.generations import GenerationFolder
from rl.evaluation.scoring import rescore
from rl.tasks.base import Example
from rl.tasks.load import modality_of
from rl.tasks.templates import Template
from rl.train.run import Run

NOT_WITH_RESCORE = ("task", "template", "decoding", "samples", "temperature", "limit", "output")


def eval_config(path: str | None, overrides: Sequence[str], task: str | None) -> Config:
    """The config of an evaluation; where `task` is not the config's own, its parameters do not apply."""
    config = load_config(path, overrides)
    if task is None or task == config.task.name:
        return config
    return load_config(path, [f"task.name={task}", "task.params={}", *overrides])


def eval_command(args: argparse.Namespace) -> list[str]:
    """`denoise-rl eval`; returns the lines to print.

    Raises:
        ValueError: anything the user got wrong, in one line.
    """
    names = (*NOT_WITH_RESCORE, "pass_k", "reward", "export", "rescore")
    asked = any(getattr(args, name) is not None for name in names if name != "output")
    return _kept(args) if asked or not (args.output or ".json").endswith(".json") else _counted(args)


def _counted(args: argparse.Namespace) -> list[str]:
    """Greedy accuracy at every number of steps, kept in a JSON file or nowhere."""
    config = load_config(args.config, args.overrides)
    if config.model.path is None and config.eval.baseline is None:
        raise ValueError("model.path is required: name the folder of the model to evaluate")
    if args.output and not Path(args.output).parent.is_dir():
        # Found out now and not when the evaluation is done.
        raise ValueError(f"--output {args.output}: folder {Path(args.output).parent} does not exist, make it first")
    baseline = config.eval.baseline
    results: dict[int, Accuracy] = {}
    measured: dict[int, dict[str, float]] = {}
    others: dict[int, Accuracy] = {}
    with Run.open(config.of_baseline() if config.model.path is None else config, write=False) as run:
        with about(f"--data {args.data}" if args.data else "task.params"):
            task = run.task
            examples = task.file_examples(args.data) if args.data else task.heldout_examples(config.eval.num_prompts)
        if config.model.path is not None:
            results, made = evaluate(run, examples, config.evaluation_steps())
            measured = {steps: task_measures(run, examples, results[steps], made[steps]) for steps in results}
        if baseline is not None:
            other = run if config.model.path is None else run.of_baseline()
            others, _ = evaluate(other, examples, other.config.evaluation_steps())
    names = run.judge.names
    lines = [f"{names['measure']}, judged by {names['judge']}", *_result_lines(results, run.modality.unit, measured)]
    if baseline is not None:
        lines += [f"autoregressive, {baseline}", *_result_lines(others, run.modality.unit, {})]
    if args.output:
        payload = {
            "task": config.task.name,
            "model": config.model.path,
            "data": args.data,
            "judge": names["judge"],
            "sampler": config.sampler.model_dump(),
            "results": {s: result.as_json() | {"measured": measured[s]} for s, result in results.items()},
        }
        if baseline is not None:
            found = {str(steps): result.as_json() for steps, result in others.items()}
            payload["baseline"] = {"model": baseline, "results": found}
        Path(args.output).write_text(json.dumps(payload, indent=1))
    return lines


def _result_lines(results: dict[int, Accuracy], unit: str, measured: dict[int, dict[str, float]]) -> list[str]:
    lines = []
    for steps, result in results.items():
        lines.append(
            f"{steps:4d} steps: {result.value:.3f}  95% [{result.low:.3f}, {result.high:.3f}]  "
            f"n={result.num_prompts}  unscored={result.unscored}"
            + (f"  tokens/forward={result.tokens_per_forward:.2f}" if unit == "tokens" else "")
        )
        if result.backslide is not None:
            lines.append(f"            {result.backslide.line()}")
        if shares := measured.get(steps):
            lines.append("            " + "  ".join(f"{name} {value:.3f}" for name, value in sorted(shares.items())))
    return lines


def _kept(args: argparse.Namespace) -> list[str]:
    """With any of the options that keep generations."""
    if args.export and not args.rescore:
        check_format(args.export, args.task or load_config(args.config, args.overrides).task.name)
    config = eval_config(args.config, args.overrides, args.task)
    ks = _numbers(args.pass_k) if args.pass_k else ()
    if args.rescore:
        unused = [name for name in NOT_WITH_RESCORE if getattr(args, name) is not None]
        if unused:
            option = unused[0].replace("_", "-")
            raise ValueError(f"--{option} has no meaning with --rescore: the folder's own settings hold")
        return report(*rescore(args.rescore, args.data, args.reward, config.reward, ks), args.export)
    if args.output and args.output.endswith(".json"):
        raise ValueError(f"--output {args.output} must name a folder: generations are kept with these options")
    modality = modality_of(config.task.name).name
    if modality != "text":
        raise ValueError(
            f"generations are kept of text, and task.name {config.task.name!r} is about {modality}: give no option but "
            "--data and --output FILE.json"
        )
    plan = EvalPlan(
        data=args.data,
        template=args.template,
        decodings=args.decoding.split(",") if args.decoding else (),
        samples=1 if args.samples is None else args.samples,
        temperature=args.temperature,
        limit=args.limit,
        output=args.output,
        ks=ks,
        reward=args.reward,
    )
    lines: list[str] = []
    if config.model.path is not None or config.eval.baseline is None:
        lines += report(*run_benchmark(config, plan), args.export)
        plan = replace(plan, output=f"{plan.output or default_folder(config)}/autoregressive", decodings=())
    if config.eval.baseline is not None:
        lines += report(*run_benchmark(config.of_baseline(), plan), args.export)
    return lines


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--pass-k {text!r} must be whole numbers joined by commas") from None


def report(
    folder: GenerationFolder,
    results: dict[str, Figures],
    template: Template,
    examples: Sequence[Example],
    export: str | None = None,
) -> list[str]:
    """The lines that an evaluation prints: the conventions it followed, the table, and where everything is."""
    if not results:  # a rank that does not write
        return []
    settings = folder.settings
    asked = "chat" if settings["template"]["chat"] else "plain"
    source = settings["data"]["file"] or settings["data"]["origin"]
    name, params = settings["reward"]["name"], settings["reward"]["params"]
    lines = [
        f"{settings['task']['name']}: {len(examples)} problems, {source}",
        f"template {template.name} ({template.source}; {asked}), reward {name}{params or ''}, seed {settings['seed']}",
        *table(results),
    ]
    wanted = len(examples) * settings["samples"]
    lines += [
        f"not generated yet, {name}: {wanted - figure.num_completions} of {wanted} completions"
        for name, figure in results.items()
        if figure.num_completions < wanted
    ]
    if export:
        lines += [f"{export}: {path}" for path in export_samples(folder, export, template, examples)]
    return [*lines, f"generations, settings and results: {folder.path}"]
