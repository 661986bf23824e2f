"""Nothing waits for the device more than the sampler has to: counted on the CPU, where a GPU's queue would be emptied.

A mode over real tensors sees every operation whose result the host has to know: a number taken out of a tensor,
`nonzero` and what calls it (an index of booleans), sizes that depend on values. `.cpu()` and `.tolist()` are counted by
name, since on the CPU they do nothing.
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rl.batch import DecisionBatch
from rl.estimators.trace_rows import trace_rows
from rl.losses.aggregate import weighted_sum
from rl.models.vocabulary import compiled_constraint
from rl.registry import parse_recipe
from rl.tasks.char_tokenizer import char_tokenizer
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.shared import SharedForwards
from rollouts.samplers.options import SamplerOptions

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "bincount", "repeat_interleave",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Notes what waits, and counts the lines of ours that asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.seen: list[str] = []
        self.lines: Counter[str] = Counter()
        for name in ("cpu", "tolist"):
            plain = getattr(torch.Tensor, name)

            def counted(tensor: torch.Tensor, *args: Any, name: str = name, plain: Any = plain, **more: Any) -> Any:
                self.note(name)
                return plain(tensor, *args, **more)

            monkeypatch.setattr(torch.Tensor, name, counted)

    def note(self, name: str) -> None:
        self.seen.append(name)
        for frame in reversed(traceback.extract_stack()):
            if any(f"/{part}/" in frame.filename for part in ("rollouts", "rl")):
                self.lines[f"{frame.filename.rsplit('/', 1)[1]}:{frame.lineno}"] += 1
                return

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None:
            name = ""
        masks = name in INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in WAITING or masks:
            self.note(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    return Waits(monkeypatch)


def test_what_waits_is_counted(waits: Waits) -> None:
    numbers = torch.arange(6)
    with waits:
        float(numbers[2])
        numbers[numbers > 2]
        numbers.nonzero()
        numbers[numbers > 3] = 0
        torch.unique(numbers)
        numbers.sum() + torch.where(numbers > 2, 1, 2)[torch.tensor([0, 1])]
    assert waits.seen == ["_local_scalar_dense", "index", "nonzero", "index_put_", "_unique2"]
    numbers.tolist()
    assert waits.seen[-1] == "tolist"


def requests(count: int) -> list[Request]:
    return [Request([(3 * i + n) % 11 for i in range(2 + n % 3)], seed=n) for n in range(count)]


DECODERS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2-full", {}),
    ("gpt2-full", {"selector": "threshold", "threshold": 0.3}),
    ("gpt2-full", {"preset": "dcd", "window": 4}),
    ("gpt2-full", {"preset": "entropy_bound", "block_length": 8, "top_p": 0.9}),
    ("gpt2-full", {"preset": "dream_origin"}),
    ("qwen3-block4", {"block_length": 4}),
    ("qwen3-block4", {"preset": "sdar_dynamic", "block_length": 4}),
    ("gpt2-full", {"preset": "rcr", "block_length": 8}),
    ("gpt2-full", {"preset": "rcr", "block_length": 8, "revise_scope": "all_previous"}),
    ("gpt2-full", {"preset": "remdm"}),
    ("gpt2-full", {"preset": "llada2_1_quality", "block_length": 8}),
    ("qwen3-block4", {"preset": "llada2_1_quality", "block_length": 4}),
]


@pytest.mark.parametrize(("family", "decoder"), DECODERS)
def test_a_denoising_step_waits_once(make_model: Any, waits: Waits, family: str, decoder: dict[str, Any]) -> None:
    """For what it revealed. Where equal canvases are forwarded once, finding them waits once more."""
    model, options = make_model(family), SamplerOptions(gen_length=16, num_inference_steps=8, **decoder)
    for shared in (False, True):
        engine = InProcessEngine(SharedForwards(model) if shared else model, options)
        waits.seen.clear()
        waits.lines.clear()
        with waits:
            engine.generate(requests(12))
        assert len(waits.seen) <= (1 + shared) * engine.stats.forwards, waits.lines


@pytest.mark.parametrize("family", ["gpt2-full", "qwen3-block4"])
def test_scoring_and_loss_wait_a_few_times_whatever_their_size(make_model: Any, waits: Waits, family: str) -> None:
    """What the rows look like (one document each, padded or not), and whether an entropy has a gradient."""
    model, recipe = make_model(family), parse_recipe({"name": "tracerl", "entropy_coef": 0.01})
    options = SamplerOptions(gen_length=16, num_inference_steps=8, block_length=4 if "block" in family else None)
    counts = []
    for size in (3, 12):
        rows = trace_rows(InProcessEngine(model, options).generate(requests(size)), model)
        assert rows.sampler_logprob is not None
        waits.seen.clear()
        with waits:
            scores = rows.score(model)
            one = torch.ones_like(scores.logprob.detach())
            batch = DecisionBatch(scores.logprob, scores.entropy, rows.sampler_logprob, None, one, one)
            weighted_sum(recipe.loss(batch).loss, one).backward()
        counts.append(len(waits.seen))
    assert counts[0] == counts[1] <= 5


@pytest.mark.parametrize("steps", [16, 4])
def test_a_constraint_waits_whatever_the_number_of_requests(make_model: Any, waits: Waits, steps: int) -> None:
    """For equal sets of states, a contradiction, and what a step reveals; then once a place that is drawn anew."""
    tokenizer = char_tokenizer("abcdefghijk", ends=False)
    graph = {one: [tokenizer.decode([(i + n) % 11]) for n in (1, 2, 5)] for i, one in enumerate("abcdefghijk")}
    options = SamplerOptions(gen_length=16, num_inference_steps=steps, constraint={"graph": graph})
    constraint = compiled_constraint(options.constraint, tokenizer, [])
    for count in (3, 12):
        engine = InProcessEngine(make_model("gpt2-full"), options, constraint=constraint)
        waits.seen.clear()
        with waits:
            engine.generate(requests(count))
        assert len(waits.seen) <= (5 + (1 + 16 if steps < 16 else 0)) * engine.stats.forwards
