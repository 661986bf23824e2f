"""UDM-GRPO and dFlowGRPO: hand cases, gradients by enumeration, runs, what they refuse."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from rl.config import load_config
from rl.estimators.base import Verdicts
from rl.recipes.dflow_grpo import DFlowGRPO
from rl.recipes.tracerl import TraceRL
from rl.recipes.udm_grpo import UDMGRPO
from rl.train.plan import check_run
from rollouts.samplers.uniform import step_law, transition_logprobs
from rollouts.trajectory import TokenTrajectory
from tests.runs import lines, tiny_config, train_here
from tests.test_uniform import PROMPT, d3pm, every_rollout, exact_law, gradient

REWARD = torch.from_numpy(np.random.default_rng(7).normal(size=9))


@pytest.fixture
def model(make_model: Any) -> Any:
    model = make_model("gpt2-full", vocab_size=4, seed=3, scale=1.0)
    model.config.noise = "uniform"
    return model


def test_a_jump_by_hand() -> None:
    """The example of the page (four tokens, sure of token 2, 0 stands there, step 2 of 4), as a jump."""
    logits, step = torch.tensor([[0.0, 0, 50, 0]], dtype=torch.float64), torch.tensor([2])
    before, after, stay = step_law(step, torch.tensor([4]), euler=True)
    assert (float(before), float(after), float(stay)) == pytest.approx((0.5, 1.0, 0.6065307))
    law = transition_logprobs(logits, torch.tensor([0]), before, after, stay=stay).exp()
    assert law[0].tolist() == pytest.approx([0.6065307, 0, 0.3934693, 0])
    posterior = transition_logprobs(logits, torch.tensor([0]), *step_law(step, torch.tensor([4]))[:2]).exp()
    assert posterior[0].tolist() == pytest.approx([3 / 8, 1 / 24, 13 / 24, 1 / 24])
    # Five forwards with a corrector are three steps; the corrector's are not jumps, and the last step surely jumps.
    law = step_law(torch.arange(5), torch.tensor([5]), corrected=True, euler=True)
    torch.testing.assert_close(law.before, torch.tensor([0, 0, 1 / 3, 0, 2 / 3], dtype=torch.float64))
    torch.testing.assert_close(law.after, torch.tensor([1, 1 / 3, 1, 2 / 3, 1], dtype=torch.float64))
    torch.testing.assert_close(
        law.stay, torch.tensor([-1 / 3, -np.inf, -1 / 2, -np.inf, -np.inf], dtype=torch.float64).exp()
    )


def policy_gradient(recipe: Any, rollouts: Any, model: Any, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of sum over decisions of weight [rollouts] x log-prob."""
    rows = recipe.rows(rollouts, model).distinct()
    assert len(rows.trajectory) == sum(recipe.num_decisions(t) for t in rollouts)
    return gradient((rows.score(model).logprob * weight[rows.trajectory]).sum(), model)


def test_dflow_grpo_over_all_rollouts(model: Any) -> None:
    """Two positions: its gradient is half of the expected reward's, as far as its steps go; TraceRL's is whole."""
    rollouts = every_rollout(2, 2, transition="euler")
    final = torch.tensor([3 * t.response_ids()[0] + t.response_ids()[1] for t in rollouts])
    whole = TraceRL().rows(rollouts, model)
    logprob = torch.zeros(729).double().index_add(0, whole.trajectory, whole.distinct().score(model).logprob.detach())
    weight = logprob.exp() / 9 * REWARD[final]
    for last in (True, False):
        exact = gradient((exact_law(model, 2, 2, transition="euler", last=last) * REWARD).sum(), model)
        ours = policy_gradient(DFlowGRPO(last_step=last), rollouts, model, weight)
        torch.testing.assert_close(2 * ours, exact, rtol=0, atol=1e-10)
        assert exact.norm() > 1e-2
    # Without the last step less is learned, and TraceRL learns all.
    all_of_it = gradient((exact_law(model, 2, 2, transition="euler") * REWARD).sum(), model)
    torch.testing.assert_close(policy_gradient(TraceRL(), rollouts, model, weight), all_of_it, rtol=0, atol=1e-10)
    assert (all_of_it - exact).norm() > 0.3 * all_of_it.norm()
    # A step is one decision; what the sampler recorded is averaged alike.
    rollouts[5].logprob[:] = [0, 0, -0.2, -0.6, -1.0, -3.0]
    rows = DFlowGRPO(last_step=True).rows(rollouts[5:6], model)
    assert rows.step.tolist() == [0, 1] and rows.sampler_logprob.tolist() == pytest.approx([-0.4, -2.0])


