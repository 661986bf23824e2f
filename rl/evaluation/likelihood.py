"""How likely a model finds a given text: the masked-diffusion bound, by random masks or exactly.

For the n tokens that one noisy region holds (the whole text under full attention; a block's share of it in a
block-causal model), the bound of MDLM (Sahoo et al. 2024, arXiv 2406.07524) on log p(text | context) is the sum
over all non-empty sets S of them of

    sum over i in S of log p(token i | everything but S)  /  (|S| * C(n, |S|))

which is also the average over all orders of decoding one token at a time (LLaDA, arXiv 2502.09992, eq. 6). It is
estimated by drawing |S| uniformly (stratified) and then S, with weight n / |S|. Where all sets are fewer than the
samples asked for, they are summed instead, and no error is left. With one token per region there is one set, and the
bound is the log-likelihood itself: a block-causal model with block length 1 is scored exactly, in one forward.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rl.estimators.rows import Reads, TokenRows, assemble, noisy_document
from rollouts.model_protocol import DenoisingModel

Ids = Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """log p(text | context), or the bound on it, in nats.

    Example: `Likelihood(-12.3, num_samples=128, std_error=0.4, exact=False)`.

    Attributes:
        logprob: the value; never above the true log-likelihood but for its error.
        num_samples: mask patterns it is made of.
        std_error: standard error over the patterns; 0 where all patterns were summed.
        exact: it is the log-likelihood itself, not a bound on it.
    """

    logprob: float
    num_samples: int
    std_error: float
    exact: bool


@dataclass
class _Text:
    """One text laid out: where its targets are, and which of them every pattern masks.

    Attributes:
        canvas: int64 [L], context, text, and masks up to the end of the last block.
        regions: absolute positions of the targets, region by region.
        patterns: patterns[k][r]: the masked positions of region r in pattern k, and their weight.
    """

    canvas: np.ndarray
    regions: list[np.ndarray]
    patterns: list[list[tuple[np.ndarray, float]]]
    summed: bool


def log_likelihoods(
    model: DenoisingModel,
    pairs: Sequence[tuple[Ids, Ids]],
    num_samples: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Likelihood]:
    """Score texts given their contexts.

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
    texts = [_layout(model, context, text, num_samples, seed) for context, text in pairs]
    sums = [np.zeros((len(text.patterns), len(text.regions))) for text in texts]
    jobs = [(index, k) for index, text in enumerate(texts) for k in range(len(text.patterns))]
    # Rows of like length share a forward.
    jobs.sort(key=lambda job: -len(texts[job[0]].canvas))
    with torch.no_grad():
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            rows, weight, owner = _rows(model, [(texts[index], k) for index, k in batch])
            logprob = rows.to(device).score(model).logprob
            values = logprob.double().cpu().numpy() * weight
            for value, (job, region) in zip(values, owner, strict=True):
                index, k = batch[job]
                sums[index][k, region] += value
    return [_likelihood(text, total) for text, total in zip(texts, sums, strict=True)]


def _likelihood(text: _Text, sums: np.ndarray) -> Likelihood:
    if not text.regions:
        return Likelihood(0.0, 0, 0.0, True)
    count = len(text.patterns)
    exact = all(len(region) == 1 for region in text.regions)
    if text.summed:
        return Likelihood(float(sums.sum()), count, 0.0, exact)
    draws = sums.sum(axis=1)
    error = float(draws.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf
    return Likelihood(float(draws.mean()), count, error, exact)


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
    if largest <= 20 and 2**largest - 1 <= num_samples:
        sets = [list(_all_sets(region)) for region in regions]
        none = (np.zeros(0, dtype=np.int64), 0.0)
        patterns = [[own[k] if k < len(own) else none for own in sets] for k in range(2**largest - 1)]
        return _Text(canvas, regions, patterns, summed=True)
    rng = np.random.default_rng([seed, len(context), zlib.crc32(canvas.tobytes())])
    draws = [list(_drawn_sets(region, num_samples, rng)) for region in regions]
    return _Text(canvas, regions, [[own[k] for own in draws] for k in range(num_samples)], summed=False)


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


def _rows(
    model: DenoisingModel, jobs: Sequence[tuple[_Text, int]]
) -> tuple[TokenRows, np.ndarray, list[tuple[int, int]]]:
    """One row per job (text, pattern): the noisy canvas, or `[clean | noisy copies of the text's blocks]`.

    Returns:
        rows, weight float64 [N], and for every decision the job and region it belongs to.
    """
    block = model.block_length if model.attention == "block_causal" else None
    documents, reads, weights, owner = [], [], [], []
    for row, (text, k) in enumerate(jobs):
        pattern = text.patterns[k]
        masked = np.concatenate([np.zeros(0, dtype=np.int64), *(places for places, _ in pattern)])
        noisy = text.canvas.copy()
        noisy[masked] = model.mask_token_id
        first = text.regions[0][0] // block if block and text.regions else 0
        document, shift = noisy_document(text.canvas, noisy, block, first)
        documents.append(document)
        reads.append(Reads(row, masked + shift, text.canvas[masked], 0))
        for region, (places, factor) in enumerate(pattern):
            owner += [(row, region)] * len(places)
            weights += [factor] * len(places)
    return assemble(documents, reads, logit_shift=model.logit_shift), np.array(weights), owner
