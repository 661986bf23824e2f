"""Teachers of recorded Gaussian steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rl.estimators.gaussian_step import GaussianRows
from rollouts.model_protocol import ImagePolicy


class GaussianTeachers:
    """Frozen policies, each for its prompts, that say which Gaussian they would have drawn recorded steps from."""

    def __init__(self, models: Sequence[ImagePolicy], prompts: Sequence[Sequence[str]], student: ImagePolicy):
        """
        Args:
            prompts: of each model, encoded as the student does; the first model also takes what no list names.

        Raises:
            ValueError: a teacher predicts something else than the student, or latents of another shape.
        """
        for model in models:
            for name in ("prediction_type", "latent_shape"):
                own, other = getattr(student, name), getattr(model, name)
                if own != other:
                    raise ValueError(f"algorithm.teachers: a teacher's {name} is {other}, the policy's is {own}")
        self.models = models
        self.known = [student.encode(list(names)) if names else {} for names in prompts]

    @torch.no_grad()
    def show(self, rows: GaussianRows) -> GaussianRows:
        """The rows with the means of their prompts' teachers as the anchor."""
        teacher = torch.zeros(len(rows.step), dtype=torch.int64)
        for index, known in enumerate(self.known):
            if known:
                teacher[self._among(rows.conditioning, known)] = index
        rows.anchor_mean = torch.zeros(rows.latent.shape, dtype=torch.float64)
        for index, model in enumerate(self.models):
            mine = teacher == index
            if mine.any():
                part = replace(
                    rows,
                    latent=rows.latent[mine],
                    timestep=rows.timestep[mine],
                    coefficients=rows.coefficients[mine],
                    conditioning={name: values[mine] for name, values in rows.conditioning.items()},
                    unguided=None if rows.unguided is None else rows.unguided[mine],
                )
                device = next(model.parameters()).device  # type: ignore[attr-defined]
                rows.anchor_mean[mine] = part.to(device).mean(model).cpu()
        return rows

    @staticmethod
    def _among(conditioning: dict[str, torch.Tensor], known: dict[str, torch.Tensor]) -> torch.Tensor:
        """bool [U]: conditioning that is one of the known rows, to the rounding of a text encoder."""
        found = torch.tensor(True)
        for name, rows in known.items():
            mine, theirs = (values.cpu().double().reshape(len(values), -1) for values in (conditioning[name], rows))
            found = found & (torch.cdist(mine, theirs, p=torch.inf) < 1e-3)
        return found.any(1)
