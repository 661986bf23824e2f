"""A tiny model for rollout workers, with the accidents that the tests want; workers import this file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.shared import SharedForwards


class TinyModel(nn.Module):
    """A `DenoisingModel` of one layer. Nothing but torch: workers start in tests again and again."""

    mask_token_id, attention, block_length, logit_shift, max_length = 11, "full", None, 0, 64

    def __init__(self, seed: int):
        super().__init__()
        self.token, self.place = nn.Embedding(12, 16), nn.Embedding(64, 16)
        self.inner, self.head = nn.Linear(32, 32), nn.Linear(32, 12)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.0, 0.7, generator=generator)

    def hidden_states(self, input_ids: torch.Tensor, *, visible: Any = None, **_: Any) -> torch.Tensor:
        states = self.token(input_ids) + self.place.weight[: input_ids.shape[1]]
        seen = torch.ones(1, 1, input_ids.shape[1]) if visible is None else visible.float()
        summary = (seen @ states / seen.sum(-1, keepdim=True)).expand_as(states)
        return self.inner(torch.cat([states, summary], dim=-1)).tanh()

    def token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden).index_fill(-1, torch.tensor([self.mask_token_id]), -torch.inf)


def requests(count: int = 11, ragged: bool = False) -> list[Request]:
    """Prompts of 3 tokens, or of 1 to 4; one asks for a number of steps of its own."""
    return [Request([1 + i % 9] * (1 + i % 4 if ragged else 3), 100 + i, 2 if i == 3 else None) for i in range(count)]


class Weights:
    """A `WeightSource`."""

    def __init__(self, seed: int):
        self.model = TinyModel(seed)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters())

    def save(self, folder: Path) -> None:
        raise AssertionError("workers under Ray take tensors")


@dataclass(frozen=True)
class TinySampler:
    """Builds a worker's model, of seed 0.

    Attributes:
        accidents: folder of files that make a worker's third forward, or a later one, go wrong: `kill_once` and
            `hang_once` (the first worker that gets there takes the file away), `kill_always`.
    """

    accidents: str | None = None

    def __call__(self) -> tuple[TinyModel, Callable[[Any], Any]]:
        torch.set_num_threads(1)
        made = TinyModel(0)
        if self.accidents is not None:
            folder, forward, calls = Path(self.accidents), made.hidden_states, 0

            def hidden_states(*args: Any, **kwargs: Any) -> torch.Tensor:
                nonlocal calls
                calls += 1
                if calls >= 3:
                    if (folder / "kill_always").exists() or took(folder / "kill_once"):
                        os.kill(os.getpid(), signal.SIGKILL)
                    if took(folder / "hang_once"):
                        time.sleep(3600)
                return forward(*args, **kwargs)

            made.hidden_states = hidden_states  # type: ignore[method-assign]
        return made, lambda options: InProcessEngine(SharedForwards(made), options)


def took(file: Path) -> bool:
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True
