"""One denoising decision as a pure function: what a replay needs to reproduce a rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollouts.samplers import noise
from rollouts.samplers.distribution import draw, sampling_logprobs
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.parts import position_scores, select_positions


@dataclass
class StepState:
    """What a decoder knows before a step.

    Attributes:
        canvas: int64 [B, L].
        candidates: bool [B, L], masked positions whose token is drawn (logits are needed there).
        eligible: bool [B, L], candidates that may be revealed now (inside the current block).
        quota: int64 [B], positions the schedule reveals at this step.
        seed: int64 [B], per request, or [B, L], per position (a search redraws some positions and keeps others).
        step: int64 [B], denoising steps each request has taken.
    """

    canvas: torch.Tensor
    candidates: torch.Tensor
    eligible: torch.Tensor
    quota: torch.Tensor
    seed: torch.Tensor
    step: torch.Tensor


@dataclass
class StepResult:
    """What a decoder decided. N counts the candidates, in row-major order.

    Attributes:
        row, position: int64 [N], where each candidate stands.
        token: int64 [N], the draw.
        logprob: float64 [N], under the sampling distribution (0 for greedy).
        confidence: float64 [N], probability of the token under the score distribution.
        reveal: bool [N], the candidates that are committed.
    """

    row: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    logprob: torch.Tensor
    confidence: torch.Tensor
    reveal: torch.Tensor


def denoise_step(
    state: StepState, logits: torch.Tensor, options: SamplerOptions, proposal: torch.Tensor | None = None
) -> StepResult:
    """Draw a token for every candidate and choose which to reveal.

    Args:
        state: see `StepState`.
        logits: [N, V] at the candidates, in row-major order of `state.candidates`.
        options: the decoder's parts.
        proposal: [N, V] log-probs to draw from instead (guidance). Log-probs, confidences and the scores that
            rank positions stay those of the sampling distribution.
    """
    row, position = state.candidates.nonzero(as_tuple=True)
    seed = state.seed[row] if state.seed.dim() == 1 else state.seed[row, position]
    step = state.step[row]
    if options.temperature == 0:
        sampling = None
        token = logits.argmax(-1)
        logprob = torch.zeros(len(row), dtype=torch.float64, device=logits.device)
    else:
        sampling = sampling_logprobs(logits, options.temperature, options.top_p, options.top_k)
        source = sampling if proposal is None else proposal
        token = draw(source, noise.uniform(seed, step, position, noise.TOKEN_STREAM))
        logprob = sampling.gather(-1, token[:, None]).squeeze(-1).double()
    untouched = options.temperature == 1.0 and options.top_p >= 1.0 and options.top_k == 0
    if sampling is None or (options.score_from == "model" and not untouched):
        sampling = torch.log_softmax(logits, dim=-1)
    confidence = sampling.gather(-1, token[:, None]).squeeze(-1).double().exp()
    random = None
    if options.score == "random":
        random = noise.uniform(seed, step, position, noise.ORDER_STREAM)
    scores = torch.zeros(state.canvas.shape, dtype=torch.float64, device=logits.device)
    scores[row, position] = position_scores(options.score, sampling, token, random)
    chosen = select_positions(options.selector, scores, state.eligible, state.quota, options.threshold)
    return StepResult(row, position, token, logprob, confidence, chosen[row, position])
