"""Metrics of image sets that a collapsed or hacked model cannot raise. Pure functions of features; NumPy only.

A feature is what a classifier's or encoder's last layer sees of an image; take one that no reward was trained with. The
numbers belong together: precision and Fréchet distance get worse when images leave the manifold of real ones, recall
and Vendi score when they become few. The Inception Score is left out on purpose: it rewards confident classes that are
evenly used, and does not see that all images of a class are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

_ROWS = 1024  # of a distance matrix at a time


@dataclass(frozen=True)
class PrecisionRecall:
    """Share of generated images inside the real manifold, and of real images inside the generated one."""

    precision: float
    recall: float


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    The manifold of a set is the union of balls around its points, each as wide as the distance to the point's k-th
    nearest other point of the set.

    Args:
        real: features [N, D] of real images.
        generated: features [M, D].
        k: neighbours; 3 in the paper.

    Raises:
        ValueError: wrong shapes, or no more than k points in a set.
    """
    real, generated = _features("real", real), _features("generated", generated)
    _same_width(real, generated)
    for name, points in (("real", real), ("generated", generated)):
        if len(points) <= k:
            raise ValueError(f"{name} has {len(points)} features: k={k} neighbours need more than k")
    return PrecisionRecall(_share_inside(generated, real, k), _share_inside(real, generated, k))


def vendi_score(features: np.ndarray) -> float:
    """Effective number of different images (Friedman and Dieng 2023): exp of the entropy of the kernel's eigenvalues.

    The kernel is the cosine of the features. n orthogonal features give n, n equal ones 1.

    Args:
        features: [N, D], none of length 0.

    Raises:
        ValueError: wrong shape, or a feature of length 0.
    """
    features = _features("features", features)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if np.any(lengths == 0):
        raise ValueError("features holds a feature of length 0: its direction, and so its likeness, is undefined")
    unit = features / lengths
    return spectral_diversity(unit @ unit.T)


def spectral_diversity(kernel: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of `kernel / N`; the kernel is [N, N] with ones on its diagonal."""
    eigenvalues = np.linalg.eigvalsh(kernel / len(kernel))
    eigenvalues = eigenvalues[eigenvalues > 0]
    return float(np.exp(-np.sum(eigenvalues * np.log(eigenvalues))))


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Fréchet distance of the two Gaussians with the sets' means and covariances (Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). It is the squared 2-Wasserstein distance, and biased upwards for few
    images: compare only sets of equal size.

    Raises:
        ValueError: wrong shapes, or fewer than 2 features in a set.
    """
    real, generated = _features("real", real), _features("generated", generated)
    _same_width(real, generated)
    for name, points in (("real", real), ("generated", generated)):
        if len(points) < 2:
            raise ValueError(f"{name} has {len(points)} features: a covariance needs at least 2")
    return gaussian_frechet(real.mean(axis=0), _covariance(real), generated.mean(axis=0), _covariance(generated))


def gaussian_frechet(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """The closed form of `frechet_distance` for means [D] and covariances [D, D]."""
    # tr (C1 C2)^(1/2) through the symmetric root: C1^(1/2) C2 C1^(1/2) has the same eigenvalues and is symmetric.
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ other_covariance @ root)
    trace = np.sqrt(np.clip(cross, 0, None)).sum()
    distance = np.sum((mean - other_mean) ** 2) + np.trace(covariance) + np.trace(other_covariance) - 2 * trace
    return float(max(distance, 0.0))


def mean_pairwise_distance(features: np.ndarray) -> float:
    """Mean Euclidean distance over pairs of different rows; says nothing of quality, so never read it alone.

    Raises:
        ValueError: wrong shape, or fewer than 2 features.
    """
    features = _features("features", features)
    if len(features) < 2:
        raise ValueError(f"features has {len(features)} rows: a pair needs 2")
    total = sum(float(_distances(features[s : s + _ROWS], features).sum()) for s in range(0, len(features), _ROWS))
    return total / (len(features) * (len(features) - 1))


def per_prompt(
    metric: Callable[[np.ndarray], float],
    features: np.ndarray,
    prompts: Sequence[Hashable],
    correct: Sequence[bool] | None = None,
    count: int | None = None,
) -> tuple[float, int]:
    """Mean over prompts of a metric of the prompt's images.

    Diversity across prompts is the prompts' own. With `correct`, only images that obey their prompt count, so that
    wrong images cannot pass for diverse ones; with `count`, every prompt gives its first `count` of them, because
    the metrics grow with the size of a set.

    Args:
        metric: of features [n, D]; `vendi_score` is one.
        features: [N, D].
        prompts: [N] what each image was asked to be.
        correct: [N] whether it is.
        count: images per prompt; prompts with fewer are left out. None takes all of a prompt's, at least 2.

    Returns:
        the mean and how many prompts are in it; NaN when none is.
    """
    features = _features("features", features)
    if len(prompts) != len(features) or (correct is not None and len(correct) != len(features)):
        raise ValueError(f"prompts and correct need one entry for each of the {len(features)} features")
    rows: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        if correct is None or correct[index]:
            rows.setdefault(prompt, []).append(index)
    values = [metric(features[chosen[:count]]) for chosen in rows.values() if len(chosen) >= (count or 2)]
    return (float(np.mean(values)) if values else float("nan")), len(values)


def _share_inside(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    radius = np.concatenate(
        [
            # A point is its own nearest neighbour: the k-th other one stands at index k.
            np.partition(_distances(manifold[s : s + _ROWS], manifold), k, axis=1)[:, k]
            for s in range(0, len(manifold), _ROWS)
        ]
    )
    inside = [(_distances(points[s : s + _ROWS], manifold) <= radius).any(axis=1) for s in range(0, len(points), _ROWS)]
    return float(np.concatenate(inside).mean())


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances [A, B], exact zeros between equal rows (the expanded square would leave 1e-8)."""
    return np.stack([np.sqrt(((b - row) ** 2).sum(axis=1)) for row in a])


def _covariance(points: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(points, rowvar=False))


def _features(name: str, values: np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} must be features [N, D], got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a number that is not finite")
    return array


def _same_width(real: np.ndarray, generated: np.ndarray) -> None:
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} entries, generated ones {generated.shape[1]}")
