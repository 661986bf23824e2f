"""Likelihood estimates from artificial masks: copies of a finished answer with some tokens hidden again.

The answer is scored in states that the sampler never visited, so none of these is the log-prob of the rollout.
docs/algorithms.md says what each of them estimates and how large its error is; tests/test_masked_copies.py measures it.

The masks of a trajectory are a function of its seed (from run seed, RL step, prompt and sample) and of the pass over
the rollouts (`iteration`). So old, new and reference policy see the same masks, in any cut of an update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rl.estimators.combine import CombinedRows, SandwichRows, per_token
from rl.estimators.documents import Reads, canvas_document, read_blocks, whole_blocks
from rl.estimators.draws import Draw, Scope, check_prompt_mask, scope_positions
from rl.estimators.rows import TokenRows, assemble, readout
from rl.tasks.prompt_images import FIRST_IMAGE_ID
from rollouts.model_protocol import DenoisingModel
from rollouts.trajectory import TokenTrajectory

_GOLDEN = (5**0.5 - 1) / 2


def copy_rows(
    trajectories: Sequence[TokenTrajectory],
    model: DenoisingModel,
    draw: Draw,
    scope: Scope = "answer",
    prompt_mask: float = 0.0,
    iteration: int = 0,
    block: int | None = None,
) -> tuple[TokenRows, torch.Tensor]:
    """The copies of every trajectory, one document each, or all of them in one for a block-causal model.

    Response positions outside the scope are hidden in every copy and never read: the answer is scored as if the tokens
    behind it were not decided yet. A block-causal model gets `[clean | noisy blocks]` in place of the noisy canvases:
    every block sees its own hidden tokens and the clean blocks before it, as in its supervised training
    (`masking.py`). Only the blocks that are read are there, and the clean tokens once for all copies.

    Args:
        draw: chooses the copies; its argument is the scope's positions.
        prompt_mask: probability with which each prompt token of each copy is hidden (d1).
        iteration: pass over the rollouts; each has masks of its own.
        block: training block length of a block-causal model, None for its own.

    Returns:
        rows (`step` is the index of the copy), and the weight float64 [N] of every read.

    Raises:
        ValueError: a prompt is to be hidden from a block-causal model.
    """
    causal = model.attention == "block_causal"
    check_prompt_mask(model.attention, prompt_mask)
    documents, reads, weights = [], [], []
    size = block or model.block_length if causal else None
    for index, (trajectory, padded) in enumerate(zip(trajectories, whole_blocks(trajectories, size), strict=True)):
        if scope == "canvas" and trajectory.detail == "sample":
            raise ValueError(
                "algorithm.scope canvas scores what was decoded behind the answer, which this trajectory's engine does "
                "not return: set algorithm.scope to answer"
            )
        final, places = padded.final_canvas(), scope_positions(trajectory, scope)
        rng = np.random.default_rng([trajectory.seed, iteration])
        level = (np.random.default_rng(trajectory.seed).random() + iteration * _GOLDEN) % 1.0
        outside = np.setdiff1d(np.arange(trajectory.prompt_length, padded.length), [*places, *trajectory.placed])
        copies = []
        for step, copy in enumerate(draw(places, rng, level)):
            noisy = final.copy()
            noisy[outside] = noisy[copy.hidden] = trajectory.mask_token_id
            forgotten = rng.random(trajectory.prompt_length) < prompt_mask
            forgotten &= trajectory.prompt_ids < FIRST_IMAGE_ID
            noisy[: trajectory.prompt_length][forgotten] = trajectory.mask_token_id
            weights.append(np.full(len(copy.read), copy.weight))
            if size is None:
                documents.append(canvas_document(noisy))
                reads.append(Reads(index, copy.read, final[copy.read], step))
            copies.append((noisy, copy.read))
        if size is not None:
            document, column = read_blocks(final, copies, size)
            steps = np.repeat(np.arange(len(copies)), np.array([len(read) for _, read in copies], dtype=np.int64))
            documents.append(document)
            reads.append(Reads(index, column, final[document.position_ids[column]], steps))
    rows = assemble(documents, reads, trajectories, **readout(model))
    return rows, torch.from_numpy(np.concatenate([np.zeros(0), *weights]))


def answer_decisions(rows: TokenRows, weight: torch.Tensor, lengths: Sequence[int]) -> CombinedRows:
    """One decision per answer: all weighted reads added up, per token of the answer."""
    size = torch.tensor(lengths, dtype=weight.dtype)[rows.trajectory]
    index = torch.arange(len(lengths))
    return CombinedRows(
        rows=rows, part=rows.trajectory, weight=weight / size, trajectory=index, step=torch.zeros_like(index)
    )


def copy_decisions(rows: TokenRows, weight: torch.Tensor, lengths: Sequence[int], num_copies: int) -> CombinedRows:
    """One decision per copy of an answer, which share its weight: weighted reads added up, per token of the answer."""
    copy, part = torch.unique(rows.trajectory * num_copies + rows.step, return_inverse=True)
    size = torch.tensor(lengths, dtype=weight.dtype)[rows.trajectory]
    return CombinedRows(
        rows=rows,
        part=part,
        weight=weight / size,
        trajectory=copy // num_copies,
        step=copy % num_copies,
        weight_factor=torch.full((len(copy),), 1 / num_copies, dtype=torch.float64),
    )


def sandwich_decisions(
    rows: TokenRows, weight: torch.Tensor, lengths: Sequence[int], num_draws: int, power: float
) -> SandwichRows:
    """Two decisions per answer, both per token: step 0 the lower bound, step 1 the upper bound of SPG.

    The lower bound is the mean over the draws of the weighted log-probs. The upper one is the sum over tokens of
    (1/b) log mean over the draws of weight p^b. A token that no draw hid has no part in it (its mean would be 0).
    """
    lower = answer_decisions(rows, weight / num_draws, lengths)
    tokens = per_token(rows, weight)
    return SandwichRows(
        rows=rows,
        part=lower.part,
        weight=lower.weight,
        trajectory=lower.trajectory.repeat(2),
        step=torch.arange(2).repeat_interleave(len(lengths)),
        power=power,
        token=tokens.part,
        token_weight=weight / num_draws,
        answer=tokens.trajectory,
        scale=1.0 / torch.tensor(lengths, dtype=weight.dtype)[tokens.trajectory],
    )
