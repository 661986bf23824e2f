"""The runner in this process: weights, masking, isolation, retries, cache, columns, stopping."""

import json
import math
import re

import pytest

from rewards import RewardFailureError, RewardPart, RewardRunner, Score, TransientRewardError
from rewards.call import call_reward
from rewards.combine import normalize, weighted_steps, weighted_sum

# Rewards of these tests, found by name through this file.
HERE = __file__
CALLS: list[list[str]] = []


def record(prompts, completions, **columns):
    CALLS.append(list(completions))
    return [float(text) for text in completions]


def constant(prompts, completions, value=1.0, **columns):
    return [value] * len(completions)


def poisoned(prompts, completions, **columns):
    CALLS.append(list(completions))
    if "bad" in completions:
        raise KeyError("answer")
    if "exit" in completions:
        raise SystemExit(0)
    return [1.0] * len(completions)


def sometimes(prompts, completions, **columns):
    return [
        None if text == "skip" else Score(None, reason="no verdict") if text == "fail" else 2.0 for text in completions
    ]


class Flaky:
    def __init__(self, failures):
        self.left = failures

    def __call__(self, prompts, completions, **columns):
        CALLS.append(list(completions))
        if self.left:
            self.left -= 1
            raise TransientRewardError("server is starting")
        return [1.0] * len(completions)


class FlakyItem:
    def __init__(self):
        self.seen = set()

    def __call__(self, prompts, completions, **columns):
        CALLS.append(list(completions))
        scores = []
        for text in completions:
            late = text == "late" and text not in self.seen
            self.seen.add(text)
            scores.append(Score(None, reason="429", transient=True) if late else 1.0)
        return scores


async def gentle(prompts, completions, **columns):
    import asyncio

    await asyncio.sleep(0)
    return [0.5] * len(completions)


def average(prompts, completions, **columns):
    return [0.5]


def short(prompts, completions, **columns):
    return [1.0] * (len(completions) - 1)


def needs_answer(prompts, completions, answer, **columns):
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def logs(prompts, completions, log_metric, log_extra, trainer_state, **columns):
    log_metric("count", len(completions))
    log_extra("upper", [text.upper() for text in completions])
    return [Score(1.0, metrics={"step": trainer_state["global_step"], "length": len(text)}) for text in completions]


def steps(prompts, completions, sizes=(1.0, 2.0), **columns):
    return [Score(sum(sizes), steps=list(sizes)) for _ in completions]


@pytest.fixture(autouse=True)
def fresh_calls():
    CALLS.clear()
    # The runner loads this file under a name of its own; share the list with that copy.
    import sys

    yield
    for name in [name for name in sys.modules if name.startswith("denoise_rl_file_test_rewards_run")]:
        del sys.modules[name]


def part(name, **options):
    return RewardPart(f"{HERE}:{name}", **options)


def calls():
    import sys

    return next(m for name, m in sys.modules.items() if name.startswith("denoise_rl_file_test_rewards_run")).CALLS


def score(parts, completions, columns=None, **options):
    defaults = {"retry_seconds": 0.0, "max_failure_share": 1.0}
    with RewardRunner(parts, **{**defaults, **options}) as runner:
        return runner.score([f"p{i // 2}" for i in range(len(completions))], completions, columns)


def test_weights_and_metrics():
    table = score([part("record", weight=0.5), part("constant", weight=-2.0, params={"value": 3.0})], ["1", "4"])
    assert table.values == [0.5 - 6.0, 2.0 - 6.0]
    assert [entry.value for entry in table.parts["record"]] == [1.0, 4.0]
    assert table.metrics["reward/record/mean"] == 2.5
    assert table.metrics["reward/mean"] == -4.75
    assert calls() == [["1", "4"]]  # inline: one call for the batch


def test_failed_parts_mask_and_inapplicable_parts_do_not():
    table = score([part("sometimes"), part("constant", params={"value": 5.0})], ["x", "skip", "fail", "x"])
    assert table.values == [7.0, 5.0, None, 7.0]
    assert table.metrics["reward/sometimes/failures"] == 1
    assert table.metrics["reward/sometimes/failure_share"] == 0.25
    assert table.metrics["reward/sometimes/not_applicable"] == 1
    assert table.metrics["reward/masked"] == 1
    alone = score([part("sometimes")], ["skip"])
    assert alone.values == [None]


