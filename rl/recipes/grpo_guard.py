"""GRPO-Guard: Flow-GRPO whose ratios are centred at 1 and spread alike at every step, so that the clip acts on both
sides.

Wang et al. 2025, "GRPO-Guard" (arXiv 2510.22319), by the equations in VeRL-Omni's documentation (algo/grpo_guard):
with b = ||mean - old mean||^2 / (2 std^2), std the step's own,

    ratio = exp((logprob - old_logprob + b) std),    loss = max(-A ratio, -A clip(ratio)) / dt.

Under the old policy logprob - old_logprob has the mean -b, which b takes away, and a spread proportional to 1 / std,
which the factor takes away. Example: one entry, means 0 and 0.1, std 0.5, drawn 0: the log-ratio is -0.02, the
guarded one 0.

Departs from that code: std and dt are those of each decision (there means over the micro-batch).
"""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from rl.config import Config
from rl.recipes.flow_grpo import FlowGRPO


class GRPOGuard(FlowGRPO, defaults={"clip_low": 2e-6, "clip_high": 2e-6, "kl_to": "none", "kl_coef": 0.0}):
    @model_validator(mode="after")
    def _exact_kl(self) -> GRPOGuard:
        if self.kl_to != "none" and self.kl_estimator != "exact":
            raise ValueError("algorithm.kl_estimator of grpo_guard must be exact: its log-probs are rescaled")
        if self.old_logprob == "on_policy":
            raise ValueError(
                "algorithm.old_logprob on_policy leaves grpo_guard no ratio: set it to sampler or recompute"
            )
        return self

    def requires(self, config: Config) -> dict[str, Any]:
        return {"sampler.kind": "flow_sde"}

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.gaussian_step import guarded

        return guarded(super().rows(trajectories, model, block, steps, iteration), trajectories)
