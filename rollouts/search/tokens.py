"""The search's sampler for masked-diffusion language models, full-attention or block-causal.

It takes the same decisions as the rollout engine: with one seed per request, stepping from start to end gives the
engine's trajectories, bit for bit. A state can be branched and resumed, so there is no key-value cache: a block-causal
model runs its whole canvas at every step, with the same result.

The noise of a state is one seed per position (and the step counter makes the draws), so that a neighbour in noise
space redraws some positions and keeps the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.record import NonFiniteError
from rollouts.samplers import noise
from rollouts.samplers.distribution import sampling_logprobs
from rollouts.samplers.parts import step_quota
from rollouts.samplers.step import StepResult, StepState, denoise_step
from rollouts.search.protocol import Budget
from rollouts.search.token_states import Edits, TokenStates, flattened, masked_again, random_subset
from rollouts.trajectory import TokenTrajectory
from rollouts.visibility import block_causal_visibility, full_visibility


class TokenSampler:
    """A `SearchSampler` (and `GuidedSampler`) over the prompts it is given."""

    random_start = False

    def __init__(self, engine: InProcessEngine, prompts: Sequence[Sequence[int]], policy_version: int = 0):
        """
        Args:
            engine: the rollout engine whose model, decoder and batch size are used.
            prompts: token ids, one sequence per conditioning.

        Raises:
            ValueError: an approximate cache, recorded x0 predictions, a decoder that takes tokens back or is guided, or
                a prompt that does not fit.
        """
        if engine.approximate_cache != "none":
            raise ValueError("a search needs exact states: set rollout.cache to none")
        if engine.options.record_x0:
            raise ValueError("a search records no x0 predictions: set sampler.record_x0 to false")
        if engine.options.reviser != "none" or engine.options.cfg_scale:
            raise ValueError(
                "a search revises states itself and draws from the plain model: set sampler.reviser to none and "
                "sampler.cfg_scale to 0"
            )
        if engine.options.choose is not None:
            raise ValueError("a search takes steps of its own: set sampler.choose to null")
        if engine.options.joint_steps:
            raise ValueError("a search makes a forward at every step: set sampler.joint_steps to 0")
        if engine.options.remembers:
            raise ValueError("a search goes on from states without memory: set sampler.selector to another one")
        if engine.constraint is not None:
            raise ValueError("a search does not keep to a constraint: set sampler.constraint to null")
        if engine.guide is not None:
            raise ValueError("a search has no guide but its reward: set sampler.guide to null")
        if engine.options.verify:
            raise ValueError("a search takes denoising steps: set sampler.verify to false")
        self.engine = engine
        self.budget = Budget()
        self.policy_version = policy_version
        self.prompts = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        plans = [engine.plan(index, Request(prompt, 0)) for index, prompt in enumerate(prompts)]
        self._prompt, self._length, self._start, self._end, self._steps = (
            np.array([getattr(plan, name) for plan in plans], dtype=np.int64)
            for name in ("prompt", "length", "start", "end", "steps")
        )
        canvas = torch.full((len(prompts), int(self._length.max())), engine.mask_token_id)
        for row, prompt in enumerate(self.prompts):
            canvas[row, : len(prompt)] = torch.from_numpy(prompt)
        self._canvas = canvas.to(engine.device)

    # --- states ---------------------------------------------------------------------------------------------------

    def start(self, row: np.ndarray, seed: np.ndarray) -> TokenStates:
        """Canvases with nothing but their prompts."""
        zeros = np.zeros(len(row), dtype=np.int64)
        return TokenStates(
            row=row,
            seed=seed,
            canvas=self._canvas[torch.as_tensor(row, device=self._canvas.device)],
            noise=self._noise(seed),
            start=self._start[row],
            end=self._end[row],
            block_step=zeros,
            step=zeros,
            done=np.zeros(len(row), dtype=bool),
            history=[None] * len(row),
        )

    def join(self, parts: Sequence[TokenStates]) -> TokenStates:
        """Several batches as one."""
        return TokenStates.join(parts)

    def keys(self, states: TokenStates) -> list[bytes]:
        """The canvas; children of one parent are at one place in the schedule."""
        return [canvas.tobytes() for canvas in states.canvas.cpu().numpy()]

    def reseed(self, states: TokenStates, seed: np.ndarray) -> TokenStates:
        """The same canvases with new noise ahead of them."""
        return replace(states, seed=seed, noise=self._noise(seed))

    def perturb(self, states: TokenStates, share: float, seed: np.ndarray) -> TokenStates:
        """Redraw the seeds of a share of the response's positions, at least one, chosen at random."""
        index = torch.arange(self._canvas.shape[1], device=self._canvas.device)
        first, last = self._put(self._prompt[states.row]), self._put(self._length[states.row])
        response = (index >= first[:, None]) & (index < last[:, None])
        count = (share * (last - first)).round().long().clamp(min=1)
        fresh = self._noise(seed)
        chosen = random_subset(response, count, fresh, torch.zeros_like(first))
        # Split per position: the old seed of a position and its new one share no draw.
        return replace(states, noise=torch.where(chosen, noise.split(fresh, index), states.noise))

    def renoise(self, states: TokenStates, num_steps: int, seed: np.ndarray) -> TokenStates:
        """Go back `num_steps` steps in the current block's schedule, at most to its beginning.

        Positions of the block are masked again at random until as many are masked as the schedule has there;
        finished blocks stay. A finished state is opened again in its last block.
        """
        first = np.maximum(states.start, self._prompt[states.row])
        back = np.maximum(states.block_step - num_steps, 0)
        index = torch.arange(self._canvas.shape[1], device=self._canvas.device)
        begin, end = self._put(first), self._put(states.end)
        block = (index >= begin[:, None]) & (index < end[:, None])
        masked = states.canvas == self.engine.mask_token_id
        total = end - begin
        steps = self._put(self._steps[states.row]).minimum(total)
        step = self._put(back).minimum(steps)
        revealed = step * (total // steps) + step.minimum(total % steps)
        need = (total - revealed - (masked & block).sum(-1)).clamp(min=0)
        noised = self._noise(seed)
        chosen = random_subset(block & ~masked, need, noised, self._put(states.step))
        history = [
            masked_again(edits, np.flatnonzero(positions), self.engine.mask_token_id)
            for edits, positions in zip(states.history, chosen.cpu().numpy(), strict=True)
        ]
        opened = chosen.any(-1).cpu().numpy()
        return replace(
            states,
            seed=seed,
            canvas=states.canvas.masked_fill(chosen, self.engine.mask_token_id),
            noise=noised,
            block_step=np.where(opened, back, states.block_step),
            done=states.done & ~opened,
            history=history,
        )

    # --- denoising ------------------------------------------------------------------------------------------------

    def step(self, states: TokenStates) -> TokenStates:
        """One denoising step of every unfinished state."""
        return self._branch(states, [(states.seed, states.noise)])

    def candidates(self, states: TokenStates, seed: np.ndarray) -> TokenStates:
        """k next states of each state, from one forward of it."""
        return self._branch(states, [(column, self._noise(column)) for column in seed.T])

    def x0_hat(self, states: TokenStates) -> TokenStates:
        """Every masked position filled with the model's most likely token, in one forward."""
        length = self._length[states.row]

        def fill(part: TokenStates, where: torch.Tensor, logits: torch.Tensor) -> TokenStates:
            row, position = where.nonzero(as_tuple=True)
            best, token = torch.log_softmax(logits, dim=-1).max(-1)
            everything = torch.ones_like(row, dtype=torch.bool)
            result = StepResult(row, position, token, torch.zeros_like(best).double(), best.double().exp(), everything)
            filled = self._commit(part, result)
            return replace(filled, end=self._length[part.row], done=np.ones(len(part), dtype=bool))

        return self._rebuild(states, [fill(*part) for part in self._forward(states, 0, length)])

    def guided_step(
        self, states: TokenStates, gradient: Callable[[torch.Tensor, Any], torch.Tensor], scale: float
    ) -> tuple[TokenStates, np.ndarray]:
        """One step whose draws follow log p + scale * d reward / d prediction.

        The prediction is a soft response [B, gen_length, V]: one-hot where a token is decided, the sampling
        distribution where not. The order in which positions are revealed stays the policy's; where it depends on the
        draws, those that were thrown away count in the ratio too.

        Raises:
            ValueError: greedy decoding, which has no distribution to tilt.
        """
        options = self.engine.options
        if options.temperature == 0:
            raise ValueError("guidance tilts a distribution: set sampler.temperature > 0")
        every_draw = options.score == "probability" and options.selector != "left_most"
        ratio = np.zeros(len(states))
        parts, at = [], np.flatnonzero(~states.done)
        for part, where, logits in self._forward(states, 0, self._length[states.row]):
            row, position = where.nonzero(as_tuple=True)
            sampling = sampling_logprobs(logits, options.temperature, options.top_p, options.top_k)
            slope = gradient(self._soft_response(part, row, position, sampling.exp()), part)
            place = position - self._put(self._prompt[part.row])[row]
            inside = place < options.gen_length
            tilt = torch.zeros_like(sampling)
            tilt[inside] = slope[row[inside], place[inside]].to(tilt)
            proposal = torch.log_softmax(sampling + scale * tilt, dim=-1)
            result = self._decide(part, where, logits, part.noise, proposal)
            counted = torch.ones_like(result.reveal) if every_draw else result.reveal
            token = result.token[:, None]
            log_ratio = (sampling.gather(-1, token) - proposal.gather(-1, token)).squeeze(-1).double() * counted
            total = torch.zeros(len(part), dtype=torch.float64, device=logits.device).index_add(0, row, log_ratio)
            ratio[at[: len(part)]] = total.cpu().numpy()
            at = at[len(part) :]
            parts.append(self._after_step(self._commit(part, result)))
        return self._rebuild(states, parts), ratio

    def _branch(self, states: TokenStates, noises: Sequence[tuple[np.ndarray, torch.Tensor]]) -> TokenStates:
        """One forward of every unfinished state, then one decision for each of the k noises, candidates together."""
        active = np.flatnonzero(~states.done)
        branches: list[list[TokenStates]] = [[] for _ in noises]
        first = np.maximum(states.start, self._prompt[states.row])
        for part, where, logits in self._forward(states, first, states.end):
            index, active = active[: len(part)], active[len(part) :]
            at = torch.as_tensor(index, device=self._canvas.device)
            # One branch at a time: k copies of the logits would be what memory is short of.
            for branch, (seed, own) in zip(branches, noises, strict=True):
                result = self._decide(part, where, logits, own[at])
                branch.append(self._after_step(self._commit(replace(part, seed=seed[index], noise=own[at]), result)))
        moved = [self._rebuild(states, branch) for branch in branches]
        if len(moved) == 1:
            return moved[0]
        order = np.arange(len(states) * len(moved)).reshape(len(moved), -1).T.reshape(-1)
        return self.join(moved).select(order)

    def _rebuild(self, states: TokenStates, moved: Sequence[TokenStates]) -> TokenStates:
        """All states again, the unfinished ones replaced by what became of them."""
        if not moved:
            return states
        active = np.flatnonzero(~states.done)
        kept = np.flatnonzero(states.done)
        order = np.argsort(np.concatenate([active, kept]), kind="stable")
        return self.join([*moved, states.select(kept)]).select(order)

    @torch.no_grad()
    def _forward(
        self, states: TokenStates, first: np.ndarray | int, last: np.ndarray
    ) -> Iterator[tuple[TokenStates, torch.Tensor, torch.Tensor]]:
        """Forward the unfinished states in batches.

        Args:
            first, last: [B], the range of positions asked for.

        Yields:
            the states of a batch, which masked positions were asked for (bool [A, L]), and their logits [N, V].
        """
        engine, model = self.engine, self.engine.model
        active = np.flatnonzero(~states.done)
        first = np.broadcast_to(first, last.shape)
        index = torch.arange(self._canvas.shape[1], device=self._canvas.device)
        for begin in range(0, len(active), engine.max_batch_size):
            chunk = active[begin : begin + engine.max_batch_size]
            part = states.select(chunk)
            low, high = self._put(first[chunk])[:, None], self._put(last[chunk])[:, None]
            where = (part.canvas == engine.mask_token_id) & (index >= low) & (index < high)
            length = self._put(self._length[part.row])
            width = int(length.max())
            visible = full_visibility(length, width)
            if engine.block_causal:
                assert engine.options.block_length is not None
                queries = index[None, :width].expand(len(chunk), -1)
                clean = self._put(part.start)[:, None] if engine.context_causal else None
                visible = block_causal_visibility(queries, width, engine.options.block_length, clean)
            hidden = model.hidden_states(part.canvas[:, :width], visible=visible)
            self.budget.denoiser_evaluations += len(chunk)
            row, position = where.nonzero(as_tuple=True)
            yield part, where, model.token_logits(hidden[row, position - model.logit_shift])

    def _decide(
        self,
        part: TokenStates,
        where: torch.Tensor,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        proposal: torch.Tensor | None = None,
    ) -> StepResult:
        """The decoder's decision at the positions `where`; only those of the current block may be revealed."""
        index = torch.arange(where.shape[1], device=where.device)
        begin, end = self._put(np.maximum(part.start, self._prompt[part.row])), self._put(part.end)
        eligible = where & (index >= begin[:, None]) & (index < end[:, None])
        total = end - begin
        options, block_step = self.engine.options, self._put(part.block_step)
        steps = self._put(self._steps[part.row])
        if not options.follows_time:
            steps = steps.minimum(total)
        quota = step_quota(options.quota, total, eligible.sum(-1), steps, block_step, self._put(part.end - part.start))
        state = StepState(part.canvas, where, eligible, quota, seeds, self._put(part.step), steps, block_step)
        return denoise_step(state, logits, options, proposal, self.engine.eos_token_id)

    def _commit(self, part: TokenStates, result: StepResult) -> TokenStates:
        """Write what was revealed onto the canvases and into the histories, and count the step."""
        kept = result.reveal.nonzero().squeeze(1)
        row, position, token = result.row[kept], result.position[kept], result.token[kept]
        canvas = part.canvas.clone()
        canvas[row, position] = token
        logprob, confidence = result.logprob[kept].cpu().numpy(), result.confidence[kept].cpu().numpy()
        if not (np.isfinite(logprob).all() and np.isfinite(confidence).all()):
            raise NonFiniteError("the model's logits are not finite: its weights are damaged or training diverged")
        columns = [position.cpu().numpy(), token.cpu().numpy(), logprob, confidence]
        bounds = np.searchsorted(row.cpu().numpy(), np.arange(len(part) + 1))
        history: list[Edits | None] = [
            Edits(before, int(step), *(column[bounds[i] : bounds[i + 1]] for column in columns))
            for i, (before, step) in enumerate(zip(part.history, part.step, strict=True))
        ]
        return replace(part, canvas=canvas, history=history, step=part.step + 1, block_step=part.block_step + 1)

    def _after_step(self, part: TokenStates) -> TokenStates:
        """Enter next blocks; a response is over after its last block, or after the one with an end token."""
        engine, block = self.engine, self.engine.options.block_length
        canvas = part.canvas.cpu().numpy()
        index = np.arange(canvas.shape[1])
        response = index >= self._prompt[part.row][:, None]
        inside = response & (index >= part.start[:, None]) & (index < part.end[:, None])
        complete = ~(inside & (canvas == engine.mask_token_id)).any(-1)
        ended = (response & (canvas == engine.eos_token_id)).any(-1)
        over = complete & (ended | (part.end == self._length[part.row]))
        onward = complete & ~over
        return replace(
            part,
            start=np.where(onward, part.end, part.start),
            end=np.where(onward, part.end + (block or 0), part.end),
            block_step=np.where(onward, 0, part.block_step),
            done=over,
        )

    def _soft_response(
        self, part: TokenStates, row: torch.Tensor, position: torch.Tensor, probs: torch.Tensor
    ) -> torch.Tensor:
        """[A, gen_length, V] of the dtype of `probs`: one-hot where decided, `probs` [N, V] where masked."""
        size = probs.shape[-1]
        first = self._put(self._prompt[part.row])
        index = first[:, None] + torch.arange(self.engine.options.gen_length, device=first.device)
        soft = torch.nn.functional.one_hot(part.canvas.gather(1, index), size).to(probs)
        place = position - first[row]
        inside = place < soft.shape[1]
        soft[row[inside], place[inside]] = probs[inside]
        return soft

    # --- records --------------------------------------------------------------------------------------------------

    def trajectories(self, states: TokenStates) -> list[TokenTrajectory]:
        """One record per finished state."""
        engine, records = self.engine, []
        for i, edits in enumerate(states.history):
            assert states.done[i] and edits is not None
            row = int(states.row[i])
            # A block-causal model never saw the positions after the terminal block.
            length = int(states.end[i] if engine.block_causal else self._length[row])
            records.append(
                engine.trajectory(
                    self.prompts[row],
                    length,
                    int(states.step[i]),
                    int(states.seed[i]),
                    self.policy_version,
                    **flattened(edits),
                )
            )
        return records

    def _noise(self, seed: np.ndarray) -> torch.Tensor:
        """int64 [B, L]: the same seed at every position."""
        return self._put(seed)[:, None].expand(-1, self._canvas.shape[1])

    def _put(self, values: np.ndarray) -> torch.Tensor:
        """Numbers of the host on the device."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._canvas.device)
