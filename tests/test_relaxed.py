"""Gumbel-softmax sampling: the path KL, its gradient, its optimum, and what it costs."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from pydantic import ValidationError

from rl.estimators.relaxed import SoftCanvas, free_canvas
from rollouts.samplers.relaxed import Segment, relaxed_rollout
from rollouts.samplers.relaxed_options import RelaxedOptions
from tests.tabular import PROMPT, TabularModel, path_objective


def canvas_of(model: TabularModel, count: int, first_seed: int = 0) -> SoftCanvas:
    return free_canvas([PROMPT] * count, model.num_free, list(range(first_seed, first_seed + count)), model)


def rollout(
    model: TabularModel, reference: TabularModel | None, count: int, steps: int, first_seed: int = 0, **options: object
) -> list[Segment]:
    canvas = canvas_of(model, count, first_seed)
    other = None if reference is None else lambda token: canvas.holding(token).score(reference)
    return list(
        relaxed_rollout(
            lambda token: canvas.holding(token).score(model), other, canvas.free, steps, RelaxedOptions(**options)
        )
    )


def reward_of(one_hot: torch.Tensor, num_free: int) -> torch.Tensor:
    """[B]: smooth and not linear in the sample."""
    x = one_hot.view(-1, num_free, one_hot.shape[-1])[..., :-1]
    weight = torch.sin(torch.arange(x[0].numel(), dtype=x.dtype)).view_as(x[0])
    inner = (x * weight).sum((1, 2))
    return inner + 0.7 * inner**2 + (x[:, 0] * x[:, 1]).sum(-1)


def objective(model: TabularModel, reference: TabularModel, alpha: float, **options: object) -> torch.Tensor:
    segments = rollout(model, reference, 6, 5, **options)
    last = segments[-1].one_hot
    assert last is not None
    return (reward_of(last, model.num_free) - alpha * sum(s.kl for s in segments)).mean()


@pytest.mark.parametrize(
    "options",
    [
        {"relaxed_steps": 3},
        {"relaxed_steps": 5, "temperature": 0.6, "checkpoint": True},
        {"relaxed_steps": 3, "temperature": 1.5, "final_temperature": 0.5},
        {"relaxed_steps": 3, "kl_weight": "released", "carry_over": "released"},
    ],
    ids=["plain", "all steps, checkpoints", "temperature schedule", "released"],
)
def test_the_gradient_is_the_finite_difference_of_the_relaxed_objective(options: dict[str, object]) -> None:
    model, reference = TabularModel(2, 3, seed=1), TabularModel(2, 3, seed=2)
    options = {"straight_through": False, **options}
    value = objective(model, reference, 0.3, **options)
    (gradient,) = torch.autograd.grad(value, [model.table])
    generator = torch.Generator().manual_seed(0)
    step = 1e-6
    for _ in range(5):
        direction = torch.randn(model.table.shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            moved = TabularModel(2, 3, seed=1)
            moved.table.data += sign * step * direction
            ends.append(float(objective(moved, reference, 0.3, **options).detach()))
        expected = (ends[0] - ends[1]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert gradient.abs().max() > 1e-3


def test_straight_through_is_one_hot_forward_and_soft_backward() -> None:
    model = TabularModel(3, 3, seed=4)
    hard = rollout(model, None, 8, 4, relaxed_steps=2)[-1]
    soft = rollout(model, None, 8, 4, relaxed_steps=2, straight_through=False)[-1]
    assert hard.one_hot is not None and soft.one_hot is not None
    expected = torch.nn.functional.one_hot(hard.token, 4).double()
    torch.testing.assert_close(hard.one_hot.detach(), expected, rtol=0, atol=1e-15)
    assert (soft.one_hot.detach() - expected).abs().max() > 0.1
    assert torch.equal(soft.one_hot.argmax(-1), hard.token)
    weight = torch.randn(hard.one_hot.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = (torch.autograd.grad((x.one_hot * weight).sum(), [model.table])[0] for x in (hard, soft))
    torch.testing.assert_close(one, other)


def ancestral_law(model: TabularModel, steps: int) -> list[dict[tuple[int, ...], float]]:
    """Exact probability of every state before each step, and after the last, of the hard sampler."""
    mask, size = model.num_tokens, model.num_free
    laws = [{(mask,) * size: 1.0}]
    for index in range(steps):
        reveal = 1.0 / (steps - index)
        after: dict[tuple[int, ...], float] = {}
        for state, probability in laws[-1].items():
            p = model.logp(state).exp().tolist()
            choices = [
                [(token, 1.0)] if token != mask else [(mask, 1 - reveal), *((v, reveal * p[i][v]) for v in range(mask))]
                for i, token in enumerate(state)
            ]
            for combination in itertools.product(*choices):
                new = tuple(token for token, _ in combination)
                weight = probability
                for _, factor in combination:
                    weight *= factor
                after[new] = after.get(new, 0.0) + weight
        laws.append(after)
    return laws


def test_hard_steps_follow_the_ancestral_law_and_carry_its_exact_path_kl() -> None:
    model, reference = TabularModel(2, 2, seed=1), TabularModel(2, 2, seed=2)
    steps, count = 4, 20_000
    laws = ancestral_law(model, steps)
    with torch.no_grad():
        segments = rollout(model, reference, count, steps, relaxed_steps=1)
    for index, segment in enumerate(segments):
        # (t - s) / t is 1 over the steps that are left.
        exact = sum(
            probability / (steps - index) * float((p.exp() * (p - q))[i].sum())
            for state, probability in laws[index].items()
            for p, q in [(model.logp(state).detach(), reference.logp(state).detach())]
            for i in range(2)
            if state[i] == 2
        )
        error = float(segment.kl.std()) / count**0.5
        assert float(segment.kl.mean()) == pytest.approx(exact, abs=4 * error + 1e-12)
        assert exact > 0.005
        seen = segment.token.view(-1, 2)
        for state, probability in laws[index + 1].items():
            share = float((seen == torch.tensor(state)).all(1).double().mean())
            assert share == pytest.approx(probability, abs=4.5 * (probability * (1 - probability) / count) ** 0.5)


def test_the_kl_counts_hard_steps_and_the_released_weighting_does_not() -> None:
    model, reference = TabularModel(2, 3, seed=1), TabularModel(2, 3, seed=2)
    ours = rollout(model, reference, 16, 8, relaxed_steps=4)
    released = rollout(model, reference, 16, 8, relaxed_steps=4, kl_weight="released", carry_over="released")
    assert [len(s.kl) for s in ours] == [16] * 5
    assert all(float(s.kl.detach().mean()) > 0.01 for s in ours)
    assert [float(s.kl.detach().abs().max()) for s in released[:-1]] == [0.0] * 4
    assert float(released[-1].kl.detach().abs().max()) > 0.01
    # Equal models are at no distance, and it costs nothing to say so.
    same = rollout(model, model, 16, 8, relaxed_steps=4)
    assert max(float(s.kl.detach().abs().max()) for s in same) < 1e-12


def test_the_exact_carry_over_lets_no_mass_lag_behind_the_schedule() -> None:
    model = TabularModel(2, 3, seed=1, scale=0.5)
    with torch.no_grad():
        ours = rollout(model, None, 4000, 6, relaxed_steps=6)[-1]
        released = rollout(model, None, 4000, 6, relaxed_steps=6, carry_over="released")[-1]
    assert float(ours.mask_mass.max()) == 0.0
    assert float(released.mask_mass.mean()) > 0.05


def test_the_optimum_of_the_path_objective_is_the_tilted_law() -> None:
    """alpha log Z, reached by a table whose final law is p_pre exp(reward / alpha) / Z; path and final KL agree."""
    generator = torch.Generator().manual_seed(3)
    law = torch.rand((3, 3, 3), generator=generator, dtype=torch.float64) + 0.05
    law = law / law.sum()
    reward = torch.randn((3, 3, 3), generator=generator, dtype=torch.float64)
    alpha = 0.7
    pretrained = TabularModel(3, 3).become(law)
    assert (path_objective(pretrained, pretrained, reward, alpha)[2] - law).abs().max() < 1e-12
    policy = TabularModel(3, 3).become(law)
    optimizer = torch.optim.LBFGS(policy.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -path_objective(policy, pretrained, reward, alpha)[0]
        loss.backward()
        return loss

    optimizer.step(closure)
    value, path_kl, final = (x.detach() for x in path_objective(policy, pretrained, reward, alpha))
    z = (law * (reward / alpha).exp()).sum()
    tilted = law * (reward / alpha).exp() / z
    assert float(value) == pytest.approx(float(alpha * z.log()), abs=1e-6)
    assert 0.5 * float((final - tilted).abs().sum()) < 1e-3
    assert float(path_kl) == pytest.approx(float((final * (final / law).log()).sum()), abs=1e-4)
    # The conditionals of the tilted law are that optimum.
    known = path_objective(TabularModel(3, 3).become(tilted), pretrained, reward, alpha)[0].detach()
    assert float(known) == pytest.approx(float(alpha * z.log()), abs=1e-12)


@pytest.mark.parametrize(("checkpoint", "of_each"), [(False, 9), (True, 9 + 4)])
def test_every_step_costs_one_forward_of_each_model(checkpoint: bool, of_each: int) -> None:
    """As the models count them and the segments say; with checkpoints the backward pass repeats the 4 relaxed steps."""
    model, reference = TabularModel(2, 3, seed=1), TabularModel(2, 3, seed=2)
    for other in (reference, None):
        model.calls = reference.calls = 0
        segments = rollout(model, other, 4, 9, relaxed_steps=4, checkpoint=checkpoint)
        last = segments[-1].one_hot
        assert last is not None
        (reward_of(last, 3).sum() + sum(s.kl.sum() for s in segments)).backward()
        assert (model.calls, reference.calls) == (of_each, of_each if other else 0)
        assert sum(s.forwards for s in segments) == model.calls + reference.calls
    with torch.no_grad():
        quiet = rollout(model, None, 4, 9, relaxed_steps=4, checkpoint=checkpoint)
    assert sum(s.forwards for s in quiet) == 9


class SavedBytes:
    """Peak of the bytes that autograd holds at one time."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> object:
        meter = self

        class Held:
            def __init__(self) -> None:
                self.tensor = tensor
                meter.now += tensor.numel() * tensor.element_size()
                meter.peak = max(meter.peak, meter.now)

            def __del__(self) -> None:
                meter.now -= tensor.numel() * tensor.element_size()

        return Held()


