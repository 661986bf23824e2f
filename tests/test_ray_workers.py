"""Rollout workers under a real Ray: the same rollouts as in the learner's process, whatever happens to a worker."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from rl import distributed
from rl.config import load_config
from rl.train import update
from rl.train.microbatch import MicroBatch
from rl.train.plan import check_engine
from rl.train.rollouts import RolloutSource, sample_lines
from rl.train.run import Run
from rollouts.engines.base import EngineError, StaleVersionError, WeightPushError
from rollouts.engines.in_process import InProcessEngine
from rollouts.engines.ray_workers import NICENESS, RayEngine, _start_ray
from rollouts.engines.shared import SharedForwards
from rollouts.samplers.options import SamplerOptions
from tests import runs
from tests.ray_models import TinyModel, TinySampler, Weights, requests

# A worker starts in seconds, or in a minute when other processes want all cores.
pytestmark = pytest.mark.timeout(900)

OPTIONS = SamplerOptions(gen_length=8, num_inference_steps=4)


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """All engines of this file join it: starting Ray takes longer than any of the tests."""
    import ray

    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    # Sockets lie in it, whose paths must be short.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            object_store_memory=100 * 2**20, _temp_dir=folder,
        )  # fmt: skip
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    signal.signal(signal.SIGTERM, handler)
    # A process group that a training began here goes by variables that are dropped now.
    distributed.stop()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayEngine]:
    """Two workers that get their weights from files."""
    folder = tmp_path_factory.mktemp("weights")
    made = RayEngine(TinySampler(), OPTIONS, workers=2, weights_dir=folder)
    yield made
    made.close()
    assert not folder.exists()


def expected(seed: int, version: int, options: SamplerOptions = OPTIONS, count: int = 11) -> list[Any]:
    return InProcessEngine(SharedForwards(TinyModel(seed)), options).generate(requests(count), version)


def assert_equal(found: list[Any], wanted: list[Any]) -> None:
    """Every field of every trajectory, bit for bit."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        for field in fields(other):
            a, b = getattr(one, field.name), getattr(other, field.name)
            np.testing.assert_array_equal(a, b, err_msg=field.name)
            if isinstance(b, np.ndarray):
                assert a.dtype == b.dtype and a.flags.writeable


def test_workers_sample_what_the_learners_process_would(engine: RayEngine) -> None:
    engine.push_weights(5, Weights(1))
    found = engine.generate(requests(), 5)
    assert_equal(found, expected(1, 5))
    assert found[0].token.tolist() != expected(0, 5)[0].token.tolist(), "the weights of the push made no difference"
    whole = InProcessEngine(SharedForwards(TinyModel(1)), OPTIONS)
    whole.generate(requests(), 5)
    assert engine.stats.rows_asked == whole.stats.rows_asked == 42
    assert engine.stats.generated_tokens == whole.stats.generated_tokens == 88
    # Fewer requests than workers, none at all, and another decoder.
    assert_equal(engine.generate(requests(1), 5), expected(1, 5, count=1))
    assert engine.generate([], 5) == []
    engine.options = SamplerOptions(gen_length=6, num_inference_steps=3, record_x0=True, temperature=0.7)
    assert_equal(engine.generate(requests(), 5), expected(1, 5, engine.options))
    engine.options = OPTIONS


def test_prompts_of_several_lengths_sample_the_same_to_rounding(engine: RayEngine) -> None:
    """A part's canvases are padded to its own longest: bit for bit is what the parts alone give, not all together."""
    engine.push_weights(2, Weights(1))
    asked = requests(ragged=True)
    here = InProcessEngine(SharedForwards(TinyModel(1)), OPTIONS)
    found = engine.generate(asked, 2)
    assert_equal(found, here.generate(asked[:5], 2) + here.generate(asked[5:], 2))
    for one, other in zip(found, here.generate(asked, 2), strict=True):
        assert one.token.tolist() == other.token.tolist() and one.position.tolist() == other.position.tolist()
        np.testing.assert_allclose(one.logprob, other.logprob, rtol=0, atol=1e-6)


