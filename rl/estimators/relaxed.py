"""Canvases whose free positions hold tokens or mixtures of tokens: the rows of a reward gradient on text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rollouts.model_protocol import SoftInputModel
from rollouts.samplers.relaxed import FreePositions
from rollouts.visibility import full_visibility


@dataclass
class SoftCanvas:
    """B canvases of full-attention models, N positions of which are free.

    Attributes:
        input_ids: int64 [B, L], prompts and all other tokens that do not change.
        length: int64 [B], valid positions of each canvas.
        free: the free positions.
        token: int64 [N], or [N, V] a distribution over tokens, embedded as its mean embedding.
        temperature: of the sampling distribution.
    """

    input_ids: torch.Tensor
    length: torch.Tensor
    free: FreePositions
    token: torch.Tensor
    temperature: float = 1.0

    def holding(self, token: torch.Tensor) -> SoftCanvas:
        """The same canvases with other tokens in the free positions."""
        return replace(self, token=token)

    def at_temperature(self, temperature: float) -> SoftCanvas:
        return replace(self, temperature=temperature)

    def to(self, device: torch.device | str) -> SoftCanvas:
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "length", "token")}
        free = {name: getattr(self.free, name).to(device) for name in ("row", "position", "seed")}
        return replace(self, **moved, free=replace(self.free, **free))

    def score(self, model: SoftInputModel) -> torch.Tensor:
        """[N, V] log-probs of the token at each free position."""
        row, position = self.free.row, self.free.position
        visible = full_visibility(self.length, self.input_ids.shape[1])
        if self.token.dim() == 1:
            ids = self.input_ids.index_put((row, position), self.token)
            hidden = model.hidden_states(ids, visible=visible)
        else:
            embedding = model.get_input_embeddings()
            table = embedding(torch.arange(self.free.vocab_size, device=self.token.device))
            mixed = self.token.to(table.dtype) @ table
            embeds = embedding(self.input_ids).index_put((row, position), mixed)
            hidden = model.hidden_states(self.input_ids, visible=visible, inputs_embeds=embeds)
        logits = model.token_logits(hidden[row, position - model.logit_shift])
        return (logits / self.temperature).log_softmax(-1)


def free_canvas(prompts: list[list[int]], gen_length: int, seeds: list[int], model: SoftInputModel) -> SoftCanvas:
    """Prompts followed by `gen_length` masks, every one of them free.

    Raises:
        ValueError: a block-causal model (while one block is decided, the later ones are not there yet), or a canvas
            that is too long for the model.
    """
    if model.attention != "full":
        raise ValueError("algorithm.gradient pathwise needs a model with full attention: this one is block-causal")
    length = torch.tensor([len(prompt) + gen_length for prompt in prompts])
    if int(length.max()) > model.max_length:
        raise ValueError(
            f"a prompt plus sampler.gen_length {gen_length} needs {int(length.max())} positions, the model has "
            f"{model.max_length}"
        )
    ids = torch.full((len(prompts), int(length.max())), model.mask_token_id)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(prompt)
    index = torch.arange(ids.shape[1])
    start = torch.tensor([len(prompt) for prompt in prompts])
    row, position = ((index >= start[:, None]) & (index < length[:, None])).nonzero(as_tuple=True)
    vocab_size = model.get_input_embeddings().num_embeddings
    free = FreePositions(row, position, torch.tensor(seeds), model.mask_token_id, vocab_size)
    return SoftCanvas(ids, length, free, torch.full_like(row, model.mask_token_id))
