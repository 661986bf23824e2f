"""Conversion of an autoregressive model: noisy blocks of answers, fitted to tokens or to the model's own distributions.

Sources of the noise: SDAR (arXiv 2510.06303) hides a random share of every block. Efficient-DLM (arXiv 2512.14067)
hides later tokens of a block more often, as a decoder that goes left to right does: weight exp(beta (1 - t) i) of token
i in a block of which the share t is hidden. NBDiff (arXiv 2512.06776) adds the autoregressive loss on the clean tokens,
which only see what is left of them (`TokenRows.context_causal`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from rl.estimators.documents import Reads, noisy_document
from rl.estimators.rows import TokenRows, assemble, readout
from rl.estimators.taught import TaughtRows
from rollouts.model_protocol import DenoisingModel


class Text(NamedTuple):
    """A prompt and its answer.

    Attributes:
        ids: int64 [L], both.
        prompt_length: at least 1.
        ends: the answer ends with the end token; otherwise it was cut.
    """

    ids: np.ndarray
    prompt_length: int
    ends: bool


@dataclass(kw_only=True)
class SoftRows(TaughtRows):
    """Rows whose teacher has been asked.

    Attributes:
        logprobs: [N, U] of tokens 0..U-1, the teacher's at each decision.
    """

    logprobs: torch.Tensor

    def taught(self) -> tuple[torch.Tensor, None]:
        return self.logprobs, None


def hidden_tokens(block: np.ndarray, rng: np.random.Generator, slope: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of an answer are hidden: of every block k tokens, k uniform in 1 .. all of them.

    Example: blocks [3, 4, 4] hide the first token always, and one or both of the others, equally often.

    Args:
        block: int64 [n], ascending, the block of every token.
        slope: beta of Efficient-DLM; 0 chooses the k tokens uniformly.

    Returns:
        hidden bool [n], and the share float64 [n] of its block that is hidden.
    """
    _, first, own, size = np.unique(block, return_index=True, return_inverse=True, return_counts=True)
    count = 1 + (rng.random(len(size)) * size).astype(np.int64)
    share, place = count / size, np.arange(len(block)) - first[own]
    # The k largest of log-weights with Gumbel noise are k draws without replacement.
    key = slope * (1 - share[own]) * place + rng.gumbel(size=len(block))
    hidden = np.empty(len(block), dtype=bool)
    hidden[np.lexsort((-key, block))] = place < count[own]
    return hidden, share[own]


def conversion_rows(
    texts: Sequence[Text],
    model: DenoisingModel,
    eos_token_id: int | None,
    rng: np.random.Generator,
    block_length: int | None,
    gen_length: int,
    slope: float = 0.0,
    elbo: bool = False,
    ar_weight: float = 0.0,
    part: slice = slice(None),
) -> tuple[TokenRows, torch.Tensor]:
    """Answers under noise, `[clean | noisy copies]` of a block-causal model or the noisy canvas of a full one.

    The last block (or the canvas) of an answer that ended is filled with end tokens, which are hidden and fitted like
    its own. Behind a cut answer nothing is known: those positions stay masked and are not read.

    Args:
        block_length: None for full attention, which takes the answer for one block.
        gen_length: tokens behind the prompt on a full-attention canvas.
        slope: see `hidden_tokens`.
        elbo: weight 1/t on a token of a block of which the share t is hidden (the bound of MDLM), in place of 1.
        ar_weight: weight of the autoregressive loss on the clean answer, 0 for none.
        part: the texts to return; noise is drawn for all of them, so that it does not depend on the cut.

    Returns:
        rows (`trajectory` is the text in the part), and weight float64 [N]: the mean over hidden tokens (elbo: over
        answer tokens) of the whole batch, plus `ar_weight` x the mean over clean ones.

    Raises:
        ValueError: a text that does not fit the model.
    """
    grid = block_length or 1
    drawn = []
    for text in texts:
        length = len(text.ids)
        padded = -(-length // grid) * grid if block_length else text.prompt_length + gen_length
        if padded > model.max_length:
            raise ValueError(
                f"a text of {length} tokens needs {padded} positions in blocks of {grid}, the model has "
                f"{model.max_length}: shorten sampler.gen_length or convert.block_lengths"
            )
        end = padded if text.ends else length
        places = np.arange(text.prompt_length, end)
        hidden, share = hidden_tokens(places // grid if block_length else np.zeros_like(places), rng, slope)
        drawn.append((padded, places, hidden, share))
    fill = model.mask_token_id if eos_token_id is None else eos_token_id
    total = sum(len(places) if elbo else int(hidden.sum()) for _, places, hidden, _ in drawn)
    clean_total = sum(len(text.ids) - text.prompt_length for text in texts)
    documents, reads, weights = [], [], []
    for index, i in enumerate(range(len(texts))[part]):
        text, (padded, places, hidden, share) = texts[i], drawn[i]
        clean = np.full(padded, fill if text.ends else model.mask_token_id, dtype=np.int64)
        clean[: len(text.ids)] = text.ids
        noisy = clean.copy()
        column = places[hidden]
        noisy[column] = model.mask_token_id
        document, shift = noisy_document(clean, noisy, block_length, text.prompt_length)
        weight = (1.0 / share[hidden] if elbo else np.ones(len(column))) / total
        at, target = column + shift, clean[column]
        if ar_weight:
            own = np.arange(text.prompt_length, len(text.ids))
            at, target = np.concatenate([at, own]), np.concatenate([target, text.ids[own]])
            weight = np.concatenate([weight, np.full(len(own), ar_weight / clean_total)])
        documents.append(document)
        reads.append(Reads(index, at, target, 0))
        weights.append(weight)
    rows = assemble(documents, reads, **readout(model))
    return rows, torch.from_numpy(np.concatenate(weights))


@torch.no_grad()
def soft_rows(rows: TokenRows, texts: Sequence[Text], teacher: Any) -> SoftRows:
    """The same rows with the distributions of an autoregressive model, read causally on the clean texts.

    Behind an answer's end token the end token is certain.

    Args:
        texts: those that the rows are made of.
        teacher: a causal language model of transformers.
    """
    width, device = max(len(text.ids) for text in texts), rows.input_ids.device
    ids = torch.zeros(len(texts), width, dtype=torch.int64, device=device)
    for index, text in enumerate(texts):
        ids[index, : len(text.ids)] = torch.from_numpy(text.ids)
    # Padding is on the right, where a causal model does not look.
    states = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
    position = rows.position_ids[rows.row, rows.column]
    behind = position >= torch.tensor([len(text.ids) for text in texts], device=device)[rows.trajectory]
    state = states[rows.trajectory, (position - 1).clamp(max=width - 1)]
    logprobs = teacher.get_output_embeddings()(state).float().log_softmax(-1)
    logprobs[behind] = -torch.inf
    logprobs[behind, rows.target[behind]] = 0.0
    return SoftRows(**vars(rows), kind="forward", logprobs=logprobs)
