"""An autoregressive model that guides a diffusion decoder: it reads, once a step, what the policy would write.

Two rules (`GuideOptions.rule`), for the masks of the current block:

* `agree` (guided diffusion, Hu et al. 2025, arXiv 2505.21467, and its published code): every mask gets the policy's
  draw, and the guide reads the block from left to right. Drafts are revealed up to the first one that is not among the
  guide's `top` likeliest tokens or has less than `relative` of the likeliest's probability; at least one is. The guide
  never writes: all tokens are the policy's draws, so recorded log-probs are the policy's, and only the order is not a
  function of the state.
* `energy` (EDLM, Xu et al. 2024, arXiv 2410.21357, and a published copy of its code): `candidates` fillings x of all
  masks are drawn from the policy q, and one is taken with probability proportional to
  exp(-E(x) / temperature), E(x) = log q(x) - log p(x), p the guide. With many candidates it is a draw from p given
  what is decided. The decoder then reveals positions of that filling. These are no draws of the policy: such rollouts
  are for evaluation, and no recipe learns from them.

An answer is read up to its first end token; what lies behind it is left to the policy.

Departures: the published `agree` drafts the likeliest tokens, also where text is sampled, and fills what follows an end
token with end tokens; the published code of EDLM can leave decided tokens out of log p. Only the current block is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from rollouts.samplers import noise
from rollouts.samplers.distribution import draw, sampling_logprobs
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.step import StepState
from rollouts.samplers.sub_options import GuideOptions


class Reader(Protocol):
    """Reads answers from left to right: a causal model in this process, or a server's prompt log-probs."""

    def read(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], top: int | None = 0) -> Any:
        """Of each answer's n tokens `logprob` [n], and with a `top` of k `ids`, `logprobs` [n, k] of the likeliest."""
        ...


def drafts(
    state: StepState, logits: torch.Tensor, options: SamplerOptions, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [K, N] and their log-probs [K, N]; the first draw is the one that `denoise_step` makes."""
    row, position = state.where()
    if options.temperature == 0:
        token = logits.argmax(-1)[None]
        return token, torch.zeros_like(token, dtype=torch.float64)
    sampling = sampling_logprobs(logits, options.temperature, options.top_p, options.top_k)
    seeds = [state.seed, *(noise.split(state.seed, torch.full_like(state.seed, k)) for k in range(1, count))]
    tokens = [draw(sampling, noise.uniform(s[row], state.step[row], position, noise.TOKEN_STREAM)) for s in seeds]
    drawn = torch.stack(tokens)
    return drawn, sampling.gather(1, drawn.T).T.double()


class Guide:
    """A reader and a rule."""

    def __init__(self, reader: Reader, options: GuideOptions, eos_token_id: int | None):
        self.reader, self.options, self.eos_token_id = reader, options, eos_token_id

    def steer(
        self, state: StepState, logits: torch.Tensor, options: SamplerOptions, prompt: torch.Tensor, end: torch.Tensor
    ) -> tuple[StepState, SamplerOptions, torch.Tensor | None]:
        """What `denoise_step` is to be called with: state, decoder, and the log-probs to draw from (None: its own).

        Args:
            logits: [N, V] at the candidates, which are the masks of the current block.
            prompt, end: int64 [B], where responses begin, and where the current blocks end.
        """
        if self.options.rule == "agree":
            count = self._agreed(state, drafts(state, logits, options, 1)[0], prompt, end)
            return replace(state, quota=count), options.model_copy(update={"selector": "left_most"}), None
        drawn, logprob = drafts(state, logits, options, self.options.candidates)
        row, _ = state.where()
        taken = self._weighed(state, drawn, logprob, prompt, end)[row]
        chosen = drawn.gather(0, taken[None])[0]
        return state, options, torch.full_like(logits, -torch.inf).scatter(1, chosen[:, None], 0.0)

    def _agreed(self, state: StepState, drawn: torch.Tensor, prompt: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """int64 [B]: how many of the left-most drafts the guide agrees with, at least 1."""
        counts = []
        for masks, answer, reading, over in self._read(state, drawn, prompt, end, self.options.top):
            least = reading.logprobs[:, 0] + math.log(self.options.relative) - 1e-6
            agrees = ((reading.ids == answer[:, None]).any(1) & (reading.logprob >= least)).cpu().numpy()
            agrees[over:] = True
            refused = np.flatnonzero(~agrees[masks])
            counts.append(max(1, int(refused[0]) if len(refused) else len(masks)))
        return torch.tensor(counts, device=state.canvas.device)

    def _weighed(
        self, state: StepState, drawn: torch.Tensor, logprob: torch.Tensor, prompt: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        """int64 [B]: which of the K fillings each row takes."""
        size, own = len(state.canvas), logprob.cpu().numpy()
        row = state.where()[0].cpu().numpy()
        weight = np.zeros((len(drawn), size))
        for at, (masks, _, reading, over) in enumerate(self._read(state, drawn, prompt, end, 0)):
            k, r = divmod(at, size)
            written = own[k, row == r][masks < over].sum()
            weight[k, r] = float(reading.logprob[:over].double().sum()) - written
        law = torch.from_numpy(weight.T).to(drawn.device) / self.options.temperature
        u = noise.uniform(state.seed, state.step, torch.zeros_like(state.step), noise.CHOICE_STREAM)
        taken = draw(torch.log_softmax(law, dim=-1), u)
        assert state.num_steps is not None and state.block_step is not None
        return torch.where(state.block_step < self.options.share * state.num_steps, taken, 0)

    def _read(
        self, state: StepState, drawn: torch.Tensor, prompt: torch.Tensor, end: torch.Tensor, top: int
    ) -> list[tuple[np.ndarray, torch.Tensor, Any, int]]:
        """For each filling of each row, fillings first: places of the masks, answer, reading, tokens that count."""
        row, position = state.where()
        filled = torch.stack([state.canvas.index_put((row, position), token) for token in drawn]).cpu().numpy()
        first, last, row_of, place = (x.cpu().numpy() for x in (prompt, end, row, position))
        rows = [(k, r) for k in range(len(drawn)) for r in range(len(first))]
        answers = [filled[k, r, first[r] : last[r]] for k, r in rows]
        readings = self.reader.read(
            [filled[k, r, : first[r]].tolist() for k, r in rows], [answer.tolist() for answer in answers], top
        )
        found = []
        for (_, r), answer, reading in zip(rows, answers, readings, strict=True):
            ends = np.flatnonzero(answer == self.eos_token_id)
            over = int(ends[0]) + 1 if len(ends) else len(answer)
            answer_ids = torch.from_numpy(answer).to(reading.logprob.device)
            found.append((place[row_of == r] - first[r], answer_ids, reading, over))
        return found


def guided(reader: Reader | None, options: SamplerOptions, eos_token_id: int | None) -> Guide | None:
    """The guide of an engine, from `options.guide` and what reads for it.

    Raises:
        ValueError: one of the two is missing.
    """
    if (reader is None) != (options.guide is None):
        raise ValueError("sampler.guide needs its model: give the engine what reads answers with it")
    return None if reader is None or options.guide is None else Guide(reader, options.guide, eos_token_id)
