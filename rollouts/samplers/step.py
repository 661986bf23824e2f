"""One denoising decision as a pure function: what a replay needs to reproduce a rollout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from rollouts.constraints.reach import Reach
from rollouts.samplers import noise
from rollouts.samplers.distribution import draw, sampling_logprobs
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.parts import consistent_positions, perturbed, position_scores, ramp, select_positions, times
from rollouts.samplers.revisers import remask_least_confident, remdm_chances, running_confidence


@dataclass
class StepState:
    """What a decoder knows before a step.

    Attributes:
        canvas: int64 [B, L].
        candidates: bool [B, L], positions whose token is drawn (logits are needed there): masks, and what token
            editing may replace.
        eligible: bool [B, L], masked candidates that may be revealed now (inside the current block).
        quota: int64 [B], positions the schedule reveals at this step.
        seed: int64 [B], per request, or [B, L], per position (a search redraws some positions and keeps others).
        step: int64 [B], denoising steps each request has taken.
        num_steps, block_step: int64 [B], steps of the block and how many were taken, for what depends on time.
        filled: bool [B, L], tokens that a reviser may take back; never a prompt's. None without a reviser.
        running: float64 [B, L], running confidences for reviser rcr, for arpc those that its reading gives, for
            selector consistent the tokens that the step before remembered.
        places: int64 [N] each, row and position of the candidates in row-major order, where they are known.
        bound: float64 [B, 1], the selector's bound of each row, in place of the options'.
    """

    canvas: torch.Tensor
    candidates: torch.Tensor
    eligible: torch.Tensor
    quota: torch.Tensor
    seed: torch.Tensor
    step: torch.Tensor
    num_steps: torch.Tensor | None = None
    block_step: torch.Tensor | None = None
    filled: torch.Tensor | None = None
    running: torch.Tensor | None = None
    places: tuple[torch.Tensor, torch.Tensor] | None = None
    bound: torch.Tensor | None = None

    def where(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and position [N] of the candidates, in row-major order."""
        return places_of(self.candidates) if self.places is None else self.places


