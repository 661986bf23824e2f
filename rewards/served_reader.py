"""Read finished answers with an autoregressive model that a vLLM server has: `CausalReader` over HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from rewards.causal_lm import Reading
from rewards.openai_client import ChatClient
from rewards.score import TransientRewardError

WAITS = (1.0, 4.0, 16.0)  # seconds before a server that is busy or down is asked again


class ServedReader:
    """The `read` of `rewards.causal_lm.CausalReader`, answered by prompt log-probs of `/v1/completions`.

    Token ids are sent and read, so the server's model must have the tokenizer that made them.

    Args:
        base_url: for example `http://localhost:8000/v1`.
        model: model name the server knows.
        batch_size: answers per request.
        concurrency: requests at a time.
        api_key_variable: environment variable that holds the key.
        timeout_seconds: limit of one request.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        batch_size: int = 16,
        concurrency: int = 4,
        api_key_variable: str = "OPENAI_API_KEY",
        timeout_seconds: float = 120.0,
    ) -> None:
        self.client = ChatClient(base_url, model, api_key_variable, timeout_seconds)
        self.batch_size, self.concurrency = batch_size, concurrency

    def read(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], top: int | None = 0
    ) -> list[Reading]:
        """As of `CausalReader.read`; `top` is at most what the server was started with (--max-logprobs, 20).

        Raises:
            ValueError: an empty prompt, `top` None, or the server refuses (`top` too high, a text too long).
            TransientRewardError: the server is busy, down or too slow, also after `WAITS`.
        """
        if top is None:
            raise ValueError("a vLLM server gives likeliest tokens and not the whole vocabulary: set a number (top)")
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"row {row}: an empty prompt, at which no first token can be read")
        pairs = list(zip(prompts, answers, strict=True))
        batches = [pairs[start : start + self.batch_size] for start in range(0, len(pairs), self.batch_size)]
        with ThreadPoolExecutor(self.concurrency) as threads:
            return [one for part in threads.map(lambda batch: self._read(batch, top), batches) for one in part]

    def _read(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], top: int) -> list[Reading]:
        # A server generates one token at least; nobody reads it.
        body = {
            "model": self.client.model,
            "prompt": [[*prompt, *answer] for prompt, answer in pairs],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": top,
        }
        found = self._asked(body)
        if len(found) != len(pairs):
            raise ValueError(f"{self.client.url} answered {len(found)} of {len(pairs)} texts")
        return [
            _reading(answer, places[len(prompt) :], top) for (prompt, answer), places in zip(pairs, found, strict=True)
        ]

    def _asked(self, body: dict[str, Any]) -> list[list[dict[str, Any] | None]]:
        for seconds in WAITS:
            try:
                return self.client.post("/completions", body, _prompt_logprobs)
            except TransientRewardError:
                time.sleep(seconds)
        return self.client.post("/completions", body, _prompt_logprobs)


def _prompt_logprobs(answer: Any) -> list[list[dict[str, Any] | None]]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [choice["prompt_logprobs"] for choice in choices]


def _reading(answer: Sequence[int], places: Sequence[dict[str, Any] | None], top: int) -> Reading:
    """Of `{"7": {"logprob": -0.3, "rank": 1}, ...}` for every token of an answer."""
    if len(places) != len(answer) or any(place is None for place in places):
        raise ValueError(f"a vLLM server gave log-probs of {len(places)} tokens, the answer has {len(answer)}")
    known = [place for place in places if place is not None]
    logprob = torch.tensor([place[str(token)]["logprob"] for token, place in zip(answer, known, strict=True)])
    if not top:
        return Reading(logprob)
    # The answer's own token comes along where it is not among the likeliest.
    best = [sorted(place.items(), key=lambda item: item[1]["rank"])[:top] for place in known]
    # An empty answer has none: of an empty list torch would make floats.
    ids = torch.tensor([[int(token) for token, _ in row] for row in best], dtype=torch.int64).reshape(len(answer), top)
    logprobs = torch.tensor([[one["logprob"] for _, one in row] for row in best]).reshape(len(answer), top)
    return Reading(logprob, ids, logprobs)