def test_a_part_of_weight_zero_is_only_logged():
    table = score([part("sometimes", weight=0.0), part("constant")], ["fail", "x"])
    assert table.values == [1.0, 1.0]
    assert table.metrics["reward/sometimes/failures"] == 1


@pytest.mark.parametrize(("word", "reason"), [("bad", "KeyError: 'answer'"), ("exit", "SystemExit: 0")])
def test_one_poisoned_completion_costs_one_score(word, reason):
    table = score([part("poisoned")], ["a", "b", word, "c"])
    assert table.values == [1.0, 1.0, None, 1.0]
    # The line of the reward in which it arose is said too.
    assert re.fullmatch(rf"{reason} \(test_rewards_run\.py, line \d+\)", table.parts["poisoned"][2].reason)
    assert calls() == [["a", "b", word, "c"], ["a"], ["b"], [word], ["c"]]


def test_transient_failures_are_retried_as_a_batch():
    table = score([part("Flaky", params={"failures": 2})], ["a", "b"], retries=2)
    assert table.values == [1.0, 1.0]
    assert calls() == [["a", "b"]] * 3
    assert table.metrics["reward/Flaky/retries"] == 4


def test_retries_end():
    table = score([part("Flaky", params={"failures": 9})], ["a", "b"], retries=1)
    assert table.values == [None, None]
    assert calls() == [["a", "b"]] * 2
    assert "server is starting" in table.parts["Flaky"][0].reason


def test_only_the_transient_item_is_retried():
    table = score([part("FlakyItem")], ["a", "late", "b"])
    assert table.values == [1.0, 1.0, 1.0]
    assert calls() == [["a", "late", "b"], ["late"]]


def test_async_rewards_run():
    assert score([part("gentle")], ["a", "b"]).values == [0.5, 0.5]


def test_async_rewards_run_inside_an_event_loop():
    import asyncio

    async def notebook():
        return score([part("gentle")], ["a"]).values

    assert asyncio.run(notebook()) == [0.5]


def test_wrong_number_of_entries_is_a_failure():
    table = score([part("short")], ["a", "b"])
    assert table.values == [None, None]
    assert table.parts["short"][0].reason == "ValueError: the reward returned 1 entries for 2 completions"


@pytest.mark.parametrize("mode", ["inline", "process"])
def test_one_score_for_a_whole_batch_is_no_score_of_each(mode):
    table = score([part("average")], ["a", "b"], mode=mode)
    assert table.values == [None, None]
    assert "returned 1 entries for 2 completions" in table.parts["average"][1].reason


@pytest.mark.parametrize("answer", [0.5, None, "good", {"reward": [1.0]}])
def test_an_answer_that_is_no_list_is_a_failure_that_says_so(answer):
    outcome = call_reward(lambda prompts, completions, **columns: answer, ["a"], ["b"], {})
    kind = type(answer).__name__
    assert outcome.error == f"ValueError: it returned a {kind}, not a list with a number for each completion"


def test_cache_hits_repeats_and_never_keeps_failures():
    with RewardRunner([part("record")], cache_size=2, max_failure_share=1.0) as runner:
        first = runner.score(["p"] * 3, ["1", "1", "2"])
        assert first.values == [1.0, 1.0, 2.0]
        assert calls() == [["1", "2"]]  # the repeat inside the batch is not judged twice
        assert first.metrics["reward/record/cache_hits"] == 1
        assert runner.score(["p"], ["2"]).values == [2.0]
        assert calls() == [["1", "2"]]
        assert runner.score(["other prompt"], ["2"]).values == [2.0]  # another item
        assert calls()[1:] == [["2"]]
        assert runner.score(["p"], ["1"]).values == [1.0]  # evicted: size 2, least recently used
        assert calls()[2:] == [["1"]]
        for _ in range(2):
            assert runner.score(["p"], ["x"]).values == [None]
        assert calls()[3:] == [["x"], ["x"]]


def test_cache_distinguishes_columns():
    with RewardRunner([part("needs_answer")], cache_size=10) as runner:
        assert runner.score(["p"], ["1"], {"answer": ["1"]}).values == [1.0]
        assert runner.score(["p"], ["1"], {"answer": ["2"]}).values == [0.0]


