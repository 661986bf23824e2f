"""`Trainer`: a run from Python, in the shape of TRL's trainers. docs/python_api.md is its page.

It makes a config of its arguments and runs the loop of `denoise-rl train`, which builds this class too. What has no
name is written to the folder `inputs` of the run (rows, a loaded policy, a tokenizer) and named from there, so that a
run of Python objects resumes, evaluates and exports like any other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rl import distributed
from rl.config import Config, validate
from rl.errors import in_words
from rl.evaluation.accuracy import as_metrics, evaluate
from rl.files import write_whole
from rl.inputs import (
    Inputs,
    Reward,
    Rows,
    as_lines,
    recipe_section,
    reward_part,
    rows_of,
    set_options,
    several,
    stream_name,
)
from rl.run_folder import find_checkpoint
from rl.tasks.records import ENDINGS, Record
from rl.track.callbacks import Callbacks
from rl.train import loop
from rl.train.finish import finish
from rl.train.model_card import write_card
from rl.train.plan import check_folder, check_run, plan_lines
from rl.train.run import Run
from rl.trl_args import COPIED, grpo_options, is_grpo_config, lora_options


class Trainer:
    """Trains a diffusion model by RL.

    Example::

        trainer = Trainer("path/to/model", reward_funcs=brevity, train_dataset=rows, eval_dataset=more_rows,
                          recipe=TraceRL(clip_high=0.28), args={"run.output_dir": "runs/a", "train.steps": 50})
        trainer.train()
        trainer.evaluate()           # {"eval_reward@4": 0.83, ...}
        trainer.save_model("my_model")

    Attributes:
        config: what the arguments come to.
        callbacks: `transformers.TrainerCallback`s.
        run: the latest run, with the model as it is now (`run.model`); None before there is one.
    """

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Reward | Sequence[Reward] | None = None,
        args: Any = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] = (),
        peft_config: Any = None,
        *,
        recipe: Any = None,
        options: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            model: folder or hub name (`model.path`), or a loaded policy; None leaves it to `args`.
            reward_funcs: one or several: a name of a reward, a mapping like an entry of `reward.functions`, or a
                function of TRL's signature; with prompts that are chats it gets completions that are chats.
            args: a `Config`, options by their dotted names, or a `trl.GRPOConfig`. The other arguments win over it.
            train_dataset, eval_dataset: rows with a column `prompt` of text or messages: a `datasets.Dataset`, a list
                of dicts, a file, or `owner/name:split` on the hub. Both or neither; None leaves them to `args`.
            processing_class: tokenizer, or the folder or hub name of one; None takes the model's.
            callbacks: `transformers.TrainerCallback`s, or their classes.
            peft_config: a `peft.LoraConfig`.
            recipe: a recipe, its class, or its name; None leaves it to `args`.
            options: further options by their dotted names, for what the rest has no words for; they win over all.

        Raises:
            ValueError: one line that names the argument and the fix; no model is loaded yet.
        """
        self.run: Run | None = None
        if not isinstance(callbacks, Sequence):
            raise ValueError(f"callbacks is a {type(callbacks).__name__}: give a list of them")
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"options is a {type(options).__name__}: give a mapping of options by their names")
        self.callbacks = [_callback(found, i) for i, found in enumerate(callbacks)]
        self.args = args
        given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        streamed = _asks_to_stream(args, options) and train_dataset is not None
        data: dict[str, list[Record]] = {"train_dataset": []} if streamed else {}
        for argument, found in given.items():
            if found is not None and argument not in data:
                data[argument] = rows_of(found, argument)
        raw = _raw(args, None if streamed else len(data.get("train_dataset", ())))
        own: dict[str, Any] = {}
        if peft_config is not None:
            own |= lora_options(peft_config)
        own |= dict(options or {})
        if recipe is not None and isinstance(args, Config):
            del raw["algorithm"]
        set_options(raw, own)
        if recipe is not None:
            raw["algorithm"] = recipe_section(recipe, raw.get("algorithm", {}), own)
        if is_grpo_config(args):
            steps = raw["sampler"].get("num_inference_steps")
            if steps is None:
                raise ValueError(
                    "args, a GRPOConfig, has no number of denoising steps: give "
                    "options={'sampler.num_inference_steps': ...}"
                )
            raw.setdefault("eval", {}).setdefault("num_inference_steps", [steps])
        self._words = {"reward.functions": "reward_funcs"} if reward_funcs is not None else {}
        if is_grpo_config(args):
            self._words |= {name: f"args.{field}" for field, name in COPIED.items() if name not in own}
        inputs = Inputs(Path(validate({"run": raw.get("run", {})}).run.output_dir) / "inputs")
        if data:
            self._name_data(raw, data, given, inputs)
        if reward_funcs is not None:
            parts = [reward_part(found, i) for i, found in enumerate(several(reward_funcs))]
            weights = getattr(args, "reward_weights", None) or [1.0] * len(parts)
            if len(weights) != len(parts):
                raise ValueError(f"args.reward_weights has {len(weights)} weights for {len(parts)} reward_funcs")
            functions = [{"weight": weight, **part} for part, weight in zip(parts, weights, strict=True)]
            set_options(raw, {"reward.functions": functions})
        named = {"model.path": ("model", model), "model.tokenizer": ("processing_class", processing_class)}
        for option, (argument, found) in named.items():
            if found is not None:
                set_options(raw, {option: inputs.saved(argument, found, processing_class)})
            # A Config speaks of its own keys.
            if found is not None or not (isinstance(args, Config) or raw.get("model", {}).get(option[6:])):
                self._words[option] = argument
        with in_words(self._words):
            self.config = validate(raw)
            if inputs.pending:
                if distributed.launched():
                    device = distributed.pick_device(self.config.run.device)
                    distributed.start(device, self.config.run.collective_timeout_seconds)
                if distributed.rank() == 0:
                    inputs.write()
                distributed.barrier()
            check_run(self.config, new=False)

    def train(self, resume_from_checkpoint: bool | str | None = None) -> dict[str, Any]:
        """Run every stage of the config and write the run folder; returns what its `summary.json` holds.

        Args:
            resume_from_checkpoint: True goes on from the newest complete checkpoint, which may be named too; None
                does as `args` says.

        Raises:
            ValueError: the folder holds another run, or the checkpoint is not the newest of this one.
            Stopped: a signal ended the run; its state is in a checkpoint.
        """
        self.config = self._resuming(resume_from_checkpoint)
        check_folder(self.config)
        with Run.open(self.config, callbacks=self.callbacks, args=self._callback_args()) as self.run:
            for line in plan_lines(self.config):
                self.run.progress.message(line)
            summary = loop.train(self.run)
        if distributed.rank() == 0:
            finish(self.run.folder)
        return summary

    def evaluate(self, eval_dataset: Rows | None = None) -> dict[str, float]:
        """Evaluate the model as it is now at every step count of `eval.num_inference_steps`.

        Args:
            eval_dataset: other rows than those of the Trainer.

        Returns:
            `{"eval_accuracy@4": 0.8, "eval_accuracy_low@4": ...}`; `eval_reward@4` where the rewards trained on judge.
        """
        model = self._current()
        with Run.open(self.config, False, self.callbacks, self._callback_args(), model) as run:
            if eval_dataset is None:
                examples = run.task.heldout_examples(self.config.eval.num_prompts)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    lines = as_lines(rows_of(eval_dataset, "eval_dataset"), "eval_dataset")
                    file = write_whole(Path(folder) / "eval_dataset.jsonl", lines)
                    self._words[str(file)] = "eval_dataset"
                    with in_words(self._words):
                        examples = run.task.file_examples(str(file))
            results, _ = evaluate(run, examples, self.config.eval.num_inference_steps)
            metrics = Callbacks.named("eval", as_metrics(results))
            run.callbacks.tell("on_evaluate", metrics=metrics)
            run.heard()
        self.run = run
        return metrics

    def save_model(self, folder: str | Path) -> Path:
        """Write the model as it is now: sharded safetensors or adapters in peft's layout, tokenizer, model card."""
        model = self._current()
        if self.run is None:
            with Run.open(self.config, write=False, model=model) as self.run:
                pass
        if distributed.rank() == 0:
            self.run.save_model(folder)
            write_card(folder, self.config)
        distributed.barrier()
        return Path(folder)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "A model trained with denoise-rl",
    ) -> Any:
        """Upload what `save_model` writes to a repository of the hub, which is made if there is none.

        Args:
            repo_id: `owner/name`; None takes `hub_model_id` of `args`. So do `private` and `token`.

        Returns:
            huggingface_hub's CommitInfo; None on ranks other than 0.
        """
        from huggingface_hub import HfApi

        repo_id = repo_id or getattr(self.args, "hub_model_id", None)
        if repo_id is None:
            raise ValueError("repo_id is required: give owner/name, or args with hub_model_id")
        private = getattr(self.args, "hub_private_repo", None) if private is None else private
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder)
            if distributed.rank() != 0:
                return None
            hub = HfApi(token=token or getattr(self.args, "hub_token", None))
            hub.create_repo(repo_id, private=private, exist_ok=True)
            return hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)

    def _name_data(
        self, raw: dict[str, Any], data: Mapping[str, list[Record]], given: Mapping[str, Rows], inputs: Inputs
    ) -> None:
        """Make the task of a config read the datasets."""
        task = raw.setdefault("task", {})
        task.setdefault("name", "jsonl")
        params = task["params"] = dict(task.get("params") or {})
        column = params.get("prompt_column", "prompt")
        for argument, param in (("train_dataset", "train"), ("eval_dataset", "heldout")):
            if argument not in data:
                raise ValueError(
                    f"{argument} is required beside the other dataset: dataset.train_test_split(test_size=0.1) makes "
                    "two of one"
                )
            rows = data[argument]
            if not rows:
                # A stream is named and not read.
                params[param] = stream_name(given[argument], argument)
                continue
            names = dict.fromkeys(name for row in rows for name in row)
            if column not in names:
                raise ValueError(
                    f"{argument} has no column {column!r}, it has {', '.join(map(repr, names))}: rename one to it, or "
                    "set options={'task.params.prompt_column': ...}"
                )
            if str(given[argument]).endswith(ENDINGS) and isinstance(given[argument], str | Path):
                params[param] = str(given[argument])
            else:
                text = as_lines(rows, argument)
                params[param] = inputs.named(f"{argument}.jsonl", partial(write_whole, content=text))
                self._words[params[param]] = argument
        # Of a stream, which is not read, the held-out rows say which columns there are.
        first = (data["train_dataset"] or data["eval_dataset"])[:1]
        if any("answer" in row for row in first) and task["name"] == "jsonl":
            params.setdefault("answer_column", "answer")

    def _resuming(self, checkpoint: bool | str | None) -> Config:
        if checkpoint is None:
            checkpoint = getattr(self.args, "resume_from_checkpoint", None) or self.config.run.resume
        if isinstance(checkpoint, str):
            newest, _ = find_checkpoint(self.config.run.output_dir)
            if newest is None or Path(checkpoint).resolve() != newest.resolve():
                raise ValueError(
                    f"resume_from_checkpoint {checkpoint!r}: a run goes on from the newest complete checkpoint of its "
                    f"run.output_dir, {newest or 'and this one has none'}: give True"
                )
        run = self.config.run.model_copy(update={"resume": bool(checkpoint)})
        return self.config.model_copy(update={"run": run})

    def _current(self) -> Any:
        """The model as it is now; None where it is still to be loaded."""
        if self.run is not None:
            return self.run.model
        if self.config.model.path is None:
            raise ValueError("model is required: before train() there is no other one than new random weights")
        return None

    def _callback_args(self) -> Any:
        """What callbacks get as `args`: a GRPOConfig as it was given, else the config in transformers' words."""
        if not self.callbacks or is_grpo_config(self.args):
            return self.args
        from transformers import TrainingArguments

        config = self.config
        settings: dict[str, Any] = {"output_dir": config.run.output_dir, "seed": config.run.seed, "report_to": "none"}
        settings |= {"max_steps": config.train.steps, "learning_rate": config.train.optimizer.lr, "logging_steps": 1}
        for kind, every in (("save", config.checkpoint.every), ("eval", config.eval.every)):
            settings |= {f"{kind}_strategy": "steps", f"{kind}_steps": every} if every else {f"{kind}_strategy": "no"}
        return TrainingArguments(**settings, use_cpu=config.run.device == "cpu")


