"""The diffusion value model: its targets by hand, its reading position, and what it may know."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rl.estimators.rows import TokenRows
from rl.estimators.trace_rows import packed_rows, remask_rows
from rl.losses.value import clipped_value_loss
from rl.values.model import PolicyWithValue, ValueModel
from rl.values.targets import explained_variance, outcome_rewards, step_targets
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions

FAMILIES = ["gpt2-full", "gpt2-full-shifted", "gpt2-block4", "qwen3-block4"]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- targets ----------------------------------------------------------------------------------------------------------


def test_step_aggregates_by_hand() -> None:
    """Two steps of two tokens and one token; gamma 0.5, lambda 0.5.

    r* = (0, 4), V* = (2, 3). R* = (0 + 0.5 * 4, 4) = (2, 4).
    d* = (0 - 2 + 0.5 * 3, 4 - 3) = (-0.5, 1); A* = (-0.5 + 0.25 * 1, 1) = (-0.25, 1).
    Step 0: R_j = r_j + 0.5 * 4; A_j = r_j - V_j + 0.5 * 3 + 0.25 * 1.  Step 1: R_j = 4, A_j = 4 - 3.
    """
    reward, value = tensor(1, -1, 4), tensor(1, 3, 3)
    returns, advantages = step_targets(reward, value, torch.zeros(3, dtype=int), torch.tensor([0, 0, 1]), 0.5, 0.5)
    assert returns.tolist() == [1 + 2, -1 + 2, 4]
    assert advantages.tolist() == [1 - 1 + 1.75, -1 - 3 + 1.75, 1]


def test_trajectories_do_not_leak_into_each_other() -> None:
    """The second has fewer steps than the first: behind its last one there is nothing."""
    reward, value = tensor(0, 0, 3, 5), tensor(1, 2, 4, 10)
    owner, step = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0])
    returns, advantages = step_targets(reward, value, owner, step, gamma=1.0, lam=0.0)
    assert returns.tolist() == [3, 3, 3, 5]
    # One step ahead: V of the next step minus the own value; at the end the reward minus it.
    assert advantages.tolist() == [2 - 1, 4 - 2, 3 - 4, 5 - 10]


def random_input(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ragged: 1 to 6 trajectories of 1 to 7 steps of 1 to 4 tokens, steps of one trajectory in order."""
    rng = np.random.default_rng(seed)
    owner, step = [], []
    for trajectory in range(int(rng.integers(1, 7))):
        for t in range(int(rng.integers(1, 8))):
            count = int(rng.integers(1, 5))
            owner += [trajectory] * count
            step += [t] * count
    reward, value = (torch.from_numpy(rng.normal(size=len(owner))) for _ in range(2))
    return reward, value, torch.tensor(owner), torch.tensor(step)


