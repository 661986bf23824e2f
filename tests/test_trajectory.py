"""The trajectory record: replay, bookkeeping, validation, and files."""

from __future__ import annotations

import zipfile
from dataclasses import replace

import numpy as np
import pytest

from rollouts.trajectory import TokenTrajectory, load_trajectories, save_trajectories

MASK = 9


def edited(prompt: list[int], length: int, edits: list[tuple[int, int, int]], **fields: object) -> TokenTrajectory:
    """A trajectory from (step, position, token) triples."""
    step, position, token = (np.array(column) for column in zip(*edits, strict=True))
    settings = {
        "num_steps": int(step.max()) + 1,
        "stop_length": length - len(prompt),
        "logprob": -0.5 - 0.1 * np.arange(len(step)),
        "confidence": np.full(len(step), 0.25, dtype=np.float32),
        "sampler": {"temperature": 0.7, "top_p": 0.9, "top_k": 5},
        **fields,
    }
    return TokenTrajectory(
        prompt_ids=np.array(prompt), length=length, mask_token_id=MASK, step=step, position=position, token=token,
        **settings,
    )  # fmt: skip


def revealed() -> TokenTrajectory:
    return edited([5, 6], 6, [(0, 4, 1), (1, 2, 2), (1, 5, 3), (2, 3, 4)])


def revised() -> TokenTrajectory:
    """Reveals 2 and 3, takes 3 back, writes another token over 2, reveals 3 again."""
    return edited([5], 4, [(0, 1, 1), (0, 3, 7), (1, 3, MASK), (1, 2, 2), (2, 1, 8), (3, 3, 4)])


def test_replay_gives_the_canvas_before_every_step() -> None:
    trajectory = revealed()
    canvases = [
        [5, 6, MASK, MASK, MASK, MASK],
        [5, 6, MASK, MASK, 1, MASK],
        [5, 6, 2, MASK, 1, 3],
        [5, 6, 2, 4, 1, 3],
    ]
    assert [trajectory.canvas_at(step).tolist() for step in range(4)] == canvases
    assert trajectory.final_canvas().tolist() == canvases[-1]


def test_replay_follows_remasking_and_token_editing() -> None:
    trajectory = revised()
    canvases = [[5, MASK, MASK, MASK], [5, 1, MASK, 7], [5, 1, 2, MASK], [5, 8, 2, MASK], [5, 8, 2, 4]]
    assert [trajectory.canvas_at(step).tolist() for step in range(5)] == canvases
    assert trajectory.is_reveal.tolist() == [True, True, False, True, True, True]
    assert trajectory.reveal_step().tolist() == [-1, 2, 1, 3]


def test_the_answer_ends_where_the_rollout_stopped_and_the_canvas_does_not() -> None:
    trajectory = replace(revealed(), stop_length=2)
    assert trajectory.response_ids().tolist() == [2, 4]
    assert trajectory.final_canvas().tolist() == [5, 6, 2, 4, 1, 3]
    assert replace(trajectory, stop_length=0).response_ids().tolist() == []


@pytest.mark.parametrize(
    ("block_length", "origin", "blocks"),
    [(None, 0, [0, 0, 0, 0]), (4, 0, [0, 0, 1, 1]), (2, 2, [0, 0, 1, 1]), (3, 2, [0, 0, 0, 1])],
)
def test_block_of_counts_from_the_origin(block_length: int | None, origin: int, blocks: list[int]) -> None:
    trajectory = replace(revealed(), block_length=block_length, block_origin=origin)
    assert np.asarray(trajectory.block_of(np.array([2, 3, 4, 5]))).tolist() == blocks
    assert int(trajectory.block_of(5)) == blocks[-1]


def test_a_right_record_validates() -> None:
    revealed().validate()
    revised().validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": np.array([1, 2, 3])}, "'token' has 3 entries, step has 4"),
        ({"confidence": np.ones(5)}, "'confidence' has 5 entries"),
        ({"step": np.array([1, 0, 1, 2])}, "'step' must be ordered"),
        ({"step": np.array([-2, 0, 1, 2])}, "'step' must be ordered"),
        ({"num_steps": 2}, "'step' must be ordered"),
        ({"position": np.array([4, 1, 5, 3])}, "'position' must lie behind the prompt"),
        ({"position": np.array([4, 2, 6, 3])}, "'position' must lie behind the prompt"),
        ({"stop_length": 5}, "'stop_length' is 5"),
        ({"stop_length": -1}, "'stop_length' is -1"),
        ({"logprob": np.array([-1.0, np.nan, -1.0, -1.0])}, "'logprob' holds a value that is not finite"),
        ({"logprob": np.array([-1.0, -np.inf, -1.0, -1.0])}, "'logprob' holds a value that is not finite"),
        (
            {"x0_hat": np.zeros((2, 6), dtype=np.int64)},
            r"'x0_hat' has shape \(2, 6\), num_steps and length are \(3, 6\)",
        ),
        ({"x0_confidence": np.zeros((3, 4))}, "'x0_confidence' has shape"),
        ({"position": np.array([4, 5, 5, 3])}, "edits one position twice in one step"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(revealed(), **change).validate()


def test_save_and_load_keep_every_field(tmp_path) -> None:
    x0_hat = np.arange(24).reshape(4, 6)
    first = replace(revised(), policy_version=3, exact=False, seed=2**62, block_length=2, block_origin=1)
    drawn = np.where(x0_hat % 3 == 0, np.nan, x0_hat / 30)
    second = replace(
        revealed(), num_steps=4, x0_hat=x0_hat, x0_confidence=drawn.astype(np.float32), x0_logprob=-drawn, stop_length=1
    )
    save_trajectories(tmp_path / "t.npz", [first, second])
    loaded = load_trajectories(tmp_path / "t.npz")
    assert len(loaded) == 2
    for before, after in zip([first, second], loaded, strict=True):
        assert vars(before).keys() == vars(after).keys()
        for name, value in vars(before).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(getattr(after, name), value, err_msg=name)
            else:
                assert getattr(after, name) == value, name
    assert loaded[0].logprob.dtype == np.float64 and loaded[0].confidence.dtype == np.float32


def test_files_hold_no_pickle_and_appear_only_complete(tmp_path) -> None:
    path = tmp_path / "t.npz"
    save_trajectories(path, [revealed()])
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.npz"]
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            # An object array, which is what NumPy pickles, says so in its header.
            assert b"|O" not in archive.read(name)[:128]


def test_an_empty_list_can_be_saved(tmp_path) -> None:
    save_trajectories(tmp_path / "none.npz", [])
    assert load_trajectories(tmp_path / "none.npz") == []


def test_other_files_are_refused_with_their_name(tmp_path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz is not a trajectory file"):
        load_trajectories(tmp_path / "other.npz")


def test_another_format_version_is_refused(tmp_path, monkeypatch) -> None:
    import rollouts.trajectory

    monkeypatch.setattr(rollouts.trajectory, "FORMAT_VERSION", 99)
    save_trajectories(tmp_path / "new.npz", [revealed()])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="trajectory format 99, this code reads 1"):
        load_trajectories(tmp_path / "new.npz")


def test_a_file_with_an_inconsistent_record_is_refused(tmp_path) -> None:
    save_trajectories(tmp_path / "bad.npz", [replace(revealed(), num_steps=1)])
    with pytest.raises(ValueError, match="'step' must be ordered"):
        load_trajectories(tmp_path / "bad.npz")
