"""A denoiser that is one table of logits per masked state, and its exact law. Small enough to enumerate."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

PROMPT = [0]


class TabularModel(nn.Module):
    """A `DenoisingModel` over V tokens and the mask (id V), for one prompt token and L free positions.

    Between hard states the logits are interpolated linearly in every position's distribution. With one hot row per
    token as its embedding, soft inputs are that distribution.
    """

    attention = "full"
    block_length = None
    logit_shift = 0

    def __init__(self, num_tokens: int, num_free: int, seed: int = 0, scale: float = 1.0):
        super().__init__()
        self.num_tokens, self.num_free = num_tokens, num_free
        self.mask_token_id = num_tokens
        self.max_length = len(PROMPT) + num_free
        generator = torch.Generator().manual_seed(seed)
        shape = ((num_tokens + 1) ** num_free, num_free, num_tokens)
        self.table = nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))
        self.embedding = nn.Embedding.from_pretrained(torch.eye(num_tokens + 1, dtype=torch.float64))
        self.calls = 0

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def hidden_states(
        self, input_ids: torch.Tensor, *, visible: Any = None, position_ids: Any = None, cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        self.calls += 1
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        weight = torch.ones(len(x), 1, dtype=x.dtype)
        for i in range(len(PROMPT), self.max_length):
            weight = (weight[:, :, None] * x[:, i, None, :]).flatten(1)
        logits = torch.einsum("bs,spv->bpv", weight, self.table)
        # The prompt's own position, and the mask, which nothing may choose.
        logits = nn.functional.pad(logits, (0, 1, len(PROMPT), 0), value=-1e9)
        return logits

    def token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def forward(self, input_ids: torch.Tensor, visible: Any = None) -> torch.Tensor:
        return self.hidden_states(input_ids)

    def logp(self, state: tuple[int, ...]) -> torch.Tensor:
        """[L, V]: log-probs at every position of a state (token V is the mask)."""
        index = 0
        for token in state:
            index = index * (self.num_tokens + 1) + token
        return self.table[index].log_softmax(-1)

    @torch.no_grad()
    def become(self, law: torch.Tensor) -> TabularModel:
        """Take the conditionals of a joint law [V] * L: sampled in any order, it gives that law."""
        for index, state in enumerate(itertools.product(range(self.num_tokens + 1), repeat=self.num_free)):
            given = law[tuple(slice(None) if s == self.num_tokens else slice(s, s + 1) for s in state)]
            for position in range(self.num_free):
                others = [d for d in range(self.num_free) if d != position]
                marginal = given.sum(dim=others)
                if len(marginal) == self.num_tokens:
                    self.table[index, position] = marginal.log()
        return self


def path_objective(
    policy: TabularModel, reference: TabularModel, reward: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact, one position at a time in a random order: E reward - alpha * path KL, the path KL, the final law [V] * L.

    All with gradient.
    """
    mask, size = policy.num_tokens, policy.num_free
    states = list(itertools.product(range(mask + 1), repeat=size))
    reach = {state: torch.zeros((), dtype=torch.float64) for state in states}
    reach[(mask,) * size] = torch.ones((), dtype=torch.float64)
    kl = torch.zeros((), dtype=torch.float64)
    for state in sorted(states, key=lambda s: -s.count(mask)):
        masked = [i for i, token in enumerate(state) if token == mask]
        if not masked:
            continue
        logp, ref = policy.logp(state), reference.logp(state).detach()
        for i in masked:
            share = reach[state] / len(masked)
            kl = kl + share * (logp[i].exp() * (logp[i] - ref[i])).sum()
            for token in range(mask):
                after = (*state[:i], token, *state[i + 1 :])
                reach[after] = reach[after] + share * logp[i, token].exp()
    finished = [state for state in states if mask not in state]
    law = torch.stack([reach[state] for state in finished]).view((mask,) * size)
    return (law * reward).sum() - alpha * kl, kl, law
