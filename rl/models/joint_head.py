"""One layer above a frozen model: what would it say if it saw the tokens that were revealed since its last forward?

Joint sampling in diffusion language models (arXiv 2509.22738): a full forward is followed by steps of one transformer
layer alone, which takes the final hidden states and the embeddings of the tokens revealed since, and whose logits are
trained to be those of a full forward there. The abstract and notes were read, not the paper. The shape is ours: the
layer is one of the backbone's own kind, positions and norms included, between two linear maps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm


class JointHead(nn.Module):
    """Hidden states [B, W, D] -> hidden states, the very same ones before it is trained."""

    def __init__(self, layer: nn.Module, width: int):
        """`layer` is a backbone of one layer, `width` D."""
        super().__init__()
        self.layer = layer
        self.told = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor, shown: torch.Tensor, **how: Any) -> torch.Tensor:
        """
        Args:
            hidden: of the last full forward.
            embedded: [B, W, D], embeddings of the tokens as they are now.
            shown: bool [B, W], those revealed since that forward; of all others the embedding is not looked at.
            how: visibility and positions, as a transformers body takes them.
        """
        # Embeddings and states may differ in size by far.
        told = self.told(rms_norm(embedded, embedded.shape[-1:])) * shown[..., None]
        return hidden + self.out(self.layer(inputs_embeds=hidden + told, **how).last_hidden_state)