def places_of(mask: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and position of what is true in bool [B, L]. Who knows how many there are does not wait for the device."""
    if count is None:
        row, position = mask.nonzero(as_tuple=True)
    else:
        row, position = mask.nonzero_static(size=count).unbind(1)
    return row, position


@dataclass
class StepResult:
    """What a decoder decided. N counts the candidates, in row-major order.

    Attributes:
        row, position: int64 [N], where each candidate stands.
        token: int64 [N], the draw.
        logprob: float64 [N], under the sampling distribution (0 for greedy).
        confidence: float64 [N], probability of the token under the score distribution.
        reveal: bool [N], the candidates that are committed: masks that take their token, and tokens that
            another one replaces.
        remask: bool [B, L], tokens that become masks; None without a reviser that does so.
        running: float64 [B, L], what `StepState.running` is for the next step; None when there is none.
        allowed: bool [N, C], under a constraint the classes of tokens that each token was drawn among.
        is_noise: bool [N], committed tokens that are random and no decision; None where there are none.
    """

    row: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    logprob: torch.Tensor
    confidence: torch.Tensor
    reveal: torch.Tensor
    remask: torch.Tensor | None = None
    running: torch.Tensor | None = None
    allowed: torch.Tensor | None = None
    is_noise: torch.Tensor | None = None


def denoise_step(
    state: StepState,
    logits: torch.Tensor,
    options: SamplerOptions,
    proposal: torch.Tensor | None = None,
    eos_token_id: int | None = None,
    reach: Reach | None = None,
) -> StepResult:
    """Draw a token for every candidate, choose which to reveal and which tokens to take back.

    Under a constraint, the tokens that are revealed together are drawn again from left to right, each among those that
    the ones before it leave possible. With one and the same random number a token changes only where that set does.

    Args:
        state: see `StepState`.
        logits: [N, V] at the candidates, in row-major order of `state.candidates`.
        options: the decoder's parts.
        proposal: [N, V] log-probs to draw from instead (guidance). Log-probs, confidences and the scores that
            rank positions stay those of the sampling distribution.
        eos_token_id: whose score `eos_confidence` lowers.
        reach: what a constraint allows on the canvas; disallowed tokens are out before temperature and filters.
    """
    if options.window is not None:
        state = replace(state, eligible=state.eligible & (state.eligible.long().cumsum(-1) <= options.window))
    row, position = state.where()
    seed = state.seed[row] if state.seed.dim() == 1 else state.seed[row, position]
    step = state.step[row]
    u = None if options.temperature == 0 else noise.uniform(seed, step, position, noise.TOKEN_STREAM)
    allowed = None if reach is None else reach.allowed(row, position)
    token, logprob, confidence, scored = _drawn(_within(logits, reach, allowed), options, u, proposal)
    random = noise.uniform(seed, step, position, noise.ORDER_STREAM) if options.random_order else None
    score = position_scores(options.score, scored, token, random)
    if options.eos_confidence < 1:
        assert eos_token_id is not None and state.num_steps is not None and state.block_step is not None
        lowered = score * ramp(options.eos_confidence, state.num_steps, state.block_step)[row]
        score = torch.where(token == eos_token_id, lowered, score)
    if options.order_temperature:
        assert random is not None
        score = perturbed(score, options.order_temperature, random)
    scores = torch.zeros(state.canvas.shape, dtype=torch.float64, device=logits.device)
    scores[row, position] = score
    result = StepResult(row, position, token, logprob, confidence, torch.empty(0), allowed=allowed)
    if options.reviser == "rcr":
        assert state.running is not None and state.filled is not None
        result.running = running_confidence(options.running_confidence, state.running, scores, state.eligible)
        chosen, result.remask = remask_least_confident(result.running, state.eligible, state.filled, state.quota)
    elif options.reviser == "arpc":
        assert state.running is not None and state.filled is not None
        chosen, result.remask = remask_least_confident(state.running, state.eligible, state.filled, state.quota)
    elif options.selector == "consistent":
        assert state.running is not None
        likely = torch.zeros_like(scores)
        likely[row, position] = scored.argmax(-1).double()
        given = (scores, state.eligible, state.quota, likely, state.running, options.memory)
        chosen, result.running = consistent_positions(*given)
    elif options.selector == "bernoulli":
        chosen = _bernoulli(state, result, random, options)
    else:
        bounds = {
            "factor": options.factor,
            "entropy_bound": options.entropy_bound,
            "entropy_sum": options.entropy_bound,
        }
        bound = bounds.get(options.selector, options.threshold) if state.bound is None else state.bound
        chosen = select_positions(options.selector, scores, state.eligible, state.quota, bound)
    result.reveal = chosen[row, position]
    if options.reviser == "edit":
        assert state.filled is not None
        other = token != state.canvas[row, position]
        result.reveal = result.reveal | (state.filled[row, position] & other & (confidence > options.edit_threshold))
    if reach is not None:
        _commit(result, logits, options, u, reach)
    return result


def _within(logits: torch.Tensor, reach: Reach | None, allowed: torch.Tensor | None) -> torch.Tensor:
    """The logits [N, V], -inf where a constraint does not allow the token."""
    if reach is None or allowed is None:
        return logits
    return logits.masked_fill(~reach.constraint.tokens(allowed, logits.shape[-1]), -torch.inf)


def _drawn(
    logits: torch.Tensor, options: SamplerOptions, u: torch.Tensor | None, proposal: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token, log-prob and confidence [N] as in `StepResult`, and the distribution [N, V] that scores are read from.

    Args:
        u: [N], random numbers; None draws the most likely tokens.
    """
    if u is None:
        sampling = None
        token = logits.argmax(-1)
        logprob = torch.zeros(len(token), dtype=torch.float64, device=logits.device)
    else:
        sampling = sampling_logprobs(logits, options.temperature, options.top_p, options.top_k)
        source = sampling if proposal is None else proposal
        token = draw(source, u)
        logprob = sampling.gather(-1, token[:, None]).squeeze(-1).double()
    untouched = options.temperature == 1.0 and options.top_p >= 1.0 and options.top_k == 0
    if options.score_from == "model" and not (untouched and sampling is not None):
        sampling = torch.log_softmax(logits, dim=-1)
    elif sampling is None:
        sampling = sampling_logprobs(logits, 1.0, options.top_p, options.top_k)
    return token, logprob, sampling.gather(-1, token[:, None]).squeeze(-1).double().exp(), sampling


def _commit(
    result: StepResult, logits: torch.Tensor, options: SamplerOptions, u: torch.Tensor | None, reach: Reach
) -> None:
    """Draw what is revealed again where a row reveals several tokens; see `denoise_step`."""
    kept = result.reveal.nonzero().squeeze(1)
    row, position = torch.stack([result.row[kept], result.position[kept]]).cpu().numpy()
    _, own, count = np.unique(row, return_inverse=True, return_counts=True)
    together = np.flatnonzero(count[own] > 1)
    if not len(together):
        return
    kept = kept[torch.from_numpy(together).to(kept.device)]
    assert result.allowed is not None
    for now, allowed, taken in reach.walk(row[together], position[together]):
        at = kept[torch.from_numpy(now).to(kept.device)]
        token, logprob, confidence, _ = _drawn(
            _within(logits[at], reach, allowed), options, None if u is None else u[at]
        )
        result.token[at], result.logprob[at], result.confidence[at] = token, logprob, confidence
        result.allowed[at] = allowed
        taken.copy_(reach.constraint.classes[token])


def _bernoulli(
    state: StepState, result: StepResult, random: torch.Tensor | None, options: SamplerOptions
) -> torch.Tensor:
    """bool [B, L]: each mask on its own with Dream's probability 1 - s/t, or ReMDM's; sets `result.remask`."""
    assert random is not None and state.num_steps is not None and state.block_step is not None
    if options.reviser == "remdm":
        assert state.filled is not None
        chance, sigma = remdm_chances(options.remdm_cap, state.num_steps, state.block_step)
        index = torch.arange(state.canvas.shape[1], device=random.device)
        seed = state.seed[:, None] if state.seed.dim() == 1 else state.seed
        u = noise.uniform(seed, state.step[:, None], index, noise.REVISE_STREAM)
        result.remask = state.filled & (u < sigma[:, None])
    else:
        t, s = times(state.num_steps, state.block_step)
        chance = 1 - s / t
    chosen = torch.zeros_like(state.eligible)
    chosen[result.row, result.position] = random < chance[result.row]
    return chosen & state.eligible
