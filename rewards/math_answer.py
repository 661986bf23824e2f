r"""Final answers of mathematics problems: GSM8K (`#### 72`), MATH (`\boxed{\frac12}`), and plain ones."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rewards.math_equal import math_equal, warm_up
from rewards.score import Score
from rewards.text import answer_part, last_boxed, text_of

ANCHORS = ("boxed", "hash", "any")
SAID = re.compile(
    r"(?:^A|final answer|answer)\s*(?:\*\*)?\s*(?::|is|=)\s*:?\s*(?:\*\*)?\s*(.+)", re.IGNORECASE | re.MULTILINE
)
LAST_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")
MAX_CHARACTERS = 500


class MathAnswer:
    r"""1.0 when the completion's final answer equals the reference in the column `answer`, else 0.0.

    The reference is an answer, or a whole solution that ends in `#### 72` or holds a `\boxed{}`. A row without one
    is not applicable; a comparison that takes too long is a failed score. Metric: `answered`.

    Args:
        anchor: where the answer is looked for. "any": the last `\boxed{}`, else what follows the last `####`, else
            the last `Answer: ...` / `the answer is ...` / `A: ...`, else the last number. "boxed" and "hash" accept
            only that form and make everything else wrong.
        ordered: compare lists such as `1, -2` in order.
        verdict_seconds: CPU time for one comparison. It needs an alarm signal, so it works on the main thread only
            (a reward worker runs rewards there); in another thread there is no limit but the runner's.

    Raises:
        ValueError: for an unknown anchor.
    """

    __name__ = "math_answer"

    def __init__(self, anchor: str = "any", ordered: bool = False, verdict_seconds: float = 3.0) -> None:
        if anchor not in ANCHORS:
            raise ValueError(f"reward 'math_answer': anchor must be one of {', '.join(ANCHORS)}, got '{anchor}'")
        self.anchor = anchor
        self.ordered = ordered
        self.verdict_seconds = verdict_seconds
        warm_up()  # a second or more, which no verdict should be charged for

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
    ) -> list[Score]:
        return [self._score_one(text_of(text), gold) for text, gold in zip(completions, answer, strict=True)]

    def _score_one(self, completion: str, reference: Any) -> Score:
        gold = None if reference is None else reference_answer(str(reference))
        if not gold:
            return Score(None, reason="no reference answer", applicable=False)
        found = final_answer(completion, self.anchor)
        if found is None or len(found) > MAX_CHARACTERS:
            return Score(0.0, metrics={"answered": 0.0})
        try:
            with _time_limit(self.verdict_seconds):
                return Score(float(math_equal(gold, found, self.ordered)), metrics={"answered": 1.0})
        except _OutOfTimeError:
            return Score(None, reason=f"timeout: comparing two answers took more than {self.verdict_seconds:g} s")


def reference_answer(reference: str) -> str:
    r"""The answer inside a reference: after the last `####`, inside the last `\boxed{}`, or all of it."""
    if "####" in reference:
        return reference.rpartition("####")[2].strip()
    boxed = last_boxed(reference)
    return reference.strip() if boxed is None else boxed.strip()


def final_answer(completion: str, anchor: str = "any") -> str | None:
    """The final answer a completion gives (see `math_answer`), None when it gives none."""
    text = answer_part(completion)
    boxed = last_boxed(text)
    if anchor in ("boxed", "any") and boxed is not None:
        return boxed.strip() or None
    if anchor in ("hash", "any") and "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0].strip() or None
    if anchor != "any":
        return None
    said = SAID.findall(text)
    if said:
        return _sentence(said[-1])
    if text != completion or "\n" not in text.strip():  # an <answer>, or one line: that is the answer
        plain = _sentence(text.strip())
        if plain is not None and (text != completion or len(plain.split()) == 1 or not LAST_NUMBER.search(plain)):
            return plain
    numbers = LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _sentence(said: str) -> str | None:
    """An answer out of running text: the maths between dollar signs, or the text without its full stop."""
    dollars = re.findall(r"\$([^$]+)\$", said)
    text = dollars[-1] if dollars else re.sub(r"\.\s.*$|\.$", "", said.replace("**", "").strip())
    return text.strip() or None


class _OutOfTimeError(BaseException):
    """Not an Exception: sympy and math-verify catch those on the way."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block once this thread has used `seconds` of CPU time (or ten times that has passed).

    CPU time, so that a loaded machine does not turn verdicts into timeouts. By SIGALRM, hence on the main thread
    only; an alarm the caller has pending goes on afterwards.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    armed = True
    start, start_cpu = time.monotonic(), time.thread_time()
    pending, interval = signal.getitimer(signal.ITIMER_REAL)

    def wait(delay: float) -> None:
        left = pending - (time.monotonic() - start) if pending else delay
        signal.setitimer(signal.ITIMER_REAL, max(min(delay, left), 1e-3))

    def interrupt(number: int, frame: Any) -> None:
        passed = time.monotonic() - start
        left = seconds - (time.thread_time() - start_cpu)
        if armed and (left <= 0 or passed > 10 * seconds or (pending and passed >= pending)):
            raise _OutOfTimeError
        if armed:
            wait(left)

    previous = signal.signal(signal.SIGALRM, interrupt)
    wait(seconds)
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if pending:
            signal.setitimer(signal.ITIMER_REAL, max(pending - (time.monotonic() - start), 1e-3), interval)
