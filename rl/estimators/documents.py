"""Documents: tokens that may see each other, and the places in them where decisions are read.

An estimator makes documents (one state of a canvas, or `[clean | noisy copies of blocks]`) and says what is read of
them (`Reads`). `rl/estimators/rows.py` puts them into rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rollouts.trajectory import TokenTrajectory


class Document(NamedTuple):
    """Tokens that may see each other, int64 [W] each; `TokenRows` says what the fields are."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    segment: np.ndarray
    block: np.ndarray


class Reads(NamedTuple):
    """The decisions that are read in one document.

    Attributes:
        trajectory: index of the trajectory they belong to.
        column: int64 [E], the place of each in the document.
        target: int64 [E], the token that was chosen.
        step: int64 [E], or the step of all of them.
        sampler_logprob, weight_factor: float64 [E] or None.
        is_choice: bool [E] or None, what the policy chose of its decoder, from the state at its column itself.
    """

    trajectory: int
    column: np.ndarray
    target: np.ndarray
    step: np.ndarray | int
    sampler_logprob: np.ndarray | None = None
    weight_factor: np.ndarray | None = None
    is_choice: np.ndarray | None = None


def canvas_document(canvas: np.ndarray, block_length: int | None = None, active: int | None = None) -> Document:
    """One state of a canvas [L].

    Args:
        block_length: the grid of a block-causal model, None under full attention.
        active: the block that is being decided, where it must see itself whole although clean tokens are causal
            (`TokenRows.context_causal`): its tokens, and all behind it, are a noisy segment.
    """
    positions = np.arange(len(canvas))
    zeros = np.zeros_like(positions)
    if block_length is None:
        return Document(canvas, positions, zeros, zeros)
    block = positions // block_length
    segment = zeros if active is None else np.maximum(block - active + 1, 0)
    return Document(canvas, positions, segment, block)


def read_columns(document: Document, column: np.ndarray, logit_shift: int) -> np.ndarray:
    """int64 [E]: where the tokens in some columns of a document are predicted.

    With shift 1 that is the position before, inside the same noisy copy. The first token of a copy is predicted by the
    last clean token before its block. In the example of `block_document` (clean p a b c at columns 0 to 3, copies b M
    and M c), the M of the first copy stands in column 5 and is read in column 4. That of the second stands in column 6
    and is read in column 1, at the clean a.
    """
    left = column - logit_shift
    # Clean tokens stand at their position.
    crossing = document.segment[left] != document.segment[column]
    return np.where(crossing, document.position_ids[column] - logit_shift, left)


def block_document(
    clean: np.ndarray, copies: Sequence[tuple[int, np.ndarray]], block_length: int | np.ndarray
) -> Document:
    """`[clean | noisy copies of blocks]`: many states of a block-causal model's canvas, scored in one forward.

    A copy sees itself and the clean blocks before its own. Example with blocks of 2, mask M, two copies of block 1::

        block_document([p, a, b, c], [(1, [b, M]), (1, [M, c])], 2)
        # input_ids     p a b c  b M  M c
        # position_ids  0 1 2 3  2 3  2 3
        # segment       0 0 0 0  1 1  2 2
        # block         0 0 1 1  1 1  1 1

    Args:
        clean: int64 [C], from position 0.
        copies: (index of the block, its tokens).
        block_length: of every block; where lengths differ, int64, the position where each begins, from 0 on.
    """
    positions = np.arange(len(clean))
    sizes = [len(tokens) for _, tokens in copies]
    index = np.array([block for block, _ in copies], dtype=np.int64)
    if isinstance(block_length, int):
        begin, own = index * block_length, positions // block_length
    else:
        begin, own = block_length[index], np.searchsorted(block_length, positions, side="right") - 1
    # 0, 1, ... within each copy.
    inside = np.arange(sum(sizes)) - np.repeat(np.cumsum([0, *sizes[:-1]])[: len(sizes)], sizes)
    return Document(
        np.concatenate([clean, *(tokens for _, tokens in copies)]),
        np.concatenate([positions, np.repeat(begin, sizes) + inside]),
        np.concatenate([np.zeros_like(positions), np.repeat(np.arange(1, len(copies) + 1), sizes)]),
        np.concatenate([own, np.repeat(index, sizes)]),
    )


def read_blocks(
    clean: np.ndarray, copies: Sequence[tuple[np.ndarray, np.ndarray]], block_length: int
) -> tuple[Document, np.ndarray]:
    """`block_document` of several noisy canvases, with the blocks that are read in each and nothing behind the last.

    Example with blocks of 2: of clean [p, a, b, c], one canvas [p, a, M, c] that is read at 2 and one [p, M, M, M] that
    is read at 1 and 2 make input_ids `p a  M c  p M  M M`; the columns are 2, 5 and 6.

    Args:
        clean: int64 [L], whole blocks.
        copies: (noisy canvas [L], int64 the positions that are read in it, rising).

    Returns:
        the document, and the columns of all that is read, copy after copy.
    """
    wanted = [np.unique(read // block_length) for _, read in copies]
    # A document has a token, also where nothing is read.
    clean = clean[: max((int(blocks[-1]) for blocks in wanted if len(blocks)), default=1) * block_length]
    blocks: list[tuple[int, np.ndarray]] = []
    columns = [np.zeros(0, dtype=np.int64)]
    for (noisy, read), own in zip(copies, wanted, strict=True):
        place = len(blocks) + np.searchsorted(own, read // block_length)
        columns.append(len(clean) + place * block_length + read % block_length)
        blocks += [(int(b), noisy[b * block_length : (b + 1) * block_length]) for b in own]
    return block_document(clean, blocks, block_length), np.concatenate(columns)


def noisy_document(
    clean: np.ndarray, noisy: np.ndarray, block_length: int | None, start: int = 0
) -> tuple[Document, int]:
    """A noised canvas [L] as a model sees it in supervised training.

    Args:
        clean: int64 [L], the canvas without noise.
        block_length: None under full attention: the noisy canvas alone. Otherwise the clean canvas, and one noisy copy
            of every block from that of position `start` on.

    Returns:
        the document, and a shift: the noisy token of position p stands in column p + shift.
    """
    if block_length is None:
        return canvas_document(noisy), 0
    first_block = start // block_length
    copies = [(b, noisy[b * block_length :][:block_length]) for b in range(first_block, len(noisy) // block_length)]
    return block_document(clean, copies, block_length), len(clean) - first_block * block_length


def whole_blocks(trajectories: Sequence[TokenTrajectory], block: int | None) -> Sequence[TokenTrajectory]:
    """Trajectories whose canvas ends where a training block does, or a chosen one; what is added was never revealed."""
    if block is None:
        return trajectories
    return [t if t.choices is not None else replace(t, length=-(-t.length // block) * block) for t in trajectories]
