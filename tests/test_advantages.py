"""Group advantages by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rl.advantages import group_advantage, zero_variance_groups

NAN = math.nan


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Group 0: 1, 0, 0, 1 (mean 1/2); group 1: 3, 5 (mean 4).
REWARD = vector(1, 0, 3, 0, 5, 1)
GROUP = torch.tensor([0, 0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        ("mean", "none", [0.5, -0.5, -1, -0.5, 1, 0.5]),
        # The mean of the others: 1/3 for a 1, 2/3 for a 0; 5 for the 3, 3 for the 5.
        ("leave_one_out", "none", [2 / 3, -2 / 3, -2, -2 / 3, 2, 2 / 3]),
        # Population standard deviations 1/2 and 1.
        ("mean", "std", [1, -1, -1, -1, 1, 1]),
        ("leave_one_out", "std", [4 / 3, -4 / 3, -2, -4 / 3, 2, 4 / 3]),
        # All six centred rewards: mean square (4 * 1/4 + 2) / 6 = 1/2.
        ("mean", "batch_std", [x * math.sqrt(2) for x in (0.5, -0.5, -1, -0.5, 1, 0.5)]),
    ],
)
def test_advantages_by_hand(baseline: str, scale: str, expected: list[float]) -> None:
    advantage = group_advantage(REWARD, GROUP, baseline, scale, eps=0.0)
    assert advantage.tolist() == pytest.approx(expected)


def test_eps_keeps_a_group_without_variance_finite() -> None:
    flat = vector(2, 2, 2)
    group = torch.zeros(3, dtype=torch.int64)
    for baseline in ("mean", "leave_one_out"):
        for scale in ("none", "std", "batch_std"):
            assert group_advantage(flat, group, baseline, scale).tolist() == [0, 0, 0]
    assert group_advantage(vector(0, 2), group[:2], "mean", "std", eps=1.0).tolist() == [-0.5, 0.5]


def test_a_missing_reward_takes_no_part() -> None:
    """Never as 0: the baseline of the others must not move (`[1, 0]` has mean 1/2, not 1/3)."""
    reward = vector(1, NAN, 0, 7, NAN)
    group = torch.tensor([0, 0, 0, 1, 1])
    expected = {"mean": [0.5, NAN, -0.5, 0, NAN], "leave_one_out": [1, NAN, -1, 0, NAN]}
    for baseline, values in expected.items():
        assert group_advantage(reward, group, baseline).tolist() == pytest.approx(values, nan_ok=True)
    scaled = group_advantage(reward, group, "mean", "std", eps=0.0)
    assert scaled[[0, 2]].tolist() == pytest.approx([1, -1])
    # Over the three that are scored: mean square (1/4 + 1/4 + 0) / 3.
    scaled = group_advantage(reward, group, "mean", "batch_std", eps=0.0)
    assert scaled[[0, 2, 3]].tolist() == pytest.approx([0.5 * math.sqrt(6), -0.5 * math.sqrt(6), 0])
    assert scaled[[1, 4]].isnan().all()


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["none", "std", "batch_std"])
def test_nothing_scored_nothing_learned(baseline: str, scale: str) -> None:
    group = torch.tensor([0, 0, 1])
    assert group_advantage(vector(NAN, NAN, NAN), group, baseline, scale).isnan().all()
    assert group_advantage(vector(), group[:0], baseline, scale).tolist() == []


def test_a_lonely_rollout_has_nothing_to_compare_with() -> None:
    assert group_advantage(vector(5.0), torch.tensor([0]), "leave_one_out").tolist() == [0.0]
    assert group_advantage(vector(5.0), torch.tensor([0]), "mean").tolist() == [0.0]


def test_a_groups_advantages_do_not_depend_on_the_other_groups() -> None:
    together = group_advantage(REWARD, GROUP, "leave_one_out", "std")
    for index in (0, 1):
        mine = group_advantage(REWARD[index == GROUP], torch.zeros_like(GROUP)[index == GROUP], "leave_one_out", "std")
        assert together[index == GROUP].tolist() == mine.tolist()


def test_groups_without_variance() -> None:
    reward = vector(1, 1, 0, 1, NAN, 1, NAN, NAN, 4)
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4])
    # Equal; unequal; one score; no score; alone.
    assert zero_variance_groups(reward, group).tolist() == [True, False, True, True, True]
    assert zero_variance_groups(vector(), group[:0]).tolist() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baseline": "median"}, r"algorithm\.baseline must be mean or leave_one_out, got 'median'"),
        ({"scale": "max"}, r"algorithm\.scale must be none, std or batch_std, got 'max'"),
    ],
)
def test_unknown_choices_are_errors(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantage(REWARD, GROUP, **settings)
