"""Block-level ELBO ratio: a decision is one block of the answer, its log-prob the evidence lower bound of that block.

It stands between two recipes of the framework. ESPO (arXiv 2512.03759) takes the bound of the whole answer as one
action, with one ratio and one clip; coupled-GRPO (arXiv 2506.20639) takes every token. Here an answer of L tokens makes
ceil(L / block_size) decisions, so that one bad block can be clipped and the others still learn.

docs/examples/block_elbo.md explains the file from top to bottom.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field

from rl.estimators.combine import CombinedRows
from rl.estimators.draws import Copy
from rl.recipes.masked import MaskedRecipe


class BlockELBO(MaskedRecipe):
    block_size: int = Field(4, ge=1, description="Tokens of the answer per decision.")
    draws: int = Field(2, ge=1, description="Masks per block and pass over the rollouts.")

    def copies(self, places: np.ndarray, rng: np.random.Generator, level: float) -> list[Copy]:
        """`draws` copies for each block in turn: the blocks before it are clean, those behind it hidden."""
        copies = []
        for start in range(0, len(places), self.block_size):
            block, behind = places[start : start + self.block_size], places[start + self.block_size :]
            for draw in range(self.draws):
                count = 1 + int((draw + level) / self.draws * len(block))
                read = rng.permutation(block)[:count]
                copies.append(Copy(np.concatenate([read, behind]), read, len(block) / count / self.draws))
        return copies

    def decide(self, rows: Any, weight: torch.Tensor, lengths: Any) -> CombinedRows:
        """One decision per block: the weighted sum of its reads, per token of the block."""
        owner = torch.stack([rows.trajectory, rows.step // self.draws])
        (trajectory, block), part = torch.unique(owner, dim=1, return_inverse=True)
        size = (torch.tensor(lengths)[trajectory] - block * self.block_size).clamp(max=self.block_size)
        return CombinedRows(rows=rows, part=part, weight=weight / size[part], trajectory=trajectory, step=block)

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        return -(-self.length(trajectory) // self.block_size)
