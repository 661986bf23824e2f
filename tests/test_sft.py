"""Supervised warm start: which tokens are masked, what they are weighted with, and the bound that this estimates."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl.cli import main
from rl.estimators.masking import random_mask_rows
from rl.estimators.rows import TokenRows
from rl.stage_sections import LevelsConfig
from tests.runs import tiny_config

MASK = 11
LENGTHS = [7, 12, 9, 5]
PROMPTS = [2, 3, 1, 4]


def sequences(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, MASK, n) for n in lengths]


def draw(block_length: int | None = None, seed: int = 0, **options: Any) -> tuple[Any, TokenRows, torch.Tensor]:
    lengths = LENGTHS if block_length is None else [8, 12, 12, 8]
    tokens = sequences(lengths)
    rng = np.random.default_rng(seed)
    return tokens, *random_mask_rows(tokens, PROMPTS, MASK, rng, block_length, **options)


# --- which tokens are masked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_only_answers_are_masked_and_all_masks_are_targets(seed: int) -> None:
    tokens, rows, weight = draw(seed=seed)
    assert rows.input_ids.shape == (4, 12)
    targets = {(int(r), int(c)): int(x) for r, c, x in zip(rows.row, rows.column, rows.target, strict=True)}
    assert len(targets) == len(rows.target) == len(weight)
    for row, (sequence, prompt) in enumerate(zip(tokens, PROMPTS, strict=True)):
        shown = rows.input_ids[row, : len(sequence)].numpy()
        assert (shown[:prompt] == sequence[:prompt]).all()
        masked = np.flatnonzero(shown == MASK)
        assert (np.delete(shown, masked) == np.delete(sequence, masked)).all()
        assert {c: x for (r, c), x in targets.items() if r == row} == {int(c): int(sequence[c]) for c in masked}
        assert (rows.document[row] == torch.tensor([0] * len(sequence) + [-1] * (12 - len(sequence)))).all()
    assert rows.trajectory.tolist() == rows.row.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_block_causal_rows_are_a_clean_and_a_noisy_part(seed: int) -> None:
    """The noisy part has the blocks that hold answer tokens: nothing is read in the others."""
    tokens, rows, weight = draw(block_length=4, seed=seed)
    assert len(rows.column) == len(weight)
    widths = []
    for row, (sequence, prompt) in enumerate(zip(tokens, PROMPTS, strict=True)):
        length, start = len(sequence), prompt // 4 * 4
        width = 2 * length - start
        widths.append(width)
        clean, noisy = (part.numpy() for part in rows.input_ids[row, :width].tensor_split([length]))
        assert (clean == sequence).all()
        assert (noisy[: prompt - start] == sequence[start:prompt]).all()
        masked = np.flatnonzero(noisy == MASK)
        assert (rows.column[rows.row == row] - length).tolist() == masked.tolist()
        assert rows.target[rows.row == row].tolist() == sequence[start:][masked].tolist()
        grid = [b for b in range(length // 4) for _ in range(4)]
        assert rows.position_ids[row, :width].tolist() == [*range(length), *range(start, length)]
        assert rows.segment[row, :width].tolist() == [0] * length + [b - start // 4 + 1 for b in grid[start:]]
        assert rows.block[row, :width].tolist() == grid + grid[start:]
        assert rows.document[row, :width].tolist() == [0] * width
        assert (rows.document[row, width:] == -1).all()
    assert rows.input_ids.shape == (4, max(widths)) and max(PROMPTS) >= 4


def test_levels_are_stratified_and_the_weight_is_their_inverse() -> None:
    """16 sequences: one level in each sixteenth of (0, 1]; a token is masked with the probability of its level."""
    count, length = 16, 4000
    tokens = sequences([length] * count)
    rows, weight = random_mask_rows(tokens, [0] * count, MASK, np.random.default_rng(3))
    levels = []
    for row in range(count):
        own = weight[rows.row == row]
        assert len(own) and (own == own[0]).all()
        level = 1 / float(own[0])
        assert abs(len(own) / length - level) < 5 * math.sqrt(level * (1 - level) / length) + 1e-9
        levels.append(level)
    assert sorted(math.ceil(level * count) for level in levels) == list(range(1, count + 1))
    assert sorted(levels) != levels, "the order of the levels is random"


def test_block_levels_are_stratified_over_all_blocks() -> None:
    count, size = 4, 3000
    tokens = sequences([4 * size] * count)
    rows, weight = random_mask_rows(tokens, [0] * count, MASK, np.random.default_rng(3), block_length=size)
    block = rows.block[rows.row, rows.column]
    levels = []
    for row, b in itertools.product(range(count), range(4)):
        own = weight[(rows.row == row) & (block == b)]
        assert len(own) and (own == own[0]).all()
        levels.append(1 / float(own[0]))
    assert sorted(math.ceil(level * 16) for level in levels) == list(range(1, 17))


def test_levels_are_uniform_over_many_batches() -> None:
    """E[t] = 1/2: half of all answer tokens are masked."""
    rng = np.random.default_rng(0)
    shares = [len(random_mask_rows(sequences([30] * 3), [10] * 3, MASK, rng)[0].target) / 60 for _ in range(500)]
    # Stratified levels leave a standard error below that of independent ones: sqrt(1/12 / 1500 + ...) = 0.008.
    assert abs(np.mean(shares) - 0.5) < 0.02


def test_masks_come_from_the_generator_alone() -> None:
    one, same, other = (draw(seed=s)[1] for s in (0, 0, 1))
    assert torch.equal(one.input_ids, same.input_ids) and not torch.equal(one.input_ids, other.input_ids)


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("levels", [None, (2, 1)])
def test_the_mask_of_a_sequence_does_not_depend_on_the_cut(block_length: int | None, levels: Any) -> None:
    _, whole, weight = draw(block_length, levels=levels)
    start = 0
    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        _, rows, own_weight = draw(block_length, part=part, levels=levels)
        width = rows.input_ids.shape[1]
        assert torch.equal(rows.input_ids, whole.input_ids[part, :width])
        assert (whole.document[part, width:] == -1).all()
        count = len(rows.target)
        assert torch.equal(rows.target, whole.target[start : start + count])
        assert torch.equal(own_weight, weight[start : start + count])
        assert (rows.row + part.start == whole.row[start : start + count]).all()
        start += count
    assert start == len(whole.target)


def test_what_does_not_fit_together_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="must be multiples of the block length 4"):
        random_mask_rows(sequences([7]), [2], MASK, rng, block_length=4)
    with pytest.raises(ValueError, match=r"sft\.masking semi_ar is for full attention"):
        random_mask_rows(sequences([8]), [2], MASK, rng, block_length=4, semi_ar=4)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2-full", "qwen3-full", "gpt2-full-shifted"])
def test_the_full_attention_loss_equals_a_loop(make_model, family: str) -> None:
    model = make_model(family)
    tokens, rows, weight = draw(logit_shift=model.logit_shift)
    with torch.no_grad():
        logprob = rows.score(model).logprob
        ours = -(weight * logprob).sum()
        expected = torch.zeros((), dtype=torch.float64)
        for row, sequence in enumerate(tokens):
            shown = rows.input_ids[row : row + 1, : len(sequence)]
            logits = model(shown)[0].log_softmax(-1)
            for place in (shown[0] == MASK).nonzero().flatten().tolist():
                t = 1 / float(weight[(rows.row == row) & (rows.column == place)])
                expected -= logits[place - model.logit_shift, sequence[place]] / t
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("family", ["gpt2-block4", "qwen3-block4"])
def test_the_block_causal_loss_equals_a_loop(make_model, family: str) -> None:
    """Every noisy block sees the clean blocks before it, and nothing else of the answer."""
    model = make_model(family)
    tokens, rows, weight = draw(block_length=4)
    with torch.no_grad():
        logprob = rows.score(model).logprob
        ours = -(weight * logprob).sum()
        expected = torch.zeros((), dtype=torch.float64)
        for row, sequence in enumerate(tokens):
            skipped = PROMPTS[row] // 4 * 4
            for start in range(skipped, len(sequence), 4):
                first = len(sequence) + start - skipped
                noisy = rows.input_ids[row, first : first + 4]
                seen = torch.cat([torch.from_numpy(sequence[:start]), noisy])[None]
                logits = model(seen)[0].log_softmax(-1)
                for i in (noisy == MASK).nonzero().flatten().tolist():
                    t = 1 / float(weight[(rows.row == row) & (rows.column == first + i)])
                    expected -= logits[start + i, sequence[start + i]] / t
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)


# --- the bound --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def masked_nll(model: Any, sequence: np.ndarray, hidden: tuple[int, ...], visible_end: int) -> dict[int, float]:
    """-log p of each hidden token given the others up to an end."""
    canvas = torch.from_numpy(sequence[:visible_end].copy())
    canvas[list(hidden)] = MASK
    logits = model(canvas[None])[0].log_softmax(-1)
    return {i: -float(logits[i - model.logit_shift, sequence[i]]) for i in hidden}


def any_order_nll(
    model: Any, sequence: np.ndarray, places: list[int], visible_end: int, hidden_too: tuple = ()
) -> float:
    """Mean over all orders of revealing the places one by one: the quantity whose mean the MDLM bound is."""
    orders = list(itertools.permutations(places))
    table: dict[tuple[int, ...], dict[int, float]] = {}
    total = 0.0
    for order in orders:
        for k, place in enumerate(order):
            hidden = tuple(sorted([*order[k:], *hidden_too]))
            if hidden not in table:
                table[hidden] = masked_nll(model, sequence, hidden, visible_end)
            total += table[hidden][place]
    return total / len(orders)


def exact_expectation(model: Any, sequence: np.ndarray, places: list[int]) -> float:
    """E[1/t sum of masked nll] with t integrated exactly: a set of m of n places has weight (m-1)! (n-m)! / n!."""
    n, total = len(places), 0.0
    for m in range(1, n + 1):
        weight = math.factorial(m - 1) * math.factorial(n - m) / math.factorial(n)
        for hidden in itertools.combinations(places, m):
            total += weight * sum(masked_nll(model, sequence, hidden, len(sequence)).values())
    return total


def estimates(model: Any, sequence: np.ndarray, prompt: int, n: int, **options: Any) -> np.ndarray:
    """n independent estimates by the code under test, one batch each of 16 copies."""
    rng = np.random.default_rng(5)
    values = []
    for _ in range(n):
        rows, weight = random_mask_rows(
            [sequence] * 16, [prompt] * 16, MASK, rng, model.block_length, model.logit_shift, **options
        )
        with torch.no_grad():
            values.append(float(-(weight * rows.score(model).logprob).sum()) / 16)
    return np.array(values)


def assert_agrees(values: np.ndarray, expected: float) -> None:
    error = values.std(ddof=1) / len(values) ** 0.5
    assert abs(values.mean() - expected) < 4 * error
    assert error < 0.03 * expected, "the estimate must be sharp enough to mean something"


@pytest.mark.parametrize("family", ["gpt2-full", "gpt2-full-shifted"])
def test_the_bound_is_the_any_order_likelihood(make_model, family: str) -> None:
    """Three ways to one number: all orders enumerated, all masks enumerated, and random masks weighted by 1/t."""
    model = make_model(family)
    sequence = sequences([6])[0]
    expected = any_order_nll(model, sequence, [2, 3, 4, 5], 6)
    assert exact_expectation(model, sequence, [2, 3, 4, 5]) == pytest.approx(expected, rel=1e-9)
    assert_agrees(estimates(model, sequence, 2, 300), expected)


def test_without_its_weight_the_estimate_is_another_number(make_model) -> None:
    """The agreement above can fail."""
    model = make_model("gpt2-full")
    sequence = sequences([6])[0]
    expected = any_order_nll(model, sequence, [2, 3, 4, 5], 6)
    rows, _ = random_mask_rows([sequence] * 4000, [2] * 4000, MASK, np.random.default_rng(5))
    with torch.no_grad():
        unweighted = float(-rows.score(model).logprob.sum()) / 4000
    assert abs(unweighted - expected) > 0.1 * expected


def test_the_block_bound_is_any_order_inside_each_block(make_model) -> None:
    """A prompt of 2 on the grid of 4: block 0 has two answer tokens; block 1 is predicted from a clean block 0."""
    model = make_model("gpt2-block4")
    sequence = sequences([8])[0]
    expected = any_order_nll(model, sequence, [2, 3], 4) + any_order_nll(model, sequence, [4, 5, 6, 7], 8)
    assert_agrees(estimates(model, sequence, 2, 300), expected)


def test_the_semi_autoregressive_bound_hides_what_follows(make_model) -> None:
    """A full-attention model decoded in blocks of 2 sees later blocks as masks while it decides a block."""
    model = make_model("gpt2-full")
    sequence = sequences([7])[0]
    # Response 2 to 6 in blocks [2, 3], [4, 5], [6].
    blocks = [[2, 3], [4, 5], [6]]
    expected = sum(any_order_nll(model, sequence, b, 7, tuple(range(b[-1] + 1, 7))) for b in blocks)
    assert_agrees(estimates(model, sequence, 2, 600, semi_ar=2), expected)


def test_semi_autoregressive_masks_by_hand() -> None:
    tokens = sequences([9] * 200)
    rows, weight = random_mask_rows(tokens, [3] * 200, MASK, np.random.default_rng(0), semi_ar=2)
    chosen = []
    for row in range(200):
        hidden = (rows.input_ids[row] == MASK).nonzero().flatten().tolist()
        targets = rows.column[rows.row == row].tolist()
        if not targets:
            continue
        block = {(c - 3) // 2 for c in targets}
        assert len(block) == 1
        (block_,) = block
        chosen.append(block_)
        assert set(hidden) == {*targets, *range(3 + 2 * (block_ + 1), 9)}
        # One of three blocks stands for all: weights are 3/t, at least 3.
        assert (weight[rows.row == row] >= 3).all()
    assert {0, 1, 2} == set(chosen)


# --- SDAR-VL's curriculum of levels -----------------------------------------------------------------------------------


WORDS = "sft.levels={mean: [0.5, 0.8], concentration: [2, 50]}"
CURRICULUM = LevelsConfig(mean=(0.5, 0.8), concentration=(2, 50))


def test_the_curriculum_of_levels_by_hand() -> None:
    # Means 0.5, 0.65 and 0.8; concentrations 2, 26 and 50. Beta(1, 1) is uniform.
    expected = [(1, 1), (16.9, 9.1), (40, 10)]
    assert [CURRICULUM.at(share) for share in (0, 0.5, 1)] == [pytest.approx(pair) for pair in expected]


@pytest.mark.parametrize("block_length", [None, 2000])
def test_levels_have_the_mean_and_the_spread_of_their_distribution(block_length: int | None) -> None:
    """400 levels of Beta(40, 10): mean 0.8, variance 0.8 * 0.2 / 51."""
    count, length = (400, 2000) if block_length is None else (100, 8000)
    tokens = sequences([length] * count)
    rows, weight = random_mask_rows(tokens, [0] * count, MASK, np.random.default_rng(1), block_length, levels=(40, 10))
    block = rows.block[rows.row, rows.column] if block_length else torch.zeros_like(rows.row)
    number = (rows.row * 4 + block).unique(return_inverse=True, return_counts=True)
    levels, shares = np.unique(1 / weight.numpy()), number[2].numpy() / (block_length or length)
    assert len(levels) == len(shares) == 400
    assert abs(levels.mean() - 0.8) < 4 * (0.8 * 0.2 / 51 / 400) ** 0.5
    assert abs(levels.var() / (0.8 * 0.2 / 51) - 1) < 0.25
    # Of every block the share of its own level is masked, and weighted with its inverse.
    own = 1 / weight.numpy()[np.unique(number[1].numpy(), return_index=True)[1]]
    assert np.abs(shares - own).max() < 5 * 0.5 / (block_length or length) ** 0.5


def test_a_level_of_nothing_masks_nothing() -> None:
    rows, weight = random_mask_rows(sequences([50] * 50), [0] * 50, MASK, np.random.default_rng(0), levels=(1e-4, 1))
    assert torch.isfinite(weight).all() and len(rows.target) < 50


def test_the_stage_goes_from_the_first_level_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*arguments: Any, levels: Any, **options: Any) -> Any:
        seen.append(levels)
        return random_mask_rows(*arguments, levels=levels, **options)

    monkeypatch.setattr("rl.modalities.text.random_mask_rows", spy)
    assert main(["sft", *tiny_config(tmp_path, "sft.steps=3", WORDS)]) == 0
    assert seen == [pytest.approx(CURRICULUM.at(share)) for share in (0, 0.5, 1)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sft.levels={mean: [0, 0.8], concentration: [2, 50]}"], "a mean lies between 0 and 1"),
        (["sft.levels={mean: [0.5, 0.8], concentration: [2, 0]}"], "a concentration is above 0"),
        (["sft.levels={mean: [0.5, 0.8], concentration: [2, .nan]}"], "finite number, got nan"),
        (["sft.levels={mean: [0.5, 0.8]}"], "sft.levels.concentration' is required"),
        ([WORDS, "sft.trajectories=FILE"], "sft.levels is about masks of answers"),
        ([WORDS, "model.noise=uniform"], "sft.levels needs masks"),
    ],
)
def test_levels_that_mean_nothing_are_refused(tmp_path: Path, run: Any, overrides: list[str], message: str) -> None:
    (tmp_path / "traces").write_text("")
    overrides = [word.replace("FILE", str(tmp_path / "traces")) for word in overrides]
    code, _, err = run("check", *tiny_config(tmp_path, *overrides))
    assert code == 2 and message in err, err
    code, _, err = run("check", "--config", "digits_b2", WORDS)
    assert code == 2 and "sft.levels is for text" in err, err


# --- effective mask ratio, and errors to be revised -------------------------------------------------------------------


@pytest.mark.parametrize("block_length", [None, 4])
def test_effective_weights_are_the_inverse_of_the_share_that_is_masked(block_length: int | None) -> None:
    tokens, rows, weight = draw(block_length=block_length, effective=True)
    seen: dict[tuple[int, int], list[float]] = {}
    block_of = rows.block[rows.row, rows.column].tolist()
    for row, block, w in zip(rows.row.tolist(), block_of, weight.tolist(), strict=True):
        seen.setdefault((row, block), []).append(w)
    for (row, block), weights in seen.items():
        first, last = (
            (0, len(tokens[row])) if block_length is None else (block * block_length, (block + 1) * block_length)
        )
        places = last - max(first, PROMPTS[row])
        # As many weights as masked tokens, and so their sum is the number of places.
        assert weights == [pytest.approx(places / len(weights))] * len(weights)
    with pytest.raises(ValueError, match="effective is for masking random"):
        draw(effective=True, semi_ar=2)


def test_errors_stand_on_the_canvas_and_are_read() -> None:
    errors = np.array([9, 10])
    plain, masked, weight = draw()
    _, rows, weights = draw(errors=0.5, error_tokens=errors)
    shown = rows.input_ids[rows.row, rows.column]
    hidden = shown == MASK
    assert torch.equal(rows.target[hidden], masked.target) and torch.equal(weights[hidden], weight)
    assert 0 < int((~hidden).sum()) < 20 and set(shown[~hidden].tolist()) <= {9, 10}
    assert (weights[~hidden] == 1).all()
    truth = [plain[row][column] for row, column in zip(rows.row.tolist(), rows.column.tolist(), strict=True)]
    assert rows.target.tolist() == truth
    read = {(r, c) for r, c in zip(rows.row.tolist(), rows.column.tolist(), strict=True)}
    for row, sequence in enumerate(plain):
        for column, token in enumerate(sequence):
            changed = int(rows.input_ids[row, column]) != token
            assert not changed or ((row, column) in read and column >= PROMPTS[row])
