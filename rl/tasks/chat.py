"""Prompts and answers as chats: lists of messages `{"role": ..., "content": ...}`, as TRL documents its datasets.

A chat is rendered by the tokenizer's own chat template. Rewards see the messages (docs/rewards.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, str]


def chat_prompt(tokenizer: Any, messages: list[Message]) -> str:
    """The text of a chat up to where the model goes on: in a new assistant turn, or in the last one if it is one.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses the messages.
    """
    goes_on = messages[-1]["role"] == "assistant"
    return _render(tokenizer, messages, add_generation_prompt=not goes_on, continue_final_message=goes_on)


def user_turn(text: str, system: str = "") -> list[Message]:
    """A chat of one user turn."""
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]


def shown_prompt(prompt: Any) -> str:
    """A prompt for people: text as it is, messages as one `role: content` after the other."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def prompt_text(tokenizer: Any, example: Mapping[str, Any], chat: bool) -> str:
    """The text that the model is given of an example.

    Args:
        example: `prompt` is text or messages.
        chat: put a prompt that is text into the chat template, as one user turn (`task.chat`).

    Raises:
        ValueError: see `chat_prompt`.
    """
    prompt = example["prompt"]
    if isinstance(prompt, str):
        return chat_prompt(tokenizer, user_turn(prompt)) if chat else prompt
    return chat_prompt(tokenizer, prompt)


def answer_text(tokenizer: Any, example: Mapping[str, Any], chat: bool) -> str:
    """The text that supervised training imitates behind `prompt_text`: `answer`, which is text or messages.

    Raises:
        ValueError: the chat template does not continue the prompt's text, or see `chat_prompt`.
    """
    answer, prompt = example["answer"], example["prompt"]
    if isinstance(answer, str):
        return answer
    if isinstance(prompt, str) and not chat:
        raise ValueError("the answer is a list of messages and the prompt is text: set task.chat=true")
    messages = user_turn(prompt) if isinstance(prompt, str) else prompt
    before = chat_prompt(tokenizer, messages)
    whole = _render(tokenizer, [*messages, *answer])
    if not whole.startswith(before):
        raise ValueError("the chat template writes a prompt differently before an answer: give the answer as text")
    # What a template writes behind the end token of the last turn would be taught as text behind the end.
    return whole[len(before) :].rstrip("\n")


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as they are, without special tokens around them.

    Raises:
        ValueError: a text the tokenizer cannot read, such as one with a character outside its alphabet.
    """
    if not texts:
        return []
    try:
        return tokenizer(list(texts), add_special_tokens=False).input_ids
    # A tokenizer written in Rust raises an Exception of no further kind.
    except Exception as error:
        known = tokenizer.get_vocab()
        for number, text in enumerate(texts, start=1):
            unknown = next((letter for letter in text if letter not in known), None)
            try:
                tokenizer(text, add_special_tokens=False)
            except Exception:
                what = f"holds {unknown!r}, which the tokenizer has no token for" if unknown else f"is refused: {error}"
                raise ValueError(f"text {number} of {len(texts)}, {text[:40]!r}, {what}") from None
        raise


def checked_chat(value: list[Any], where: str) -> list[Message]:
    """The messages of a cell.

    Args:
        where: file, row and column, for messages.

    Raises:
        ValueError: it is no list of messages with a role and text.
    """
    if not value:
        raise ValueError(f"{where} is an empty list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'{where} is a list, and not of messages {{"role": ..., "content": ...}}')
        if message.get("tool_calls") or message["role"] == "tool":
            raise ValueError(f"{where} holds tool calls: tool use and rollouts of several turns are out of scope")
        content = message.get("content")
        if not isinstance(content, str):
            raise ValueError(f"{where}: the content of a message must be text, not {type(content).__name__}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _render(tokenizer: Any, messages: list[Message], **how: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "a chat needs a tokenizer with a chat template: set model.tokenizer, or give text with task.chat=false"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **how))
    # Templates are programs of their authors and raise what they like, jinja's errors above all.
    except Exception as error:
        raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from error
