"""DPPO: policy gradient on the denoising steps of action chunks, with an advantage for each chunk.

Ren et al. 2024, "Diffusion Policy Policy Optimization" (arXiv 2409.00588): a chunk's denoising steps share the
advantage of the chunk, PPO's clip, `sampler.min_std` as the noise that explores.

Departs from the published code: the baseline is not a network with GAE but fitted anew to the returns of every RL step;
a decision's log-prob is the sum over the chunk's entries and not their mean, and is not clamped; all denoising steps of
a chunk count alike and have one clip (it discounts the earlier ones, whose clip is narrower).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from rl.batch import Tensor
from rl.estimators.base import Verdicts
from rl.recipes.base import Recipe


class DPPO(Recipe):
    modality: ClassVar[str] = "actions"

    baseline: Literal["state", "mean", "leave_one_out"] = Field(  # type: ignore[assignment]
        "state",
        description="What a chunk's return is compared with: a regression on what is seen before the chunk (state), or "
        "the episodes that began in the same state, at the same chunk.",
    )
    scale: Literal["none", "batch_std"] = Field(  # type: ignore[assignment]
        "batch_std",
        description="What advantages are divided by: their standard deviation over the RL step, or nothing.",
    )
    gamma: float = Field(0.99, ge=0, le=1, description="Discount from a chunk to the next.")

    @property
    def needs_group(self) -> bool:
        return self.baseline != "state"

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.modalities.actions import action_rows

        return action_rows(trajectories, steps)

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        return trajectory.num_steps if steps is None else int(steps[: trajectory.num_steps].sum())

    def summary(self, trajectory: Any) -> tuple[Sequence[Sequence[float]], Sequence[float], int]:
        """Of each chunk what was seen before it (C lists of O) and given during it (C); the steps of a chunk."""
        return trajectory.observations.tolist(), trajectory.rewards.tolist(), trajectory.chunks.shape[1] - 1

    def advantage(self, verdicts: Verdicts) -> Tensor:
        """[M, T]: return from the chunk on, minus the baseline; NaN behind the end, and for a failed episode."""
        import torch

        from rl.advantages import group_advantage, minus_regression, returns_to_go

        seen, given, steps = zip(*verdicts.summaries, strict=True)
        later = returns_to_go(verdicts.reward, given, self.gamma)
        failed = verdicts.reward.isnan()
        length = torch.tensor([len(own) for own in given])
        done = (torch.arange(later.shape[1]) < length[:, None]) & ~failed[:, None]
        advantage = torch.full_like(later, torch.nan)
        if done.any():
            if self.baseline == "state":
                whole = [
                    torch.tensor(own).double() for own, lost in zip(seen, failed.tolist(), strict=True) if not lost
                ]
                advantage[done] = minus_regression(later[done], whole)
            else:
                # Behind its end an episode earns nothing, which is what the others are compared with.
                later[failed] = torch.nan
                each = [group_advantage(column, verdicts.group, self.baseline) for column in later.T]
                advantage[done] = torch.stack(each, dim=1)[done]
            if self.scale != "none":
                advantage = advantage / (advantage[done].std(correction=0) + 1e-4)
        return advantage.repeat_interleave(steps[0], dim=1)