def peak_bytes(steps: int, relaxed: int, checkpoint: bool = False) -> int:
    model, reference = TabularModel(2, 4, seed=1), TabularModel(2, 4, seed=2)
    reference.requires_grad_(False)
    canvas, meter = canvas_of(model, 8), SavedBytes()
    options = RelaxedOptions(relaxed_steps=relaxed, checkpoint=checkpoint)
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda held: held.tensor):  # type: ignore[attr-defined]
        segments = relaxed_rollout(
            lambda token: canvas.holding(token).score(model),
            lambda token: canvas.holding(token).score(reference),
            canvas.free, steps, options,
        )  # fmt: skip
        for segment in segments:
            loss = segment.kl.sum()
            if segment.one_hot is not None:
                loss = loss + reward_of(segment.one_hot, 4).sum()
            loss.backward()
    gc.collect()
    return meter.peak


def test_memory_grows_with_the_relaxed_steps_and_not_with_all_steps() -> None:
    short, long = peak_bytes(8, 4), peak_bytes(64, 4)
    assert long == short
    assert peak_bytes(64, 8) > 1.5 * short


def test_checkpoints_hold_states_and_one_step() -> None:
    plain = [peak_bytes(32, k) for k in (8, 16)]
    kept = [peak_bytes(32, k, checkpoint=True) for k in (8, 16)]
    assert kept[1] - kept[0] < 0.35 * (plain[1] - plain[0])


