"""The contract itself: what counts as a score, what an import may cost, how text is read."""

import math
import subprocess
import sys

import pytest

from rewards import Score, as_score
from rewards.text import answer_part, last_boxed, text_of


def test_missing_scores_need_a_reason_and_values_must_be_finite():
    with pytest.raises(ValueError, match="needs a reason"):
        Score(None)
    with pytest.raises(ValueError, match="finite"):
        Score(math.inf)
    with pytest.raises(ValueError, match="finite"):
        Score(1.0, steps=[0.0, math.nan])


@pytest.mark.parametrize(
    ("entry", "value", "failed"),
    [
        (1, 1.0, False),
        (True, 1.0, False),
        (None, None, False),  # TRL's "not applicable" is no failure
        (math.nan, None, True),
        (-math.inf, None, True),
        ("0.5", 0.5, False),
        ("yes", None, True),
        ([1.0], None, True),
        (Score(None, reason="timeout after 5 s"), None, True),
        (Score(0.25), 0.25, False),
    ],
)
def test_every_entry_becomes_a_score(entry, value, failed):
    score = as_score(entry)
    assert score.value == value
    assert score.failed is failed
    assert (score.reason is None) == (value is not None)


def test_a_score_converts_to_the_float_trl_expects():
    torch = pytest.importorskip("torch")
    tensor = torch.tensor([Score(0.5), Score(None, reason="timeout")], dtype=torch.float32)
    assert tensor[0] == 0.5
    assert math.isnan(tensor[1])


def test_import_is_light():
    """A reward worker must not pay for torch, and `import rewards` is what every one of them does."""
    heavy = ["torch", "transformers", "numpy", "sympy", "mpmath", "asyncio", "datasets", "rl", "rollouts"]
    code = f"import sys, rewards; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_text_of_prompts_and_completions():
    assert text_of("plain") == "plain"
    assert text_of([{"role": "user", "content": "first"}, {"role": "assistant", "content": "last"}]) == "last"
    assert text_of([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "seen"}]}]) == "seen"
    with pytest.raises(TypeError, match="got int"):
        text_of(3)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{3} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{7} but later \boxed{8", "7"),  # cut off by the length limit: the complete one counts
        (r"\fbox {x}", "x"),
        (r"\boxed{}", ""),
        ("no box", None),
    ],
)
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


def test_answer_part():
    assert answer_part("<answer>1</answer> no, <answer>2</answer>") == "2"
    assert answer_part("just this") == "just this"
