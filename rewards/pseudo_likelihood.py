"""How natural a masked language model finds a sequence: humanness, when the model was trained on human antibodies.

The value is the mean over the completion's residues of log p(residue | context). The context either shows the residue
itself (`masked=False`, one forward per sequence: how Sapiens scores, Prihoda et al. 2022, mAbs 14:2020203), or hides
it (`masked=True`, one forward per residue: the pseudo-log-likelihood of Salazar et al. 2020, arXiv 1910.14659).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewards.soft import SoftReward
from rewards.weights import load_error

if TYPE_CHECKING:
    import torch


class PseudoLikelihood(SoftReward):
    """Mean log-probability per residue under a frozen masked LM.

    Args:
        model: folder or hub name, readable by `AutoModelForMaskedLM`, whose tokens are single letters.
        alphabet: letters of a completion.
        masked: hide the residue that is predicted.
        scale: what the mean is multiplied by.

    Raises:
        ValueError: the model cannot be loaded, or lacks a letter.
    """

    def __init__(
        self, model: str, alphabet: str = "ACDEFGHIKLMNPQRSTVWY", masked: bool = False, scale: float = 1.0
    ) -> None:
        import torch
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            network = AutoModelForMaskedLM.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise load_error("pseudo_likelihood", f"model '{model}'", error) from error
        self.network = network.eval().requires_grad_(False)
        ids: list[int] = [self.tokenizer.convert_tokens_to_ids(letter) for letter in alphabet]  # type: ignore[misc]
        missing = [a for a, i in zip(alphabet, ids, strict=True) if i is None or i == self.tokenizer.unk_token_id]
        if missing:
            raise ValueError(f"reward 'pseudo_likelihood': {model} has no token for the letter {missing[0]!r}")
        self.letters = torch.tensor(ids)
        framed = self.tokenizer(self.tokenizer.mask_token).input_ids
        at = framed.index(self.tokenizer.mask_token_id)
        self.begin, self.end = framed[:at], framed[at + 1 :]
        self.alphabet, self.masked, self.scale = alphabet, masked, scale
        self.__name__ = "pseudo_likelihood"

    def soft(self, prompts: Sequence[str], completions: torch.Tensor, **columns: Any) -> torch.Tensor:
        import torch

        values: list[torch.Tensor] = [completions.sum((1, 2)) * 0.0]
        ids = [self.tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
        total = values[0]
        # Prompts of one length share a forward.
        for length in sorted({len(prompt) for prompt in ids}):
            mine = torch.tensor([index for index, prompt in enumerate(ids) if len(prompt) == length])
            prompt_ids = torch.tensor([ids[index] for index in mine.tolist()], dtype=torch.int64).view(len(mine), -1)
            total = total.index_add(0, mine, self._mean_logprob(prompt_ids, completions[mine]))
        return self.scale * total

    def _mean_logprob(self, prompt_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[B] of prompts [B, P] and completions [B, L, A]."""
        import torch

        embedding = self.network.get_input_embeddings()
        size = len(x)

        def framed(tokens: list[int]) -> torch.Tensor:
            return embedding(torch.tensor(tokens, dtype=torch.int64)).expand(size, -1, -1)

        before = torch.cat([framed(self.begin), embedding(prompt_ids)], dim=1)
        residues = x.to(before.dtype) @ embedding(self.letters)
        after = framed(self.end)

        def logprobs(middle: torch.Tensor) -> torch.Tensor:
            logits = self.network(inputs_embeds=torch.cat([before, middle, after], dim=1)).logits
            return logits[:, before.shape[1] : before.shape[1] + x.shape[1]].log_softmax(-1)[..., self.letters]

        if not self.masked:
            return (x * logprobs(residues)).sum(-1).mean(1)
        mask = embedding(torch.tensor([self.tokenizer.mask_token_id]))
        total = x.new_zeros(size)
        for place in range(x.shape[1]):
            hidden = residues.index_copy(1, torch.tensor([place]), mask.expand(size, 1, -1))
            total = total + (x[:, place] * logprobs(hidden)[:, place]).sum(-1)
        return total / x.shape[1]
