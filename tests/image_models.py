"""Small image policies and trajectories for the tests."""

from __future__ import annotations

from typing import Any

import torch

from rl.models.class_policy import ClassPolicy, new_policy
from rollouts.engines.base import SampleRequest
from rollouts.engines.latent import LatentEngine
from rollouts.latent_trajectory import LatentTrajectory
from rollouts.samplers.latent_options import LatentSamplerOptions

CLASSES = ["zero", "one", "two"]
SIZES = {"sample_size": 3, "width": 16, "num_blocks": 2}
FLOW = {"name": "FlowMatchEulerDiscreteScheduler"}


def tiny_policy(scheduler: dict[str, Any] | None = None, seed: int = 0, double: bool = True) -> ClassPolicy:
    """Weights spread so that every latent, step and label gets another output."""
    policy = new_policy(SIZES, scheduler or {}, CLASSES, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    return policy.double() if double else policy


def rollouts(
    policy: ClassPolicy,
    options: LatentSamplerOptions,
    count: int = 3,
    branch_points: tuple[tuple[int, int], ...] = (),
    **engine: Any,
) -> list[LatentTrajectory]:
    dtype = next(policy.parameters()).dtype
    sampler = LatentEngine(policy, options, dtype=dtype, branch_points=branch_points, **engine)
    prompts = [CLASSES[i % len(CLASSES)] for i in range(count)]
    return sampler.generate([SampleRequest(p, 10 + i) for i, p in enumerate(prompts) for _ in range(sampler.leaves)])
