"""A discrete diffusion model of graphs: the network, its noise, and one denoising step.

Noise as in DiGress (Vignac et al. 2023, arXiv 2209.14734): at time t of T every node and every pair of nodes keeps its
kind with probability `kept`, else it is drawn from the limit m, uniform or the kinds' share in the data.

Shape legend: B graphs, N nodes, P = N (N - 1) / 2 pairs, S = N + P places of a state, K kinds (of nodes or edges, the
more numerous), D width, T denoising steps.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn


class GraphModel(nn.Module):
    """Logits [B, S, K] of the clean kinds. Without `directed`, the numbering of the nodes does not matter to it."""

    limit: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    def __init__(
        self, num_nodes: int, limit: torch.Tensor, prompts: int, directed: bool, width: int = 64, layers: int = 3
    ):
        """
        Args:
            limit: float64 [S, K], probability of each kind under noise alone, 0 for what a place cannot be.
            prompts: how many there are.
            directed: an edge leads from the earlier node to the later one, and nodes know their place in that order.
        """
        super().__init__()
        self.num_nodes, self.directed, kinds = num_nodes, directed, limit.shape[1]
        first, second = torch.tensor(list(itertools.combinations(range(num_nodes), 2))).T
        self.register_buffer("limit", limit)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
        self.node, self.edge = nn.Embedding(kinds, width), nn.Embedding(kinds, width)
        self.prompt, self.place = nn.Embedding(prompts, width), nn.Embedding(num_nodes if directed else 1, width)
        self.time = nn.Linear(1, width)
        self.layers = nn.ModuleList(_Layer(width, directed) for _ in range(layers))
        self.node_head, self.edge_head = nn.Linear(width, kinds), nn.Linear(width, kinds)

    def forward(self, state: torch.Tensor, level: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """
        Args:
            state: int64 [B, S], nodes first.
            level: [B], t / T of the state.
            prompt: int64 [B], which one is asked for.
        """
        given = (self.prompt(prompt) + self.time(level[:, None].to(self.time.weight.dtype)))[:, None]
        order = torch.arange(self.num_nodes, device=state.device) if self.directed else state.new_zeros(1)
        nodes = self.node(state[:, : self.num_nodes]) + self.place(order) + given
        edges = self.edge(state[:, self.num_nodes :]) + given
        for layer in self.layers:
            nodes, edges = layer(nodes, edges, self.first, self.second)
        logits = torch.cat([self.node_head(nodes), self.edge_head(edges)], dim=1)
        return logits.masked_fill(self.limit == 0, -torch.inf)

    def denoise(self, state: torch.Tensor, t: torch.Tensor, steps: int, prompt: torch.Tensor) -> torch.Tensor:
        """float64 [B, S, K]: probability of every kind at time t - 1, given the state at time t.

        The sum over clean kinds k of p(k) q(kind at t - 1 | state, k). Sampler and learner both call this function.

        Args:
            t: int64 [B], 1 to T.
            steps: T.
        """
        return self.posterior(self(state, t / steps, prompt).double().softmax(-1), state, t, steps)

    def posterior(self, clean: torch.Tensor, state: torch.Tensor, t: torch.Tensor, steps: int) -> torch.Tensor:
        """[B, S, K] as `denoise` gives it, where the clean kinds have the probabilities `clean` [B, S, K]."""
        now, before = (kept(t / steps)[:, None, None] for t in (t, t - 1))
        here = nn.functional.one_hot(state, clean.shape[-1]).double()
        noise = (here * self.limit).sum(-1, keepdim=True)  # m(state)
        # Bayes' rule: q(state | kind at t - 1), times q(kind at t - 1 | k) over q(state | k).
        step = now / before
        weight = clean / (now * here + (1 - now) * noise)
        earlier = before * weight + (1 - before) * self.limit * weight.sum(-1, keepdim=True)
        return (step * here + (1 - step) * noise) * earlier


class _Layer(nn.Module):
    """A pair hears its two nodes, a node hears its pairs, and both the mean of all."""

    def __init__(self, width: int, directed: bool):
        super().__init__()
        self.directed = directed
        self.edge = nn.Sequential(nn.Linear(4 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.node = nn.Sequential(nn.Linear((4 if directed else 3) * width, width), nn.SiLU(), nn.Linear(width, width))
        self.edge_norm, self.node_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self, nodes: torch.Tensor, edges: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, N, D] and [B, P, D]; first and second [P] are the nodes of each pair."""
        one, other = nodes[:, first], nodes[:, second]
        two = [one, other] if self.directed else [one + other, one * other]
        every = nodes.mean(1, keepdim=True)
        edges = self.edge_norm(edges + self.edge(torch.cat([*two, edges, every.expand_as(edges)], dim=-1)))
        into, out = (torch.zeros_like(nodes).index_add(1, end, edges) / nodes.shape[1] for end in (second, first))
        heard = [into, out] if self.directed else [into + out]
        every = edges.mean(1, keepdim=True)
        nodes = self.node_norm(nodes + self.node(torch.cat([*heard, nodes, every.expand_as(nodes)], dim=-1)))
        return nodes, edges


def kept(level: torch.Tensor) -> torch.Tensor:
    """float64: how likely a kind is kept up to time level = t / T; the cosine of DiGress, 1 at 0 and 0 at 1."""
    offset = 0.008
    angle = (level.double() + offset) / (1 + offset) * math.pi / 2
    return (angle.cos() / math.cos(offset / (1 + offset) * math.pi / 2)).square().where(level < 1, 0.0)


def drawn(kinds: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """int64 [...]: a kind each from probabilities [..., K], by uniform draws [...]; never one of probability 0."""
    total = kinds.cumsum(-1)
    return (draws[..., None] * total[..., -1:] > total[..., :-1]).sum(-1)
