"""Supervised training: answers under random masks (the MDLM and BD3-LM objectives).

Sahoo et al. 2024 (arXiv 2406.07524): with a masking probability t drawn uniformly, the bound on
-log p(answer) is E[(1/t) sum over masked tokens of -log p(token | masked canvas)]. For block-causal models
the same holds inside each block given the clean blocks before it (Arriola et al. 2025, arXiv 2503.09573).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from rl.estimators.documents import Reads, noisy_document
from rl.estimators.rows import TokenRows, assemble
from rl.estimators.taught import BridgedRows, JointRows

_TINY = np.finfo(float).tiny


def random_mask_rows(
    sequences: Sequence[np.ndarray],
    prompt_lengths: Sequence[int],
    mask_token_id: int,
    rng: np.random.Generator,
    block_length: int | None = None,
    logit_shift: int = 0,
    semi_ar: int | None = None,
    part: slice = slice(None),
    context_causal: bool = False,
    effective: bool = False,
    levels: tuple[float, float] | None = None,
    errors: float = 0.0,
    error_tokens: np.ndarray | None = None,
    consistency: float = 0.0,
    joint: bool = False,
) -> tuple[TokenRows, torch.Tensor]:
    """Mask the answers at random.

    Masking levels are stratified: each of the n levels of a batch falls in its own interval of width 1/n. Every level
    is still uniform, and the batch varies less.

    Args:
        sequences: int64 [L_i], prompt and answer; a multiple of `block_length` long when that is given.
        prompt_lengths: tokens that are never masked.
        rng: the only source of randomness.
        block_length: None for full attention: one level per sequence. Otherwise one level per block, and documents
            `[clean | one noisy copy of every block]`.
        semi_ar: for full attention decoded in blocks of this many response tokens. One block per sequence, drawn
            uniformly, is masked at random; the blocks behind it are masked altogether and are not targets.
        part: the sequences to return. Masks are drawn for all of them, so that the mask of a sequence does not depend
            on the cut into micro-batches and ranks.
        logit_shift, context_causal: as of the model.
        effective: weights 1/s in place of 1/t, with the share s of the block's (or sequence's) answer tokens that is
            masked indeed (SDAR-VL, Cheng et al. 2025, arXiv 2512.14068: effective mask ratio scaling).
        levels: alpha and beta of the Beta distribution of the levels (SDAR-VL, section 3.3), independent draws. The
            weights 1/t then no longer make the bound. None is uniform and stratified.
        errors: share of the visible answer tokens that random ones of `error_tokens` int64 [n] replace; they are read
            too, with weight 1 (ReDiff, arXiv 2510.19871). A draw may be the token itself.
        consistency: share of the model's own prediction in the targets, see `BridgedRows`. Of a block (or sequence)
            with level t every mask stays with probability s/t, one uniform draw.
        joint: fit the joint head to the model where masks are revealed in the same way, see `JointRows`.

    Returns:
        rows whose decisions are the masked tokens, and w float64 [N], which makes the weighted sum over decisions an
        unbiased estimate of the bound: 1/t, times the number of blocks when one block stands for all of them.
    """
    if block_length is not None and semi_ar is not None:
        raise ValueError("sft.masking semi_ar is for full attention: block-causal models train on every block")
    if effective and semi_ar is not None:
        raise ValueError("sft.loss_weight effective is for masking random: set sft.loss_weight to elbo")
    if consistency and (semi_ar is not None or errors):
        raise ValueError("sft.consistency is for masking random without sft.errors: set it to 0")
    if block_length is not None and any(len(sequence) % block_length for sequence in sequences):
        raise ValueError(f"sequences must be multiples of the block length {block_length}")
    start, end = np.asarray(prompt_lengths)[:, None], np.array([[len(sequence)] for sequence in sequences])
    positions = np.arange(int(end.max()))
    answer = (positions >= start) & (positions < end)
    size = block_length or len(positions)
    blocks = (len(sequences), len(positions) // size)
    # A Beta draw may be 0 in floating point; such a level masks nothing.
    draws = stratified(math.prod(blocks), rng) if levels is None else rng.beta(*levels, blocks).clip(_TINY)
    level = np.repeat(draws.reshape(blocks), size, axis=1)
    read = hidden = answer & (rng.random(answer.shape) < level)
    weight = 1.0 / (_masked_share(hidden, answer, size) if effective else level)
    if semi_ar is not None:
        counts = -(-(end - start) // semi_ar)
        chosen = (rng.random((len(sequences), 1)) * counts).astype(np.int64)
        own = (positions - start) // semi_ar
        read = hidden & (own == chosen)
        hidden = read | (answer & (own > chosen))
        weight = weight * counts
    clean = np.stack([np.pad(sequence, (0, len(positions) - len(sequence))) for sequence in sequences])
    noisy = np.where(hidden, mask_token_id, clean)
    if errors:
        assert error_tokens is not None
        wrong = answer & ~hidden & (rng.random(answer.shape) < errors)
        noisy = np.where(wrong, rng.choice(error_tokens, answer.shape), noisy)
        weight = np.where(wrong, 1.0, weight)
        read = read | wrong

    def rows_of(canvases: np.ndarray) -> TokenRows:
        documents, reads = [], []
        for row, i in enumerate(range(len(sequences))[part]):
            sequence, column = sequences[i], np.flatnonzero(read[i])
            canvas = canvases[i, : len(sequence)]
            document, shift = noisy_document(sequence, canvas, block_length, prompt_lengths[i])
            documents.append(document)
            reads.append(Reads(row, column + shift, sequence[column], 0))
        return assemble(documents, reads, logit_shift=logit_shift, context_causal=context_causal)

    rows = rows_of(noisy)
    if consistency or joint:
        ratio = np.repeat(rng.random(blocks), size, axis=1)
        still = hidden & (rng.random(answer.shape) < ratio)
        shown, open_ = rows_of(np.where(still, mask_token_id, clean)), torch.from_numpy(still[part][read[part]])
        if joint:
            # What is revealed has no prediction left to fit.
            rows = JointRows(**vars(rows.some(open_)), shown=shown.some(open_))
            return rows, torch.from_numpy(weight[part][read[part]])[open_]
        rows = BridgedRows(**vars(rows), shown=shown, open=open_, share=consistency)
    return rows, torch.from_numpy(weight[part][read[part]])


def _masked_share(masked: np.ndarray, answer: np.ndarray, size: int) -> np.ndarray:
    """[n, L]: of each block of `size` positions the share of answer tokens that is masked; 1 where nothing is."""
    blocks = (len(masked), -1, size)
    masked, answer = (flags.reshape(blocks).sum(2) for flags in (masked, answer))
    return np.repeat(np.where(masked, masked / np.maximum(answer, 1), 1.0), size, axis=1)


def stratified(count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` uniform draws from (0, 1], one in each interval of width 1/count, in random order."""
    return (rng.permutation(count) + 1.0 - rng.random(count)) / count
