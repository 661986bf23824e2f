"""Process reward: a judge reads the answer chunk by chunk, and each verdict is paid at a denoising step.

After TraceRL (arXiv:2509.06949), whose process reward asks for 1 or -1 about the prefix up to the end of every chunk
and pays it at the last denoising step of the chunk. Departures: votes that disagree are averaged (there, they are
replaced by the outcome), scores are not z-scored here (`normalize` does that for whole parts), and a chunk's last step
is taken over all its tokens, not over its last block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.hf_tokenizer import load_tokenizer
from rewards.llm_judge import rating_of
from rewards.openai_client import ChatClient, map_concurrently
from rewards.score import Score
from rewards.text import text_of

TEMPLATE = """A solution to the problem below is being written. Is every step of this beginning correct and useful?

[Problem]
{prompt}

[Beginning of the solution]
{prefix}

Think briefly, then end with \\boxed{{1}} if it is, or \\boxed{{-1}} if it is not."""


class ChunkJudge:
    """Per-step rewards in [-1, 1] from a judge behind an OpenAI-compatible server.

    Columns: `completion_ids`, `reveal_steps` (for every token of the completion, the denoising step that revealed it)
    and `num_forwards` (T). The score's `steps` has length T, zero but where a chunk is paid; its `value` is the mean
    over chunks.

    Args:
        base_url, model, api_key_variable, timeout_seconds: the server, as in `llm_judge`.
        tokenizer: folder or hub name of the policy's tokenizer, to turn the tokens of a chunk into text.
        chunk_length: tokens per chunk (TraceRL: 200).
        num_votes: verdicts per chunk, averaged (TraceRL: 3).
        template: the question, with `{prompt}`, `{prefix}` and any dataset column in braces.
        temperature, max_tokens: sampling of the judge.
        concurrency: completions judged at a time.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        tokenizer: str,
        chunk_length: int = 200,
        num_votes: int = 3,
        template: str = TEMPLATE,
        temperature: float = 1.0,
        max_tokens: int = 1024,
        concurrency: int = 16,
        api_key_variable: str = "OPENAI_API_KEY",
        timeout_seconds: float = 120.0,
    ) -> None:
        if chunk_length < 1:
            raise ValueError(f"reward 'chunk_judge': chunk_length must be at least 1, got {chunk_length}")
        self.client = ChatClient(base_url, model, api_key_variable, timeout_seconds)
        self.tokenizer = load_tokenizer(tokenizer)
        self.chunk_length = chunk_length
        self.template = template
        self.sampling = {"temperature": temperature, "max_tokens": max_tokens, "num_choices": num_votes}
        self.concurrency = concurrency
        self.__name__ = "chunk_judge"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        reveal_steps: Sequence[Sequence[int]],
        num_forwards: Sequence[int],
        **columns: Any,
    ) -> list[Score]:
        rows = []
        for item in range(len(completions)):
            row = {name: values[item] for name, values in columns.items() if isinstance(values, Sequence)}
            row |= {"prompt": text_of(prompts[item]), "ids": list(completion_ids[item])}
            rows.append({**row, "reveal_steps": list(reveal_steps[item]), "num_forwards": int(num_forwards[item])})
        return map_concurrently(self._judge, rows, self.concurrency)

    def _judge(self, row: dict[str, Any]) -> Score:
        if not row["ids"]:
            return Score(None, reason="the completion is empty", applicable=False)
        ends = [
            min(start + self.chunk_length, len(row["ids"])) for start in range(0, len(row["ids"]), self.chunk_length)
        ]
        verdicts = []
        for end in ends:
            prefix = self.tokenizer.decode(row["ids"][:end], skip_special_tokens=True)
            content = self.template.format(**{**row, "prefix": prefix})
            answers = self.client.complete([{"role": "user", "content": content}], **self.sampling)  # type: ignore[arg-type]
            votes = [vote for vote in map(rating_of, answers) if vote in (1.0, -1.0)]
            if not votes:
                return Score(None, reason="the judge gave neither 1 nor -1 for a chunk")
            verdicts.append(sum(votes) / len(votes))
        steps = chunk_scores_to_steps(verdicts, self.chunk_length, row["reveal_steps"], row["num_forwards"])
        return Score(sum(verdicts) / len(verdicts), steps=steps, metrics={"chunks": float(len(verdicts))})


def chunk_scores_to_steps(
    scores: Sequence[float], chunk_length: int, reveal_steps: Sequence[int], num_steps: int
) -> list[float]:
    """Place chunk scores on the time axis of the denoising run.

    Args:
        scores: one per chunk, in reading order.
        chunk_length: tokens per chunk (the last may be shorter).
        reveal_steps: [n] step, in 0..T-1, at which each token was revealed.
        num_steps: T.

    Returns:
        [T] rewards: a chunk's score at the step that revealed its last token in time; the last chunk's at the last
        step of the whole answer. Scores that meet in one step add up.

    Raises:
        ValueError: when the number of scores is not the number of chunks, or a step lies outside 0..T-1.

    Example: `chunk_scores_to_steps([1, -1], 2, [0, 2, 1, 1], 3) == [0.0, 0.0, 0.0]`: chunk one ends at step 2, and so
    does the answer.
    """
    if len(scores) != -(-len(reveal_steps) // chunk_length):
        raise ValueError(f"{len(scores)} chunk scores for {len(reveal_steps)} tokens in chunks of {chunk_length}")
    if any(not 0 <= step < num_steps for step in reveal_steps):
        raise ValueError(f"reveal_steps must lie in 0..{num_steps - 1}")
    steps = [0.0] * num_steps
    for number, score in enumerate(scores):
        last = number + 1 == len(scores)
        chunk = reveal_steps if last else reveal_steps[number * chunk_length : (number + 1) * chunk_length]
        steps[max(chunk)] += score
    return steps
