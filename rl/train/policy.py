"""The policy as DeepSpeed sees it: rows in, log-probs of the recorded decisions out."""

from __future__ import annotations

import torch
from torch import nn

from rl.estimators.rows import ScoringRows, score_rows


class Policy(nn.Module):
    """Wraps a `DenoisingModel` so that every training forward goes through one `forward`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, rows: ScoringRows) -> tuple[torch.Tensor, torch.Tensor]:
        """logprob [N] and entropy [N]; see `score_rows`."""
        return score_rows(self.model, rows)  # type: ignore[arg-type]
