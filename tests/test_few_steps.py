"""Fewer steps by training: what consistency fits, and what merged steps of recorded answers fit. By hand, by law."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl.cli import main
from rl.estimators.documents import Reads, canvas_document
from rl.estimators.masking import random_mask_rows
from rl.estimators.rows import assemble
from rl.estimators.taught import BridgedRows
from rl.estimators.trace_rows import trace_rows
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import save_trajectories
from tests.runs import tiny_config
from tests.tabular import PROMPT, TabularModel

MASK = 2
# Both tokens are equal, more often 0, or once in ten cases not.
LAW = torch.tensor([[0.6, 0.02], [0.08, 0.3]], dtype=torch.float64)


def bridged(answer: tuple[int, int], hidden: list[int], still: list[int], share: float) -> BridgedRows:
    """Both tokens of an answer over {0, 1}, some of them masked, and fewer where the teacher looks."""

    def rows(masks: list[int]) -> Any:
        canvas = np.array([*PROMPT, *answer])
        canvas[[1 + i for i in masks]] = MASK
        at = np.array([1 + i for i in hidden])
        return assemble([canvas_document(canvas)], [Reads(0, at, np.array(answer)[hidden], 0)])

    open_ = torch.tensor([i in still for i in hidden])
    return BridgedRows(**vars(rows(hidden)), shown=rows(still), open=open_, share=share)


def test_a_consistent_target_by_hand() -> None:
    """Both masked, then the first shown: its target is its token, the second's one half what the model says there."""
    model = TabularModel(2, 2, seed=3)
    kl = bridged((1, 0), [0, 1], [1], 0.5).score(model).kl
    here, there = model.logp((MASK, MASK)), model.logp((1, MASK)).detach()
    second = -0.5 * here[1, 0] - 0.5 * (there[1].exp() * here[1]).sum()
    torch.testing.assert_close(kl, torch.stack([-here[0, 1], second]))
    kl.sum().backward()
    assert model.table.grad is not None
    touched = model.table.grad.abs().sum((1, 2)).nonzero().flatten().tolist()
    assert touched == [MASK * 3 + MASK], "the teacher has no gradient"


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_least_consistent_loss_is_at_the_posterior(share: float) -> None:
    """The mean gradient over answers, masks at t (all) and masks at s, all enumerated, is 0 at the law's conditionals.

    So one step still draws both tokens independently of each other: consistency alone makes no joint law.
    """

    def gradient(model: TabularModel) -> torch.Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for answer in itertools.product(range(2), repeat=2):
            # s / t is uniform: both stay with probability 1/3, each alone with 1/6, none with 1/3.
            for still, chance in (([0, 1], 1 / 3), ([0], 1 / 6), ([1], 1 / 6), ([], 1 / 3)):
                loss = loss + LAW[answer] * chance * bridged(answer, [0, 1], still, share).score(model).kl.sum()
        return torch.autograd.grad(loss, model.table)[0]

    true = TabularModel(2, 2).become(LAW)
    torch.testing.assert_close(gradient(true), torch.zeros_like(true.table), rtol=0, atol=1e-12)
    assert gradient(TabularModel(2, 2, seed=1)).abs().max() > 0.05
    marginals = true.logp((MASK, MASK)).exp()
    one_step = marginals[0][:, None] * marginals[1]
    assert 0.5 * (one_step - LAW).abs().sum() > 0.3


@pytest.mark.parametrize("block_length", [None, 4])
def test_the_teacher_sees_the_same_answers_with_fewer_masks(block_length: int | None) -> None:
    tokens = [np.random.default_rng(n).integers(0, 9, 12) for n in range(200)]
    options: dict[str, Any] = {"block_length": block_length}
    plain, weight = random_mask_rows(tokens, [3] * 200, 11, np.random.default_rng(0), **options)
    rows, same = random_mask_rows(tokens, [3] * 200, 11, np.random.default_rng(0), consistency=0.5, **options)
    assert isinstance(rows, BridgedRows)
    assert torch.equal(rows.input_ids, plain.input_ids) and torch.equal(same, weight)
    shown = rows.shown.input_ids
    changed = shown != rows.input_ids
    assert (rows.input_ids[changed] == 11).all()
    at = (rows.row, rows.column)
    assert int(changed.sum()) == int((~rows.open).sum())
    assert torch.equal(shown[at], torch.where(rows.open, 11, rows.target))
    # s / t is uniform, one draw for all masks of a block or sequence.
    own = rows.row * 3 + (rows.block[at] if block_length else 0)
    kept = torch.zeros(600).index_add(0, own, rows.open.float()) / torch.bincount(own, minlength=600)
    kept = kept[~kept.isnan()]
    assert abs(kept.mean() - 0.5) < 0.06 and kept.std() > 0.28


