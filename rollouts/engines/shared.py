"""Forward identical canvases once.

The rollouts of one prompt all begin from the same canvas, and a confident policy keeps many of them equal for
steps on end. A denoiser's output depends on the canvas alone (the draws are per request), so equal rows of
a batch can share one forward: the same numbers for less work.
"""

from __future__ import annotations

from typing import Any

import torch

from rollouts.model_protocol import DenoisingModel


class SharedForwards:
    """A `DenoisingModel` that runs each distinct row of a batch once (forwards with a cache pass through).

    Attributes:
        last_run: rows that went through the network in the last call.
    """

    def __init__(self, model: DenoisingModel):
        self._model = model
        self.last_run = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        *,
        visible: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any | None = None,
    ) -> torch.Tensor:
        """[B, Q, D]; see `DenoisingModel.hidden_states`."""
        if cache is not None or position_ids is not None or (visible is not None and visible.shape[1] != 1):
            self.last_run = len(input_ids)
            return self._model.hidden_states(input_ids, visible=visible, position_ids=position_ids, cache=cache)
        key = input_ids if visible is None else torch.cat([input_ids, visible[:, 0].to(input_ids)], dim=1)
        first, inverse = first_of_equal_rows(key)
        self.last_run = len(first)
        hidden = self._model.hidden_states(input_ids[first], visible=None if visible is None else visible[first])
        return hidden[inverse]

    def denoise(self, canvas: torch.Tensor, *state: Any) -> torch.Tensor:
        """[B, C, D]; see `rl/models/canvas_lm.py`, which reads equal clean texts once. Equal canvases are rare."""
        self.last_run = len(canvas)
        hidden: torch.Tensor = self._model.denoise(canvas, *state)  # type: ignore[attr-defined]
        return hidden


def first_of_equal_rows(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Group equal rows.

    Args:
        key: int64 [B, W].

    Returns:
        int64 [U], one row index per distinct row, and int64 [B], which of these each row equals.
    """
    distinct, inverse = torch.unique(key, dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(key), device=key.device)
    first = first.scatter_reduce(0, inverse, torch.arange(len(key), device=key.device), "amin")
    return first, inverse
