"""Several reward parts into one number per completion. Pure functions on lists; None means no score.

Two published ways to combine parts:

* sum, then normalise (GRPO's usual): `weighted_sum` here, group normalisation later as the advantage;
* normalise each part, then sum (decoupled, as in LightningRL and GDPO): `normalize` each part, then `weighted_sum`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

from rewards.score import Score

NORMALIZATIONS = ("none", "group", "batch")


def normalize(
    values: Sequence[float | None], how: str, groups: Sequence[Hashable], eps: float = 1e-4
) -> list[float | None]:
    """Centre and scale one part: (value - mean) / (std + eps) over its group or over the batch.

    Args:
        values: one per completion; None is left out of the statistics and stays None.
        how: "none", "group" (completions of one prompt) or "batch".
        groups: which group each completion belongs to.
        eps: added to the standard deviation (n - 1 in the denominator, 0 for a single value), as in TRL.
    """
    if how not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, got '{how}'")
    if how == "none":
        return list(values)
    keys: Sequence[Hashable] = groups if how == "group" else [None] * len(values)
    members: dict[Hashable, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        if value is not None:
            members.setdefault(key, []).append(value)
    statistics = {key: _mean_std(present) for key, present in members.items()}
    return [
        None if value is None else (value - statistics[key][0]) / (statistics[key][1] + eps)
        for key, value in zip(keys, values, strict=True)
    ]


def weighted_sum(
    parts: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
    failed: Mapping[str, Sequence[bool]],
) -> list[float | None]:
    """Sum of weight x value over the parts of each completion.

    A part without value is left out when it does not apply (TRL's `None`). When it *failed*, the completion has
    no reward: the sum of the other parts would be a different reward. So has one to which no part applies.
    A part of weight 0 is only logged and can neither give nor take away a reward.
    """
    count = len(next(iter(parts.values()), []))
    combined: list[float | None] = []
    for item in range(count):
        present = [name for name in parts if weights[name] and parts[name][item] is not None]
        broken = any(weights[name] and failed[name][item] for name in parts)
        if broken or not present:
            combined.append(None)
        else:
            combined.append(math.fsum(weights[name] * (parts[name][item] or 0.0) for name in present))
    return combined


def weighted_steps(parts: Mapping[str, Sequence[Score]], weights: Mapping[str, float]) -> list[list[float] | None]:
    """Per-step sum of weight x steps over the parts that judge steps; None where no part does.

    Raises:
        ValueError: when two parts give a different number of steps for one completion.
    """
    count = len(next(iter(parts.values()), []))
    combined: list[list[float] | None] = []
    for item in range(count):
        given = {name: scores[item].steps for name, scores in parts.items() if weights[name]}
        steps = {name: list(values) for name, values in given.items() if values is not None}
        lengths = {name: len(values) for name, values in steps.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"reward parts disagree on the number of steps of completion {item}: {lengths}")
        columns = zip(*([weights[name] * value for value in values] for name, values in steps.items()), strict=True)
        combined.append([math.fsum(column) for column in columns] if steps else None)
    return combined


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
