"""Several trajectories per row, and visibility told to three kernels: always the same numbers."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from rl.estimators.logprob import logprob_and_entropy
from rl.estimators.packing import bundled, first_fit, placed
from rl.estimators.rows import TokenRows, readout
from rl.estimators.trace_rows import packed_rows, remask_rows
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rl.registry import parse_recipe
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.distribution import sampling_logprobs
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import TokenTrajectory

CAPACITY = 100


def rollouts(model: Any, count: int = 9, **settings: Any) -> list[TokenTrajectory]:
    """Prompts of 1 to `count` tokens, so that documents differ in length; ends at the end token 0."""
    options = SamplerOptions(**{"gen_length": 8, "num_inference_steps": 4, "temperature": 1.3, **settings})
    requests = [Request([(5 * n + i) % 11 for i in range(n)], seed=n) for n in range(1, count + 1)]
    return InProcessEngine(model, options, eos_token_id=0).generate(requests)


def rows_for(model: Any, trajectories: list[TokenTrajectory], pack_to: int | None) -> TokenRows:
    if model.attention == "block_causal":
        return packed_rows(trajectories, pack_to=pack_to)
    return remask_rows(trajectories, logit_shift=model.logit_shift, pack_to=pack_to)


# --- placement --------------------------------------------------------------------------------------------------------


def test_first_fit_by_hand() -> None:
    """5 opens row 0, 4 opens row 1, 3 fits behind the 4, 2 fits behind the 5; 9 fits nowhere and is alone."""
    row, offset = first_fit([3, 5, 2, 4], 7)
    assert row.tolist() == [1, 0, 0, 1]
    assert offset.tolist() == [4, 0, 5, 0]
    row, offset = first_fit([3, 9, 4], 7)
    assert row.tolist() == [1, 0, 1]
    assert offset.tolist() == [4, 0, 0]
    # A document that fills a row to its last token fits; one token more does not.
    assert first_fit([4, 3], 7)[0].tolist() == [0, 0]
    assert first_fit([4, 4], 7)[0].tolist() == [0, 1]


def test_documents_never_overlap_and_rows_hold_their_capacity() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 40, int(rng.integers(1, 30)))
        row, offset = first_fit(lengths, 32)
        for r in range(row.max() + 1):
            places = np.concatenate([np.arange(offset[d], offset[d] + lengths[d]) for d in np.flatnonzero(row == r)])
            assert sorted(places) == list(range(len(places)))
            assert len(places) <= 32 or (row == r).sum() == 1


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2-block4", "qwen3-block4", "gpt2-full", "gpt2-full-shifted"])
def test_packing_changes_no_score_and_no_gradient(make_model, family: str) -> None:
    model = make_model(family)
    trajectories = rollouts(model)
    weight = torch.linspace(-1, 1, sum(t.is_reveal.sum() for t in trajectories), dtype=torch.float64)
    results, layouts = [], []
    for pack_to in (None, CAPACITY):
        rows = rows_for(model, trajectories, pack_to)
        layouts.append(rows)
        model.zero_grad()
        logprob, entropy, *_ = rows.score(model)
        ((logprob + 0.3 * entropy) * weight).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((logprob.detach(), entropy.detach(), gradient))
    for alone, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-9)
    recorded = np.concatenate([t.logprob for t in trajectories])
    np.testing.assert_allclose(results[1][0].numpy(), recorded, rtol=0, atol=1e-9)
    alone, packed = layouts
    assert len(packed.input_ids) < len(alone.input_ids) / 2
    assert packed.input_ids.shape[1] <= CAPACITY
    assert int(packed.document.max()) > 0
    # Fewer tokens run through the model, since short documents fill the rows of long ones.
    assert packed.num_tokens < alone.num_tokens


def test_decisions_keep_their_order_wherever_their_documents_lie(make_model) -> None:
    """The learner pairs decisions with advantages and recorded log-probs by order alone."""
    model = make_model("qwen3-block4")
    trajectories = rollouts(model)
    packed, alone = rows_for(model, trajectories, CAPACITY), rows_for(model, trajectories, None)
    for name in ("target", "trajectory", "step"):
        assert torch.equal(getattr(packed, name), getattr(alone, name)), name
    assert packed.trajectory.tolist() == sorted(packed.trajectory.tolist())
    position = packed.position_ids[packed.row, packed.column]
    assert position.tolist() == np.concatenate([t.position for t in trajectories]).tolist()
    assert (packed.input_ids[packed.row, packed.column] == model.mask_token_id).all()
    assert packed.row.tolist() != sorted(packed.row.tolist()), "the longest come first: rows are out of order"


@pytest.mark.parametrize("family", ["qwen3-block4", "gpt2-full"])
def test_a_document_is_blind_to_its_neighbours(make_model, family: str) -> None:
    model = make_model(family)
    trajectories = rollouts(model)
    rows = rows_for(model, trajectories, CAPACITY)
    changed = rows.input_ids.clone()
    victim = (rows.document == 1) & (torch.arange(len(changed)) == 0)[:, None]
    assert victim.any()
    changed[victim] = (changed[victim] + 1) % 11
    with torch.no_grad():
        before = rows.score(model).logprob
        after = replace(rows, input_ids=changed).score(model).logprob
    own = victim[rows.row, rows.column]
    torch.testing.assert_close(after[~own], before[~own], rtol=0, atol=1e-12)
    assert (after[own] - before[own]).abs().max() > 0.1


def test_the_recipe_packs_on_request(make_model) -> None:
    """`algorithm.pack_to`; equal rows still share a forward afterwards."""
    for family in ("qwen3-block4", "gpt2-full"):
        model = make_model(family)
        trajectories = rollouts(model)
        rows = parse_recipe({"name": "tracerl", "pack_to": CAPACITY}).rows(trajectories, model, None)
        assert torch.equal(rows.input_ids, rows_for(model, trajectories, CAPACITY).input_ids)
        twice = parse_recipe({"name": "tracerl", "pack_to": 48}).rows(trajectories * 2, model, None)
        with torch.no_grad():
            logprob = twice.distinct().score(model).logprob
        recorded = np.concatenate([t.logprob for t in trajectories * 2])
        np.testing.assert_allclose(logprob.numpy(), recorded, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        parse_recipe({"name": "tracerl", "pack_to": 0})


# --- prompts that rollouts share --------------------------------------------------------------------------------------


def groups(model: Any) -> list[TokenTrajectory]:
    """Three rollouts of each of four prompts, of 1, 5, 8 and 11 tokens; the second and third prompt begin alike."""
    options = SamplerOptions(gen_length=8, num_inference_steps=4, temperature=1.3)
    prompts = [[7], [3, 1, 4, 1, 5], [3, 1, 4, 1, 5, 9, 2, 6], list(range(11))]
    requests = [Request(prompt, seed=7 * n + i) for n, prompt in enumerate(prompts) for i in range(3)]
    return InProcessEngine(model, options, eos_token_id=0).generate(requests)


@pytest.mark.parametrize("family", ["gpt2-block4", "qwen3-block4-shifted-causal", "qwen3-block4-shifted"])
def test_rollouts_of_a_prompt_share_its_tokens(make_model, family: str) -> None:
    """The same log-probs and gradients, on fewer tokens: each prompt's whole blocks are forwarded once."""
    model = make_model(family)
    trajectories = groups(model)
    weight = torch.linspace(-1, 1, sum(t.is_reveal.sum() for t in trajectories), dtype=torch.float64)
    results = []
    for pack_to in (None, 80, 10_000):
        rows = packed_rows(trajectories, pack_to=pack_to, **readout(model))
        model.zero_grad()
        logprob, entropy, *_ = rows.score(model)
        ((logprob + 0.3 * entropy) * weight).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((rows, logprob.detach(), entropy.detach(), gradient))
        # The dense mask says the same as attention document by document.
        dense = model.hidden_states(rows.input_ids, visible=rows.visible(), position_ids=rows.position_ids)
        torch.testing.assert_close(rows.score(model, dense).logprob, logprob, rtol=0, atol=1e-9)
    alone, _, together = results
    # Qwen3 rotates keys in float32: the gradient of a shared key is rounded once, not once for every rollout.
    of_gradient = 1e-9 if family == "gpt2-block4" else 1e-6
    for other in results[1:]:
        for ours, theirs, atol in zip(other[1:], alone[1:], (1e-9, 1e-9, of_gradient), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    assert alone[3].abs().max() > 1
    np.testing.assert_allclose(
        together[1].numpy(), np.concatenate([t.logprob for t in trajectories]), rtol=0, atol=1e-9
    )
    real = int((alone[0].document >= 0).sum())
    # Prompts of 5, 8 and 11 tokens have 4, 8 and 8 in whole blocks, which two of three rollouts do not repeat.
    assert (together[0].document >= 0).sum() == real - 2 * (4 + 8 + 8)
    assert together[0].input_ids.shape == (1, real - 2 * (4 + 8 + 8))


def test_a_shared_prompt_is_seen_by_its_own_rollouts_alone(make_model) -> None:
    model = make_model("qwen3-block4")
    rows = packed_rows(groups(model), pack_to=10_000)
    assert rows.context is not None
    prompt = (rows.document == rows.context) & (rows.segment == 0) & (rows.input_ids == 4)
    shared = [int(number) for number in rows.context.unique() if (rows.context == number).sum() > 40]
    assert shared
    for number in shared:
        changed = rows.input_ids.clone()
        changed[0, int((rows.document[0] == number).nonzero()[0])] = 10
        with torch.no_grad():
            moved = (replace(rows, input_ids=changed).score(model).logprob - rows.score(model).logprob).abs()
        reader = rows.context[rows.row, rows.column] == number
        assert (moved[~reader] < 1e-12).all() and (moved[reader] > 1e-6).float().mean() > 0.9
    assert prompt.any()


def test_bundles_by_hand() -> None:
    """A third document has no room beside its prompt; a lone prompt is not split off."""
    tokens = [np.array([1, 2, *own]) for own in ([3, 4, 5], [6, 7, 8], [9, 9, 9])]
    assert bundled(tokens, [2, 2, 2], 8) == [[0, 1], [2]]
    assert bundled(tokens, [0, 2, 0], 8) == [[0], [1], [2]]
    parts, row, columns = placed(tokens, [2, 2, 2], 8)
    assert row.tolist() == [0, 0, 1]
    assert [own.tolist() for own in columns] == [[0, 1, 2, 3, 4], [0, 1, 5, 6, 7], [0, 1, 2, 3, 4]]
    assert [(p.document, p.row, p.begin, p.end, p.number, p.context) for p in sorted(parts, key=lambda p: p[2:4])] == [
        (0, 0, 0, 2, 0, 0),
        (0, 0, 2, 5, 1, 0),
        (1, 0, 5, 8, 2, 0),
        (2, 1, 0, 5, 0, 0),
    ]


# --- visibility -------------------------------------------------------------------------------------------------------


def naive_visibility(rows: TokenRows) -> list[list[list[bool]]]:
    """The rule in words, one pair at a time."""

    def seen(row: int, q: int, k: int) -> bool:
        document, segment, block = (x[row].tolist() for x in (rows.document, rows.segment, rows.block))
        if document[k] not in (document[q], document[q] if rows.context is None else int(rows.context[row, q])):
            return False
        if segment[k] == 0:
            return block[k] < block[q] or (segment[q] == 0 and block[k] == block[q])
        return segment[k] == segment[q]

    count, width = rows.input_ids.shape
    return [[[seen(row, q, k) for k in range(width)] for q in range(width)] for row in range(count)]


@pytest.mark.parametrize("family", ["qwen3-block4", "gpt2-full"])
def test_dense_mask_and_block_mask_are_one_predicate(make_model, family: str) -> None:
    model = make_model(family)
    rows = rows_for(model, groups(model)[3:9] if family == "qwen3-block4" else rollouts(model, 4), 64)
    assert int(rows.document.max()) > 0 and int(rows.document.min()) == -1
    assert (rows.context is not None) == (family == "qwen3-block4")
    count, width = rows.input_ids.shape
    expected = torch.tensor(naive_visibility(rows))
    dense = rows.visible()
    assert dense is not None and torch.equal(dense, expected)
    flex = create_mask(rows.mask_mod(), count, None, width, width, device="cpu")
    assert torch.equal(flex[:, 0], expected)


class OneLayer:
    """A `DenoisingModel` of one attention layer that takes either kind of mask."""

    mask_token_id, attention, block_length, logit_shift, max_length = 11, "block_causal", 4, 0, 64

    def __init__(self, wants_block_mask: bool):
        self.wants_block_mask = wants_block_mask
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(3, 12, 16, generator=generator, dtype=torch.float64)
        self.places = torch.randn(64, 16, generator=generator, dtype=torch.float64)

    def hidden_states(self, input_ids, *, visible=None, position_ids=None, cache=None):
        assert isinstance(visible, BlockMask if self.wants_block_mask else torch.Tensor)
        q, k, v = ((table[input_ids] + self.places[position_ids])[:, None] for table in self.table)
        if not self.wants_block_mask:
            return scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])[:, 0]
        with warnings.catch_warnings():
            # Without a GPU there is nothing to compile for; the plain evaluation says so.
            warnings.simplefilter("ignore", UserWarning)
            return flex_attention(q, k, v, block_mask=visible)[:, 0]

    def token_logits(self, hidden):
        return 3 * hidden @ self.table[0].T - 1e9 * torch.nn.functional.one_hot(torch.tensor(11), 12)


