"""Losses against numbers worked out by hand, and estimators against exact expectations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rl.batch import DecisionBatch
from rl.losses.aggregate import decision_weights, weighted_sum
from rl.losses.kl import kl_estimate
from rl.losses.policy_gradient import clipped_policy_loss
from rl.losses.value import clipped_value_loss


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(
    ratio: list[float], advantage: list[float], ref_log_ratio: list[float] | None = None, entropy: float = 0.0
) -> DecisionBatch:
    """Decisions whose pi / pi_old is `ratio` and whose log(pi / pi_ref) is `ref_log_ratio`."""
    old = torch.linspace(-2, -1, len(ratio), dtype=torch.float64)
    logprob = (old + vector(*ratio).log()).requires_grad_()
    return DecisionBatch(
        logprob=logprob,
        entropy=torch.full_like(old, entropy).requires_grad_(),
        old_logprob=old,
        ref_logprob=None if ref_log_ratio is None else (logprob.detach() - vector(*ref_log_ratio)),
        advantage=vector(*advantage),
        weight=torch.full_like(old, 1 / len(ratio)),
    )


def gradient(loss: torch.Tensor, at: torch.Tensor) -> list[float]:
    (result,) = torch.autograd.grad(loss.sum(), at, allow_unused=True)
    return [0.0] * len(at) if result is None else result.tolist()


# --- policy -----------------------------------------------------------------------------------------------------------

# ratio, advantage -> loss, d loss / d logprob, clipped
PPO_CASES = [
    (1.5, 1.0, -1.2, 0.0, 1.0),  # a good token already much more likely: nothing to gain
    (0.5, 1.0, -0.5, -0.5, 0.0),  # a good token that became unlikely: full pull back
    (1.5, -1.0, 1.5, 1.5, 0.0),  # a bad token that became likely: full push down
    (0.5, -1.0, 0.8, 0.0, 1.0),  # a bad token already much less likely: nothing to gain
    (1.1, 2.0, -2.2, -2.2, 0.0),
    (0.9, -2.0, 1.8, 1.8, 0.0),
    (1.0, 3.0, -3.0, -3.0, 0.0),  # on policy: minus the policy gradient
    (1.0, 0.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope", "clipped"), PPO_CASES)
def test_the_clipped_surrogate_by_hand(
    ratio: float, advantage: float, loss: float, slope: float, clipped: float
) -> None:
    decisions = batch([ratio], [advantage])
    output = clipped_policy_loss(decisions, clip_low=0.2, clip_high=0.2)
    assert output.loss.tolist() == pytest.approx([loss])
    assert gradient(output.loss, decisions.logprob) == pytest.approx([slope])
    assert output.metrics["clip_fraction"].tolist() == [clipped]


def test_both_sides_are_clipped_by_their_own_bound() -> None:
    decisions = batch([1.25, 1.35, 0.85, 0.75], [1.0, 1.0, -1.0, -1.0])
    output = clipped_policy_loss(decisions, clip_low=0.2, clip_high=0.3)
    assert output.loss.tolist() == pytest.approx([-1.25, -1.3, 0.85, 0.8])
    assert gradient(output.loss, decisions.logprob) == pytest.approx([-1.25, 0.0, 0.85, 0.0])
    assert output.metrics["clip_fraction"].tolist() == [0, 1, 0, 1]


def test_metrics_by_hand() -> None:
    output = clipped_policy_loss(batch([2.0, 0.5], [1.0, 1.0], entropy=0.3))
    log2 = math.log(2)
    assert output.metrics["ratio"].tolist() == pytest.approx([2.0, 0.5])
    assert output.metrics["log_ratio"].tolist() == pytest.approx([log2, -log2])
    assert output.metrics["log_ratio_abs"].tolist() == pytest.approx([log2, log2])
    assert output.metrics["kl"].tolist() == pytest.approx([0.5 - 1 + log2, 2 - 1 - log2])
    assert output.metrics["entropy"].tolist() == [0.3, 0.3]
    assert all(not values.requires_grad for values in output.metrics.values())


def test_an_outlier_cannot_overflow() -> None:
    decisions = batch([1.0, 1.0], [1.0, -1.0])
    decisions = replace(decisions, old_logprob=decisions.old_logprob - 1000)
    output = clipped_policy_loss(decisions, log_ratio_clamp=10.0, kl_to="old", kl_coef=0.0)
    assert output.loss.tolist() == pytest.approx([-1.2, math.exp(10)])
    assert all(math.isfinite(g) for g in gradient(output.loss, decisions.logprob))


def test_entropy_is_a_bonus() -> None:
    decisions = batch([1.0, 1.0], [0.0, 0.0], entropy=0.7)
    output = clipped_policy_loss(decisions, entropy_coef=0.1)
    assert output.loss.tolist() == pytest.approx([-0.07, -0.07])
    assert gradient(output.loss, decisions.entropy) == pytest.approx([-0.1, -0.1])


def test_the_kl_term_by_hand() -> None:
    decisions = batch([1.0], [0.0], ref_log_ratio=[0.5])
    # r = pi_ref / pi = exp(-0.5).
    for kind, value, slope in (
        ("k1", 0.5, 1.0),
        ("k2", 0.125, 0.5),
        ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)),
    ):
        output = clipped_policy_loss(decisions, kl_to="reference", kl_coef=2.0, kl_estimator=kind)
        assert output.loss.item() == pytest.approx(2 * value)
        assert gradient(output.loss, decisions.logprob) == pytest.approx([2 * slope])
        assert output.metrics["kl"].item() == pytest.approx(value)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_only_the_reference_anchors(kind: str) -> None:
    """Defect W9: a KL to the old policy has no gradient at the start of a step, wherever the base model is."""
    slopes = {}
    for kl_to in ("old", "reference"):
        decisions = batch([1.0, 1.0], [0.0, 0.0], ref_log_ratio=[0.5, -0.5])
        output = clipped_policy_loss(decisions, kl_to=kl_to, kl_coef=1.0, kl_estimator=kind)
        slopes[kl_to] = gradient(output.loss, decisions.logprob)
    assert slopes["old"] == [0.0, 0.0]
    assert slopes["reference"][0] > 0.3 and slopes["reference"][1] < -0.3, "a pull towards it from both sides"


def test_the_kl_term_is_divided_as_the_policy_term_is() -> None:
    """Defect W9: published trainers sum one and average the other, so its weight depends on the length."""
    decisions = batch([1.0] * 4, [0.3] * 4, ref_log_ratio=[0.5] * 4)
    plain = clipped_policy_loss(decisions)
    with_kl = clipped_policy_loss(decisions, kl_to="reference", kl_coef=0.1, kl_estimator="k1")
    for mode in ("token_mean", "trajectory_mean"):
        for lengths in ([2, 2], [1, 3], [4]):
            weight = decision_weights(mode, torch.tensor(lengths), 4, len(lengths), 8)
            weight = weight.repeat_interleave(torch.tensor(lengths))
            difference = weighted_sum(with_kl.loss, weight) - weighted_sum(plain.loss, weight)
            assert difference.item() == pytest.approx(0.1 * 0.5)


def test_a_batch_whose_fields_differ_in_shape_is_noticed() -> None:
    with pytest.raises(AssertionError, match="advantage has shape"):
        replace(batch([1.0, 1.0], [1.0, 1.0]), advantage=vector(1.0)).check()
    batch([1.0, 1.0], [1.0, 1.0]).check()


# --- KL estimators ----------------------------------------------------------------------------------------------------


def categorical() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of pi and log-probs of another distribution over 6 tokens."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), other.log_softmax(-1)


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    logits, other = categorical()
    log_pi = logits.log_softmax(-1).detach()
    kl = (log_pi.exp() * (log_pi - other)).sum()
    expected = {kind: (log_pi.exp() * kl_estimate(kind, log_pi, other)).sum() for kind in ("k1", "k2", "k3")}
    assert kl > 0.3
    torch.testing.assert_close(expected["k1"], kl, rtol=1e-12, atol=0)
    torch.testing.assert_close(expected["k3"], kl, rtol=1e-12, atol=0)
    assert abs(expected["k2"] - kl) > 1e-3
    assert (kl_estimate("k3", log_pi, other) >= 0).all() and (kl_estimate("k2", log_pi, other) >= 0).all()
    assert (kl_estimate("k1", log_pi, other) < 0).any()


def test_what_each_estimator_minimises_as_a_loss_term() -> None:
    """Samples are fixed when the loss is differentiated, so the gradient is E_pi[d k / d logprob * d logprob]:
    k2 gives the gradient of KL(pi || other), k3 that of KL(other || pi), k1 nothing but noise."""
    logits, other = categorical()

    def expected_gradient(kind: str) -> torch.Tensor:
        log_pi = logits.log_softmax(-1)
        (result,) = torch.autograd.grad((log_pi.detach().exp() * kl_estimate(kind, log_pi, other)).sum(), logits)
        return result

    log_pi = logits.log_softmax(-1)
    (forward,) = torch.autograd.grad((log_pi.exp() * (log_pi - other)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((other.exp() * (other - log_pi)).sum(), logits)
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros_like(logits), rtol=0, atol=1e-14)
    torch.testing.assert_close(expected_gradient("k2"), forward, rtol=0, atol=1e-14)
    torch.testing.assert_close(expected_gradient("k3"), reverse, rtol=0, atol=1e-14)
    assert (forward - reverse).abs().max() > 0.01


def test_the_log_ratio_of_a_kl_is_clamped() -> None:
    far = kl_estimate("k3", vector(-500.0), vector(0.0), clamp=10.0)
    assert far.item() == pytest.approx(math.exp(10) - 11)
    assert kl_estimate("k1", vector(0.0), vector(-500.0)).item() == 10.0
    with pytest.raises(ValueError, match=r"algorithm\.kl_estimator must be k1, k2 or k3, got 'k4'"):
        kl_estimate("k4", vector(0.0), vector(0.0))


# --- aggregation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "weights", "value"),
    [
        # Traces of 1 and 3 decisions with losses 4 | 1, 2, 3; the response is 8 long.
        ("token_mean", [1 / 4, 1 / 4], (4 + 1 + 2 + 3) / 4),
        ("trajectory_mean", [1 / 2, 1 / 6], (4 + 2) / 2),
        ("constant", [1 / 16, 1 / 16], (4 + 6) / 8 / 2),
    ],
)
def test_aggregation_by_hand(mode: str, weights: list[float], value: float) -> None:
    length = torch.tensor([1, 3])
    weight = decision_weights(mode, length, total_decisions=4, total_trajectories=2, constant=8)
    assert weight.tolist() == pytest.approx(weights)
    assert weighted_sum(vector(4, 1, 2, 3), weight.repeat_interleave(length)).item() == pytest.approx(value)


@pytest.mark.parametrize("mode", ["token_mean", "trajectory_mean", "constant"])
def test_an_update_does_not_depend_on_how_it_is_cut(mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    length = torch.randint(1, 9, (12,), generator=generator)
    weight = decision_weights(mode, length, float(length.sum()), 12, 8).repeat_interleave(length)
    owner = torch.arange(12).repeat_interleave(length)
    loss = torch.randn(len(owner), generator=generator, dtype=torch.float64)
    whole = weighted_sum(loss, weight)
    for size in (1, 4, 5):
        parts = [(owner >= i) & (owner < i + size) for i in range(0, 12, size)]
        cut = sum(weighted_sum(loss[part], weight[part]) for part in parts)
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", ["token_mean", "trajectory_mean", "constant"])
def test_equal_losses_average_to_themselves(mode: str) -> None:
    """Every mode is a mean when all traces are as long as the constant."""
    length = torch.full((5,), 8)
    weight = decision_weights(mode, length, 40.0, 5, 8).repeat_interleave(length)
    assert weighted_sum(torch.full((40,), 2.5, dtype=torch.float64), weight).item() == pytest.approx(2.5)


def test_an_unknown_aggregation_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.aggregation must be token_mean, .* got 'sum'"):
        decision_weights("sum", torch.tensor([1]), 1, 1, 1)


# --- value ------------------------------------------------------------------------------------------------------------


def test_the_clipped_value_loss_by_hand() -> None:
    value = vector(0.1, 0.5, 0.5, -0.5).requires_grad_()
    # Old value 0, clip 0.2: a value that moved further counts as if it had moved 0.2, if that is the larger error.
    loss = clipped_value_loss(value, torch.zeros_like(value), vector(1.0, 1.0, 0.0, 0.0), clip=0.2)
    assert loss.tolist() == pytest.approx([0.5 * 0.9**2, 0.5 * 0.8**2, 0.5 * 0.5**2, 0.5 * 0.5**2])
    assert gradient(loss, value) == pytest.approx([-0.9, 0.0, 0.5, -0.5])
