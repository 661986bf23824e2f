"""Any reward in a server process, asked over HTTP: for a judge that must not share the trainer's process or machine.

    python docs/examples/served_reward.py docs/examples/sudoku_steps.py:sudoku_steps --port 8123
    denoise-rl train --config FILE \
        'reward.functions=[{name: docs/examples/served_reward.py:Served, params: {url: "http://127.0.0.1:8123"}}]'

What goes over the wire: `{"prompts": [...], "completions": [...], "columns": {...}}`, and back a list of the fields of
`rewards.Score`, per-step values included. docs/launching.md has a comparison with the same reward in process.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rewards import Score, load_reward
from rewards.score import TransientRewardError


class Served:
    """The reward of the server at `url`.

    A server that is down, or refuses, is a failure worth a retry (`reward.outage_seconds` waits longer).

    Args:
        url: address of the server.
        timeout_seconds: for one batch of completions.
    """

    def __init__(self, url: str, timeout_seconds: float = 60.0) -> None:
        self.url, self.timeout_seconds = url, timeout_seconds

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[Score]:
        # `log_extra` and the like are functions of this process.
        data = {name: values for name, values in columns.items() if not callable(values)}
        body = json.dumps({"prompts": prompts, "completions": completions, "columns": data}).encode()
        try:
            with urllib.request.urlopen(self.url, body, timeout=self.timeout_seconds) as answer:
                return [Score(**fields) for fields in json.load(answer)]
        except OSError as error:
            raise TransientRewardError(f"{self.url}: {error}") from None


def server(reward: Any, port: int) -> ThreadingHTTPServer:
    """A server of `reward` on this machine; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scores = reward(asked["prompts"], asked["completions"], **asked["columns"])
            # A reward may return numbers and None as well; a Score is neither.
            rows = [vars(score) if isinstance(score, Score) else _fields(score) for score in scores]
            body = json.dumps(rows).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def _fields(value: float | None) -> dict[str, Any]:
    """A plain number as the fields of a score; None says that the reward does not apply."""
    return {"value": value} if value is not None else {"value": None, "reason": "not applicable", "applicable": False}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reward", help="name of a reward, module:function or file.py:function")
    parser.add_argument("--params", type=json.loads, default={}, help="its parameters, as JSON")
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    server(load_reward(args.reward, args.params), args.port).serve_forever()