def test_draws_do_not_depend_on_the_batch() -> None:
    model = TabularModel(2, 3, seed=1)
    together = rollout(model, None, 6, 6, relaxed_steps=3)[-1].one_hot
    alone = torch.cat([rollout(model, None, 1, 6, seed, relaxed_steps=3)[-1].one_hot for seed in range(6)])  # type: ignore[misc]
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("family", ["gpt2-full", "gpt2-full-shifted", "qwen3-full"])
def test_a_soft_one_hot_input_is_the_token_and_padding_is_not_seen(make_model, family: str) -> None:
    model = make_model(family)
    prompts = [[1, 2], [3, 4, 5], [6]]
    canvas = free_canvas(prompts, 5, [0, 1, 2], model)
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(0, 12, canvas.token.shape, generator=generator)
    hard = canvas.holding(token).score(model)
    soft = canvas.holding(torch.nn.functional.one_hot(token, 12).double()).score(model)
    torch.testing.assert_close(soft, hard)
    alone = torch.cat(
        [
            free_canvas([prompt], 5, [0], model).holding(token[i * 5 : i * 5 + 5]).score(model)
            for i, prompt in enumerate(prompts)
        ]
    )
    torch.testing.assert_close(hard, alone)


def test_what_cannot_be_relaxed_is_one_clear_line(make_model) -> None:
    with pytest.raises(ValueError, match=r"algorithm.relaxed_steps \(5\) must not exceed the 4 steps"):
        rollout(TabularModel(2, 2), None, 1, 4, relaxed_steps=5)
    with pytest.raises(ValueError, match="needs a model with full attention"):
        free_canvas([[1]], 4, [0], make_model("gpt2-block4"))
    with pytest.raises(ValueError, match="needs 70 positions, the model has 64"):
        free_canvas([[1] * 6], 64, [0], make_model("gpt2-full"))
    with pytest.raises(ValidationError):
        RelaxedOptions(relaxed_steps=0)


def test_a_masked_lm_takes_soft_inputs_with_its_frame_and_padding() -> None:
    from transformers import RobertaConfig, RobertaForMaskedLM

    from rl.models.masked_lm import MaskedLM

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=30, initializer_range=0.5, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip
    model = MaskedLM(RobertaForMaskedLM(config).double(), 11, begin_token_ids=[0], end_token_ids=[2])
    canvas = free_canvas([[4, 5], [6], [7, 8, 9]], 4, [0, 1, 2], model)
    token = torch.randint(3, 11, canvas.token.shape, generator=torch.Generator().manual_seed(0))
    hard = canvas.holding(token).score(model)
    soft = torch.nn.functional.one_hot(token, 12).double().requires_grad_(True)
    scored = canvas.holding(soft).score(model)
    torch.testing.assert_close(scored, hard)
    (gradient,) = torch.autograd.grad(scored[:, 4].sum(), soft)
    assert gradient.abs().max() > 1e-3