def test_one_gaussian_noise_for_all_times_masks_as_the_bridge_does() -> None:
    """MCD's masks: token k is shown at t where a_t + s_t e_k is above s_t times every other noise.

    With one noise for all times the masks at s lie inside those at t. So the law of a pair is that of its two
    marginals, P(masked at s | masked at t) = P(masked at s) / P(masked at t): the bridge's.
    """
    noise = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gap = noise[:, 1:].amax(1) - noise[:, 0]
    masks = [gap >= (1 - t) / t for t in (0.2, 0.3, 0.5, 0.8, 1.0)]
    assert all(not bool((before & ~after).any()) for before, after in itertools.pairwise(masks))
    assert 0 < masks[0].float().mean() < masks[-1].float().mean() < 1


def test_merged_steps_of_one_answer_are_one_step_that_makes_it() -> None:
    """A teacher of two steps under LAW, and one that always gives 0 0; both fitted from the first canvas alone.

    The least loss is the entropy of both marginals. It is 0, and one step as good as two, where the answer is certain.
    """
    true = TabularModel(2, 2).become(LAW)
    options = SamplerOptions(gen_length=2, num_inference_steps=2, selector="left_most")
    rollouts = InProcessEngine(true, options).generate([Request(PROMPT, seed) for seed in range(400)])
    for trajectories, exact in ((rollouts, False), ([t for t in rollouts if t.response_ids().sum() == 0], True)):
        rows = trace_rows(trajectories, true, shrink=2)
        assert (rows.input_ids[:, 1:] == MASK).all() and len(rows.target) == 2 * len(trajectories) == 2 * rows.num_rows
        counts = torch.zeros(2, 2, dtype=torch.float64).index_put(
            (rows.column - 1, rows.target), torch.ones(len(rows.target), dtype=torch.float64), accumulate=True
        )
        best = (counts / counts.sum(1, keepdim=True)).clamp(min=1e-12)
        model = TabularModel(2, 2)
        with torch.no_grad():
            model.table[MASK * 3 + MASK] = best.log()
        (gradient,) = torch.autograd.grad(rows.score(model).logprob.mean(), model.table)
        assert gradient.abs().max() < 1e-9
        one_step = InProcessEngine(model, SamplerOptions(gen_length=2, num_inference_steps=1))
        answers = [t.response_ids().tolist() for t in one_step.generate([Request(PROMPT, s) for s in range(200)])]
        unequal = np.mean([a != b for a, b in answers])
        assert unequal == 0 if exact else unequal > 0.3


def test_both_stages_run_and_refuse(tmp_path: Path, run: Any, make_model: Any) -> None:
    short = ["sft.steps=2", "train.steps=0"]
    assert main(["sft", *tiny_config(tmp_path / "a", *short, "sft.consistency=0.5", "sft.micro_batch_size=3")]) == 0
    code, _, err = run("check", *tiny_config(tmp_path / "b", "sft.merge_steps=2"))
    assert code == 2 and "sft.merge_steps merges the steps of recorded trajectories" in err
    code, _, err = run("check", *tiny_config(tmp_path / "b", "sft.consistency=0.5", "sft.errors=0.1"))
    assert code == 2 and "sft.consistency reveals masks of answers" in err
    code, _, err = run("check", *tiny_config(tmp_path / "b", "sft.consistency=0.5", "model.noise=uniform"))
    assert code == 2 and "sft.consistency needs masks" in err
    options = SamplerOptions(gen_length=16, num_inference_steps=8, preset="remdm", remdm_cap=0.9)
    revised = InProcessEngine(make_model("gpt2-full"), options).generate([Request([1, 2], 0)])
    assert not revised[0].is_reveal.all()
    save_trajectories(tmp_path / "revised.npz", revised)
    merged = [f"sft.trajectories={tmp_path / 'revised.npz'}", "sft.merge_steps=2"]
    code, _, err = run("sft", *tiny_config(tmp_path / "c", *short, *merged))
    assert code == 2 and "sft.merge_steps > 1 needs trajectories without remasking" in err, err
