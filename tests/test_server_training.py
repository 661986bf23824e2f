"""Whole runs whose rollouts come from servers, against the runs that sample in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rl.cli import main
from rl.config import load_config
from rl.modalities.base import open_modality
from rl.tasks.load import load_task
from tests import runs
from tests.dialect_servers import DialectServer, serving

SMALL = [
    f"model.backbone={json.dumps(runs.QWEN3)}",
    "model.attention=block_causal",
    "model.block_length=4",
    "train.steps=2",
    "eval.num_prompts=2",
    "eval.viewer_items=0",
]
RECIPES = {"sglang": [], "vllm": ["algorithm={name: diffu_grpo, prompt_mask: 0, kl_to: none, kl_coef: 0}"]}


@contextmanager
def served(dialect: str, folder: Path, **options: Any) -> Iterator[tuple[DialectServer, list[str]]]:
    """A server that was started with other weights than the run's, and the overrides that use it."""
    _, path, *overrides = runs.tiny_config(folder, *SMALL, "run.seed=5")
    config = load_config(path, overrides)
    modality = open_modality(config, load_task(config.task.name, config.task.params))
    model = modality.load_model()
    root = folder / "weights" / "current"
    modality.save_model(model, folder / "start")
    root.parent.mkdir()
    root.symlink_to(folder / "start")
    eos = modality.tokenizer.eos_token_id
    with serving(dialect, model, config.sampler, eos, root=root, **options) as server:
        where = {"dialect": dialect, "urls": [server.url], "weights_dir": str(root.parent), "retry_seconds": 0.01}
        yield server, ["rollout.engine=server", f"rollout.server={json.dumps(where)}"]


@pytest.mark.parametrize("dialect", RECIPES)
def test_a_run_with_a_server_is_the_run_in_this_process(dialect: str, tmp_path: Path) -> None:
    """Samples to the token, weights to rounding: a server decodes its requests one by one. SGLang's step maps and
    log-probs serve TraceRL; vLLM's finished answers are enough for a recipe on fresh masked copies of them.
    """
    runs.train_here(runs.tiny_config(tmp_path / "here", *SMALL, *RECIPES[dialect]))
    with served(dialect, tmp_path) as (server, overrides):
        server.faults = [*[None] * 5, "reset", *[None] * 7, "500"]
        if dialect == "sglang":
            overrides.append("rollout.server.layout=sdar")
        runs.train_here(runs.tiny_config(tmp_path / "there", *SMALL, *RECIPES[dialect], *overrides))
    here, there = tmp_path / "here" / "run", tmp_path / "there" / "run"
    mine, theirs = (
        [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()] for run in (here, there)
    )
    if dialect == "vllm":
        # What it does not say is not known: a trajectory of one step stands for any.
        assert all(sample.pop("num_steps") == 1 for sample in theirs)
        mine = [{k: v for k, v in sample.items() if k != "num_steps"} for sample in mine]
    assert mine == theirs
    assert sum(runs.series(there, "train", "rollout/retries")) == 2
    for name in ("reward/mean", "loss/total", "policy/grad_norm", "policy/decisions"):
        assert runs.series(there, "train", name) == pytest.approx(runs.series(here, "train", name), rel=1e-4), name
    if dialect == "sglang":
        assert max(runs.series(there, "train", "policy/logprob_gap_max")) < 1e-4
    assert runs.largest_difference(runs.weights(here), runs.weights(there)) < 1e-4
    # A server that cut the connection and names no version gets the weights once more.
    again = 1 if dialect == "vllm" else 0
    assert sum(runs.series(there, "train", "rollout/repushes")) == again
    # One push per step, with the number of optimizer updates as its version; the last update is never sampled.
    pushed = [body for path, body in server.seen if path in ("/update_weights_from_disk", "/collective_rpc")]
    assert len(pushed) == 2 + again
    if dialect == "sglang":
        assert [body["weight_version"] for body in pushed] == ["0", "2"]
        # What a real one loads: the layout that its models are published in.
        described = json.loads((tmp_path / "weights" / "current" / "config.json").read_text())
        assert described["architectures"] == ["SDARForCausalLM"]


def test_servers_sample_the_next_step_beside_the_learner(tmp_path: Path) -> None:
    with served("sglang", tmp_path) as (server, overrides):
        arguments = runs.tiny_config(tmp_path / "there", *SMALL, *overrides, "rollout.asynchronous=true")
        runs.train_here([*arguments, "train.steps=3"])
    run = tmp_path / "there" / "run"
    # Two updates a step; the first step's rollouts have nothing to be behind of.
    assert runs.series(run, "train", "rollout/lag_max") == [0, 2, 2]
    assert runs.series(run, "train", "policy/decisions")[0] > 0
    pushed = [body["weight_version"] for path, body in server.seen if path == "/update_weights_from_disk"]
    assert pushed == ["0", "2"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["train", *arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0
    return message


def test_a_recipe_that_a_server_cannot_serve_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served("vllm", tmp_path) as (server, overrides):
        message = refusal(capsys, *runs.tiny_config(tmp_path / "a", *SMALL, *overrides))
        assert "rollout.engine server cannot give" in message and "algorithm.name tracerl" in message
        scope = "algorithm={name: diffu_grpo, scope: canvas, prompt_mask: 0}"
        message = refusal(capsys, *runs.tiny_config(tmp_path / "b", *SMALL, scope, *overrides))
        assert "step_maps" in message and "algorithm.name diffu_grpo" in message
        # The handshake's one rollout each, and no weights.
        assert [path for path, _ in server.seen].count("/v1/completions") == 2
        assert "/collective_rpc" not in [path for path, _ in server.seen]


def test_a_config_that_servers_cannot_follow_is_refused_before_a_server_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = runs.tiny_config(tmp_path, *SMALL, "rollout.engine=server")
    assert "rollout.server.urls is empty" in refusal(capsys, *arguments)
    url = "rollout.server.urls=['http://127.0.0.1:9']"
    assert "sampler.selector is 'threshold'" in refusal(capsys, *arguments, url, "sampler.selector=threshold")
    assert "rollout.server.dialect" in refusal(capsys, *arguments, "rollout.server.dialect=tgi")
