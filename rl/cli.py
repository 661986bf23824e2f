"""The `denoise-rl` command. Thin: every sub-command parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rl import commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns the exit code: 0 done, 1 failed, 2 the user's input is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    foreign = _foreign_package()
    if foreign:
        return _complain(foreign, 2)
    try:
        parsed, extra = _parser().parse_known_args(_apart([_at_home(word) for word in arguments]))
        if extra and not getattr(parsed, "takes_overrides", False):
            raise ValueError(f"unknown argument {extra[0]!r}: see denoise-rl {parsed.command} --help")
        for word in extra:
            # An override has a dot in its key; anything else with dashes is a flag that there is not.
            if word.startswith("--") and "." not in word.split("=")[0]:
                raise ValueError(f"unknown argument {word!r}: {_nearest_flag(word, parsed.parser)}")
        parsed.overrides = [*getattr(parsed, "overrides", []), *_dashed(extra)]
        return int(parsed.run(parsed) or 0)
    except (ValueError, NotImplementedError) as error:
        # Ours says so of a method that a user's class has to write.
        from rl.errors import is_message

        return _complain(error, 2) if is_message(error) else _failed(error)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    """The exit code for an error that is no message for the user.

    Raises:
        Exception: `error` itself, where it is a bug of ours and needs its traceback.
    """
    from rewards.address import place_in_plugin

    if isinstance(error, RuntimeError):
        from rl import distributed

        if distributed.is_lost_rank(error):
            _complain(f"another rank ended or is stuck (see what it says): {error}", 1)
            # A launcher reports the first rank that it finds ended. Leave it the time to find the one that was.
            time.sleep(5)
            return 1
    place = place_in_plugin(error)
    if place:
        return _complain(f"{place}: {type(error).__name__}: {error} (DENOISE_RL_TRACEBACK=1 shows the traceback)", 1)
    # A full disk, a folder that may not be written: nothing that a traceback would explain better. Failures that
    # training itself detects (TrainingError, RewardFailureError) explain themselves.
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("rl", "rewards", "rollouts"):
        return _complain(error, 1)
    raise error


def _complain(error: object, code: int) -> int:
    if os.environ.get("DENOISE_RL_TRACEBACK", "0") != "0":
        traceback.print_exc()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    who = f"denoise-rl: rank {os.environ.get('RANK', '?')}" if several else "denoise-rl"
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


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        # Slow to import, and nothing else here needs it.
        from importlib.metadata import version

        print(f"denoise-rl {version('denoise-rl')}")
        parser.exit()


def _nearest_flag(word: str, command: argparse.ArgumentParser) -> str:
    """A hint for a flag that a command does not have."""
    near = difflib.get_close_matches(word.split("=")[0], re.findall(r"--[\w-]+", command.format_help()), n=1)
    return f"did you mean {near[0]}?" if near else f"see {command.prog} --help"


def _at_home(word: str) -> str:
    """A word with `~/` at its start or behind its `=` in the user's home: a shell replaces only the first."""
    key, equals, value = word.partition("=")
    if equals and value.startswith("~/"):
        return f"{key}={Path(value).expanduser()}"
    return str(Path(word).expanduser()) if word.startswith("~/") else word


def _apart(words: list[str]) -> list[str]:
    """Overrides behind `--seeds` and `--recipes`, which take several, get dashes: `--seeds 0 --run.seed=5`."""
    option, apart = "", []
    for word in words:
        option = word if word.startswith("-") else option
        override = option in ("--seeds", "--recipes") and "." in word.partition("=")[0] and "=" in word
        apart.append(f"--{word}" if override and word != option else word)
    return apart


