"""A block-causal model read from left to right, as a model of blocks of one token, and a corrector that uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from rollouts.model_protocol import DenoisingModel, mask_token_of
from rollouts.samplers.guide import drafts
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.step import StepState
from rollouts.visibility import block_causal_visibility

Count = Callable[[torch.Tensor], None]


def read_causally(
    model: DenoisingModel, tokens: torch.Tensor, row: torch.Tensor, position: torch.Tensor, count: Count
) -> torch.Tensor:
    """[N, V]: positions as blocks of one token predict them, given the tokens before each.

    Without a logit shift a position is read at a mask of its own, which stands in a column behind the canvas, sees the
    tokens before the position and itself, and is seen by nobody.

    Args:
        tokens: int64 [A, W].
        row, position: int64 [N], in row-major order; those of a row are consecutive positions.
        count: is told the tokens that were forwarded.
    """
    width = tokens.shape[1]
    index = torch.arange(width, device=tokens.device).expand(len(tokens), -1)
    causal = block_causal_visibility(index, width, 1)
    if model.logit_shift:
        hidden = model.hidden_states(tokens, visible=causal)
        count(tokens)
        return model.token_logits(hidden[row, position - 1])
    most = int(torch.bincount(row).max())
    # Missing masks of a row repeat its last position, and are not read.
    first = torch.full((len(tokens),), width, device=row.device).scatter_reduce(0, row, position, "amin")
    asked = (first[:, None] + torch.arange(most, device=row.device)).clamp(max=width - 1)
    wide = torch.cat([tokens, torch.full_like(asked, mask_token_of(model))], dim=1)
    visible = torch.zeros(len(tokens), wide.shape[1], wide.shape[1], dtype=torch.bool, device=row.device)
    visible[:, :width, :width] = causal
    visible[:, width:, :width] = index[:, None, :] < asked[:, :, None]
    visible[:, width:, width:] = torch.eye(most, dtype=torch.bool, device=row.device)
    hidden = model.hidden_states(wide, visible=visible, position_ids=torch.cat([index, asked], dim=1))
    count(wide)
    return model.token_logits(hidden[row, width + position - first[row]])


class CausalCorrector:
    """ARPC (Deschenaux and Gulcehre 2026, arXiv 2606.02241, and the published code).

    In every step all masks of the block get the model's draws, a second forward reads the filled block from left to
    right, and the tokens that it finds least likely are masked, new ones and old ones alike, as many as the schedule
    leaves masked. So a token may be taken back until the block is finished.

    Departures: the number of masks follows `quota` (the code rounds (1 - a_s) x block length); of the code's measures
    only the negative log-likelihood is here; the second forward has no cache.
    """

    def __init__(self, model: DenoisingModel, count: Count):
        self.model, self.count = model, count

    def steer(
        self, state: StepState, logits: torch.Tensor, options: SamplerOptions, prompt: torch.Tensor, end: torch.Tensor
    ) -> tuple[StepState, SamplerOptions, None]:
        """See `rollouts.samplers.guide.Guide.steer`: `running` is what the reading says of every token of the block."""
        assert state.filled is not None
        row, position = state.where()
        tokens = state.canvas.index_put((row, position), drafts(state, logits, options, 1)[0][0])
        row, position = (state.eligible | state.filled).nonzero(as_tuple=True)
        read = read_causally(self.model, tokens[:, : int(end.max())], row, position, self.count).log_softmax(-1)
        score = read.gather(-1, tokens[row, position][:, None]).squeeze(-1).double()
        nothing = torch.full(tokens.shape, -torch.inf, dtype=torch.float64, device=tokens.device)
        return replace(state, running=nothing.index_put((row, position), score)), options, None


def corrector(model: DenoisingModel, options: SamplerOptions, count: Count) -> CausalCorrector | None:
    """The corrector of a decoder, where it has one."""
    return CausalCorrector(model, count) if options.reviser == "arpc" else None
