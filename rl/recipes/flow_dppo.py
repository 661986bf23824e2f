"""Flow-DPPO: Flow-GRPO with a bound on the KL between two steps' Gaussians in place of the clip.

"Flow-DPPO: Divergence Proximal Policy Optimization for Flow Matching Models" (arXiv 2606.11025), by its abstract and
the loss of UniRL (unirl/algorithms/flowdppo.py): a decision is left out where KL(new || old) = ||mean - old mean||^2 /
(2 std^2) is at least `kl_bound` and the ratio moves further away (ratio > 1 with A > 0, ratio < 1 with A < 0):

    loss = -A ratio,    0 where a decision is left out.

The clip of a ratio sees one sample; two policies far apart may have a ratio of 1 on it. Example: one entry, std 1,
old mean 0, new mean 0.2, drawn 0.1: the ratio is 1, the KL 0.02.

Departs with `old_logprob: recompute`: the old mean is still the sampler's own.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from rl.batch import DecisionBatch, LossOutput
from rl.recipes.flow_grpo import FlowGRPO


class FlowDPPO(FlowGRPO, defaults={"kl_to": "none", "kl_coef": 0.0}):
    unused = ("clip_low", "clip_high", "entropy_coef")

    kl_bound: float = Field(
        1e-5,
        gt=0,
        description="KL to the old policy from which a decision is held; of an entry, or of all with reduce sum.",
    )

    @model_validator(mode="after")
    def _one_kl(self) -> FlowDPPO:
        if self.kl_to != "none":
            raise ValueError("algorithm.kl_to of flow_dppo must be none: its KL is that to the old policy")
        if self.old_logprob == "on_policy":
            raise ValueError(
                "algorithm.old_logprob on_policy leaves flow_dppo no ratio: set it to sampler or recompute"
            )
        return self

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        rows = super().rows(trajectories, model, block, steps, iteration)
        rows.anchor_mean = rows.sampler_mean
        return rows

    def loss(self, batch: DecisionBatch) -> LossOutput:
        assert batch.kl is not None
        log_ratio = (batch.logprob - batch.old_logprob).clamp(-self.log_ratio_clamp, self.log_ratio_clamp)
        ratio, kl = log_ratio.exp(), batch.kl.detach()
        away = ((ratio > 1) & (batch.advantage > 0)) | ((ratio < 1) & (batch.advantage < 0))
        held = (kl >= self.kl_bound) & away
        loss = (-batch.advantage * ratio).masked_fill(held, 0.0)
        metrics = {"ratio": ratio, "log_ratio": log_ratio, "log_ratio_abs": log_ratio.abs(), "kl": kl}
        metrics |= {"clip_fraction": held.to(ratio.dtype), "logprob": batch.logprob, "entropy": batch.entropy}
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})
