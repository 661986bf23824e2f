"""The likelihood of a given text under a model: the masked-diffusion bound, by random masks or exactly.

A noisy region holds n tokens: the whole text under full attention, a block's part of it in a block-causal model. The
bound of MDLM (Sahoo et al. 2024, arXiv 2406.07524) on log p(text | context) is the sum over all non-empty sets S of
these tokens of

    sum over i in S of log p(token i | everything but S)  /  (|S| * C(n, |S|))

It equals the average over all orders of decoding one token at a time (LLaDA, arXiv 2502.09992, eq. 6). The estimate
draws |S| uniformly (stratified) and then S, with weight n / |S|. When there are fewer sets than samples asked for, the
sets are summed instead, and no error is left. With one token per region there is one set, and the bound is the
log-likelihood itself: a block-causal model with block length 1 is scored exactly, in one forward.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rl.estimators.documents import Reads, noisy_document
from rl.estimators.rows import TokenRows, assemble, readout
from rollouts.model_protocol import DenoisingModel, noise_of

Ids = Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """log p(text | context), or the bound on it, in nats.

    Example: `Likelihood(-12.3, num_samples=128, std_error=0.4, exact=False)`.

    Attributes:
        logprob: the value; apart from its error never above the true log-likelihood.
        num_samples: number of mask patterns in it.
        std_error: standard error over the patterns; 0 where all patterns were summed.
        exact: the value is the log-likelihood itself, not a bound on it.
    """

    logprob: float
    num_samples: int
    std_error: float
    exact: bool


# Masked positions int64 [m] of one canvas, and the weight of each token's log-prob.
Pattern = tuple[np.ndarray, np.ndarray]


@dataclass
class _Text:
    """One text laid out.

    Attributes:
        canvas: int64 [L], context, text, and masks up to the end of the last block.
        start: position of the text's first token.
        patterns: the masks it is scored under.
        summed: they are all there are.
        exact: every region has one token.
    """

    canvas: np.ndarray
    start: int
    patterns: list[Pattern]
    summed: bool
    exact: bool


def log_likelihoods(
    model: DenoisingModel,
    pairs: Sequence[tuple[Ids, Ids]],
    num_samples: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Likelihood]:
    """The likelihoods of texts given their contexts.

    Args:
        pairs: (context ids, text ids), a context of at least one token each.
        num_samples: mask patterns per text, K.
        batch_size: rows per forward; it changes no result beyond rounding.
        seed: with the ids of a pair it determines that pair's patterns.

    Raises:
        ValueError: an empty context, a text that does not fit the model, or a number below 1.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be at least 1, got {num_samples} and {batch_size}")
    if noise_of(model) != "absorbing":
        raise ValueError(f"likelihoods are of models with masks, and this one's noise is {noise_of(model)}")
    texts = [_layout(model, context, text, num_samples, seed) for context, text in pairs]
    sums = [np.zeros(len(text.patterns)) for text in texts]
    jobs = [(index, k) for index, text in enumerate(texts) for k in range(len(text.patterns))]
    # Rows of like length share a forward.
    jobs.sort(key=lambda job: -len(texts[job[0]].canvas))
    with torch.no_grad():
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            rows, weight = _rows(model, [(texts[index], texts[index].patterns[k]) for index, k in batch])
            logprob = rows.to(device).score(model).logprob.double().cpu().numpy()
            totals = np.bincount(rows.trajectory.numpy(), logprob * weight, minlength=len(batch))
            for total, (index, k) in zip(totals, batch, strict=True):
                sums[index][k] = total
    return [_likelihood(text, total) for text, total in zip(texts, sums, strict=True)]


def _likelihood(text: _Text, sums: np.ndarray) -> Likelihood:
    count = len(sums)
    if text.summed:
        return Likelihood(float(sums.sum()), count, 0.0, text.exact)
    error = float(sums.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf
    return Likelihood(float(sums.mean()), count, error, text.exact)


def _layout(model: DenoisingModel, context: Ids, text: Ids, num_samples: int, seed: int) -> _Text:
    if not len(context):
        raise ValueError("a context needs at least one token: give the end token where there is none")
    block = model.block_length if model.attention == "block_causal" else None
    length = len(context) + len(text)
    width = length if block is None else -(-length // block) * block
    if width > model.max_length:
        raise ValueError(f"a text needs {width} positions, the model has {model.max_length}")
    canvas = np.full(width, model.mask_token_id, dtype=np.int64)
    canvas[:length] = [*context, *text]
    targets = np.arange(len(context), length)
    regions = [targets] if block is None else [targets[targets // block == b] for b in np.unique(targets // block)]
    regions = [region for region in regions if len(region)]
    largest = max((len(region) for region in regions), default=0)
    # 2**20 sets are never summed, and the power is not even computed for a long text.
    summed = largest <= 20 and 2**largest - 1 <= num_samples
    if summed:
        sets = [list(_all_sets(region)) for region in regions]
    else:
        rng = np.random.default_rng([seed, len(context), zlib.crc32(canvas.tobytes())])
        sets = [list(_drawn_sets(region, num_samples, rng)) for region in regions]
    patterns = [
        _joined([own[k] for own in sets if k < len(own)]) for k in range(2**largest - 1 if summed else num_samples)
    ]
    return _Text(canvas, len(context), patterns, summed, all(len(region) == 1 for region in regions))


def _joined(sets: Sequence[tuple[np.ndarray, float]]) -> Pattern:
    """One set of every region as a mask of the whole canvas."""
    weight = np.repeat([weight for _, weight in sets], [len(places) for places, _ in sets])
    return np.concatenate([places for places, _ in sets]), weight


def _all_sets(region: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """Every non-empty set of positions with its weight in the bound."""
    n = len(region)
    for size in range(1, n + 1):
        for places in itertools.combinations(region, size):
            yield np.array(places, dtype=np.int64), 1.0 / (size * math.comb(n, size))


def _drawn_sets(region: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, float]]:
    """`count` random sets, sizes uniform and spread evenly, with the weights of the estimate."""
    n = len(region)
    level = (rng.permutation(count) + rng.random(count)) / count
    for size in 1 + (level * n).astype(np.int64):
        yield rng.choice(region, size, replace=False), n / size


def _rows(model: DenoisingModel, jobs: Sequence[tuple[_Text, Pattern]]) -> tuple[TokenRows, np.ndarray]:
    """One document per job: the noisy canvas, or `[clean | noisy copies of the text's blocks]`.

    Returns:
        rows, whose `trajectory` is the job, and weight float64 [N].
    """
    block = model.block_length if model.attention == "block_causal" else None
    documents, reads = [], []
    for index, (text, (masked, _)) in enumerate(jobs):
        noisy = text.canvas.copy()
        noisy[masked] = model.mask_token_id
        document, shift = noisy_document(text.canvas, noisy, block, text.start)
        documents.append(document)
        reads.append(Reads(index, masked + shift, text.canvas[masked], 0))
    rows = assemble(documents, reads, **readout(model))
    return rows, np.concatenate([weight for _, (_, weight) in jobs])
