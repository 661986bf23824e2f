"""A request and an answer in no dialect, and the trajectory a checked answer becomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollouts.engines.server.errors import BadAnswerError
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import Detail, TokenTrajectory


@dataclass(frozen=True)
class Ask:
    """One rollout as a server is asked for it.

    Attributes:
        max_new_tokens: up to the end of a block, so that a length limit cuts none.
        top_k: 0 keeps all.
        eos_token_id: None when nothing ends a response before its length does.
        detail: what is wanted; a dialect asks for its extras accordingly.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    eos_token_id: int | None
    detail: Detail = "logprobs"


@dataclass(frozen=True)
class Answer:
    """What a server said. R tokens in the complete blocks, up to the end of the terminal one.

    Example: a response of 2 tokens that ended inside a block of 4, decided in 3 steps::

        Answer(prompt_length=4, token_ids=[7, 1], finish="stop", weight_version="12",
               replay_ids=[7, 1, 5, 5], step_map=[2, 1, 3, 3], logprobs=[-0.1, -0.7, -0.2, -1.3])

    Attributes:
        prompt_length: prompt tokens the server counted.
        prompt_ids: the prompt it echoed, None where the dialect has no echo.
        token_ids: the answer, with its end token.
        finish: "stop" at the end token, "length" at the limit; anything else was no answer.
        weight_version: of the weights that sampled, None where the dialect does not say.
        replay_ids: [R] ids of the complete blocks; None where only the answer comes.
        step_map: [R], the step inside its block at which each was decided, from 1.
        logprobs: [R] natural logs, each at that very step under the sampling distribution; None without them.
    """

    prompt_length: int
    token_ids: list[int]
    finish: str
    prompt_ids: list[int] | None = None
    weight_version: str | None = None
    replay_ids: list[int] | None = None
    step_map: list[int] | None = None
    logprobs: list[float] | None = None

    @property
    def detail(self) -> Detail:
        if self.replay_ids is None or self.step_map is None:
            return "sample"
        return "steps" if self.logprobs is None else "logprobs"


