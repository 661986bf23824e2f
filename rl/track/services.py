"""Trackers: tensorboard, wandb, trackio and mlflow get copies of the metrics, and of samples of held-out prompts.

Each is a callback of the run (`rl.track.callbacks`). `metrics.jsonl` stays the record. A service that is not installed
is an error before training starts; a service that breaks later is reported once, counted
(`warnings/<service>_failures` in metrics.jsonl) and never stops a run.
"""

from __future__ import annotations

import base64
import importlib
import io
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rl.files import write_whole

logger = logging.getLogger(__name__)


# What a line of metrics.jsonl holds beside metrics.
_NO_METRICS = frozenset({"step", "stage", "time"})


class Backend(Protocol):
    """An adapter of one service; it may raise, `Service` deals with that.

    A backend whose service takes lines back has a further method, `rewrite(lines)`: a resumed run has only these lines
    of metrics.jsonl left, and logs later steps again.

    Attributes:
        is_new: the service has nothing of this run yet.
    """

    is_new: bool

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Store finite numbers under names that already start with the stage."""

    def show(self, step: int, images: Sequence[tuple[str, Any]], table: Sequence[Mapping[str, Any]]) -> None:
        """Store images, each with its caption (`PIL.Image`), and rows of a table of text."""

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
        # Stage -> last step that the service has from before a resume.
        self._sent: dict[str, int] = {}
        try:
            self._backend = start()
        except Exception as error:
            self._failed(error)

    def on_log(self, logs: Mapping[str, float], step: int, stage: str) -> None:
        """Pass on one line, unless the service has it from before a resume: no step is there twice."""
        if step > self._sent.get(stage, -1):
            self._call("log", step, stage, staged(stage, logs))

    def on_views(self, items: Sequence[Mapping[str, Any]], step: int, grid: Sequence[int] | None) -> None:
        """Pass on samples of held-out prompts: `items` of viewer.json, each a prompt and a view."""
        images, table = shown_samples(items, grid)
        self._call("show", step, images, table)

    def rewind(self, kept: Sequence[Mapping[str, Any]], dropped: Sequence[Mapping[str, Any]]) -> None:
        """A resumed run has the lines `kept` of metrics.jsonl left, and logs those `dropped` again."""
        if hasattr(self._backend, "rewrite"):
            self._call("rewrite", kept)
        elif self._backend is not None and self._backend.is_new:
            # It was asked for only now.
            self._backend.is_new = False
            for line in kept:
                self._call("log", line["step"], line["stage"], staged_line(line))
        else:
            for line in dropped:
                self._sent[line["stage"]] = max(line["step"], self._sent.get(line["stage"], -1))

    def _call(self, method: str, *arguments: Any) -> None:
        if self._backend is None:
            self.failures += 1
            return
        try:
            getattr(self._backend, method)(*arguments)
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


def staged(stage: str, logs: Mapping[str, float]) -> dict[str, float]:
    """Logs under names that begin with their stage.

    Example: `{"train/loss": 1}` of `{"loss": 1}`, `{"eval/accuracy@4": 1}` of `{"eval_accuracy@4": 1}`.
    """
    return {f"{stage}/{name.removeprefix(f'{stage}_').removeprefix(f'{stage}/')}": logs[name] for name in logs}


def staged_line(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of metrics.jsonl under the names that services have."""
    prefix = f"{line['stage']}/"
    return {
        prefix + name.removeprefix(prefix): value
        for name, value in line.items()
        if name not in _NO_METRICS and value is not None
    }


def shown_samples(
    items: Sequence[Mapping[str, Any]], grid: Sequence[int] | None
) -> tuple[list[tuple[str, Any]], list[dict[str, Any]]]:
    """Images with their prompts, and a table of canvases, one row a denoising step; masked positions are `_`.

    Args:
        items: of viewer.json.
        grid: rows and columns of a canvas, None for text.
    """
    images, table = [], []
    for item in items:
        view = item["view"]
        if "image" in view:
            data = base64.b64decode(view["image"].partition(",")[2])
            if data:
                from PIL import Image

                images.append((item["prompt"], Image.open(io.BytesIO(data))))
            continue
        for step, canvas in enumerate(view["steps"]):
            width = grid[1] if grid else len(canvas["tokens"]) or 1
            cells = [token or "_" for token in canvas["tokens"]]
            text = "\n".join("".join(cells[start : start + width]) for start in range(0, len(cells), width))
            table.append({"prompt": item["prompt"], "step": step, "canvas": text, "correct": view["correct"]})
    return images, table


