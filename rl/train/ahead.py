"""The rollouts of the next RL step, sampled by workers while the learner works on this one."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl import distributed
from rollouts.engines.base import Engine, EngineStats, check_versions


class Ahead:
    """One call of an engine that runs in a thread. Its result is part of a checkpoint, so that a resumed run learns
    from what the undisturbed one would have learned from.
    """

    # Checkpoints ask it of everything they save: nothing here is cut over ranks by DeepSpeed.
    stage = 0

    def __init__(self, modality: Any, group_size: int):
        self.modality, self.group_size = modality, group_size
        self._thread: threading.Thread | None = None
        self._result: tuple[list[Any], EngineStats] | None = None
        self._error: BaseException | None = None

    def begun(self) -> bool:
        return self._thread is not None or self._result is not None

    def begin(self, engine: Engine, requests: Sequence[Any], policy_version: int) -> None:
        """Start to sample; one call at a time."""
        assert not self.begun()
        self._thread = threading.Thread(target=self._sample, args=(engine, requests, policy_version), daemon=True)
        self._thread.start()

    def _sample(self, engine: Engine, requests: Sequence[Any], policy_version: int) -> None:
        try:
            trajectories = engine.generate(requests, policy_version)
            check_versions(trajectories, policy_version)
            self._result = trajectories, engine.stats
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Until the rollouts that were begun are there.

        Raises:
            whatever the engine raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def take(self) -> tuple[list[Any], EngineStats]:
        """The trajectories of this rank, and the work they took."""
        self.wait()
        assert self._result is not None
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Wait for the thread of an engine that was closed."""
        if self._thread is not None:
            self._thread.join(timeout=60)

    def save_state(self, folder: Path) -> None:
        """Write the rollouts that were begun, if any; every rank writes its part."""
        folder.mkdir(parents=True, exist_ok=True)
        self.wait()
        if self._result is None:
            return
        trajectories, stats = self._result
        rank = distributed.rank()
        self.modality.save_trajectories(folder / f"rank_{rank}.npz", trajectories)
        (folder / f"rank_{rank}.json").write_text(json.dumps(vars(stats)))

    def load_state(self, folder: Path, universal: bool = False) -> None:
        """Read what the ranks wrote, and keep this rank's share of it, however many there were."""
        parts = sorted(folder.glob("rank_*.npz"), key=lambda path: int(path.stem[5:]))
        if not parts:
            return
        trajectories = [t for part in parts for t in self.modality.load_trajectories(part)]
        stats = EngineStats()
        if len(parts) == distributed.world_size():
            stats = EngineStats(**json.loads((folder / f"rank_{distributed.rank()}.json").read_text()))
        elif distributed.rank() == 0:
            for part in parts:
                stats.add(EngineStats(**json.loads(part.with_suffix(".json").read_text())))
        group_size = self.group_size
        first, mine = distributed.shard(range(len(trajectories) // group_size))
        self._result = trajectories[first * group_size : (first + len(mine)) * group_size], stats
