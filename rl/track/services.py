"""Copies of the metrics for tensorboard, wandb and trackio behind one small interface.

`metrics.jsonl` stays the record. A service that is not installed is an error before training starts; a service
that breaks later is reported once, counted (`warnings/<service>_failures` in metrics.jsonl) and never stops a run.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rl.files import write_whole

logger = logging.getLogger(__name__)


# What a line of metrics.jsonl holds beside metrics.
_NO_METRICS = frozenset({"step", "stage", "time"})


class Backend(Protocol):
    """An adapter of one service; it may raise, `Service` deals with that."""

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Store finite numbers under names that already start with the stage."""

    def rewind(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """A resumed run has only these lines of metrics.jsonl left, and logs later steps again."""

    def close(self) -> None:
        """Flush and let go."""


class Service:
    """A backend whose failures are counted instead of raised.

    Args:
        name: what messages and the failure metric call it.
        start: makes the backend; called at once, and a failure there counts like any other.

    Attributes:
        failures: calls that failed or were skipped because the backend never started.
    """

    def __init__(self, name: str, start: Callable[[], Backend]) -> None:
        self.name = name
        self.failures = 0
        self._backend: Backend | None = None
        self._said = False
        try:
            self._backend = start()
        except Exception as error:
            self._failed(error)

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Pass on one line; names get the stage as prefix where they lack it, so stages never share a curve."""
        if self._backend is None:
            self.failures += 1
            return
        try:
            self._backend.log(step, stage, staged(stage, metrics))
        except Exception as error:
            self._failed(error)

    def rewind(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """See `Backend.rewind`."""
        try:
            if self._backend is not None:
                self._backend.rewind(lines)
        except Exception as error:
            self._failed(error)

    def close(self) -> None:
        """Close the backend; a failure is counted."""
        if self._backend is None:
            return
        backend, self._backend = self._backend, None
        try:
            backend.close()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if not self._said:
            self._said = True
            logger.warning(
                "%s failed (%s: %s); training goes on, metrics.jsonl has every number, further failures are counted",
                self.name,
                type(error).__name__,
                str(error).splitlines()[0] if str(error) else "no message",
            )


def staged(stage: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """`{"train/reward/mean": 0.5}` of `{"reward/mean": 0.5}`."""
    prefix = f"{stage}/"
    return {name if name.startswith(prefix) else prefix + name: value for name, value in metrics.items()}


class TensorBoard:
    """Event files under `<run_dir>/tensorboard`, through torch's own writer."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        self._folder = run_dir / "tensorboard"
        self._open()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(self._folder))

    def log(self, step: int, stage: str, metrics: Mapping[str, float], time: float | None = None) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step, walltime=time)
        self._writer.flush()

    def rewind(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the event files anew: a purge by step would hide the later steps of other stages too."""
        self._writer.close()
        for path in self._folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._open()
        for line in lines:
            numbers = {name: value for name, value in line.items() if name not in _NO_METRICS and value is not None}
            self.log(line["step"], line["stage"], staged(line["stage"], numbers), line["time"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """One wandb run per run folder; WANDB_MODE=offline keeps it local."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        # A resumed run goes on under the id that its folder keeps.
        kept = run_dir / "wandb_id"
        run_dir.mkdir(parents=True, exist_ok=True)
        if not kept.is_file():
            write_whole(kept, secrets.token_hex(4))
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
            id=kept.read_text(),
            resume="allow",
        )
        # wandb's own step must never go back, but every stage counts from zero: each gets its own axis.
        for stage in ("sft", "train", "eval"):
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, f"{stage}/step": step})

    def rewind(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """wandb takes nothing back: repeated steps have the numbers that they had."""

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """One trackio run per run folder, stored where trackio stores its runs (TRACKIO_DIR)."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        import trackio

        self._run = trackio.init(project=project, name=run_dir.name, config=dict(config), embed=False, resume="allow")

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def rewind(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """trackio takes nothing back either."""

    def close(self) -> None:
        import trackio

        trackio.finish()


_BACKENDS: dict[str, Callable[[Path, str, Mapping[str, Any]], Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


# Groups runs in wandb and trackio.
PROJECT = "denoise-rl"


def require_services(names: Sequence[str]) -> None:
    """Refuse names that cannot be opened, before anything is written.

    Raises:
        ValueError: a name is unknown, or its package is not installed (the message names the extra).
    """
    for name in names:
        if name not in _BACKENDS:
            raise ValueError(f"run.services: unknown service {name!r}; choose from {', '.join(sorted(_BACKENDS))}")
        try:
            importlib.import_module(name)
        except ImportError:
            raise ValueError(
                f"run.services: {name} is not installed; install it with: pip install 'denoise-rl[{name}]'"
            ) from None


def open_services(
    names: Sequence[str],
    run_dir: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
) -> list[Service]:
    """Start the named services.

    Args:
        names: any of "tensorboard", "wandb", "trackio".
        run_dir: the run folder; its name is the run's name.
        config: the resolved settings, stored with the run where the service can.

    Raises:
        ValueError: see `require_services`.
    """
    require_services(names)
    folder, settings = Path(run_dir), dict(config or {})

    def starter(name: str) -> Callable[[], Backend]:
        return lambda: _BACKENDS[name](folder, PROJECT, settings)

    return [Service(name, starter(name)) for name in names]
