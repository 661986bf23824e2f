"""AWM, advantage weighted matching: the loss of pretraining on the policy's own samples, weighed by their advantages.

Xue et al. 2025, "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models" (arXiv 2509.25050), by
its code's options and Flow-Factory's trainer: with e = mean (v(x_t, t) - (noise - x0))^2 on a sample noised anew,

    logprob = -t ((e + eps)^p - eps^p) / p  (`weighting: ghuber`, p = 1/4), or -e (`uniform`),
    loss = max(-A ratio, -A clip(ratio)) + kl_coef mean (v - v_reference)^2,  ratio = exp(logprob - old logprob).

A is the reward minus its group's mean over the standard deviation of all rewards, at most 1. Example: e = 1/16, t = 1:
the log-prob is -2 (4 eps^p = 0.0126 aside), and its gradient -e^(-3/4) = -8 times that of e.

Departs from that code: one time per equal part of the schedule (there the sampler's own times, a tenth left out), no
distance to a moving average of the weights; a model that predicts noise or data is matched on that.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.recipes.forward import MatchingRecipe


class AWM(
    MatchingRecipe,
    defaults={"scale": "reward_std", "advantage_clip": 1.0, "kl_to": "reference", "kl_coef": 0.003, "num_draws": 6},
):
    weighting: Literal["ghuber", "uniform"] = Field("ghuber", description="Of a squared error, see the recipe.")

    @property
    def error(self) -> Any:  # type: ignore[override]
        return "ghuber" if self.weighting == "ghuber" else "plain"
