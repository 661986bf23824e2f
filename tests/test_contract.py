"""What was sampled is what is trained: the learner scores every decision in the very state it was made in.

Two kinds of evidence. A `Witness` model, whose hidden state *is* the canvas a query can see, lets the states
of sampler and learner be compared token by token. Real models then must give equal log-probs.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rl.estimators.documents import Reads, block_document
from rl.estimators.masking import random_mask_rows
from rl.estimators.rows import TokenRows, assemble
from rl.estimators.trace_rows import merged_steps, packed_rows, remask_rows, trace_rows
from rl.modalities.actions import Actions, action_rows
from rl.modalities.actions_plan import ActionOptions
from rl.modalities.graphs import Graphs, graph_rows
from rl.modalities.graphs_plan import GraphOptions
from rl.tasks.cells import CellsTask
from rl.tasks.control import ControlTask
from rl.tasks.molecules import MoleculesTask
from rollouts.engines.base import SampleRequest
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.uniform import UniformEngine
from rollouts.samplers.distribution import sampling_logprobs
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.presets import PRESETS
from rollouts.trajectory import TokenTrajectory

FULL = ["gpt2-full", "qwen3-full", "gpt2-full-shifted"]
BLOCK = ["gpt2-block4", "qwen3-block4"]
B = 4
DISTRIBUTIONS = [
    {"temperature": 1.0},
    {"temperature": 1.6},
    {"temperature": 0.7, "top_p": 0.85},
    {"temperature": 1.3, "top_p": 0.95, "top_k": 5},
]


def rollouts(
    model: Any,
    lengths: range,
    block_length: int | None = None,
    eos: int | None = 0,
    cache: str = "none",
    **settings: Any,
) -> Any:
    """Two rollouts for every prompt length; each prompt begins with a token of its own."""
    vocab = model.mask_token_id
    options = SamplerOptions(**{"gen_length": 8, "num_inference_steps": 4, "block_length": block_length, **settings})
    requests = [
        Request([(n * 2 + copy) % vocab, *[(3 * i + copy) % vocab for i in range(1, n)]], seed=1000 * n + copy)
        for n in lengths
        for copy in range(2)
    ]
    return InProcessEngine(model, options, eos_token_id=eos, max_batch_size=5, approximate_cache=cache).generate(
        requests
    )


def rows_for(model: Any, trajectories: list[TokenTrajectory], shrink: int = 1) -> TokenRows:
    """What the learner does with them."""
    if model.attention == "block_causal":
        return packed_rows(trajectories, shrink)
    return remask_rows(trajectories, shrink, model.logit_shift)


def recorded(trajectories: list[TokenTrajectory]) -> np.ndarray:
    return np.concatenate([t.logprob[t.is_reveal] for t in trajectories])


def naive_visible(model: Any, length: int, block_length: int | None, position: int) -> torch.Tensor | None:
    """Which key k a query q may see while the block of a position is decided."""
    if model.attention == "full":
        return None
    assert block_length is not None
    start = position // block_length * block_length
    causal = [model.context_causal and q < start for q in range(length)]
    return torch.tensor(
        [
            [
                [k <= q if causal[q] else k // block_length <= q // block_length for k in range(length)]
                for q in range(length)
            ]
        ]
    )


@torch.no_grad()
def one_forward_per_step(model: Any, trajectory: TokenTrajectory, group: np.ndarray | None = None) -> torch.Tensor:
    """Log-probs of all reveals; the canvas before each step (or group of edits) goes through the model alone."""
    group = trajectory.step if group is None else group
    canvas = trajectory.canvas_at(0)
    result = torch.zeros(len(trajectory.step), dtype=torch.float64)
    distribution = dict(trajectory.sampler)
    scale = distribution.pop("cfg_scale", 0.0)
    for g in np.unique(group):
        decided = int(trajectory.position[group == g].min())
        visible = naive_visible(model, trajectory.length, trajectory.block_length, decided)
        logits = model(torch.from_numpy(canvas)[None], visible=visible)[0]
        if scale:
            blank = canvas.copy()
            blank[: trajectory.prompt_length] = trajectory.mask_token_id
            without = model(torch.from_numpy(blank)[None], visible=visible)[0]
            logits = without + (scale + 1) * (logits - without)
        for edit in np.flatnonzero(group == g):
            token = int(trajectory.token[edit])
            if token != trajectory.mask_token_id:
                at = logits[trajectory.position[edit] - model.logit_shift]
                result[edit] = sampling_logprobs(at[None], keep=torch.tensor([token]), **distribution)[0, token]
        for edit in np.flatnonzero(group == g):
            canvas[trajectory.position[edit]] = trajectory.token[edit]
    return result[torch.from_numpy(trajectory.is_reveal)]


# --- states, token by token -------------------------------------------------------------------------------------------


class Witness:
    """A `DenoisingModel` whose hidden state is the list of (position, token) that the query can see.

    It uses the engine's own cache the way an attention layer does, so stale or misplaced entries show up.
    The last two columns are the query's position and how often the most frequent position was seen.
    """

    mask_token_id, max_length = 63, 40

    def __init__(self, attention: str, logit_shift: int = 0):
        self.attention, self.logit_shift = attention, logit_shift
        self.block_length = B if attention == "block_causal" else None
        generator = torch.Generator().manual_seed(0)
        self.mixing = torch.randn(self.max_length + 2, 64, generator=generator, dtype=torch.float64)
        self.states: list[torch.Tensor] = []

    def hidden_states(self, input_ids, *, visible=None, position_ids=None, cache=None):
        batch, queries = input_ids.shape
        places = torch.arange(queries).expand(batch, -1) if position_ids is None else position_ids
        tokens, own_places = input_ids, places
        if cache is not None:
            stored = cache.update(tokens[:, None, :, None], places[:, None, :, None], 0)
            tokens, places = (x[:, 0, :, 0] for x in stored)
        seen = torch.ones(1, 1, 1, dtype=torch.bool) if visible is None else visible
        shape = (batch, queries, tokens.shape[1])
        # What cannot be seen is written to a place behind the canvas.
        index = torch.where(seen, places[:, None], self.max_length).expand(shape)
        canvas = torch.full((batch, queries, self.max_length + 1), -1)
        canvas.scatter_(2, index, tokens[:, None].expand(shape))
        count = torch.zeros_like(canvas).scatter_add_(2, index, torch.ones(shape, dtype=torch.int64))
        most = count[..., : self.max_length].amax(-1, keepdim=True)
        return torch.cat([canvas[..., : self.max_length], own_places[..., None], most], dim=-1)

    def token_logits(self, hidden):
        assert (hidden[:, -1] == 1).all(), "a query saw one position twice, or nothing"
        self.states.append(hidden[:, :-1])
        logits = 2 * torch.sin(hidden.double() @ self.mixing)
        logits[:, self.mask_token_id] = -1e9
        return logits


WITNESSED = [
    ("block_causal", range(1, 3 * B + 1), {"selector": "top_n"}),
    ("block_causal", range(1, 3 * B + 1), {"selector": "threshold", "threshold": 0.2}),
    ("block_causal", range(1, 3 * B + 1), {"selector": "left_most", "num_inference_steps": 8}),
    ("full", range(1, 8), {"selector": "top_n"}),
    ("full", range(1, 8), {"selector": "dynamic", "threshold": 0.2, "block_length": 4}),
    ("shifted", range(1, 8), {"selector": "top_n", "block_length": 4}),
    # An approximate cache is stale in what deeper layers made of the tokens, not in which tokens are seen.
    ("full", range(1, 8), {"block_length": 4, "cache": "dual"}),
    ("shifted", range(1, 8), {"block_length": 4, "cache": "dual"}),
    ("shifted", range(1, 8), {"block_length": 4, "cache": "prefix"}),
]


@pytest.mark.parametrize(("attention", "lengths", "settings"), WITNESSED)
def test_learner_and_sampler_see_the_same_state(attention: str, lengths: range, settings: dict[str, Any]) -> None:
    """Published code has a training grid that starts at the response and a rollout grid that starts at 0, rebuilds the
    terminal block, or leaves padding in view. Each would show some decision another token than it was made with."""
    witness = Witness("full" if attention == "shifted" else attention, logit_shift=int(attention == "shifted"))
    # 63 ids: the first prompt token names the request in every state.
    trajectories = rollouts(witness, lengths, **settings)
    sampler_states = {(int(s[0]), int(s[-1])): s for state in witness.states for s in state}
    assert len({int(t.prompt_ids[0]) for t in trajectories}) == len(trajectories)
    layouts = [rows_for(witness, trajectories)]
    if attention == "block_causal":
        layouts += [remask_rows(trajectories, block_length=B), packed_rows(trajectories, pack_to=100)]
    else:
        layouts += [remask_rows(trajectories, logit_shift=witness.logit_shift, pack_to=50)]
    for rows in layouts:
        witness.states.clear()
        rows.score(witness)
        (learner_states,) = witness.states
        assert len(learner_states) == sum(t.is_reveal.sum() for t in trajectories)
        positions = rows.position_ids[rows.row, rows.column]
        for state, owner, position in zip(learner_states, rows.trajectory, positions, strict=True):
            trajectory = trajectories[owner]
            # A position is a candidate until it is revealed: the last state it was drawn in is the decision's.
            seen = sampler_states[int(trajectory.prompt_ids[0]), int(position) - witness.logit_shift]
            assert state.tolist() == seen.tolist()
            step = trajectory.reveal_step()[position]
            canvas = trajectory.canvas_at(step)
            end = (int(position) // B + 1) * B if attention == "block_causal" else len(canvas)
            assert state[:end].tolist() == canvas[:end].tolist()
            assert (state[end:-1] == -1).all()


def test_the_witness_sees_a_wrong_grid() -> None:
    """The comparison above can fail: scored on the grid that starts at the response, most states differ."""
    witness = Witness("block_causal")
    trajectories = rollouts(witness, range(5, 6), eos=None)
    sampler_states = {(int(s[0]), int(s[-1])): s.tolist() for state in witness.states for s in state}
    rows = remask_rows(trajectories, block_length=B)
    shifted = replace(rows, block=torch.where(rows.position_ids < 5, -1, (rows.position_ids - 5) // B))
    witness.states.clear()
    shifted.score(witness)
    (states,) = witness.states
    # Behind position 12 both grids end where the canvas does.
    assert not any(s.tolist() == sampler_states[int(s[0]), int(s[-1])] for s in states if s[-1] < 13)
    assert sum(int(s[-1]) < 13 for s in states) > 0.6 * len(states)


# --- log-probs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("family", BLOCK)
def test_block_models_score_what_they_sampled(make_model, family: str, distribution: dict[str, Any]) -> None:
    """For every prompt length from 1 to 3B: sampler, packed learner, re-masked learner and one plain uncached forward
    per step agree on every log-prob."""
    model = make_model(family)
    trajectories = rollouts(model, range(1, 3 * B + 1), **distribution)
    with torch.no_grad():
        packed = packed_rows(trajectories).score(model).logprob
        remasked = remask_rows(trajectories, block_length=B).score(model).logprob
    plain = torch.cat([one_forward_per_step(model, t) for t in trajectories])
    for logprob in (packed, remasked, plain):
        np.testing.assert_allclose(logprob.numpy(), recorded(trajectories), rtol=0, atol=1e-9)
    # Not an agreement of trivial numbers.
    assert packed.std() > 0.3


@pytest.mark.parametrize("context", ["block", "causal"])
@pytest.mark.parametrize("readout", ["unshifted", "shifted"])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_converted_models_score_what_they_sampled(make_model, block: int, readout: str, context: str) -> None:
    """Both readouts, both contexts, prompts that end on a block's border and inside one, with the engine's cache.

    Several steps per block: the first token of a block is read beside it, also when it is decided last.
    """
    model = make_model(f"qwen3-block{block}-{readout}-{context}")
    trajectories = rollouts(model, range(1, 2 * block + 2), temperature=1.3, num_inference_steps=8)
    options = {"logit_shift": model.logit_shift, "context_causal": model.context_causal}
    with torch.no_grad():
        packed = packed_rows(trajectories, pack_to=60, **options).score(model).logprob
        remasked = remask_rows(trajectories, block_length=block, **options).score(model).logprob
    plain = torch.cat([one_forward_per_step(model, t) for t in trajectories])
    for logprob in (plain, packed, remasked):
        np.testing.assert_allclose(logprob.numpy(), recorded(trajectories), rtol=0, atol=1e-9)
    assert plain.std() > 0.3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("block_length", [None, 4, 1])
@pytest.mark.parametrize("family", FULL)
def test_full_models_score_what_they_sampled(
    make_model, family: str, block_length: int | None, distribution: dict[str, Any]
) -> None:
    """Prompts of several lengths in one batch, padded differently in rollout and training."""
    model = make_model(family)
    settings = {**distribution, "num_inference_steps": 8 if block_length == 1 else 4}
    trajectories = rollouts(model, range(1, 5), block_length, **settings)
    with torch.no_grad():
        remasked = remask_rows(trajectories, logit_shift=model.logit_shift).score(model).logprob
    plain = torch.cat([one_forward_per_step(model, t) for t in trajectories])
    for logprob in (remasked, plain):
        np.testing.assert_allclose(logprob.numpy(), recorded(trajectories), rtol=0, atol=1e-9)
    assert remasked.std() > 0.3


@pytest.mark.parametrize("selector", ["threshold", "dynamic", "left_most"])
@pytest.mark.parametrize("family", ["qwen3-full", "gpt2-block4"])
def test_every_selector_keeps_the_contract(make_model, family: str, selector: str) -> None:
    model = make_model(family)
    block_length = None if family == "gpt2-block4" else 4
    trajectories = rollouts(model, range(1, 10), block_length, selector=selector, threshold=0.4, temperature=1.2)
    with torch.no_grad():
        logprob = rows_for(model, trajectories).score(model).logprob
    np.testing.assert_allclose(logprob.numpy(), recorded(trajectories), rtol=0, atol=1e-9)


def revisions(trajectories: list[TokenTrajectory]) -> int:
    """Decisions beyond the first of a position: tokens taken back and decided again, or replaced."""
    return sum(int(t.is_reveal.sum()) - len(np.unique(t.position)) for t in trajectories)


REVISING = ["rcr", "rcr_last", "remdm", "llada2_1_quality", "llada2_1_speed"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_keeps_the_contract_on_block_models(make_model, name: str) -> None:
    """For every prompt length from 1 to 3B, both layouts, with everything that was taken back."""
    model = make_model("gpt2-block4")
    settings = {"temperature": 1.2, "top_p": 0.95, "revise_scope": "block", "remdm_cap": 0.3, "max_post_steps": 3}
    trajectories = rollouts(model, range(1, 3 * B + 1), preset=name, num_inference_steps=8, **settings)
    plain = torch.cat([one_forward_per_step(model, t) for t in trajectories])
    for rows in (packed_rows(trajectories, pack_to=90), remask_rows(trajectories, block_length=B)):
        with torch.no_grad():
            logprob = rows.distinct().score(model).logprob
        np.testing.assert_allclose(logprob.numpy(), recorded(trajectories), rtol=0, atol=1e-9)
        np.testing.assert_allclose(plain.numpy(), recorded(trajectories), rtol=0, atol=1e-9)
        np.testing.assert_array_equal(rows.sampler_logprob.numpy(), recorded(trajectories))
    assert (
        packed_rows(trajectories).target.tolist()
        == np.concatenate([t.token[t.is_reveal] for t in trajectories]).tolist()
    )
    assert (revisions(trajectories) > 2) == (name in REVISING)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("family", ["gpt2-full", "gpt2-full-shifted"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_keeps_the_contract_on_full_models(make_model, name: str, family: str, cfg_scale: float) -> None:
    """Blocks, so that all_previous reaches back; with guidance the learner combines its logits likewise."""
    model = make_model(family)
    settings = {"temperature": 1.2, "remdm_cap": 0.3, "max_post_steps": 3, "cfg_scale": cfg_scale}
    trajectories = rollouts(model, range(1, 5), 4, preset=name, num_inference_steps=8, **settings)
    plain = torch.cat([one_forward_per_step(model, t) for t in trajectories])
    rows = remask_rows(trajectories, logit_shift=model.logit_shift, pack_to=30)
    with torch.no_grad():
        logprob = rows.distinct().score(model).logprob
    for scored in (logprob, plain):
        np.testing.assert_allclose(scored.numpy(), recorded(trajectories), rtol=0, atol=1e-9)
    assert logprob.std() > 0.3
    assert rows.num_rows == len(rows.input_ids) * (2 if cfg_scale else 1)


def test_guidance_left_out_by_the_learner_breaks_the_equality(make_model) -> None:
    model = make_model("gpt2-full")
    trajectories = rollouts(model, range(1, 5), cfg_scale=1.5)
    rows = remask_rows(trajectories)
    with torch.no_grad():
        for wrong in ({"unprompted": None}, {"cfg_scale": 1.0}, {"unprompted": rows.input_ids}):
            logprob = replace(rows, **wrong).score(model).logprob
            assert np.abs(logprob.numpy() - recorded(trajectories)).max() > 0.05


def test_gradients_of_guided_decisions_reach_both_branches(make_model) -> None:
    model = make_model("gpt2-full")
    trajectories = rollouts(model, range(2, 4), cfg_scale=1.5)
    logprob = remask_rows(trajectories).distinct().score(model).logprob
    gradients = torch.autograd.grad(logprob.sum(), list(model.parameters()))
    parameter, direction = list(model.parameters())[-1], torch.zeros(0)
    direction = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64)).view_as(parameter)
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter.add_(sign * 1e-5 * direction)
            values.append(sum(float(one_forward_per_step(model, t).sum()) for t in trajectories))
            parameter.sub_(sign * 1e-5 * direction)
    assert float((gradients[-1] * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_the_packed_layout_refuses_blocks_that_were_reopened(make_model) -> None:
    settings = {"preset": "rcr_last", "gen_length": 16, "num_inference_steps": 16, "temperature": 2.0}
    trajectories = rollouts(make_model("gpt2-full"), range(4, 5), 4, eos=None, **settings)
    anchored = [replace(t, block_origin=0) for t in trajectories]
    assert any((np.diff(t.position // 4) < 0).any() for t in anchored)
    with pytest.raises(ValueError, match="blocks that are finished one after the other"):
        packed_rows(anchored)


@pytest.mark.parametrize("block_length", [2, 8])
def test_a_rollout_grid_of_another_size_than_the_models_is_kept(make_model, block_length: int) -> None:
    model = make_model("qwen3-block4")
    trajectories = rollouts(model, range(1, 10), block_length)
    with torch.no_grad():
        packed = packed_rows(trajectories).score(model).logprob
        remasked = remask_rows(trajectories, block_length=block_length).score(model).logprob
    np.testing.assert_allclose(packed.numpy(), recorded(trajectories), rtol=0, atol=1e-9)
    np.testing.assert_allclose(remasked.numpy(), recorded(trajectories), rtol=0, atol=1e-9)


READOUTS = [(shift, causal) for shift in (0, 1) for causal in (False, True)]


@torch.no_grad()
def one_block_at_a_time(model: Any, trajectory: TokenTrajectory, size: int, shift: int, causal: bool) -> list[float]:
    """Log-probs of all reveals by the rule in words: the blocks before the one that is decided are clean."""
    result = []
    for step, position, token in zip(trajectory.step, trajectory.position, trajectory.token, strict=True):
        begin = position // size * size
        canvas = torch.from_numpy(trajectory.canvas_at(step)[: begin + size])[None]

        def sees(q: int, k: int, begin: int = begin) -> bool:
            # The block that is decided sees everything up to its end, itself included.
            return q >= begin or (k <= q if causal else k // size <= q // size)

        visible = torch.tensor([[[sees(q, k) for k in range(begin + size)] for q in range(begin + size)]])
        logits = model.token_logits(model.hidden_states(canvas, visible=visible)[0, position - shift])
        distribution = {name: trajectory.sampler[name] for name in ("temperature", "top_p", "top_k")}
        kept = sampling_logprobs(logits[None], keep=torch.tensor([int(token)]), **distribution)
        result.append(float(kept[0, token]))
    return result


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("shift", "causal"), READOUTS)
def test_the_learner_reads_every_block_by_one_rule(make_model, size: int, shift: int, causal: bool) -> None:
    """Packed and remask rows: the first token of a block is read at the last clean position, as an AR model would."""
    model = make_model("gpt2-block4")
    trajectories = rollouts(model, range(1, 8, 2), size, num_inference_steps=8)
    options = {"logit_shift": shift, "context_causal": causal}
    expected = np.concatenate([one_block_at_a_time(model, t, size, shift, causal) for t in trajectories])
    for rows in (
        packed_rows(trajectories, **options),
        packed_rows(trajectories, pack_to=100, **options),
        remask_rows(trajectories, block_length=size, pack_to=40, **options),
    ):
        with torch.no_grad():
            np.testing.assert_allclose(rows.distinct().score(model).logprob, expected, rtol=0, atol=1e-9)
    first = trajectories[0].position % size == 0
    assert first.any() and (size == 1 or not first.all())


def test_a_block_of_one_read_at_the_left_is_the_autoregressive_model(make_model) -> None:
    """Then no mask token plays a part: the log-probs are those of causal attention over the finished text."""
    model = make_model("qwen3-block4")
    (trajectory, *_) = rollouts(model, range(3, 4), 1, num_inference_steps=8, temperature=1.0)
    length = trajectory.length
    causal = torch.ones(1, length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        hidden = model.hidden_states(torch.from_numpy(trajectory.final_canvas())[None], visible=causal)
        logprob = model.token_logits(hidden[0]).log_softmax(-1)
        rows = packed_rows([trajectory], logit_shift=1)
        scored = rows.score(model).logprob
    expected = logprob[torch.from_numpy(trajectory.position) - 1, torch.from_numpy(trajectory.token)]
    torch.testing.assert_close(scored, expected, rtol=0, atol=1e-9)


def test_where_the_packed_layout_is_read_by_hand() -> None:
    """Clean p a b c in columns 0 to 3, then copies of block 1: [b M] in 4, 5 and [M c] in 6, 7."""
    document = block_document(np.array([5, 1, 2, 3]), [(1, np.array([2, 9])), (1, np.array([9, 3]))], 2)
    reads = Reads(0, np.array([5, 6]), np.array([3, 2]), 0)
    assert assemble([document], [reads], logit_shift=1).read.tolist() == [4, 1]
    assert assemble([document], [reads]).read.tolist() == [5, 6]
    # A second document in the same row: the clean position is its own.
    both = assemble([document, document], [reads, reads._replace(trajectory=1)], pack_to=16, logit_shift=1)
    assert both.read.tolist() == [4, 1, 12, 9]


def test_a_wrong_temperature_or_filter_breaks_the_equality(make_model) -> None:
    """The equality above can fail."""
    model = make_model("gpt2-full")
    trajectories = rollouts(model, range(1, 5), temperature=1.3, top_p=0.9)
    rows = remask_rows(trajectories)
    with torch.no_grad():
        for wrong in ({"temperature": 1.0}, {"top_p": 1.0}, {"read": rows.column - 1}):
            logprob = replace(rows, **wrong).score(model).logprob
            assert np.abs(logprob.numpy() - recorded(trajectories)).max() > 0.05


def test_entropy_is_the_sampling_distributions(make_model) -> None:
    model = make_model("gpt2-full")
    trajectories = rollouts(model, range(1, 4), temperature=1.3, top_k=4)
    with torch.no_grad():
        entropy = remask_rows(trajectories).score(model).entropy
    expected = []
    for trajectory in trajectories:
        for step, position in zip(trajectory.step, trajectory.position, strict=True):
            with torch.no_grad():
                logits = model(torch.from_numpy(trajectory.canvas_at(step))[None])[0, position]
            best = (logits / 1.3).topk(4).values.softmax(-1)
            expected.append(-(best * best.log()).sum())
    torch.testing.assert_close(entropy, torch.stack(expected), rtol=0, atol=1e-10)


def test_gradients_are_those_of_one_forward_per_step(make_model) -> None:
    # GPT-2: the norms of Qwen3 compute in float32 whatever the model's dtype.
    model = make_model("gpt2-block4")
    trajectories = rollouts(model, range(3, 6))
    weight = torch.linspace(-1, 1, int(sum(t.is_reveal.sum() for t in trajectories))).double()
    gradients = []
    for rows in (packed_rows(trajectories), remask_rows(trajectories, block_length=B)):
        logprob = rows.score(model).logprob
        gradients.append(torch.autograd.grad((logprob * weight).sum(), list(model.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert max(float(g.abs().max()) for g in gradients[0]) > 0.1


# --- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2-full", "gpt2-block4"])
@pytest.mark.parametrize("shrink", [1, 2, 3])
def test_every_revealed_token_is_a_target_exactly_once(make_model, family: str, shrink: int) -> None:
    """The tokens behind the end token are among them."""
    model = make_model(family)
    trajectories = rollouts(model, range(1, 10), None if family == "gpt2-block4" else 4, temperature=2.0)
    rows = rows_for(model, trajectories, shrink)
    position = rows.position_ids[rows.row, rows.column]
    assert (rows.document[rows.row, rows.column] == 0).all()
    assert (rows.input_ids[rows.row, rows.column] == model.mask_token_id).all()
    for index, trajectory in enumerate(trajectories):
        mine = rows.trajectory == index
        # Also the recorded order: the learner pairs decisions with the recorded log-probs by it.
        assert position[mine].tolist() == trajectory.position.tolist()
        assert rows.target[mine].tolist() == trajectory.token.tolist()
        decided = trajectory.final_canvas() != model.mask_token_id
        decided[: trajectory.prompt_length] = False
        assert sorted(position[mine].tolist()) == np.flatnonzero(decided).tolist()
        steps = rows.step[mine].tolist()
        assert sorted(set(steps)) == list(range(max(steps) + 1)) and steps == sorted(steps)
    behind_the_end = sum(t.prompt_length + t.stop_length <= t.position.max() for t in trajectories)
    assert behind_the_end > 0


def test_packed_rows_by_hand() -> None:
    """A prompt of 5 on the grid of 4: token 4 shares the first noisy block; the terminal block is never clean."""
    trajectory = TokenTrajectory(
        prompt_ids=np.array([1, 2, 3, 4, 5]), length=12, mask_token_id=9, num_steps=4,
        step=np.array([0, 1, 1, 2, 3, 3, 3]), position=np.array([6, 5, 7, 9, 8, 10, 11]),
        token=np.array([6, 7, 8, 1, 2, 3, 4]), logprob=np.zeros(7), confidence=np.ones(7), stop_length=7,
        block_length=4, sampler={"temperature": 1.0, "top_p": 1.0, "top_k": 0},
    )  # fmt: skip
    rows = packed_rows([trajectory])
    clean = [1, 2, 3, 4, 5, 7, 6, 8]
    assert rows.input_ids.tolist() == [[*clean, 5, 9, 9, 9, 5, 9, 6, 9, 9, 9, 9, 9, 9, 1, 9, 9]]
    assert rows.position_ids.tolist() == [[*range(8), 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11, 8, 9, 10, 11]]
    assert rows.segment.tolist() == [[0] * 8 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4]
    assert rows.block.tolist() == [[0] * 4 + [1] * 12 + [2] * 8]
    assert rows.column.tolist() == [10, 13, 15, 17, 20, 22, 23]
    assert rows.target.tolist() == [6, 7, 8, 1, 2, 3, 4]
    assert rows.step.tolist() == [0, 1, 1, 2, 3, 3, 3]
    merged = packed_rows([trajectory], shrink=2)
    assert merged.input_ids.tolist() == [[*clean, 5, 9, 9, 9, 9, 9, 9, 9]]
    assert merged.column.tolist() == [10, 9, 11, 13, 12, 14, 15]


def naive_visibility(rows: TokenRows, row: int, q: int, k: int) -> bool:
    """The rule in words, one pair at a time."""
    document, segment, block = (x[row].tolist() for x in (rows.document, rows.segment, rows.block))
    if document[q] != document[k]:
        return False
    if segment[q] == 0:
        # A clean token sees clean tokens of its own block and of earlier ones; or those up to itself.
        before = rows.position_ids[row, k] <= rows.position_ids[row, q] or not rows.context_causal
        return segment[k] == 0 and block[k] <= block[q] and bool(before)
    # A noisy token sees the clean blocks before its own, and its own copy.
    return (segment[k] == 0 and block[k] < block[q]) or segment[k] == segment[q]


def test_visible_equals_the_element_wise_rule(make_model) -> None:
    model = make_model("gpt2-block4")
    trajectories = rollouts(model, range(2, 9, 3))
    sequences = [t.final_canvas() for t in trajectories]
    lengths = [t.prompt_length for t in trajectories]
    rng = np.random.default_rng(0)
    supervised, _ = random_mask_rows(sequences, lengths, 11, rng, block_length=B)
    unpadded = replace(trajectories[0], block_length=None)
    for rows in (
        packed_rows(trajectories),
        packed_rows(trajectories, shrink=2),
        packed_rows(trajectories, pack_to=150),
        remask_rows(trajectories, block_length=B),
        remask_rows(trajectories, block_length=B, pack_to=60),
        remask_rows(trajectories, pack_to=60),
        remask_rows(trajectories),
        supervised,
        packed_rows(trajectories, pack_to=150, context_causal=True),
        remask_rows(trajectories, block_length=B, pack_to=60, context_causal=True),
    ):
        visible = rows.visible()
        assert visible is not None and visible.shape == (*rows.input_ids.shape, rows.input_ids.shape[1])
        for row in range(len(rows.input_ids)):
            width = rows.input_ids.shape[1]
            expected = [[naive_visibility(rows, row, q, k) for k in range(width)] for q in range(width)]
            assert visible[row].tolist() == expected
            # FlexAttention's form of the same rule.
            index = torch.arange(width)
            asked = rows.mask_mod()(torch.tensor(row), torch.tensor(0), index[:, None], index[None, :])
            assert asked.tolist() == expected
        # An empty row of a softmax would be NaN.
        assert visible.any(-1).all()
    assert remask_rows([unpadded]).visible() is None


def test_a_batch_scores_as_its_rows_alone(make_model) -> None:
    """Padding, neighbours and their number change nothing."""
    for family in ("gpt2-full", "qwen3-block4"):
        model = make_model(family)
        trajectories = rollouts(model, range(1, 10, 2), None if family == "qwen3-block4" else 4)
        with torch.no_grad():
            together = rows_for(model, trajectories).score(model)
            alone = [rows_for(model, [t]).score(model) for t in trajectories]
            backwards = rows_for(model, trajectories[::-1]).score(model).logprob
        torch.testing.assert_close(together.logprob, torch.cat([x.logprob for x in alone]), rtol=0, atol=1e-10)
        torch.testing.assert_close(together.entropy, torch.cat([x.entropy for x in alone]), rtol=0, atol=1e-10)
        torch.testing.assert_close(backwards, torch.cat([x.logprob for x in alone[::-1]]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("pack_to", [1, 40, 100, 10_000])
@pytest.mark.parametrize("family", ["qwen3-full", "gpt2-full-shifted", "gpt2-block4"])
def test_documents_may_share_rows(make_model, family: str, pack_to: int) -> None:
    """However many documents a row holds, every decision is scored in the same state, in the same order."""
    model = make_model(family)
    trajectories = rollouts(model, range(1, 10, 2), None if family == "gpt2-block4" else 4, temperature=1.3)
    layouts = [lambda size: remask_rows(trajectories, 1, model.logit_shift, model.block_length, size)]
    layouts += [lambda size: packed_rows(trajectories, pack_to=size)] if family == "gpt2-block4" else []
    for layout in layouts:
        plain, packed = layout(None), layout(pack_to)
        with torch.no_grad():
            expected, expected_entropy, *_ = plain.score(model)
            logprob, entropy, *_ = packed.score(model)
        torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-10)
        np.testing.assert_allclose(logprob.numpy(), recorded(trajectories), rtol=0, atol=1e-9)
        assert packed.trajectory.tolist() == plain.trajectory.tolist() and packed.step.tolist() == plain.step.tolist()
        lengths = (plain.document >= 0).sum(1)
        assert (packed.document >= 0).sum() == lengths.sum()
        assert packed.input_ids.shape[1] <= max(pack_to, int(lengths.max()))
        if pack_to == 10_000:
            assert len(packed.input_ids) == 1


@pytest.mark.parametrize("family", ["gpt2-block4", "qwen3-block4"])
def test_a_larger_training_block_is_scored_on_its_own_grid(make_model, family: str) -> None:
    """A block-size curriculum: sampled on blocks of 4, trained on blocks of 8. Approximate, and exactly what it says:
    the clean blocks of 8 before, and the own block of 8 as it was at that step."""
    model = make_model(family)
    trajectories = [replace(t, length=-(-t.length // 8) * 8) for t in rollouts(model, range(1, 10))]
    with torch.no_grad():
        logprob = packed_rows(trajectories, block_length=8).score(model).logprob
    brute = [one_forward_per_step(model, replace(t, block_length=8)) for t in trajectories]
    torch.testing.assert_close(logprob, torch.cat(brute), rtol=0, atol=1e-9)
    assert np.abs(logprob.numpy() - recorded(trajectories)).max() > 0.05


def test_ids_are_never_made_from_text() -> None:
    """Decoding and encoding again is not the identity; the learner gets the sampler's ids."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    sampled = np.array([0, 1, 2, 0])
    text = "".join(tokenizer.id_to_token(i) for i in sampled)
    assert tokenizer.encode(text).ids == [2, 2, 0], "the trap is real: four tokens come back as three"
    trajectory = TokenTrajectory(
        prompt_ids=np.array([1, 0]), length=6, mask_token_id=3, num_steps=2, step=np.array([0, 0, 1, 1]),
        position=np.array([2, 4, 3, 5]), token=sampled[[0, 2, 1, 3]], logprob=np.zeros(4), confidence=np.ones(4),
        stop_length=4, sampler={"temperature": 1.0, "top_p": 1.0, "top_k": 0},
    )  # fmt: skip
    rows = remask_rows([trajectory])
    assert rows.target.tolist() == [0, 2, 1, 0]
    assert rows.input_ids.tolist() == [[1, 0, 3, 3, 3, 3], [1, 0, 0, 3, 2, 3]]
    assert trajectory.response_ids().tolist() == sampled.tolist()


