"""Memory and time of a DRAKES update against T and K: python scripts/bench_relaxed.py PICTURE.png

Memory is what autograd holds at its peak, counted as tensors are saved (what a checkpoint computes again is not); the
model is the one of configs/dna_drakes.yaml.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from rl.estimators.relaxed import free_canvas
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rollouts.samplers.relaxed import relaxed_rollout
from rollouts.samplers.relaxed_options import RelaxedOptions


class SavedBytes:
    """Bytes autograd holds: each saved storage once."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.held: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> object:
        meter, key, size = self, tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()

        class Held:
            def __init__(self) -> None:
                self.tensor = tensor
                meter.now += 0 if meter.held.get(key) else size
                meter.held[key] = meter.held.get(key, 0) + 1
                meter.peak = max(meter.peak, meter.now)

            def __del__(self) -> None:
                meter.held[key] -= 1
                meter.now -= 0 if meter.held[key] else size

        return Held()


def measure(steps: int, relaxed: int, keep: bool, batch: int = 32) -> tuple[float, float]:
    """Peak MiB and CPU seconds of one update."""
    torch.manual_seed(0)
    backbone = {"model_type": "dilated_conv", "vocab_size": 6, "hidden_size": 48, "dilations": [1, 2, 4]}
    models = [DiffusionLM(DiffusionLMConfig(backbone=backbone, mask_token_id=5)).eval() for _ in range(2)]
    models[1].requires_grad_(False)
    canvas = free_canvas([[4]] * batch, 40, list(range(batch)), models[0])
    options = RelaxedOptions(relaxed_steps=relaxed, checkpoint=not keep)
    policy, reference = (lambda token, model=model: canvas.holding(token).score(model) for model in models)
    meter, started = SavedBytes(), time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda held: held.tensor):
        for segment in relaxed_rollout(policy, reference, canvas.free, steps, options):
            loss = segment.kl.sum() if segment.one_hot is None else segment.kl.sum() + segment.one_hot[:, 0].sum()
            loss.backward()
            del loss, segment
    return meter.peak / 2**20, time.process_time() - started


def main(picture: str) -> None:
    torch.set_num_threads(1)
    measure(4, 2, True)
    by_steps = {t: measure(t, 10, True) for t in (10, 20, 40, 80, 160)}
    by_relaxed = {k: measure(40, k, True) for k in (5, 10, 20, 40)}
    checkpointed = {k: measure(40, k, False) for k in (5, 10, 20, 40)}
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    axes[0].plot(list(by_steps), [m for m, _ in by_steps.values()], "o-", label="K = 10")
    axes[0].set(xlabel="steps T", ylabel="peak held for backward, MiB", ylim=(0, None))
    axes[1].plot(list(by_relaxed), [m for m, _ in by_relaxed.values()], "o-", label="T = 40")
    axes[1].plot(list(checkpointed), [m for m, _ in checkpointed.values()], "s--", label="T = 40, checkpoint")
    axes[1].set(xlabel="relaxed steps K", ylim=(0, None))
    for axis in axes:
        axis.legend()
    figure.savefig(picture, dpi=120)
    numbers = {"T, K = 10": by_steps, "K, T = 40": by_relaxed, "K, T = 40, checkpoint": checkpointed}
    for name, rows in numbers.items():
        print(name, json.dumps({k: [round(m, 2), round(s, 2)] for k, (m, s) in rows.items()}))


if __name__ == "__main__":
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    main(sys.argv[1])
