"""What generations amount to, against numbers worked out by hand; and the folder that keeps them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rl.evaluation.figures import default_ks, figures, table
from rl.evaluation.generations import BatchCost, Generation, GenerationFolder


def made(prompt: str, sample: int, reward: float | None, tokens: int = 4, steps: int = 2, **other: Any) -> Generation:
    reason = None if reward is not None else other.pop("reason", "timeout")
    ended = other.pop("ended", True)
    return Generation("static@2", prompt, sample, 7, "text", [1] * tokens, [0] * tokens, steps, ended, reward, reason)


def test_four_samples_of_two_problems() -> None:
    rewards = {"a": [1.0, 0.0, 1.0, 0.5], "b": [0.0, 0.0, 0.0, 1.0]}
    generations = [made(name, i, value) for name, values in rewards.items() for i, value in enumerate(values)]
    result = figures(generations, [BatchCost("static@2", 8, tokens=32, seconds=4.0, reward_seconds=9.0)])
    assert result.samples == 4
    assert result.avg == (2 / 4 + 1 / 4) / 2  # a reward of 0.5 is not right
    assert result.mean_reward == 3.5 / 8
    # pass@2: 1 - C(n - c, 2) / C(n, 2): a 1 - 1/6, b 1 - 3/6
    assert result.pass_at[2][0] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert result.pass_at[1][0] == pytest.approx(result.avg) and result.pass_at[4][0] == 1.0
    # Two problems drawn with replacement: means 0.5 and 0.25 are both within 95 %.
    assert (result.interval, result.low, result.high) == ("bootstrap", 0.25, 0.5)
    assert result.tokens_per_forward == 32 / 16 and result.tokens_per_second == 8.0
    assert list(result.pass_at) == [1, 2, 4]


def test_one_sample_has_wilsons_interval() -> None:
    result = figures([made(str(i), 0, float(i < 8)) for i in range(10)], [])
    assert (result.avg, result.interval) == (0.8, "wilson")
    # Wilson for 8 of 10: centre (0.8 + 3.84146/20) / (1 + 3.84146/10) = 0.71674, half width 0.22658
    assert result.low == pytest.approx(0.49016, abs=1e-5) and result.high == pytest.approx(0.94332, abs=1e-5)
    assert result.tokens_per_second is None


def test_agreement_of_all_problems_is_no_certainty() -> None:
    result = figures([made(str(i), s, 0.0) for i in range(10) for s in range(2)], [])
    # Wilson for 0 of 10: 3.84146 / (10 + 3.84146)
    assert (result.low, result.interval) == (0.0, "wilson")
    assert result.high == pytest.approx(0.277533, abs=1e-5)
    assert result.pass_at[2][2] == pytest.approx(0.277533, abs=1e-5)


def test_what_has_no_score_counts_nowhere_and_is_shown() -> None:
    """Defect W13: what failed to be generated or judged becomes an empty, that is a wrong, answer."""
    generations = [made("a", 0, 1.0), made("a", 1, None), made("b", 0, None, reason="no tests"), made("b", 1, None)]
    result = figures([*generations, made("c", 0, 0.0), made("c", 1, 0.0)], [])
    assert result.avg == 0.5 and result.num_problems == 2  # a is 1 of 1, b is nothing, c 0 of 2
    assert (result.unscored, result.num_completions) == (3, 6)
    assert result.reasons == {"timeout": 2, "no tests": 1}
    assert result.pass_at[2][0] == 0.0  # c alone has two scored samples
    lines = table({"static@2": result})
    assert "3/6" in lines[1] and lines[2:] == ["unscored, static@2: 2x timeout", "unscored, static@2: 1x no tests"]


def test_nothing_scored_is_no_zero() -> None:
    result = figures([made("a", 0, None)], [])
    assert math.isnan(result.avg) and (result.low, result.high) == (0.0, 1.0)
    assert result.as_json()["avg"] is None and "nan" in table({"d": result})[1]
    json.dumps(result.as_json(), allow_nan=False)


def test_default_ks() -> None:
    assert [default_ks(n) for n in (1, 2, 5, 16)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8, 16]]


# --- the folder ---------------------------------------------------------------------------------------------------

SETTINGS = {"model": {"path": "m"}, "samples": 2, "decoders": {"static@2": {"t": 0.0}}, "seed": 0}


def batch(count: int) -> BatchCost:
    return BatchCost("static@2", count, 4 * count, 1.0, 0.5)


def test_half_a_line_is_cut_off_and_the_rest_kept(tmp_path: Path) -> None:
    folder = GenerationFolder(tmp_path / "e")
    folder.open(SETTINGS)
    first, second = made("a", 0, 1.0), made("a", 1, None)
    folder.append([first], batch(1))
    whole = (tmp_path / "e" / "generations.jsonl").read_bytes()
    folder.append([second], batch(1))
    folder.close()
    file = tmp_path / "e" / "generations.jsonl"
    for kept in range(len(whole), len(file.read_bytes())):
        file.write_bytes(file.read_bytes()[:kept] if kept > len(whole) else whole + b'{"decoder": "sta')
        assert GenerationFolder(tmp_path / "e").generations() == [first]
        assert file.read_bytes() == whole


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    folder = GenerationFolder(tmp_path)
    folder.open(SETTINGS)
    folder.close()
    for change, field in (
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"decoders": {"static@2": {"t": 0.5}}}, "decoders.static@2.t 0.0, now it is 0.5"),
        ({"template": {"name": "x"}}, "template.name None, now it is 'x'"),
        ({"samples": 1}, "samples 2, now it is 1"),
    ):
        with pytest.raises(ValueError, match="was written with " + field):
            GenerationFolder(tmp_path).open({**SETTINGS, **change})
    # A moved model, more samples and one more decoder are no other settings.
    more = {"model": {"path": "elsewhere"}, "samples": 3, "decoders": {"dynamic@2": {"t": 0.0}}, "seed": 0}
    folder.open(more)
    assert folder.settings["decoders"] == {"static@2": {"t": 0.0}, "dynamic@2": {"t": 0.0}}
    with pytest.raises(ValueError, match="is being written by another process"):
        GenerationFolder(tmp_path).open(more)
    folder.close()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "generations.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"holds generations without settings\.json"):
        GenerationFolder(tmp_path).open(SETTINGS)
    with pytest.raises(ValueError, match="is no folder of an evaluation"):
        _ = GenerationFolder(tmp_path / "none").settings
