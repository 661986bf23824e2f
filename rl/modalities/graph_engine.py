"""What samples graphs, and the record of a sample.

Shape legend: B graphs, S places of a state, K kinds, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rl.modalities.graphs_plan import GraphOptions
from rl.models.graph_policy import GraphModel, drawn
from rollouts.engines.base import BatchedEngine, EngineStats, SampleRequest
from rollouts.samplers.noise import TOKEN_STREAM, uniform


@dataclass
class GraphTrajectory:
    """One rollout.

    Attributes:
        states: int64 [T + 1, S], noise first.
        logprob: float64 [T], of every step's draw.
        prompt: index of what was asked for.
    """

    states: np.ndarray
    logprob: np.ndarray
    prompt: int
    policy_version: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.logprob)


class GraphEngine(BatchedEngine):
    """A rollout's draws depend on its seed, its step and its place alone, whatever shares the batch."""

    def __init__(
        self,
        model: GraphModel,
        options: GraphOptions,
        device: torch.device,
        prompts: Sequence[str],
        max_batch_size: int = 256,
    ):
        self.model, self.options, self.device, self.prompts = model, options, device, list(prompts)
        self.max_batch_size, self.stats = max_batch_size, EngineStats()

    @torch.no_grad()
    def _together(self, requests: Sequence[SampleRequest], policy_version: int) -> list[GraphTrajectory]:
        steps, count = self.options.num_inference_steps, len(requests)
        seed = torch.tensor([request.seed for request in requests], dtype=torch.int64, device=self.device)
        asked = torch.tensor([self.prompts.index(request.prompt) for request in requests], device=self.device)
        place = torch.arange(len(self.model.limit), device=self.device)

        def draws(step: int) -> torch.Tensor:
            return uniform(seed[:, None], torch.tensor(step, device=self.device), place, TOKEN_STREAM)

        states, logprobs = [drawn(self.model.limit, draws(0))], []
        for left in range(steps, 0, -1):
            kinds = self.model.denoise(states[-1], torch.full_like(asked, left), steps, asked)
            states.append(drawn(kinds, draws(steps - left + 1)))
            logprobs.append(chosen(kinds, states[-1]).log().sum(-1))
        rows, places = count * steps, count * len(place)
        self.stats.add(EngineStats(steps, rows, rows, steps * places, places))
        every, logprob = torch.stack(states, dim=1).cpu().numpy(), torch.stack(logprobs, dim=1).cpu().numpy()
        return [GraphTrajectory(every[i], logprob[i], int(asked[i]), policy_version) for i in range(count)]


def chosen(kinds: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """[B, S]: the entries of [B, S, K] that states [B, S] name."""
    return kinds.gather(-1, state[..., None])[..., 0]
