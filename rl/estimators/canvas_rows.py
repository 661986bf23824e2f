"""Decisions of a model that denoises canvases behind a clean text, DiffusionGemma.

A row is one state: the clean text and the canvas before a step. The step also saw the signal of the step before
(`rl/models/canvas_lm.py`), which is a function of all canvases before it. A trajectory holds no signal, in bfloat16 1.4
MB a step of 256 tokens of width 2,816: the learner computes them again, step after step, with the weights that score.
Log-probs are then those of the rollout's law under any weights, the reference's too. The gradient takes the signals as
they are, as DiffusionGemma is trained, and leaves out how a step depends on the weights through earlier predictions;
with `model.self_conditioning_gradient` it is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rl import distributed
from rl.estimators.documents import Reads, canvas_document
from rl.estimators.masking import stratified
from rl.estimators.rows import TokenRows, assemble
from rl.estimators.uniform_rows import LOWEST
from rollouts.samplers.uniform import step_temperature
from rollouts.trajectory import TokenTrajectory


@dataclass(kw_only=True)
class CanvasRows(TokenRows):
    """States of canvases; those of a canvas follow one another.

    Attributes:
        depth: int64 [R], states before this one in its canvas, which are the rows before it.
        heat: float64 [R], the temperature of the step that each state is seen by.
    """

    depth: torch.Tensor
    heat: torch.Tensor

    def distinct(self) -> CanvasRows:
        """Itself: equal canvases with other histories differ in their signals."""
        return self

    def drawn(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().drawn(logits / self.heat[self.row, None].to(logits.dtype))

    def hidden(self, model: Any, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        assert input_ids is None, "sampler.cfg_scale is refused under uniform noise"
        signal = self.signals(model)
        rows = self.row.unique()
        hidden = self._forward(model, rows, signal)
        return hidden.new_zeros(len(self.depth), *hidden.shape[1:]).index_copy(0, rows, hidden)

    def signals(self, model: Any) -> torch.Tensor:
        """[R, C, D]: what each state's step saw of the step before it, zeros at the first step of a canvas."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and model.self_conditioning_gradient):
            return self._signals(model)

    def _signals(self, model: Any) -> torch.Tensor:
        size = model.canvas_length
        signal = torch.zeros(len(self.depth), size, model.hidden_size, dtype=model.dtype, device=self.depth.device)
        start = (self.document == 0).sum(1) - size
        steps = int(self.depth.max())
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            # Every forward gathers weights of ZeRO 3 from all ranks: they make as many.
            steps = int(distributed.reduce_number(float(steps), "max", start.device))
        for depth in range(1, steps + 1):
            rows = (self.depth == depth).nonzero().squeeze(1)
            before = rows - 1 if len(rows) else torch.zeros_like(start[:1])
            place = start[before, None] + torch.arange(size, device=start.device)
            hidden = self._forward(model, before, signal)
            logits = model.token_logits(hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1])))
            signal[rows] = model.signal(logits / self.heat[before, None, None].to(logits.dtype))[: len(rows)]
        return signal

    def _forward(self, model: Any, rows: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
        """[len(rows), W, D]"""
        visible = (self.document[rows] == 0)[:, None]
        hidden: torch.Tensor = model.hidden_states(self.input_ids[rows], visible=visible, signal=signal[rows])
        return hidden


def canvas_trace_rows(trajectories: Sequence[TokenTrajectory]) -> CanvasRows:
    """One row for every step: the clean text and the canvas before it."""
    documents, reads, depth, heat = [], [], [], []
    for index, trajectory in enumerate(trajectories):
        assert trajectory.block_length is not None
        chosen, most = np.flatnonzero(trajectory.is_reveal), trajectory.decoder["canvas_steps"]
        first: dict[int, int] = {}
        for own in np.split(chosen, np.flatnonzero(np.diff(trajectory.step[chosen])) + 1):
            step, block = int(trajectory.step[own[0]]), int(trajectory.block_of(trajectory.position[own[0]]))
            end = trajectory.block_origin + (block + 1) * trajectory.block_length
            documents.append(canvas_document(trajectory.canvas_at(step)[:end]))
            reads.append(Reads(index, trajectory.position[own], trajectory.token[own], step, trajectory.logprob[own]))
            depth.append(step - first.setdefault(block, step))
            sampler = trajectory.sampler
            falls = sampler["temperature"], sampler.get("final_temperature")
            heat.append(step_temperature(depth[-1], torch.tensor(most), *falls))
    rows = vars(assemble(documents, reads, trajectories)) | {"temperature": 1.0}
    return CanvasRows(**rows, depth=torch.tensor(depth), heat=torch.stack(heat))


def random_canvas_rows(
    sequences: Sequence[np.ndarray],
    prompt_lengths: Sequence[int],
    answer_lengths: Sequence[int],
    canvas_length: int,
    noise_tokens: np.ndarray,
    rng: np.random.Generator,
    part: slice = slice(None),
) -> tuple[CanvasRows, torch.Tensor]:
    """Noised answers for supervised training, as in TRL's `examples/scripts/sft_diffusion_gemma.py`.

    One canvas of every answer is drawn, noised at a stratified level and predicted behind the clean text before it.
    With probability 1/2 the prediction is conditioned on a first one without gradient. The loss is the mean
    cross-entropy of all tokens of the canvas. Departs: no autoregressive loss of the encoder beside it.

    Args:
        sequences: int64 [L_i], prompt and answer, filled up to whole canvases with end tokens.
        answer_lengths: tokens of the answers without the filling but one end token.
        part: the sequences to return; noise is drawn for all of them.

    Returns:
        rows whose decisions are the clean tokens, and the weights float64 [N]; they sum to canvases of `part` times
        tokens of a canvas.
    """
    count, size = len(sequences), canvas_length
    level = (1.0 - stratified(count, rng)).clip(min=LOWEST)
    lost, drawn = rng.random((count, size)) >= level[:, None], rng.choice(noise_tokens, (count, size))
    which, twice = rng.random(count), rng.random(count) < 0.5
    documents, reads, depth = [], [], []
    for index, i in enumerate(range(count)[part]):
        begin = prompt_lengths[i] + int(which[i] * -(-answer_lengths[i] // size)) * size
        noisy, column = sequences[i][: begin + size].copy(), np.arange(begin, begin + size)
        noisy[column] = np.where(lost[i], drawn[i], noisy[column])
        for again in range(1 + int(twice[i])):
            nothing = np.zeros(0, dtype=np.int64)
            here = column if again == int(twice[i]) else nothing
            documents.append(canvas_document(noisy))
            reads.append(Reads(index, here, sequences[i][here], 0))
            depth.append(again)
    laid_out = assemble(documents, reads)
    heat = torch.ones(len(depth), dtype=torch.float64)
    rows = CanvasRows(**vars(laid_out), depth=torch.tensor(depth), heat=heat)
    return rows, torch.ones(len(rows.target), dtype=torch.float64)