@dataclass(frozen=True)
class Canvas:
    """The learner's view of what a server generates.

    Attributes:
        gen_length: response tokens that count.
        block_length: of the decoding grid, None when the response is one block.
        block_causal: the grid is anchored at position 0 and ends the canvas; otherwise it begins behind the prompt.
        vocab_size: ids are below it; None where the model does not say.
        excluded: half-open ranges of ids that the model gives probability 0.
    """

    gen_length: int
    block_length: int | None
    block_causal: bool
    mask_token_id: int
    vocab_size: int | None = None
    excluded: Sequence[Sequence[int]] = ()

    def origin(self, prompt_length: int) -> int:
        """Position of the grid's first block boundary."""
        return 0 if self.block_causal else prompt_length

    def block_end(self, prompt_length: int, position: int) -> int:
        """End of the block that holds the position before `position`."""
        size, origin = self.block_length or self.gen_length, self.origin(prompt_length)
        return origin + -(-(position - origin) // size) * size

    def length(self, prompt_length: int) -> int:
        """Positions of the whole canvas."""
        return self.block_end(prompt_length, prompt_length + self.gen_length)


def to_trajectory(
    answer: Answer, ask: Ask, canvas: Canvas, options: SamplerOptions, decoder: dict[str, object], policy_version: int
) -> TokenTrajectory:
    """The trajectory of an answer that holds up.

    Raises:
        BadAnswerError: it does not; the message says what is wrong.
    """
    prompt = len(ask.prompt_ids)
    if answer.prompt_length != prompt or (answer.prompt_ids is not None and tuple(answer.prompt_ids) != ask.prompt_ids):
        raise BadAnswerError(f"it is for another prompt: {answer.prompt_length} tokens, {prompt} were sent")
    _check_tokens(answer.token_ids, canvas)
    _check_end(answer, ask)
    known = answer.detail
    step = np.zeros(len(answer.token_ids), dtype=np.int64)
    token = np.array(answer.token_ids, dtype=np.int64)
    if known != "sample":
        token, step = _replay(answer, prompt, canvas)
    logprob = np.full(len(token), np.nan)
    if known == "logprobs":
        logprob = _logprobs(answer, len(token))
    position = prompt + np.arange(len(token))
    order = np.lexsort((position, step))
    end = canvas.block_end(prompt, prompt + len(token)) if canvas.block_causal else canvas.length(prompt)
    trajectory = TokenTrajectory(
        prompt_ids=np.array(ask.prompt_ids, dtype=np.int64),
        length=end,
        mask_token_id=canvas.mask_token_id,
        num_steps=int(step.max()) + 1,
        step=step[order].astype(np.int32),
        position=position[order].astype(np.int32),
        token=token[order],
        logprob=logprob[order],
        # No dialect returns the score a position was chosen by.
        confidence=np.full(len(token), np.nan, dtype=np.float32),
        stop_length=min(len(answer.token_ids), canvas.gen_length),
        block_length=canvas.block_length,
        block_origin=canvas.origin(prompt),
        sampler=options.distribution(),
        decoder=decoder,
        policy_version=policy_version,
        detail=known,
        seed=ask.seed,
    )
    trajectory.validate()
    return trajectory


def _check_tokens(ids: Sequence[int], canvas: Canvas) -> None:
    for index, token in enumerate(ids):
        if token < 0 or (canvas.vocab_size is not None and token >= canvas.vocab_size):
            raise BadAnswerError(f"token {index} is {token}, outside the vocabulary of {canvas.vocab_size}")
        if token == canvas.mask_token_id:
            raise BadAnswerError(f"token {index} is the mask: a position was never decided")
        if any(start <= token < stop for start, stop in canvas.excluded):
            raise BadAnswerError(f"token {index} is {token}, which this model never generates (model.never_generate)")


def _check_end(answer: Answer, ask: Ask) -> None:
    ids, eos = answer.token_ids, ask.eos_token_id
    first = ids.index(eos) if eos is not None and eos in ids else None
    if answer.finish == "stop" and (first is None or first != len(ids) - 1):
        raise BadAnswerError(
            f"it says it stopped, and its {len(ids)} tokens "
            + ("hold no end token" if first is None else f"go on behind the end token at {first}")
        )
    if answer.finish == "length":
        if first is not None:
            raise BadAnswerError(f"it ran to the length limit and holds an end token at {first}")
        if len(ids) != ask.max_new_tokens:
            raise BadAnswerError(f"it ran to the length limit of {ask.max_new_tokens} tokens and holds {len(ids)}")
    if answer.finish not in ("stop", "length"):
        raise BadAnswerError(f"its finish reason is {answer.finish!r}, neither stop nor length")


def _replay(answer: Answer, prompt: int, canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [R] and steps [R] counted from the first block's first, of an answer that returns its blocks."""
    assert answer.replay_ids is not None and answer.step_map is not None
    ids, steps, count = answer.replay_ids, np.array(answer.step_map, dtype=np.int64), len(answer.replay_ids)
    _check_tokens(ids, canvas)
    if len(steps) != count:
        raise BadAnswerError(f"its step map has {len(steps)} entries for {count} tokens")
    end = canvas.block_end(prompt, prompt + len(answer.token_ids))
    if prompt + count != end:
        raise BadAnswerError(
            f"its blocks end at position {prompt + count}: the block that holds the answer's last token ends at {end}"
        )
    if ids[: len(answer.token_ids)] != answer.token_ids:
        raise BadAnswerError("its complete blocks do not begin with the answer")
    block = (prompt + np.arange(count) - canvas.origin(prompt)) // (canvas.block_length or canvas.gen_length)
    offset = 0
    for index in np.unique(block):
        inside = block == index
        last = int(steps[inside].max())
        if set(steps[inside].tolist()) != set(range(1, last + 1)):
            raise BadAnswerError(
                f"its step map in block {index} is {steps[inside].tolist()}: a block's steps are 1, 2, ... without gaps"
            )
        steps[inside] += offset - 1
        offset += last
    return np.array(ids, dtype=np.int64), steps


def _logprobs(answer: Answer, count: int) -> np.ndarray:
    assert answer.logprobs is not None
    if len(answer.logprobs) != count:
        raise BadAnswerError(f"it has {len(answer.logprobs)} log-probs for {count} tokens")
    for index, value in enumerate(answer.logprobs):
        if not math.isfinite(value) or value > 0:
            raise BadAnswerError(f"the log-prob of token {index} is {value}: it must be finite and at most 0")
    return np.array(answer.logprobs, dtype=np.float64)
