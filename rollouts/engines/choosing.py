"""An engine whose policy chooses how it decodes: a small head reads the state before a block and picks a value.

The values are lengths of the next block, as in CtrlDiff (Huang and Tang 2025, arXiv 2505.14455, and the public code of
an adaptive block policy on LLaDA and Dream), or bounds of the selector, as in DiFFPO (Zhao et al. 2025, arXiv
2510.02212), where a block is the whole response and a choice belongs to a prompt. A choice is a decision of its own: it
is recorded with its log-prob (`TokenTrajectory.choices`), and the trace recipes train it with the tokens.

The head reads the hidden state at the position before the block. Under full attention that is a state of the canvas of
the block's first step, whose forward is made anyway: a choice costs nothing. A block-causal model reads the last
decided token, which costs a forward of the finished block, as short as one of its steps, that other rollouts do not
need.

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
from rollouts.trajectory import TokenTrajectory


class ChoosingEngine(InProcessEngine):
    """Samples with `sampler.choose` a full-attention model with a `choice_head`, without a cache."""

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
            self._pick(self._before(canvas, cache, slots, group, first), slots, group[first])
        self._bound = torch.from_numpy(self._bounds[group])[:, None].to(self.device)
        super()._denoise(canvas, running, cache, slots, group, record)

    def _before(
        self, canvas: torch.Tensor, cache: BlockCache | None, slots: Slots, group: np.ndarray, first: np.ndarray
    ) -> torch.Tensor:
        """[N, D]: the states before the blocks that the slots `group[first]` begin."""
        start, length = (torch.from_numpy(x[group]).to(self.device) for x in (slots.start, slots.length))
        tokens = canvas[torch.from_numpy(group).to(self.device)]
        self._seen = super()._hidden(tokens, cache, slots, group, start, length)
        row = torch.from_numpy(first).to(self.device)
        return self._seen[0][row, start[row] - 1]

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


class ChoosingBlocks(ChoosingEngine):
    """The same for a block-causal model, whose blocks begin where the prompt ends and may have any length.

    The prompt keeps the model's grid, cut at its end. Example: a prompt of 5 tokens in blocks of 4, and chosen blocks
    of 2 and 8: borders at 0, 4, 5, 7 and 15.
    """

    def __init__(self, model: Any, options: SamplerOptions, **settings: Any):
        super().__init__(model, options, **settings)
        # Up to where the states of each slot are stored; a prompt's are, from when it is admitted.
        self._stored = np.zeros(self.max_batch_size, dtype=np.int64)

    def _prefill(
        self, canvas: torch.Tensor, cache: BlockCache, slots: Slots, admitted: dict[int, Sequence[int]]
    ) -> None:
        copies, batches = slots.prefills(admitted)
        for batch in batches:
            self._store(canvas, cache, slots, np.array(batch), np.zeros(len(batch), dtype=np.int64))
        cache.share(copies, slots.start)
        new = list(admitted)
        self._stored[new] = slots.start[new]

    def _store(self, canvas: torch.Tensor, cache: BlockCache, slots: Slots, own: np.ndarray, begin: np.ndarray) -> None:
        """Forward the decided tokens of the slots `own` from `begin` [N] to where their next block starts."""
        first, start = (torch.from_numpy(x).to(self.device)[:, None] for x in (begin, slots.start[own]))
        positions = first + torch.arange(int((slots.start[own] - begin).max()), device=self.device)
        # A finished block sees itself, a prompt its grid.
        seen = start
        if self.context_causal:
            seen = positions + 1
        elif not begin.any():
            assert self.model.block_length is not None
            seen = ((positions // self.model.block_length + 1) * self.model.block_length).minimum(start)
        hidden = self._forward(canvas[torch.from_numpy(own).to(self.device)], cache, own, positions, seen, start)
        cache.keep_last_clean(hidden.gather(1, (start - first - 1)[..., None].expand(-1, -1, hidden.shape[2]))[:, 0])

    def _before(
        self, canvas: torch.Tensor, cache: BlockCache | None, slots: Slots, group: np.ndarray, first: np.ndarray
    ) -> torch.Tensor:
        """The states of the last decided tokens; finished blocks are stored for them."""
        assert cache is not None
        own = group[first]
        behind = own[self._stored[own] < slots.start[own]]
        if len(behind):
            self._store(canvas, cache, slots, behind, self._stored[behind])
            self._stored[behind] = slots.start[behind]
        return cache.last_clean(own)

    def _hidden(
        self,
        tokens: torch.Tensor,
        cache: BlockCache | None,
        slots: Slots,
        group: np.ndarray,
        start: torch.Tensor,
        length: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of the blocks, which see themselves and all before; a shorter block is padded."""
        assert cache is not None
        width = int((slots.end - slots.start)[group].max())
        end = torch.from_numpy(slots.end[group]).to(self.device)[:, None]
        positions = start[:, None] + torch.arange(width, device=self.device)
        hidden = self._forward(tokens, cache, group, positions, end, end)
        return cache.with_last_clean(hidden, start) if self.model.logit_shift else (hidden, start)

    def _forward(
        self,
        tokens: torch.Tensor,
        cache: BlockCache,
        own: np.ndarray,
        positions: torch.Tensor,
        seen: torch.Tensor,
        end: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states [N, Q, D] of some positions [N, Q], what lies at or behind `end` [N, 1] being padding.

        Args:
            seen: how many keys each may look at, int64 [N, Q] or [N, 1].
        """
        num_keys = int(end.max())
        cache.aim(own.tolist(), torch.where(positions < end, positions, cache.max_length - 1), num_keys)
        positions = positions.minimum(end - 1)
        hidden = self.model.hidden_states(
            tokens.gather(1, positions),
            visible=torch.arange(num_keys, device=self.device) < seen[..., None],
            position_ids=positions,
            cache=cache,
        )
        self._count(positions)
        return hidden

    def trajectory(self, prompt_ids: Sequence[int] | np.ndarray, *given: Any, **arrays: Any) -> TokenTrajectory:
        """See `InProcessEngine.trajectory`; a forward of every finished block joins those of the steps."""
        made = super().trajectory(prompt_ids, *given, **arrays)
        made.block_origin = made.prompt_length
        assert made.choices is not None
        made.decoder["forwards"] = made.num_steps + len(made.choices) - 1
        made.decoder["prompt_block"] = self.model.block_length
        return made
