"""Group advantages by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rl.advantages import (
    contrast_advantage,
    group_advantage,
    select_steps,
    step_advantage,
    step_values,
    zero_variance_groups,
)

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
        # All six rewards: mean 10/6, mean square 36/6, variance 6 - 25/9 = 29/9.
        ("mean", "reward_std", [x * 3 / math.sqrt(29) for x in (0.5, -0.5, -1, -0.5, 1, 0.5)]),
    ],
)
def test_advantages_by_hand(baseline: str, scale: str, expected: list[float]) -> None:
    advantage = group_advantage(REWARD, GROUP, baseline, scale, eps=0.0)
    assert advantage.tolist() == pytest.approx(expected)


def test_eps_keeps_a_group_without_variance_finite() -> None:
    flat = vector(2, 2, 2)
    group = torch.zeros(3, dtype=torch.int64)
    for baseline in ("mean", "leave_one_out"):
        for scale in ("none", "std", "reward_std", "batch_std"):
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
    # 1, 0 and 7: mean 8/3, mean square 50/3, variance 86/9.
    scaled = group_advantage(reward, group, "mean", "reward_std", eps=0.0)
    assert scaled[[0, 2, 3]].tolist() == pytest.approx([1.5 / math.sqrt(86), -1.5 / math.sqrt(86), 0])


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["none", "std", "reward_std", "batch_std"])
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
    # Equal; unequal; one score; no score; alone, which nothing is equal to.
    assert zero_variance_groups(reward, group).tolist() == [True, False, True, False, False]
    # Equal at the end, and at step 0 too for the first; what the shorter rollout of the last has not is no difference.
    steps = torch.tensor([[2, 1], [2, 1], [1, 0], [1, 1], [3, 1], [1, 1], [NAN, NAN], [NAN, NAN], [4, NAN]])
    ended = vector(1, 1, 1, 1, 1, 1, NAN, NAN, 4)
    assert zero_variance_groups(ended, group, steps.double()).tolist() == [True, False, False, False, False]
    assert zero_variance_groups(vector(), group[:0]).tolist() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baseline": "median"}, r"algorithm\.baseline must be mean or leave_one_out, got 'median'"),
        ({"scale": "max"}, r"algorithm\.scale must be none, std, reward_std or batch_std, got 'max'"),
    ],
)
def test_unknown_choices_are_errors(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantage(REWARD, GROUP, **settings)


def test_a_contrast_of_softmaxes_by_hand() -> None:
    """psi = 1/log 2 turns advantages 1, 0, -1 into weights 2, 1, 1/2 of a sum of 7/2, and the reverse."""
    advantage = vector(1, 0, 7, -1, NAN)
    group = torch.tensor([0, 0, 1, 0, 0])
    weight = contrast_advantage(advantage, group, temperature=1 / math.log(2))
    assert weight.tolist() == pytest.approx([3 / 7, 0, 0, -3 / 7, NAN], nan_ok=True)
    # For a large psi it is the centred advantage, times 2 / (psi |group|).
    large = contrast_advantage(vector(1, -1), torch.tensor([0, 0]), temperature=1e6)
    assert large.tolist() == pytest.approx([1e-6, -1e-6])


# Right at the second step only, and right from the third on; the second rollout is one step shorter.
STEPS = torch.tensor([[0, 1, 0, 0], [0, 0, 1, NAN]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("final", [[0, 0, 0, 0], [1, 1, 1, NAN]]),
        ("step", [[0, 1, 0, 0], [0, 0, 1, NAN]]),
        ("future", [[1 / 3, 0, 0, 0], [1 / 2, 1, 1, NAN]]),
        ("delta", [[0, 1, -1, 0], [0, 0, 1, NAN]]),
        ("delta_future", [[1 / 3, 1, -1, 0], [1 / 2, 1, 2, NAN]]),
    ],
)
def test_what_a_step_is_credited_with_by_hand(kind: str, expected: list[list[float]]) -> None:
    for row, wanted in zip(step_values(STEPS, kind).tolist(), expected, strict=True):
        assert row == pytest.approx(wanted, nan_ok=True)


def test_the_deltas_of_a_rollout_add_up_to_its_final_reward() -> None:
    reward = torch.rand(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(step_values(reward, "delta").sum(1), reward[:, -1])


def test_a_rollout_with_an_unscored_step_is_left_out() -> None:
    reward = torch.tensor([[1, NAN, 1], [NAN, NAN, NAN], [1, 0, NAN]], dtype=torch.float64)
    for kind in ("final", "step", "future", "delta", "delta_future"):
        value = step_values(reward, kind)
        assert value.isnan().tolist() == [[True] * 3, [True] * 3, [False, False, True]]


def test_a_step_is_compared_with_its_cell_by_hand() -> None:
    value = torch.tensor([[1, 2], [3, NAN], [5, 6]], dtype=torch.float64)
    by_index = torch.tensor([[0, 1]] * 3)
    # Means 3 and 4; sample standard deviations 2 and sqrt(8).
    plain = step_advantage(value, by_index, "none")
    assert plain.flatten().tolist() == pytest.approx([-2, -2, 0, NAN, 2, 2], nan_ok=True)
    scaled = step_advantage(value, by_index, "std", eps=0.0)
    assert scaled.flatten().tolist() == pytest.approx([-1, -1 / math.sqrt(2), 0, NAN, 1, 1 / math.sqrt(2)], nan_ok=True)
    # Other cells: 1 and 3 share one, 2 and 6 another, 5 is alone.
    cells = torch.tensor([[0, 7], [0, 0], [3, 7]])
    assert step_advantage(value, cells, "none").flatten().tolist() == pytest.approx([-1, -2, 1, NAN, 0, 2], nan_ok=True)
    assert step_advantage(value, cells, "std")[2, 0] == 0


def test_which_steps_are_trained() -> None:
    advantage = torch.tensor([[0.1, -3, NAN, 2, 0.5, -2], [NAN] * 6], dtype=torch.float64)
    largest = select_steps(advantage, 3, "largest", [5, 6])
    assert largest.nonzero().tolist() == [[0, 1], [0, 3], [0, 5]]
    for how in ("largest", "uniform", "stratified", "surprisal"):
        everything = select_steps(advantage, 9, how, [5, 6], torch.zeros_like(advantage))
        assert everything.nonzero().tolist() == [[0, 0], [0, 1], [0, 3], [0, 4], [0, 5]]
        few = select_steps(advantage, 2, how, [5, 6], torch.zeros_like(advantage))
        assert few.sum(1).tolist() == [2, 0]
        # A rollout's own seed decides, whatever else is in the batch.
        assert select_steps(advantage[:1], 2, how, [5], torch.zeros(1, 6)).tolist() == few[:1].tolist()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        # 2 of 6 steps, each alike; one of each half; log-odds 0 or log 3 of one step out of six.
        ("uniform", [1 / 3] * 6),
        ("stratified", [1 / 3] * 6),
        ("surprisal", [3 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 8]),
    ],
)
def test_how_often_a_step_is_trained(how: str, expected: list[float]) -> None:
    n = 4000
    advantage = torch.ones(n, 6, dtype=torch.float64)
    surprisal = torch.zeros_like(advantage)
    surprisal[:, 0] = math.log(3)
    chosen = select_steps(advantage, 1 if how == "surprisal" else 2, how, range(n), surprisal)
    for share, wanted in zip(chosen.double().mean(0).tolist(), expected, strict=True):
        assert abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / n)
    if how == "stratified":
        assert (chosen[:, :3].sum(1) == 1).all() and (chosen[:, 3:].sum(1) == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: step_values(STEPS, "best"), r"algorithm\.credit must be one of final, step, .*, got 'best'"),
        (lambda: step_advantage(STEPS, STEPS.long(), "max"), r"algorithm\.scale must be std or none .*, got 'max'"),
        (lambda: select_steps(STEPS, 1, "all", [0, 1]), r"algorithm\.select must be largest, .*, got 'all'"),
    ],
)
def test_unknown_step_choices_are_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_steps_of_equal_value_have_no_advantage_whatever_the_rounding() -> None:
    """The mean of three 0.1 is not 0.1; divided by a standard deviation of nearly 0 the difference would be trained."""
    value = torch.full((3, 4), 0.1, dtype=torch.float64)
    cell = torch.arange(4).expand(3, 4)
    assert step_advantage(value, cell, "std").tolist() == [[0.0] * 4] * 3