def test_flex_attention_gives_the_scores_of_dense_attention(make_model) -> None:
    trajectories = rollouts(make_model("gpt2-block4"), 5)
    for pack_to in (None, CAPACITY):
        rows = packed_rows(trajectories, pack_to=pack_to)
        dense, flex = (rows.score(OneLayer(wants)).logprob for wants in (False, True))
        torch.testing.assert_close(flex, dense, rtol=0, atol=1e-10)
        assert dense.std() > 0.5


def test_padding_alone_needs_one_mask_row_per_row(make_model) -> None:
    """Full-attention canvases: a [R, 1, W] mask gives the numbers of the dense one."""
    for family in ("gpt2-full", "qwen3-full"):
        model = make_model(family)
        rows = remask_rows(rollouts(model))
        assert int(rows.document.min()) == -1
        with torch.no_grad():
            short = rows.hidden(model)
            dense = model.hidden_states(rows.input_ids, visible=rows.visible(), position_ids=rows.position_ids)
        real = rows.document == 0
        torch.testing.assert_close(short[real], dense[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2-block4", "qwen3-block4", "qwen3-full"])
def test_our_attention_equals_transformers_own(make_model, family: str) -> None:
    """Also with shared key-value heads, which are not copied out here."""
    model = make_model(family)
    rows = rows_for(model, rollouts(model), CAPACITY)
    visible = rows.visible()
    assert visible is not None
    gradients, states = [], []
    for implementation in (None, "sdpa"):
        if implementation:
            model.backbone.set_attn_implementation(implementation)
        model.zero_grad()
        hidden = model.hidden_states(rows.input_ids, visible=visible, position_ids=rows.position_ids)
        (hidden * torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype)).sum().backward()
        states.append(hidden.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.backbone.parameters()]))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-8)


