"""The policy as DeepSpeed sees it: rows in, log-probs of their decisions out."""

from __future__ import annotations

import torch
from torch import nn

from rl.estimators.base import DecisionRows


class Policy(nn.Module):
    """Wraps a denoiser so that every training forward goes through one `forward`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, rows: DecisionRows) -> tuple[torch.Tensor, ...]:
        """logprob [U] and entropy [U]; see `DecisionRows.score`."""
        return rows.score(self.model)
