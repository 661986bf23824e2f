"""A language model as judge, behind any OpenAI-compatible server (`vllm serve MODEL` is the documented one)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.openai_client import ChatClient, map_concurrently
from rewards.score import Score
from rewards.text import last_boxed, text_of

TEMPLATE = """Rate how well the answer does what the request asks, from {low:g} (useless) to {high:g} (perfect).

[Request]
{prompt}

[Answer]
{completion}

Think briefly, then end with the rating in a box, like \\boxed{{{high:g}}}."""


class LlmJudge:
    r"""Ask a model to rate each completion; its rating, scaled to [0, 1], is the reward.

    A judge that gives no readable rating, or one outside the scale, has failed: the completion is masked, not
    scored 0. A server that is down or busy is a transient failure, retried by the runner.

    Args:
        base_url: for example `http://localhost:8000/v1`.
        model: model name the server knows.
        template: the question, with `{prompt}`, `{completion}`, `{low}`, `{high}` and any dataset column in braces
            (`{answer}`); it must ask for the rating in `\boxed{}`.
        low, high: the scale.
        num_votes: ratings per completion, averaged.
        temperature, max_tokens: sampling of the judge.
        concurrency: requests at a time; set `batch_size` of the part at least as high.
        api_key_variable: environment variable that holds the key.
        timeout_seconds: limit of one request; keep the runner's `timeout_seconds` above it.
        upscale: of `vlm_judge`: enlarge every pixel to a square of this side first, for tiny pictures.
    """

    name = "llm_judge"
    template = TEMPLATE

    def __init__(
        self,
        base_url: str,
        model: str,
        template: str | None = None,
        low: float = 0.0,
        high: float = 10.0,
        num_votes: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 512,
        concurrency: int = 16,
        api_key_variable: str = "OPENAI_API_KEY",
        timeout_seconds: float = 60.0,
        upscale: int = 1,
    ) -> None:
        if not low < high:
            raise ValueError(f"reward '{self.name}': low must be below high, got {low} and {high}")
        self.client = ChatClient(base_url, model, api_key_variable, timeout_seconds)
        self.template = template or self.template
        self.upscale = upscale
        self.low, self.high = low, high
        self.sampling = {"temperature": temperature, "max_tokens": max_tokens, "num_choices": num_votes}
        self.concurrency = concurrency
        self.__name__ = self.name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        rows = []
        for item in range(len(completions)):
            row = {name: values[item] for name, values in columns.items() if isinstance(values, Sequence)}
            row |= self._row(prompts[item], completions[item])
            rows.append({**row, "low": self.low, "high": self.high})
        return map_concurrently(self._judge, rows, self.concurrency)

    def _row(self, prompt: Any, completion: Any) -> dict[str, Any]:
        return {"prompt": text_of(prompt), "completion": text_of(completion)}

    def _content(self, row: dict[str, Any]) -> Any:
        return self.template.format(**row)

    def _judge(self, row: dict[str, Any]) -> Score:
        messages = [{"role": "user", "content": self._content(row)}]
        answers = self.client.complete(messages, **self.sampling)  # type: ignore[arg-type]
        ratings = [
            rating for rating in map(rating_of, answers) if rating is not None and self.low <= rating <= self.high
        ]
        if not ratings:
            shown = " ".join(answers[0].split())[-120:] if answers else "nothing"
            return Score(None, reason=f"the judge gave no rating from {self.low:g} to {self.high:g}: {shown!r}")
        value = (sum(ratings) / len(ratings) - self.low) / (self.high - self.low)
        return Score(value, metrics={"votes": float(len(ratings))})


def rating_of(answer: str) -> float | None:
    r"""The number in the last `\boxed{}` of a judge's answer, else None."""
    boxed = last_boxed(answer)
    number = re.fullmatch(r"\s*([-+]?\d+(?:\.\d+)?)\s*(?:/\s*\d+)?\s*", boxed or "")
    return float(number.group(1)) if number else None
