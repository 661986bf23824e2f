"""Reinforcement learning for a diffusion language model on one page: TraceRL on 4x4 Sudoku, from nothing, on a CPU.

A masked-diffusion model starts from a row of masks and reveals a few tokens per step. Four cells are decided at once
without seeing each other, so a model that was only shown right answers mixes two of them. RL answers every puzzle eight
times and makes the decisions that led to right grids likelier. TraceRL (Wang et al. 2025, arXiv 2509.06949) scores each
token on the canvas of the step that revealed it, so the probability ratio of PPO is exact.

Shapes: B grids, L = 33 positions (16 givens, "=", 16 answer cells), V = 7 tokens ("0" to "4", "=", mask), N decisions.
A denoising step is three tensors: the canvas before it [B, L], revealed [B, L], log-probs of the revealed tokens [N].
"""

import random
import sys
import zlib
from itertools import permutations, product

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from transformers import GPT2Config, GPT2Model

EQUALS, MASK, VOCAB, PROMPT, CELLS = 5, 6, 7, 17, 16
ROWS = [range(r, r + 4) for r in (0, 4, 8, 12)]
UNITS = [*ROWS, *zip(*ROWS, strict=True), *((i, i + 1, i + 4, i + 5) for i in (0, 2, 8, 10))]  # rows, columns, boxes


def valid(grid: list[int]) -> bool:
    return all({grid[cell] for cell in unit} == {1, 2, 3, 4} for unit in UNITS)


GRIDS = [g for rows in product(permutations((1, 2, 3, 4)), repeat=4) if valid(g := sum(rows, ()))]  # all 288


def puzzles(rng: random.Random, count: int, heldout: bool = False) -> Tensor:
    """Puzzle, "=" and answer [count, L]. One puzzle in eight, by its own digits, is never trained on."""
    found: list[list[int]] = []
    while len(found) < count:
        grid, kept = rng.choice(GRIDS), rng.sample(range(CELLS), rng.randint(4, 8))
        puzzle = [cell if i in kept else 0 for i, cell in enumerate(grid)]
        if (zlib.crc32(bytes(puzzle)) % 8 == 0) == heldout:
            found.append([*puzzle, EQUALS, *grid])
    return torch.tensor(found)


class Denoiser(nn.Module):
    """GPT-2 that looks both ways: canvas [B, L] -> the distribution of the token at every position, never a mask."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 96, "n_layer": 3, "n_head": 3, "is_causal": False}
        plain = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": None, "eos_token_id": None}
        self.backbone = GPT2Model(GPT2Config(**sizes, **plain, activation_function="silu", use_cache=False))
        self.lm_head = nn.Linear(96, VOCAB, bias=False)

    def forward(self, canvas: Tensor) -> Categorical:
        logits = self.lm_head(self.backbone(canvas).last_hidden_state)
        return Categorical(logits=logits.masked_fill(torch.arange(VOCAB) == MASK, -torch.inf))


@torch.no_grad()
def sample(model: nn.Module, prompts: Tensor, num_steps: int = 4) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """SAMPLE: draw every masked cell, reveal the 16 / num_steps likeliest draws. Returns final canvas and steps."""
    canvas, trace = torch.cat([prompts, torch.full((len(prompts), CELLS), MASK)], dim=1), []
    for _ in range(num_steps):
        distribution = model(canvas)
        token = distribution.sample()
        logprob = distribution.log_prob(token)
        best = logprob.masked_fill(canvas != MASK, -torch.inf).topk(CELLS // num_steps).indices
        revealed = torch.zeros_like(canvas, dtype=torch.bool).scatter(1, best, True)
        trace.append((canvas, revealed, logprob[revealed]))
        canvas = torch.where(revealed, token, canvas)
    return canvas, trace


def verify(canvas: Tensor) -> Tensor:
    """VERIFY: reward [B], 1 for a valid grid that keeps the givens."""
    puzzle, answer = canvas[:, :CELLS], canvas[:, PROMPT:]
    return ((puzzle == 0) | (puzzle == answer)).all(1) * torch.tensor([float(valid(g)) for g in answer.tolist()])


def policy_loss(model: nn.Module, final: Tensor, trace: list[tuple[Tensor, ...]], advantage: Tensor) -> Tensor:
    """SCORE: PPO's clipped loss, the mean over all revealed tokens. A token is scored on the canvas of its step."""
    gains = []
    for canvas, revealed, old in trace:
        ratio = (model(canvas).log_prob(final)[revealed] - old).exp()
        good = advantage[:, None].expand_as(final)[revealed]
        gains.append(torch.minimum(ratio * good, ratio.clamp(0.8, 1.2) * good))
    return -torch.cat(gains).mean()


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """UPDATE: one optimizer step."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def main(warm: int = 450, steps: int = 120, num_puzzles: int = 32, group: int = 8, tests: int = 500) -> None:
    torch.manual_seed(0)
    model, rng, heldout = Denoiser(), random.Random(0), puzzles(random.Random("test"), tests, True)[:, :PROMPT]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(warm):  # warm start: predict a hidden random share of the answer; RL needs some right grids
        clean = puzzles(rng, 128)
        hidden = (torch.rand(clean.shape) < torch.rand(len(clean), 1)) & (torch.arange(PROMPT + CELLS) >= PROMPT)
        update(model, optimizer, -model(clean.masked_fill(hidden, MASK)).log_prob(clean)[hidden].mean())
    print(f"warm start: {verify(sample(model, heldout)[0]).mean():.3f} of held-out puzzles solved in 4 steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(1, steps + 1):
        final, trace = sample(model, puzzles(rng, num_puzzles)[:, :PROMPT].repeat_interleave(group, dim=0))
        reward = verify(final).view(-1, group)
        advantage = (reward - reward.mean(1, keepdim=True)).flatten()  # against the other answers to the same puzzle
        for _ in range(2):
            update(model, optimizer, policy_loss(model, final, trace, advantage))
        print(f"step {step}: reward {reward.mean():.3f}", flush=True)
    print(f"after RL: {verify(sample(model, heldout)[0]).mean():.3f} of held-out puzzles solved in 4 steps")


if __name__ == "__main__":
    main(**{name: int(value) for name, value in (argument.split("=") for argument in sys.argv[1:])})
