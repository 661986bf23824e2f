"""Which engine of this process samples a model of tokens."""

from __future__ import annotations

from typing import Any

from rollouts.engines.canvas import CanvasEngine
from rollouts.engines.choosing import ChoosingBlocks, ChoosingEngine
from rollouts.engines.in_process import InProcessEngine
from rollouts.engines.joint import JointEngine
from rollouts.engines.self_speculative import SelfSpeculativeEngine
from rollouts.engines.uniform import UniformEngine
from rollouts.model_protocol import DenoisingModel, noise_of
from rollouts.samplers.options import SamplerOptions


def token_engine(model: DenoisingModel, options: SamplerOptions, **settings: Any) -> InProcessEngine:
    """The engine for a model's noise and a decoder; settings are those of `InProcessEngine`."""
    if getattr(model, "canvas_length", None):
        return CanvasEngine(model, options, **settings)
    if noise_of(model) == "uniform":
        return UniformEngine(model, options, **settings)
    if options.choose is not None:
        kind = ChoosingBlocks if model.attention == "block_causal" else ChoosingEngine
        return kind(model, options, **settings)
    if options.joint_steps:
        return JointEngine(model, options, **settings)
    return (SelfSpeculativeEngine if options.verify else InProcessEngine)(model, options, **settings)