def test_without_a_mask_everything_is_visible(make_model) -> None:
    """transformers would take restarting positions for packed sequences, and a missing mask for a causal one."""
    for family in ("gpt2-full", "qwen3-full"):
        model = make_model(family)
        ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
        positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
        with torch.no_grad():
            bare = model.hidden_states(ids, position_ids=positions)
            told = model.hidden_states(ids, position_ids=positions, visible=torch.ones(1, 6, 6, dtype=torch.bool))
        torch.testing.assert_close(bare, told, rtol=0, atol=1e-12)


def test_kernels_that_cannot_serve_are_refused(make_model) -> None:
    config = make_model("qwen3-block4").config
    again = DiffusionLMConfig(**{**config.to_dict(), "attn_implementation": "flex_attention"})
    model = DiffusionLM(again).eval()
    assert model.wants_block_mask
    with pytest.raises(ValueError, match="attn_implementation flex_attention needs a GPU"):
        model(torch.tensor([[1, 2, 3, 4]]))
    eager = DiffusionLMConfig(**{**config.to_dict(), "attn_implementation": "eager"})
    with pytest.raises(ValueError, match="attn_implementation must be sdpa or flex_attention, got 'eager'"):
        DiffusionLM(eager)


# --- log-prob and entropy ---------------------------------------------------------------------------------------------


