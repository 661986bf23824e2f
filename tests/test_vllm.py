"""Judge, reward model, teacher and baseline against real vLLM servers: `make test-vllm` (marker `vllm`).

The servers run from .venv-vllm on loopback, each with a tiny random Qwen3, and are stopped by their process ids.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from rewards import RewardPart, RewardRunner
from rewards.causal_lm import CausalReader, load_causal_lm
from rewards.openai_client import ChatClient
from rewards.reward_model import RewardModel
from rewards.served_reader import ServedReader
from rl.cli import main
from rl.model_section import ModelConfig
from rl.models.causal import CausalLM, load_autoregressive
from rl.models.folder import served_model
from rl.models.tokenizers import load_tokenizer
from rollouts.engines.causal import CausalEngine, ServedCausalEngine
from rollouts.engines.in_process import Request
from rollouts.engines.server.options import ServerOptions
from rollouts.samplers.options import SamplerOptions
from tests import runs

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
PYTHON = Path(__file__).resolve().parents[1] / ".venv-vllm" / "bin" / "python"
PROMPTS = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12]]
ANSWERS = [[9, 10], [11, 12, 13], [14], [1, 3]]


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for every letter; vLLM asks for one that stands for unknown letters."""
    letters = ["<unk>", "<eos>", *"0123456789=+ abcdefghijklmnopqrstuvwxyz.\n"]
    raw = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A language model and a reward model."""
    tokenizer, found = _tokenizer(), {}
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    kinds = {"lm": (Qwen3ForCausalLM, {}), "rm": (Qwen3ForSequenceClassification, {"id2label": {0: "x"}})}
    for name, (kind, more) in kinds.items():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, pad_token_id=1, tie_word_embeddings=False,
            **sizes, **more,
        )  # fmt: skip
        path = tmp_path_factory.mktemp(name)
        kind(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        found[name] = str(path)
    # What instruction models bring along; a baseline is sampled without it.
    extra = {"eos_token_id": [1, 40], "repetition_penalty": 1.5, "top_k": 3}
    (Path(found["lm"]) / "generation_config.json").write_text(json.dumps(extra))
    return found


@pytest.fixture(scope="module")
def urls(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses of the two servers."""
    if not PYTHON.is_file():
        pytest.skip("no .venv-vllm: make test-vllm")
    logs, found = tmp_path_factory.mktemp("logs"), {}
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, more in (("lm", []), ("rm", ["--runner", "pooling"])):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            found[name] = f"http://127.0.0.1:{port}"
            # The package vllm-cpu has no metadata of the name that its command `vllm` looks for.
            command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", folders[name], "--port"]
            command += [str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", *more]
            log = stack.enter_context((logs / name).open("w"))
            processes[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=logs
            )
            stack.callback(_stop, processes[name])
        for name, process in processes.items():
            _wait(found[name], process, logs / name)
        yield found


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        # Its own group: the server and the engine that it started.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def test_the_teacher_reads_what_the_model_here_reads(folders: dict[str, str], urls: dict[str, str]) -> None:
    here = CausalReader(load_causal_lm(folders["lm"]))
    there = ServedReader(urls["lm"] + "/v1", folders["lm"], batch_size=3)
    for top in (0, 1, 5):
        for ours, theirs in zip(here.read(PROMPTS, ANSWERS, top), there.read(PROMPTS, ANSWERS, top), strict=True):
            torch.testing.assert_close(theirs.logprob, ours.logprob, atol=1e-4, rtol=0)
            if top:
                assert theirs.ids is not None and theirs.ids.tolist() == ours.ids.tolist()
                torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="greater than max allowed: 20"):
        there.read(PROMPTS, ANSWERS, 30)
    with pytest.raises(ValueError, match="not the whole vocabulary"):
        there.read(PROMPTS, ANSWERS, None)
    with pytest.raises(ValueError, match="row 1: an empty prompt"):
        there.read([[3], []], [[4], [5]])
    with pytest.raises(ValueError, match="answered 400"):
        there.read([[3] * 200], [[4]])


