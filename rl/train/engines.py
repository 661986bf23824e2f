"""The rollout engine a config names, and how it gets the policy's weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import nn

from rl import distributed
from rl.config import Config
from rl.modalities.base import open_modality
from rl.tasks.load import load_task
from rollouts.engines.base import Engine


def open_engine(config: Config, model: Any, modality: Any, run_dir: Path) -> Engine | None:
    """Start the engine that `rollout.engine` names; None when the model of this process samples."""
    if config.rollout.engine == "in_process":
        return None
    if config.rollout.engine == "ray":
        return _ray_engine(config, modality, run_dir)
    from rollouts.engines.server.engine import ServerEngine

    return ServerEngine(
        config.rollout.server,
        model,
        modality.options(),
        weights_dir=config.rollout.server.weights_dir or run_dir / "rollout_weights",
        eos_token_id=modality.tokenizer.eos_token_id,
        leader=distributed.rank() == 0,
        from_leader=lambda value: distributed.gather_objects(value)[0],
    )


def _ray_engine(config: Config, modality: Any, folder: Path) -> Engine:
    from rollouts.engines.ray_workers import RayEngine

    ray, rank = config.rollout.ray, distributed.rank()
    if ray.address is None and distributed.world_size() > 1:
        raise ValueError(
            "rollout.ray.address is needed with several ranks, which share one cluster: ray start --head, then set it "
            "to auto"
        )
    if ray.weights_dir is not None:
        # Other runs may share it, and the engine empties what it is given.
        folder = Path(ray.weights_dir) / f"{folder.name}_{crc32(bytes(folder.absolute())):08x}"
    return RayEngine(
        WorkerModel(config, "cuda" if ray.gpus_per_worker else "cpu"),
        modality.options(),
        workers=ray.workers,
        cpus_per_worker=ray.cpus_per_worker,
        gpus_per_worker=ray.gpus_per_worker,
        address=ray.address,
        weights_dir=folder / f"weights_rank_{rank}" if ray.weights == "file" else None,
        max_restarts=ray.max_restarts,
        start_seconds=ray.start_seconds,
        timeout_seconds=ray.timeout_seconds,
    )


@dataclass(frozen=True)
class WorkerModel:
    """Builds, in a rollout worker, the model and the engine that the config describes."""

    config: Config
    device: str

    def __call__(self) -> tuple[nn.Module, Callable[[Any], Engine]]:
        if self.config.run.num_threads:
            torch.set_num_threads(self.config.run.num_threads)
        modality = open_modality(self.config, load_task(self.config.task.name, self.config.task.params))
        model = modality.load_model().to(self.device)
        return model, lambda options: modality.engine(model, options, torch.device(self.device))


class PolicyWeights:
    """The weights of the copy that samples. A `rollouts.engines.base.WeightSource`."""

    def __init__(self, model: Any, tokenizer: Any, layout: str | None):
        self.model, self.tokenizer, self.layout = model, tokenizer, layout

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def save(self, folder: Path) -> None:
        from rl.models.export import write_whole

        # A server knows nothing of adapters.
        write_whole(self.model, self.tokenizer, folder, self.layout)
