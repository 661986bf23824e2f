"""States of `TokenSampler`: canvases on their way, and the edits that led there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from rollouts.samplers import noise


@dataclass(frozen=True)
class Edits:
    """The edits of one step of one state, and through `before` those of all earlier ones: branches share them."""

    before: Edits | None
    step: int
    position: np.ndarray
    token: np.ndarray
    logprob: np.ndarray
    confidence: np.ndarray


def flattened(edits: Edits | None) -> dict[str, Any]:
    """Columns of a `TokenTrajectory` from a history, oldest step first."""
    steps = []
    while edits is not None:
        steps.append(edits)
        edits = edits.before
    steps.reverse()
    return {
        "step": np.concatenate([np.full(len(s.token), s.step, dtype=np.int32) for s in steps]),
        "position": np.concatenate([s.position for s in steps]).astype(np.int32),
        "token": np.concatenate([s.token for s in steps]),
        "logprob": np.concatenate([s.logprob for s in steps]),
        "confidence": np.concatenate([s.confidence for s in steps]).astype(np.float32),
    }


@dataclass(frozen=True)
class TokenStates:
    """B canvases on their way.

    Attributes:
        row: int64 [B], prompt of the sampler.
        seed: int64 [B], the latest seed, kept for the record.
        canvas: int64 [B, L], right-padded with masks.
        noise: int64 [B, L], seed of every position.
        start, end: int64 [B], the block that is being decoded.
        block_step, step: int64 [B], place in the block's schedule, and forwards taken in all.
        done: bool [B].
        history: the edits so far.
    """

    row: np.ndarray
    seed: np.ndarray
    canvas: torch.Tensor
    noise: torch.Tensor
    start: np.ndarray
    end: np.ndarray
    block_step: np.ndarray
    step: np.ndarray
    done: np.ndarray
    history: list[Edits | None]

    def __len__(self) -> int:
        return len(self.row)

    def select(self, index: np.ndarray) -> TokenStates:
        """The states at these indices, in this order."""
        where = torch.as_tensor(index, dtype=torch.int64, device=self.canvas.device)
        chosen: dict[str, Any] = {
            f.name: getattr(self, f.name)[where if isinstance(getattr(self, f.name), torch.Tensor) else index]
            for f in fields(self)
            if f.name != "history"
        }
        return TokenStates(history=[self.history[i] for i in index], **chosen)

    @staticmethod
    def join(parts: Sequence[TokenStates]) -> TokenStates:
        """Several batches as one."""
        columns: dict[str, Any] = {}
        for f in fields(TokenStates):
            values = [getattr(part, f.name) for part in parts]
            if f.name == "history":
                columns[f.name] = [edits for part in values for edits in part]
            else:
                columns[f.name] = torch.cat(values) if isinstance(values[0], torch.Tensor) else np.concatenate(values)
        return TokenStates(**columns)


def random_subset(of: torch.Tensor, count: torch.Tensor, seeds: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """bool [B, L]: `count` [B] random True positions of `of` [B, L], by the draws of `seeds` [B, L] at `step` [B]."""
    index = torch.arange(of.shape[1], device=of.device)
    key = noise.uniform(seeds, step[:, None], index, noise.REMASK_STREAM).masked_fill(~of, torch.inf)
    rank = key.argsort(dim=-1).argsort(dim=-1)
    return of & (rank < count[:, None])


def masked_again(edits: Edits | None, positions: np.ndarray, mask_token_id: int) -> Edits | None:
    """The history after masking `positions` again, as edits of its latest step.

    What that very step revealed is taken back instead: no forward ever saw it.
    """
    if edits is None or not len(positions):
        return edits
    stays = ~np.isin(edits.position, positions)
    older = np.setdiff1d(positions, edits.position)
    nothing = np.zeros(len(older))
    return Edits(
        before=edits.before,
        step=edits.step,
        position=np.concatenate([edits.position[stays], older]),
        token=np.concatenate([edits.token[stays], np.full(len(older), mask_token_id)]),
        logprob=np.concatenate([edits.logprob[stays], nothing]),
        confidence=np.concatenate([edits.confidence[stays], nothing]),
    )
