"""Server back ends: what a dialect's answer becomes, what is refused, and what every fault leads to.

The servers are local ones that speak the dialects (`tests/dialect_servers.py`), backed by our own engine.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl.estimators.draws import everything_hidden
from rl.estimators.masked_copies import copy_rows
from rl.estimators.trace_rows import trace_rows
from rollouts.engines.base import EngineError, StaleVersionError, WeightPushError, require
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.server.answers import Answer, Ask, Canvas, to_trajectory
from rollouts.engines.server.engine import ServerEngine
from rollouts.engines.server.errors import BadAnswerError, RefusedError, UnavailableError
from rollouts.engines.server.options import ServerOptions
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import TokenTrajectory, load_trajectories, save_trajectories
from tests.dialect_servers import DialectServer, Mangle, serving

EOS, MASK, VOCAB = 2, 11, 12
OPTIONS = SamplerOptions(gen_length=8, num_inference_steps=4, temperature=0.8, top_k=6)

# --- one answer -------------------------------------------------------------------------------------------------------

# Three prompt tokens and blocks of four from position 0: the response's blocks hold 1, 4 and 4 positions.
BLOCKS = Canvas(gen_length=7, block_length=4, block_causal=True, mask_token_id=MASK, vocab_size=VOCAB)
ASK = Ask(
    prompt_ids=(5, 6, 7), seed=3, max_new_tokens=9, temperature=1.0, top_p=1.0, top_k=0, eos_token_id=EOS
)  # fmt: skip
STOPPED = Answer(
    prompt_length=3,
    token_ids=[4, 8, 9, EOS],
    finish="stop",
    replay_ids=[4, 8, 9, EOS, 10],
    step_map=[1, 2, 1, 3, 2],
    logprobs=[-0.1, -0.2, -0.3, -0.4, -0.5],
)


def checked(answer: Answer, ask: Ask = ASK, canvas: Canvas = BLOCKS) -> TokenTrajectory:
    return to_trajectory(answer, ask, canvas, SamplerOptions(gen_length=7), {"engine": "any"}, policy_version=4)


def test_an_answer_with_a_step_map_is_the_trajectory_that_it_describes() -> None:
    """Steps count on from block to block; within a step positions ascend, as our own engine writes them."""
    trajectory = checked(STOPPED)
    assert trajectory.step.tolist() == [0, 1, 2, 2, 3]
    assert trajectory.position.tolist() == [3, 5, 4, 7, 6]
    assert trajectory.token.tolist() == [4, 9, 8, 10, EOS]
    assert trajectory.logprob.tolist() == [-0.1, -0.3, -0.2, -0.5, -0.4]
    assert (trajectory.num_steps, trajectory.length, trajectory.stop_length) == (4, 8, 4)
    assert (trajectory.block_length, trajectory.block_origin, trajectory.detail) == (4, 0, "logprobs")
    assert (trajectory.policy_version, trajectory.seed, trajectory.decoder) == (4, 3, {"engine": "any"})
    assert trajectory.response_ids().tolist() == [4, 8, 9, EOS]


def test_an_answer_at_the_length_limit_ends_with_its_block_and_counts_gen_length() -> None:
    tokens = [4, 8, 9, 4, 8, 9, 4, 8, 9]
    answer = Answer(3, tokens, "length", replay_ids=tokens, step_map=[1] * 9, logprobs=[-1.0] * 9)
    trajectory = checked(answer)
    assert (trajectory.num_steps, trajectory.length, trajectory.stop_length) == (3, 12, 7)


def test_a_finished_sample_alone_says_what_it_does_not_know(tmp_path: Path) -> None:
    trajectory = checked(replace(STOPPED, replay_ids=None, step_map=None, logprobs=None))
    assert trajectory.detail == "sample"
    assert np.isnan(trajectory.logprob).all() and np.isnan(trajectory.confidence).all()
    assert trajectory.final_canvas().tolist() == [5, 6, 7, 4, 8, 9, EOS, MASK]
    save_trajectories(tmp_path / "t.npz", [trajectory])
    assert load_trajectories(tmp_path / "t.npz")[0].detail == "sample"
    with pytest.raises(ValueError, match="must be NaN"):
        replace(trajectory, logprob=np.zeros(4)).validate()
    with pytest.raises(ValueError, match="not finite"):
        replace(trajectory, detail="logprobs").validate()


BAD = {
    "another prompt": ({"prompt_length": 4}, "another prompt"),
    "another prompt of that length": ({"prompt_ids": [5, 6, 8]}, "another prompt"),
    "outside the vocabulary": ({"token_ids": [4, 8, VOCAB, EOS]}, "outside the vocabulary"),
    "negative token": ({"token_ids": [4, -1, 9, EOS]}, "outside the vocabulary"),
    "mask": ({"replay_ids": [4, 8, 9, EOS, MASK]}, "the mask"),
    "no end": ({"token_ids": [4, 8, 9]}, "hold no end token"),
    "nothing": ({"token_ids": []}, "hold no end token"),
    "behind the end": ({"token_ids": [4, EOS, 9, EOS]}, "go on behind the end token at 1"),
    "length with an end": ({"finish": "length"}, "holds an end token"),
    "short length": ({"finish": "length", "token_ids": [4, 8]}, "limit of 9 tokens and holds 2"),
    "finish": ({"finish": "tool_calls"}, "tool_calls"),
    "truncated block": ({"replay_ids": [4, 8, 9, EOS], "step_map": [1, 2, 1, 3]}, "blocks end at position 7"),
    "a block too many": (
        {"replay_ids": [4, 8, 9, EOS, 10, 1, 1, 1, 1], "step_map": [1, 2, 1, 3, 2, 1, 1, 1, 1]},
        "end",
    ),
    "another answer": ({"replay_ids": [4, 8, 8, EOS, 10]}, "do not begin with the answer"),
    "short map": ({"step_map": [1, 2, 1, 3]}, "4 entries for 5 tokens"),
    "long map": ({"step_map": [1, 2, 1, 3, 2, 2]}, "6 entries for 5 tokens"),
    "missing step": ({"step_map": [1, 1, 1, 3, 3]}, "without gaps"),
    "steps from 0": ({"step_map": [0, 1, 0, 2, 1]}, "without gaps"),
    "steps count on": ({"step_map": [1, 3, 2, 4, 3]}, "without gaps"),
    "blocks out of order": ({"step_map": [4, 2, 1, 3, 2]}, "without gaps"),
    "NaN": ({"logprobs": [-0.1, float("nan"), -0.3, -0.4, -0.5]}, "log-prob of token 1 is nan"),
    "infinite": ({"logprobs": [-0.1, -0.2, float("-inf"), -0.4, -0.5]}, "log-prob of token 2 is -inf"),
    "no log-prob": ({"logprobs": [-0.1, -0.2, -0.3, -0.4, 0.5]}, "log-prob of token 4 is 0.5"),
    "few log-probs": ({"logprobs": [-0.1]}, "1 log-probs for 5 tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_does_not_hold_up_is_none(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(BadAnswerError, match=message):
        checked(replace(STOPPED, **changes))


def test_a_token_the_learner_gives_probability_0_is_refused() -> None:
    with pytest.raises(BadAnswerError, match=r"token 1 is 8, .*never_generate"):
        checked(STOPPED, canvas=replace(BLOCKS, excluded=[[8, 9]]))


# --- engines ----------------------------------------------------------------------------------------------------------


class Weights:
    """A `WeightSource` of one model."""

    def __init__(self, model: Any):
        self.model = model

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def tensors(self) -> dict[str, Any]:
        return dict(self.model.named_parameters())


REQUESTS = [Request(ids, seed) for seed, ids in enumerate([[5, 6, 7], [3], [4, 4, 5, 6], [9, 8, 7, 6, 5], [3]])]


def engine_for(
    servers: Sequence[DialectServer], model: Any, folder: Path, eos: int | None = EOS, **changes: Any
) -> ServerEngine:
    settings = {"retry_seconds": 0.001, "timeout_seconds": 60, "concurrency": 4, **changes}
    server = ServerOptions(dialect=servers[0].dialect, urls=[s.url for s in servers], **settings)  # type: ignore[arg-type]
    return ServerEngine(server, model, OPTIONS, weights_dir=folder / "weights", eos_token_id=eos)


def in_process(model: Any, version: int, eos: int | None = EOS) -> list[TokenTrajectory]:
    return InProcessEngine(model, OPTIONS, eos_token_id=eos).generate(REQUESTS, version)


def assert_same(ours: Sequence[TokenTrajectory], theirs: Sequence[TokenTrajectory]) -> None:
    """Everything but the score of positions, which no server returns, and the name of the rule."""
    for one, other in zip(ours, theirs, strict=True):
        for name in ("prompt_ids", "step", "position", "token"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
        np.testing.assert_allclose(one.logprob, other.logprob, rtol=0, atol=1e-9)
        rest = (
            "length",
            "num_steps",
            "stop_length",
            "block_length",
            "block_origin",
            "sampler",
            "policy_version",
            "seed",
        )
        assert [getattr(one, name) for name in rest] == [getattr(other, name) for name in rest]


@pytest.fixture(scope="module", params=["qwen3-full", "qwen3-block4"])
def models(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> list[Any]:
    """A model, and another one of its layout."""
    return [make_model(request.param, VOCAB, seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def block_models(make_model: Callable[..., Any]) -> list[Any]:
    return [make_model("qwen3-block4", VOCAB, seed) for seed in (0, 1)]


def test_a_server_with_step_maps_and_log_probs_gives_our_own_trajectories(models: list[Any], tmp_path: Path) -> None:
    """It is started with one model and gets the other one pushed: the weights that sample are those of the version."""
    with serving("sglang", models[0], OPTIONS, EOS) as server:
        engine = engine_for([server], models[1], tmp_path)
        needs = {"step_maps": "algorithm.name tracerl", "sampled_logprobs": "algorithm.name tracerl"}
        require("server", engine.capabilities(), needs)
        with pytest.raises(StaleVersionError, match="does not have weight version 7: push it first"):
            engine.generate(REQUESTS, 7)
        engine.push_weights(7, Weights(models[1]))
        assert_same(engine.generate(REQUESTS, 7), in_process(models[1], 7))
        stats = engine.stats
        engine.push_weights(8, Weights(models[0]))
        again = engine.generate(REQUESTS, 8)
        assert_same(again, in_process(models[0], 8))
        assert stats.sequence_forwards == sum(t.num_steps for t in in_process(models[1], 7))
        assert {path.name for path in (tmp_path / "weights").iterdir()} == {"version_8", "current"}
        assert again[0].decoder["engine"] == "sglang" and again[0].decoder["dllm_algorithm"] == "LowConfidence"


def test_without_an_end_token_responses_run_to_their_length(block_models: list[Any], tmp_path: Path) -> None:
    with serving("sglang", block_models[0], OPTIONS, None) as server:
        engine = engine_for([server], block_models[0], tmp_path, eos=None)
        engine.push_weights(0, Weights(block_models[0]))
        assert_same(engine.generate(REQUESTS), in_process(block_models[0], 0, eos=None))


@pytest.mark.parametrize("detail", ["sample", "steps"])
def test_what_a_server_does_not_return_no_recipe_gets(block_models: list[Any], tmp_path: Path, detail: str) -> None:
    """As released SGLang returns neither steps nor log-probs; with its pull request, steps."""
    model = block_models[0]
    with serving("sglang", model, OPTIONS, EOS, detail=detail) as server:
        engine = engine_for([server], model, tmp_path)
        engine.push_weights(0, Weights(model))
        trajectories = engine.generate(REQUESTS)
        require("server", engine.capabilities(), {})
        lacking = "step_maps" if detail == "sample" else "sampled_logprobs"
        with pytest.raises(ValueError, match=rf"rollout.engine server cannot give .*{lacking}.*algorithm.name tracerl"):
            require("server", engine.capabilities(), {lacking: "algorithm.name tracerl"})
    ours = in_process(model, 0)
    assert [t.response_ids().tolist() for t in trajectories] == [t.response_ids().tolist() for t in ours]
    if detail == "sample":
        with pytest.raises(ValueError, match="trace of a trajectory without its steps"):
            trace_rows(trajectories, model)
        with pytest.raises(ValueError, match=r"algorithm\.scope canvas"):
            copy_rows(trajectories, model, everything_hidden, scope="canvas")
    else:
        mine, theirs = trace_rows(trajectories, model), trace_rows(ours, model)
        assert mine.sampler_logprob is None and theirs.sampler_logprob is not None
        assert mine.input_ids.tolist() == theirs.input_ids.tolist() and mine.target.tolist() == theirs.target.tolist()
    # What is hidden and read is the answer: nothing else of the terminal block is looked at.
    mine, theirs = (copy_rows(t, model, everything_hidden)[0] for t in (trajectories, ours))
    np.testing.assert_array_equal(mine.score(model).logprob.detach(), theirs.score(model).logprob.detach())


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(block_models: list[Any], tmp_path: Path) -> Any:
    """A server, and an engine that has pushed version 1, the second model, to it."""
    with serving("sglang", block_models[0], OPTIONS, EOS) as server:
        engine = engine_for([server], block_models[1], tmp_path, retries=3)
        engine.push_weights(1, Weights(block_models[1]))
        yield server, engine


@pytest.mark.parametrize("fault", ["500", "reset", "cut", "abort"])
def test_a_request_that_was_cut_off_is_sent_again_and_counted(fault: str, pair: Any, block_models: list[Any]) -> None:
    server, engine = pair
    server.faults = [None, fault, None, fault]
    assert_same(engine.generate(REQUESTS, 1), in_process(block_models[1], 1))
    assert (engine.stats.retries, engine.stats.repushes) == (2, 0)


def test_a_server_that_stays_down_ends_the_call_after_the_retries(pair: Any) -> None:
    server, engine = pair
    server.faults = ["500"] * 100
    with pytest.raises(UnavailableError, match=r"answered 500: .*out of memory.*attempt 4 of 4"):
        engine.generate(REQUESTS[:1], 1)
    server.faults = []
    server.stop()
    with pytest.raises(UnavailableError, match="refused"):
        engine.generate(REQUESTS, 1)
    server.start()


def _meta(name: str, value: Any) -> Mangle:
    return lambda answer: answer["meta_info"].update({name: value})


def _replay_without_the_last(answer: dict[str, Any]) -> None:
    for name in ("dllm_replay_token_ids", "dllm_replay_step_maps", "dllm_replay_logprobs"):
        answer["meta_info"][name].pop()


def _first(name: str, value: Any) -> Mangle:
    return lambda answer: answer["meta_info"][name].__setitem__(0, value)


MANGLED: dict[str, tuple[Mangle, type[EngineError], str]] = {
    "truncated block": (_replay_without_the_last, BadAnswerError, "blocks end at position"),
    "wrong version": (_meta("weight_version", "0"), StaleVersionError, "weight version 0: 1 was asked for"),
    "no version": (lambda a: a["meta_info"].pop("weight_version"), BadAnswerError, "it has no weight_version"),
    "doubled step": (lambda a: a["meta_info"]["dllm_replay_step_maps"].append(1), BadAnswerError, "entries for"),
    "missing step": (_first("dllm_replay_step_maps", 9), BadAnswerError, "without gaps"),
    "null step": (_first("dllm_replay_step_maps", None), BadAnswerError, r"step_maps\[0\] is None, not an integer"),
    "no steps": (lambda a: a["meta_info"].pop("dllm_replay_step_maps"), BadAnswerError, "no dllm_replay_step_maps"),
    "nothing to replay": (_meta("dllm_replay_contract_version", None), BadAnswerError, "carries sample"),
    "new contract": (_meta("dllm_replay_contract_version", 2), BadAnswerError, "this code reads 1"),
    "NaN": (_first("dllm_replay_logprobs", float("nan")), BadAnswerError, "log-prob of token 0 is nan"),
    "null log-prob": (_first("dllm_replay_logprobs", None), BadAnswerError, "not a number"),
    "no log-probs": (_meta("dllm_replay_logprobs", None), BadAnswerError, "carries steps"),
    "another prompt": (_meta("prompt_tokens", 2), BadAnswerError, "another prompt"),
    "stop length": (_meta("dllm_stop_length", 1), BadAnswerError, "dllm_stop_length is 1"),
    "mask": (_first("dllm_replay_token_ids", MASK), BadAnswerError, "the mask"),
    "not an object": (lambda a: a.pop("meta_info"), BadAnswerError, "it has no meta_info"),
}


@pytest.mark.parametrize("name", MANGLED)
def test_a_bad_answer_ends_the_call_with_its_cause(name: str, pair: Any) -> None:
    """Whatever else the call has sampled by then: no answer is repaired, and none is missing in silence."""
    server, engine = pair
    mangle, kind, message = MANGLED[name]
    server.faults = [None, None, mangle]
    with pytest.raises(kind, match=message):
        engine.generate(REQUESTS, 1)
    assert engine.stats.retries == 0


def test_closing_the_engine_ends_a_call_that_is_under_way(pair: Any, block_models: list[Any]) -> None:
    server, engine = pair
    server.faults = [None, lambda answer: engine.close()]
    with pytest.raises(EngineError, match="closed while it sampled"):
        engine.generate(REQUESTS, 1)
    assert_same(engine.generate(REQUESTS, 1), in_process(block_models[1], 1))


def test_a_crash_during_a_weight_push_leaves_no_mixture(pair: Any, block_models: list[Any]) -> None:
    server, engine = pair
    server.push_faults = ["crash"]
    with pytest.raises(WeightPushError, match=r"weight version 2 did not reach a server: .*attempt 4 of 4"):
        engine.push_weights(2, Weights(block_models[0]))
    # It comes back with the weights it was once started with: neither version 1 nor, as far as anybody knows, 2.
    server.restart(block_models[1])
    for version in (1, 2):
        with pytest.raises(StaleVersionError, match=f"weight version {version}: push it first"):
            engine.generate(REQUESTS, version)
    engine.push_weights(2, Weights(block_models[0]))
    assert_same(engine.generate(REQUESTS, 2), in_process(block_models[0], 2))


def test_a_server_that_is_up_with_half_of_a_push_is_not_sampled(pair: Any, block_models: list[Any]) -> None:
    server, engine = pair
    server.push_faults = ["half"] * 4
    with pytest.raises(WeightPushError, match=r"answered 500.*attempt 4 of 4"):
        engine.push_weights(2, Weights(block_models[0]))
    asked = len(server.seen)
    for version in (1, 2):
        with pytest.raises(StaleVersionError):
            engine.generate(REQUESTS, version)
    assert "/generate" not in [path for path, _ in server.seen[asked:]]


@pytest.mark.parametrize("fault", ["half", "no"])
def test_a_push_is_tried_again_unless_it_was_refused(fault: str, pair: Any, block_models: list[Any]) -> None:
    server, engine = pair
    server.push_faults = [fault]
    if fault == "no":
        with pytest.raises(WeightPushError, match="no such folder"):
            engine.push_weights(2, Weights(block_models[0]))
    else:
        engine.push_weights(2, Weights(block_models[0]))
        assert_same(engine.generate(REQUESTS, 2), in_process(block_models[0], 2))


def test_weights_that_could_not_be_written_whole_are_never_pushed(pair: Any, block_models: list[Any]) -> None:
    server, engine = pair

    class FullDisk(Weights):
        def save(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text("{")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        engine.push_weights(2, FullDisk(block_models[0]))
    assert server.version == "1"
    with pytest.raises(StaleVersionError):
        engine.generate(REQUESTS, 2)


def test_a_server_that_lost_the_weights_gets_them_again(pair: Any, block_models: list[Any]) -> None:
    server, engine = pair
    server.restart(block_models[0])
    assert_same(engine.generate(REQUESTS, 1), in_process(block_models[1], 1))
    assert (engine.stats.repushes, server.version) == (1, "1")


def test_the_servers_that_are_up_take_the_requests_of_one_that_is_not(block_models: list[Any], tmp_path: Path) -> None:
    model = block_models[0]
    with serving("sglang", model, OPTIONS, EOS) as one, serving("sglang", model, OPTIONS, EOS) as other:
        engine = engine_for([one, other], model, tmp_path)
        engine.push_weights(0, Weights(model))
        assert_same(engine.generate(REQUESTS), in_process(model, 0))
        assert all(sum(path == "/generate" for path, _ in s.seen) > 1 for s in (one, other))
        one.stop()
        assert_same(engine.generate(REQUESTS), in_process(model, 0))
        assert engine.stats.retries == 3
        # New weights pass it by; when it is back, with the old ones, it gets them before it samples.
        engine.push_weights(1, Weights(block_models[1]))
        one.start()
        assert_same(engine.generate(REQUESTS, 1), in_process(block_models[1], 1))
        assert (engine.stats.repushes, one.version, other.version) == (1, "1", "1")


def test_one_rank_pushes_and_the_others_sample_with_what_it_pushed(block_models: list[Any], tmp_path: Path) -> None:
    class NoWeights(Weights):
        def save(self, folder: Path) -> None:
            raise AssertionError("only the leader writes")

    met, told = threading.Barrier(2), []

    def from_leader(leads: bool) -> Callable[[Any], Any]:
        calls = iter(range(9))

        def value_of_leader(value: Any) -> Any:
            if leads:
                told.append(value)
            met.wait(60)
            return told[next(calls)]

        return value_of_leader

    with (
        serving("sglang", block_models[0], OPTIONS, EOS) as server,
        serving("sglang", block_models[0], OPTIONS, EOS) as down,
    ):
        options = ServerOptions(urls=[server.url, down.url], retries=0)
        leader, other = (
            ServerEngine(
                options,
                block_models[1],
                OPTIONS,
                weights_dir=tmp_path,
                eos_token_id=EOS,
                leader=leads,
                from_leader=from_leader(leads),
            )
            for leads in (True, False)
        )
        down.stop()
        with ThreadPoolExecutor(1) as thread:
            pushing = thread.submit(leader.push_weights, 3, Weights(block_models[1]))
            # The other still has rollouts of the old weights to get.
            time.sleep(0.5)
            assert (server.version, list(tmp_path.iterdir()), pushing.done()) == ("default", [], False)
            other.push_weights(3, NoWeights(None))
            pushing.result()
        assert [peer.version for peer in leader.peers] == [peer.version for peer in other.peers] == [3, None]
        down.start()
        assert_same(other.generate(REQUESTS, 3), in_process(block_models[1], 3))


# --- the other dialects -----------------------------------------------------------------------------------------------


@contextmanager
def vllm(model: Any, folder: Path) -> Iterator[DialectServer]:
    """Started from the link that the engine moves, as docs/engines.md says."""
    start = folder / "weights" / "current"
    model.save_pretrained(folder / "start")
    start.parent.mkdir()
    start.symlink_to(folder / "start")
    with serving("vllm", model, OPTIONS, EOS, root=start) as server:
        yield server


def test_vllm_gives_finished_samples_of_the_pushed_weights(models: list[Any], tmp_path: Path) -> None:
    with vllm(models[0], tmp_path) as server:
        engine = engine_for([server], models[1], tmp_path)
        assert engine.capabilities().policy_version and not engine.capabilities().step_maps
        with pytest.raises(StaleVersionError):
            engine.generate(REQUESTS, 1)
        engine.push_weights(1, Weights(models[1]))
        paths = [path for path, _ in server.seen]
        assert paths[-4:] == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]
        answers = [t.response_ids().tolist() for t in in_process(models[1], 1)]
        trajectories = engine.generate(REQUESTS, 1)
        assert [t.response_ids().tolist() for t in trajectories] == answers
        assert {t.detail for t in trajectories} == {"sample"}
        # It never says what it holds; started anew, unnoticed, it holds what it was given last.
        server.restart()
        assert [t.response_ids().tolist() for t in engine.generate(REQUESTS, 1)] == answers
        server.faults = ["reset"]
        assert [t.response_ids().tolist() for t in engine.generate(REQUESTS, 1)] == answers
        # Whoever else asks it is not left waiting when it refuses new weights.
        server.push_faults = ["no"]
        with pytest.raises(WeightPushError):
            engine.push_weights(2, Weights(models[0]))
        assert [path for path, _ in server.seen][-3:] == ["/pause", "/collective_rpc", "/resume"]


def test_a_vllm_server_that_could_come_back_with_other_weights_is_refused(
    block_models: list[Any], tmp_path: Path
) -> None:
    message = r"elsewhere, .*make .*weights/current a link"
    with (
        serving("vllm", block_models[0], OPTIONS, EOS, root=tmp_path / "elsewhere") as server,
        pytest.raises(EngineError, match=message),
    ):
        engine_for([server], block_models[0], tmp_path)


def test_vllm_echoes_the_prompt(block_models: list[Any], tmp_path: Path) -> None:
    with vllm(block_models[0], tmp_path) as server:
        engine = engine_for([server], block_models[0], tmp_path)
        engine.push_weights(0, Weights(block_models[0]))
        server.faults = [lambda answer: answer["choices"][0].update(prompt_token_ids=[1, 1, 1])]
        with pytest.raises(BadAnswerError, match="another prompt"):
            engine.generate(REQUESTS[:1])


def test_lmdeploy_samples_with_what_it_was_started_with_and_nothing_learns_from_it(
    block_models: list[Any], tmp_path: Path
) -> None:
    with serving("lmdeploy", block_models[0], OPTIONS, EOS) as server:
        engine = engine_for([server], block_models[0], tmp_path)
        trajectories = engine.generate([Request([5, 6, 7], 0)])
        ours = in_process(block_models[0], 0)[0]
        assert trajectories[0].response_ids().tolist() == ours.response_ids().tolist()
        with pytest.raises(WeightPushError, match="lmdeploy has no weight update from disk"):
            engine.push_weights(1, Weights(block_models[0]))
        with pytest.raises(StaleVersionError):
            engine.generate(REQUESTS, 1)
        with pytest.raises(ValueError, match="does not say which weights"):
            require("server", engine.capabilities(), {})


# --- what is refused at once ------------------------------------------------------------------------------------------


def test_a_server_of_another_dialect_or_none_is_named(block_models: list[Any], tmp_path: Path) -> None:
    with serving("lmdeploy", block_models[0], OPTIONS, EOS) as server:
        url = server.url
        with pytest.raises(RefusedError, match=rf"rollout.server.urls: {url} cannot be used as sglang: .*404"):
            ServerEngine(ServerOptions(urls=[url]), block_models[0], OPTIONS, weights_dir=tmp_path, eos_token_id=EOS)
        server.stop()
        with pytest.raises(UnavailableError, match=rf"{url} cannot be used as sglang: .*refused"):
            options = ServerOptions(urls=[url], retries=0)
            ServerEngine(options, block_models[0], OPTIONS, weights_dir=tmp_path, eos_token_id=EOS)
    # One that takes a connection and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UnavailableError, match="timed out"):
        options = ServerOptions(urls=[f"http://127.0.0.1:{silent.getsockname()[1]}"], retries=0, timeout_seconds=0.1)
        ServerEngine(options, block_models[0], OPTIONS, weights_dir=tmp_path, eos_token_id=EOS)


def test_a_server_with_another_block_length_is_refused(block_models: list[Any], tmp_path: Path) -> None:
    """Blocks of 4 read as blocks of 8 could look whole: every step of both would be there."""
    with serving("sglang", block_models[0], OPTIONS, EOS) as server:
        for length in (2, 8):
            options = OPTIONS.model_copy(update={"block_length": length})
            with pytest.raises(BadAnswerError, match=rf"blocks end at position 4: .* ends at {length}"):
                ServerEngine(
                    ServerOptions(urls=[server.url]), block_models[0], options, weights_dir=tmp_path, eos_token_id=EOS
                )
        engine = engine_for([server], block_models[0], tmp_path)
        with pytest.raises(ValueError, match=r"train\.block_schedule changes the block length"):
            engine.options = OPTIONS.model_copy(update={"block_length": 8})


def test_a_server_that_decodes_left_to_right_is_refused(block_models: list[Any], tmp_path: Path) -> None:
    with serving("sglang", block_models[0], OPTIONS, EOS) as server:
        server.algorithm = None
        with pytest.raises(BadAnswerError, match="it decodes left to right: start it with --dllm-algorithm"):
            engine_for([server], block_models[0], tmp_path)


def test_the_key_is_sent_where_there_is_one(
    pair: Any, block_models: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, engine = pair
    assert server.keys == {None}
    monkeypatch.setenv("ROLLOUT_API_KEY", "secret")
    server.keys.clear()
    engine.push_weights(2, Weights(block_models[1]))
    engine.generate(REQUESTS, 2)
    assert server.keys == {"Bearer secret"}


@pytest.mark.parametrize(
    "option", [{"cfg_scale": 1.0}, {"record_x0": True}, {"selector": "threshold"}, {"preset": "llada"}]
)
def test_options_that_are_up_to_the_servers_are_refused(
    option: dict[str, Any], block_models: list[Any], tmp_path: Path
) -> None:
    options = SamplerOptions(gen_length=8, num_inference_steps=4, **option)
    server = ServerOptions(urls=["http://127.0.0.1:9"])
    with pytest.raises(ValueError, match=r"sampler\.\w+ is .*rollout.engine server"):
        ServerEngine(server, block_models[0], options, weights_dir=tmp_path)


def test_addresses_are_addresses(block_models: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must begin with http"):
        ServerOptions(urls=["localhost:30000"])
    with pytest.raises(ValueError, match=r"rollout\.server\.urls is empty"):
        ServerEngine(ServerOptions(), block_models[0], OPTIONS, weights_dir=tmp_path)


def test_requests_that_no_server_can_follow_are_refused(pair: Any) -> None:
    _, engine = pair
    for request, message in {
        "steps": (Request([5], 0, num_inference_steps=2), "num_inference_steps"),
        "empty": (Request([], 0), "empty prompt"),
        "mask": (Request([5, MASK], 0), "mask token"),
        "long": (Request([5] * 60, 0), "positions"),
    }.values():
        with pytest.raises(ValueError, match=message):
            engine.generate([request], 1)
