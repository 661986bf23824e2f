"""A teacher that a server reads with gives `opd` the numbers of one that is read here."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rewards.causal_lm import CausalReader, load_causal_lm, load_causal_tokenizer
from rewards.score import TransientRewardError
from rewards.served_reader import _reading
from rl.registry import parse_recipe
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from tests.runs import tiny_config
from tests.test_distillation import teacher_folder


@contextlib.contextmanager
def served_teacher(folder: Path, faults: list[int]) -> Iterator[str]:
    """A server with the paths and fields of vLLM's that a teacher needs; tests/test_vllm.py asks a real one.

    Args:
        faults: status codes of the first answers to readings.
    """
    reader = CausalReader(load_causal_lm(folder))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words: Any) -> None: ...

        def answer(self, body: Any, status: int = 200) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self) -> None:
            self.answer({"data": [{"id": "t", "root": str(folder)}], "version": "0"})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers["Authorization"] != "Bearer secret":
                self.answer({"error": "wrong key"}, 401)
                return
            if faults:
                self.answer({}, faults.pop())
                return
            assert asked["model"] == "t" and self.path == "/v1/completions"
            if asked["prompt_logprobs"] > 5:
                self.answer({"error": "greater than max allowed: 5"}, 400)
                return
            choices = []
            for index, ids in enumerate(asked["prompt"]):
                (reading,) = reader.read([ids[:1]], [ids[1:]], asked["prompt_logprobs"])
                places: list[Any] = [None]
                for j, token in enumerate(ids[1:]):
                    best = zip(reading.ids[j].tolist(), reading.logprobs[j].tolist(), strict=True)
                    entry = {str(i): {"logprob": x, "rank": rank} for rank, (i, x) in enumerate(best, 1)}
                    places.append({str(token): {"logprob": float(reading.logprob[j]), "rank": 99}} | entry)
                choices.append({"index": index, "prompt_logprobs": places})
            self.answer({"choices": choices[::-1]})

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_empty_answer_has_no_tokens_and_their_ids_are_ids() -> None:
    reading = _reading([], [], 3)
    assert reading.ids.shape == reading.logprobs.shape == (0, 3) and reading.ids.dtype == torch.int64


def test_a_served_teacher_says_what_the_one_here_says(
    tmp_path: Path, make_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows scored with the teacher in a folder and by its address, which is busy at first; and what it refuses."""
    monkeypatch.setattr("rewards.served_reader.WAITS", (0.0, 0.0))
    # One key for both, that of vLLM servers.
    monkeypatch.setenv("ROLLOUT_API_KEY", "secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    folder = teacher_folder(tmp_path / "teacher", tiny_config(tmp_path))
    tokenizer = load_causal_tokenizer(folder)
    model = make_model("gpt2-full", vocab_size=len(tokenizer))
    options = SamplerOptions(gen_length=4, num_inference_steps=2)
    trajectories = InProcessEngine(model, options).generate([Request([1, 2, 3], seed=s) for s in range(3)])
    run: Any = SimpleNamespace(model=model, tokenizer=tokenizer, device="cpu", config=None)
    with served_teacher(folder, [503, 503]) as url:
        kl = []
        for teacher in (str(folder), url, f"{url}/v1/"):
            recipe = parse_recipe({"name": "opd", "teacher": teacher, "top": 4, "teacher_dtype": "float32"})
            recipe.prepare(run)
            kl.append(recipe.rows(trajectories, model).score(model).kl.tolist())
        assert kl[1] == kl[2] == pytest.approx(kl[0], abs=1e-6) and min(kl[0]) > 0
        with pytest.raises(ValueError, match=r"refuses algorithm\.top 6: .*answered 400.*max allowed: 5"):
            parse_recipe({"name": "opd", "teacher": url, "top": 6}).prepare(run)
        config: Any = SimpleNamespace(model=SimpleNamespace(path=None))
        with pytest.raises(ValueError, match=r"not the whole vocabulary: set algorithm\.top"):
            parse_recipe({"name": "opd", "teacher": url}).check(config)
        renamed = folder / "tokenizer.json"
        renamed.write_text(renamed.read_text().replace('"4"', '"four"'))
        with pytest.raises(ValueError, match=r"teacher http://.* has another vocabulary .*: its token 'four' is \d+"):
            parse_recipe({"name": "opd", "teacher": url, "top": 4}).prepare(run)
    monkeypatch.setattr("rewards.served_reader.WAITS", ())
    with pytest.raises(TransientRewardError, match="refused"):
        recipe.rows(trajectories, model).score(model)
