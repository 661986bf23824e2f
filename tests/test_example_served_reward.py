"""docs/examples/served_reward.py: a reward behind HTTP says what it says here; a missing server is no verdict."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from docs.examples.served_reward import Served, server
from docs.examples.sudoku_steps import sudoku_steps
from rewards import RewardPart, RewardRunner

RIGHT = "1234341221434321"
COLUMNS = {"puzzle": ["1" + "0" * 15] * 2, "reveal_steps": [[0] * 8 + [1] * 8] * 2, "num_steps": [2, 2]}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    made = server(sudoku_steps, 0)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    thread.join()
    made.server_close()


def test_a_served_reward_is_the_reward_itself(url: str) -> None:
    answers = [RIGHT, "11" + RIGHT[2:]]
    here, there = sudoku_steps(["", ""], answers, **COLUMNS), Served(url)(["", ""], answers, **COLUMNS)
    assert there == here
    assert [score.steps for score in there] == [[0.0, 1.0], [pytest.approx(-0.2), pytest.approx(-0.1)]]


def test_numbers_and_none_keep_their_meaning() -> None:
    made = server(lambda prompts, completions, **columns: [0.5, None], 0)
    threading.Thread(target=made.handle_request).start()
    first, second = Served(f"http://127.0.0.1:{made.server_port}")(["", ""], ["a", "b"])
    made.server_close()
    assert (first.value, second.value, second.applicable) == (0.5, None, False)


def test_without_its_server_there_is_no_verdict(url: str) -> None:
    nobody = url.rpartition(":")[0] + ":1"
    part = RewardPart("docs/examples/served_reward.py:Served", params={"url": nobody})
    with RewardRunner([part], retries=0, max_failure_share=1.0) as runner:
        table = runner.score(["", ""], [RIGHT, RIGHT], COLUMNS)
    assert table.values == [None, None] and "Connection refused" in str(table.parts)
