"""Decisions under uniform noise: rows of recorded steps, and of answers that were noised for supervised training.

With signal level a drawn uniformly from (0, 1) and a noised answer, the decision at every position of the answer is the
clean token given the noised one: the transition from level a to level 1 (`rollouts/samplers/uniform.py`). Its
cross-entropy is one objective. The other is the bound of UDLM (Schiff et al. 2024, arXiv 2412.10193; `nll_per_token` of
the class DUO_BASE in Duo's code has it in another form). Both have their optimum in the same prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rl.estimators.base import Scores
from rl.estimators.documents import Reads, canvas_document
from rl.estimators.masking import stratified
from rl.estimators.rows import TokenRows, assemble
from rollouts.model_protocol import DenoisingModel
from rollouts.samplers.distribution import can_be_predicted
from rollouts.samplers.uniform import noise_tokens, noised_logprobs, transition_logprobs
from rollouts.trajectory import TokenTrajectory

# Lowest signal level: at 0 the bound is 0 / 0.
LOWEST = 1e-3


@dataclass(kw_only=True)
class ReplacedRows(TokenRows):
    """A decision replaces the token that stands at its place, maybe by itself.

    Attributes:
        before, after, stay: float64 [N], the law of that step (`rollouts.samplers.uniform.StepLaw`).
    """

    before: torch.Tensor
    after: torch.Tensor
    stay: torch.Tensor | None = None

    @property
    def token(self) -> torch.Tensor:
        """int64 [N]: the tokens that are replaced."""
        return self.input_ids[self.row, self.column]

    def drawn(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        filters = (self.temperature, self.top_p, self.top_k)
        law = transition_logprobs(logits, self.token, self.before, self.after, *filters, self.target, self.stay)
        # Not entr(p): its gradient is infinite where p underflows.
        return law.gather(-1, self.target[:, None]).squeeze(-1), -(law.exp() * law).sum(-1)


@dataclass(kw_only=True)
class NoisedRows(ReplacedRows):
    """Decisions are clean tokens. With `bound`, their scores also carry the bound's part at each, as `kl`."""

    bound: bool = False

    def score(self, model: DenoisingModel, hidden: torch.Tensor | None = None) -> Scores:
        logits = self.logits(model, hidden)
        kl = rate_divergence(logits, self.token, self.target, self.before) if self.bound else None
        return Scores(*self.drawn(logits), kl=kl)


def rate_divergence(
    logits: torch.Tensor, token: torch.Tensor, clean: torch.Tensor, level: torch.Tensor
) -> torch.Tensor:
    """[N]: the integrand of the bound on -log p(answer), whose integral runs over the levels from 0 to 1.

    With r(y) = a f(y) + (1 - a) / n and x the noised token, the reverse process goes from x to y at the rate
    r(y) / (n a r(x)). The integrand is the divergence sum of R log(R / R') - R + R' between the rates R given the clean
    token (f is 1 there) and the model's R'.

    Args:
        logits: [N, V], log f up to a constant.
        token, clean: int64 [N], the noised and the clean tokens.
        level: [N], a.
    """
    level, allowed = level.to(logits.dtype)[:, None], can_be_predicted(logits)
    known = torch.full_like(logits, -1e9).scatter(-1, clean[:, None], 0.0)
    truth, model = (
        noised - noised.gather(-1, token[:, None])
        for noised in (noised_logprobs(f, allowed, level) for f in (known, torch.log_softmax(logits, dim=-1)))
    )
    terms = truth.exp() * (truth - model) - truth.exp() + model.exp()
    return (terms * allowed).sum(-1) / (level[:, 0] * allowed.sum(-1))


def noised_answer_rows(
    trajectories: Sequence[TokenTrajectory],
    model: DenoisingModel,
    levels: Callable[[TokenTrajectory, np.random.Generator], np.ndarray],
    iteration: int = 0,
) -> ReplacedRows:
    """Finished answers, noised again: every clean token is a decision, given a noised canvas (UDM-GRPO).

    Its log-prob is that of the denoising prediction, the transition to level 1. Noise is a function of a trajectory's
    seed and of `iteration`.

    Args:
        levels: signal levels float64 [K] of a trajectory's noised copies.
        iteration: pass over the rollouts; each draws anew.
    """
    tokens, documents, reads, before = noise_tokens(model).numpy(), [], [], []
    for index, trajectory in enumerate(trajectories):
        final, rng = trajectory.final_canvas(), np.random.default_rng([trajectory.seed, iteration])
        column = np.arange(trajectory.prompt_length, trajectory.length)
        for step, level in enumerate(levels(trajectory, rng)):
            noisy, lost = final.copy(), rng.random(len(column)) >= level
            noisy[column] = np.where(lost, rng.choice(tokens, len(column)), final[column])
            documents.append(canvas_document(noisy))
            reads.append(Reads(index, column, final[column], step))
            before.append(np.full(len(column), level))
    rows = assemble(documents, reads, trajectories, logit_shift=model.logit_shift)
    level_of = torch.from_numpy(np.concatenate(before))
    return ReplacedRows(**vars(rows), before=level_of, after=torch.ones_like(level_of))


def random_noise_rows(
    sequences: Sequence[np.ndarray],
    prompt_lengths: Sequence[int],
    noise_tokens: np.ndarray,
    rng: np.random.Generator,
    logit_shift: int = 0,
    part: slice = slice(None),
    bound: bool = True,
) -> tuple[NoisedRows, torch.Tensor]:
    """Noise the answers at stratified levels, one of each sequence (`rl.estimators.masking.stratified`).

    Args:
        sequences: int64 [L_i], prompt and answer.
        prompt_lengths: tokens that stay as they are.
        noise_tokens: int64 [n], what noise draws from.
        rng: the only source of randomness.
        part: the sequences to return; noise is drawn for all of them.
        bound: see `NoisedRows`.

    Returns:
        rows whose decisions are all tokens of the answers, and their weights float64 [N], which are 1.
    """
    count, width = len(sequences), max(len(sequence) for sequence in sequences)
    level = (1.0 - stratified(count, rng)).clip(min=LOWEST)
    lost = rng.random((count, width)) >= level[:, None]
    drawn = rng.choice(noise_tokens, (count, width))
    documents, reads, levels = [], [], []
    for index, i in enumerate(range(count)[part]):
        sequence, start = sequences[i], prompt_lengths[i]
        noisy, column = sequence.copy(), np.arange(start, len(sequence))
        noisy[column] = np.where(lost[i, column], drawn[i, column], sequence[column])
        documents.append(canvas_document(noisy))
        reads.append(Reads(index, column, sequence[column], 0))
        levels.append(np.full(len(column), level[i]))
    rows = vars(assemble(documents, reads, logit_shift=logit_shift))
    before = torch.from_numpy(np.concatenate(levels))
    rows |= {"before": before, "after": torch.ones_like(before), "bound": bound}
    return NoisedRows(**rows), torch.ones_like(before)
