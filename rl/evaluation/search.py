"""`denoise-rl rollout --search NAME`: search with the policy, the task and the rewards a config names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl.tasks.base import Row
from rl.train.rollouts import request_seed
from rl.train.run import Run
from rollouts.search.options import SearchOptions
from rollouts.search.protocol import Budget, Problem
from rollouts.search.run import search


@dataclass
class SearchedRollouts:
    """What a search found: S samples, those of a request together.

    Attributes:
        rows, trajectories, completions: [S].
        request: int64 [S], 0..M-1.
        reward: float64 [S], NaN without a verdict.
        weight: float64 [S], summing to 1 within a request; None when all count the same.
        log_z: float64 [M], estimates of log E exp(reward / alpha), from searches that make one.
        budget: the cost of all requests together.
    """

    rows: list[Row]
    trajectories: list[Any]
    completions: list[Any]
    request: np.ndarray
    reward: np.ndarray
    weight: np.ndarray | None
    log_z: np.ndarray | None
    budget: Budget

    @property
    def num_requests(self) -> int:
        return int(self.request[-1]) + 1

    def mean_reward(self) -> float:
        """Mean over requests of their (weighted) mean reward; samples without a verdict do not count."""
        weight = np.ones(len(self.reward)) if self.weight is None else self.weight
        judged = ~np.isnan(self.reward)
        totals = np.bincount(self.request[judged], (weight * self.reward)[judged], self.num_requests)
        shares = np.bincount(self.request[judged], weight[judged], self.num_requests)
        return float((totals[shares > 0] / shares[shares > 0]).mean()) if judged.any() else float("nan")


def search_rollouts(
    run: Run, rows: Sequence[Row], name: str, options: SearchOptions, searches_per_row: int = 1
) -> SearchedRollouts:
    """Search `searches_per_row` times for every row.

    Raises:
        ValueError: a reward that depends on its batch, or a sampler that cannot be searched with.
    """
    for part in run.config.reward.functions:
        if part.normalize != "none":
            raise ValueError(
                f"reward.functions: {part.name} has normalize={part.normalize}, which makes the reward of a sample "
                "depend on its batch: a search needs normalize=none"
            )
    sampler = run.modality.search_sampler(run.engine(run.model), rows)

    def reward(states: Any) -> np.ndarray:
        judged = [rows[row] for row in states.row]
        _, table = run.judge.score(judged, sampler.trajectories(states))
        return np.array([np.nan if value is None else value for value in table.values], dtype=np.float64)

    soft = None
    if name in ("guidance", "tds"):
        if not hasattr(sampler, "guided_step"):
            raise ValueError(
                f"--search {name} follows a reward's gradient in text only: choose another search for images"
            )
        from rl.modalities.soft_text import SoftTextReward

        of_response = SoftTextReward(run)

        def soft(prediction: torch.Tensor, states: Any) -> torch.Tensor:
            return of_response(prediction, [rows[row] for row in states.row])

    row = np.repeat(np.arange(len(rows)), searches_per_row)
    seed = [request_seed(run.config.run.seed, i, g) for i in range(len(rows)) for g in range(searches_per_row)]
    found = search(name, Problem(sampler, reward, soft), row, np.array(seed, dtype=np.int64), options)
    trajectories = sampler.trajectories(found.states)
    completions, _ = run.modality.finished(trajectories)
    return SearchedRollouts(
        rows=[rows[i] for i in found.states.row],
        trajectories=trajectories,
        completions=completions,
        request=found.request,
        reward=found.reward,
        weight=found.weight,
        log_z=found.log_z,
        budget=found.budget,
    )


def write_search(folder: Path, run: Run, name: str, options: SearchOptions, found: SearchedRollouts) -> None:
    """`trajectories.npz`, `rollouts.jsonl` with a line per sample, and `search.json`: the options and the budget."""
    run.modality.save_trajectories(folder / "trajectories.npz", found.trajectories)
    with (folder / "rollouts.jsonl").open("w") as file:
        for i, (row, completion) in enumerate(zip(found.rows, found.completions, strict=True)):
            line = {
                "prompt": row["prompt"],
                "completion": run.modality.sample_line(completion),
                "reward": None if np.isnan(found.reward[i]) else float(found.reward[i]),
                "request": int(found.request[i]),
            }
            if found.weight is not None:
                line["weight"] = float(found.weight[i])
            file.write(json.dumps(line) + "\n")
    summary = {
        "search": name,
        "params": options.model_dump(),
        "seed": run.config.run.seed,
        "num_requests": found.num_requests,
        "num_samples": len(found.reward),
        "mean_reward": found.mean_reward(),
        "budget": asdict(found.budget),
        "log_z": None if found.log_z is None else found.log_z.tolist(),
    }
    (folder / "search.json").write_text(json.dumps(summary, indent=1))
