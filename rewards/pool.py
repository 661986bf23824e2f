"""Reward processes with hard limits: started, fed, watched, killed and replaced by the runner."""

from __future__ import annotations

import json
import pickle
import selectors
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence

from rewards.call import Outcome
from rewards.child import Child, WorkerLostError
from rewards.jobs import Batch, Job
from rewards.table import RewardPart
from rewards.wire import outcome_from_json

TICK_SECONDS = 0.25  # how often a long call is checked for death without end-of-file and for forked processes
START_ATTEMPTS = 3


class WorkerPool:
    """`num_workers` processes, each with every reward loaded.

    Args:
        parts: part number -> reward.
        num_workers: processes.
        timeout_seconds: wall limit of one call.
        memory_mb: memory limit of a process in MiB, None for none.
        load_seconds: wall limit for a process to load all rewards.

    Raises:
        ValueError: when a reward cannot be loaded.
    """

    def __init__(
        self,
        parts: Mapping[int, RewardPart],
        num_workers: int,
        timeout_seconds: float,
        memory_mb: int | None,
        load_seconds: float,
    ) -> None:
        self.parts = dict(parts)
        self.timeout_seconds = timeout_seconds
        self.memory_mb = memory_mb
        self.load_seconds = load_seconds
        self._calls = 0
        self._children: list[Child] = []
        try:
            for _ in range(num_workers):
                self._children.append(self._start())
            for child in self._children:
                self._finish_start(child)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill every worker and whatever it started."""
        for child in self._children:
            child.kill()
        self._children = []

    def run(self, jobs: Sequence[Job], batch: Batch) -> Generator[tuple[Job, Outcome], None, None]:
        """Yield every job with its outcome, in order of completion.

        Closing the iterator early kills the workers that are still busy.
        """
        waiting = deque(jobs)
        try:
            while waiting or any(child.job for child in self._children):
                for slot, child in enumerate(self._children):
                    if waiting and child.job is None:
                        child = self._ready(slot)
                        self._send(child, waiting[0], batch)
                        child.job = waiting.popleft()
                yield from self._collect()
        finally:
            for child in self._children:
                if child.job is not None:
                    child.kill()
                    child.job = None

    def _start(self) -> Child:
        child = Child(self.memory_mb, self.load_seconds)
        for number, part in self.parts.items():
            child.send({"load": (number, part.name, dict(part.params))})
        child.deadline = time.monotonic() + self.load_seconds
        return child

    def _finish_start(self, child: Child) -> None:
        """Wait until every reward is loaded."""
        for part in self.parts.values():
            answer = child.receive(child.deadline)
            if answer is None:
                raise WorkerLostError(f"reward '{part.name}' was not loaded in {self.load_seconds:g} s")
            if answer["error"]:
                raise ValueError(answer["error"])

    def _ready(self, slot: int) -> Child:
        """The child of this slot, replaced when it is dead."""
        for attempt in range(START_ATTEMPTS):
            if self._children[slot].alive:
                return self._children[slot]
            self._children[slot].kill()  # it may have died by itself: end what it started, free its socket
            self._children[slot] = self._start()
            try:
                self._finish_start(self._children[slot])
            except WorkerLostError:
                self._children[slot].kill()
                if attempt + 1 == START_ATTEMPTS:
                    raise
        return self._children[slot]

    def _send(self, child: Child, job: Job, batch: Batch) -> None:
        prompts, completions, columns = batch.select(job.indices, self.parts[job.part].columns)
        try:
            arguments = pickle.dumps((prompts, completions, columns, batch.trainer_state))
        except Exception as error:
            raise ValueError(
                f"a dataset column cannot be sent to a reward process ({type(error).__name__}: {error}); "
                f"drop it or set mode='inline' for the reward"
            ) from error
        self._calls += 1
        child.call = self._calls
        child.deadline = time.monotonic() + self.timeout_seconds
        # A dead child shows in _collect; its job is then booked like any crash.
        child.send(
            {
                "call": child.call,
                "part": job.part,
                "timeout_seconds": self.timeout_seconds,
                "arguments": arguments,
            }
        )

    def _collect(self) -> Iterator[tuple[Job, Outcome]]:
        """Wait for something to happen to a busy child; yield the jobs that are over."""
        busy = [child for child in self._children if child.job is not None]
        with selectors.DefaultSelector() as selector:
            for child in busy:
                selector.register(child.channel, selectors.EVENT_READ)
            patience = min(child.deadline for child in busy) - time.monotonic()
            selector.select(max(0.0, min(patience, TICK_SECONDS)))
        for child in busy:
            outcome = self._outcome(child)
            if outcome is not None:
                job, child.job = child.job, None
                assert job is not None
                yield job, outcome

    def _outcome(self, child: Child) -> Outcome | None:
        assert child.job is not None
        try:
            answer = child.poll()
            if answer is not None:
                outcome = outcome_from_json(answer["outcome"])
                if answer["call"] != child.call or (
                    outcome.error is None and len(outcome.scores) != len(child.job.indices)
                ):
                    raise WorkerLostError("the reward process answered something else than was asked")
                if answer["replace"]:
                    child.kill()
                return outcome
        except WorkerLostError as error:
            seconds = time.monotonic() - child.deadline + self.timeout_seconds
            child.kill()
            return Outcome(error=str(error), seconds=seconds)
        except (ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
            child.kill()
            return Outcome(error=f"the reward process sent an unreadable answer: {error}")
        if time.monotonic() < child.deadline:
            return None
        child.kill()
        return Outcome(error=f"timeout after {self.timeout_seconds:g} s", seconds=self.timeout_seconds)
