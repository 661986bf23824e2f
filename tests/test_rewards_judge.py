"""LLM judge and per-chunk process reward against a real local HTTP server that speaks the OpenAI protocol."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from rewards import RewardFailureError, RewardPart, RewardRunner, TransientRewardError
from rewards.chunk_judge import chunk_scores_to_steps
from rewards.llm_judge import rating_of
from rewards.openai_client import ChatClient


class Server(ThreadingHTTPServer):
    """Answers with `reply(request body) -> (status, list of texts)` and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.requests = []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        status, texts = self.server.reply(body)
        if status == 200:
            data = {
                "choices": [{"index": i, "message": {"role": "assistant", "content": t}} for i, t in enumerate(texts)]
            }
        else:
            data = {"error": {"message": texts}}
        payload = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        server = Server(reply)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def question(body):
    return body["messages"][0]["content"]


def judge(server, completions, columns=None, mode="inline", share=1.0, retries=2, **params):
    params = {"base_url": server.url, "model": "judge-model", **params}
    with RewardRunner(
        [RewardPart("llm_judge", params=params)], mode=mode, retries=retries, retry_seconds=0.0, max_failure_share=share
    ) as runner:
        return runner.score(["Say hello"] * len(completions), completions, columns)


@pytest.mark.parametrize("mode", ["inline", "process"])
def test_ratings_are_scaled_and_unreadable_ones_fail(serve, mode, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    replies = {
        "good": r"Fine. \boxed{10}",
        "middling": r"\boxed{1} no, \boxed{2.5}/10",
        "odd": "I like it",
        "off": r"\boxed{11}",
    }
    server = serve(lambda body: (200, [next(text for word, text in replies.items() if word in question(body))]))
    table = judge(server, list(replies), mode=mode, api_key_variable="JUDGE_KEY")
    assert table.values == [1.0, 0.25, None, None]
    reasons = [score.reason for score in table.parts["llm_judge"]]
    assert reasons[2] == "the judge gave no rating from 0 to 10: 'I like it'"
    path, key, body = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["model"] == "judge-model"
    assert "Say hello" in question(body)


def test_templates_take_columns_and_votes_are_averaged(serve):
    server = serve(lambda body: (200, [r"\boxed{1}", r"\boxed{0}", "no opinion", r"\boxed{1}"]))
    template = "Gold: {answer}. Given: {completion}. \\boxed{{0}} or \\boxed{{1}}?"
    table = judge(
        server, ["{braces} are harmless"], {"answer": ["42"]}, template=template, low=0.0, high=1.0, num_votes=4
    )
    assert table.values == [pytest.approx(2 / 3)]
    assert question(server.requests[0][2]) == "Gold: 42. Given: {braces} are harmless. \\boxed{0} or \\boxed{1}?"
    assert server.requests[0][2]["n"] == 4


def test_a_busy_server_is_asked_again_and_only_for_what_failed(serve):
    asked = {}

    def reply(body):
        text = question(body)
        asked[text] = asked.get(text, 0) + 1
        return (429, "slow down") if "late" in text and asked[text] < 3 else (200, [r"\boxed{5}"])

    server = serve(reply)
    table = judge(server, ["a", "late", "b"])
    assert table.values == [0.5, 0.5, 0.5]
    assert sorted(asked.values()) == [1, 1, 3]
    assert table.metrics["reward/llm_judge/retries"] == 2


def test_a_refusal_is_not_retried_and_stops_the_run(serve):
    server = serve(lambda body: (401, "wrong key"))
    with pytest.raises(RewardFailureError, match=r"ValueError: http://127.* answered 401: .*wrong key"):
        judge(server, ["a"] * 8, share=0.2)
    assert len(server.requests) <= 8


def test_a_server_that_is_down_is_masked_after_the_retries(serve):
    server = serve(lambda body: (200, []))
    url = server.url
    server.shutdown()
    server.server_close()
    with RewardRunner(
        [RewardPart("llm_judge", params={"base_url": url, "model": "m"})],
        retries=1,
        retry_seconds=0.0,
        max_failure_share=1.0,
    ) as runner:
        table = runner.score(["p"], ["a"])
    assert table.values == [None]
    assert "TransientRewardError" in table.parts["llm_judge"][0].reason
    assert table.metrics["reward/llm_judge/retries"] == 1


def test_a_slow_server_is_transient(serve):
    release = threading.Event()
    server = serve(lambda body: (release.wait(5), (200, ["x"]))[1])
    client = ChatClient(server.url, "m", timeout_seconds=0.2)
    with pytest.raises(TransientRewardError, match="timed out"):
        client.complete([{"role": "user", "content": "q"}], 0.0, 10)
    release.set()


def test_something_else_answers(serve):
    client = ChatClient(serve(lambda body: (200, [None])).url, "m")
    assert client.complete([{"role": "user", "content": "q"}], 0.0, 10) == [""]
    with pytest.raises(ValueError, match="answered 404"):
        ChatClient(serve(lambda body: (404, "no such page")).url, "m").complete([], 0.0, 10)
    with pytest.raises(ValueError, match="must begin with http"):
        ChatClient("localhost:8000", "m")


@pytest.mark.parametrize(
    ("answer", "rating"),
    [(r"\boxed{7}", 7.0), (r"\boxed{ -1 }", -1.0), (r"\boxed{8/10}", 8.0), (r"\boxed{high}", None), ("7", None)],
)
def test_rating_of(answer, rating):
    assert rating_of(answer) == rating


def test_chunk_scores_to_steps_by_hand():
    # 5 tokens in chunks of 2: [0,1] [2,3] [4]; they were revealed at steps 0,3 | 1,1 | 2; T = 5.
    # chunk 0 ends at step 3, chunk 1 at step 1, the last chunk is paid at the last step of the answer: 3.
    assert chunk_scores_to_steps([1.0, -1.0, 0.5], 2, [0, 3, 1, 1, 2], 5) == [0.0, -1.0, 0.0, 1.5, 0.0]
    assert sum(chunk_scores_to_steps([0.25] * 4, 3, list(range(12)), 12)) == 1.0
    with pytest.raises(ValueError, match="2 chunk scores for 5 tokens"):
        chunk_scores_to_steps([1.0, 1.0], 2, [0] * 5, 1)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        chunk_scores_to_steps([1.0], 2, [0, 2], 2)


def test_process_reward_through_the_runner(serve, tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "two", "plus", "three", "is", "six"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "tokenizer"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)

    # The judge dislikes every beginning that says six; of three votes one always disagrees.
    def reply(body):
        good = "six" not in question(body).split("[Beginning")[1]
        return 200, [r"\boxed{1}" if good else r"\boxed{-1}"] * 2 + [r"\boxed{-1}" if good else r"\boxed{1}"]

    server = serve(reply)
    params = {"base_url": server.url, "model": "m", "tokenizer": str(folder), "chunk_length": 2}
    columns = {"completion_ids": [[1, 2, 3, 4, 5], []], "reveal_steps": [[0, 0, 1, 2, 1], []], "num_forwards": [4, 4]}
    with RewardRunner([RewardPart("chunk_judge", weight=3.0, params=params)]) as runner:
        table = runner.score(["Add."] * 2, ["two plus three is six", ""], columns)
    third = 1 / 3
    assert table.parts["chunk_judge"][0].steps == pytest.approx([third, 0.0, third - third, 0.0])
    assert table.parts["chunk_judge"][0].value == pytest.approx(third / 3)
    assert table.steps[0] == pytest.approx([1.0, 0.0, 0.0, 0.0])
    assert table.values == [pytest.approx(third), None]
    asked = [question(body).split("[Beginning of the solution]\n")[1].split("\n")[0] for _, _, body in server.requests]
    assert asked == ["two plus", "two plus three is", "two plus three is six"]
    assert server.requests[0][2]["n"] == 3


@pytest.mark.parametrize("mode", ["inline", "process"])
def test_a_vision_judge_gets_the_very_pixels_and_the_question(serve, mode):
    """The server decodes the picture it was sent and rates it by its brightness."""
    seen = []

    def reply(body):
        picture, text = question(body)
        head, _, data = picture["image_url"]["url"].partition(",")
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        seen.append((head, picture["type"], text, pixels.tolist()))
        return 200, [rf"\boxed{{{pixels.mean() / 25.5:g}}}"]

    server = serve(reply)
    images = [np.full((2, 2), 255, dtype=np.uint8), np.full((2, 2), 51, dtype=np.uint8)]
    part = RewardPart("vlm_judge", params={"base_url": server.url, "model": "vision", "upscale": 2})
    with RewardRunner([part], mode=mode) as runner:
        table = runner.score(["a white square", "a {dark} square"], images)
    assert table.values == [1.0, pytest.approx(0.2)]
    head, kind, text, pixels = sorted(seen, key=lambda item: item[3])[1]
    assert (head, kind) == ("data:image/png;base64", "image_url")
    assert text["type"] == "text" and "Asked for: a white square" in text["text"]
    assert pixels == [[255] * 4] * 4


def test_a_vision_judge_without_a_rating_masks_the_image(serve):
    server = serve(lambda body: (200, ["a nice picture"]))
    part = RewardPart("vlm_judge", params={"base_url": server.url, "model": "vision"})
    with RewardRunner([part], max_failure_share=1.0) as runner:
        table = runner.score(["a cat"], [np.zeros((4, 4, 3), dtype=np.uint8)])
    assert table.values == [None]
    assert table.parts["vlm_judge"][0].reason == "the judge gave no rating from 0 to 10: 'a nice picture'"
