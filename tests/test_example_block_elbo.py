"""docs/examples/block_elbo.py: every block's estimate against its exact bound, values and gradients, and a real run.

The answers have three or four tokens and blocks of two, so that all masks can be enumerated with plain forwards.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from docs.examples.block_elbo import BlockELBO
from rl.estimators.draws import scope_positions
from rl.estimators.masked_copies import copy_rows
from rollouts.samplers.distribution import sampling_logprobs
from rollouts.trajectory import TokenTrajectory
from tests import runs
from tests.test_masked_copies import Script, sampled

ADDRESS = f"{runs.ROOT}/docs/examples/block_elbo.py:BlockELBO"


def bound(model: Any, trajectory: TokenTrajectory, block: np.ndarray) -> torch.Tensor:
    """The exact bound of a block: the mean over the number c of hidden tokens and over the masks that hide c of its L
    tokens of L/c times their log-probs, behind the clean blocks before it."""
    final = torch.from_numpy(trajectory.final_canvas())
    total = torch.zeros((), dtype=torch.float64)
    for count in range(1, len(block) + 1):
        for hidden in itertools.combinations(block.tolist(), count):
            canvas = final.clone()
            canvas[list(hidden)] = canvas[block[-1] + 1 :] = trajectory.mask_token_id
            logits = model(canvas[None])[0, [j - model.logit_shift for j in hidden]]
            logprob = sampling_logprobs(logits, keep=final[list(hidden)], **trajectory.sampler)
            total = total + logprob.gather(1, final[list(hidden)][:, None]).sum() / count / math.comb(len(block), count)
    return total


def estimates(recipe: BlockELBO, model: Any, trajectory: TokenTrajectory) -> torch.Tensor:
    """[masks, blocks], with gradient: the decisions times their sizes under every mask that one draw can make.

    Levels in the middle of twelfths give every number of hidden tokens its share in blocks of 1, 2, 3 and 4.
    """
    places = scope_positions(trajectory, "answer")
    sizes = [len(places[i : i + recipe.block_size]) for i in range(0, len(places), recipe.block_size)]
    orders = list(itertools.product(*(itertools.permutations(range(size)) for size in sizes)))
    values = []
    for level, order in itertools.product((np.arange(12) + 0.5) / 12, orders):
        script = [single for single in order for _ in range(recipe.draws)]

        def copies(places: np.ndarray, rng: Any, _: float, level: float = level, script: Any = script) -> Any:
            return recipe.copies(places, Script(*script), level)

        rows = recipe.decide(*copy_rows([trajectory], model, copies), [len(places)])
        assert rows.step.tolist() == list(range(len(sizes)))
        values.append(rows.score(model).logprob * torch.tensor(sizes))
    return torch.stack(values)


@pytest.mark.parametrize("family", ["gpt2-full", "gpt2-full-shifted"])
@pytest.mark.parametrize("length", [3, 4])
def test_every_blocks_estimate_and_its_gradient_expect_the_exact_bound(make_model, family: str, length: int) -> None:
    model = make_model(family)
    (trajectory,) = sampled(model, 1, gen_length=length, num_inference_steps=length)
    start = trajectory.prompt_length
    exact = torch.stack([bound(model, trajectory, np.arange(start, start + length)[i : i + 2]) for i in (0, 2)])
    one, two = (estimates(BlockELBO(block_size=2, draws=n), model, trajectory) for n in (1, 2))
    torch.testing.assert_close(one.mean(0), exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(two.mean(0), exact, rtol=0, atol=1e-12)
    # Two draws hide both numbers of tokens, so only the choice of the token is left to chance.
    spread = [float(values.detach()[:, 0].std()) for values in (one, two)]
    assert 0.01 < spread[1] < spread[0]
    parameters = list(model.parameters())
    for index in (0, 1):
        ours = torch.autograd.grad(one[:, index].mean(), parameters, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(exact[index], parameters, retain_graph=True, allow_unused=True)
        for mine, true in zip(ours, theirs, strict=True):
            assert (mine is None) == (true is None)
            if mine is not None:
                torch.testing.assert_close(mine, true, rtol=0, atol=1e-11)


def test_old_and_new_policy_see_the_same_masks(make_model) -> None:
    """The change of a decision then expects the change of the bound, with far less noise than two masks would have."""
    old, new = make_model("gpt2-full"), make_model("gpt2-full")
    with torch.no_grad():
        for index, parameter in enumerate(new.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            parameter += 0.02 * parameter.std(correction=0) * noise
    trajectories = sampled(old, 6, gen_length=4, num_inference_steps=4)
    recipe = BlockELBO(block_size=4, draws=1)
    changes, apart = [], []
    with torch.no_grad():
        exact = torch.stack([bound(new, t, np.arange(3, 7)) - bound(old, t, np.arange(3, 7)) for t in trajectories])
        for iteration in range(60):
            rows = recipe.rows(trajectories, new, iteration=iteration)
            again = recipe.rows(trajectories[2:3], old, iteration=iteration)
            after, before = rows.score(new).logprob, rows.score(old).logprob
            torch.testing.assert_close(again.score(old).logprob, before[2:3], rtol=0, atol=1e-12)
            changes.append(4 * (after - before))
            apart.append(4 * (after - recipe.rows(trajectories, old, iteration=iteration + 1).score(old).logprob))
    shared, separate = torch.stack(changes), torch.stack(apart)
    assert ((shared.mean(0) - exact).abs() < 4 * shared.std(0) / 60**0.5).all()
    assert (shared.std(0) < separate.std(0) / 5).all()


def test_answers_of_any_length_are_cut_from_their_start(make_model) -> None:
    """Answers of 4, 3 and 1 tokens in blocks of 3: 2, 1 and 1 decisions; every read belongs to one of them."""
    model = make_model("gpt2-full")
    drawn = sampled(model, 3, gen_length=4, num_inference_steps=4)
    trajectories = [replace(t, stop_length=n) for t, n in zip(drawn, (4, 3, 1), strict=True)]
    recipe = BlockELBO(block_size=3)
    rows: Any = recipe.rows(trajectories, model)
    assert (rows.trajectory.tolist(), rows.step.tolist()) == ([0, 0, 1, 2], [0, 1, 0, 0])
    assert [recipe.num_decisions(t) for t in trajectories] == [2, 1, 1]
    position = rows.rows.position_ids[rows.rows.row, rows.rows.column]
    assert torch.equal((position - 3) // 3, rows.step[rows.part])
    # Every read of a block of one token is that token, at full weight over the two draws.
    assert float(rows.weight[rows.part == 3].sum()) == 1.0


@pytest.mark.parametrize("epochs", [1, 2])
def test_it_trains_by_its_address(tmp_path: Path, epochs: int) -> None:
    """Old and new see the same masks: with one pass over the rollouts every ratio is 1."""
    arguments = runs.tiny_config(
        tmp_path, f"algorithm.name={ADDRESS}", "algorithm.block_size=6", "algorithm.scope=canvas",
        f"train.epochs={epochs}", "train.steps=2",
    )  # fmt: skip
    runs.train_here(arguments)
    for line in runs.lines(tmp_path / "run", "train"):
        assert np.isfinite(line["loss/total"]) and line["policy/grad_norm"] > 0
        assert (line["policy/log_ratio_abs"] < 1e-6) == (epochs == 1)
        # Sixteen tokens in blocks of six: three decisions of each of the rollouts that are not left out.
        assert line["policy/decisions"] % (3 * epochs) == 0 and 0 < line["policy/decisions"] <= 16 * 3 * epochs
