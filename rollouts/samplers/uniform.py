"""Uniform-state diffusion: noise replaces a token by a random one, and every step may replace any token again.

Noise at signal level a keeps a token with probability a and else draws one of the n tokens that the model may predict
(uniform transitions of D3PM, Austin et al. 2021, arXiv 2107.03006). Levels are linear in time: a rollout of T steps is
at level k / T before step k. A step from level a to level b > a replaces a token x by y with probability

    p(y | x) = q(x | y) (b f(y) + (1 - b) / n) / Z,    q(x | y) = (a / b) 1[x = y] + (1 - a / b) / n

where f is the model's distribution over clean tokens. This is the posterior of UDLM (Schiff et al. 2024, arXiv
2412.10193) and Duo (`_compute_posterior` in the code of Sahoo et al. 2025, arXiv 2506.10892) with f in the place of
the clean token.

It makes f a leave-one-out prediction: what the other tokens say about this one, whatever stands there now. The usual
denoising prediction, which knows x too, is p(y | x) for b = 1, the level without noise. D3PM's sum over clean tokens,
drawn from that denoising prediction, is the same p for every b (`tests/test_uniform.py`).

A corrector goes over what a step has drawn (predictor-corrector of Gourevitch et al. 2026, arXiv 2605.22765, by its
code `src/correctors/gibbs_corrector.py`, selection "random"): with one forward more, some positions get a token from
their law given all others at level b, b f(y) + (1 - b) / n. That is the law above for a = 0, so a Gibbs step is a
transition that has forgotten x. Where f is right, redrawing one position changes no law of the canvas at level b.

`transition: euler` takes, in the place of the posterior, an Euler step of the flow that goes from noise to data along
the mixture path (`MixtureDiscreteEulerSolver` of the flow_matching library). A clean token is drawn from the denoising
prediction d, and the position jumps to it at the rate 1 / (1 - a): in a step from a to b with probability 1 - s, where
s = exp(-(b - a) / (1 - a)), and in the last step surely. So its law is p(y | x) = (1 - s) d(y | x) + s 1[x = y].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from rollouts.samplers import noise
from rollouts.samplers.distribution import can_be_predicted, draw, exclude_, sampling_logprobs
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.step import StepResult, StepState, denoise_step

# In the place of log 0, which has no gradient.
_LOG_ZERO = -1e9


def noise_tokens(model: Any) -> torch.Tensor:
    """int64 [n]: what noise draws from, the tokens that a `DenoisingModel` may predict."""
    reach = exclude_(torch.zeros(model.vocab_size), model.mask_token_id, getattr(model, "excluded_token_ids", ()))
    return can_be_predicted(reach).nonzero().flatten()


class StepLaw(NamedTuple):
    """What the tokens of a step are drawn from, float64 [N] each (`transition_logprobs`).

    Attributes:
        before, after: the signal levels a and b of the transition.
        stay: probability with which a token stays undrawn; None for 0.
    """

    before: torch.Tensor
    after: torch.Tensor
    stay: torch.Tensor | None = None


def step_law(step: torch.Tensor, num_steps: torch.Tensor, corrected: bool = False, euler: bool = False) -> StepLaw:
    """The law of a step. Example: step 1 of 4 goes from 0.25 to 0.5.

    Args:
        step: 0 to `num_steps` - 1, the forwards of a rollout.
        corrected: every second forward is the corrector's, which goes from 0 to the level that is reached. Example:
            five forwards are steps to 1/3, 2/3 and 1, and forward 1 corrects at 1/3.
        euler: tokens jump to level 1. Example: in step 1 of 4 each stays with probability exp(-1/3) without a draw.
    """
    corrects, done, count = torch.zeros_like(step, dtype=torch.bool), step, num_steps
    if corrected:
        corrects, done, count = step % 2 == 1, step // 2, (num_steps + 1) // 2
    before, after = torch.where(corrects, 0.0, done.double() / count), (done + 1).double() / count
    if not euler:
        return StepLaw(before, after)
    stay = torch.where(corrects | (done + 1 == count), 0.0, (-1 / (count - done).double()).exp())
    return StepLaw(before, torch.where(corrects, after, 1.0), stay)


def corrected_positions(
    row: torch.Tensor, position: torch.Tensor, seed: torch.Tensor, step: torch.Tensor, count: int
) -> torch.Tensor:
    """bool [N]: the positions that a corrector redraws, `count` of every row (all, where it has fewer), at random.

    Args:
        row, position: int64 [N], ordered by row; seed, step: int64 [N], of the row.
    """
    order = (row + noise.uniform(seed, step, position, noise.ORDER_STREAM)).argsort()
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    return torch.zeros_like(row, dtype=torch.bool).index_put((order,), rank < count)


def step_temperature(
    step: int | torch.Tensor, num_steps: torch.Tensor, first: float, final: float | None
) -> torch.Tensor:
    """float64 [B]: temperature of a step, final + (first - final) (T - step) / T as in DiffusionGemma's generation.

    Example: 0.8 and 0.4 in 4 steps give 0.8, 0.7, 0.6 and 0.5; the final one would come after the last step. Greedy
    decoding (0) is read as a millionth, at which a softmax is all on its maximum.

    Args:
        step: 0 to T - 1; num_steps: int64 [B], T.
        final: None keeps the first.
    """
    left = (num_steps - step).double() / num_steps
    final = first if final is None else final
    return (final + (first - final) * left).clamp(min=1e-6)


def transition_logprobs(
    logits: torch.Tensor,
    token: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    target: torch.Tensor | None = None,
    stay: torch.Tensor | None = None,
) -> torch.Tensor:
    """log p(y | x) of every token y; temperature and filters act on f.

    Args:
        logits: [N, V], log f up to a constant. Tokens out of reach in them (`exclude_`) are out of the noise's too.
        token: int64 [N], x.
        before, after: [N], the signal levels a and b.
        temperature: 0 gives all of f to the most likely token.
        target: int64 [N], what a learner scores: stays in the support of f at level 1, whatever the filters say. At
            lower levels noise reaches every token.
        stay: [N], probability that x stays and nothing is drawn, None for 0.

    Returns:
        [N, V], in the dtype of the logits; very low and not -inf outside the support.
    """
    before, after = (level.to(logits.dtype)[:, None] for level in (before, after))
    best = logits.argmax(-1)
    if temperature == 0:
        clean = torch.full_like(logits, _LOG_ZERO).scatter(-1, best[:, None], 0.0)
    else:
        reached = after[:, 0] < 1 if stay is None else (after[:, 0] < 1) | ((stay > 0) & (target == token))
        keep = None if target is None else torch.where(reached, best, target)
        clean = sampling_logprobs(logits, temperature, top_p, top_k, keep).clamp(min=_LOG_ZERO)
    allowed, kept = can_be_predicted(logits), before / after
    favour = (kept / (1 - kept) * allowed.sum(-1, keepdim=True)).log1p()
    law = torch.log_softmax(noised_logprobs(clean, allowed, after).scatter_add(-1, token[:, None], favour), dim=-1)
    if stay is None:
        return law
    stay = stay.to(logits.dtype)[:, None]
    stays = torch.full_like(law, _LOG_ZERO).scatter(-1, token[:, None], stay.log().clamp(min=_LOG_ZERO))
    return torch.logaddexp(law + (-stay).log1p(), stays)


def noised_logprobs(clean: torch.Tensor, allowed: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """[N, V]: log(b f(y) + (1 - b) / n), clean tokens with noise.

    Args:
        clean: [N, V], log f.
        allowed: bool [N, V], the n tokens of the noise.
        level: [N, 1], b.
    """
    random = torch.where(allowed & (level < 1), ((1 - level) / allowed.sum(-1, keepdim=True)).log(), _LOG_ZERO)
    return torch.logaddexp(level.log() + clean, random)


def random_tokens(model: Any, seed: torch.Tensor, step: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """int64 [N]: noise for N positions, those of a step that begins with it (0 before the first)."""
    tokens = noise_tokens(model).to(seed.device)
    return tokens[(noise.uniform(seed, step, position, noise.START_STREAM) * len(tokens)).long()]


def entropy_bound_step(
    logits: torch.Tensor,
    canvas: torch.Tensor,
    free: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    last: torch.Tensor,
    options: SamplerOptions,
    model: Any,
) -> StepResult:
    """DiffusionGemma's step: tokens of low entropy are drawn, all others become noise again (`EntropyBoundSampler`).

    So it is in transformers' `generation_diffusion_gemma.py`. As many positions take a draw from f as the entropy bound
    (Ben-Hamu et al. 2025, arXiv 2505.24857) allows, whatever stands there. At the last step all of them do; there
    transformers gives the most likely tokens, as `last_step` argmax does.

    Args:
        logits: [N, V], at the free positions.
        canvas: int64 [B, L]; free: bool [B, L], the response.
        seed, step: int64 [B]; last: bool [B], whether this step is a row's last.
        model: says what noise draws from.
    """
    result = denoise_step(StepState(canvas, free, free, torch.ones_like(step), seed, step), logits, options)
    last = last[result.row]
    if options.last_step == "argmax":
        result.token = torch.where(last, logits.argmax(-1), result.token)
        result.logprob = result.logprob.masked_fill(last, 0)
    result.is_noise = ~result.reveal & ~last
    random = random_tokens(model, seed[result.row], step[result.row] + 1, result.position)
    result.token = torch.where(result.is_noise, random, result.token)
    result.logprob, result.confidence = (x.masked_fill(result.is_noise, 0) for x in (result.logprob, result.confidence))
    result.reveal = torch.ones_like(last)
    return result


def ancestral_step(
    logits: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    token: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    num_steps: torch.Tensor,
    options: SamplerOptions,
) -> StepResult:
    """Draw the next token of N positions; each is a decision, whether the token changes or not.

    Args:
        logits: [N, V].
        row, position, token, seed, step, num_steps: int64 [N]; where it stands, what stands there, its request's
            (`step_law`).
    """
    before, after, stay = step_law(step, num_steps, options.corrector > 0, options.transition == "euler")
    filters = (options.temperature, options.top_p, options.top_k)
    law = transition_logprobs(logits, token, before, after, *filters, stay=stay)
    drawn = draw(law, noise.uniform(seed, step, position, noise.TOKEN_STREAM))
    logprob, confidence = (x.gather(-1, drawn[:, None])[:, 0].double() for x in (law, torch.log_softmax(logits, -1)))
    return StepResult(row, position, drawn, logprob, confidence.exp(), torch.ones_like(row, dtype=torch.bool))
