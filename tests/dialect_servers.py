"""Local servers that speak the dialects of `rollouts/engines/server`, backed by our own engine; and faults.

They are no run of the real engines: they have the paths, fields and conventions that the dialects were written from.
An unknown path is answered 404; a missing field or one of the wrong type, 422.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from rl.model_section import ModelConfig
from rl.models.load import load_policy
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import TokenTrajectory

# What a fault does to the body of an answer; the others are of the connection.
Mangle = Callable[[dict[str, Any]], None]


class DialectServer:
    """One server in threads of this process, on a port the kernel chose.

    Attributes:
        options: the decoding rule and the step count it was "started" with.
        detail: what SGLang's answers carry beside the answer: "sample" as released, "steps" as in the pull request,
            "logprobs" with the field that no SGLang has.
        root: folder a vLLM server was started from, and reloads.
        version: of its weights; a string, as in SGLang.
        faults: consumed by generations, one each, None for none: "500", "reset", "cut" (half the body), "abort", or a
            function that mangles the answer.
        push_faults: consumed by weight updates: "no", "half" (some of it loaded, and an error), "crash" (that, the
            connection gone, and down).
        seen: (path, body) of every request; keys: what their Authorization headers said.
    """

    def __init__(
        self,
        dialect: str,
        model: Any,
        options: SamplerOptions,
        eos_token_id: int | None = None,
        detail: str = "logprobs",
        root: Path | None = None,
    ):
        self.dialect, self.model, self.options, self.eos_token_id = dialect, model, options, eos_token_id
        self.detail, self.root, self.version = detail, root, "default"
        self.algorithm: str | None = "LowConfidence"
        self.faults: list[str | Mangle | None] = []
        self.push_faults: list[str] = []
        self.seen: list[tuple[str, Any]] = []
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()
        # Bound for as long as the server exists: a port that nobody listens on refuses, and nobody else gets it.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self.port: int = self._place.getsockname()[1]
        self._crashing: threading.Thread | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; after a stop, again."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner._serve(self, None)

            def do_POST(self) -> None:
                owner._serve(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = False
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that went away; every other error was answered with a 500."""

        http = Server(("127.0.0.1", self.port), Handler)
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()

        def close() -> None:
            http.shutdown()
            thread.join()
            http.server_close()

        self._close = close

    def stop(self) -> None:
        if self._crashing is not None:
            self._crashing.join()
            self._crashing = None
        else:
            self._close()

    def restart(self, model: Any = None) -> None:
        """What a supervisor does after a crash: the model it was started with, or what is in `root` now; no version."""
        self.stop()
        self.model = load_policy(ModelConfig(path=str(self.root)), None, seed=0) if model is None else model
        self.version = "default"
        self.start()

    # --- what every dialect does --------------------------------------------------------------------------------------

    def _serve(self, http: BaseHTTPRequestHandler, body: Any) -> None:
        path = http.path.partition("?")[0]
        self.seen.append((path, body))
        self.keys.add(http.headers.get("Authorization"))
        handler = ROUTES[self.dialect].get((http.command, path))
        if handler is None:
            return self._reply(http, 404, {"detail": "Not Found"})
        try:
            with self.lock:
                if path.endswith(("generate", "completions")):
                    fault = self.faults.pop(0) if self.faults else None
                    if fault == "500":
                        return self._reply(http, 500, {"error": "out of memory"})
                    if fault == "reset":
                        return _reset(http)
                    answer = handler(self, body)
                    if callable(fault):
                        fault(answer)
                    if fault == "abort":
                        answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "weights are updated"}
                    return self._reply(http, 200, answer, cut=fault == "cut")
                if path in ("/update_weights_from_disk", "/collective_rpc") and self.push_faults:
                    fault = self.push_faults.pop(0)
                    if fault == "half":
                        self.version = "mixed"
                        return self._reply(http, 500, {"error": "a worker ran out of memory"})
                    if fault == "no":
                        return self._reply(http, 400, {"success": False, "message": "no such folder"})
                    self._crash(http)
                    return None
                return self._reply(http, 200, handler(self, body))
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            return self._reply(http, 422, {"detail": repr(error)})

    def _crash(self, http: BaseHTTPRequestHandler) -> None:
        """Half of the new weights are in, and the process is gone."""
        self.model, self.version = None, "mixed"
        _reset(http)
        self._crashing = threading.Thread(target=self._close)
        self._crashing.start()

    @staticmethod
    def _reply(http: BaseHTTPRequestHandler, status: int, answer: Any, cut: bool = False) -> None:
        text = json.dumps(answer).encode()
        http.send_response(status)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(text)))
        http.end_headers()
        http.wfile.write(text[: len(text) // 2] if cut else text)
        http.close_connection = True

    def sample(self, prompt_ids: list[int], seed: int, **distribution: Any) -> TokenTrajectory:
        assert all(isinstance(token, int) for token in prompt_ids)
        options = self.options.model_copy(update=distribution)
        engine = InProcessEngine(self.model, options, eos_token_id=self.eos_token_id)
        trajectory = engine.generate([Request(prompt_ids, seed)])[0]
        return trajectory

    def load(self, folder: str, version: str) -> None:
        # A published layout leaves the block length to whoever serves it.
        self.model = load_policy(ModelConfig(path=folder, block_length=self.model.block_length), None, seed=0)
        self.version = version

    def answer_of(self, trajectory: TokenTrajectory, limit: int) -> tuple[list[int], list[int], str]:
        """The answer with its end token, all tokens to the end of the block it ends in, and the finish reason."""
        prompt = trajectory.prompt_length
        decided = trajectory.final_canvas()[prompt:].tolist()
        answer, finish = decided[:limit], "length"
        if self.eos_token_id in answer:
            answer, finish = answer[: answer.index(self.eos_token_id) + 1], "stop"
        block = trajectory.block_of(np.arange(prompt, trajectory.length))
        return answer, [t for t, b in zip(decided, block, strict=True) if b <= block[len(answer) - 1]], finish


def _reset(http: BaseHTTPRequestHandler) -> None:
    """Drop the connection with a RST instead of an orderly end."""
    http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    http.connection.close()
    http.close_connection = True


# --- SGLang -----------------------------------------------------------------------------------------------------------


def _sglang_info(server: DialectServer, body: Any) -> dict[str, Any]:
    return {"version": "0.5.23", "dllm_algorithm": server.algorithm, "dllm_algorithm_config": None}


def _sglang_model(server: DialectServer, body: Any) -> dict[str, Any]:
    return {"model_path": "tiny", "weight_version": server.version}


def _sglang_generate(server: DialectServer, body: dict[str, Any]) -> dict[str, Any]:
    wanted = body["sampling_params"]
    assert wanted["ignore_eos"] == (server.eos_token_id is None)
    trajectory = server.sample(
        body["input_ids"],
        wanted["sampling_seed"],
        temperature=wanted["temperature"],
        top_p=wanted["top_p"],
        top_k=max(wanted["top_k"], 0),
    )
    ids, replay, finish = server.answer_of(trajectory, wanted["max_new_tokens"])
    meta: dict[str, Any] = {
        "prompt_tokens": len(body["input_ids"]),
        "completion_tokens": len(ids),
        "finish_reason": {"type": finish, "matched": server.eos_token_id if finish == "stop" else None},
        "weight_version": server.version,
    }
    if body.get("return_step_maps") and server.detail != "sample":
        order = trajectory.position.argsort()
        step, block = trajectory.step[order], trajectory.block_of(trajectory.position[order])
        local = [int(s - step[block == b].min()) + 1 for s, b in zip(step, block, strict=True)]
        meta |= {
            "step_maps": local[: len(ids)],
            "dllm_replay_token_ids": replay,
            "dllm_replay_step_maps": local[: len(replay)],
            "dllm_stop_length": len(ids),
            "dllm_replay_contract_version": 1,
        }
        if server.detail == "logprobs":
            meta["dllm_replay_logprobs"] = trajectory.logprob[order][: len(replay)].tolist()
    return {"text": "", "output_ids": ids, "meta_info": meta}


def _sglang_update(server: DialectServer, body: dict[str, Any]) -> dict[str, Any]:
    server.load(body["model_path"], body["weight_version"])
    return {"success": True, "message": "Succeeded to update model weights."}


# --- vLLM -------------------------------------------------------------------------------------------------------------


def _vllm_complete(server: DialectServer, body: dict[str, Any]) -> dict[str, Any]:
    assert body["model"] == "tiny"
    trajectory = server.sample(
        body["prompt"],
        body["seed"],
        temperature=body["temperature"],
        top_p=body["top_p"],
        top_k=max(body["top_k"], 0),
    )
    ids, _, finish = server.answer_of(trajectory, body["max_tokens"])
    choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": finish}
    if body["return_token_ids"]:
        choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
    return {"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)}}


def _vllm_rpc(server: DialectServer, body: dict[str, Any]) -> dict[str, Any]:
    assert body["method"] == "reload_weights"
    server.load(str(server.root), "unnamed")
    return {"results": [None]}


# --- LMDeploy ---------------------------------------------------------------------------------------------------------


def _lmdeploy_generate(server: DialectServer, body: dict[str, Any]) -> dict[str, Any]:
    # There is no seed in this interface.
    trajectory = server.sample(body["input_ids"], 0, temperature=body["temperature"])
    ids, _, finish = server.answer_of(trajectory, body["max_tokens"])
    if finish == "stop" and not body["include_stop_str_in_output"]:
        ids = ids[:-1]
    meta = {"prompt_tokens": len(body["input_ids"]), "completion_tokens": len(ids), "finish_reason": {"type": finish}}
    return {"text": "", "output_ids": ids, "meta_info": meta}


def _models(server: DialectServer, body: Any) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": "tiny", "object": "model", "root": str(server.root)}]}


def _done(server: DialectServer, body: Any) -> dict[str, Any]:
    return {"status": "ok"}


ROUTES: dict[str, dict[tuple[str, str], Callable[[DialectServer, Any], dict[str, Any]]]] = {
    "sglang": {
        ("GET", "/server_info"): _sglang_info,
        ("GET", "/model_info"): _sglang_model,
        ("POST", "/generate"): _sglang_generate,
        ("POST", "/update_weights_from_disk"): _sglang_update,
    },
    "vllm": {
        ("GET", "/version"): lambda server, body: {"version": "0.33.0"},
        ("GET", "/v1/models"): _models,
        ("POST", "/v1/completions"): _vllm_complete,
        ("POST", "/pause"): _done,
        ("POST", "/collective_rpc"): _vllm_rpc,
        ("POST", "/reset_prefix_cache"): _done,
        ("POST", "/resume"): _done,
    },
    "lmdeploy": {("GET", "/v1/models"): _models, ("POST", "/generate"): _lmdeploy_generate},
}


@contextmanager
def serving(*arguments: Any, **options: Any) -> Iterator[DialectServer]:
    server = DialectServer(*arguments, **options)
    try:
        yield server
    finally:
        server.stop()
        server._place.close()
