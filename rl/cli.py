"""The `denoise-rl` command. Thin: every sub-command parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns the exit code: 0 done, 1 failed, 2 the user's input is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    foreign = _foreign_package()
    if foreign:
        return _complain(foreign, 2)
    try:
        parsed, extra = _parser().parse_known_args(arguments)
        if extra and not getattr(parsed, "takes_overrides", False):
            raise ValueError(f"unknown argument {extra[0]!r}: see denoise-rl {parsed.command} --help")
        parsed.overrides = [*getattr(parsed, "overrides", []), *_dashed(extra)]
        return int(parsed.run(parsed) or 0)
    except ValueError as error:
        from rl.errors import is_message

        # Any other ValueError is a bug, and needs its traceback.
        if not is_message(error):
            raise
        return _complain(error, 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except OSError as error:
        # A full disk, a folder that may not be written: nothing that a traceback would explain better.
        return _complain(error, 1)
    except RuntimeError as error:
        # Failures that training itself detects (TrainingError, RewardFailureError) explain themselves.
        if type(error).__module__.split(".")[0] in ("rl", "rewards", "rollouts"):
            return _complain(error, 1)
        from rl.train import distributed

        if not distributed.is_lost_rank(error):
            raise
        _complain(f"another rank ended or is stuck (see what it says): {error}", 1)
        # A launcher reports the first rank that it finds ended. Leave it the time to find the one that was.
        time.sleep(5)
        return 1


def _complain(error: object, code: int) -> int:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    who = f"denoise-rl: rank {os.environ['RANK']}" if several else "denoise-rl"
    print(f"{who}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code


def _foreign_package() -> str | None:
    """`rl`, `rewards` and `rollouts` are also names on PyPI: the complaint when ours are not the ones imported."""
    import rewards
    import rl
    import rollouts

    home = Path(rl.__file__).resolve().parent.parent
    for package in (rewards, rollouts):
        where = Path(package.__file__ or "").resolve().parent.parent
        if where != home:
            return (
                f"another package named {package.__name__!r} is installed at {where}: pip uninstall "
                f"{package.__name__}, then install denoise-rl again"
            )
    return None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage of the whole command before it.
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="denoise-rl", description="Reinforcement learning for diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: object, text: str, config: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run, takes_overrides=config)
        if config:
            command.add_argument("--config", metavar="FILE", help="YAML config; without it the defaults")
            command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, train.steps=10")
            # The deepspeed launcher passes it; ranks are read from the environment.
            command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
        return command

    train = add("train", _train, "Warm-start (if the config says so), train by RL, evaluate, report.")
    train.add_argument("--dry-run", action="store_true", help="print the derived numbers and stop")
    train.add_argument("--options", action="store_true", help="list every config key and stop")
    add("sft", _sft, "Run the supervised stage only and save the model.")
    rollout = add("rollout", _rollout, "Sample rollouts of a model and save trajectories and scores.")
    rollout.add_argument("--output", metavar="FOLDER", required=True, help="where trajectories and scores go")
    rollout.add_argument("--num-prompts", type=int, default=8, help="held-out prompts to sample")
    rollout.add_argument("--group-size", type=int, default=1, help="rollouts, or searches, per prompt")
    rollout.add_argument("--search", metavar="NAME", help="search for high rewards: best_of_n, svdd, ... (docs)")
    rollout.add_argument("--search-params", metavar="YAML", help="options of the search, {num_samples: 16}")
    compare = add("align", _align, "Compare searches and recipes that align one pretrained model with one reward.")
    compare.add_argument("--seeds", type=int, nargs="+", metavar="N", help="a table for each run.seed")
    evaluate = add("eval", _eval, "Accuracy of a model on a task by decoder and number of denoising steps.")
    evaluate.add_argument("--data", metavar="FILE", help="problems in the task's published file format")
    evaluate.add_argument(
        "--output", metavar="FOLDER", help="keep generations here and continue there (FILE.json: none)"
    )
    kept = evaluate.add_argument_group(
        "with all generations kept (any of these, or --output FOLDER; docs/evaluation.md)"
    )
    kept.add_argument("--task", help="gsm8k, math500, aime24, humaneval, mbpp, livecodebench, or any other task")
    kept.add_argument("--template", help="prompt template of the task by name, or a text file with {column}s")
    kept.add_argument(
        "--decoding", help="static, dynamic, threshold, left_to_right or presets (docs/decoders.md), joined by commas"
    )
    kept.add_argument("--samples", type=int, help="completions per problem")
    kept.add_argument("--temperature", type=float, help="sampling temperature; 0, greedy, when not given")
    kept.add_argument("--limit", type=int, help="only the first so many problems")
    kept.add_argument("--pass-k", metavar="K,K", help="pass@k to give; powers of two when not given")
    kept.add_argument("--export", metavar="FORMAT", help="also write samples for human-eval, evalplus or livecodebench")
    kept.add_argument("--reward", help="judge by another reward than the task's: a name, or {name: NAME, params: {}}")
    kept.add_argument("--rescore", metavar="FOLDER", help="judge the generations of a folder again, without a model")
    check = add("check", _check, "Check a config, the installation and the DeepSpeed JSON without training.")
    check.add_argument("--plan", action="store_true", help="estimate the memory per rank instead; needs no checkpoint")
    check.add_argument("--ranks", type=int, help="with --plan: number of ranks; this process's when not given")
    check.add_argument("--prompt-length", type=int, default=256, help="with --plan: tokens of a prompt")
    check.add_argument("--memory", type=float, metavar="GIB", help="with --plan: fail when a rank needs more")
    score = add("score", _score, "Run a reward over a JSON-lines file of samples.", config=False)
    score.add_argument("file", metavar="FILE", help="one JSON object a line, with prompt and completion")
    score.add_argument("--reward", required=True, help="registered name, pkg.module:function, or path/file.py:function")
    score.add_argument("--params", default="{}", metavar="YAML", help="parameters of the reward, {tolerance: 0.1}")
    score.add_argument("--columns", default="{}", metavar="YAML", help="argument of the reward -> field of the file")
    score.add_argument("--prompt", default="prompt", help="field of the prompt")
    score.add_argument("--completion", default="completion", help="field of the completion or completions")
    score.add_argument("--output", metavar="FILE", help="write every verdict as JSON lines")
    score.add_argument("--limit", type=int, help="score only the first lines")
    score.add_argument("--mode", choices=("inline", "process"), default="process", help="where the reward runs")
    score.add_argument("--num-workers", type=int, default=1, help="child processes in mode process")
    score.add_argument("--timeout-seconds", type=float, default=10.0, help="limit of one scoring call")
    compare = add("compare", _compare, "Train recipes from the same warm starts over several seeds; table and plot.")
    compare.add_argument("--recipes", nargs="+", default=[], metavar="NAME", help="recipes with their own defaults")
    compare.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar="NAME [key=value ...]", help="the config, changed"
    )
    compare.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run each; 0 1 2 when not given")
    compare.add_argument("--output", metavar="FOLDER", required=True, help="runs, table.md, results.json, budgets.png")
    compare.add_argument("--warm-start", metavar="FOLDER", help="one model for every seed, instead of a stage per seed")
    compare.add_argument("--jobs", type=int, default=1, help="runs at a time")
    new_reward = add("new-reward", _new_reward, "Write a working reward plugin and its test.", config=False)
    new_reward.add_argument("name", help="my_reward, or folder/my_reward.py")
    export = add("export", _export, "Copy the policy of a checkpoint to a plain folder, or convert it.", config=False)
    export.add_argument("checkpoint", help="run folder, one of its checkpoints/step_N, or a model folder")
    export.add_argument("output", help="new folder for the model and tokenizer")
    export.add_argument("--layout", metavar="NAME", help="published layout: llada, dream, sdar or file.py:Class")
    for name, run, text in (
        ("plot", _plot, "Draw the learning curve of one run, or of several."),
        ("report", _report, "Write the HTML report of a run."),
    ):
        command = add(name, run, text, config=False)
        command.add_argument("runs", nargs="+" if name == "plot" else 1, metavar="RUN", help="run folder")
    return parser


def _dashed(extra: Sequence[str]) -> list[str]:
    """`--a.b c` and `--a.b=c` as `a.b=c`."""
    overrides, rest = [], list(extra)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            overrides.append(word)
        elif "=" in word:
            overrides.append(word[2:])
        elif rest:
            overrides.append(f"{word[2:]}={rest.pop(0)}")
        else:
            raise ValueError(f"override {word!r} has no value: write {word} VALUE or {word[2:]}=VALUE")
    return overrides


def _config(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from rl.config import load_config

    return load_config(args.config, args.overrides)


def _train(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.options:
        from rl.config import option_help

        for key, default, text in option_help(config):
            print(f"{key:34} {default:28} {text}")
        return 0
    from rl.train.plan import plan_lines

    if args.dry_run:
        print("\n".join(plan_lines(config)))
        print("not looked at: task, rewards, files and what the recipe requires (denoise-rl check)")
        return 0
    from rl.train import distributed
    from rl.train.finish import finish
    from rl.train.plan import check_run
    from rl.train.run import Run

    check_run(config)
    with Run.open(config) as run:
        from rl.train.interrupt import EXIT_CODE, Stopped
        from rl.train.loop import train

        for line in plan_lines(config):
            run.progress.message(line)
        try:
            train(run)
        except Stopped:
            distributed.stop()
            return EXIT_CODE
    if distributed.rank() == 0:
        finish(run.folder)
    distributed.stop()
    return 0


def _sft(args: argparse.Namespace) -> int:
    config = _config(args)
    if not config.sft.steps:
        raise ValueError("sft.steps is 0: set it to the number of supervised updates")
    from rl.train import distributed
    from rl.train.plan import check_run
    from rl.train.run import Run
    from rl.train.sft import supervised

    check_run(config)
    with Run.open(config) as run:
        summary = supervised(run)
        if distributed.rank() == 0:
            model = run.folder / "model"
            # A comparison takes a folder of this name for a finished stage.
            partial = model.with_name("model.partial")
            shutil.rmtree(partial, ignore_errors=True)
            run.save_model(partial)
            shutil.rmtree(model, ignore_errors=True)
            os.replace(partial, model)
            print(f"model: {model}  " + "  ".join(f"{k} {v:.4g}" for k, v in summary.items()))
    distributed.stop()
    return 0


def _rollout(args: argparse.Namespace) -> int:
    config = _config(args)
    folder = Path(args.output)
    for number, name in ((args.num_prompts, "--num-prompts"), (args.group_size, "--group-size")):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} exists: name a new or empty folder")
    if args.search is not None:
        return _search(args, config, folder)
    if args.search_params is not None:
        raise ValueError("--search-params belongs to --search NAME")
    from rl.train.rollouts import rollout
    from rl.train.run import Run

    with Run.open(config, write=False) as run:
        rows = run.task.heldout_rows(args.num_prompts)
        scored = rollout(run, run.engine(run.model), rows, args.group_size, seed=config.run.seed)
        folder.mkdir(parents=True, exist_ok=True)
        run.modality.save_trajectories(folder / "trajectories.npz", scored.trajectories)
        with (folder / "rollouts.jsonl").open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in scored.lines(run.modality))
    mean = float(scored.reward.nanmean())
    print(
        f"{len(scored.trajectories)} rollouts, mean reward {mean:.3f}, {scored.stats.sequence_forwards} sequence "
        f"forwards, {scored.stats.generated_tokens / max(scored.stats.seconds, 1e-9):,.0f} tokens/s -> {folder}"
    )
    return 0


def _search(args: argparse.Namespace, config: Any, folder: Path) -> int:
    import yaml

    from rl.evaluation.search import parse_search, search_rollouts, write_search
    from rl.train.run import Run

    try:
        params = yaml.safe_load(args.search_params or "{}")
    except yaml.YAMLError as error:
        raise ValueError(f"--search-params is not valid YAML: {error}") from None
    if not isinstance(params, dict):
        raise ValueError(f"--search-params must be a mapping like {{num_samples: 16}}, got {args.search_params!r}")
    search = parse_search(args.search, params)
    with Run.open(config, write=False) as run:
        examples = run.task.heldout_rows(args.num_prompts)
        found = search_rollouts(run, examples, search, args.group_size)
        folder.mkdir(parents=True, exist_ok=True)
        write_search(folder, run, args.search, search, found)
    budget, count = found.budget, found.num_requests
    print(
        f"{args.search}: {len(found.trajectories)} samples of {count} searches, mean reward {found.mean_reward():.3f}, "
        f"per search {budget.denoiser_evaluations / count:.1f} denoiser and {budget.reward_evaluations / count:.1f} "
        f"reward evaluations, {budget.unscored} without a verdict -> {folder}"
    )
    return 0


def _align(args: argparse.Namespace) -> int:
    config = _config(args)
    from rl.evaluation.align import align, summary_lines

    tables = []
    for seed in args.seeds or [config.run.seed]:
        folder = f"{config.run.output_dir}/seed-{seed}" if args.seeds else config.run.output_dir
        run = config.run.model_copy(update={"seed": seed, "output_dir": folder})
        tables.append(align(config.model_copy(update={"run": run})))
    for line in summary_lines(tables):
        print(line)
    return 0


def _eval(args: argparse.Namespace) -> int:
    from rl.evaluation.command import eval_command

    for line in eval_command(args):
        print(line)
    return 0


def _check(args: argparse.Namespace) -> int:
    config = _config(args)
    from rl.train.plan import check_run, plan_lines

    if args.plan:
        from rl.train.memory import memory_lines

        ranks = args.ranks or int(os.environ.get("WORLD_SIZE", "1"))
        for number, name in ((ranks, "--ranks"), (args.prompt_length, "--prompt-length")):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        print("\n".join([*plan_lines(config, ranks), *memory_lines(config, ranks, args.prompt_length, args.memory)]))
        return 0
    notes = check_run(config, new=False)
    print("\n".join([*plan_lines(config), *notes]))
    print("config ok")
    return 0


def _score(args: argparse.Namespace) -> int:
    import yaml

    from rewards.tools import score_file

    report = score_file(
        args.file,
        args.reward,
        params=yaml.safe_load(args.params),
        columns=yaml.safe_load(args.columns),
        prompt=args.prompt,
        completion=args.completion,
        output=args.output,
        limit=args.limit,
        mode=args.mode,
        num_workers=args.num_workers,
        timeout_seconds=args.timeout_seconds,
    )
    print(report.text())
    return 0


def _compare(args: argparse.Namespace) -> int:
    from rl.evaluation.compare import ComparisonPlan, compare, recipe_overrides

    config = _config(args)
    mixed = next((name for name in args.recipes if "=" in name), None)
    if mixed is not None:
        raise ValueError(f"--recipes {mixed!r} is no recipe: overrides of all runs come before --recipes and --variant")
    variants = {name: recipe_overrides(config, name) for name in args.recipes}
    for name, *overrides in args.variant:
        if name in variants or "=" in name:
            raise ValueError(f"--variant {name!r} must begin with a name that no other variant has")
        variants[name] = overrides
    if not variants:
        raise ValueError("there is nothing to compare: give --recipes or --variant")
    comparison = ComparisonPlan(
        args.config, variants, args.seeds, Path(args.output), args.overrides, args.warm_start, args.jobs
    )
    table, results, plot = compare(comparison)
    print(f"{table}results: {results}\nplot:    {plot}")
    return 0


def _new_reward(args: argparse.Namespace) -> int:
    from rewards.tools import new_reward

    for path in new_reward(args.name):
        print(path)
    return 0


def _export(args: argparse.Namespace) -> int:
    from rl.train.checkpoint import export_policy

    print(export_policy(args.checkpoint, args.output, args.layout))
    return 0


def _plot(args: argparse.Namespace) -> int:
    from rl.track.plots import plot_learning_curve, plot_runs

    print(plot_learning_curve(args.runs[0]) if len(args.runs) == 1 else plot_runs(args.runs))
    return 0


def _report(args: argparse.Namespace) -> int:
    from rl.track.report import write_report

    print(write_report(args.runs[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