def _callback(found: Any, index: int) -> Any:
    from transformers import TrainerCallback

    made = found() if isinstance(found, type) else found
    if not isinstance(made, TrainerCallback):
        raise ValueError(f"callbacks[{index}] is a {type(made).__name__}: give a transformers.TrainerCallback")
    return made


def _asks_to_stream(args: Any, options: Mapping[str, Any] | None) -> bool:
    asked: dict[str, Any] = {"task": {"params": dict(args.task.params)}} if isinstance(args, Config) else {}
    for given in (args, options):
        if isinstance(given, Mapping):
            set_options(asked, given)
    return bool(((asked.get("task") or {}).get("params") or {}).get("streaming"))


def _raw(args: Any, num_rows: int | None) -> dict[str, Any]:
    """The sections that `args` stands for.

    Args:
        num_rows: rows to train on; None for a stream, which does not say.
    """
    if args is None:
        return {}
    if isinstance(args, Config):
        return args.model_dump()
    raw: dict[str, Any] = {}
    if isinstance(args, Mapping):
        set_options(raw, args)
    elif is_grpo_config(args):
        set_options(raw, grpo_options(args, num_rows))
    else:
        raise ValueError(f"args is a {type(args).__name__}: give a Config, a dict of options, or a trl.GRPOConfig")
    return raw
