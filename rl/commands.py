"""What every sub-command of `denoise-rl` does with its arguments. Each imports what it needs when it is called.

A command returns None, or an exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def _config(args: argparse.Namespace) -> Any:
    from rl.config import load_config

    return load_config(args.config, args.overrides)


def train(args: argparse.Namespace) -> int | None:
    config = _config(args)
    if args.options:
        from rl.config import option_help

        for key, default, text in option_help(config):
            print(f"{key:34} {default:28} {text}")
        return None
    from rl.train.plan import plan_lines

    if args.dry_run:
        print("\n".join(plan_lines(config)))
        print("not looked at: task, rewards, files and what the recipe requires (denoise-rl check)")
        return None
    from rl import distributed
    from rl.train.interrupt import Stopped
    from rl.trainer import Trainer

    code = None
    try:
        Trainer(args=config).train()
    except Stopped as stop:
        code = stop.exit_code
    # After an error the group stays, since it tells `rl.cli.main` whether another rank may be the cause.
    distributed.stop()
    return code


def launch(args: argparse.Namespace) -> None:
    """This process becomes deepspeed's launcher, so signals and the exit code are its own."""
    for name in ("num_gpus", "num_nodes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    # A mistake in the config is one line now, and would be one of every rank later.
    _config(args)
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    for name in ("num_gpus", "num_nodes", "hostfile", "include", "master_port"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    # Ranks read the environment, and the flag that the launcher would add stands before the command's name.
    command += ["--no_local_rank", "--module", "rl.cli", "train"]
    command += [*(["--config", args.config] if args.config else []), *args.overrides]
    sys.stdout.flush()
    os.execv(command[0], command)


def sft(args: argparse.Namespace) -> int | None:
    return _one_stage(args, "sft")


def convert(args: argparse.Namespace) -> int | None:
    return _one_stage(args, "convert")


def _one_stage(args: argparse.Namespace, name: str) -> int | None:
    config = _config(args)
    if not getattr(config, name).steps:
        raise ValueError(f"{name}.steps is 0: set it to the number of updates")
    from rl import distributed
    from rl.train.convert import convert
    from rl.train.interrupt import Stopped, heeding_signals
    from rl.train.plan import check_run
    from rl.train.run import Run
    from rl.train.sft import supervised

    check_run(config)
    with Run.open(config) as run:
        try:
            with heeding_signals() as told_to_stop:
                summary = (supervised if name == "sft" else convert)(run, name, told_to_stop)
        except Stopped as stop:
            distributed.stop()
            return stop.exit_code
        if distributed.rank() == 0:
            model = run.folder / "model"
            run.save_model(model)
            print(f"model: {model}  " + "  ".join(f"{k} {v:.4g}" for k, v in summary.items()))
    distributed.stop()
    return None


def rollout(args: argparse.Namespace) -> None:
    from rl.sections import MAX_GROUP

    config = _config(args)
    folder = Path(args.output)
    if args.num_prompts < 1:
        raise ValueError(f"--num-prompts must be at least 1, got {args.num_prompts}")
    if not 1 <= args.group_size <= MAX_GROUP:
        raise ValueError(f"--group-size must lie in [1, {MAX_GROUP}], got {args.group_size}: seeds repeat beyond")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} exists: name a new or empty folder")
    if args.search is not None:
        if args.train or args.min_reward is not None:
            raise ValueError("--train and --min-reward are for rollouts without --search: leave them out")
        return _search(args, config, folder)
    if args.search_params is not None:
        raise ValueError("--search-params belongs to --search NAME")
    from rl.train.rollouts import rollout
    from rl.train.run import Run

    with Run.open(config, write=False) as run:
        _needs_model(config)
        task, number = run.task, args.num_prompts
        rows = task.train_examples(config.run.seed, 0, number) if args.train else task.heldout_examples(number)
        scored = rollout(run, run.engine(run.model), rows, args.group_size, seed=config.run.seed)
        rewards = scored.reward.tolist()
        kept = [i for i, reward in enumerate(rewards) if args.min_reward is None or reward >= args.min_reward]
        if not kept:
            largest = max((reward for reward in rewards if reward == reward), default=float("nan"))
            raise ValueError(f"--min-reward {args.min_reward:g}: no rollout has it, the largest is {largest:g}")
        folder.mkdir(parents=True, exist_ok=True)
        run.modality.save_trajectories(folder / "trajectories.npz", [scored.trajectories[i] for i in kept])
        with (folder / "rollouts.jsonl").open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in scored.lines(run.modality, kept))
    mean, count, unit = float(scored.reward.nanmean()), len(scored.trajectories), run.modality.unit
    speed = (scored.stats.generated_tokens if unit == "tokens" else count) / max(scored.stats.seconds, 1e-9)
    print(
        f"{count} rollouts, {len(kept)} saved, mean reward {mean:.3f} ({run.judge.names['reward']}), "
        f"{scored.stats.sequence_forwards} sequence forwards, {speed:,.{0 if speed >= 10 else 2}f} {unit}/s -> {folder}"
    )


def _needs_model(config: Any) -> None:
    if config.model.path is None:
        raise ValueError("model.path is required: the model would have random weights, so name a folder")