def plain(
    logits: torch.Tensor, target: torch.Tensor, temperature: float, top_p: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definitions, left to autograd."""
    logprobs = sampling_logprobs(logits, temperature, top_p, top_k, keep=target)
    entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)
    return logprobs[torch.arange(len(target)), target], entropy


@pytest.mark.parametrize("settings", [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.6, 0.8, 0), (0.9, 0.95, 5)])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.7])
def test_logprob_and_entropy_equal_autograds(settings: tuple[float, float, int], entropy_weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40, 12, generator=generator, dtype=torch.float64)
    # What a masked-diffusion head does to its mask token.
    logits[:, 11] -= 1e9
    target = torch.randint(0, 11, (40,), generator=generator)
    weight = torch.linspace(-1, 1, 40, dtype=torch.float64)
    results = []
    for function in (plain, logprob_and_entropy):
        leaf = logits.clone().requires_grad_()
        logprob, entropy = function(leaf, target, *settings)
        ((logprob + entropy_weight * entropy) * weight).sum().backward()
        results.append((logprob.detach(), entropy.detach(), leaf.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert results[1][2].abs().max() > 0.1


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, -1e9], [0.0, np.log(3.0), -1e9, -1e9]], dtype=torch.float64)
    logprob, entropy = logprob_and_entropy(logits, torch.tensor([1, 0]), 1.0)
    assert logprob.tolist() == pytest.approx([-np.log(3), -np.log(4)])
    assert entropy.tolist() == pytest.approx([np.log(3), np.log(4) - 0.75 * np.log(3)])
