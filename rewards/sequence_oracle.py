"""A small convolutional network that was fitted to measured sequences, as a reward.

Training it on labelled sequences is `train_oracle`; two networks on disjoint halves of the data give an oracle to
optimise and a judge to evaluate with. Its parameters are frozen: the gradient goes to the sequence alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.soft import SoftReward, one_hot_of

if TYPE_CHECKING:
    import torch


class SequenceOracle(SoftReward):
    """Predicted activity of a sequence.

    Args:
        path: file that `train_oracle` wrote (`denoise-rl align` trains the ones its config names).

    Raises:
        ValueError: no such file, or not one of those.
    """

    def __init__(self, path: str) -> None:
        from safetensors import safe_open

        if not Path(path).is_file():
            raise ValueError(
                f"reward 'sequence_oracle': no file {path}: name it under align.oracles and denoise-rl align trains it"
            )
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get("oracle", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if settings is None:
            raise ValueError(f"reward 'sequence_oracle': {path} is not a file that train_oracle wrote")
        self.alphabet = settings["alphabet"]
        self.network = _network(len(self.alphabet), settings["channels"])
        self.network.load_state_dict(weights)
        self.network.eval().requires_grad_(False)
        self.__name__ = "sequence_oracle"

    def soft(self, prompts: Sequence[str], completions: torch.Tensor, **columns: Any) -> torch.Tensor:
        import torch

        # As many chunks as it takes: a call with ten thousand texts does not build one huge activation.
        parts = [self.network(part.float().transpose(1, 2)) for part in completions.split(512)]
        return torch.cat(parts).to(completions.dtype)


def _network(num_letters: int, channels: int) -> torch.nn.Module:
    """[B, A, L] -> [B]: two convolutions, the mean and the maximum over positions, one hidden layer."""
    import torch
    from torch import nn

    class Oracle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.motifs = nn.Conv1d(num_letters, channels, 11, padding=5)
            self.mix = nn.Conv1d(channels, channels, 5, padding=2)
            self.hidden = nn.Linear(2 * channels, channels)
            self.out = nn.Linear(channels, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.gelu(self.motifs(x))
            x = x + nn.functional.gelu(self.mix(x))
            pooled = torch.cat([x.mean(2), x.amax(2)], dim=1)
            return self.out(nn.functional.gelu(self.hidden(pooled))).squeeze(1)

    return Oracle()


def train_oracle(
    sequences: Sequence[str],
    labels: Sequence[float],
    path: str | Path,
    alphabet: str = "ACGT",
    channels: int = 48,
    epochs: int = 12,
    batch_size: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
) -> float:
    """Fit a network to labelled sequences of one length and write it; returns the last epoch's mean squared error."""
    import torch
    from safetensors.torch import save_file

    x = one_hot_of(sequences, alphabet).transpose(1, 2)
    y = torch.tensor(labels, dtype=torch.float32)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    network = _network(len(alphabet), channels)
    torch.random.set_rng_state(state)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01)
    steps = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    error = float("nan")
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(x), generator=generator).split(batch_size):
            loss = (network(x[batch]) - y[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        error = total / len(x)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(path).with_suffix(".partial")
    settings = {"alphabet": alphabet, "channels": channels}
    save_file(network.state_dict(), partial, metadata={"oracle": json.dumps(settings)})
    partial.replace(path)
    return error