def _kept(run_dir: Path, service: str, make: Callable[[], str]) -> tuple[str, bool]:
    """The name that a service knows the run by, kept in its folder, and whether it was made just now."""
    path = run_dir / f"{service}_id"
    is_new = not path.is_file()
    if is_new:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, make())
    return path.read_text(), is_new


class TensorBoard:
    """Event files under `<run_dir>/tensorboard`, through torch's own writer."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        self._folder = run_dir / "tensorboard"
        self.is_new = False
        self._open()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(self._folder))

    def log(self, step: int, stage: str, metrics: Mapping[str, float], time: float | None = None) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step, walltime=time)
        self._writer.flush()

    def rewrite(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the event files anew: a purge by step would hide the later steps of other stages too."""
        self._writer.close()
        for path in self._folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._open()
        for line in lines:
            self.log(line["step"], line["stage"], staged_line(line), line["time"])

    def show(self, step: int, images: Sequence[tuple[str, Any]], table: Sequence[Mapping[str, Any]]) -> None:
        import numpy as np
        from torch.utils.tensorboard import SummaryWriter

        # In files of their own, which stay when the others are written anew.
        with SummaryWriter(log_dir=str(self._folder / "samples")) as writer:
            for number, (caption, image) in enumerate(images):
                writer.add_image(
                    f"samples/{number}: {caption[:60]}", np.asarray(image.convert("RGB")), step, None, "HWC"
                )
            if table:
                writer.add_text("samples/denoising", _markdown(table), step)

    def close(self) -> None:
        self._writer.close()


def _markdown(table: Sequence[Mapping[str, Any]]) -> str:
    rows = [[str(value).replace("|", "\\|").replace("\n", "<br>") for value in row.values()] for row in table]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(table[0]), ["---"] * len(table[0]), *rows])


class WandB:
    """One wandb run per run folder; WANDB_MODE=offline keeps it local."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        run_id, self.is_new = _kept(run_dir, "wandb", lambda: secrets.token_hex(4))
        self._run = wandb.init(
            project=project, name=run_dir.name, dir=str(run_dir), config=dict(config), id=run_id, resume="allow"
        )
        self._stages: set[str] = set()

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        if stage not in self._stages:
            # wandb's own step must never go back, but every stage counts from zero: each gets its own axis.
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({**metrics, f"{stage}/step": step})

    def show(self, step: int, images: Sequence[tuple[str, Any]], table: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        shown: dict[str, Any] = {"eval/step": step}
        if images:
            shown["eval/samples"] = [wandb.Image(image, caption=caption) for caption, image in images]
        if table:
            rows = [list(row.values()) for row in table]
            shown["eval/denoising"] = wandb.Table(columns=list(table[0]), data=rows)
        self._run.log(shown)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """One trackio run per run folder, stored where trackio stores its runs (TRACKIO_DIR)."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        import trackio

        # Two folders may have one name, and trackio knows a run by it.
        name, self.is_new = _kept(run_dir, "trackio", lambda: f"{run_dir.name}-{secrets.token_hex(2)}")
        self._run = trackio.init(project=project, name=name, config=dict(config), embed=False, resume="allow")

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def show(self, step: int, images: Sequence[tuple[str, Any]], table: Sequence[Mapping[str, Any]]) -> None:
        import pandas as pd
        import trackio

        shown: dict[str, Any] = {
            f"eval/samples_{i}": trackio.Image(pil, caption=t) for i, (t, pil) in enumerate(images)
        }
        if table:
            shown["eval/denoising"] = trackio.Table(dataframe=pd.DataFrame(table))
        self._run.log(shown, step=step)

    def close(self) -> None:
        import trackio

        trackio.finish()


class MLflow:
    """One MLflow run per run folder, on the server or in the store that MLFLOW_TRACKING_URI names."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        self._id, self.is_new = _kept(
            run_dir, "mlflow", lambda: self._client.create_run(experiment, run_name=run_dir.name).info.run_id
        )
        if self.is_new:
            self._client.log_dict(self._id, dict(config), "config.yaml")

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # MLflow allows no @ in a name.
        named = [Metric(name.replace("@", "_at_"), float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=named)

    def show(self, step: int, images: Sequence[tuple[str, Any]], table: Sequence[Mapping[str, Any]]) -> None:
        for number, (_, image) in enumerate(images):
            self._client.log_image(self._id, image, artifact_file=f"samples/step_{step}_{number}.png")
        if table:
            columns = {name: [row[name] for row in table] for name in table[0]}
            self._client.log_table(self._id, columns, f"samples/denoising_step_{step}.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)


_BACKENDS: dict[str, Callable[[Path, str, Mapping[str, Any]], Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


# Groups runs in wandb, trackio and MLflow.
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
        names: any of "tensorboard", "wandb", "trackio", "mlflow".
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
