"""Classifiers of scikit-learn's real 8x8 digits: one to train against, and a judge that shares nothing with it.

The 1,797 images are split by their index: even ones fit the reward and the model, odd ones the judge and are what
generated images are compared with. Fitting takes a tenth of a second and is deterministic.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rewards.image import to_array
from rewards.score import Score

if TYPE_CHECKING:
    import torch

CLASSES = tuple("0123456789")
GAMMA = 0.6


@cache
def digits(half: Literal["train", "judge"]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 8, 8] (0 to 255) and their digits int64 [N] of one half.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits come with scikit-learn: pip install 'denoise-rl[images]'") from None
    data = load_digits()
    part = slice(0, None, 2) if half == "train" else slice(1, None, 2)
    # The scans count 0 to 16 dots per pixel.
    return np.round(data.images[part] * 255 / 16).astype(np.uint8), data.target[part].astype(np.int64)


def real_digits() -> np.ndarray:
    """uint8 [N, 8, 8], the half that rewards and models may see."""
    return digits("train")[0]


def pixels(images: Sequence[Any] | np.ndarray) -> np.ndarray:
    """float64 [N, 64] in [0, 1].

    Raises:
        ValueError: an image is not 8x8 and grey.
    """
    arrays = [to_array(image) for image in images]
    wrong = next((a.shape for a in arrays if a.shape != (8, 8, 1)), None)
    if wrong is not None:
        raise ValueError(f"a digit is an image of shape [8, 8, 1], got {list(wrong)}")
    return np.stack(arrays).reshape(-1, 64) / 255.0


class DigitClassifier:
    """Probability that an image shows the digit of its row's `label`.

    Logistic regression on Gaussian kernels around the training images (97 % right on the other half). Far from every
    digit all kernels vanish and all classes become equally likely, so that noise is not rewarded.

    Args:
        value: "probability" or "logprob".
    """

    differentiable = True

    def __init__(self, value: Literal["probability", "logprob"] = "probability") -> None:
        if value not in ("probability", "logprob"):
            raise ValueError(f"reward 'digit_classifier': value must be probability or logprob, got {value!r}")
        from sklearn.linear_model import LogisticRegression

        images, labels = digits("train")
        self.value = value
        self.centres = pixels(images)
        kernels = _kernel(self.centres, self.centres)
        self.fitted = LogisticRegression(C=10.0, max_iter=100, tol=1e-3).fit(kernels, labels)
        self.__name__ = "digit_classifier"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        logits = self.fitted.decision_function(_kernel(pixels(completions), self.centres))
        logprob = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        chosen = logprob[np.arange(len(logits)), _labels("digit_classifier", columns)]
        return (np.exp(chosen) if self.value == "probability" else chosen).tolist()

    def on_tensors(self, prompts: Sequence[Any], images: torch.Tensor, **columns: Any) -> torch.Tensor:
        """Rewards [B] of float images [B, 1, 8, 8] in [0, 1], with gradients to them."""
        import torch

        flat = images.flatten(1).double()
        centres, coef, intercept = (
            torch.as_tensor(x, dtype=torch.float64, device=flat.device)
            for x in (self.centres, self.fitted.coef_, self.fitted.intercept_)
        )
        square = flat.square().sum(1, keepdim=True) - 2 * flat @ centres.T + centres.square().sum(1)
        logprob = ((-GAMMA * square).exp() @ coef.T + intercept).log_softmax(1)
        labels = torch.as_tensor(_labels("digit_classifier", columns), device=flat.device)
        chosen = logprob.gather(1, labels[:, None])[:, 0]
        return chosen.exp() if self.value == "probability" else chosen


class DigitJudge:
    """1 when a support vector machine sees the digit of the row's `label`, else 0 (99 % right on the other half).

    It is fitted on the half of the images that neither the model nor `digit_classifier` has seen.
    """

    def __init__(self) -> None:
        from sklearn.svm import SVC

        images, labels = digits("judge")
        self.fitted = SVC(C=10.0, gamma=GAMMA / 10).fit(pixels(images), labels)
        self.__name__ = "digit_judge"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        seen = self.fitted.predict(pixels(completions))
        return [Score(float(right)) for right in seen == _labels("digit_judge", columns)]


@cache
def _judge_network() -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    images, labels = digits("judge")
    network = MLPClassifier((64,), max_iter=25, batch_size=64, learning_rate_init=3e-3, random_state=0)
    with warnings.catch_warnings():
        # 25 epochs are enough here, and scikit-learn would like more.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return network.fit(pixels(images), labels)


def digit_features(images: Sequence[Any]) -> np.ndarray:
    """Hidden layer, float64 [N, 64], of a network fitted on the judge's half."""
    network = _judge_network()
    return np.maximum(pixels(images) @ network.coefs_[0] + network.intercepts_[0], 0.0)


def _kernel(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    square = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
    return np.exp(-GAMMA * square)


def _labels(name: str, columns: dict[str, Any]) -> np.ndarray:
    if "label" not in columns:
        raise ValueError(f"reward {name!r} needs a `label` column with the wanted digit")
    return np.array([int(label) for label in columns["label"]], dtype=np.int64)
