"""Likelihoods against chains of one-token predictions, each from a forward of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rl.evaluation.likelihood import log_likelihoods

CONTEXT = [3, 7, 1]
MakeModel = Callable[..., Any]


def log_p(model: Any, canvas: Sequence[int], position: int, token: int) -> float:
    """log p(token at position | canvas), by one forward of the whole canvas."""
    with torch.no_grad():
        logits = model(torch.tensor([list(canvas)]))[0, position - model.logit_shift]
    return float(torch.log_softmax(logits, dim=-1)[token])


def chain(model: Any, context: Sequence[int], text: Sequence[int], order: Sequence[int], width: int) -> float:
    """Log-probability of revealing the text's tokens in this order (indices into the text)."""
    canvas = [*context, *[model.mask_token_id] * (width - len(context))]
    total = 0.0
    for index in order:
        total += log_p(model, canvas, len(context) + index, text[index])
        canvas[len(context) + index] = text[index]
    return total


def orders(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """All orders that finish one region after the other."""
    starts = np.cumsum([0, *sizes[:-1]])
    inner = [
        list(itertools.permutations(range(start, start + size))) for start, size in zip(starts, sizes, strict=True)
    ]
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*inner)]


@pytest.mark.parametrize("family", ["gpt2-full", "qwen3-full", "gpt2-full-shifted"])
def test_the_summed_bound_is_the_mean_over_all_orders(make_model: MakeModel, family: str) -> None:
    model = make_model(family)
    text = [5, 2, 5, 9]
    (result,) = log_likelihoods(model, [(CONTEXT, text)], num_samples=15)
    expected = np.mean([chain(model, CONTEXT, text, order, 7) for order in orders([4])])
    assert result.logprob == pytest.approx(expected, abs=1e-9)
    assert (result.num_samples, result.std_error, result.exact) == (15, 0.0, False)


def test_blocks_are_bounded_one_after_the_other(make_model: MakeModel) -> None:
    model = make_model("gpt2-block4")
    # Context 3, so the first block holds one token of the text, the next four, the last two of four.
    text = [5, 2, 8, 9, 4, 6, 10]
    (result,) = log_likelihoods(model, [(CONTEXT, text)], num_samples=15)
    expected = np.mean([chain(model, CONTEXT, text, order, 12) for order in orders([1, 4, 2])])
    assert result.logprob == pytest.approx(expected, abs=1e-9)
    assert (result.num_samples, result.exact) == (15, False)


@pytest.mark.parametrize("family", ["gpt2-block4", "qwen3-block4"])
def test_with_block_length_one_it_is_the_likelihood_and_sums_to_one(make_model: MakeModel, family: str) -> None:
    model = make_model(family)
    model.config.block_length = 1
    text = [5, 2, 8, 9, 4, 6, 10]
    (result,) = log_likelihoods(model, [(CONTEXT, text)], num_samples=1)
    assert result.logprob == pytest.approx(chain(model, CONTEXT, text, range(7), 10), abs=1e-9)
    assert (result.num_samples, result.std_error, result.exact) == (1, 0.0, True)
    pairs = [(CONTEXT, [a, b]) for a in range(11) for b in range(11)]
    total = math.fsum(math.exp(item.logprob) for item in log_likelihoods(model, pairs, num_samples=1))
    assert total == pytest.approx(1.0, abs=1e-9)


def test_the_bound_stays_below_the_likelihood_of_any_mixture_of_orders(make_model: MakeModel) -> None:
    model = make_model("gpt2-full")
    pairs = [(CONTEXT, [a, b]) for a in range(11) for b in range(11)]
    results = log_likelihoods(model, pairs, num_samples=3, batch_size=64)
    for (context, text), result in zip(pairs[::17], results[::17], strict=True):
        mixture = np.logaddexp(*(chain(model, context, text, order, 5) for order in orders([2]))) - math.log(2)
        assert result.logprob < mixture
    assert 0.5 < math.fsum(math.exp(result.logprob) for result in results) < 1.0


@pytest.mark.parametrize("family", ["gpt2-full", "gpt2-block4"])
def test_random_masks_estimate_the_summed_bound_with_the_error_they_state(make_model: MakeModel, family: str) -> None:
    model = make_model(family)
    text = [5, 2, 8, 9, 4, 6]
    (truth,) = log_likelihoods(model, [(CONTEXT, text)], num_samples=63)
    assert truth.std_error == 0.0
    draws = [log_likelihoods(model, [(CONTEXT, text)], 14, 64, seed)[0] for seed in range(150)]
    values = np.array([draw.logprob for draw in draws])
    assert len(set(values)) > 140 and {draw.num_samples for draw in draws} == {14}
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - truth.logprob) < 4 * error
    # Sizes are stratified, so the stated error, which takes patterns as independent, errs to the large side.
    assert values.std() < 1.2 * np.mean([draw.std_error for draw in draws])
    assert np.mean([draw.std_error for draw in draws]) < 4 * values.std()


def test_neither_the_batch_nor_the_other_texts_change_a_result(make_model: MakeModel) -> None:
    for family in ("gpt2-full", "gpt2-block4"):
        model = make_model(family)
        pairs = [(CONTEXT, [5, 2, 8, 9, 4, 6, 1, 1]), ([4], [7]), ([1] * 9, [2, 3, 4]), (CONTEXT, [])]
        together = log_likelihoods(model, pairs, num_samples=20, batch_size=7)
        for pair, result in zip(pairs, together, strict=True):
            (alone,) = log_likelihoods(model, [pair], num_samples=20, batch_size=1)
            assert alone.logprob == pytest.approx(result.logprob, abs=1e-9)
            assert alone.num_samples == result.num_samples
        assert together[1].exact and together[3].logprob == 0.0 and together[3].exact


def test_mistakes_are_named(make_model: MakeModel) -> None:
    model = make_model("gpt2-full")
    with pytest.raises(ValueError, match="a context needs at least one token"):
        log_likelihoods(model, [([], [1])])
    with pytest.raises(ValueError, match="a text needs 66 positions, the model has 64"):
        log_likelihoods(model, [([1] * 60, [1] * 6)])
    with pytest.raises(ValueError, match="num_samples and batch_size must be at least 1"):
        log_likelihoods(model, [([1], [1])], num_samples=0)
