"""Metrics of image sets against closed forms and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rl.modalities.image_metrics import (
    frechet_distance,
    gaussian_frechet,
    mean_pairwise_distance,
    per_prompt,
    precision_recall,
    vendi_score,
)


def line(*places: float) -> np.ndarray:
    return np.array(places, dtype=float)[:, None]


# ---- precision and recall ------------------------------------------------------------------------------------------


def test_precision_and_recall_on_a_line_by_hand():
    # k = 1: radii of the real points 0, 1, 3, 10 are 1, 1, 2, 7: the real manifold is [-1, 5] and [3, 17].
    # Radii of the generated points 2, 2.5, 4 are 0.5, 0.5, 1.5: their manifold is [1.5, 5.5].
    found = precision_recall(line(0, 1, 3, 10), line(2, 2.5, 4), k=1)
    assert (found.precision, found.recall) == (1.0, 0.25)
    # 20 lies beyond 17; now the radii are 0.5, 0.5, 17.5 and 3 and 10 lie within 17.5 of 20.
    found = precision_recall(line(0, 1, 3, 10), line(2, 2.5, 20), k=1)
    assert (found.precision, found.recall) == (pytest.approx(2 / 3), 0.5)
    # k = 2 widens the balls: real radii 3, 2, 3, 9, so that [1, 19] is covered from 10 alone.
    assert precision_recall(line(0, 1, 3, 10), line(18.5, 18.6, 19.1), k=2).precision == pytest.approx(2 / 3)


def test_a_collapsed_set_has_low_recall_and_noise_low_precision():
    rng = np.random.default_rng(0)
    real, same, noise = rng.normal(size=(400, 4)), rng.normal(size=(400, 4)), 4 * rng.normal(size=(400, 4))
    collapsed = 0.05 * rng.normal(size=(400, 4))
    whole = precision_recall(real, same)
    assert whole.precision > 0.85 and whole.recall > 0.85
    few = precision_recall(real, collapsed)
    assert few.precision == 1.0 and few.recall < 0.02
    far = precision_recall(real, noise)
    assert far.precision < 0.3 and far.recall > 0.85
    duplicates = np.repeat(real[:1], 50, axis=0)
    assert precision_recall(real, duplicates).recall == 1 / 400  # the manifold is that one point


def test_large_sets_are_cut_without_changing_anything(monkeypatch):
    rng = np.random.default_rng(1)
    real, generated = rng.normal(size=(50, 3)), rng.normal(size=(41, 3))
    whole = precision_recall(real, generated), mean_pairwise_distance(real)
    monkeypatch.setattr("rl.modalities.image_metrics._ROWS", 7)
    assert (precision_recall(real, generated), mean_pairwise_distance(real)) == (whole[0], pytest.approx(whole[1]))


# ---- Vendi score ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_vendi_counts_orthogonal_images_and_no_duplicates(count):
    basis = 3.0 * np.eye(9)[:count]
    assert vendi_score(basis) == pytest.approx(count)
    assert vendi_score(np.concatenate([basis, 5 * basis, basis])) == pytest.approx(count)
    assert vendi_score(np.repeat(basis[:1], 8, axis=0)) == pytest.approx(1.0)


def test_vendi_of_two_images_is_the_entropy_of_their_angle():
    for cosine in (0.0, 0.3, 0.9, -0.5):
        pair = np.array([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
        # The eigenvalues of [[1, c], [c, 1]] / 2 are (1 + c) / 2 and (1 - c) / 2.
        shares = [(1 + cosine) / 2, (1 - cosine) / 2]
        assert vendi_score(pair) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_vendi_of_uneven_groups_is_the_entropy_of_their_shares():
    features = np.concatenate([np.repeat(np.eye(3)[i : i + 1], n, axis=0) for i, n in enumerate((6, 3, 1))])
    assert vendi_score(features) == pytest.approx(math.exp(-sum(p * math.log(p) for p in (0.6, 0.3, 0.1))))


# ---- Fréchet distance ----------------------------------------------------------------------------------------------


def test_frechet_of_gaussians_in_closed_form():
    # Diagonal covariances: |m1 - m2|^2 + sum of (s1 - s2)^2 over standard deviations.
    a, b = np.diag([4.0, 9.0]), np.diag([1.0, 16.0])
    assert gaussian_frechet(np.zeros(2), a, np.array([3.0, 4.0]), b) == pytest.approx(25 + 1 + 1)
    # A rotation of both leaves it; covariances that do not commute need the full formula.
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    turned = gaussian_frechet(np.zeros(2), turn @ a @ turn.T, turn @ np.array([3.0, 4.0]), turn @ b @ turn.T)
    assert turned == pytest.approx(27)
    # 2x2: tr (A B)^(1/2) = sqrt(tr(A B) + 2 sqrt(det(A B))).
    c = turn @ b @ turn.T
    trace = math.sqrt(np.trace(a @ c) + 2 * math.sqrt(np.linalg.det(a @ c)))
    assert gaussian_frechet(np.zeros(2), a, np.zeros(2), c) == pytest.approx(13 + 17 - 2 * trace)
    singular = np.diag([1.0, 0.0])
    assert gaussian_frechet(np.zeros(2), singular, np.zeros(2), np.eye(2)) == pytest.approx(1.0)


def test_frechet_of_sets_uses_their_means_and_covariances():
    # {0, 2} has mean 1 and variance 2; {4, 8} mean 6 and variance 8: 25 + (sqrt 2 - sqrt 8)^2 = 27.
    assert frechet_distance(line(0, 2), line(4, 8)) == pytest.approx(27)
    points = np.random.default_rng(0).normal(size=(60, 5))
    assert frechet_distance(points, points[::-1]) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(points, points + 2.0) == pytest.approx(5 * 4.0)


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_mean_pairwise_distance_by_hand():
    assert mean_pairwise_distance(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])) == pytest.approx((5 + 4 + 3) / 3)


def test_per_prompt_counts_only_images_that_obey_and_equally_many_of_each():
    features = np.concatenate([np.eye(4), np.eye(4)[[0, 0, 1]], np.eye(4)[:1]])
    prompts = ["a"] * 4 + ["b"] * 3 + ["c"]
    assert per_prompt(vendi_score, features, prompts) == (pytest.approx((4 + vendi_score(features[4:7])) / 2), 2)
    # Two each: "a" has two different ones, "b" two equal ones, "c" too few.
    assert per_prompt(vendi_score, features, prompts, count=2) == (pytest.approx(1.5), 2)
    correct = [False, True, True, False, False, True, True, True]
    mean, counted = per_prompt(vendi_score, features, prompts, correct)
    assert (mean, counted) == (pytest.approx(2.0), 2)
    mean, counted = per_prompt(vendi_score, features, prompts, [False] * 8)
    assert math.isnan(mean) and counted == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: precision_recall(line(1, 2, 3), line(1, 2, 3, 4)), "real has 3 features: k=3 neighbours need more"),
        (lambda: precision_recall(np.ones((5, 2)), np.ones((5, 3))), "real features have 2 entries, generated ones 3"),
        (lambda: frechet_distance(np.ones((5, 2)), np.ones((5, 3))), "real features have 2 entries, generated ones 3"),
        (lambda: frechet_distance(line(1, 2), line(1)), "generated has 1 features: a covariance needs at least 2"),
        (lambda: vendi_score(np.zeros((2, 2))), "a feature of length 0"),
        (lambda: vendi_score(np.ones(3)), r"must be features \[N, D\], got shape \[3\]"),
        (lambda: vendi_score(np.array([[np.nan]])), "not finite"),
        (lambda: mean_pairwise_distance(line(1)), "a pair needs 2"),
        (lambda: per_prompt(vendi_score, line(1, 2), ["a"]), "one entry for each of the 2 features"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
