"""Format, length, overlong, tokens per forward: numbers worked out by hand."""

import pytest

from rewards import load_reward
from rewards.length import length, overlong, tokens_per_forward


def ids(*lengths):
    return [[0] * count for count in lengths]


def test_length_costs_its_share():
    assert length(["", "", ""], ["", "", ""], ids(0, 25, 300), max_length=100) == [0.0, -0.25, -1.0]


def test_overlong_slope():
    # free up to 80, then falling over 20 tokens to -1 at 100
    assert overlong([""] * 5, [""] * 5, ids(10, 80, 90, 100, 500), max_length=100, cache_length=20) == [
        0.0, 0.0, -0.5, -1.0, -1.0,
    ]  # fmt: skip


def test_overlong_is_trls_soft_overlong_punishment():
    trl = pytest.importorskip("trl.rewards")
    theirs = trl.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = ids(*range(0, 130, 7))
    blank = [""] * len(lengths)
    assert overlong(blank, blank, lengths, max_length=100, cache_length=20) == pytest.approx(theirs(lengths))


def test_tokens_per_forward():
    scores = tokens_per_forward([""] * 3, [""] * 3, ids(32, 64, 8), num_forwards=[16, 8, 0], full_speed=4.0)
    assert [score.value for score in scores] == [0.5, 1.0, None]
    assert [score.metrics.get("tokens_per_forward") for score in scores] == [2.0, 8.0, None]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a\nb</think>\n<answer>c</answer>", 1.0),
        (" <think></think><answer></answer>\n", 1.0),
        ("<think>a</think><answer>b</answer> and more", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<answer>b</answer>", 0.0),
    ],
)
def test_default_format(text, value):
    assert load_reward("format")([""], [text]) == [value]


def test_own_format_and_bad_format():
    assert load_reward("format", {"pattern": r"\d+"})(["", ""], ["12", "1x"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="is no regular expression"):
        load_reward("format", {"pattern": "("})


def test_parameters_out_of_range():
    with pytest.raises(ValueError, match="max_length must be positive"):
        length([""], [""], ids(1), max_length=0)


def test_json_fields() -> None:
    load = load_reward("json_fields")
    answer = ['{"n":3,"unit":"km"}'] * 6
    texts = ['{"unit": "km", "n": 3}', '{"n":3}', '{"n":true,"unit":"km","x":1}', "[3]", "{", '{"n":3.0,"unit":"km"}']
    reported: dict[str, float] = {}
    assert load(prompts=texts, completions=texts, answer=answer, log_metric=reported.__setitem__) == [1, 0, 0, 0, 0, 0]
    assert reported == {"valid": 4 / 6}
    half = load_reward("json_fields", {"partial": True})(prompts=texts, completions=texts, answer=answer)
    assert half == [1, 1 / 2, 1 / 3, 0, 0, 1 / 2]
