"""Rollouts of several batches as one, and an engine that cannot do what a run needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rl.train import rollouts
from rl.train.rollouts import RolloutSource, ScoredRollouts
from rollouts.engines.base import Capabilities, EngineStats


def scored(rewards: list[float], group: list[int], metrics: dict[str, float]) -> ScoredRollouts:
    count = len(rewards)
    return ScoredRollouts(
        examples=[{"prompt": str(index)} for index in range(count)],
        trajectories=list(range(count)),
        completions=["a"] * count,
        reward=torch.tensor(rewards, dtype=torch.float64),
        group=torch.tensor(group),
        keep=torch.ones(count, dtype=torch.bool),
        counted=torch.ones(count, dtype=torch.bool),
        process_rewards=[],
        reward_metrics=metrics,
        filtered={"filters/groups": float(max(group) + 1)},
        stats=EngineStats(forwards=3),
        reward_seconds=0.5,
        reward_queries=count,
        parts=[{}] * count,
    )


def test_batches_join_although_a_reward_reports_a_number_in_one_of_them_alone() -> None:
    first = scored([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1], {"reward/x": 0.75, "reward/x/failures": 2.0})
    second = scored([0.0, 0.0], [0, 0], {"reward/x": 0.0})
    joined = ScoredRollouts.join([first, second])
    assert joined.reward.tolist() == [1, 0, 1, 1, 0, 0] and joined.group.tolist() == [0, 0, 1, 1, 2, 2]
    # The mean is over completions, 4 of 0.75 and 2 of 0; failures add up.
    assert joined.reward_metrics == {"reward/x": 0.5, "reward/x/failures": 2.0}
    assert joined.filtered == {"filters/groups": 3.0} and joined.stats.forwards == 6
    assert (joined.reward_seconds, joined.reward_queries, joined.step_reward) == (1.0, 6, None)


def test_an_engine_that_lacks_what_the_run_needs_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    engine = SimpleNamespace(capabilities=lambda: Capabilities(policy_version=True), close=lambda: closed.append(True))
    monkeypatch.setattr(rollouts, "open_engine", lambda *given: engine)
    monkeypatch.setattr(rollouts, "engine_needs", lambda config: {"remasking": "sampler.reviser p2"})
    options = SimpleNamespace(
        rollout=SimpleNamespace(engine="server", asynchronous=False), train=SimpleNamespace(steps=1)
    )
    run: Any = SimpleNamespace(config=options, model=None, modality=None, folder=None)
    with pytest.raises(ValueError, match=r"sampler\.reviser p2"):
        RolloutSource.open(run)
    assert closed == [True]