def _search(args: argparse.Namespace, config: Any, folder: Path) -> None:
    from rl.evaluation.search import parse_search, search_rollouts, write_search
    from rl.train.run import Run

    search = parse_search(args.search, args.search_params or {})
    with Run.open(config, write=False) as run:
        _needs_model(config)
        examples = run.task.heldout_examples(args.num_prompts)
        found = search_rollouts(run, examples, search, args.group_size)
        folder.mkdir(parents=True, exist_ok=True)
        write_search(folder, run, args.search, search, found)
    budget, count = found.budget, found.num_requests
    print(
        f"{args.search}: {len(found.trajectories)} samples of {count} searches, mean reward {found.mean_reward():.3f}, "
        f"per search {budget.denoiser_evaluations / count:.1f} denoiser and {budget.reward_evaluations / count:.1f} "
        f"reward evaluations, {budget.unscored} without a verdict -> {folder}"
    )


def align(args: argparse.Namespace) -> None:
    config = _config(args)
    from rl.evaluation import align as aligning

    tables = []
    for seed in args.seeds or [config.run.seed]:
        folder = f"{config.run.output_dir}/seed-{seed}" if args.seeds else config.run.output_dir
        run = config.run.model_copy(update={"seed": seed, "output_dir": folder})
        tables.append(aligning.align(config.model_copy(update={"run": run})))
    for line in aligning.summary_lines(tables):
        print(line)


def eval(args: argparse.Namespace) -> None:
    from rl.evaluation.command import eval_command

    for line in eval_command(args):
        print(line)


def check(args: argparse.Namespace) -> None:
    config = _config(args)
    from rl.train.plan import check_run, plan_lines

    if args.plan:
        from rl.train.memory import memory_lines

        ranks = args.ranks or int(os.environ.get("WORLD_SIZE", "1"))
        for number, name in ((ranks, "--ranks"), (args.prompt_length, "--prompt-length")):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        print("\n".join([*plan_lines(config, ranks), *memory_lines(config, ranks, args.prompt_length, args.memory)]))
        return
    notes = check_run(config, new=False)
    print("\n".join([*plan_lines(config), *notes]))
    print("config ok")


def score(args: argparse.Namespace) -> None:
    from rewards.tools import score_file

    report = score_file(
        args.file,
        args.reward,
        params=args.params,
        columns=args.columns,
        prompt=args.prompt,
        completion=args.completion,
        output=args.output,
        limit=args.limit,
        mode=args.mode,
        num_workers=args.num_workers,
        timeout_seconds=args.timeout_seconds,
    )
    print(report.text())


def chat(args: argparse.Namespace) -> None:
    from rich.console import Console

    from rl.evaluation.chat import Chat, chat_config, talk

    if args.temperature < 0:
        raise ValueError(f"--temperature must be at least 0, got {args.temperature:g}")
    config, templated = chat_config(args.model, args.config, args.overrides, args.steps, args.temperature)
    talk(Chat(config, templated if args.template is None else args.template), Console(highlight=False), args.prompt)


def inspect(args: argparse.Namespace) -> None:
    from rl.track.samples import sample_lines

    if args.n < 1:
        raise ValueError(f"--n must be at least 1, got {args.n}")
    print("\n".join(sample_lines(args.folder, args.n, args.step)))


def compare(args: argparse.Namespace) -> None:
    from rl.evaluation import compare as comparing

    config = _config(args)
    mixed = next((name for name in args.recipes if "=" in name), None)
    if mixed is not None:
        raise ValueError(f"--recipes {mixed!r} is no recipe: overrides of all runs come before --recipes and --variant")
    variants = {name: comparing.recipe_overrides(config, name) for name in args.recipes}
    for name, *overrides in args.variant:
        if name in variants or "=" in name:
            raise ValueError(f"--variant {name!r} must begin with a name that no other variant has")
        variants[name] = overrides
    if not variants:
        raise ValueError("there is nothing to compare: give --recipes or --variant")
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))}: a seed is there twice")
    comparison = comparing.ComparisonPlan(
        args.config, variants, args.seeds, Path(args.output), args.overrides, args.warm_start, args.jobs
    )
    table, results, plot = comparing.compare(comparison)
    print(f"{table}results: {results}\nplot:    {plot}")


def configs(args: argparse.Namespace) -> None:
    from rl.shipped import list_lines

    print("\n".join(list_lines()))


def init(args: argparse.Namespace) -> None:
    from rl.shipped import copy_config

    print(copy_config(args.name, args.folder))


def new_reward(args: argparse.Namespace) -> None:
    from rewards import tools

    for path in tools.new_reward(args.name):
        print(path)


def export(args: argparse.Namespace) -> None:
    from rl.train.checkpoint import export_policy

    print(export_policy(args.checkpoint, args.output, args.layout))


def plot(args: argparse.Namespace) -> None:
    from rl.track.plots import plot_learning_curve, plot_runs

    one = len(args.runs) == 1
    print(plot_learning_curve(args.runs[0], args.output) if one else plot_runs(args.runs, args.output))


def report(args: argparse.Namespace) -> None:
    from rl.track.report import write_report

    print(write_report(args.runs[0]))
