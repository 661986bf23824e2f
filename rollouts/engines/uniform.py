"""The engine of uniform-state models: the whole response is noise at first, and every step may change all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rollouts.engines.base import Request
from rollouts.engines.in_process import InProcessEngine
from rollouts.engines.record import Record
from rollouts.engines.slots import Plan
from rollouts.model_protocol import DenoisingModel
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.step import StepResult
from rollouts.samplers.uniform import ancestral_step, corrected_positions, entropy_bound_step, random_tokens
from rollouts.trajectory import TokenTrajectory
from rollouts.visibility import full_visibility


class UniformEngine(InProcessEngine):
    """Samples a uniform-state model with full attention (`rollouts/samplers/uniform.py`)."""

    def __init__(self, model: DenoisingModel, options: SamplerOptions, **settings: Any):
        """
        Raises:
            ValueError: an option that reveals masks, which there are none of.
        """
        options.check_uniform(getattr(model, "canvas_length", None))
        super().__init__(model, options, **settings)
        if self.approximate_cache != "none":
            raise ValueError("rollout.cache keeps revealed tokens, and uniform noise reveals none: set it to none")

    def _decoded(self, plans: Sequence[Plan], requests: Sequence[Request]) -> list[dict[str, Any]]:
        record = Record(len(plans))
        # Those with most steps first: the requests of a batch that are still sampled are then its first rows.
        plans = sorted(plans, key=lambda plan: (-plan.steps, -plan.length))
        for start in range(0, len(plans), self.max_batch_size):
            part = plans[start : start + self.max_batch_size]
            self._decode(part, [requests[plan.index].prompt_ids for plan in part], record)
        return record.by_request()

    def _decode(self, plans: Sequence[Plan], prompts: Sequence[Sequence[int]], record: Record) -> None:
        index, prompt, steps, seed, canvas, length, row, position = self._start(plans, prompts, record)
        if self.options.corrector:
            # A forward corrects what a step has drawn, unless it was the last.
            steps = 2 * steps - 1
        record.num_steps[index] = steps.cpu().numpy()
        for step in range(int(steps[0])):
            active = int((steps > step).sum())
            inside = row < active
            row, position = row[inside], position[inside]
            width = int(length[:active].max())
            tokens = canvas[:active, :width]
            hidden = self.model.hidden_states(tokens, visible=full_visibility(length[:active], width))
            self._count(tokens)
            at, place = row, position
            if self.options.corrector and step % 2:
                now = torch.full_like(row, step)
                chosen = corrected_positions(row, position, seed[row], now, self.options.corrector)
                at, place = row[chosen], position[chosen]
            logits = self.model.token_logits(hidden[at, place - self.model.logit_shift])
            if self.options.selector == "entropy_bound":
                free, now = torch.zeros_like(tokens, dtype=torch.bool), torch.full_like(steps[:active], step)
                free[row, position] = True
                last = now + 1 == steps[:active]
                result = entropy_bound_step(logits, tokens, free, seed[:active], now, last, self.options, self.model)
            else:
                now = torch.full_like(at, step)
                result = ancestral_step(logits, at, place, tokens[at, place], seed[at], now, steps[at], self.options)
            record.add(result, index, np.full(len(plans), step), self.mask_token_id)
            canvas[at, place] = result.token
            self._stepped(canvas)
        self.stats.generated_tokens += int((length - prompt).sum())

    def _start(self, plans: Sequence[Plan], prompts: Sequence[Sequence[int]], record: Record) -> tuple[Any, ...]:
        """Canvases of noise behind their prompts, which is recorded.

        Returns:
            index: int64 [B], an array; prompt, steps, seed: int64 [B]; canvas: int64 [B, L]; length: int64 [B]; row and
            position: int64 [N], the places of the responses.
        """
        index = np.array([plan.index for plan in plans])
        fields = np.array([(plan.prompt, plan.length, plan.steps, plan.seed) for plan in plans]).T
        prompt, length, steps, seed = torch.from_numpy(fields).to(self.device)
        place = torch.arange(int(length.max()), device=self.device)
        canvas = torch.zeros((len(plans), len(place)), dtype=torch.int64, device=self.device)
        for row, ids in enumerate(prompts):
            canvas[row, : len(ids)] = torch.as_tensor(ids, device=self.device)
        record.length[index] = length.cpu().numpy()
        row, position = ((place >= prompt[:, None]) & (place < length[:, None])).nonzero(as_tuple=True)
        nothing, start = torch.zeros(len(row), dtype=torch.float64, device=self.device), torch.zeros_like(row)
        token = random_tokens(self.model, seed[row], start, position)
        result = StepResult(row, position, token, nothing, nothing, torch.ones_like(row, dtype=torch.bool))
        record.add(result, index, np.full(len(plans), -1), self.mask_token_id)
        canvas[row, position] = result.token
        return index, prompt, steps, seed, canvas, length, row, position

    def _stepped(self, canvas: torch.Tensor) -> None:
        """Called with the canvases int64 [B, L] after every step, for whoever watches."""

    def trajectory(self, *args: Any, **arrays: Any) -> TokenTrajectory:
        """See `InProcessEngine.trajectory`; a learner has to know where decisions follow the law of a transition."""
        trajectory = super().trajectory(*args, **arrays)
        if self.options.selector != "entropy_bound":
            trajectory.sampler["noise"] = "uniform"
        return trajectory
