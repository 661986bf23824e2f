"""Rows of tokens to forward, and where in them the recorded decisions are read off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rl.estimators.base import Scores
from rl.estimators.logprob import logprob_and_entropy
from rollouts.engines.shared import first_of_equal_rows
from rollouts.model_protocol import DenoisingModel
from rollouts.samplers.distribution import guided_logits

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Larger than any block number: a noisy key is not reached by comparing blocks.
_NO_BLOCK = 2**62


@dataclass
class TokenRows:
    """R rows of width W that score N decisions; a `rl.estimators.base.Rows`.

    Every token belongs to a document (one trajectory) and to a segment of it: segment 0 is the clean
    part, each other segment is one noisy copy of one block. A full-attention canvas is one segment.

    Attributes:
        input_ids, position_ids: int64 [R, W].
        document: int64 [R, W], 0, 1, ... within a row, -1 on padding.
        segment: int64 [R, W].
        block: int64 [R, W], grid block of each token (0 everywhere without a grid).
        row, column: int64 [N], the place of each decided position. Decisions are ordered by trajectory, and
            within it as they were recorded.
        target: int64 [N], the token that was chosen.
        trajectory: int64 [N], index of the decision's trajectory among those given.
        step: int64 [N], its (merged) denoising step within the trajectory, 0, 1, 2, ...
        sampler_logprob, weight_factor: float64 [N] or None, see `rl.estimators.base.Rows`.
        unprompted: int64 [R, W], input_ids with every prompt token masked, None without guidance.
        cfg_scale: scale of the guidance against them (`rollouts.samplers.distribution.guided_logits`).
        temperature, top_p, top_k: the sampling distribution.
        logit_shift: the state that predicts a position stands this far to its left.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    document: torch.Tensor
    segment: torch.Tensor
    block: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    target: torch.Tensor
    trajectory: torch.Tensor
    step: torch.Tensor
    sampler_logprob: torch.Tensor | None = None
    weight_factor: torch.Tensor | None = None
    unprompted: torch.Tensor | None = None
    cfg_scale: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    logit_shift: int = 0

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0] * self._branches

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel() * self._branches

    @property
    def _branches(self) -> int:
        return 1 if self.unprompted is None else 2

    def distinct(self) -> TokenRows:
        """The same decisions on the distinct rows only. Log-probs and gradients stay what they were."""
        layout = ["input_ids", "position_ids", "document", "segment", "block"]
        if self.unprompted is not None:
            layout.append("unprompted")
        key = torch.cat([getattr(self, name) for name in layout], dim=1)
        first, inverse = first_of_equal_rows(key)
        if len(first) == len(key):
            return self
        kept = {name: getattr(self, name)[first] for name in layout}
        return replace(self, row=inverse[self.row], **kept)

    def score(self, model: DenoisingModel, hidden: torch.Tensor | None = None) -> Scores:
        """Log-prob and entropy of every decision under the model's weights.

        Hidden states are gathered before the output head: logits are [N, V], never [R, W, V].

        Args:
            hidden: [R, W, D] when the backbone has already run on these rows.
        """
        place = (self.row, self.column - self.logit_shift)
        logits = model.token_logits((self.hidden(model) if hidden is None else hidden)[place])
        if self.unprompted is not None:
            unconditional = model.token_logits(self.hidden(model, self.unprompted)[place])
            logits = guided_logits(logits, unconditional, self.cfg_scale)
        return Scores(*logprob_and_entropy(logits, self.target, self.temperature, self.top_p, self.top_k))

    def hidden(self, model: DenoisingModel, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """[R, W, D]: the backbone on the rows, or on other tokens [R, W] in their place.

        The mask is built once here, not in every layer.
        """
        visible: Any
        if getattr(model, "wants_block_mask", False):
            visible = self.block_mask()
        elif self._one_segment():
            # What padding sees does not matter, so one mask serves all queries of a row.
            seen = self.document == 0
            visible = None if bool(seen.all()) else seen[:, None, :]
        else:
            visible = self.visible()
        ids = self.input_ids if input_ids is None else input_ids
        return model.hidden_states(ids, visible=visible, position_ids=self.position_ids)

    def to(self, device: torch.device | str) -> TokenRows:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def _keys_to_queries(self) -> tuple[torch.Tensor, ...]:
        """int64 [R, W] each: what the rule below compares.

        A clean token sees the clean blocks up to its own. A noisy token sees the clean blocks before its own, and
        its own segment. Nothing crosses documents. So a query sees a key of its document if the key is clean
        and its block is at most `last`, or if both carry the same `copy`.
        """
        noisy = self.segment > 0
        last = self.block - noisy.long()
        clean_block = torch.where(noisy, _NO_BLOCK, self.block)
        copy = torch.where(noisy, self.segment, -1)
        return self.document, last, clean_block, copy

    def visible(self) -> torch.Tensor | None:
        """bool [R, W, W]: may query (second axis) look at key (third axis)?

        None when every token sees its whole row.
        """
        if self._one_segment() and bool((self.document == 0).all()):
            return None
        document, last, clean_block, copy = self._keys_to_queries()
        q, k = (slice(None), slice(None), None), (slice(None), None, slice(None))
        seen = clean_block[k] <= last[q]
        # Clean keys and clean queries carry the same copy number, -1: a clean query's reach is its blocks alone.
        seen |= (copy[q] == copy[k]) & (copy[q] >= 0)
        return seen.logical_and_(document[q] == document[k])

    def _one_segment(self) -> bool:
        """Whether a row is one document without a grid: padding alone then limits what is seen."""
        return not bool((self.segment != 0).any() | (self.block != 0).any() | (self.document > 0).any())

    def block_mask(self) -> BlockMask:
        """The same visibility as a FlexAttention block mask; it skips whole tiles of keys."""
        from torch.nn.attention.flex_attention import create_block_mask

        num_rows, width = self.input_ids.shape
        device = self.input_ids.device
        # Building the tiles without compiling holds the dense mask for a moment; compiling needs a GPU's time only.
        return create_block_mask(
            self.mask_mod(), num_rows, None, width, width, device=device, _compile=device.type == "cuda"
        )

    def mask_mod(self) -> Any:
        """FlexAttention's form of the rule: (row, head, query index, key index) -> bool."""
        document, last, clean_block, copy = self._keys_to_queries()

        def may_see(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            own = (copy[b, q] == copy[b, k]) & (copy[b, q] >= 0)
            return (document[b, q] == document[b, k]) & ((clean_block[b, k] <= last[b, q]) | own)

        return may_see