def test_weights_come_by_version(engine: RayEngine, tmp_path: Path) -> None:
    engine.push_weights(6, Weights(2))
    assert_equal(engine.generate(requests(), 6), expected(2, 6))
    for version in (5, 7):
        with pytest.raises(StaleVersionError, match=f"weights of version 6, not {version}"):
            engine.generate(requests(), version)
    assert engine._folder is not None
    assert [path.name for path in engine._folder.iterdir()] == ["version_6.safetensors"]
    # A worker whose weights arrive damaged has none, and its refusal is the call's.
    import ray

    worker, blob = engine._workers[1], save(Weights(3).tensors())
    digest = hashlib.sha256(blob).hexdigest()
    assert ray.get(worker.take_weights.remote(7, digest, str(tmp_path / "not here"), None)) is False
    with pytest.raises(WeightPushError, match="version 7 arrived damaged: their checksum is wrong"):
        ray.get(worker.take_weights.remote(7, "0" * 64, None, blob))
    with pytest.raises(StaleVersionError, match="a rollout worker has weights of version None, not 6"):
        engine.generate(requests(), 6)
    assert ray.get(worker.take_weights.remote(6, digest, None, blob)) is True
    # Another model's weights: the push fails and nothing is sampled after it.
    wrong = Weights(3)
    wrong.tensors = lambda: {"other": torch.zeros(1)}  # type: ignore[method-assign]
    with pytest.raises(WeightPushError, match="version 8 are another model's"):
        engine.push_weights(8, wrong)
    with pytest.raises(StaleVersionError, match="weights of version None, not 6"):
        engine.generate(requests(), 6)
    engine.push_weights(9, Weights(3))
    assert_equal(engine.generate(requests(), 9), expected(3, 9))


def test_what_a_worker_refuses_is_the_users_error(engine: RayEngine) -> None:
    engine.push_weights(10, Weights(1))
    asked = requests()
    asked[4].prompt_ids = []
    with pytest.raises(ValueError, match="has an empty prompt"):
        engine.generate(asked, 10)
    assert_equal(engine.generate(requests(), 10), expected(1, 10))


def test_killed_and_hanging_workers_lose_no_prompt(tmp_path: Path) -> None:
    """SIGKILL in the middle of a rollout; weights go through the object store, to the new worker too."""
    import ray

    engine = RayEngine(
        TinySampler(str(tmp_path)), OPTIONS, workers=2, weights_dir=None, max_restarts=1, timeout_seconds=30
    )
    try:
        engine.push_weights(3, Weights(1))
        (tmp_path / "kill_once").touch()
        assert_equal(engine.generate(requests(10), 3), expected(1, 3, count=10))
        assert (engine.stats.workers_lost, engine.stats.requests_reassigned) == (1, 5)
        # One dies between two calls: it shows when it is given weights. The other hangs.
        ray.kill(engine._workers[0])
        engine.push_weights(4, Weights(2))
        (tmp_path / "hang_once").touch()
        assert_equal(engine.generate(requests(1), 4), expected(2, 4, count=1))
        assert (engine.stats.workers_lost, engine.stats.requests_reassigned) == (2, 1)
        # A worker that always dies ends the call, with the cause.
        (tmp_path / "kill_always").touch()
        with pytest.raises(EngineError, match=r"died 2 times under the same requests .*because"):
            engine.generate(requests(1), 4)
    finally:
        engine.close()
    with pytest.raises(EngineError):
        engine.generate(requests(1), 4)


# --- whole runs -------------------------------------------------------------------------------------------------------

# What depends on how requests are batched (equal canvases of one batch share a forward), and what only workers have.
PER_WORKER = ("cost/forward_passes", "cost/sequence_forwards", "cost/tokens_forwarded", "rollout/")


def comparable(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(PER_WORKER)} for line in runs.lines(run)]


def test_a_run_with_workers_equals_the_run_without(tmp_path: Path) -> None:
    for name, extra in (("plain", []), ("workers", ["rollout.engine=ray", "rollout.ray.workers=2"])):
        runs.train_here(runs.tiny_config(tmp_path / name, *extra))
    plain, workers = tmp_path / "plain" / "run", tmp_path / "workers" / "run"
    assert comparable(workers) == comparable(plain)
    assert (workers / "samples.jsonl").read_text() == (plain / "samples.jsonl").read_text()
    assert runs.largest_difference(runs.weights(workers), runs.weights(plain)) == 0.0
    assert runs.series(workers, "train", "rollout/lag_max") == [0.0, 0.0, 0.0]
    assert not list(workers.glob("weights*"))


ASYNCHRONOUS = [
    "rollout.engine=ray", "rollout.ray.workers=1", "rollout.asynchronous=true", "algorithm.old_logprob=recompute",
    "train.steps=5", "checkpoint.every=2", "checkpoint.keep=3",
]  # fmt: skip


