"""Rewards that a gradient passes through: the contract's `differentiable = True`.

A differentiable reward is an ordinary reward (text in, one score per completion out) with three things more:

* `differentiable = True`;
* `alphabet`: the letters it reads, in the order of the last axis of a soft input;
* `soft(prompts, completions, **columns)`: completions as a tensor [B, L, A], a distribution over the alphabet at every
  position, values [B] out, with gradient to the completions and to nothing else.

`SoftReward` writes the text form in terms of the soft one, so that both always are the same function. A character
outside the alphabet is a row of zeros in both. torch is imported when a reward is built, not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rewards.load import load_reward
from rewards.score import Score
from rewards.signature import reward_name
from rewards.text import text_of

if TYPE_CHECKING:
    import torch


class SoftReward:
    """Base of a differentiable reward: a subclass sets `alphabet` and writes `soft`."""

    differentiable = True
    alphabet: str

    def soft(self, prompts: Sequence[str], completions: torch.Tensor, **columns: Any) -> torch.Tensor:
        """[B] values of soft completions [B, L, A]."""
        raise NotImplementedError

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        import torch

        texts = [text_of(completion) for completion in completions]
        scores: list[Score] = [Score(None, reason="the completion is empty")] * len(texts)
        # Completions of one length share a tensor.
        for length in sorted({len(text) for text in texts} - {0}):
            mine = [index for index, text in enumerate(texts) if len(text) == length]
            own = {name: [values[index] for index in mine] for name, values in columns.items() if _per_row(values)}
            with torch.no_grad():
                one_hot = one_hot_of([texts[index] for index in mine], self.alphabet)
                values = self.soft([text_of(prompts[index]) for index in mine], one_hot, **own)
            for index, value in zip(mine, values.tolist(), strict=True):
                scores[index] = Score(value)
        return scores


def _per_row(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str)


def one_hot_of(texts: Sequence[str], alphabet: str) -> torch.Tensor:
    """float32 [B, L, A] of texts of equal length; a foreign character is a row of zeros."""
    import torch

    code = {letter: index for index, letter in enumerate(alphabet)}
    ids = torch.tensor([[code.get(letter, len(alphabet)) for letter in text] for text in texts])
    return torch.nn.functional.one_hot(ids, len(alphabet) + 1)[..., :-1].float()


class DifferentiableSum:
    """The weighted sum of differentiable rewards, over one alphabet that holds all of theirs.

    Args:
        parts: (name, weight, params) of each, as in a config.

    Raises:
        ValueError: a reward has no gradient, or cannot be loaded.
    """

    def __init__(self, parts: Sequence[tuple[str, float, Mapping[str, Any]]]) -> None:
        self.parts = [(load_reward(name, params), weight) for name, weight, params in parts]
        for (reward, _), (name, _, _) in zip(self.parts, parts, strict=True):
            if not getattr(reward, "differentiable", False):
                raise ValueError(
                    f"reward '{name}' ({reward_name(reward)}) has no gradient: algorithm.gradient pathwise needs "
                    "differentiable rewards (rewards/soft.py); score_function takes any"
                )
        self.alphabet = "".join(dict.fromkeys("".join(reward.alphabet for reward, _ in self.parts)))  # type: ignore[attr-defined]

    def soft(self, prompts: Sequence[str], completions: torch.Tensor, **columns: Any) -> torch.Tensor:
        """[B] values of completions [B, L, A] over `alphabet`."""
        total: Any = 0.0
        for reward, weight in self.parts:
            letters = [self.alphabet.index(letter) for letter in reward.alphabet]  # type: ignore[attr-defined]
            total = total + weight * reward.soft(prompts, completions[..., letters], **columns)  # type: ignore[attr-defined]
        return total
