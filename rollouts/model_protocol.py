"""What a sampler or an estimator may ask of a model, and nothing more."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class DenoisingModel(Protocol):
    """A masked-diffusion language model.

    Hidden states and the output head are separate so that logits are only ever computed at the
    positions somebody looks at.

    Attributes:
        mask_token_id: id of an undecided position.
        attention: "full" (every position sees every other) or "block_causal" (position p sees the
            blocks up to its own, on a grid anchored at position 0).
        block_length: grid size of a block-causal model, else None.
        logit_shift: 0 when the state at position j predicts token j, 1 when the state at j-1 does.
        max_length: longest canvas the model can see.
    """

    mask_token_id: int
    attention: str
    block_length: int | None
    logit_shift: int
    max_length: int

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        *,
        visible: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any | None = None,
    ) -> torch.Tensor:
        """Final hidden states.

        Args:
            input_ids: int64 [B, Q].
            visible: bool [B, Q, K], True where a query may look at a key; None means all of them.
            position_ids: int64 [B, Q]; None means 0..Q-1.
            cache: key-value store handed to the attention layers; K counts its entries too.

        Returns:
            [B, Q, D].
        """
        ...

    def token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] in at least float32; the mask token can never be chosen."""
        ...


def mask_token_of(model: DenoisingModel) -> int:
    """The model's mask token id, or a ValueError that says how to set it."""
    if model.mask_token_id is None:
        raise ValueError("model.mask_token_id is not set: name the mask token id in the model config")
    return model.mask_token_id
