"""The policy as the learner wraps it, and the diffusion value model: the expected outcome of a partly denoised canvas.

Wang et al. 2025 (arXiv 2509.06949): a copy of the policy's backbone with a linear head, zero at the start. The value of
a decision is read at the decided position of the row in which the decision is scored, so the value model knows exactly
what the policy knew.
"""

from __future__ import annotations

import torch
from torch import nn

from rl.estimators.base import Rows, Scores
from rl.estimators.rows import TokenRows
from rl.models.copies import trained_copy


class Policy(nn.Module):
    """A model whose training forward is the scoring of rows, so that DeepSpeed sees every one of them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, rows: Rows) -> Scores:
        return rows.score(self.model)


class ValueHead(nn.Module):
    """Hidden state -> one number; zero-initialised, so values start at 0."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [...], in at least float32."""
        value = self.linear(hidden).squeeze(-1)
        return value.to(torch.promote_types(value.dtype, torch.float32))


class ValueModel(nn.Module):
    """Own backbone, copied from the policy, and a head. Of a policy with adapters, only those are copied."""

    def __init__(self, policy_model: nn.Module):
        super().__init__()
        self.model = trained_copy(policy_model)
        # The copied output head predicts nothing here; left trainable it would only cost optimizer state.
        for parameter in self.model.head_parameters():  # type: ignore[operator]
            parameter.requires_grad_(False)
        self.head = ValueHead(self.model.hidden_size)  # type: ignore[arg-type]

    def forward(self, rows: TokenRows) -> torch.Tensor:
        """Values [N] of the rows' decisions."""
        hidden = rows.hidden(self.model)  # type: ignore[arg-type]
        return self.head(hidden[rows.row, rows.column])


class PolicyWithValue(nn.Module):
    """A policy that carries the value head on its own backbone: half the memory, one forward for both."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.head = ValueHead(model.hidden_size)  # type: ignore[arg-type]

    def forward(self, rows: TokenRows) -> Scores:
        """With the value of every decision."""
        hidden = rows.hidden(self.model)  # type: ignore[arg-type]
        scores = rows.score(self.model, hidden)  # type: ignore[arg-type]
        return scores._replace(value=self.head(hidden[rows.row, rows.column]))
