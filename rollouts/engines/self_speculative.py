"""Self-speculative decoding: a block is drafted by diffusion and verified from left to right by the same model.

S2D2 (Han et al. 2026, arXiv 2603.25702, and its published code). One forward of the block as the model was trained
gives a draft of all its masks, drawn from q. A second forward reads the same positions as a model of blocks of one
token would: position p sees the tokens before it, the drafted ones among them, and its own mask. It gives p. From left
to right a drafted token is kept with probability min(1, p/q); the first that is not is drawn again from (p - q)+, and
the block is drafted anew behind it. What comes out has exactly the law p, the autoregressive reading of the model
(Leviathan et al. 2023, arXiv 2211.17192), whatever the draft is: it only decides how many tokens two forwards give.

A trajectory is therefore that of a decoder with blocks of one token, and the log-probs are those of p.

Departures from the published code: every draft is verified (there a router may reveal confident tokens unverified, and
the law is then neither). What is decided is read causally in every forward, as the learner does. Where the model reads
its context causally and is shifted, as converted autoregressive models do and are, both forwards have the same keys and
values of it, and forward the block alone; otherwise there is no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rollouts.engines.base import Request
from rollouts.engines.block_cache import BlockCache
from rollouts.engines.causal_reading import read_causally
from rollouts.engines.in_process import InProcessEngine
from rollouts.engines.record import NonFiniteError
from rollouts.engines.slots import Plan
from rollouts.samplers import noise
from rollouts.samplers.distribution import draw, sampling_logprobs
from rollouts.trajectory import TokenTrajectory
from rollouts.visibility import block_causal_visibility


class SelfSpeculativeEngine(InProcessEngine):
    """Samples the autoregressive reading of a block-causal model; see the module."""

    verifies = True
    # Of the batch that is decoded: what is stored of its requests, and which of them go on.
    _cache: BlockCache | None = None
    _going: list[int]

    def _decoded(self, plans: Sequence[Plan], requests: Sequence[Request]) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        order = sorted(plans, key=lambda plan: -plan.length)
        for first in range(0, len(order), self.max_batch_size):
            rows = [plan.index for plan in order[first : first + self.max_batch_size]]
            answers = self._answer([requests[row] for row in rows])
            for row, (edits, rounds) in zip(rows, answers, strict=True):
                found[row] = self._arrays(len(requests[row].prompt_ids), edits, rounds)
                self.stats.generated_tokens += len(edits)
        return [found[row] for row in range(len(requests))]

    def _answer(self, requests: Sequence[Request]) -> list[tuple[np.ndarray, int]]:
        """For each request of a batch its tokens, float64 [n, 3] of token, log-prob and confidence, and its rounds."""
        block = self.options.block_length
        assert block is not None
        prompts = [len(request.prompt_ids) for request in requests]
        at = torch.tensor(prompts, device=self.device)
        limit = at + self.options.gen_length
        width = int(-(-limit.max() // block)) * block
        tokens = torch.full((len(requests), width), self.mask_token_id, device=self.device)
        for row, request in enumerate(requests):
            tokens[row, : prompts[row]] = torch.as_tensor(request.prompt_ids, device=self.device)
        seed = torch.tensor([request.seed for request in requests], device=self.device)
        going, rounds = torch.arange(len(requests), device=self.device), 0
        edits: list[list[np.ndarray]] = [[] for _ in requests]
        used = [0] * len(requests)
        self._cache = self._filled_cache(tokens, at) if self.context_causal and self.model.logit_shift else None
        while len(going):
            start = at[going]
            self._going = going.tolist()
            own, count = self._round(tokens[going], start, limit[going], seed[going], rounds)
            rounds += 1
            for row, begin, decided, number in zip(
                going.tolist(), start.tolist(), own.cpu().numpy(), count.tolist(), strict=True
            ):
                edits[row].append(decided[:number])
                used[row] = rounds
                kept = torch.from_numpy(decided[:number, 0].astype(np.int64))
                tokens[row, begin : begin + number] = kept.to(self.device)
            at[going] = start + count
            last = tokens[going, at[going] - 1]
            over = at[going] == limit[going]
            going = going[~(over if self.eos_token_id is None else over | (last == self.eos_token_id))]
        return [(np.concatenate(parts), number) for parts, number in zip(edits, used, strict=True)]

    def _round(
        self, tokens: torch.Tensor, start: torch.Tensor, limit: torch.Tensor, seed: torch.Tensor, number: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft the rest of the current blocks and verify it.

        Args:
            tokens: int64 [A, W], masked from `start` on.
            start, limit: int64 [A], the first mask, and the end of the response.
            number: of the round, the same for all rows.

        Returns:
            float64 [A, K, 3] of token, log-prob and confidence, and int64 [A], how many of the K are decided.
        """
        options, block = self.options, self.options.block_length
        assert block is not None
        end = (start // block + 1) * block
        tokens = tokens[:, : int(end.max())]
        place = start[:, None] + torch.arange(block, device=start.device)
        open_ = place < torch.minimum(end, limit)[:, None]
        row, slot = open_.nonzero(as_tuple=True)
        position = place[row, slot]
        draft = self._draft_logits(tokens, start, row, position)
        step = torch.full_like(row, number)
        drafted = self._drawn(draft, noise.uniform(seed[row], step, position, noise.TOKEN_STREAM))
        filled = tokens.index_put((row, position), drafted)
        if self._cache is None:
            verified = read_causally(self.model, filled, row, position, self._count)
        else:
            verified = self._window_logits(filled, start, row, position, causal=True)
        if options.temperature == 0:
            token = verified.argmax(-1)
            kept = token == drafted
            logprob = torch.zeros_like(token, dtype=torch.float64)
        else:
            p, q = (self._sampling(logits).double() for logits in (verified, draft))
            ratio = (p - q).gather(-1, drafted[:, None]).squeeze(-1)
            kept = noise.uniform(seed[row], step, position, noise.ACCEPT_STREAM).log() < ratio
            left = (p.exp() - q.exp()).clamp(min=0)
            # Where p and q are equal to the last digit nothing is ever refused.
            left = torch.where(left.sum(-1, keepdim=True) > 0, left, p.exp())
            again = draw(left.log(), noise.uniform(seed[row], step, position, noise.CHOICE_STREAM))
            token = torch.where(kept, drafted, again)
            logprob = p.gather(-1, token[:, None]).squeeze(-1)
        confidence = verified.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1).double().exp()
        if not bool((logprob.isfinite() & confidence.isfinite()).all()):
            raise NonFiniteError("the model's logits are not finite: its weights are damaged or training diverged")
        decided = torch.zeros(*place.shape, 3, dtype=torch.float64, device=place.device)
        decided[row, slot] = torch.stack([token.double(), logprob, confidence], dim=-1)
        # Up to the first token that was refused or ends the answer, that one included.
        stops = ~kept if self.eos_token_id is None else ~kept | (token == self.eos_token_id)
        stop = torch.zeros_like(open_).index_put((row, slot), stops)
        before = stop.long().cumsum(1) - stop.long() == 0
        return decided, (before & open_).sum(1)

    def _sampling(self, logits: torch.Tensor) -> torch.Tensor:
        return sampling_logprobs(logits, self.options.temperature, self.options.top_p, self.options.top_k)

    def _drawn(self, logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1) if self.options.temperature == 0 else draw(self._sampling(logits), u)

    def _draft_logits(
        self, tokens: torch.Tensor, start: torch.Tensor, row: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        """[N, V]: the masks of the current blocks as block diffusion predicts them."""
        block = self.options.block_length
        assert block is not None
        if self._cache is not None:
            return self._window_logits(tokens, start, row, position, causal=False)
        index = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        clean = (start // block * block)[:, None] if self.context_causal else None
        hidden = self.model.hidden_states(tokens, visible=block_causal_visibility(index, tokens.shape[1], block, clean))
        self._count(tokens)
        return self.model.token_logits(hidden[row, position - self.model.logit_shift])

    def _filled_cache(self, tokens: torch.Tensor, at: torch.Tensor) -> BlockCache:
        """Keys and values of what stands before the windows of the first round, [A, W] tokens read causally."""
        cache = BlockCache(len(tokens), tokens.shape[1], self.device)
        # A shorter prompt computes states beyond it too. They are written over before they are seen.
        num_keys = int(at.max())
        positions = torch.arange(num_keys, device=self.device).expand(len(tokens), -1)
        cache.aim(range(len(tokens)), positions, num_keys)
        visible = block_causal_visibility(positions, num_keys, 1)
        self.model.hidden_states(tokens[:, :num_keys], visible=visible, position_ids=positions, cache=cache)
        self._count(positions)
        return cache

    def _window_logits(
        self, tokens: torch.Tensor, start: torch.Tensor, row: torch.Tensor, position: torch.Tensor, causal: bool
    ) -> torch.Tensor:
        """[N, V]: predictions in the current blocks, of which alone, and of the token before each, states are computed.

        Example with blocks of 4: where the first mask is 6, the window is 3 to 7, and the mask at 6 is read at 5.

        Every round computes the states of its whole window, and the next window begins at the last token of a finished
        block: whatever was refused is written over before it is seen as context.

        Args:
            causal: read from left to right; otherwise a position of the block sees the whole block.
        """
        block = self.options.block_length
        assert block is not None and self._cache is not None
        begin = start // block * block
        positions = (begin - 1)[:, None] + torch.arange(block + 1, device=self.device)
        # In the first block of the canvas there is no token before; its place is taken by the first.
        positions = positions.clamp(min=0)
        num_keys = tokens.shape[1]
        # The token before the block is the last of its own, and sees what is left of it either way.
        seen = block_causal_visibility(positions, num_keys, 1 if causal else block)
        self._cache.aim(self._going, positions, num_keys)
        hidden = self.model.hidden_states(
            tokens.gather(1, positions), visible=seen, position_ids=positions, cache=self._cache
        )
        self._count(positions)
        return self.model.token_logits(hidden[row, position - begin[row]])

    def _arrays(self, prompt: int, edits: np.ndarray, rounds: int) -> dict[str, Any]:
        """The record: one token a step."""
        count = len(edits)
        return {
            "length": prompt + count,
            "num_steps": count,
            "forwards": 2 * rounds,
            "step": np.arange(count, dtype=np.int32),
            "position": prompt + np.arange(count, dtype=np.int32),
            "token": edits[:, 0].astype(np.int64),
            "logprob": edits[:, 1],
            "confidence": edits[:, 2].astype(np.float32),
        }

    def trajectory(self, *args: Any, **arrays: Any) -> TokenTrajectory:
        """See `InProcessEngine.trajectory`; the learner reads it on a grid of blocks of one token."""
        forwards = arrays.pop("forwards")
        trajectory = super().trajectory(*args, **arrays)
        trajectory.block_length = 1
        trajectory.decoder["forwards"] = forwards
        return trajectory
