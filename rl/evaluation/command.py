"""The library behind `denoise-rl eval` with kept generations: run or re-score, export, and say what came out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rl.config import Config, load_config
from rl.evaluation.benchmark import EvalPlan, run_benchmark
from rl.evaluation.export_samples import check_format, export_samples
from rl.evaluation.figures import Figures, table
from rl.evaluation.generations import GenerationFolder
from rl.evaluation.scoring import rescore
from rl.tasks.base import Row
from rl.tasks.templates import Template

NOT_WITH_RESCORE = ("task", "template", "decoding", "samples", "temperature", "limit", "output")


def eval_config(path: str | None, overrides: Sequence[str], task: str | None) -> Config:
    """The config of an evaluation; where `task` is not the config's own, its parameters do not apply."""
    config = load_config(path, overrides)
    if task is None or task == config.task.name:
        return config
    return load_config(path, [f"task.name={task}", "task.params={}", *overrides])


def eval_command(args: argparse.Namespace) -> list[str]:
    """`denoise-rl eval` with any of its options that keep generations; returns the lines to print.

    Raises:
        ValueError: anything the user got wrong, in one line.
    """
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
    return report(*run_benchmark(config, plan), args.export)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--pass-k {text!r} must be whole numbers joined by commas") from None


def report(
    folder: GenerationFolder,
    results: dict[str, Figures],
    template: Template,
    rows: Sequence[Row],
    export: str | None = None,
) -> list[str]:
    """What an evaluation prints: the conventions it followed, the table, and where everything is."""
    if not results:  # a rank that does not write
        return []
    settings = folder.settings
    asked = "chat" if settings["template"]["chat"] else "plain"
    name, params = settings["reward"]["name"], settings["reward"]["params"]
    lines = [
        f"{settings['task']['name']}: {len(rows)} problems, {settings['data']['file'] or settings['data']['origin']}",
        f"template {template.name} ({template.source}; {asked}), reward {name}{params or ''}, seed {settings['seed']}",
        *table(results),
    ]
    wanted = len(rows) * settings["samples"]
    lines += [
        f"not generated yet, {name}: {wanted - figure.num_completions} of {wanted} completions"
        for name, figure in results.items()
        if figure.num_completions < wanted
    ]
    if export:
        lines += [f"{export}: {path}" for path in export_samples(folder, export, template, rows)]
    return [*lines, f"generations, settings and results: {folder.path}"]
