"""The requests that an engine is decoding: one array entry per slot, on the host.

A denoising round needs a handful of numbers per request. Kept as arrays they cost the same few vector
operations for one request as for hundreds, and one transfer each way per forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Plan:
    """Where a request starts; positions are absolute.

    Attributes:
        index: place among the requests of the call.
        prompt, length: tokens of the prompt and of the whole canvas.
        start, end: the first block to decode.
        steps: denoising steps of a block.
        seed: of the request.
    """

    index: int
    prompt: int
    length: int
    start: int
    end: int
    steps: int
    seed: int


class Slots:
    """State of the requests that are decoded together; every attribute is an array of one entry per slot.

    Attributes:
        index: request in this slot, -1 when the slot is free.
        prompt, length, start, end, steps, seed: see `Plan`; start and end are the current block's.
        num_masked: positions of the current block that were masked when it began.
        left: positions of it that are masked now.
        block_step, step: denoising steps taken in this block, and in all.
        post_step: those taken in it after its last mask was revealed.
        fresh: the block has not been denoised yet, and its first forward is a longer one.
        stopped: an end token was revealed.
    """

    def __init__(self, count: int, longer_first: bool):
        """
        Args:
            longer_first: the first forward of a block is longer than its others (there is a cache).
        """
        self.longer_first = longer_first
        self.index = np.full(count, -1, dtype=np.int64)
        self.prompt, self.length, self.start, self.end, self.steps, self.seed = (
            np.zeros(count, dtype=np.int64) for _ in range(6)
        )
        self.num_masked, self.left, self.block_step, self.post_step, self.step = (
            np.zeros(count, dtype=np.int64) for _ in range(5)
        )
        self.fresh, self.stopped = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)

    def free(self) -> np.ndarray:
        return np.flatnonzero(self.index < 0)

    def admit(self, slot: int, plan: Plan, fresh: bool) -> None:
        for name, value in vars(plan).items():
            getattr(self, name)[slot] = value
        self.step[slot], self.stopped[slot] = 0, False
        self._enter(np.array([slot]), fresh)

    def _enter(self, slots: np.ndarray, fresh: bool) -> None:
        self.block_step[slots] = self.post_step[slots] = 0
        self.fresh[slots] = fresh
        masked = self.end[slots] - np.maximum(self.start[slots], self.prompt[slots])
        self.num_masked[slots] = self.left[slots] = masked

    def prefills(self, admitted: dict[int, Sequence[int]]) -> tuple[dict[int, list[int]], list[list[int]]]:
        """Which new prompts are forwarded to fill the cache.

        Args:
            admitted: slot -> prompt, from the longest request to the shortest.

        Returns:
            each slot that is forwarded -> slots of an equal prompt, which take a copy; and the forwarded slots in
            batches of like length, which pad little.
        """
        first: dict[tuple[int, ...], int] = {}
        copies: dict[int, list[int]] = {}
        for slot, prompt in admitted.items():
            if self.start[slot] > 0:
                source = first.setdefault(tuple(prompt), slot)
                copies.setdefault(source, [])
                if source != slot:
                    copies[source].append(slot)
        batches: list[list[int]] = []
        for slot in copies:
            if not batches or self.start[slot] < 0.75 * self.start[batches[-1][0]]:
                batches.append([])
            batches[-1].append(slot)
        return copies, batches

    def next_group(self) -> np.ndarray:
        """The slots to forward now, ascending; none when all are free.

        First forwards of a block are longer, so they do not share a batch with the others. Only the larger
        of the two groups runs. The smaller waits, at most until the others finish a block and join it:
        requests fall into step, and a forward serves at least half of them.
        """
        active = self.index >= 0
        first, later = np.flatnonzero(active & self.fresh), np.flatnonzero(active & ~self.fresh)
        return first if len(first) >= len(later) else later

    def after_step(
        self,
        group: np.ndarray,
        revealed: np.ndarray,
        ended: np.ndarray,
        block: int | None,
        busy: np.ndarray | None = None,
    ) -> np.ndarray:
        """Count a step of the group; enter next blocks.

        Args:
            group: int64 [N], the slots that were forwarded.
            revealed: int64 [N], positions each revealed, less those it masked again.
            ended: bool [N], whether an end token was among them.
            block: block length, None when the response is one block, or blocks of chosen lengths.
            busy: bool [N], whose block is not done although nothing in it is masked.

        Returns:
            slots whose request is done, freed; what they held stays readable until they are used again.
        """
        self.step[group] += 1
        self.block_step[group] += 1
        self.left[group] -= revealed
        self.stopped[group] |= ended
        self.fresh[group] = False
        complete = group[(self.left[group] == 0) if busy is None else (self.left[group] == 0) & ~busy]
        over = self.stopped[complete] | (self.end[complete] == self.length[complete])
        onward = complete[~over]
        if len(onward):
            self.start[onward] = self.end[onward]
            # Where the policy chooses lengths, it says the next end before the next step.
            self.end[onward] = self.length[onward] if block is None else self.end[onward] + block
            self._enter(onward, fresh=self.longer_first)
        self.index[complete[over]] = -1
        return complete[over]
