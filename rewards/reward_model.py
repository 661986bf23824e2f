"""Reward from a transformers sequence classifier: a Bradley-Terry reward model, a sentiment classifier, ..."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rewards.hf_tokenizer import load_tokenizer
from rewards.openai_client import ChatClient
from rewards.score import Score
from rewards.text import as_messages, text_of
from rewards.weights import load_error


class RewardModel:
    """Score text with `AutoModelForSequenceClassification`; torch and transformers are imported here, not before.

    With one output (what TRL's RewardTrainer makes) the reward is that number; with several it is the
    log-probability of `label`. Chats go through the tokenizer's chat template when it has one.

    Args:
        model: folder or hub name.
        label: which class is wanted, by name or index; required when the model has more than one output.
        append_eos: end every plain text with the end token, as TRL's RewardTrainer does in training.
        include_prompt: judge prompt and completion together; False judges the completion alone.
        max_length: tokens kept, from the end of the text: the answer is what is judged.
        batch_size: texts per forward.
        device: torch device; by default the GPU when there is one.
        dtype: torch dtype name of the weights.
        base_url: address of a vLLM server that has the model (`vllm serve MODEL --runner pooling`), as
            `http://localhost:8000/v1`; tokenizer and labels are then still read from `model`.
        served_model: its name there; `model` when None.

    Raises:
        ValueError: when the model cannot be loaded, or `label` is missing or unknown.
    """

    def __init__(
        self,
        model: str,
        label: str | int | None = None,
        append_eos: bool = False,
        include_prompt: bool = True,
        max_length: int = 2048,
        batch_size: int = 16,
        device: str | None = None,
        dtype: str = "float32",
        base_url: str | None = None,
        served_model: str | None = None,
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification

        self.client = None if base_url is None else ChatClient(base_url, served_model or model)
        try:
            self.tokenizer = load_tokenizer(model)
            if self.client is None:
                loaded = AutoModelForSequenceClassification.from_pretrained(model, dtype=getattr(torch, dtype))
            self.config = AutoConfig.from_pretrained(model) if self.client else loaded.config
        except OSError as error:
            raise load_error("reward_model", f"model '{model}'", error) from error
        self.torch = torch
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = None if self.client else loaded.to(self.device).eval()
        self.append_eos = append_eos
        self.include_prompt = include_prompt
        self.batch_size = batch_size
        self.max_length = max_length
        self.label = _label_index(self.config, label)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Right padding keeps positions; a causal classifier finds the last token by the pad id.
        self.tokenizer.padding_side = "right"
        self.tokenizer.truncation_side = "left"
        self.config.pad_token_id = self.tokenizer.pad_token_id
        self.__name__ = "reward_model"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        texts = [self._text(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        # Similar lengths together: less padding. The order is restored below.
        order = sorted(range(len(texts)), key=lambda item: len(texts[item][0]))
        values = [math.nan] * len(texts)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for item, value in zip(chosen, self._forward([texts[item] for item in chosen]), strict=True):
                values[item] = value
        return [
            Score(value)
            if math.isfinite(value)
            else Score(None, reason=f"the reward model gave {value} (an empty text?)")
            for value in values
        ]

    def _text(self, prompt: Any, completion: Any) -> tuple[str, bool]:
        """The text to judge, and whether a chat template made it (it then has its special tokens already)."""
        end = self.tokenizer.eos_token if self.append_eos else ""
        if not self.include_prompt:
            return text_of(completion) + end, False
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion + end, False
        if self.tokenizer.chat_template is None:
            return f"{text_of(prompt)}\n{text_of(completion)}{end}", False
        chat = as_messages(prompt, "user") + as_messages(completion, "assistant")
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False)), True

    def _forward(self, texts: list[tuple[str, bool]]) -> list[float]:
        ids = [
            self.tokenizer(text, add_special_tokens=not templated, truncation=True, max_length=self.max_length)[
                "input_ids"
            ]
            for text, templated in texts
        ]
        there = [item for item, tokens in enumerate(ids) if tokens]
        values = [math.nan] * len(ids)
        if there:
            logits = self._logits([ids[item] for item in there])
            column = logits[:, 0] if self.label is None else logits.log_softmax(dim=-1)[:, self.label]
            for item, value in zip(there, column.tolist(), strict=True):
                values[item] = value
        return values

    def _logits(self, ids: list[list[int]]) -> Any:
        """float32 [N, classes], before any softmax or sigmoid."""
        if self.client is not None:
            body = {"model": self.client.model, "input": ids, "use_activation": False}
            return self.torch.tensor(self.client.post("/../classify", body, _classes))
        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        with self.torch.inference_mode():
            return self.model(**inputs.to(self.device)).logits.float()


def _classes(answer: Any) -> list[list[float]]:
    return [row["probs"] for row in sorted(answer["data"], key=lambda row: row["index"])]


def _label_index(config: Any, label: str | int | None) -> int | None:
    count = config.num_labels
    if count == 1:
        if label is not None:
            raise ValueError("reward 'reward_model': `label` is set, but the model has a single output")
        return None
    names = {str(name): index for name, index in config.label2id.items()}
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < count:
        return label
    if isinstance(label, str) and label in names:
        return names[label]
    raise ValueError(
        f"reward 'reward_model': set `label` to one of {sorted(names)} or to 0..{count - 1}, got {label!r}"
    )
