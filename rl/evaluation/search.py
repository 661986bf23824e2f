"""`denoise-rl rollout --search NAME`: search with the policy, the task and the rewards a config names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from rl.errors import reason_of
from rl.registry import SEARCHES
from rl.tasks.base import Example
from rl.train.rollouts import request_seed
from rl.train.run import Run
from rollouts.search.protocol import Budget, Search, SearchProblem


@dataclass
class SearchedRollouts:
    """S samples that searches found, those of a request together.

    Attributes:
        examples, trajectories, completions: [S].
        request: int64 [S], 0..M-1.
        reward: float64 [S], NaN without a verdict.
        weight: float64 [S], summing to 1 within a request; None when all count the same.
        log_z: float64 [M], estimates of log E exp(reward / alpha), from searches that make one.
        budget: the cost of all requests together.
    """

    examples: list[Example]
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


def parse_search(name: Any, params: Mapping[str, Any]) -> Search:
    """A search with its options.

    Args:
        name: a name of `rl.registry.SEARCHES`, or an address.

    Raises:
        ValueError: one line naming the search or the option, and the fix.
    """
    found = SEARCHES.resolve(name)
    if not (isinstance(found, type) and issubclass(found, Search)):
        raise ValueError(f"search {name!r} is no subclass of rollouts.search.protocol.Search")
    try:
        return found.model_validate(params)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(found.model_fields)
            raise ValueError(f"search {name} has no option {key!r}: it has {known}") from None
        message = reason_of(first)
        where = f"option {key!r} of search {name}" if key else f"search {name}"
        raise ValueError(f"{where}: {message}, got {first['input']!r}") from None


def search_rollouts(
    run: Run, examples: Sequence[Example], search: Search, searches_per_example: int = 1
) -> SearchedRollouts:
    """Search `searches_per_example` times for every example.

    Raises:
        ValueError: a reward that depends on its batch, or a sampler that cannot be searched with.
    """
    for part in run.config.reward.functions:
        if part.normalize != "none":
            raise ValueError(
                f"reward.functions: {part.name} has normalize={part.normalize}, which makes the reward of a sample "
                "depend on its batch: a search needs normalize=none"
            )
    sampler = run.modality.search_sampler(run.engine(run.model), examples)

    def reward(states: Any) -> np.ndarray:
        judged = [examples[row] for row in states.row]
        _, table = run.judge.score(judged, sampler.trajectories(states))
        return np.array([np.nan if value is None else value for value in table.values], dtype=np.float64)

    soft = None
    if search.guided:
        of_samples = run.modality.soft_reward(run)

        def soft(prediction: torch.Tensor, states: Any) -> torch.Tensor:
            return of_samples(prediction, [examples[row] for row in states.row])

    row = np.repeat(np.arange(len(examples)), searches_per_example)
    seed = [request_seed(run.config.run.seed, i, g) for i in range(len(examples)) for g in range(searches_per_example)]
    found = search.run(SearchProblem(sampler, reward, soft), row, np.array(seed, dtype=np.int64))
    trajectories = sampler.trajectories(found.states)
    completions, _ = run.modality.finished(trajectories)
    return SearchedRollouts(
        examples=[examples[i] for i in found.states.row],
        trajectories=trajectories,
        completions=completions,
        request=found.request,
        reward=found.reward,
        weight=found.weight,
        log_z=found.log_z,
        budget=found.budget,
    )


def write_search(folder: Path, run: Run, name: str, search: Search, found: SearchedRollouts) -> None:
    """`trajectories.npz`, `rollouts.jsonl` with a line per sample, and `search.json`: the options and the budget."""
    run.modality.save_trajectories(folder / "trajectories.npz", found.trajectories)
    with (folder / "rollouts.jsonl").open("w") as file:
        for i, (example, completion) in enumerate(zip(found.examples, found.completions, strict=True)):
            line = {
                "prompt": example["prompt"],
                "completion": run.modality.sample_line(completion),
                "reward": None if np.isnan(found.reward[i]) else float(found.reward[i]),
                "request": int(found.request[i]),
            }
            if found.weight is not None:
                line["weight"] = float(found.weight[i])
            file.write(json.dumps(line) + "\n")
    summary = {
        "search": name,
        "params": search.model_dump(),
        "seed": run.config.run.seed,
        "num_requests": found.num_requests,
        "num_samples": len(found.reward),
        "mean_reward": found.mean_reward(),
        "budget": asdict(found.budget),
        "log_z": None if found.log_z is None else found.log_z.tolist(),
    }
    (folder / "search.json").write_text(json.dumps(summary, indent=1))
