"""Revision: a finished draft, read at tokens that stay visible in it and that somebody corrected.

ReDiff (Ji et al. 2025, arXiv 2510.19871) trains on the model's own drafts: the input is the draft with its mistakes,
the targets are the corrections. Corrections of another number of tokens are left out, as in the published data
pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import numpy as np

from rl.estimators.documents import Reads, noisy_document, whole_blocks
from rl.estimators.rows import TokenRows, assemble, readout
from rl.tasks.chat import token_ids
from rollouts.model_protocol import DenoisingModel
from rollouts.trajectory import TokenTrajectory


class Correction(NamedTuple):
    """int64 [E] places in an answer, from 0, and the tokens that stand there after it."""

    places: np.ndarray
    tokens: np.ndarray


def correction_of(draft: Sequence[int], corrected: Sequence[int], every: bool = False) -> Correction:
    """The tokens of a draft that a correction replaces. Example: [5, 6, 7] and [5, 8, 7] give [1] and [8].

    Texts of different length are aligned first; stretches that as many tokens replace count, others have no place.

    Args:
        every: also those that it leaves as they are; the example gives [0, 1, 2] and [5, 8, 7].
    """
    if len(draft) == len(corrected):
        spans = [(0, 0, len(draft))]
    else:
        matcher = SequenceMatcher(None, draft, corrected, autojunk=False)
        spans = [(i, j, i2 - i) for _, i, i2, j, j2 in matcher.get_opcodes() if i2 - i == j2 - j]
    pairs = [(i + k, corrected[j + k]) for i, j, size in spans for k in range(size)]
    pairs = [(place, token) for place, token in pairs if every or draft[place] != token]
    places, tokens = zip(*pairs, strict=True) if pairs else ((), ())
    return Correction(np.array(places, dtype=np.int64), np.array(tokens, dtype=np.int64))


def corrections_of(
    trajectories: Sequence[TokenTrajectory], texts: Sequence[str | None], tokenizer: Any, every: bool = False
) -> tuple[dict[int, Correction], int, int]:
    """Index of a draft -> its correction; how many drafts are right, and how many have no correction with a place.

    Args:
        texts: what each answer should be, None where nobody knows. A draft with an end token keeps it.
        every: right tokens are part of a correction (`correction_of`), and right drafts have one.
    """
    found, right, uncorrected, end = {}, 0, 0, tokenizer.eos_token_id
    for index, (trajectory, text) in enumerate(zip(trajectories, texts, strict=True)):
        if text is None:
            uncorrected += 1
            continue
        draft, (corrected,) = trajectory.response_ids().tolist(), token_ids(tokenizer, [text])
        if end is not None and draft[-1:] == [end] != corrected[-1:]:
            corrected = [*corrected, end]
        right += draft == corrected
        wrong = len(correction_of(draft, corrected).places) > 0
        uncorrected += draft != corrected and not wrong
        if wrong or (every and draft == corrected):
            found[index] = correction_of(draft, corrected, every)
    return found, right, uncorrected


def revision_rows(
    trajectories: Sequence[TokenTrajectory],
    corrections: Sequence[Correction],
    model: DenoisingModel,
    block: int | None = None,
) -> TokenRows:
    """One document for each draft, read where it was corrected.

    Args:
        corrections: of each trajectory.
        block: training block length, None for the rollout's.
    """
    size = (block or trajectories[0].block_length) if model.attention == "block_causal" else None
    documents, reads = [], []
    pairs = zip(whole_blocks(trajectories, block if size else None), corrections, strict=True)
    for index, (trajectory, (places, tokens)) in enumerate(pairs):
        draft = trajectory.final_canvas()
        document, shift = noisy_document(draft, draft, size, trajectory.prompt_length)
        documents.append(document)
        reads.append(Reads(index, trajectory.prompt_length + places + shift, tokens, 0))
    # The model's own distribution: no temperature of the sampler's, and no filter.
    return assemble(documents, reads, **readout(model))
