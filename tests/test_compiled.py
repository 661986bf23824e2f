"""Compiled rollouts: the tokens and log-probs of plain ones, with weights that the learner goes on changing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.models.compiled import GRAPHS, compiled
from rl.models.copies import LowCopy
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from tests.image_models import tiny_policy
from tests.runs import lines, tiny_config, train_here

# Which of the two is first depends on what else this process has imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*distutils:UserWarning", "ignore:Distutils was:UserWarning")


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """torch would start workers that compile."""
    import torch._inductor.config

    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def assert_same(model: Any, fast: Any, lengths: list[int], batch: int = 8, cache: Any = "none") -> None:
    options = SamplerOptions(gen_length=8, num_inference_steps=8, block_length=4)
    requests = [Request(list(range(1, 1 + n)), i) for i, n in enumerate(lengths)]
    one, other = (
        InProcessEngine(policy, options, max_batch_size=batch, approximate_cache=cache).generate(requests)
        for policy in (model, fast)
    )
    for plain, own in zip(one, other, strict=True):
        assert own.token.tolist() == plain.token.tolist()
        assert abs(own.logprob - plain.logprob).max() < 1e-5


def test_full_attention_is_one_graph_and_follows_the_weights(make_model: Any) -> None:
    model = make_model("gpt2-full-shifted")
    model.backbone.h = model.backbone.h[:1]
    fast = compiled(model)
    assert fast.backbone is model.backbone and "hidden_states" not in vars(model)
    before = graphs()
    assert_same(model, fast, [2, 5, 5])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    # Other numbers of rows and other widths are no other graph.
    assert_same(model, fast, [4, 5, 6, 7, 9])
    assert graphs() - before == 1


@pytest.mark.release
@pytest.mark.parametrize("family", ["qwen3-block4", "gpt2-block4-shifted", "qwen3-block4-causal"])
def test_blocks_with_a_cache(make_model: Any, family: str) -> None:
    """Requests leave and enter the batch, so that slots are neighbours or not, and one is left alone."""
    model = make_model(family)
    fast, before = compiled(model), graphs()
    for batch in (3, 2):
        assert_same(model, fast, [1, 2, 3, 5, 7, 7, 4, 9], batch)
    assert 1 < graphs() - before <= 8 < GRAPHS


@pytest.mark.release
def test_copies_of_8_bits_and_approximate_caches(make_model: Any) -> None:
    model = make_model("qwen3-full")
    low = LowCopy(model, "fp8")
    fast = compiled(low.model)
    assert_same(low.model, fast, [2, 5, 5], cache="dual")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    low.refresh()
    assert_same(low.model, fast, [2, 5, 5])


@pytest.mark.release
def test_a_run_learns_the_same(tmp_path: Path) -> None:
    found, before = [], graphs()
    for word in ("false", "true"):
        train_here(tiny_config(tmp_path / word, "sft.steps=0", "train.steps=2", f"rollout.compile={word}"))
        found.append(lines(tmp_path / word / "run", "train"))
    for plain, own in zip(*found, strict=True):
        assert own["reward/mean"] == plain["reward/mean"] and own["policy/logprob_gap_max"] < 1e-5
    assert 0 < graphs() - before < GRAPHS


def test_what_is_not_compiled_is_refused(
    tmp_path: Path, run: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run("check", *tiny_config(tmp_path, "rollout.compile=true", "rollout.engine=ray"))
    assert code == 2 and "rollout.compile is for rollout.engine in_process, got ray: set it to false" in err
    code, _, err = run("check", "--config", "digits_b2", "rollout.compile=true", f"run.output_dir={tmp_path}")
    assert code == 2 and "rollout.compile is for text, and task.name" in err
    flex = ("rollout.compile=true", "model.attn_implementation=flex_attention")
    code, _, err = run("check", *tiny_config(tmp_path, *flex))
    assert code == 2 and "rollout.compile needs model.attn_implementation sdpa" in err
    with pytest.raises(ValueError, match=r"rollout.compile is for decoders of text with sdpa attention"):
        compiled(tiny_policy())

    def fails(*_: Any, **__: Any) -> Any:
        raise torch._dynamo.exc.TorchDynamoException("No working C++ compiler found\nand more\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    fast = compiled(make_model("gpt2-full"))
    with pytest.raises(ValueError, match=r"\(No working C\+\+ compiler found and more\): set it to false"):
        fast.hidden_states(torch.tensor([[1, 2]]))
