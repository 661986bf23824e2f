"""The default rollout engine: batched, exact, in the caller's process.

Requests of any lengths share a batch and leave it when they are done; waiting requests take their slots at once.
Full-attention models see the whole canvas at every step. Block-causal models keep the keys and values of finished
blocks. A finished block is stored by the first denoising forward of the next one: the same computation layer by layer,
so exact, and one forward per block less. Where logits are shifted, that forward also gives the state from which the
block's first token is read, and later ones of the same block find it in the cache.

Full-attention models may opt into the approximate caches of Fast-dLLM (Wu et al. 2025, arXiv 2505.22618): the
first forward of a block sees the whole canvas, later ones compute the block alone ("dual") or the block and all
behind it ("prefix") and take everything else from the cache, where it is stale. In FreeCache (Hu et al. 2025, arXiv
2505.21467, and its code) the first forward of the response alone sees the whole canvas, and what lies before a block is
never computed again ("frozen"). Such trajectories say `exact=False`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from rollouts.constraints.automaton import TokenAutomaton
from rollouts.constraints.reach import opened
from rollouts.engines.base import EngineStats, SharedModelEngine
from rollouts.engines.base import Request as Request
from rollouts.engines.block_cache import BlockCache
from rollouts.engines.causal_reading import corrector
from rollouts.engines.fitted_options import fitted_options
from rollouts.engines.record import Record
from rollouts.engines.slots import Plan, Slots
from rollouts.model_protocol import DenoisingModel, mask_token_of
from rollouts.samplers.distribution import guided_logits
from rollouts.samplers.guide import Reader, guided
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.parts import step_quota
from rollouts.samplers.step import StepState, denoise_step, places_of
from rollouts.trajectory import TokenTrajectory
from rollouts.visibility import block_causal_visibility, full_visibility


class InProcessEngine(SharedModelEngine):
    """Samples trajectories with one model on one device."""

    verifies = False

    def __init__(
        self,
        model: DenoisingModel,
        options: SamplerOptions,
        *,
        eos_token_id: int | None = None,
        max_batch_size: int = 256,
        device: torch.device | str = "cpu",
        approximate_cache: Literal["none", "prefix", "dual", "frozen"] = "none",
        constraint: TokenAutomaton | None = None,
        guide: Reader | None = None,
    ):
        """
        Args:
            model: any `DenoisingModel`; put it in eval mode yourself.
            options: the decoder.
            eos_token_id: end token; a response stops after the block that reveals it.
            max_batch_size: requests decoded together.
            approximate_cache: for full-attention models; see the module. Trajectories are then not exact.
            constraint: what responses must match; the compiled `options.constraint`.
            guide: the model of `options.guide`.

        Raises:
            ValueError: options that exclude each other, or no response of `gen_length` tokens matches the constraint.
        """
        if max_batch_size < 1:
            raise ValueError(f"rollout.max_batch_size must be at least 1, got {max_batch_size}")
        assert options.verify == self.verifies, "rollouts.engines.tokens.token_engine picks the engine"
        self.model = model
        self.mask_token_id = mask_token_of(model)
        self.block_causal = model.attention == "block_causal"
        self.context_causal = bool(getattr(model, "context_causal", False))
        options = fitted_options(options, model, approximate_cache, eos_token_id)
        self.options, self.eos_token_id, self.max_batch_size = options, eos_token_id, max_batch_size
        self.device = torch.device(device)
        self.approximate_cache = approximate_cache
        self.constraint = opened(constraint, options, self.mask_token_id, self.device)
        # What every match has is there from the start, and the model fills in the rest around it.
        whole = self.constraint is not None and options.block_length is None
        self._placed = self.constraint.forced() if self.constraint is not None and whole else np.zeros((0, 2), np.int64)
        self.guide = guided(guide, options, eos_token_id) or corrector(model, options, self._count)
        self.stats = EngineStats()

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], policy_version: int = 0) -> list[TokenTrajectory]:
        """Decode every request; the result has the requests' order.

        Raises:
            ValueError: a request does not fit the model's context, or has no prompt.
        """
        started = time.perf_counter()
        self.stats = EngineStats()
        plans = [self.plan(index, request) for index, request in enumerate(requests)]
        found = self._decoded(plans, requests) if plans else []
        self.stats.seconds = time.perf_counter() - started
        return [
            self.trajectory(request.prompt_ids, seed=request.seed, policy_version=policy_version, **arrays)
            for request, arrays in zip(requests, found, strict=True)
        ]

    def _decoded(self, plans: Sequence[Plan], requests: Sequence[Request]) -> list[dict[str, Any]]:
        """The arrays of a trajectory of every request, in their order."""
        # Longest first: requests of like length share batches, and no long one is left to run alone.
        waiting = deque(sorted(plans, key=lambda plan: -plan.length))
        cached = self.block_causal or self.approximate_cache != "none"
        slots = Slots(min(self.max_batch_size, len(plans)), cached and self.approximate_cache != "frozen")
        record = Record(len(plans), None if self.constraint is None else self.constraint.automaton.classes)
        width = waiting[0].length
        canvas = torch.full((len(slots.index), width), self.mask_token_id, dtype=torch.int64, device=self.device)
        running = None
        if self.options.remembers:
            running = torch.empty(canvas.shape, dtype=torch.float64, device=self.device)
        cache = None
        if cached:
            # One position more than any canvas has: padding queries write there.
            cache = BlockCache(len(slots.index), width + 1, self.device)
        while True:
            admitted: dict[int, Sequence[int]] = {}
            for slot in slots.free()[: len(waiting)].tolist():
                plan = waiting.popleft()
                slots.admit(slot, plan, fresh=self.approximate_cache != "none")
                admitted[slot] = requests[plan.index].prompt_ids
                canvas[slot] = self.mask_token_id
                canvas[slot, : plan.prompt] = torch.as_tensor(admitted[slot], device=self.device)
                if len(self._placed):
                    place, token = self._placed.T
                    canvas[slot, torch.from_numpy(plan.prompt + place)] = torch.from_numpy(token).to(self.device)
                    record.place(plan.index, plan.prompt + place, token)
                    slots.num_masked[slot] -= len(place)
                    slots.left[slot] -= len(place)
                if running is not None:
                    running[slot] = -torch.inf
            if admitted and self.block_causal:
                assert cache is not None
                self._prefill(canvas, cache, slots, admitted)
            group = slots.next_group()
            if not len(group):
                break
            self._denoise(canvas, running, cache, slots, group, record)
        return record.by_request()

    def plan(self, index: int, request: Request) -> Plan:
        """Where a request begins and ends on the canvas.

        Raises:
            ValueError: it does not fit the model's context, or has no prompt.
        """
        prompt = len(request.prompt_ids)
        if not prompt:
            raise ValueError(f"request {index} has an empty prompt: give it at least one token")
        if self.mask_token_id in request.prompt_ids:
            raise ValueError(f"request {index} has the mask token {self.mask_token_id} in its prompt: take it out")
        block = self.options.block_length
        length, start = prompt + self.options.gen_length, prompt
        if self.block_causal and self.options.choose is None:
            assert block is not None
            # The grid is anchored at position 0: the rest of the prompt shares the first block.
            start = prompt // block * block
            length = -(-length // block) * block
        if length > self.model.max_length:
            raise ValueError(
                f"request {index}: prompt of {prompt} tokens plus sampler.gen_length {self.options.gen_length} "
                f"needs {length} positions, the model has {self.model.max_length}"
            )
        return Plan(
            index=index,
            prompt=prompt,
            length=length,
            start=start,
            end=length if block is None else start + block,
            steps=self.options.steps_per_block(request.num_inference_steps),
            seed=request.seed,
        )

    def _prefill(
        self, canvas: torch.Tensor, cache: BlockCache, slots: Slots, admitted: dict[int, Sequence[int]]
    ) -> None:
        """Store the whole blocks of new prompts; equal prompts are forwarded once."""
        copies, batches = slots.prefills(admitted)
        assert self.options.block_length is not None
        for batch in batches:
            num_keys = int(slots.start[batch].max())
            positions = torch.arange(num_keys, device=self.device).expand(len(batch), -1)
            # A shorter prompt computes states beyond its own blocks too. They are written over before any query of
            # that request can see them: its window is rewritten in every forward, and hides what follows.
            clean = positions[:1, :1] + num_keys if self.context_causal else None
            visible = block_causal_visibility(positions[:1], num_keys, self.options.block_length, clean)
            cache.aim(batch, positions, num_keys)
            hidden = self.model.hidden_states(
                canvas[torch.as_tensor(batch, device=self.device), :num_keys],
                visible=visible.expand(len(batch), -1, -1),
                position_ids=positions,
                cache=cache,
            )
            if self.model.logit_shift:
                last = torch.as_tensor(slots.start[batch] - 1, device=self.device)
                cache.keep_last_clean(hidden[torch.arange(len(batch), device=self.device), last])
            self._count(positions)
        cache.share(copies, slots.start)

    def _denoise(
        self,
        canvas: torch.Tensor,
        running: torch.Tensor | None,
        cache: BlockCache | None,
        slots: Slots,
        group: np.ndarray,
        record: Record,
    ) -> None:
        """One denoising forward and decision for the requests in the slots `group`."""
        options = self.options
        # No token is -1: where there is no end token, none is found.
        eos = -1 if self.eos_token_id is None else self.eos_token_id
        names = ("length", "start", "end", "num_masked", "left", "steps", "block_step", "step", "seed", "prompt")
        # One transfer for all numbers of the group.
        numbers = torch.from_numpy(np.stack([group, *(getattr(slots, name)[group] for name in names)])).to(self.device)
        where, length, start, end, total, left, steps, block_step, step, seed, prompt = numbers
        index = torch.arange(canvas.shape[1], device=self.device)
        tokens = canvas[where]
        masked = tokens == self.mask_token_id
        filled = None
        if options.reviser == "none":
            eligible = masked & (index >= start[:, None]) & (index < end[:, None])
        else:
            # With all_previous, masks of earlier blocks are filled again too. Prompts have none.
            first = prompt if options.reach_back else start.maximum(prompt)
            inside = (index >= first[:, None]) & (index < end[:, None])
            eligible, filled = masked & inside, ~masked & inside
        candidates = masked & (index < length[:, None]) if options.record_x0 else eligible
        known = slots.left[group]
        if options.reviser == "edit":
            candidates, known = candidates | filled, slots.end[group] - np.maximum(slots.start, slots.prompt)[group]
        row, position = places = places_of(candidates, None if options.record_x0 else int(known.sum()))
        hidden, begin = self._hidden(tokens, cache, slots, group, start, length)
        at = (row, position - self.model.logit_shift - begin[row])
        logits = self.model.token_logits(hidden[at])
        if options.cfg_scale:
            unprompted = torch.where(index < prompt[:, None], self.mask_token_id, tokens)
            hidden, _ = self._hidden(unprompted, cache, slots, group, start, length)
            logits = guided_logits(logits, self.model.token_logits(hidden[at]), options.cfg_scale)
        if not options.follows_time:
            steps = steps.minimum(total)
        quota = step_quota(options.quota, total, left, steps, block_step, end - start)
        before = None if running is None else running[where]
        state = StepState(tokens, candidates, eligible, quota, seed, step, steps, block_step, filled, before, places)
        reach = None if self.constraint is None else self.constraint.reach(tokens, prompt)
        proposal = None
        if self.guide is not None:
            state, options, proposal = self.guide.steer(state, logits, options, prompt, length.minimum(end))
        result = denoise_step(state, logits, options, proposal, self.eos_token_id, reach)
        request = slots.index[group]
        if options.record_x0:
            record.add_x0(result, tokens, masked, request)
        if running is not None and result.running is not None:
            running[where] = result.running
        shown = torch.where(result.reveal, result.token, tokens[result.row, result.position])
        canvas[where[result.row], result.position] = shown
        if result.remask is not None:
            canvas[where] = canvas[where].masked_fill(result.remask, self.mask_token_id)
        counts = None
        if filled is not None:
            now = canvas[where]
            changed = result.reveal & ~masked[result.row, result.position]
            edits = torch.zeros_like(start).index_add(0, result.row, changed.long())
            counts = torch.stack([*(((now == one) & inside).sum(1) for one in (self.mask_token_id, eos)), edits])
        edited, token, counted = record.add(result, request, slots.step[group], self.mask_token_id, counts)
        record.num_steps[request] = slots.step[group] + 1
        # A block-causal model never saw what lies behind the terminal block.
        record.length[request] = slots.end[group] if self.block_causal else slots.length[group]
        self.stats.generated_tokens += len(token)
        if filled is None:
            revealed = np.bincount(edited, minlength=len(group))
            ended = np.bincount(edited[token == eos], minlength=len(group)) > 0
            slots.after_step(group, revealed, ended, options.block_length)
        else:
            self._after_revision(counted, slots, group)

    def _after_revision(self, counts: np.ndarray, slots: Slots, group: np.ndarray) -> None:
        """Count a step that may have taken tokens back.

        Args:
            counts: int64 [3, N]: masks and end tokens among the positions that the step could change, after it, and
                tokens that it replaced by other tokens.
        """
        options = self.options
        left_now, ends, edited = counts
        busy = np.zeros(len(group), dtype=bool)
        if options.reviser == "remdm":
            busy = slots.block_step[group] + 1 < slots.steps[group]
        elif options.reviser == "edit":
            complete = slots.left[group] == 0
            slots.post_step[group] += complete
            more = slots.post_step[group] < options.max_post_steps
            busy = more & (~complete | (edited > 0))
        # An end token may have been taken back.
        slots.stopped[group] = False
        slots.after_step(group, slots.left[group] - left_now, ends > 0, options.block_length, busy)

    def _hidden(
        self,
        tokens: torch.Tensor,
        cache: BlockCache | None,
        slots: Slots,
        group: np.ndarray,
        start: torch.Tensor,
        length: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [N, Q, D] of the queries this step needs, and the position [N] of each row's first."""
        fresh, block = bool(slots.fresh[group[0]]), self.options.block_length
        width, shortest = int(slots.length[group].max()), int(slots.length[group].min())
        if cache is None:
            hidden = self.model.hidden_states(tokens[:, :width], visible=full_visibility(length, width, shortest))
            self._count(tokens[:, :width])
            return hidden, torch.zeros_like(start)
        if self.block_causal:
            assert block is not None
            # Every row of the group has the same number of queries: one block, or two when one is stored.
            num_queries = block * (1 + fresh)
            begin = start - block * fresh
            num_keys = int(slots.end[group].max())
            positions = begin[:, None] + torch.arange(num_queries, device=self.device)
            visible = block_causal_visibility(
                positions, num_keys, block, start[:, None] if self.context_causal else None
            )
        else:
            begin, num_queries = torch.zeros_like(start), width
            if not fresh:
                last = slots.end if self.approximate_cache == "dual" else slots.length
                # The state that predicts the block's first position may stand before it.
                begin = start - self.model.logit_shift
                num_queries = int((last - slots.start)[group].max()) + self.model.logit_shift
            num_keys = width
            positions = begin[:, None] + torch.arange(num_queries, device=self.device)
            seen = full_visibility(length, width, shortest)
            visible = torch.ones_like(positions[:, :1, None], dtype=torch.bool) if seen is None else seen
            visible = visible.expand(-1, 1, num_keys)
        inside = positions < length[:, None]
        cache.aim(group.tolist(), torch.where(inside, positions, cache.max_length - 1), num_keys)
        positions = positions.minimum(length[:, None] - 1)
        hidden = self.model.hidden_states(
            tokens.gather(1, positions), visible=visible, position_ids=positions, cache=cache
        )
        self._count(positions)
        if self.block_causal and self.model.logit_shift:
            if not fresh:
                return cache.with_last_clean(hidden, begin)
            cache.keep_last_clean(hidden[:, num_queries // 2 - 1])
        return hidden, begin

    def trajectory(
        self,
        prompt_ids: Sequence[int] | np.ndarray,
        length: int,
        num_steps: int,
        seed: int,
        policy_version: int,
        **arrays: Any,
    ) -> TokenTrajectory:
        """The record of a rollout of this engine, whose `arrays` are its edits and, where recorded, x0 predictions."""
        trajectory = TokenTrajectory(
            prompt_ids=np.asarray(prompt_ids, dtype=np.int64),
            length=length,
            mask_token_id=self.mask_token_id,
            num_steps=num_steps,
            stop_length=min(length - len(prompt_ids), self.options.gen_length),
            block_length=self.options.block_length,
            block_origin=0 if self.block_causal else len(prompt_ids),
            sampler=self.options.distribution(),
            decoder=self.options.decoder() | ({"forwards": 2 * num_steps} if self.options.reviser == "arpc" else {}),
            policy_version=policy_version,
            exact=self.approximate_cache == "none",
            seed=seed,
            **arrays,
        )
        if self.eos_token_id is not None:
            ends = np.flatnonzero(trajectory.response_ids() == self.eos_token_id)
            if len(ends):
                trajectory.stop_length = int(ends[0]) + 1
        return trajectory

    def _count(self, queries: torch.Tensor) -> None:
        """Book the forward that was just made for queries [N, Q]."""
        asked, width = queries.shape
        run = getattr(self.model, "last_run", asked)
        self.stats.forwards += 1
        self.stats.rows_asked += asked
        self.stats.sequence_forwards += run
        self.stats.query_tokens += run * width