def test_columns_can_be_renamed():
    table = score([part("needs_answer", columns={"answer": "gold"})], ["1", "2"], {"gold": ["1", "1"]})
    assert table.values == [1.0, 0.0]
    with pytest.raises(ValueError, match="reward column 'answer: golden'"):
        score([part("needs_answer", columns={"answer": "golden"})], ["1"], {"gold": ["1"]})


def test_a_missing_column_stops_the_run_with_its_name():
    with pytest.raises(RewardFailureError, match="it needs the column 'answer'; the dataset has \\['gold'\\]"):
        score([part("needs_answer")], ["1"] * 4, {"gold": ["1"] * 4}, max_failure_share=0.2)


def test_trl_logging_hooks():
    with RewardRunner([part("logs")]) as runner:
        table = runner.score(["p"] * 2, ["a", "bcd"], trainer_state={"global_step": 7})
    assert table.metrics["reward/logs/count"] == 2
    assert table.metrics["reward/logs/step"] == 7
    assert table.metrics["reward/logs/length"] == 2.0
    assert table.extra == {"upper": ["A", "BCD"]}


def test_steps_add_up_with_weights():
    parts = [part("steps", weight=2.0), part("constant"), part("steps", label="other", params={"sizes": [10.0, 20.0]})]
    table = score(parts, ["a"])
    assert table.steps == [[12.0, 24.0]]
    with pytest.raises(ValueError, match="disagree on the number of steps"):
        score([parts[0], part("steps", label="other", params={"sizes": [1.0]})], ["a"])


def test_failure_share_is_judged_over_a_window():
    with RewardRunner([part("sometimes")], max_failure_share=0.25) as runner:
        for _ in range(10):  # 1 of 4 every time: never above the limit
            runner.score(["p"] * 4, ["x", "x", "x", "fail"])
        with pytest.raises(RewardFailureError) as caught:
            runner.score(["p"] * 8, ["x"] * 4 + ["fail"] * 4)
    # 40 verdicts with 10 failures, 4 good ones, 2 failures: 12 of 46 is the first count above a quarter.
    assert str(caught.value) == (
        "reward 'sometimes' failed on 12 of its latest 46 completions (limit 25%); commonest reason (12x): no verdict"
    )


def test_the_order_of_failures_in_a_batch_does_not_matter():
    for completions in (["fail"] * 4 + ["x"] * 16, ["x"] * 16 + ["fail"] * 4):
        assert score([part("sometimes")], completions, max_failure_share=0.2).metrics["reward/masked"] == 4
        with pytest.raises(RewardFailureError, match="failed on 5 of"):
            score([part("sometimes")], ["fail", *completions[1:], "fail"], max_failure_share=0.2)


def test_one_failure_in_a_small_batch_does_not_stop_and_zero_tolerance_does():
    assert score([part("sometimes")], ["x", "fail"], max_failure_share=0.2).values == [2.0, None]
    with pytest.raises(RewardFailureError, match="1 of its latest 2"):
        score([part("sometimes")], ["x", "fail"], max_failure_share=0.0)


def test_normalised_parts():
    # two prompts with two completions each; by hand: values 1, 3 -> mean 2, std sqrt(2)
    table = score([part("record", normalize="group")], ["1", "3", "5", "5"])
    unit = 1 / (math.sqrt(2) + 1e-4)
    assert table.values == pytest.approx([-unit, unit, 0.0, 0.0])
    assert [entry.value for entry in table.parts["record"]] == [1.0, 3.0, 5.0, 5.0]


def test_normalize_by_hand():
    values = [1.0, None, 3.0, 8.0]
    assert normalize(values, "none", [0, 0, 0, 1]) == values
    unit = 1 / (math.sqrt(2) + 1e-4)
    assert normalize(values, "group", [0, 0, 0, 1]) == pytest.approx([-unit, None, unit, 0.0])
    std = math.sqrt(((1 - 4) ** 2 + (3 - 4) ** 2 + (8 - 4) ** 2) / 2)
    expected = [-3 / (std + 1e-4), None, -1 / (std + 1e-4), 4 / (std + 1e-4)]
    assert normalize(values, "batch", [0, 0, 0, 1]) == pytest.approx(expected)


