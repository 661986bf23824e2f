"""The engine of models that denoise a response canvas by canvas behind a clean text: DiffusionGemma.

A canvas is noise at first. A step draws tokens where the entropy bound allows it and makes noise of the others, at a
temperature that falls from step to step; its prediction conditions the next step (`DenoisingModel`). The last step
decides every token, and the canvas joins the clean text. That is transformers' `generate`
(`models/diffusion_gemma/generation_diffusion_gemma.py`), but that the last step draws where transformers takes the most
likely tokens: `sampler.last_step: argmax` does so too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rollouts.engines.base import Request
from rollouts.engines.record import Record
from rollouts.engines.slots import Plan
from rollouts.engines.uniform import UniformEngine
from rollouts.model_protocol import DenoisingModel
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.uniform import entropy_bound_step, step_temperature
from rollouts.trajectory import TokenTrajectory


class CanvasEngine(UniformEngine):
    """Samples a model with `canvas_length`; a trajectory's `decoder` says how many steps a canvas had at most."""

    def __init__(self, model: DenoisingModel, options: SamplerOptions, **settings: Any):
        """
        Raises:
            ValueError: the response is no row of whole canvases, or the decoder is another one than the model's.
        """
        super().__init__(model, options, **settings)
        self.canvas_length: int = model.canvas_length  # type: ignore[attr-defined]
        self.options = options.model_copy(update={"block_length": self.canvas_length})
        self.num_canvases = options.gen_length // self.canvas_length
        # The logits of a step are tempered when it sees them.
        self._tempered = options.model_copy(update={"temperature": 1.0, "score_from": "sampling"})

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], policy_version: int = 0) -> list[TokenTrajectory]:
        """Decode every request; see `InProcessEngine.generate`."""
        trajectories = super().generate(requests, policy_version)
        for index, (request, trajectory) in enumerate(zip(requests, trajectories, strict=True)):
            trajectory.decoder["canvas_steps"] = self.plan(index, request).steps
        return trajectories

    def _decode(self, plans: Sequence[Plan], prompts: Sequence[Sequence[int]], record: Record) -> None:
        index, prompt, steps, seed, canvas, *_ = self._start(plans, prompts, record)
        place, taken = torch.arange(self.canvas_length, device=self.device), torch.zeros_like(steps)
        alive = torch.arange(len(plans), device=self.device)
        for number in range(self.num_canvases):
            begin = prompt[alive] + number * self.canvas_length
            self._decide(alive, begin, steps, seed, taken, canvas, index, record)
            self.stats.generated_tokens += len(alive) * self.canvas_length
            if self.eos_token_id is not None:
                done = canvas[alive[:, None], begin[:, None] + place] == self.eos_token_id
                alive = alive[~done.any(1)]
            if not len(alive):
                break
        record.num_steps[index] = taken.cpu().numpy()

    def _decide(
        self,
        rows: torch.Tensor,
        begin: torch.Tensor,
        steps: torch.Tensor,
        seed: torch.Tensor,
        taken: torch.Tensor,
        canvas: torch.Tensor,
        index: np.ndarray,
        record: Record,
    ) -> None:
        """Decide one canvas of some requests.

        Args:
            rows: int64 [R], the requests; begin: int64 [R], where the canvas begins.
            steps, seed: int64 [B], of all requests; taken: int64 [B], steps they have taken, which is counted up.
            canvas: int64 [B, L], which is changed.
        """
        model: Any = self.model
        text, signal, before = model.encode(canvas[rows], begin), None, None
        place, step = torch.arange(self.canvas_length, device=self.device), 0
        while len(rows):
            at = begin[:, None] + place
            tokens, most = canvas[rows[:, None], at], steps[rows]
            hidden = model.denoise(tokens, text, signal)
            self._count(tokens)
            heat = step_temperature(step, most, self.options.temperature, self.options.final_temperature)
            logits = model.token_logits(hidden)
            logits = logits / heat.to(logits.dtype)[:, None, None]
            best, last = logits.argmax(-1), most == step + 1
            if self.options.stop_entropy is not None and before is not None:
                law = torch.log_softmax(logits, dim=-1)
                sure = -(law.exp() * law).sum(-1).mean(-1) < self.options.stop_entropy
                last = last | (sure & (best == before).all(1))
            free = torch.ones_like(tokens, dtype=torch.bool)
            result = entropy_bound_step(
                logits.flatten(0, 1), tokens, free, seed[rows], taken[rows], last, self._tempered, self.model
            )
            result.position = at[result.row, result.position]
            record.add(result, index[rows.cpu().numpy()], taken[rows].cpu().numpy(), self.mask_token_id)
            canvas[rows[result.row], result.position] = result.token
            self._stepped(canvas)
            taken[rows] += 1
            step, left = step + 1, (~last).nonzero().squeeze(1)
            signal = model.signal(logits)[left]
            rows, begin, before, text = rows[left], begin[left], best[left], text.select(left)
