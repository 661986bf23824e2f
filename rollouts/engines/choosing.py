"""An engine whose policy chooses how it decodes: a small head reads the state before a block and picks a value.

The values are lengths of the next block, as in CtrlDiff (Huang and Tang 2025, arXiv 2505.14455, and the public code of
an adaptive block policy on LLaDA and Dream), or bounds of the selector, as in DiFFPO (Zhao et al. 2025, arXiv
2510.02212), where a block is the whole response and a choice belongs to a prompt. A choice is a decision of its own: it
is recorded with its log-prob (`TokenTrajectory.choices`), and the trace recipes train it with the tokens.

The head reads the hidden state at the position before the block, on the canvas of the block's first step. That forward
is made anyway, so a choice costs nothing.

Departures: CtrlDiff also pools the states and the entropy of earlier blocks, and the public code reads the context
alone in a forward of its own; how DiFFPO draws its bound could not be read. The other weights are trained along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rollouts.engines.block_cache import BlockCache
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.record import Record
from rollouts.engines.slots import Plan, Slots
from rollouts.samplers import noise
from rollouts.samplers.distribution import draw
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.step import StepState


class ChoosingEngine(InProcessEngine):
    """Samples with `sampler.choose`; a full-attention model with a `choice_head`, without a cache."""

    def __init__(self, model: Any, options: SamplerOptions, **settings: Any):
        super().__init__(model, options, **settings)
        assert self.options.choose is not None
        self.choose = self.options.choose
        # Each row's bound reaches the selector on the way of a guide.
        self.guide: Any = self if self.choose.bound else None
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def _decoded(self, plans: Sequence[Plan], requests: Sequence[Request]) -> list[dict[str, Any]]:
        self._steps = np.array([plan.steps for plan in plans])
        self._choices: list[list[tuple[float, ...]]] = [[] for _ in plans]
        self._bounds = np.zeros(min(self.max_batch_size, len(plans)))
        found = super()._decoded(plans, requests)
        for arrays, own in zip(found, self._choices, strict=True):
            arrays["choices"] = np.array(own, dtype=np.float64).reshape(-1, 4)
        return found

    def _denoise(
        self,
        canvas: torch.Tensor,
        running: torch.Tensor | None,
        cache: BlockCache | None,
        slots: Slots,
        group: np.ndarray,
        record: Record,
    ) -> None:
        """A step; before the first one of a block, the choice."""
        first = np.flatnonzero(slots.block_step[group] == 0)
        if len(first):
            start, length = (torch.from_numpy(x[group]).to(self.device) for x in (slots.start, slots.length))
            tokens = canvas[torch.from_numpy(group).to(self.device)]
            self._seen = super()._hidden(tokens, cache, slots, group, start, length)
            row = torch.from_numpy(first).to(self.device)
            self._pick(self._seen[0][row, start[row] - 1], slots, group[first])
        self._bound = torch.from_numpy(self._bounds[group])[:, None].to(self.device)
        super()._denoise(canvas, running, cache, slots, group, record)

    def _hidden(
        self,
        tokens: torch.Tensor,
        cache: BlockCache | None,
        slots: Slots,
        group: np.ndarray,
        start: torch.Tensor,
        length: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states that the choice was read from, where there was one."""
        seen, self._seen = self._seen, None
        return super()._hidden(tokens, cache, slots, group, start, length) if seen is None else seen

    def _pick(self, states: torch.Tensor, slots: Slots, chosen: np.ndarray) -> None:
        """Choose for the slots `chosen`, from the states [N, D] before their blocks, and record it."""
        logprobs = self.model.choice_logits(states).log_softmax(-1)  # type: ignore[attr-defined]
        numbers = np.stack([slots.seed[chosen], slots.step[chosen], slots.start[chosen] - 1])
        seed, step, position = torch.from_numpy(numbers).to(self.device)
        if self.options.temperature == 0:
            option = logprobs.argmax(-1)
            logprob = torch.zeros_like(option, dtype=torch.float64)
        else:
            option = draw(logprobs, noise.uniform(seed, step, position, noise.CHOICE_STREAM))
            logprob = logprobs.gather(-1, option[:, None]).squeeze(-1).double()
        made = torch.stack([step.double(), position.double(), option.double(), logprob], dim=1).cpu().numpy()
        for request, own in zip(slots.index[chosen], made, strict=True):
            self._choices[request].append(tuple(own))
        value = np.array(self.choose.values)[made[:, 2].astype(np.int64)]
        if self.choose.bound:
            self._bounds[chosen] = value
            return
        size = np.minimum(value, slots.length[chosen] - slots.start[chosen])
        slots.end[chosen] = slots.start[chosen] + size
        slots.num_masked[chosen] = slots.left[chosen] = size
        # Its share of the steps, rounded up.
        slots.steps[chosen] = -(-size * self._steps[slots.index[chosen]] // self.options.gen_length)

    def steer(
        self, state: StepState, logits: torch.Tensor, options: SamplerOptions, prompt: torch.Tensor, end: torch.Tensor
    ) -> tuple[StepState, SamplerOptions, None]:
        """See `rollouts.samplers.guide.Guide.steer`."""
        return replace(state, bound=self._bound), options, None
