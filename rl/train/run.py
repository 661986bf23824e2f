"""A run: the objects that its config describes, what it writes, and what it spends."""

from __future__ import annotations

import contextlib
import copy
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rl import distributed
from rl.config import Config, save_config
from rl.errors import about
from rl.estimators.base import Rows
from rl.files import lock_file, write_folder, write_json, writing
from rl.modalities.base import Modality, open_modality
from rl.models.copies import share_frozen, trained_copy
from rl.tasks.load import load_task
from rl.track.callbacks import Callbacks, Wishes
from rl.track.jsonl import MetricsWriter
from rl.track.progress import Progress
from rl.track.services import open_services, require_services
from rl.train.interrupt import Stopped
from rl.train.judge import Judge
from rl.train.learner import TrainingError
from rl.train.same_run import DATA, fingerprints


@dataclass
class Costs:
    """What a run has spent, over all ranks."""

    forward_passes: float = 0
    backward_passes: float = 0
    sequence_forwards: float = 0
    tokens_forwarded: float = 0
    reward_queries: float = 0
    updates: float = 0

    def forwarded(self, rows: Rows, backward: bool = False) -> None:
        """Add one forward of some rows, and its backward."""
        self.forward_passes += 1
        self.backward_passes += backward
        self.sequence_forwards += rows.num_rows
        self.tokens_forwarded += rows.num_tokens

    def as_metrics(self) -> dict[str, float]:
        return {f"cost/{name}": value for name, value in vars(self).items()}


@dataclass
class Run:
    """Model, tokenizer, task, rewards and logs of one run. Use as a context manager.

    Example: `with Run.open(config) as run: train(run)`.
    """

    config: Config
    device: torch.device
    task: Any
    modality: Any
    model: Any
    judge: Judge
    metrics: MetricsWriter
    progress: Progress
    callbacks: Callbacks
    costs: Costs = field(default_factory=Costs)
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @classmethod
    def open(
        cls, config: Config, write: bool = True, callbacks: Sequence[Any] = (), args: Any = None, model: Any = None
    ) -> Run:
        """Build everything a config names.

        Args:
            write: False leaves the disk alone (evaluation of a model, dry runs).
            callbacks, args: see `rl.track.callbacks.Callbacks`.
            model: the policy, where it is loaded already.

        Raises:
            ValueError: anything the user got wrong, in one line.
        """
        with about(f"run.device {config.run.device!r}"):
            device = distributed.pick_device(config.run.device)
        if config.run.num_threads:
            torch.set_num_threads(config.run.num_threads)
        with about(f"task.name {config.task.name!r} with task.params {config.task.params}"):
            task = load_task(config.task.name, config.task.params)
        modality: Modality = open_modality(config, task)
        policy: Any = modality.load_model() if model is None else model
        modality.review(policy)
        judge = Judge(config.reward, task, modality)
        # Alone, only a learner needs a process group; it starts one of its own.
        if distributed.launched():
            distributed.start(device, config.run.collective_timeout_seconds)
        folder, services = Path(config.run.output_dir), []
        writes, lock = write and distributed.rank() == 0, contextlib.ExitStack()
        if writes:
            require_services(config.run.services)
            with about(f"run.output_dir {config.run.output_dir!r}"), contextlib.ExitStack() as opening:
                folder.mkdir(parents=True, exist_ok=True)
                opening.enter_context(lock_file(folder / "lock"))
                save_config(config, folder / "config.yaml")
                if not config.run.resume or not (folder / DATA).is_file():
                    write_json(folder / DATA, fingerprints(config))
                lock = opening.pop_all()
            services = open_services(config.run.services, config.run.output_dir, config=config.model_dump(mode="json"))
        if getattr(args, "metric_for_best_model", "") is None:
            args = copy.copy(args)
            args.metric_for_best_model = f"eval_{config.main_metric(judge.names['measure'])}"
            args.greater_is_better = True
        told = Callbacks(callbacks, services, args)
        metrics = MetricsWriter(config.run.output_dir, 0 if writes else 1, told)
        policy.to(device)
        progress = Progress(enabled=distributed.rank() == 0)
        for file in getattr(task, "files", ()):
            if file.note:
                progress.message(file.note)
        return cls(config, device, task, modality, policy, judge, metrics, progress, told, lock=lock)

    def __enter__(self) -> Run:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)
        self.judge.close()
        with self.lock:
            self.metrics.close()

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output_dir)

    @property
    def tokenizer(self) -> Any:
        return self.modality.tokenizer

    def engine(self, model: Any, options: Any = None) -> Any:
        """An engine of this process that samples with `model`; by the config's sampler without `options`."""
        return self.modality.engine(model, options or self.modality.options(), self.device)

    def of_baseline(self) -> Run:
        """This run with `eval.baseline` in the place of its model.

        Raises:
            ValueError: it cannot be loaded.
        """
        config = self.config.of_baseline()
        with about(f"eval.baseline {self.config.eval.baseline!r}"):
            modality = open_modality(config, self.task)
            model = modality.load_model().to(self.device)
        return replace(self, config=config, modality=modality, model=model)

    def save_model(self, path: str | Path) -> None:
        """Write `model` as it is now to a folder, which is whole or as it was."""
        with writing(path):
            write_folder(path, lambda partial: self.modality.save_model(self.model, partial))

    def starting_policy(self, resumed: bool) -> Any:
        """A frozen copy of the policy RL started from; what is never trained is not copied.

        Args:
            resumed: take it from the run folder: `model` has moved on, or is about to.
        """
        if resumed:
            start = self.modality.load_model(str(self.folder / "warm_start"))
            share_frozen(start, self.model)
        else:
            start = trained_copy(self.model)
        return start.to(self.device).eval().requires_grad_(False)

    def take_warm_start(self) -> None:
        """Give `model` the weights that RL starts from, as the run folder has them."""
        mine = dict(self.model.named_parameters())
        for name, parameter in self.modality.load_model(str(self.folder / "warm_start")).named_parameters():
            mine[name].data = parameter.data.to(self.device)

    def stopped(self, number: float, step: int, command: str = "train") -> Stopped:
        """What to raise when a signal ended a stage whose step is in a checkpoint; says how the run goes on."""
        stop = Stopped(number)
        config = shlex.quote(str(self.folder / "config.yaml"))
        how = f"go on from its checkpoint with denoise-rl {command} --config {config} run.resume=true"
        self.progress.message(f"{stop}: stopped after step {step}, {how}")
        return stop

    def wishes(self) -> Wishes:
        """What the callbacks of any rank ask for; all ranks must call this."""
        return Wishes.of_all(distributed.gather_objects(self.callbacks.wishes()))

    def heard(self) -> Wishes:
        """What the callbacks of any rank ask for; all ranks must call this.

        Raises:
            Exception: what a callback raised.
        """
        wishes = self.wishes()
        if wishes.failed:
            raise self.callbacks.error or TrainingError("a callback failed on another rank: see what it says")
        return wishes

    def spend(self, work: Costs) -> None:
        """Add the work of every rank to the run's costs; all ranks must call this."""
        for name, total in distributed.sum_metrics(vars(work), self.device).items():
            setattr(self.costs, name, getattr(self.costs, name) + total)