# --- merged steps -----------------------------------------------------------------------------------------------------


def test_merged_steps_by_hand() -> None:
    step = np.array([0, 0, 1, 3, 3, 4, 7])
    assert merged_steps(step, 1).tolist() == [0, 0, 1, 2, 2, 3, 4]
    assert merged_steps(step, 2).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert merged_steps(step, 9).tolist() == [0] * 7
    # Five distinct steps in two and in three runs of like length.
    assert merged_steps(step, 1, segments=2).tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert merged_steps(step, 1, segments=3).tolist() == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("shrink", [2, 3, 8])
def test_shrink_on_full_models_equals_brute_force(make_model, shrink: int) -> None:
    """Steps t, ..., t+s-1 are predicted from the canvas before step t."""
    model = make_model("gpt2-full")
    trajectories = rollouts(model, range(1, 4), num_inference_steps=8)
    rows = remask_rows(trajectories, shrink)
    assert len(rows.input_ids) == sum(-(-t.num_steps // shrink) for t in trajectories)
    with torch.no_grad():
        logprob = rows.score(model).logprob
    brute = [one_forward_per_step(model, t, t.step // shrink) for t in trajectories]
    torch.testing.assert_close(logprob, torch.cat(brute), rtol=0, atol=1e-9)
    assert np.abs(logprob.numpy() - recorded(trajectories)).max() > 0.05, "merging is approximate, and must show"


@pytest.mark.parametrize("shrink", [2, 3])
def test_shrink_on_block_models_never_merges_across_blocks(make_model, shrink: int) -> None:
    model = make_model("qwen3-block4")
    trajectories = rollouts(model, range(1, 9), num_inference_steps=8)
    with torch.no_grad():
        logprob = packed_rows(trajectories, shrink).score(model).logprob
    brute = []
    for trajectory in trajectories:
        block = trajectory.position // B
        first = np.array([trajectory.step[block == b].min() for b in block])
        # A number per (block, group inside it), in the order of time.
        group = 1000 * block + (trajectory.step - first) // shrink
        brute.append(one_forward_per_step(model, trajectory, group))
    torch.testing.assert_close(logprob, torch.cat(brute), rtol=0, atol=1e-9)
    assert np.abs(logprob.numpy() - recorded(trajectories)).max() > 0.05


# --- remasking and token editing --------------------------------------------------------------------------------------


def revising(prompt: int, length: int, block_length: int | None, seed: int) -> TokenTrajectory:
    """A random rollout that takes tokens back, writes over others, and finishes its blocks in order."""
    rng = np.random.default_rng(seed)
    mask, canvas, edits, step = 11, np.full(length, 11), [], 0
    ids = rng.integers(0, 11, prompt)
    canvas[:prompt] = ids
    size = block_length or length
    for start in range(prompt // size * size, length, size):
        places = np.arange(max(start, prompt), start + size)
        for round_ in range(4):
            for p in places:
                # Every place is masked in round 0; the last round reveals whatever is left.
                if canvas[p] == mask and (round_ == 3 or rng.random() < 0.5):
                    edits.append((step, p, int(rng.integers(0, 11))))
                elif canvas[p] != mask and round_ < 3 and rng.random() < 0.5:
                    edits.append((step, p, mask if rng.random() < 0.5 else int((canvas[p] + 1) % 11)))
            for s, p, token in edits:
                canvas[p] = token if s == step else canvas[p]
            step += 1
    steps, positions, tokens = (np.array(x) for x in zip(*edits, strict=True))
    trajectory = TokenTrajectory(
        prompt_ids=ids, length=length, mask_token_id=mask, num_steps=step, step=steps, position=positions,
        token=tokens, logprob=np.zeros(len(steps)), confidence=np.ones(len(steps)), stop_length=length - prompt,
        block_length=block_length, sampler={"temperature": 1.0, "top_p": 1.0, "top_k": 0},
    )  # fmt: skip
    trajectory.validate()
    assert (trajectory.final_canvas() != mask).all()
    return trajectory


@pytest.mark.parametrize("family", ["gpt2-full", "qwen3-block4"])
def test_remasked_and_edited_tokens_are_scored_in_their_own_states(make_model, family: str) -> None:
    model = make_model(family)
    block = family == "qwen3-block4"
    trajectories = [revising(1 + seed, 12, B if block else None, seed) for seed in range(8)]
    assert sum((~t.is_reveal).sum() for t in trajectories) >= 10
    layouts = [remask_rows(trajectories, block_length=model.block_length)]
    layouts += [packed_rows(trajectories)] if block else []
    brute = torch.cat([one_forward_per_step(model, t) for t in trajectories])
    for rows in layouts:
        with torch.no_grad():
            logprob = rows.score(model).logprob
        torch.testing.assert_close(logprob, brute, rtol=0, atol=1e-9)
        with pytest.raises(ValueError, match=r"algorithm\.shrink > 1 needs trajectories without remasking"):
            (packed_rows if rows is layouts[-1] and block else remask_rows)(trajectories, shrink=2)


CORRECTED = [{"corrector": 2, "temperature": 0.7}, {"transition": "euler", "top_k": 3}]


@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, *CORRECTED], ids=str)
@pytest.mark.parametrize("family", FULL)
def test_uniform_models_score_what_they_sampled(make_model, family: str, distribution: dict[str, Any]) -> None:
    """Every step draws every token again, whether it changes or not; prompts and numbers of steps differ in a batch."""
    model = make_model(family)
    model.config.noise = "uniform"
    requests = [Request([1, 2, 3, 4][: 1 + i % 4], seed=i, num_inference_steps=(1, 3, 4)[i % 3]) for i in range(12)]
    engine = UniformEngine(model, SamplerOptions(gen_length=6, **distribution), eos_token_id=0, max_batch_size=5)
    trajectories = engine.generate(requests)
    assert sum(t.is_reveal.sum() for t in trajectories) == 6 * 4 * 8 + distribution.get("corrector", 0) * 4 * 5
    for rows in (remask_rows(trajectories, 1, model.logit_shift), trace_rows(trajectories, model, pack_to=50)):
        with torch.no_grad():
            logprob = rows.score(model).logprob
        np.testing.assert_allclose(logprob.numpy(), recorded(trajectories), rtol=0, atol=1e-9)
    assert logprob.std() > 0.3


# --- other samples than text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [0, 3])
def test_chunks_of_actions_are_scored_as_they_were_sampled(bins: int) -> None:
    pytest.importorskip("gymnasium")
    task, options = ControlTask(), ActionOptions(num_inference_steps=3, max_actions=20, bins=bins)
    torch.manual_seed(0)
    actions = Actions(SimpleNamespace(sampler=options, rollout=SimpleNamespace(max_batch_size=3)), task)
    model = actions.new_model()
    episodes = actions.engine(model, options, torch.device("cpu")).generate(
        [SampleRequest(str(i), i) for i in range(4)]
    )
    with torch.no_grad():
        logprob = action_rows(episodes).score(model).logprob
    assert len(logprob) == 4 * 5 * 3 and logprob.std() > 0.1
    # The sampler forwarded a chunk of each episode, the learner forwards all: what is left is float32 rounding.
    np.testing.assert_allclose(logprob, np.concatenate([e.logprob for e in episodes]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("task", "noise"), [(MoleculesTask(), "marginal"), (MoleculesTask(), "uniform"), (CellsTask(), "uniform")]
)
def test_steps_of_graphs_are_scored_as_they_were_sampled(task: Any, noise: Any) -> None:
    options = GraphOptions(num_inference_steps=6, noise=noise)
    torch.manual_seed(0)
    graphs = Graphs(SimpleNamespace(sampler=options, rollout=SimpleNamespace(max_batch_size=3)), task)
    model = graphs.new_model()
    asked = [SampleRequest(task.prompts[0], seed) for seed in range(5)]
    trajectories = graphs.engine(model, options, torch.device("cpu")).generate(asked)
    rows = graph_rows(trajectories, eager=False)
    with torch.no_grad():
        logprob = rows.score(model).logprob
    assert len(logprob) == 5 * 6 and logprob.std() > 0.1
    np.testing.assert_allclose(logprob, np.concatenate([t.logprob for t in trajectories]), rtol=0, atol=1e-4)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_scored_exactly_is_refused(make_model) -> None:
    model = make_model("gpt2-full")
    good = rollouts(model, range(1, 3))
    greedy = rollouts(model, range(1, 3), temperature=0.0)
    hot = rollouts(model, range(1, 3), temperature=2.0)
    with pytest.raises(ValueError, match=r"trajectory 4 was decoded greedily: set sampler\.temperature > 0"):
        remask_rows([*good, *greedy])
    with pytest.raises(ValueError, match="must share their sampler settings"):
        remask_rows([*good, *hot])
    with pytest.raises(ValueError, match=r"algorithm\.shrink must be at least 1, got 0"):
        remask_rows(good, shrink=0)


def test_the_packed_layout_refuses_grids_it_cannot_hold(make_model) -> None:
    full = rollouts(make_model("gpt2-full"), range(1, 3), block_length=4)
    block = rollouts(make_model("gpt2-block4"), range(1, 3))
    with pytest.raises(ValueError, match="anchored at position 0"):
        packed_rows(full)
    with pytest.raises(ValueError, match="anchored at position 0"):
        packed_rows([replace(t, block_length=None) for t in block])
    with pytest.raises(ValueError, match="finished one after the other"):
        packed_rows([replace(t, position=t.position[::-1].copy()) for t in block])