def test_a_served_teacher_teaches_as_the_one_here(
    folders: dict[str, str], urls: dict[str, str], tmp_path: Path
) -> None:
    """Two steps of `opd` by the address of the server, and by its model's folder."""
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    judge = "def length(prompts, completions, **columns): return [float(len(text)) for text in completions]"
    for name in ("train", "held"):
        rows = [json.dumps({"prompt": f"{name[0]}{n}+1="}) + "\n" for n in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    words = [
        "task.name=jsonl", f"task.params.train={tmp_path / 'train.jsonl'}", f"model.tokenizer={tmp_path / 'tokenizer'}",
        f"task.params.heldout={tmp_path / 'held.jsonl'}", "sft.steps=0", "train.steps=2", "train.updates_per_step=1",
        "filters.drop_zero_variance=false", "eval.num_prompts=2",
    ]  # fmt: skip
    found = {}
    for name, teacher in {"here": folders["lm"], "served": urls["lm"]}.items():
        algorithm = {"name": "opd", "teacher": teacher, "top": 5, "teacher_dtype": "float32", "teacher_batch_size": 3}
        folder = tmp_path / name
        given = [
            *words,
            f"algorithm={json.dumps(algorithm)}",
            f"reward.functions=[{{name: '{folder}/reward.py:length'}}]",
        ]
        runs.train_here(runs.tiny_config(folder, *given, reward=judge))
        found[name] = [line["policy/teacher_kl"] for line in runs.lines(folder / "run", "train")]
    assert len(found["here"]) == 2 and all(value > 0 for value in found["here"])
    assert found["served"] == pytest.approx(found["here"], abs=1e-4)
    for change, says in (
        ("algorithm.top=30", "refuses algorithm.top 30: .*greater than max allowed: 20"),
        ("algorithm.top=null", r"not the whole vocabulary: set algorithm\.top"),
    ):
        with pytest.raises(ValueError, match=says):
            runs.train_here(runs.tiny_config(tmp_path / "no", *given, change, reward=judge))


def test_a_served_reward_model_gives_the_rewards_of_the_one_here(folders: dict[str, str], urls: dict[str, str]) -> None:
    texts = ["abc", "1+1=", "hi"], ["de", "2", "x y"]
    here = RewardModel(folders["rm"])(*texts)
    there = RewardModel(folders["rm"], base_url=urls["rm"] + "/v1")(*texts)
    assert [score.value for score in there] == pytest.approx([score.value for score in here], abs=1e-4)
    assert len({score.value for score in here}) == 3


def test_a_judge_is_asked_and_its_unreadable_ratings_are_masked(folders: dict[str, str], urls: dict[str, str]) -> None:
    client = ChatClient(urls["lm"] + "/v1", folders["lm"])
    answers = client.complete([{"role": "user", "content": "ab"}], temperature=1.0, max_tokens=5, num_choices=3)
    assert len(answers) == 3 and any(answers)
    params = {"base_url": urls["lm"] + "/v1", "model": folders["lm"], "template": "{completion}", "max_tokens": 8}
    with RewardRunner([RewardPart("llm_judge", params=params)], max_failure_share=1.0) as runner:
        table = runner.score(["1", "2"], ["a", "b"], {})
    # Random weights write no rating: that is a failure of the judge, not a 0.
    assert table.values == [None, None] and table.metrics["reward/llm_judge/failures"] == 2


def test_the_baseline_answers_as_the_model_here(folders: dict[str, str], urls: dict[str, str]) -> None:
    options = SamplerOptions(gen_length=12, temperature=0)
    lm = load_causal_lm(folders["lm"])
    wanted = CausalEngine(CausalLM(lm, lm.config, 128), options, eos_token_id=1)
    model = load_autoregressive(ModelConfig(path=urls["lm"], autoregressive=True), ServerOptions())
    assert model.max_length == 128 and model.server is not None
    served = ServedCausalEngine(model.server, model, options, eos_token_id=1)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    for ours, theirs in zip(wanted.generate(requests), served.generate(requests), strict=True):
        theirs.validate()
        assert theirs.response_ids().tolist() == ours.response_ids().tolist()
        assert theirs.num_steps == ours.num_steps and theirs.step.tolist() == ours.step.tolist()
    sampled = ServedCausalEngine(model.server, model, options.model_copy(update={"temperature": 1.0}), eos_token_id=1)
    first, again = (([t.response_ids().tolist() for t in sampled.generate(requests)]) for _ in range(2))
    assert first == again and first != [t.response_ids().tolist() for t in served.generate(requests)]


def test_eval_reports_it(
    folders: dict[str, str], urls: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert served_model(urls["lm"])["version"].startswith("0.")
    tokenizer: Any = load_tokenizer(ModelConfig(path=urls["lm"], autoregressive=True), None)  # type: ignore[arg-type]
    assert tokenizer("ab").input_ids == [15, 16]
    words = ["task.name=sudoku", "sampler.gen_length=16", "eval.num_prompts=4", "run.device=cpu"]
    assert main(["eval", f"eval.baseline={urls['lm']}", *words, "--output", str(tmp_path / "one.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"autoregressive, {urls['lm']}" and "n=4" in lines[2] and "tokens/forward=1.00" in lines[2]
    assert main(["eval", f"eval.baseline={urls['lm']}", *words, "--output", str(tmp_path / "kept")]) == 0
    settings = json.loads((tmp_path / "kept" / "settings.json").read_text())
    assert settings["model"]["fingerprint"].startswith(folders["lm"]) and "vLLM 0." in settings["model"]["fingerprint"]
