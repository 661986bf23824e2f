"""Which examples a text model can use: found over all rows before anything is trained, not when one comes up."""

from __future__ import annotations

import itertools
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from rl.errors import about
from rl.tasks.base import Example
from rl.tasks.chat import answer_text, prompt_text, token_ids
from rl.tasks.prompt_images import PromptImages, images_of
from rl.tasks.records import Record

if TYPE_CHECKING:
    import datasets

# [N] examples -> [N] why one cannot be used, None for one that can.
Look: TypeAlias = Callable[[Sequence[Example]], list[str | None]]
HEAD = 256  # rows of a stream that are looked at before a run


def unfit_reasons(
    examples: Sequence[Example],
    tokenizer: Any,
    chat: bool,
    mask_token_id: int,
    gen_length: int,
    max_length: int | None,
    block_length: int | None,
    with_answers: bool,
    vision: PromptImages | None = None,
) -> list[str | None]:
    """[N]: why an example cannot be used, None for one that can.

    Example: a model of 66 positions with blocks of 8, `gen_length` 8: a prompt of 57 tokens needs 65 positions, which
    are 72 in whole blocks, so it does not fit.

    Args:
        chat: see `rl.tasks.chat.prompt_text`.
        max_length: positions of the model; None where it has no bound.
        block_length: of a block-causal model, whose canvas ends where a block does; None with full attention.
        with_answers: look at `answer` too: the supervised stage needs one of at most `gen_length` tokens.
        vision: how prompts hold images, None for a model without a vision tower.
    """
    reasons: list[str | None] = [None] * len(examples)
    texts: list[str] = []
    answers: list[str] = []
    for index, example in enumerate(examples):
        prompt = answer = ""
        try:
            prompt = prompt_text(tokenizer, example, chat)
            if with_answers and example.get("answer") is not None:
                answer = answer_text(tokenizer, example, chat)
        except ValueError as error:
            reasons[index] = str(error)
        texts.append(prompt)
        answers.append(answer)
    if vision is None:
        prompt_ids = _encoded(tokenizer, texts, reasons)
    else:
        prompt_ids = [[] for _ in texts]
        for index, (example, text) in enumerate(zip(examples, texts, strict=True)):
            try:
                prompt_ids[index] = vision.prompt_ids(tokenizer, text, images_of(example))
            except ValueError as error:
                reasons[index] = reasons[index] or str(error)
    answer_ids = _encoded(tokenizer, answers, reasons)
    block = block_length or 1
    for index, example in enumerate(examples):
        tokens, answer_tokens = prompt_ids[index], answer_ids[index]
        needed = -(-(len(tokens) + gen_length) // block) * block
        mask = tokenizer.convert_ids_to_tokens(mask_token_id)
        if reasons[index] is not None:
            continue
        if not tokens:
            reasons[index] = "the prompt is empty"
        elif mask_token_id in tokens or mask_token_id in answer_tokens:
            where = "prompt" if mask_token_id in tokens else "answer"
            reasons[index] = f"the {where} holds the mask token {mask}"
        elif max_length is not None and needed > max_length:
            whole = f" in blocks of {block}" if block > 1 else ""
            reasons[index] = (
                f"a prompt of {len(tokens)} tokens plus sampler.gen_length {gen_length} needs {needed} positions"
                f"{whole}, the model has {max_length}"
            )
        elif with_answers and example.get("answer") is None:
            reasons[index] = "it has no answer to imitate (task.params.answer_column)"
        elif with_answers and tokenizer.eos_token_id is None and len(tokens) + len(answer_tokens) < needed:
            reasons[index] = "the tokenizer has no end token to follow the answer: set model.eos_token"
        elif len(answer_tokens) > gen_length:
            reasons[index] = f"an answer of {len(answer_tokens)} tokens is longer than sampler.gen_length {gen_length}"
    return reasons


def _encoded(tokenizer: Any, texts: list[str], reasons: list[str | None]) -> list[list[int]]:
    """Token ids; a text the tokenizer cannot read gets its reason, and no tokens."""
    try:
        return token_ids(tokenizer, texts)
    except ValueError:
        found = []
        for index, text in enumerate(texts):
            try:
                found += token_ids(tokenizer, [text])
            except ValueError as error:
                reasons[index] = reasons[index] or str(error).removeprefix("text 1 of 1, ")
                found.append([])
        return found


def apart_reasons(examples: Sequence[Example], look: Look, kept: dict[str, str]) -> list[str | None]:
    """[N]: what `look` finds, and for an example with a prompt that measures the model: where that prompt stands.

    Args:
        kept: of `kept_prompts`.
    """
    return [reason or kept.get(_prompt_key(example)) for reason, example in zip(look(examples), examples, strict=True)]


def kept_prompts(files: Sequence[FileExamples], path: str) -> dict[str, str]:
    """Prompts of files -> why the rows of another one must not have them; a file named twice is meant twice."""
    return {
        _prompt_key(example): f"its prompt is that of row {number} of {file.path}, and what measures is not trained on"
        for file in files
        if file.path != path
        for number, example in enumerate(file.examples, start=1)
    }


def _prompt_key(example: Example) -> str:
    prompt, images = example["prompt"], images_of(example)
    text = prompt.strip() if isinstance(prompt, str) else json.dumps(prompt)
    return text + repr([i.tolist() if hasattr(i, "tolist") else i for i in images]) if images else text


class FileExamples:
    """The examples of one file.

    Attributes:
        note: how many were left out and why, for the user; empty when all can be used.
    """

    def __init__(self, path: str, examples: list[Example]):
        self.path, self.examples = path, examples
        self.note = ""

    def review(self, look: Look, drop: bool) -> None:
        """Refuse the file or leave out what cannot be used.

        Raises:
            ValueError: an example cannot be used and `drop` is False, or none can.
        """
        reasons = look(self.examples)
        wrong = [index for index, reason in enumerate(reasons) if reason is not None]
        if wrong and not drop:
            more = f" (and {len(wrong) - 1} other rows)" if len(wrong) > 1 else ""
            raise ValueError(
                f"{self.path}: row {wrong[0] + 1}{more}: {reasons[wrong[0]]}: mend it, or set task.unfit to drop"
            )
        self.examples = [x for x, reason in zip(self.examples, reasons, strict=True) if reason is None]
        if wrong:
            first = f"the first is row {wrong[0] + 1}: {reasons[wrong[0]]}"
            self.note = f"{self.path}: {len(wrong)} rows left out (task.unfit drop), {first}"
        if not self.examples:
            raise ValueError(f"{self.path}: no row can be used; row 1: {reasons[0]}")


class StreamedExamples(FileExamples):
    """The examples of a stream, read when they are drawn; `examples` are its first `HEAD`, for the checks before a run.

    Every epoch has every row once: the files in an order drawn from (seed, epoch), their rows mixed in a buffer. What
    is drawn depends on seed and place alone. To go on at a place, the stream is read again up to there.

    Args:
        path: where it is from, for messages.
        stream: of `rl.tasks.records.stream_at`.
        example: makes an example of a record; its second argument says which record, for messages.
        buffer: rows that are mixed, and held in memory.
    """

    def __init__(
        self, path: str, stream: datasets.IterableDataset, example: Callable[[Record, str], Example], buffer: int
    ):
        with about(path):
            head = list(stream.take(HEAD))
        if not head:
            raise ValueError(f"{path} must hold rows with named columns, at least one")
        super().__init__(path, [example(record, f"{path}: row {number}") for number, record in enumerate(head, 1)])
        self._stream, self._example, self._buffer = stream, example, buffer
        self._look: Look | None = None
        self._drop = False
        self._clear()

    def _clear(self) -> None:
        self._at: tuple[int, int] | None = None
        self._latest: tuple[int, int, int] | None = None
        self._drawn: list[Example] = []

    def review(self, look: Look, drop: bool) -> None:
        super().review(look, drop)
        left = ", and left out uncounted where they cannot be used" if drop else ""
        self.note = f"{self.path} is a stream: rows after the first {HEAD} are looked at when they are drawn{left}"
        self._look, self._drop = look, drop
        self._clear()

    def drawn(self, seed: int, start: int, count: int) -> list[Example]:
        """Examples `start` to `start + count` of the order of a seed, over all epochs.

        Raises:
            ValueError: one of them cannot be read or used.
        """
        if self._latest != (seed, start, count):
            if self._at != (seed, start):
                self._rows = self._in_order(seed)
                deque(itertools.islice(self._rows, start), maxlen=0)
            self._drawn = list(itertools.islice(self._rows, count))
            self._at, self._latest = (seed, start + count), (seed, start, count)
        return self._drawn

    def _in_order(self, seed: int) -> Iterator[Example]:
        for epoch in itertools.count():
            found = 0
            for record in self._stream.shuffle(seed=zlib.crc32(f"{seed} {epoch}".encode()), buffer_size=self._buffer):
                example = self._usable(record)
                if example is not None:
                    found += 1
                    yield example
            if not found:
                raise ValueError(f"{self.path}: no row can be used")

    def _usable(self, record: Record) -> Example | None:
        where = f"{self.path}: the row {str(record)[:80]}"
        try:
            example = self._example(record, where)
        except ValueError:
            if self._drop:
                return None
            raise
        reason = self._look([example])[0] if self._look else None
        if reason is not None and not self._drop:
            raise ValueError(f"{where}: {reason}: mend it, or set task.unfit to drop")
        return example if reason is None else None
