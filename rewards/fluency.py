"""Fluency: how natural a frozen causal language model finds an answer, in nats per token, and a reward made of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from rewards.causal_lm import CausalReader, load_causal_lm, load_causal_tokenizer
from rewards.score import Score
from rewards.text import as_messages, text_of

_REMEMBERED = 20_000  # answers whose nats are kept: several rewards of a run ask for the same ones


class AnswerNats:
    """Nats per token of answers: minus the mean log-prob of an answer's tokens and the end token behind them.

    The text is what is read, so an answer is judged the same whoever sampled it, and in whatever tokens. One that was
    cut off pays for an end token where no sentence ends. A prompt is read as a chat turn where the tokenizer has a
    chat template.
    """

    def __init__(self, model: str, dtype: str = "bfloat16"):
        """
        Args:
            model: folder, hub name, .gguf file, or package:NAME/FILE.gguf (`rewards.causal_lm`).
            dtype: torch dtype name of the weights.

        Raises:
            ValueError: it cannot be loaded, or its tokenizer has no end token.
        """
        import torch

        self.tokenizer = load_causal_tokenizer(model)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {model} has no end token, which every answer is read with")
        self.reader = CausalReader(load_causal_lm(model, dtype).to("cuda" if torch.cuda.is_available() else "cpu"))
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """[B] of prompts and completions, text or messages."""
        asked = [(self.prompt(p), text_of(c)) for p, c in zip(prompts, completions, strict=True)]
        fresh = [pair for pair in dict.fromkeys(asked) if pair not in self._known]
        if len(self._known) + len(fresh) > _REMEMBERED:
            self._known.clear()
            fresh = list(dict.fromkeys(asked))
        if fresh:
            prompt_ids, answer_ids = (self._ids([pair[side] for pair in fresh]) for side in (0, 1))
            end = self.tokenizer.eos_token_id
            readings = self.reader.read(prompt_ids, [[*ids, end] for ids in answer_ids])
            self._known |= {pair: -float(reading.logprob.mean()) for pair, reading in zip(fresh, readings, strict=True)}
        return [self._known[pair] for pair in asked]

    def prompt(self, prompt: Any) -> str:
        """As the model reads it."""
        if self.tokenizer.chat_template is None:
            return text_of(prompt)
        messages = as_messages(prompt, "user")
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids
        return ids


@cache
def answer_nats(model: str, dtype: str) -> AnswerNats:
    """One reader for all rewards of this process."""
    return AnswerNats(model, dtype)


def fluency_of(nats: float, floor: float, ceiling: float, power: float) -> float:
    """1 at `floor` nats a token and below, 0 at `ceiling` and above, between them linear to the power.

    Example: 5 nats between 2 and 8, power 2: 0.5² = 0.25.
    """
    return min(1.0, max(0.0, (ceiling - nats) / (ceiling - floor))) ** power


class Fluency:
    """`fluency_of` an answer under a frozen causal language model, for any task of text.

    A reward learns nothing where it is flat: choose `ceiling` above what the policy's samples have.

    Args:
        model, dtype: see `AnswerNats`.
        floor, ceiling, power: see `fluency_of`.

    Metric: `nats`.

    Raises:
        ValueError: the model cannot be loaded, or floor is not below ceiling.
    """

    def __init__(
        self, model: str, floor: float = 2.0, ceiling: float = 8.0, power: float = 2.0, dtype: str = "bfloat16"
    ) -> None:
        if floor >= ceiling or power <= 0:
            raise ValueError(f"reward 'fluency': floor {floor} must be below ceiling {ceiling}, and power above 0")
        self.floor, self.ceiling, self.power = floor, ceiling, power
        self.nats = answer_nats(model, dtype)
        self.__name__ = "fluency"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        return [
            Score(fluency_of(nats, self.floor, self.ceiling, self.power), metrics={"nats": nats})
            for nats in self.nats(prompts, completions)
        ]
