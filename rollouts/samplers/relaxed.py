"""Gumbel-softmax sampling of a masked-diffusion model: a sample that a gradient flows through.

DRAKES (Wang et al. 2024, arXiv 2410.13643). Time runs on an even grid from 1 to 0; in a step from t to s every
masked position is revealed with probability (t - s) / t, its token drawn from the model (MDLM's ancestral sampler).
The first T - K steps draw hard tokens. In the last K the state is a mixture: with q = (p (t - s), s) over tokens and
mask, y = softmax((log q + Gumbel noise) / temperature), and the undecided mass m of a position is spread by y. The
result is one-hot forward and soft backward (straight-through at the end only).

The KL along the path is the discrete-time one between the two samplers, exact for every T:

    KL = sum over steps of (t - s) / t * sum over masked positions of KL(p_theta || p_pre)

since both reveal with the same probability. A soft state counts with its mask mass.

The rollout comes in *segments*. A hard state carries no gradient, so the graph of each hard step ends in it, and a
caller that back-propagates a segment before it asks for the next holds one step's graph at a time: memory does not
grow with T. The last segment is the K relaxed steps; `checkpoint` keeps their states only.

Departures from the published code, each an option: its KL term weights by the mass already revealed and lacks the
step size (`kl_weight="released"`, exactly 0 on hard states), and its soft states keep (1 - m) m of a mask
mass m beside what y leaves (`carry_over="released"`). Here m becomes m * y[mask].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from rollouts.samplers import noise
from rollouts.samplers.distribution import draw
from rollouts.samplers.relaxed_options import RelaxedOptions

# Tokens of the free positions, hard int64 [N] or soft [N, V] -> log p of the token at each of them, [N, V].
Denoiser = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class FreePositions:
    """The N positions to fill of B canvases, flat and in row-major order.

    Attributes:
        row, position: int64 [N].
        seed: int64 [B], one per rollout; a draw depends on it, the step and the position only.
        mask_token_id: the token every free position begins with.
        vocab_size: V, the mask among them.
    """

    row: torch.Tensor
    position: torch.Tensor
    seed: torch.Tensor
    mask_token_id: int
    vocab_size: int


@dataclass
class Segment:
    """A part of a rollout whose graph stands alone.

    Attributes:
        kl: [B], this part's share of the path KL, with gradient (0 without a reference).
        one_hot: [N, V], the finished sample in the last segment, with gradient; else None.
        token: int64 [N], the tokens after this part.
        mask_mass: [B], mean undecided mass of the free positions, no gradient.
        forwards: of policy and reference together; those a checkpoint repeats in the backward pass are among them.
    """

    kl: torch.Tensor
    one_hot: torch.Tensor | None
    token: torch.Tensor
    mask_mass: torch.Tensor
    forwards: int


def relaxed_rollout(
    policy: Denoiser,
    reference: Denoiser | None,
    free: FreePositions,
    num_inference_steps: int,
    options: RelaxedOptions,
) -> Iterator[Segment]:
    """Sample B canvases, the last `options.relaxed_steps` steps with gradient.

    Every step runs the policy once, and the reference once: what it samples from is what its KL is made of. Without
    a reference the hard steps keep no graph and are one segment with the relaxed ones.

    Args:
        policy: log-probs under the weights to train; parameters take gradient through it.
        reference: log-probs of the frozen pretrained model; gradient passes to soft inputs only.
        num_inference_steps: T.

    Raises:
        ValueError: more relaxed steps than steps.
    """
    num_hard = num_inference_steps - options.relaxed_steps
    if num_hard < 0:
        raise ValueError(
            f"algorithm.relaxed_steps ({options.relaxed_steps}) must not exceed the {num_inference_steps} steps of "
            "sampler.num_inference_steps"
        )
    token = torch.full_like(free.row, free.mask_token_id)
    for index in range(num_hard):
        with torch.set_grad_enabled(reference is not None and torch.is_grad_enabled()):
            logp = policy(token)
        if reference is not None:
            with torch.no_grad():
                ref = reference(token)
        times = _times(index, num_inference_steps)
        after = _hard_step(free, token, logp.detach(), index, times)
        if reference is not None:
            kl = _kl(free, _one_hot(free, token, logp.dtype), logp, ref, times, options)
            yield Segment(kl, None, after, _mask_mass(free, (after == free.mask_token_id).to(logp.dtype)), forwards=2)
        token = after

    def step(index: int, x: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """One relaxed step: the state after it, and its KL [B]. The first state is hard, and x is None."""
        inputs = token if x is None else x
        logp = policy(inputs)
        x = _one_hot(free, token, logp.dtype) if x is None else x
        times = _times(index, num_inference_steps)
        kl = torch.zeros(len(free.seed), dtype=logp.dtype, device=logp.device)
        if reference is not None:
            kl = _kl(free, x, logp, reference(inputs), times, options)
        return _relaxed_step(free, x, logp, index, times, options, _temperature(index - num_hard, options)), kl

    x, parts = None, []
    recompute = options.checkpoint and torch.is_grad_enabled()
    for index in range(num_hard, num_inference_steps):
        if recompute:
            x, kl = checkpoint(step, index, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x, kl = step(index, x)
        parts.append(kl)
    assert x is not None
    mass = _mask_mass(free, x[:, free.mask_token_id].detach())
    # The mask mass is 0 after the last step under the exact carry-over; the released one leaves some.
    soft = x.index_fill(1, torch.tensor([free.mask_token_id], device=x.device), 0.0)
    # Not `token`: a checkpointed step that is run again still begins from that one.
    final = soft.argmax(-1)
    one_hot = _one_hot(free, final, soft.dtype) + soft - soft.detach() if options.straight_through else soft
    runs = (1 if reference is None else 2) * (2 if recompute else 1)
    forwards = runs * options.relaxed_steps + (num_hard if reference is None else 0)
    yield Segment(torch.stack(parts).sum(0), one_hot, final, mass, forwards)


def _times(index: int, num_steps: int) -> tuple[float, float]:
    """(t, s) of a step: the time before it and after it."""
    return 1.0 - index / num_steps, 1.0 - (index + 1) / num_steps


def _temperature(relaxed_index: int, options: RelaxedOptions) -> float:
    """Constant, or geometric from the first relaxed step to the last."""
    if options.final_temperature is None or options.relaxed_steps == 1:
        return options.temperature
    share = relaxed_index / (options.relaxed_steps - 1)
    return options.temperature ** (1 - share) * options.final_temperature**share


def _one_hot(free: FreePositions, token: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.nn.functional.one_hot(token, free.vocab_size).to(dtype)


def _hard_step(
    free: FreePositions, token: torch.Tensor, logp: torch.Tensor, index: int, times: tuple[float, float]
) -> torch.Tensor:
    t, s = times
    seed, step = free.seed[free.row], torch.full_like(free.row, index)
    reveal = noise.uniform(seed, step, free.position, noise.ORDER_STREAM) < (t - s) / t
    drawn = draw(logp, noise.uniform(seed, step, free.position, noise.TOKEN_STREAM))
    return torch.where(reveal & (token == free.mask_token_id), drawn, token)


def _relaxed_step(
    free: FreePositions,
    x: torch.Tensor,
    logp: torch.Tensor,
    index: int,
    times: tuple[float, float],
    options: RelaxedOptions,
    temperature: float,
) -> torch.Tensor:
    """[N, V]: the mixture after a step."""
    t, s = times
    mask = free.mask_token_id
    # log q up to a constant: tokens are revealed with share (t - s), the position stays masked with share s.
    logq = logp + torch.tensor((t - s) / t, dtype=logp.dtype).log()
    stay = torch.full_like(logq[:, :1], s / t).log()
    logq = torch.cat([logq[:, :mask], stay, logq[:, mask + 1 :]], dim=1)
    entry = torch.arange(free.vocab_size, device=x.device)
    counter = free.position[:, None] * free.vocab_size + entry
    step = torch.full_like(free.row, index)[:, None]
    u = noise.uniform(free.seed[free.row][:, None], step, counter, noise.GUMBEL_STREAM)
    gumbel = -(-u.log()).log()
    y = ((logq + gumbel.to(logq.dtype)) / temperature).softmax(-1)
    mass = x[:, mask, None]
    if options.carry_over == "released":
        return (1 - mass) * x + mass * y
    kept = x.index_fill(1, torch.tensor([mask], device=x.device), 0.0)
    return kept + mass * y


def _kl(
    free: FreePositions,
    x: torch.Tensor,
    logp: torch.Tensor,
    ref: torch.Tensor,
    times: tuple[float, float],
    options: RelaxedOptions,
) -> torch.Tensor:
    """[B]: the KL term of one step at the state x before it."""
    t, s = times
    mass = x[:, free.mask_token_id]
    p = logp.exp()
    # A token that neither can choose (the mask) adds 0, not 0 times infinity.
    ratio = torch.where(p > 0, logp - ref, torch.zeros_like(logp))
    if options.kl_weight == "path":
        per_position = mass * (p * ratio).sum(-1) * (t - s) / t
    else:
        # Positions whose largest entry is a token are deterministic in both models there, so their bracket is 0.
        undecided = (x.argmax(-1) == free.mask_token_id).to(x.dtype)
        bracket = ref.exp() - p + p * ratio
        per_position = undecided * (1 - mass) * (x * bracket).sum(-1) / t
    return torch.zeros(len(free.seed), dtype=logp.dtype, device=x.device).index_add(0, free.row, per_position)


def _mask_mass(free: FreePositions, mass: torch.Tensor) -> torch.Tensor:
    zeros = torch.zeros(len(free.seed), dtype=mass.dtype, device=mass.device)
    return zeros.index_add(0, free.row, mass) / torch.bincount(free.row, minlength=len(free.seed)).clamp(min=1)
