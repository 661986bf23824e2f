"""A modality is a kind of sample: text, images, or your own. The rest of a run knows samples through it alone.

To write one, derive from `Modality`, set `name` and `Options`, and write three methods: `new_model`, `engine` and
`completions`. Everything else has a default. docs/examples/graphs.md walks through a modality line by line.

The class methods are asked before a run starts, for `--dry-run` and `denoise-rl check`. Ours therefore come in two
classes: one with the class methods, which imports no torch (`text_plan.py`), and one derived from it that runs
(`text.py`), which the first names as its `runner`. Your own needs one class. Importing this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from rewards.address import load_address
from rl.errors import about
from rl.tasks.load import modality_class
from rollouts.engines.base import SampleRequest

if TYPE_CHECKING:
    import numpy as np
    import torch

    from rl.config import Config
    from rl.estimators.base import Rows
    from rl.modalities.memory import ModelMemory
    from rl.tasks.base import Example, Task
    from rollouts.engines.base import Engine

WEIGHTS = "model.safetensors"


class Modality:
    """A kind of sample. M trajectories; a trajectory has `num_steps` and `policy_version`.

    Attributes:
        name: what recipes call it in their own attribute `modality`.
        Options: the `sampler` section of a config, a frozen pydantic model with `num_inference_steps`.
        Trajectory: the dataclass of a rollout, arrays and plain values; `load_trajectories` builds it.
        reward_columns: names of the columns that `finished` adds for rewards; no dataset may have them.
        unit: what speed is counted in: "samples", or the "tokens" that the engine's stats count.
        runner: address of the class derived from this one that runs, where this one is without torch; else "".
        tokenizer: of text; None for others.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BaseModel]]
    Trajectory: ClassVar[Any] = None
    reward_columns: ClassVar[tuple[str, ...]] = ("num_steps",)
    unit: ClassVar[str] = "samples"
    runner: ClassVar[str] = ""
    tokenizer: Any = None

    def __init__(self, config: Config, task: Any):
        self.config, self.task = config, task

    # What a new modality writes.

    def new_model(self) -> Any:
        """A policy with new weights, a `torch.nn.Module`; torch's seed is set to `run.seed` before."""
        raise NotImplementedError(f"{type(self).__name__}.new_model is not written")

    def engine(self, model: Any, options: Any, device: torch.device) -> Engine:
        """What samples with `model` by some `Options` (see `rollouts.engines.base.SharedModelEngine`)."""
        raise NotImplementedError(f"{type(self).__name__}.engine is not written")

    def completions(self, trajectories: Sequence[Any]) -> list[Any]:
        """[M] finished samples as rewards see them."""
        raise NotImplementedError(f"{type(self).__name__}.completions is not written")

    # Asked of the class, before a run.

    @classmethod
    def open(cls, config: Config, task: Task) -> Modality:
        """The modality of a run.

        Raises:
            ValueError: the config does not describe one.
        """
        return cls(config, task)

    @classmethod
    def check(cls, config: Config, task: Task, rows: Sequence[Example]) -> None:
        """Refuse what this modality cannot do; by default what only text can.

        Args:
            rows: one row or two of the task.

        Raises:
            ValueError: one line that names the field and the fix.
        """
        about_it = f"is for text, and task.name {config.task.name!r} is about {cls.name}"
        if config.train.mixed_steps:
            raise ValueError(f"train.mixed_steps {about_it}: set sampler.num_inference_steps")
        if config.train.block_schedule:
            raise ValueError(f"train.block_schedule {about_it}: set it to []")
        if config.sft.trajectories is not None:
            raise ValueError(f"sft.trajectories {about_it}: set it to null")
        if config.sft.errors or config.sft.consistency:
            raise ValueError(f"sft.{'errors' if config.sft.errors else 'consistency'} {about_it}: set it to 0")
        if config.sft.joint:
            raise ValueError(f"sft.joint {about_it}: set it to false")
        if config.sft.levels is not None:
            raise ValueError(f"sft.levels {about_it}: set it to null")
        if config.convert.steps:
            raise ValueError(f"convert.steps {about_it}: set it to 0")
        if config.sft.masking != "random":
            raise ValueError(f"sft.masking {config.sft.masking} {about_it}: set it to random")
        path = config.model.path
        if path is not None and not Path(path).is_dir() and path.startswith((".", "/")):
            raise ValueError(f"model.path {path!r} is not a folder")

    @classmethod
    def forwards(cls, config: Config) -> tuple[float, bool]:
        """Denoising steps of a rollout on average, and whether guidance doubles its forwards.

        Raises:
            ValueError: a number of steps that the sampler cannot take.
        """
        return config.sampler.num_inference_steps, False

    @classmethod
    def engine_needs(cls, config: Config) -> dict[str, str]:
        """What the sampler needs of an engine (keys of `rollouts.engines.base.NEEDS`) -> the option that needs it."""
        return {}

    @classmethod
    def memory(cls, config: Config, ranks: int, prompt_length: int, half: bool) -> ModelMemory:
        """The modality's part of `denoise-rl check --plan`.

        Args:
            prompt_length: tokens of a prompt, for modalities whose prompts have tokens.
            half: whether parameters have 2 bytes and not 4.

        Raises:
            ValueError: the config does not say how large the model is.
        """
        raise ValueError(f"--plan is not known for {cls.name}: write {cls.__name__}.memory")

    def review(self, model: Any) -> None:
        """Look at every example of the task's files (`task.unfit`); by default there is nothing to find.

        Raises:
            ValueError: an example that this model cannot use, with its file and row.
        """

    # Models on disk.

    def load_model(self, path: str | None = None) -> Any:
        """The policy the config names, or the one that `save_model` wrote to `path`, in eval mode."""
        import torch
        from safetensors.torch import load_model

        torch.manual_seed(self.config.run.seed)
        model = self.new_model()
        path = path or self.config.model.path
        if path is not None:
            with about(f"model.path {path!r}"):
                try:
                    load_model(model, Path(path) / WEIGHTS)
                except RuntimeError as error:
                    what = " ".join(str(error).split()).partition(": ")[2]
                    name = self.config.task.name
                    raise ValueError(f"model.path {path!r} is no model of task {name} as it is set: {what}") from error
        return model.eval()

    def save_model(self, model: Any, path: str | Path) -> None:
        """Write a folder that `load_model` reads back with equal outputs."""
        from safetensors.torch import save_model

        Path(path).mkdir(parents=True, exist_ok=True)
        save_model(model, str(Path(path) / WEIGHTS))

    # Sampling.

    @property
    def horizon(self) -> int:
        """Most decisions of one sample: denoising steps, or response tokens."""
        return self.config.sampler.num_inference_steps

    def options(self) -> Any:
        """The sampler of the rollouts."""
        return self.config.sampler

    def evaluation_options(self, num_inference_steps: int) -> Any:
        """The sampler of evaluations at a number of denoising steps: the rollouts', changed by `eval.sampler`."""
        changed = {**self.config.eval.sampler, "num_inference_steps": num_inference_steps}
        return self.Options.model_validate({**self.config.sampler.model_dump(), **changed})

    def requests(
        self, rows: Sequence[Example], seeds: Sequence[Sequence[int]], steps: Sequence[int | None] | None = None
    ) -> list[Any]:
        """One request for every row and every seed of it, a row's requests together.

        Args:
            steps: num_inference_steps of every row, None for the sampler's own.
        """
        if steps is not None:
            raise ValueError(f"train.mixed_steps is for text: a sampler of {self.name} has one number of steps")
        return [SampleRequest(row["prompt"], seed) for row, own in zip(rows, seeds, strict=True) for seed in own]

    def finished(self, trajectories: Sequence[Any]) -> tuple[list[Any], dict[str, list[Any]]]:
        """[M] completions, and the columns of [M] values that rewards get with them."""
        return self.completions(trajectories), {"num_steps": [t.num_steps for t in trajectories]}

    def ended(self, trajectories: Sequence[Any]) -> np.ndarray:
        """bool [M]: samples that came to their end; always True where a sample has no end of its own."""
        import numpy as np

        return np.ones(len(trajectories), dtype=bool)

    def smallest_trajectory(self, model: Any) -> Any:
        """Something to score on a rank that has no rollouts to fill up with: one rollout, of few decisions."""
        engine = self.engine(model, self.options(), next(model.parameters()).device)
        return engine.generate(self.requests(self.task.heldout_examples(1), [[0]]))[0]

    def save_trajectories(self, path: Path, trajectories: Sequence[Any]) -> None:
        """Write them to one `.npz` file without pickle."""
        from rollouts.npz_file import write_dataclasses

        write_dataclasses(path, f"{self.name} trajectories", trajectories)

    def load_trajectories(self, path: Path) -> list[Any]:
        """Read what `save_trajectories` wrote."""
        from rollouts.npz_file import read_dataclasses

        return read_dataclasses(path, f"{self.name} trajectories", self.Trajectory)

    # What some recipes, searches and stages ask for.

    def x0_predictions(self, trajectory: Any) -> list[Any]:
        """[T] completions: what every step would have the sample be.

        Raises:
            ValueError: the trajectory did not record them.
        """
        raise ValueError(f"recipes that score every step's x0 prediction are for text: choose a recipe for {self.name}")

    def search_sampler(self, engine: Any, rows: Sequence[Example]) -> Any:
        """The engine's sampler as searches use it (`rollouts.search.protocol.SearchSampler`); rows condition it.

        Raises:
            ValueError: the sampler cannot be stopped, branched and resumed.
        """
        raise ValueError(f"--search is not known for {self.name}: write {type(self).__name__}.search_sampler")

    def soft_reward(self, run: Any) -> Callable[[torch.Tensor, Sequence[Example]], torch.Tensor]:
        """The config's rewards as a function of predicted samples and their examples -> [B], with gradient to samples.

        Raises:
            ValueError: the sampler follows no gradient, or a reward has none.
        """
        raise ValueError(f"searches that follow a reward's gradient are for text and images, not for {self.name}")

    def supervised(
        self, model: Any, rows: Sequence[Example], part: slice, seed: Sequence[int]
    ) -> tuple[Rows, torch.Tensor]:
        """What the `sft` stage fits: rows, and the weight [U] of each decision's -logprob.

        Args:
            rows: the whole batch; noise is drawn for all of it, so that it does not depend on the cut.
            part: the rows to return.
            seed: of the run, and the update from 0: the only source of randomness.
        """
        raise ValueError(f"sft.steps: {self.name} have no supervised stage, set it to 0")

    # What people see.

    def measure(
        self, rows: Sequence[Example], completions: Sequence[Any], rewards: Sequence[float]
    ) -> dict[str, float]:
        """Numbers about samples as a set, such as its diversity; often none."""
        return {}

    def sample_line(self, completion: Any) -> Any:
        """A completion as plain JSON, for samples.jsonl."""
        return completion

    def views(self, rows: Sequence[Example], trajectories: Sequence[Any], values: Sequence[float | None]) -> list[Any]:
        """[M] plain JSON values for the viewer of the report: canvases step by step, or an image.

        By default one canvas of one cell, the completion as text. `rl.track.viewer.trajectory_view` has an example of
        more canvases, `rl.track.image_grid.prompt_rows` one of images.
        """
        texts = [str(self.sample_line(completion)) for completion in self.finished(trajectories)[0]]
        return [
            {"steps": [{"tokens": [text], "confidence": [None], "changed": []}], "correct": (value or 0.0) >= 1.0}
            for text, value in zip(texts, values, strict=True)
        ]


def open_modality(config: Config, task: Task) -> Modality:
    """The modality that a task names (attribute `modality`, text where it names none).

    Raises:
        ValueError: there is no such modality.
    """
    found = modality_class(task)
    runs = load_address(found.runner, f"the runner of {found.name}") if found.runner else found
    return runs.open(config, task)