def finished(answer: tuple[int, int], seed: int, num_steps: int = 4, **sampler: int) -> TokenTrajectory:
    """A rollout whose last step made the answer; what came before is not looked at."""
    return TokenTrajectory(
        prompt_ids=np.array(PROMPT), length=5, mask_token_id=3, num_steps=num_steps, step=np.full(2, num_steps - 1),
        position=np.array([3, 4]), token=np.array(answer), logprob=np.zeros(2), confidence=np.zeros(2), stop_length=2,
        sampler={"temperature": 1.0, "noise": "uniform", **sampler}, seed=seed,
    )  # fmt: skip


def test_udm_grpo_in_every_noised_state(model: Any) -> None:
    """Noise has its law; a decision is the mean of Bayes' denoising prediction; the gradient is that of the mean."""
    recipe, count = UDMGRPO(num_states=2, first_states=2), 400
    answers = [(0, 0), (1, 2), (2, 1)]
    rollouts = [finished(answer, 7 * seed + i) for i, answer in enumerate(answers) for seed in range(count)]
    rows = recipe.rows(rollouts, model)
    level = rows.rows.before.view(-1, 2)[:, 0]
    assert set(level.tolist()) == {0.0, 0.25, 0.5} and rows.sampler_logprob is None
    assert abs((level.view(-1, 2)[:, 0] == 0).double().mean() - 0.5) < 0.05
    states = rows.rows.input_ids[:, 3:]
    answer = torch.tensor(answers).repeat_interleave(2 * count, 0)
    clean = model(rows.rows.input_ids)[:, 3:, :3].softmax(-1)
    key = torch.cat([answer, (4 * level[:, None]).long(), states], dim=1)
    found, place = torch.unique(key, dim=0, return_inverse=True)
    seen, weight, expected = place.bincount(), torch.zeros(len(key), dtype=torch.float64), torch.zeros(())
    chi_square, cells = 0.0, 0
    scores = rows.distinct().score(model)
    for (a, b, quarter, *state), times in zip(found.tolist(), seen.tolist(), strict=True):
        own = (key == torch.tensor([a, b, quarter, *state])).all(1)
        row, mixed = int(own.nonzero()[0]), quarter / 4
        probability = np.prod([mixed * (z == x) + (1 - mixed) / 3 for z, x in zip(state, (a, b), strict=True)])
        copies = int(((key[:, 2] == quarter) & (key[:, :2] == torch.tensor([a, b])).all(1)).sum())
        chi_square, cells = chi_square + (times - copies * probability) ** 2 / (copies * probability), cells + 1
        value = sum(d3pm(clean[row, i], state[i], mixed, 1.0)[(a, b)[i]].log() for i in range(2)) / 2
        torch.testing.assert_close(scores.logprob[own], value.detach().expand(times))
        weight[own] = probability / times * float(REWARD[3 * a + b])
        expected = expected + probability * float(REWARD[3 * a + b]) * value
    # Every noised canvas was met: 9 at each of 3 levels of 3 answers.
    assert cells == 81 and chi_square < 72 + 5 * np.sqrt(2 * 72)
    ours = gradient((scores.logprob * weight).sum(), model)
    torch.testing.assert_close(ours, gradient(expected, model), rtol=0, atol=1e-10)


