"""What an engine promises before it samples, and what is refused because it promises less."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rl.config import load_config
from rl.train.plan import engine_needs
from rollouts.engines.base import (
    IN_PROCESS,
    NEEDS,
    Capabilities,
    EngineStats,
    StaleVersionError,
    check_versions,
    require,
)
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.shared import SharedForwards
from rollouts.samplers.options import SamplerOptions

# A server that returns finished texts and the version of its weights.
TEXT_ONLY = Capabilities(policy_version=True)


def needs(*overrides: str) -> dict[str, str]:
    return engine_needs(load_config(None, overrides))


def test_recipes_say_what_they_need() -> None:
    assert needs("algorithm.name=tracerl") == {
        "sampled_logprobs": "algorithm.name tracerl",
        "step_maps": "algorithm.name tracerl",
    }
    assert set(needs("algorithm.name=tracerl", "algorithm.old_logprob=recompute")) == {"step_maps"}
    assert needs("algorithm.name=wd1") == {} == needs("algorithm.name=espo")
    assert set(needs("algorithm.name=drakes")) == {"gradients"}
    assert set(needs("algorithm.name=mdpo", "sampler.record_x0=true")) == {"step_maps", "sampled_logprobs", "x0"}
    assert needs("algorithm.name=wd1", "sampler.reviser=rcr", "train.mixed_steps=[2, 4]") == {
        "remasking": "sampler.reviser rcr",
        "request_steps": "train.mixed_steps",
    }


def test_an_engine_that_cannot_is_refused_in_one_line() -> None:
    require("server", TEXT_ONLY, needs("algorithm.name=wd1"))
    with pytest.raises(ValueError, match=r"^rollout\.engine server cannot give log-probs .*algorithm\.name tracerl"):
        require("server", replace(TEXT_ONLY, step_maps=True), needs("algorithm.name=tracerl"))
    with pytest.raises(ValueError, match=r"^rollout\.engine server cannot give the step of every token"):
        require("server", TEXT_ONLY, needs("algorithm.name=tracerl", "algorithm.old_logprob=recompute"))
    with pytest.raises(ValueError, match=r"does not say which weights sampled"):
        require("server", replace(TEXT_ONLY, policy_version=False), {})


def test_the_model_of_this_process_gives_all_there_is(make_model) -> None:
    capabilities = InProcessEngine(make_model("gpt2-full"), SamplerOptions()).capabilities()
    assert capabilities == IN_PROCESS
    require("in_process", capabilities, dict.fromkeys(set(NEEDS) - {"asynchronous"}, "everything"))


def test_a_trajectory_of_other_weights_is_refused(make_model) -> None:
    engine = InProcessEngine(SharedForwards(make_model("gpt2-full")), SamplerOptions(gen_length=4))
    trajectories = engine.generate([Request([1, 2], seed) for seed in range(3)], policy_version=7)
    check_versions(trajectories, 7)
    # The first canvas is the same for all three.
    assert engine.stats.rows_asked == 12 and engine.stats.sequence_forwards <= 10
    trajectories[1].policy_version = 6
    with pytest.raises(StaleVersionError, match="sampled with the weights of version 6 instead of 7"):
        check_versions(trajectories, 7)


def test_work_done_at_the_same_time_adds_up_and_the_clock_does_not() -> None:
    total = EngineStats(forwards=1, seconds=2.0)
    total.add(EngineStats(forwards=3, rows_asked=4, seconds=5.0))
    assert total == EngineStats(forwards=4, rows_asked=4, seconds=2.0)
