"""What the training loop may ask of a kind of sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rl.registry import MODALITIES

if TYPE_CHECKING:
    import numpy as np
    import torch

    from rl.config import Config
    from rl.estimators.base import Rows
    from rl.tasks.base import Row, Task
    from rollouts.engines.base import Engine


class Modality(Protocol):
    """A kind of sample. M trajectories; a trajectory has `num_steps`, `policy_version` and `seed`.

    Attributes:
        name: its name in `rl.registry.MODALITIES`.
        tokenizer: text only, None for others.
        horizon: most decisions of one sample: response tokens, or denoising steps.
    """

    name: str
    tokenizer: Any
    horizon: int

    @classmethod
    def open(cls, config: Config, task: Task) -> Modality:
        """The modality of a run.

        Raises:
            ValueError: the config does not describe one.
        """
        ...

    def load_model(self, path: str | None = None) -> Any:
        """The policy the config names, or the one saved in `path`, in eval mode."""
        ...

    def save_model(self, model: Any, path: str | Path) -> None:
        """Write a folder that `load_model` reads back with equal outputs."""
        ...

    def engine(self, model: Any, options: Any, device: torch.device) -> Engine: ...

    def options(self) -> Any:
        """The sampler of the rollouts."""
        ...

    def evaluation_options(self, num_inference_steps: int, temperature: float = 0.0) -> Any:
        """The sampler of evaluations at a number of denoising steps."""
        ...

    def requests(
        self, rows: Sequence[Row], seeds: Sequence[Sequence[int]], steps: Sequence[int | None] | None
    ) -> list[Any]:
        """One request for every row and every seed of it, a row's requests together.

        Args:
            steps: num_inference_steps of every row, None for the sampler's own.
        """
        ...

    def finished(self, trajectories: Sequence[Any]) -> tuple[list[Any], dict[str, list[Any]]]:
        """[M] completions as rewards see them, and the columns of [M] values that come with them."""
        ...

    def fills(self, trajectory: Any) -> list[Any]:
        """[T] completions: what every step would have the sample be.

        Raises:
            ValueError: the trajectory did not record them.
        """
        ...

    def search_sampler(self, engine: Any, rows: Sequence[Row]) -> Any:
        """The engine's sampler as searches use it (`rollouts.search.protocol.SearchSampler`); rows condition it.

        Raises:
            ValueError: the sampler cannot be stopped, branched and resumed.
        """
        ...

    def save_trajectories(self, path: Path, trajectories: Sequence[Any]) -> None:
        """Write them to one `.npz` file without pickle."""
        ...

    def load_trajectories(self, path: Path) -> list[Any]:
        """Read what `save_trajectories` wrote."""
        ...

    def ended(self, trajectories: Sequence[Any]) -> np.ndarray:
        """bool [M]: samples that came to their end; always True where a sample has no end of its own."""
        ...

    def smallest_trajectory(self, model: Any) -> Any:
        """One decision, for a rank that has no rollouts to fill up with."""
        ...

    def supervised(
        self, model: Any, rows: Sequence[Row], part: slice, seed: Sequence[int]
    ) -> tuple[Rows, torch.Tensor]:
        """What the `sft` stage fits: rows, and the weight [U] of each decision's -logprob.

        Args:
            rows: the whole batch; noise is drawn for all of it, so that it does not depend on the cut.
            part: the rows to return.
            seed: the only source of randomness.
        """
        ...

    def measure(self, rows: Sequence[Row], completions: Sequence[Any], rewards: Sequence[float]) -> dict[str, float]:
        """Numbers about a set of samples beside the verdicts on each, such as its diversity; often none."""
        ...

    def views(self, rows: Sequence[Row], trajectories: Sequence[Any], values: Sequence[float | None]) -> list[Any]:
        """Plain JSON values the report can show, one per trajectory."""
        ...

    def sample_line(self, completion: Any) -> Any:
        """A completion as plain JSON, for samples.jsonl."""
        ...


def open_modality(config: Config, task: Task) -> Modality:
    """The modality a task names (`modality`, text where it names none).

    Raises:
        ValueError: there is no such modality.
    """
    return MODALITIES.resolve(getattr(task, "modality", "text")).open(config, task)
