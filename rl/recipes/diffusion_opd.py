"""DiffusionOPD: several teachers, each trained for a reward of its own, distilled into one student on its own rollouts.

"DiffusionOPD" (arXiv 2605.15055), by the loss of UniRL (unirl/algorithms/diffusionopd.py) and Flow-Factory's
description: the student samples, the teacher of the prompt's domain says which Gaussian it would have drawn every
recorded step from, and the loss is KL(student's step || teacher's step), exact,

    ||student mean - teacher mean||^2 / (2 std^2),

over D where `reduce` is mean. Rewards are scored and not trained on. Example: one entry, std 1/2, means 0.1 apart:
0.02.

Departs from that code: the step's variance always divides (there an option); whole models as teachers.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PrivateAttr

from rl.batch import DecisionBatch, LossOutput, Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.images import ImageRecipe, on_steps


class DiffusionOPD(ImageRecipe):
    unused = ("baseline", "scale", "clip_low", "clip_high", "log_ratio_clamp", "advantage_clip", "entropy_coef")

    old_logprob: Literal["on_policy"] = Field("on_policy", description="Distillation alone has no ratio.")
    kl_to: Literal["none"] = Field("none", description="The loss holds to the teachers.")
    teachers: dict[str, list[str]] = Field(
        {}, description="Model of a teacher -> prompts it teaches. The first teaches all that no list names, too."
    )
    _models: Any = PrivateAttr(None)

    def requires(self, config: Config) -> dict[str, Any]:
        return {"filters.drop_zero_variance": False}

    @property
    def needs_group(self) -> bool:
        return False

    def check(self, config: Config) -> None:
        if not self.teachers:
            raise ValueError("algorithm.teachers is empty: name a model, e.g. {runs/ocr/final: []}")

    def prepare(self, run: Any) -> None:
        from rl.estimators.gaussian_teachers import GaussianTeachers

        if self._models is None:
            models = [run.modality.load_model(path).to(run.device).requires_grad_(False) for path in self.teachers]
            self._models = GaussianTeachers(models, list(self.teachers.values()), run.model)

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        return self._models.show(super().rows(trajectories, model, block, steps, iteration))

    def advantage(self, verdicts: Verdicts) -> Tensor:
        return on_steps(verdicts.reward * 0.0, verdicts)

    def loss(self, batch: DecisionBatch) -> LossOutput:
        assert batch.kl is not None
        return LossOutput(batch.kl, {"teacher_kl": batch.kl.detach(), "logprob": batch.logprob.detach()})
