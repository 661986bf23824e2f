"""Which examples a text model can use: found over all rows before anything is trained, not when one comes up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl.tasks.base import Example
from rl.tasks.chat import answer_text, prompt_text, token_ids


def unfit_reasons(
    examples: Sequence[Example],
    tokenizer: Any,
    chat: bool,
    mask_token_id: int,
    gen_length: int,
    max_length: int | None,
    block_length: int | None,
    with_answers: bool,
) -> list[str | None]:
    """[N]: why an example cannot be used, None for one that can.

    Example: a model of 66 positions with blocks of 8, `gen_length` 8: a prompt of 57 tokens needs 65 positions, which
    are 72 in whole blocks, so it does not fit.

    Args:
        chat: see `rl.tasks.chat.prompt_text`.
        max_length: positions of the model; None where it has no bound.
        block_length: of a block-causal model, whose canvas ends where a block does; None with full attention.
        with_answers: look at `answer` too: the supervised stage needs one of at most `gen_length` tokens.
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
    prompt_ids = _encoded(tokenizer, texts, reasons)
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


class FileExamples:
    """The examples of one file.

    Attributes:
        note: how many were left out and why, for the user; empty when all can be used.
    """

    def __init__(self, path: str, examples: list[Example]):
        self.path, self.examples = path, examples
        self.note = ""

    def review(self, reasons: Sequence[str | None], drop: bool) -> None:
        """Refuse the file or leave out what cannot be used.

        Raises:
            ValueError: an example cannot be used and `drop` is False, or none can.
        """
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
