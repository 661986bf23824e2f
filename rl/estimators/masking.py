"""Rows for supervised training: answers under random masks (the MDLM and BD3-LM objectives).

Sahoo et al. 2024 (arXiv 2406.07524): with a masking probability t drawn uniformly, the bound on
-log p(answer) is E[(1/t) sum over masked tokens of -log p(token | masked canvas)]. For block-causal models
the same holds inside each block given the clean blocks before it (Arriola et al. 2025, arXiv 2503.09573).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rl.estimators.rows import Document, Reads, TokenRows, assemble, noisy_document


def random_mask_rows(
    sequences: Sequence[np.ndarray],
    prompt_lengths: Sequence[int],
    mask_token_id: int,
    rng: np.random.Generator,
    block_length: int | None = None,
    logit_shift: int = 0,
    semi_ar: int | None = None,
    part: slice = slice(None),
) -> tuple[TokenRows, torch.Tensor]:
    """Mask the answers at random and say where to read the masked tokens.

    Masking levels are stratified: each of the n levels of a batch falls in its own interval of width 1/n,
    which leaves every one uniform and lowers the variance of the batch.

    Args:
        sequences: int64 [L_i], prompt and answer; a multiple of `block_length` long when that is given.
        prompt_lengths: tokens that are never masked.
        rng: the only source of randomness.
        block_length: None for full attention: one level per sequence. Otherwise one level per block, and
            rows `[clean | one noisy copy of every block]`.
        semi_ar: for full attention decoded in blocks of this many response tokens: one block per sequence,
            drawn uniformly, is masked at random, what follows it is masked altogether and not a target.
        part: which sequences to return. Masks are drawn for all of them, so that the mask of a sequence
            does not depend on how a batch is cut into micro-batches and ranks.

    Returns:
        rows, and w float64 [N], the weight that makes the sum over decisions an unbiased estimate of the
        bound: 1/t, times the number of blocks when one block stands for all of them.
    """
    count = len(sequences)
    width = max(len(sequence) for sequence in sequences)
    ids = np.zeros((count, width), dtype=np.int64)
    answer = np.zeros((count, width), dtype=bool)
    for i, (sequence, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        ids[i, : len(sequence)] = sequence
        answer[i, prompt_length : len(sequence)] = True
    positions = np.broadcast_to(np.arange(width), ids.shape)
    if block_length is None:
        level = _stratified(count, rng)[:, None]
    else:
        if any(len(sequence) % block_length for sequence in sequences):
            raise ValueError(f"sequences must be multiples of the block length {block_length}")
        num_blocks = width // block_length
        level = np.repeat(_stratified(count * num_blocks, rng).reshape(count, num_blocks), block_length, axis=1)
    masked = answer & (rng.random(ids.shape) < level)
    hidden = masked
    weight = np.broadcast_to(1.0 / level, ids.shape)
    if semi_ar is not None:
        if block_length is not None:
            raise ValueError("sft.masking semi_ar is for full attention: block-causal models train on every block")
        start = np.asarray(prompt_lengths)[:, None]
        num_blocks = -(-(np.array([len(s) for s in sequences])[:, None] - start) // semi_ar)
        chosen = (rng.random((count, 1)) * num_blocks).astype(np.int64)
        own = (positions - start) // semi_ar
        masked = masked & (own == chosen)
        hidden = masked | (answer & (own > chosen))
        weight = weight * num_blocks
    noisy = np.where(hidden, mask_token_id, ids)
    documents: list[Document] = []
    reads, weights = [], []
    for i in range(count)[part]:
        document, shift = noisy_document(sequences[i], noisy[i, : len(sequences[i])], block_length)
        column = np.flatnonzero(masked[i])
        number, step = np.full((len(column), 2), [len(documents), 0]).T
        reads.append(Reads(number, column + shift, sequences[i][column], step))
        documents.append(document)
        weights.append(weight[i, column])
    return assemble(documents, reads, logit_shift=logit_shift), torch.from_numpy(np.concatenate(weights))


def _stratified(count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` uniform draws from (0, 1], one in each interval of width 1/count, in random order."""
    return (rng.permutation(count) + 1.0 - rng.random(count)) / count