def test_normalise_then_sum_agrees_with_trl():
    """The numbers of TRL's `normalize_then_sum` before its batch normalisation, computed with its own nanstd."""
    torch = pytest.importorskip("torch")
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(8, 2, generator=generator, dtype=torch.float64)
    rewards[2, 0] = torch.nan
    grouped = rewards.view(2, 4, 2)
    scaled = (grouped - grouped.nanmean(1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    theirs = (scaled.view(8, 2) * torch.tensor([1.0, 0.5], dtype=torch.float64)).nansum(1)

    columns = {str(k): [None if math.isnan(x) else x for x in rewards[:, k].tolist()] for k in range(2)}
    groups = [0] * 4 + [1] * 4
    parts = {name: normalize(values, "group", groups) for name, values in columns.items()}
    nothing_failed = {name: [False] * 8 for name in parts}
    ours = weighted_sum(parts, {"0": 1.0, "1": 0.5}, nothing_failed)
    assert ours == pytest.approx(theirs.tolist())


def test_a_part_of_weight_0_gives_no_reward():
    parts, weights = {"judged": [None, 0.5], "logged": [0.3, 0.3]}, {"judged": 1.0, "logged": 0.0}
    assert weighted_sum(parts, weights, {"judged": [False] * 2, "logged": [False] * 2}) == [None, 0.5]


def test_weighted_steps_without_judges():
    assert weighted_steps({"a": [Score(1.0)]}, {"a": 1.0}) == [None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "thread"}, "reward.mode must be one of inline, process"),
        ({"num_workers": 0}, "reward.num_workers must be at least 1"),
        ({"timeout_seconds": 0}, "reward.timeout_seconds must be positive"),
        ({"max_failure_share": 1.5}, "reward.max_failure_share must lie in"),
        ({"retries": -1}, "reward.retries must not be negative"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RewardRunner([RewardPart("sudoku")], **options)


class Holder:
    """A reward that holds something open."""

    def __call__(self, prompts, completions, **columns):
        CALLS.append(["called"])
        return [1.0] * len(completions)

    def close(self):
        CALLS.append(["closed"])


def test_inline_rewards_are_closed_once():
    score([part("Holder")], ["a"])
    assert calls() == [["called"], ["closed"]]


def test_bad_parts():
    with pytest.raises(ValueError, match="name at least one reward"):
        RewardRunner([])
    with pytest.raises(ValueError, match="two reward parts are called 'sudoku'"):
        RewardRunner([RewardPart("sudoku"), RewardPart("sudoku")])
    with pytest.raises(ValueError, match="normalize must be one of"):
        RewardPart("sudoku", normalize="zscore")


def test_lengths_are_checked():
    with RewardRunner([RewardPart("sudoku")]) as runner:
        with pytest.raises(ValueError, match="2 prompts but 1 completions"):
            runner.score(["a", "b"], ["c"])
        with pytest.raises(ValueError, match="column 'answer' has 1 entries for 2"):
            runner.score(["a", "b"], ["c", "d"], {"answer": ["x"]})
        with pytest.raises(ValueError, match="may not be called 'completions'"):
            runner.score(["a"], ["c"], {"completions": ["x"]})


def test_an_empty_batch_has_no_scores():
    table = score([part("constant")], [])
    assert table.values == []
    assert json.dumps(table.metrics)


def test_two_rewards_of_one_name_get_labels_and_columns_in_the_config():
    from rl.sections import RewardConfig

    right = {"name": "math_answer", "columns": {"answer": "first"}}
    config = RewardConfig(
        functions=[right, {**right, "label": "second", "columns": {"answer": "other"}, "weight": 0.5}]
    )
    parts = [RewardPart(**one.model_dump()) for one in config.functions]
    with RewardRunner(parts) as runner:
        table = runner.score(["?"] * 2, ["4", "5"], {"first": ["4", "4"], "other": ["4", "5"]})
    assert table.values == [1.5, 0.5]
    assert table.metrics["reward/second/mean"] == 1.0
    (alone,) = config.judges("math_answer")
    assert (alone.columns, alone.weight, alone.label) == ({"answer": "first"}, 1.0, None)
    with pytest.raises(ValueError, match="two reward parts are called 'math_answer'; give one of them a `label`"):
        RewardRunner([RewardPart("math_answer"), RewardPart("math_answer")])
