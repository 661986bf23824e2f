"""Filters as data: which rollouts an update keeps, and what is said about the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl.config import load_config
from rl.sections import FilterConfig
from rl.train.filters import keep_mask

NAN = float("nan")


def run(reward: list[float], group: list[int], overlong: list[bool] | None = None, **options: Any) -> Any:
    mask, _, counts = run_all(reward, group, overlong, **options)
    return mask, counts


def run_all(reward: list[float], group: list[int], overlong: list[bool] | None = None, **options: Any) -> Any:
    mask, counted, counts = keep_mask(
        FilterConfig(**options),
        torch.tensor(reward, dtype=torch.float64),
        torch.tensor(group, dtype=torch.int64),
        torch.tensor(overlong or [False] * len(reward), dtype=torch.bool),
    )
    return mask.tolist(), counted.tolist(), {name.removeprefix("filters/"): value for name, value in counts.items()}


# Prompt 0 always right, 1 never, 2 half, 3 in one of four.
REWARD = [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1]
GROUP = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_equal_rewards_are_left_out_by_default() -> None:
    mask, counts = run(REWARD, GROUP)
    assert mask == [False] * 8 + [True] * 8
    assert counts == {"groups": 4, "zero_variance": 2, "accuracy_band": 0, "overlong": 0, "unscored": 0}


def test_without_filters_everything_is_kept() -> None:
    mask, counts = run(REWARD, GROUP, drop_zero_variance=False)
    assert mask == [True] * 16
    assert counts == {"groups": 4, "zero_variance": 0, "accuracy_band": 0, "overlong": 0, "unscored": 0}


def test_the_accuracy_band_includes_its_ends() -> None:
    """The published band of 0.2 to 0.8; then one that ends exactly at a group's mean."""
    mask, counts = run(REWARD, GROUP, drop_zero_variance=False, accuracy_low=0.2, accuracy_high=0.8)
    assert mask == [False] * 8 + [True] * 8
    assert counts["accuracy_band"] == 2
    mask, counts = run(REWARD, GROUP, drop_zero_variance=False, accuracy_low=0.5, accuracy_high=1.0)
    assert mask == [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4
    assert counts["accuracy_band"] == 2 and counts["unscored"] == 0
    mask, _ = run(REWARD, GROUP, drop_zero_variance=False, accuracy_low=0.0, accuracy_high=0.25)
    assert mask == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 4


def test_without_a_band_every_size_of_reward_is_kept() -> None:
    reward = [3e9, 1e12, -5e10, -4e10]
    mask, counts = run(reward, [0, 0, 1, 1])
    assert mask == [True] * 4 and counts["accuracy_band"] == counts["unscored"] == 0
    mask, counts = run(reward, [0, 0, 1, 1], accuracy_high=0)
    assert mask == [False, False, True, True] and counts["accuracy_band"] == 1 and counts["unscored"] == 0


def test_a_group_counts_for_the_first_filter_that_drops_it() -> None:
    _, counts = run(REWARD, GROUP, accuracy_low=0.3, accuracy_high=0.9)
    assert (counts["zero_variance"], counts["accuracy_band"]) == (2, 1)


def test_overlong_rollouts_go_one_by_one_and_keep_their_groups_mean() -> None:
    """A response that never ended is not trained on; it still was a wrong answer to its prompt."""
    overlong = [False] * 16
    overlong[9] = overlong[0] = True
    mask, counts = run(REWARD, GROUP, overlong, drop_overlong=True, accuracy_low=0.5)
    # Group 2 has mean 0.5 only with its overlong rollout counted as what it scored; 0 would be dropped anyway.
    assert mask == [False] * 8 + [True, False, True, True] + [False] * 4
    assert counts["overlong"] == 2
    mask, counts = run(REWARD, GROUP, overlong)
    assert mask == [False] * 8 + [True] * 8
    assert counts["overlong"] == 0, "not dropped, not counted"


def test_a_failed_reward_is_no_verdict() -> None:
    """It is never kept, it makes no group look mixed, and it moves no mean."""
    mask, counts = run([1, NAN, 1, 0, NAN, 1, NAN, NAN], [0, 0, 1, 1, 1, 1, 2, 2], drop_overlong=True)
    assert mask == [False, False, True, True, False, True, False, False]
    # Group 0 has one score and so no variance, group 2 none.
    assert counts == {"groups": 3, "zero_variance": 1, "accuracy_band": 0, "overlong": 0, "unscored": 4}
    mask, counts = run([1, NAN, NAN, 0], [0, 0, 1, 1], drop_zero_variance=False, accuracy_low=0.9)
    assert mask == [True, False, False, False]
    assert counts["accuracy_band"] == 1


def test_only_work_without_gradient_is_skipped_and_still_averaged_over() -> None:
    """Groups 0 and 1 are flat. What another filter leaves out does not count, and nothing that was replaced does."""
    _, counted, _ = run_all(REWARD, GROUP)
    assert counted == [True] * 16
    # Group 0 is out of the band, flat or not; 3 is in it.
    mask, counted, counts = run_all(REWARD, GROUP, accuracy_high=0.9)
    assert counted == [False] * 4 + [True] * 12 and mask == [False] * 8 + [True] * 8
    assert (counts["zero_variance"], counts["accuracy_band"]) == (2, 0)
    overlong = [True, *[False] * 14, True]
    _, counted, _ = run_all(REWARD, GROUP, overlong, drop_overlong=True)
    assert counted == [False, *[True] * 14, False]
    mask, counted, _ = run_all(REWARD, GROUP, refill_rounds=1)
    assert counted == mask == [False] * 8 + [True] * 8


def test_an_unscored_rollout_is_not_also_overlong() -> None:
    _, counts = run([NAN, 1, 0], [0, 0, 0], [True, True, False], drop_overlong=True)
    assert (counts["overlong"], counts["unscored"]) == (1, 1)


def test_no_rollouts_at_all() -> None:
    mask, counts = run([], [])
    assert mask == [] and counts["groups"] == 0


def test_every_filter_is_an_option() -> None:
    config = load_config(None, ["filters.accuracy_low=0.2", "filters.accuracy_high=0.8", "filters.drop_overlong=true"])
    assert (config.filters.accuracy_low, config.filters.accuracy_high, config.filters.drop_overlong) == (0.2, 0.8, True)
    assert config.filters.drop_zero_variance and config.filters.refill_rounds == 0
    with pytest.raises(ValueError, match=r"filters\.acuracy_low.*accuracy_low"):
        load_config(None, ["filters.acuracy_low=0.2"])