def _seed(text: str) -> int:
    if not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number (an override of a section comes before --seeds)")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="denoise-rl", description="Reinforcement learning for diffusion models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: object, text: str, config: bool = True, first: tuple[str, str] | None = None
    ) -> argparse.ArgumentParser:
        command = parsers.add_parser(name, help=text, description=text)
        command.set_defaults(run=run, takes_overrides=config, parser=command)
        if first:
            command.add_argument(first[0], help=first[1])
        if config:
            command.add_argument(
                "--config",
                metavar="FILE",
                help="YAML config, or a name of `denoise-rl configs`; without it the defaults",
            )
            command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, train.steps=10")
            # The deepspeed launcher passes it; ranks are read from the environment.
            command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
        return command

    train = add("train", commands.train, "Warm-start (if the config says so), train by RL, evaluate, report.")
    train.add_argument("--dry-run", action="store_true", help="print the derived numbers and stop")
    train.add_argument("--options", action="store_true", help="list every config key and stop")
    launch = add("launch", commands.launch, "Train on several devices: `train` under the deepspeed launcher.")
    launch.add_argument("--num-gpus", type=int, metavar="N", help="processes of a node; its GPUs when not given")
    launch.add_argument("--num-nodes", type=int, metavar="N", help="nodes of the hostfile; all when not given")
    launch.add_argument("--hostfile", metavar="FILE", help="a line per node, `node0 slots=8`")
    launch.add_argument("--include", metavar="HOST:GPUS", help="only these devices, localhost:0,1,4,5")
    launch.add_argument("--master-port", type=int, metavar="PORT", help="where ranks meet, 29500 when not given")
    add("convert", commands.convert, "Make a diffusion model of an autoregressive one and save it.")
    add("sft", commands.sft, "Run the supervised stage only and save the model.")
    rollout = add("rollout", commands.rollout, "Sample rollouts of a model and save trajectories and scores.")
    rollout.add_argument("--output", metavar="FOLDER", required=True, help="where trajectories and scores go")
    rollout.add_argument("--num-prompts", type=int, default=8, help="held-out prompts to sample")
    rollout.add_argument("--group-size", type=int, default=1, help="rollouts, or searches, per prompt")
    rollout.add_argument("--train", action="store_true", help="sample training prompts: rollouts for sft.trajectories")
    rollout.add_argument("--min-reward", metavar="R", type=float, help="save no rollout of a smaller reward")
    rollout.add_argument("--search", metavar="NAME", help="search for high rewards: best_of_n, svdd, ... (docs)")
    rollout.add_argument(
        "--search-params", metavar="YAML", type=_mapping, help="options of the search, {num_samples: 16}"
    )
    compare = add(
        "align", commands.align, "Compare searches and recipes that align one pretrained model with one reward."
    )
    compare.add_argument("--seeds", type=_seed, nargs="+", metavar="N", help="a table for each run.seed")
    evaluate = add("eval", commands.eval, "Accuracy of a model on a task by decoder and number of denoising steps.")
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
    model = ("model", "run folder, checkpoint, model or adapter folder, or hub name")
    chat = add("chat", commands.chat, "Answer prompts, and show on a terminal how answers are denoised.", first=model)
    chat.add_argument("--prompt", metavar="TEXT", help="answer this and end; else every line of standard input")
    chat.add_argument("--steps", type=int, metavar="N", help="denoising steps; the config's when not given")
    chat.add_argument("--temperature", type=float, default=0.0, help="of the tokens; 0, greedy, when not given")
    chat.add_argument(
        "--template",
        action=argparse.BooleanOptionalAction,
        help="put prompts into the chat template; not given: as the run did (task.chat), else where there is one",
    )
    check = add("check", commands.check, "Check a config, the installation and the DeepSpeed JSON without training.")
    check.add_argument("--plan", action="store_true", help="estimate the memory per rank instead; needs no checkpoint")
    check.add_argument("--ranks", type=int, help="with --plan: number of ranks; this process's when not given")
    check.add_argument("--prompt-length", type=int, default=256, help="with --plan: tokens of a prompt")
    check.add_argument("--memory", type=float, metavar="GIB", help="with --plan: fail when a rank needs more")
    score = add("score", commands.score, "Run a reward over a JSON-lines file of samples.", config=False)
    score.add_argument("file", metavar="FILE", help="one JSON object a line, with prompt and completion")
    score.add_argument("--reward", required=True, help="registered name, pkg.module:function, or path/file.py:function")
    score.add_argument(
        "--params", default={}, metavar="YAML", type=_mapping, help="parameters of the reward, {tolerance: 0.1}"
    )
    score.add_argument(
        "--columns", default={}, metavar="YAML", type=_mapping, help="argument of the reward -> field of the file"
    )
    score.add_argument("--prompt", default="prompt", help="field of the prompt")
    score.add_argument("--completion", default="completion", help="field of the completion or completions")
    score.add_argument("--output", metavar="FILE", help="write every verdict as JSON lines")
    score.add_argument("--limit", type=int, help="score only the first lines")
    score.add_argument("--mode", choices=("inline", "process"), default="process", help="where the reward runs")
    score.add_argument("--num-workers", type=int, default=1, help="child processes in mode process")
    score.add_argument("--timeout-seconds", type=float, default=10.0, help="limit of one scoring call")
    compare = add(
        "compare", commands.compare, "Train recipes from the same warm starts over several seeds; table and plot."
    )
    compare.add_argument("--recipes", nargs="+", default=[], metavar="NAME", help="recipes with their own defaults")
    compare.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar="NAME [key=value ...]", help="the config, changed"
    )
    compare.add_argument("--seeds", type=_seed, nargs="+", default=[0, 1, 2], help="a run each; 0 1 2 when not given")
    compare.add_argument("--output", metavar="FOLDER", required=True, help="runs, table.md, results.json, budgets.png")
    compare.add_argument("--warm-start", metavar="FOLDER", help="one model for every seed, instead of a stage per seed")
    compare.add_argument("--jobs", type=int, default=1, help="runs at a time")
    inspect = add("inspect", commands.inspect, "Show the worst and the best rollouts of a run.", config=False)
    inspect.add_argument("folder", metavar="RUN", help="folder of a run, of rollout --output or of eval --output")
    inspect.add_argument("--n", type=int, default=3, metavar="N", help="how many of each; 3 when not given")
    inspect.add_argument("--step", type=int, help="of this RL step only")
    add("configs", commands.configs, "List the configs that come with the package.", config=False)
    init = add("init", commands.init, "Copy a config that comes with the package, to edit it.", config=False)
    init.add_argument("name", help="one of `denoise-rl configs`")
    init.add_argument("folder", nargs="?", default=".", help="where to; this folder when not given")
    new_reward = add("new-reward", commands.new_reward, "Write a working reward plugin and its test.", config=False)
    new_reward.add_argument("name", help="my_reward, or folder/my_reward.py")
    export = add(
        "export", commands.export, "Copy the policy of a checkpoint to a plain folder, or convert it.", config=False
    )
    export.add_argument("checkpoint", help="run folder, one of its checkpoints/step_N, or a model folder")
    export.add_argument("output", help="new folder for the model and tokenizer")
    export.add_argument("--layout", metavar="NAME", help="published layout: llada, dream, sdar or file.py:Class")
    for name, run, text in (
        ("plot", commands.plot, "Draw the learning curve of one run, or of several."),
        ("report", commands.report, "Write the HTML report of a run."),
    ):
        command = add(name, run, text, config=False)
        command.add_argument("runs", nargs="+" if name == "plot" else 1, metavar="RUN", help="run folder")
        if name == "plot":
            command.add_argument("--output", metavar="FILE", help="PNG to write; one in the (first) run's folder else")
    return parser


def _mapping(text: str) -> dict[str, Any]:
    """A mapping written as YAML on the command line."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a mapping like {{num_samples: 16}}")
    return value


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


if __name__ == "__main__":
    sys.exit(main())