def loops(
    reward: np.ndarray, value: np.ndarray, owner: np.ndarray, step: np.ndarray, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """The published formulas, one token and one later step at a time."""
    returns, advantages = [], []
    for j in range(len(reward)):
        mine = owner == owner[j]
        last = step[mine].max()
        r = {t: reward[mine & (step == t)].mean() for t in range(last + 1)}
        v = {t: value[mine & (step == t)].mean() for t in range(last + 1)} | {last + 1: 0.0}
        later = range(step[j] + 1, last + 1)
        returns.append(reward[j] + sum(gamma ** (t - step[j]) * r[t] for t in later))
        advantage = reward[j] - value[j] + gamma * v[step[j] + 1]
        for t in later:
            advantage += (gamma * lam) ** (t - step[j]) * (r[t] - v[t] + gamma * v[t + 1])
        advantages.append(advantage)
    return returns, advantages


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (0.99, 0.0), (0.0, 1.0)])
def test_vectorised_targets_equal_the_double_loop(seed: int, gamma: float, lam: float) -> None:
    batch = random_input(seed)
    returns, advantages = step_targets(*batch, gamma, lam)
    expected = loops(*(x.numpy() for x in batch), gamma, lam)
    np.testing.assert_allclose(returns.numpy(), expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(advantages.numpy(), expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_outcome_rewards_with_gamma_and_lambda_one_give_reward_minus_value(seed: int) -> None:
    _, value, owner, step = random_input(seed)
    outcome = torch.linspace(-1, 2, int(owner.max()) + 1, dtype=torch.float64)
    reward = outcome_rewards(outcome, owner, step)
    returns, advantages = step_targets(reward, value, owner, step, 1.0, 1.0)
    torch.testing.assert_close(returns, outcome[owner], rtol=0, atol=1e-12)
    torch.testing.assert_close(advantages, outcome[owner] - value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_lambda_zero_is_one_step_ahead(seed: int) -> None:
    """A_j = r_j - V_j + gamma V*_{t+1}."""
    reward, value, owner, step = random_input(seed)
    _, advantages = step_targets(reward, value, owner, step, 0.8, 0.0)
    for j in range(len(reward)):
        following = (owner == owner[j]) & (step == step[j] + 1)
        ahead = float(value[following].mean()) if following.any() else 0.0
        assert float(advantages[j]) == pytest.approx(float(reward[j] - value[j]) + 0.8 * ahead, abs=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_with_the_true_values_gae_has_the_exact_gradient_and_less_variance(lam: float) -> None:
    """An enumerable policy: step 0 draws two bits from its own logits, step 1 a third bit given both.

    Step 0 is rewarded for equal bits, step 1 for a bit that is their product. The mean of sum_t sum_j A_j dlog pi_j
    over all 8 trajectories is the gradient of the expected return, with V the true values and with V = 0 (REINFORCE);
    its variance is smaller with them.
    """
    logits = torch.tensor([0.3, -0.2, 0.5, -1.0, 0.1, 0.8], dtype=torch.float64, requires_grad=True)
    bits = list(itertools.product((0, 1), repeat=3))

    def logprob(index: int, bit: int) -> torch.Tensor:
        return torch.nn.functional.logsigmoid(logits[index] if bit else -logits[index])

    def decisions(a: int, b: int, c: int) -> list[torch.Tensor]:
        return [logprob(0, a), logprob(1, b), logprob(2 + 2 * a + b, c)]

    rewards = [(float(a == b), float(c == a * b)) for a, b, c in bits]
    probability = torch.stack([sum(decisions(*own)).exp() for own in bits])
    expected = probability @ torch.tensor([sum(own) for own in rewards], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)
    after = {(a, b): float(logprob(2 + 2 * a + b, a * b).detach().exp()) for a, b, _ in bits}

    def estimates(true_values: bool) -> torch.Tensor:
        """[8, 6], the gradient estimate of every trajectory."""
        rows = []
        for own, (first, second) in zip(bits, rewards, strict=True):
            value = [float(expected.detach())] * 2 + [after[own[:2]]] if true_values else [0.0] * 3
            one = torch.tensor
            _, advantage = step_targets(
                one([first, first, second], dtype=torch.float64), one(value, dtype=torch.float64),
                one([0, 0, 0]), one([0, 0, 1]), 1.0, lam if true_values else 1.0,
            )  # fmt: skip
            loss = advantage @ torch.stack(decisions(*own))
            rows.append(torch.autograd.grad(loss, logits, retain_graph=True)[0])
        return torch.stack(rows)

    def variance(rows: torch.Tensor) -> float:
        return float(probability.detach() @ ((rows - gradient) ** 2).sum(dim=1))

    with_values, without = estimates(True), estimates(False)
    for rows in (with_values, without):
        assert (probability.detach() @ rows).tolist() == pytest.approx(gradient.tolist(), abs=1e-12)
    assert variance(with_values) < 0.6 * variance(without)


def test_an_outcome_goes_to_the_tokens_of_the_last_step() -> None:
    owner, step = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 0, 0])
    assert outcome_rewards(tensor(3, -2), owner, step).tolist() == [0, 3, 3, -2, -2]


def test_explained_variance_by_hand() -> None:
    target = tensor(1, 2, 3, 4)
    assert float(explained_variance(target, target)) == 1.0
    # A constant offset is no variance: explained all the same.
    assert float(explained_variance(target + 7, target)) == 1.0
    assert float(explained_variance(torch.zeros(4, dtype=torch.float64), target)) == 0.0
    # Errors -1, 1, -1, 1 have variance 1; the target's is 1.25.
    assert float(explained_variance(target + tensor(1, -1, 1, -1), target)) == pytest.approx(1 - 1 / 1.25)
    assert float(explained_variance(-target, target)) == pytest.approx(-3.0)
    assert torch.isnan(explained_variance(target, tensor(2, 2, 2, 2)))


# --- loss -------------------------------------------------------------------------------------------------------------


def test_clipped_value_loss_by_hand() -> None:
    """Clip 0.2. The clipped value is old + clamp(value - old); the larger squared error counts."""
    value = tensor(0.1, 0.5, 0.5, -1.0, 0.5).requires_grad_()
    old = tensor(0.0, 0.0, 0.0, 0.0, 0.0)
    returns = tensor(1.0, 1.0, 0.0, -1.0, 0.35)
    loss = clipped_value_loss(value, old, returns, 0.2)
    expected = [
        0.5 * 0.9**2,  # inside the clip: the plain error
        0.5 * 0.8**2,  # moved 0.5 towards the target: counted as if it had moved 0.2
        0.5 * 0.5**2,  # moved away from the target: the real error is the larger one
        0.5 * 0.8**2,  # at the target, but by more than the clip allows
        0.5 * 0.15**2,  # both errors are 0.15: beyond the target by as much as the clipped one lacks
    ]
    assert loss.tolist() == pytest.approx(expected)
    loss[:4].sum().backward()
    # Where the clip decides there is no gradient: the value has moved far enough.
    assert value.grad is not None
    assert value.grad.tolist()[:4] == pytest.approx([-0.9, 0.0, 0.5, 0.0])


# --- the model --------------------------------------------------------------------------------------------------------


def rows_of(model: Any, count: int = 6, shrink: int = 1, **settings: Any) -> TokenRows:
    block = 4 if model.attention == "block_causal" else None
    options = SamplerOptions(
        **{"gen_length": 8, "num_inference_steps": 4, "block_length": block, "temperature": 1.5, **settings}
    )
    requests = [Request([(3 * n + i) % 11 for i in range(n)], seed=n) for n in range(1, count + 1)]
    trajectories = InProcessEngine(model, options).generate(requests)
    if block:
        return packed_rows(trajectories, shrink)
    return remask_rows(trajectories, shrink, model.logit_shift)


def with_random_head(model: Any) -> Any:
    """A critic that no longer says 0."""
    generator = torch.Generator().manual_seed(3)
    model.head.linear.weight.data.normal_(0.0, 1.0, generator=generator)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_values_start_at_zero(make_model, family: str) -> None:
    model = make_model(family)
    rows = rows_of(model)
    values = ValueModel(model).double()(rows)
    assert values.shape == rows.target.shape and values.dtype == torch.float64
    assert values.tolist() == [0.0] * len(rows.target)
    assert PolicyWithValue(model).double()(rows).value.tolist() == [0.0] * len(rows.target)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_value_is_read_at_the_noisy_position_in_the_row_of_the_decision(make_model, family: str) -> None:
    """Not at its clean copy, not where a shifted policy reads its logits, and in no other round's row."""
    model = make_model(family)
    rows = rows_of(model)
    assert (rows.input_ids[rows.row, rows.column] == model.mask_token_id).all()
    critic = with_random_head(ValueModel(model).double())
    with torch.no_grad():
        values = critic(rows)
        hidden = model.hidden_states(rows.input_ids, visible=rows.visible(), position_ids=rows.position_ids)
        everywhere = hidden @ critic.head.linear.weight[0]
    for j in range(len(rows.target)):
        torch.testing.assert_close(values[j], everywhere[rows.row[j], rows.column[j]], rtol=0, atol=1e-10)
    assert values.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_knows_what_was_decided_before_and_nothing_later(make_model, family: str) -> None:
    """Every token of every response is changed in turn: values of earlier and equal steps stay, later ones move."""
    model = make_model(family)
    block = 4 if model.attention == "block_causal" else None
    options = SamplerOptions(gen_length=8, num_inference_steps=4, block_length=block)
    (trajectory,) = InProcessEngine(model, options).generate([Request([1, 2, 3], seed=1)])
    build = packed_rows if block else remask_rows
    critic = with_random_head(ValueModel(model).double())
    moved = 0
    with torch.no_grad():
        before = critic(build([trajectory]))
        for edit in range(len(trajectory.step)):
            token = trajectory.token.copy()
            token[edit] = (token[edit] + 1) % 11
            after = critic(build([replace(trajectory, token=token)]))
            later = torch.from_numpy(trajectory.step > trajectory.step[edit])
            torch.testing.assert_close(after[~later], before[~later], rtol=0, atol=1e-12)
            moved += int(((after[later] - before[later]).abs() > 1e-6).sum())
            assert ((after[later] - before[later]).abs() > 1e-6).all()
    assert moved > 20


@pytest.mark.parametrize("family", ["gpt2-full", "qwen3-block4"])
def test_a_shared_backbone_gives_the_policys_log_probs_and_the_critics_values(make_model, family: str) -> None:
    model = make_model(family)
    rows = rows_of(model)
    both, critic = with_random_head(PolicyWithValue(model).double()), with_random_head(ValueModel(model).double())
    with torch.no_grad():
        scores = both(rows)
        expected = rows.score(model)
        torch.testing.assert_close(scores.logprob, expected.logprob, rtol=0, atol=1e-12)
        torch.testing.assert_close(scores.entropy, expected.entropy, rtol=0, atol=1e-12)
        torch.testing.assert_close(scores.value, critic(rows), rtol=0, atol=1e-12)
    # One backbone: the value's gradient reaches the policy's weights, and the critic's copy is its own.
    for module, reaches in ((both, True), (critic, False)):
        model.zero_grad()
        out = module(rows)
        (out.value if module is both else out).sum().backward()
        grads = [p.grad for p in model.backbone.parameters() if p.grad is not None and p.grad.abs().max() > 0]
        assert bool(grads) == reaches


def test_a_critic_owns_its_weights_and_trains_no_output_head(make_model) -> None:
    model = make_model("gpt2-block4")
    critic = ValueModel(model).double()
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert "head.linear.weight" in trained and not any("lm_head" in name for name in trained)
    assert model.get_output_embeddings().weight.requires_grad, "the policy's own head stays trainable"
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in theirs for p in critic.parameters())


@pytest.mark.parametrize("family", ["gpt2-full", "qwen3-block4"])
def test_a_critic_learns_the_outcome_from_the_state(make_model, family: str) -> None:
    """The outcome is a property of the prompt, which every state shows: explained variance rises from 0."""
    model = make_model(family)
    rows = rows_of(model)
    outcome = torch.arange(6, dtype=torch.float64) % 2
    reward = outcome_rewards(outcome, rows.trajectory, rows.step)
    critic = ValueModel(model).double()
    optimizer = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], lr=0.01)
    returns, _ = step_targets(reward, torch.zeros_like(reward), rows.trajectory, rows.step, 1.0, 1.0)
    scores = []
    for _ in range(40):
        values = critic(rows)
        scores.append(float(explained_variance(values.detach(), returns)))
        loss = clipped_value_loss(values, values.detach(), returns, 0.2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert scores[0] == 0.0 and scores[-1] > 0.9