def test_asynchronous_runs_learn_from_the_last_policy_and_go_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_before_the_update: list[bool] = []
    learn = update.PolicyUpdater.update

    def waits_for_the_next_rollouts(self: Any, *rollouts: Any) -> dict[str, float]:
        ahead = self.source.ahead
        ahead.wait()
        finished_before_the_update.append(ahead._result is not None)
        return learn(self, *rollouts)

    monkeypatch.setattr(update.PolicyUpdater, "update", waits_for_the_next_rollouts)
    arguments = runs.tiny_config(tmp_path, *ASYNCHRONOUS)
    runs.train_here(arguments)
    run = tmp_path / "run"
    # The rollouts of step k + 1 need nothing of the update of step k; after the last step there are none.
    assert finished_before_the_update == [True] * 4 + [False]
    # Two updates a step: every step but the first learns from weights two updates old.
    assert runs.series(run, "train", "rollout/lag") == [0.0, 2.0, 2.0, 2.0, 2.0]
    assert runs.series(run, "train", "policy/lag_weight")[0] == pytest.approx(1.0, abs=1e-5)
    assert all(abs(weight - 1) > 1e-4 for weight in runs.series(run, "train", "policy/lag_weight")[1:])
    gaps = [line.get("policy/logprob_gap_max") for line in runs.lines(run, "train")]
    assert gaps[0] is not None and gaps[0] < 1e-5 and gaps[1:] == [None] * 4
    # Steps 1 and 2 were both sampled by the policy that RL started from.
    config = load_config(arguments[1], arguments[2:])
    with Run.open(config, write=False) as opened:
        opened.model = opened.modality.load_model(str(run / "warm_start"))
        shown = []
        for step in (0, 1):
            rollouts = RolloutSource(opened).sample(step, 0)
            shown += [{"step": step + 1, **s} for s in sample_lines(opened, rollouts)]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [s for s in samples if s["step"] <= 2] == shown
    # What was sampled ahead is in the checkpoint: a run that goes on from step 2 repeats the rest.
    again = tmp_path / "again"
    shutil.copytree(run, again / "run")
    for step in (4, 5):
        shutil.rmtree(again / "run" / "checkpoints" / f"step_{step}")
    runs.train_here([*arguments, f"run.output_dir={again / 'run'}", "run.resume=true"])
    assert runs.lines(again / "run") == runs.lines(run)
    assert (again / "run" / "samples.jsonl").read_text() == (run / "samples.jsonl").read_text()
    assert runs.largest_difference(runs.weights(again / "run"), runs.weights(run)) == 0.0


# --- no Ray needed ----------------------------------------------------------------------------------------------------


def test_the_correction_by_hand() -> None:
    """Weights 0.5, 1 and 3, the last truncated to 2; they multiply the advantage."""
    recorded = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    rows = type("Rows", (), {"sampler_logprob": recorded})()
    batch = MicroBatch(rows, torch.ones(3), torch.tensor([1.0, -1.0, 4.0], dtype=torch.float64))
    batch.old_logprob = recorded + torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).log()
    weight, truncated = batch.correct_lag(2.0)
    torch.testing.assert_close(batch.advantage, torch.tensor([0.5, -1.0, 8.0], dtype=torch.float64))
    assert weight.tolist() == pytest.approx([0.5, 1.0, 2.0]) and truncated.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["rollout.engine=in_process"], r"rollout\.engine in_process cannot give sampling beside the learner"),
        (["filters.refill_rounds=1"], r"filters\.refill_rounds depends on rewards .*: set it to 0"),
        (["train.epochs=2", "rollout.max_staleness=1"], r"rollout\.max_staleness \(1\) is less than the 2 update"),
        (["algorithm.name=drakes"], r"rollout\.engine ray cannot give samples with a gradient"),
        (
            ["train.block_schedule=[{from_step: 0, rollout: 4, train: 4}]"],
            r"train\.block_schedule changes the decoder",
        ),
    ],
)
def test_what_cannot_be_asynchronous_is_refused(overrides: list[str], line: str) -> None:
    check_engine(load_config(None, ["rollout.engine=ray", "rollout.asynchronous=true"]))
    with pytest.raises(ValueError, match=line):
        check_engine(load_config(None, ["rollout.engine=ray", "rollout.asynchronous=true", *overrides]))


def test_workers_of_a_ray_that_the_run_starts_are_as_nice_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    ray = SimpleNamespace(init=lambda **options: seen.append(os.environ.get(NICENESS)))
    monkeypatch.delenv(NICENESS, raising=False)
    _start_ray(ray, None, 1)
    assert NICENESS not in os.environ
    monkeypatch.setenv(NICENESS, "10")
    _start_ray(ray, None, 1)
    assert seen == ["0", "10"]