def test_udm_grpos_gradient_is_not_the_exact_one(model: Any) -> None:
    """By enumeration, in four steps: noised copies of good answers are other states than the sampler's."""
    law = exact_law(model, 4, 2)
    exact, law = gradient((law * REWARD).sum(), model), law.detach()
    states = list(itertools.product(range(3), repeat=2))
    clean = model(torch.tensor([[*PROMPT, *state] for state in states]))[:, 3:, :3].softmax(-1)
    advantage, value = REWARD - float((law * REWARD).sum()), torch.zeros(())
    for (i, answer), (j, state), quarter in itertools.product(enumerate(states), enumerate(states), range(3)):
        level = quarter / 4
        noise = np.prod([level * (z == x) + (1 - level) / 3 for z, x in zip(state, answer, strict=True)])
        predicted = sum(d3pm(clean[j, k], state[k], level, 1.0)[answer[k]].log() for k in range(2))
        value = value + float(law[i] * advantage[i]) * noise * predicted / 6
    udm = gradient(value, model)
    cosine = float(torch.dot(udm, exact) / udm.norm() / exact.norm())
    # That of TraceRL is 1 (tests/test_uniform.py).
    assert cosine == pytest.approx(0.9695, abs=5e-4)


def test_levels_and_advantages_of_udm_grpo() -> None:
    rng = np.random.default_rng(0)
    firsts = {tuple(UDMGRPO().levels(finished((0, 0), 0), rng)) for _ in range(40)}
    assert firsts == {(0.0, 0.25, 0.5), (0.25, 0.5, 0.75)}
    many = {UDMGRPO().levels(finished((0, 0), 0, 10), rng)[0] for _ in range(60)}
    assert many == {0.0, 0.1, 0.2}
    # Seven forwards with a corrector are four steps.
    assert {UDMGRPO(num_states=4).levels(finished((0, 0), 0, 7, corrector=1), rng)[3] for _ in range(5)} == {0.75}
    reward = torch.tensor([0.0] * 39 + [1.0], dtype=torch.float64)
    verdicts = Verdicts(reward, torch.zeros(40, dtype=torch.int64))
    assert UDMGRPO().advantage(verdicts).max() == 5.0
    assert float(UDMGRPO(advantage_clip=50).advantage(verdicts).max()) == pytest.approx(39**0.5, rel=1e-3)
    # Redrawn with every pass over the rollouts, and with nothing else.
    assert UDMGRPO.redraw


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model.noise=absorbing algorithm.name=udm_grpo", r"'udm_grpo' scores uniform noise, .* absorbing: .* mdpo"),
        ("model.noise=absorbing algorithm.name=dflow_grpo sampler.transition=euler", r"'dflow_grpo' scores uniform"),
        ("algorithm.name=dflow_grpo", r"algorithm\.name dflow_grpo needs sampler\.transition=euler"),
        (
            "algorithm.name=dflow_grpo sampler.transition=euler sampler.num_inference_steps=1",
            r"set algorithm\.last_step, or more steps",
        ),
        ("algorithm.name=udm_grpo algorithm.num_states=5", r"algorithm\.num_states is 5, and rollouts have 4 steps"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(overrides: str, message: str, tmp_path: Any) -> None:
    arguments = tiny_config(tmp_path, "model.noise=uniform", "algorithm.entropy_coef=0", *overrides.split())
    with pytest.raises(ValueError, match=message) as error:
        check_run(load_config(arguments[1], arguments[2:]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["udm_grpo", "dflow_grpo"])
def test_a_recipe_runs(tmp_path: Any, name: str) -> None:
    arguments = tiny_config(
        tmp_path, f"algorithm.name={name}", "algorithm.entropy_coef=0", "model.noise=uniform", "train.steps=2",
        "train.prompts_per_step=4", "train.micro_batch_size=4", "eval.num_prompts=2", "eval.viewer_items=0",
        *(["sampler.transition=euler", "sampler.corrector=2"] if name == "dflow_grpo" else []),
    )  # fmt: skip
    train_here(arguments)
    train = lines(tmp_path / "run", "train")
    assert [line["cost/updates"] for line in train] == [2, 4]
    assert all(np.isfinite(line["loss/total"]) and line["policy/grad_norm"] > 0 for line in train)
    if name == "dflow_grpo":
        # Four steps and three corrections between them, the last step left out; scored as they were sampled.
        assert train[0]["policy/logprob_gap_max"] < 1e-4
