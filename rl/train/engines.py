"""The rollout engine a config names: what the run needs of it, and how it gets the policy's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rl.algorithms import parse_options
from rl.config import Config
from rl.train import distributed

if TYPE_CHECKING:
    import torch

    from rl.train.session import Session
    from rollouts.engines.base import Engine


def open_engine(session: Session) -> Engine | None:
    """Start the engine that `rollout.engine` names; None when the model of this process samples."""
    config = session.config
    if config.rollout.engine == "in_process":
        return None
    from rollouts.engines.server.engine import ServerEngine

    return ServerEngine(
        config.rollout.server,
        session.model,
        session.medium.options(),
        weights_dir=config.rollout.server.weights_dir or session.run_dir / "rollout_weights",
        eos_token_id=session.tokenizer.eos_token_id,
        leader=distributed.rank() == 0,
        barrier=distributed.barrier,
    )


def engine_needs(config: Config) -> dict[str, str]:
    """What the run needs of its engine (keys of `rollouts.engines.base.NEEDS`) -> the option that needs it."""
    options = parse_options(config.algorithm)
    needs = {name: f"algorithm.name {options.name}" for name in sorted(options.engine_needs())}
    if config.sampler.reviser != "none":
        needs["remasking"] = f"sampler.reviser {config.sampler.reviser}"
    if config.sampler.record_x0:
        needs["fills"] = "sampler.record_x0"
    if config.train.mixed_steps:
        needs["request_steps"] = "train.mixed_steps"
    return needs


class PolicyWeights:
    """The weights of the copy that samples. A `rollouts.engines.base.WeightSource`."""

    def __init__(self, session: Session):
        self.session = session

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.session.model.named_parameters()}

    def save(self, folder: Path) -> None:
        layout = self.session.config.rollout.server.layout
        if layout is None:
            self.session.save_model(folder)
        else:
            from rl.models.export import write_published

            write_published(self.session.model, self.session.tokenizer, folder, layout)
