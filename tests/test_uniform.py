"""Uniform noise: transitions against D3PM's matrices, the law of rollouts and its gradient by dynamic programming."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from rl.batch import DecisionBatch
from rl.config import load_config
from rl.estimators.trace_rows import trace_rows
from rl.estimators.uniform_rows import random_noise_rows, rate_divergence
from rl.evaluation.likelihood import log_likelihoods
from rl.losses.aggregate import weighted_sum
from rl.recipes.tracerl import TraceRL
from rl.train.plan import check_run
from rollouts.engines.in_process import Request
from rollouts.engines.tokens import token_engine
from rollouts.engines.uniform import UniformEngine
from rollouts.samplers import noise
from rollouts.samplers.distribution import draw
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.uniform import noise_tokens, random_tokens, transition_logprobs
from rollouts.trajectory import TokenTrajectory, load_trajectories, save_trajectories

PROMPT = [1, 0, 1]


@pytest.fixture
def make_uniform(make_model: Any) -> Any:
    def make(family: str = "gpt2-full", **settings: Any) -> Any:
        model = make_model(family, **settings)
        model.config.noise = "uniform"
        return model

    return make


def noise_matrix(kept: float, size: int) -> torch.Tensor:
    """float64 [n, n]: q(row -> column) of noise that keeps a token with probability `kept`."""
    return kept * torch.eye(size, dtype=torch.float64) + (1 - kept) / size


def d3pm(leave_one_out: torch.Tensor, token: int, a: float, b: float) -> torch.Tensor:
    """[n]: sum over clean tokens of (denoising prediction) x (posterior of Bayes' rule), all from matrices."""
    size = len(leave_one_out)
    q_a, q_b, q_ab = noise_matrix(a, size), noise_matrix(b, size), noise_matrix(a / b, size)
    denoiser = leave_one_out * q_a[:, token]
    denoiser = denoiser / denoiser.sum()
    return sum(denoiser[c] * q_b[c] * q_ab[:, token] / q_a[c, token] for c in range(size))  # type: ignore[return-value]


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.25), (0.25, 0.5), (0.1, 0.9), (0.75, 1.0), (0.0, 1.0)])
def test_a_transition_is_d3pms(a: float, b: float) -> None:
    logits = 2 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 4] = -1e9  # may not be predicted, and noise does not draw it
    token, reach = torch.tensor([0, 1, 2, 3, 5, 0]), [0, 1, 2, 3, 5]
    levels = (torch.full((6,), x, dtype=torch.float64) for x in (a, b))
    law = transition_logprobs(logits, token, *levels).exp()
    assert law[:, 4].max() < 1e-12
    for row in range(6):
        clean = logits[row, reach].softmax(-1)
        torch.testing.assert_close(law[row, reach], d3pm(clean, reach.index(int(token[row])), a, b))


def test_the_example_of_the_page() -> None:
    """weights 3/4 * 1/16, 1/12 * 1/16, 1/12 * 13/16, 1/12 * 1/16, over 1/8."""
    logits, level = torch.tensor([[0.0, 0, 50, 0]], dtype=torch.float64), torch.ones(1)
    law = transition_logprobs(logits, torch.tensor([0]), level / 2, 0.75 * level).exp()
    torch.testing.assert_close(law, torch.tensor([[3 / 8, 1 / 24, 13 / 24, 1 / 24]], dtype=torch.float64))


def test_temperature_and_filters_act_on_the_clean_prediction() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64).repeat(3, 1)
    token, half, one = torch.tensor([0, 2, 3]), torch.full((3,), 0.5), torch.ones(3)
    for settings, clean in (
        ({"temperature": 0.5}, (2 * logits[0]).softmax(-1)),
        ({"temperature": 0.0}, torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)),
        ({"top_k": 2}, torch.tensor([*logits[0, :2].softmax(-1).tolist(), 0, 0], dtype=torch.float64)),
    ):
        for after in (0.75 * one, one):
            law = transition_logprobs(logits, token, half, after, **settings).exp()
            for row in range(3):
                torch.testing.assert_close(law[row], d3pm(clean, int(token[row]), 0.5, float(after[0])))
    # A token that later weights filter out is scored with a finite ratio at the level without noise.
    kept = transition_logprobs(logits, token, half, one, top_k=2, target=torch.tensor([0, 1, 3]))
    assert kept[2, 3] > -10 > kept[0, 3]


# --- the law of a rollout --------------------------------------------------------------------------------------------


def redraws(conditional: torch.Tensor, states: Any, count: int) -> torch.Tensor:
    """[S, S]: a random set of `count` positions gets tokens from their laws [S, position, token], each on its own."""
    kernel = torch.zeros(len(states), len(states), dtype=torch.float64)
    chosen = list(itertools.combinations(range(conditional.shape[1]), count))
    for (i, state), (j, other), places in itertools.product(enumerate(states), enumerate(states), chosen):
        if all(place in places or state[place] == other[place] for place in range(len(state))):
            reached = torch.stack([conditional[i, place, other[place]] for place in places]).prod()
            kernel[i, j] = kernel[i, j] + reached / len(chosen)
    return kernel


def euler(leave_one_out: torch.Tensor, token: int, step: int, num_steps: int) -> torch.Tensor:
    """[n]: sum over clean tokens of (denoising prediction) x (jump at rate 1 / (1 - t), the last surely)."""
    denoiser = d3pm(leave_one_out, token, step / num_steps, 1.0)
    stay = 0.0 if step == num_steps - 1 else math.exp(-(1 / num_steps) / (1 - step / num_steps))
    law = [sum(denoiser[c] * ((1 - stay) * (y == c) + stay * (y == token)) for c in range(len(denoiser)) if c != token)
           + denoiser[token] * (y == token) for y in range(len(denoiser))]  # fmt: skip
    return torch.stack(law)


def exact_law(
    model: Any, num_steps: int, num_free: int, corrector: int = 0, transition: str = "posterior", last: bool = True
) -> torch.Tensor:
    """[3 ** num_free]: the law of the final answer over three tokens, by dynamic programming with D3PM's matrices.

    Args:
        last: whether the last step has a gradient.
    """
    states = list(itertools.product(range(3), repeat=num_free))
    law = torch.full((len(states),), 1.0 / len(states), dtype=torch.float64)
    canvas = torch.tensor([[*PROMPT, *state] for state in states])
    clean = model(canvas)[:, len(PROMPT) - model.logit_shift :][:, :num_free, :3].softmax(-1)
    for step in range(num_steps):
        level = step / num_steps, (step + 1) / num_steps
        rows = []
        for index, state in enumerate(states):
            joint = torch.ones(1, dtype=torch.float64)
            for place, token in enumerate(state):
                own = clean[index, place]
                drawn = euler(own, token, step, num_steps) if transition == "euler" else d3pm(own, token, *level)
                joint = (joint[:, None] * drawn).flatten()
            rows.append(joint)
        kernel = torch.stack(rows)
        law = law @ (kernel if last or step < num_steps - 1 else kernel.detach())
        if corrector and step < num_steps - 1:
            law = law @ redraws(level[1] * clean + (1 - level[1]) / 3, states, corrector)
    return law


@pytest.mark.parametrize(
    ("family", "more"),
    [("gpt2-full", {}), ("gpt2-full-shifted", {}), ("gpt2-full", {"corrector": 2, "transition": "euler"})],
)
def test_the_engine_samples_the_exact_law(make_uniform: Any, family: str, more: dict[str, Any]) -> None:
    model = make_uniform(family, vocab_size=4, **({"seed": 8, "scale": 1.0} if more else {"seed": 3}))
    law, count = exact_law(model, 3, 2, **more).detach().numpy(), 3000
    if more:
        # The law without them would not pass: the bound below is 28.
        assert (count * (law - exact_law(model, 3, 2).detach().numpy()) ** 2 / law).sum() > 40
    options = SamplerOptions(gen_length=2, num_inference_steps=3, **more)
    engine = UniformEngine(model, options, max_batch_size=count)
    answers = [t.response_ids() for t in engine.generate([Request(PROMPT, seed) for seed in range(count)])]
    observed = np.bincount([3 * a + b for a, b in answers], minlength=9)
    expected = count * law
    assert expected.max() > 2 * expected.min()
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 8 + 5 * np.sqrt(2 * 8)


def every_rollout(num_steps: int, num_free: int, corrector: int = 0, **sampler: Any) -> list[TokenTrajectory]:
    """All rollouts; a corrector redraws one position, each as likely as the others."""
    sampler |= {"corrector": corrector} if corrector else {}
    places = tuple(range(len(PROMPT), len(PROMPT) + num_free))
    whole = [(places, state) for state in itertools.product(range(3), repeat=num_free)]
    redrawn = [((place,), (token,)) for place in places for token in range(3)]
    forwards = [whole] + ([redrawn, whole] if corrector else [whole]) * (num_steps - 1)
    rollouts = []
    for path in itertools.product(whole, *forwards):
        sizes = [len(edited) for edited, _ in path]
        size = sum(sizes)
        trajectory = TokenTrajectory(
            prompt_ids=np.array(PROMPT), length=len(PROMPT) + num_free, mask_token_id=3, num_steps=len(forwards),
            step=np.repeat(np.arange(-1, len(forwards)), sizes), position=np.concatenate([at for at, _ in path]),
            token=np.concatenate([to for _, to in path]), logprob=np.zeros(size), confidence=np.zeros(size),
            stop_length=num_free, sampler={"temperature": 1.0, "noise": "uniform", **sampler},
        )  # fmt: skip
        trajectory.validate()
        rollouts.append(trajectory)
    return rollouts


@pytest.mark.parametrize("more", [{}, {"corrector": 1}, {"transition": "euler"}])
def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(make_uniform: Any, more: dict[str, Any]) -> None:
    """All 729 rollouts of two steps and two tokens (4374 with a corrector), with the real estimator and loss."""
    model = make_uniform(vocab_size=4, seed=3, scale=1.0)
    reward = torch.from_numpy(np.random.default_rng(7).normal(size=9))
    law = exact_law(model, 2, 2, **more)
    exact = gradient((law * reward).sum(), model)
    rollouts = every_rollout(2, 2, **more)
    recipe = TraceRL(old_logprob="on_policy")
    rows = recipe.rows(rollouts, model).distinct()
    assert rows.num_rows == 9
    scores = rows.score(model)
    per_rollout = torch.zeros(len(rollouts), dtype=torch.float64).index_add(0, rows.trajectory, scores.logprob)
    # The first canvas is noise, and so is which of two positions is redrawn.
    probability = (per_rollout.exp() / (18 if "corrector" in more else 9)).detach()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-10)
    final = torch.tensor([3 * t.response_ids()[0] + t.response_ids()[1] for t in rollouts])
    torch.testing.assert_close(torch.zeros(9).double().index_add(0, final, probability), law.detach())
    for baseline in (0.0, 3.7):
        advantage = (reward[final] - baseline)[rows.trajectory]
        weight = probability[rows.trajectory]
        batch = DecisionBatch(scores.logprob, scores.entropy, scores.logprob.detach(), None, advantage, weight)
        ours = -gradient(weighted_sum(recipe.loss(batch).loss, weight), model)
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-10)
    assert exact.norm() > 1e-2


def gradient(value: torch.Tensor, model: Any) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])


def test_a_rollout_depends_on_its_seed_alone(make_uniform: Any, tmp_path: Any) -> None:
    model = make_uniform()
    options = SamplerOptions(gen_length=5, num_inference_steps=4)
    requests = [Request([1, 2][: 1 + i % 2], i, steps) for i, steps in enumerate([None, 2, 8, 4, 1])]
    together = token_engine(model, options, eos_token_id=0).generate(requests)
    alone = [token_engine(model, options, eos_token_id=0, max_batch_size=1).generate([r])[0] for r in requests]
    save_trajectories(tmp_path / "t.npz", together)
    for one, other, loaded in zip(together, alone, load_trajectories(tmp_path / "t.npz"), strict=True):
        assert one.num_steps == len(one.step) // 5 - 1
        assert one.is_reveal.sum() == 5 * one.num_steps
        for name in ("step", "position", "token"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            np.testing.assert_array_equal(getattr(one, name), getattr(loaded, name))
        np.testing.assert_allclose(one.logprob, other.logprob, rtol=0, atol=1e-12)
    # The first canvas is noise of its own for every request, and holds no mask.
    first = {tuple(t.canvas_at(0)[t.prompt_length :]) for t in together}
    assert len(first) == 5 and model.mask_token_id not in set().union(*first)


def test_a_corrector_keeps_the_law_of_a_level() -> None:
    """A law of two dependent tokens, noised to level 0.4, and the right prediction of each given the other one."""
    states = list(itertools.product(range(3), repeat=2))
    joint = torch.rand(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) ** 3
    joint, level = joint / joint.sum(), torch.full((18,), 0.4, dtype=torch.float64)
    noised = noise_matrix(0.4, 3).T @ joint @ noise_matrix(0.4, 3)
    # What the noisy token at the other place says about the clean one here.
    first, second = (joint @ noise_matrix(0.4, 3)).T, noise_matrix(0.4, 3).T @ joint
    clean = torch.stack([torch.stack([first[b], second[a]]) for a, b in states])
    clean = clean / clean.sum(-1, keepdim=True)
    token = torch.tensor(states).flatten()
    law = transition_logprobs(clean.log().view(18, 3), token, 0 * level, level).exp().view(9, 2, 3)
    kernel = redraws(law, states, 1)
    torch.testing.assert_close(kernel.sum(-1), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(noised.flatten() @ kernel, noised.flatten(), rtol=0, atol=1e-14)
    # Both at once are drawn as if they were independent: then the law is no longer kept.
    assert (noised.flatten() @ redraws(law, states, 2) - noised.flatten()).abs().max() > 1e-2
    # A step without a corrector, to the same level, keeps nothing.
    again = transition_logprobs(clean.log().view(18, 3), token, 0.5 * level, level).exp().view(9, 2, 3)
    assert (noised.flatten() @ redraws(again, states, 1) - noised.flatten()).abs().max() > 1e-3


def test_which_positions_a_corrector_redraws(make_uniform: Any) -> None:
    model, count = make_uniform(), 600
    options = SamplerOptions(gen_length=4, num_inference_steps=3, corrector=2)
    engine = UniformEngine(model, options, max_batch_size=250)
    trajectories = engine.generate([Request([1, 2][: 1 + i % 2], i, 1 + i % 3) for i in range(count)])
    redrawn = np.zeros(4)
    for i, trajectory in enumerate(trajectories):
        assert trajectory.num_steps == 2 * (1 + i % 3) - 1
        for step in range(trajectory.num_steps):
            places = trajectory.position[trajectory.step == step] - trajectory.prompt_length
            assert len(set(places.tolist())) == len(places) == (2 if step % 2 else 4)
            redrawn[places] += step % 2
    # 200 rollouts have one corrector and 200 two; each position is redrawn by half of them.
    assert redrawn.sum() == 2 * 600 and abs(redrawn - 300).max() < 5 * np.sqrt(150)
    alone = UniformEngine(model, options, max_batch_size=1).generate([Request([1, 2], 5, 3)])[0]
    np.testing.assert_array_equal(alone.token, trajectories[5].token)


# --- the entropy bound -----------------------------------------------------------------------------------------------


def test_the_entropy_bound_is_diffusion_gemmas(make_uniform: Any) -> None:
    """Every canvas equals what transformers' own sampler makes of the same logits, draws and noise."""
    gemma = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")
    model, size, steps, temperature = make_uniform(scale=1.0), 8, 5, 0.7
    theirs = gemma.EntropyBoundSampler(gemma.EntropyBoundSamplerConfig(entropy_bound=2.5), size, 12, steps)
    options = SamplerOptions(
        gen_length=size, num_inference_steps=steps, temperature=temperature, preset="entropy_bound", entropy_bound=2.5,
        score_from="sampling",
    )  # fmt: skip
    accepted = []
    for seed in range(4):
        (trajectory,) = token_engine(model, options).generate([Request([1, 2, 3], seed)])
        place = torch.arange(3, 3 + size)
        for step in range(steps - 1):
            canvas = torch.from_numpy(trajectory.canvas_at(step))[None]
            with torch.no_grad():
                logits = model(canvas)[:, 3:] / temperature
            at = (torch.full_like(place, x) for x in (seed, step))
            drawn = draw(logits[0].log_softmax(-1), noise.uniform(*at, place, noise.TOKEN_STREAM))
            fresh = random_tokens(model, *(torch.full_like(place, x) for x in (seed, step + 1)), place)
            theirs.initialize_canvas = lambda *_, fresh=fresh: fresh[None]
            after = theirs.renoise_canvas(theirs.accept_canvas(canvas[:, 3:], drawn[None], logits, step), step)
            assert after[0].tolist() == trajectory.canvas_at(step + 1)[3:].tolist()
            accepted.append(int(theirs.accepted_token_mask.sum()))
        assert trajectory.is_reveal[trajectory.step == steps - 1].all()
    assert 1 < max(accepted) < size and len(set(accepted)) > 1


def test_the_law_and_the_gradient_under_an_entropy_bound(make_uniform: Any, tmp_path: Any) -> None:
    """Two tokens and two steps. The accepted are drawn from f, the others are noise, all are drawn in the last step."""
    model, reward = (
        make_uniform(vocab_size=4, seed=5, scale=1.0),
        torch.from_numpy(np.random.default_rng(7).normal(size=9)),
    )
    options = SamplerOptions(gen_length=2, num_inference_steps=2, preset="entropy_bound", entropy_bound=0.5)
    states = list(itertools.product(range(3), repeat=2))
    log_f = model(torch.tensor([[*PROMPT, *state] for state in states]))[:, 3:, :3].log_softmax(-1)
    entropy = -(log_f.exp() * log_f).sum(-1)
    # With two positions the other one is taken too where the lower entropy is within the bound.
    taken = (entropy == entropy.amin(-1, keepdim=True)) | (entropy.amin(-1, keepdim=True) <= 0.5)
    assert not taken.all() and taken.all(-1).any()
    first = torch.where(taken[..., None], log_f.exp(), torch.full_like(log_f, 1 / 3))
    middle = (first[:, 0, :, None] * first[:, 1, None, :]).flatten(1).mean(0)
    law = middle @ (log_f[:, 0, :, None] + log_f[:, 1, None, :]).exp().flatten(1)
    exact = gradient((law * reward).sum(), model)
    count = 4000
    trajectories = UniformEngine(model, options, max_batch_size=count).generate(
        [Request(PROMPT, i) for i in range(count)]
    )
    final = torch.tensor([3 * a + b for a, b in (t.response_ids() for t in trajectories)])
    expected = count * law.detach().numpy()
    assert ((np.bincount(final, minlength=9) - expected) ** 2 / expected).sum() < 8 + 5 * np.sqrt(2 * 8)
    # The rollouts are drawn, and the exact gradient lies where their estimate says it does.
    rows = trace_rows(trajectories, model).distinct()
    scores = rows.score(model)
    recorded = np.concatenate([t.logprob[t.is_reveal] for t in trajectories])
    torch.testing.assert_close(scores.logprob.detach(), torch.from_numpy(recorded), rtol=0, atol=1e-9)
    advantage = (reward[final] - (law.detach() * reward).sum())[rows.trajectory]
    direction = exact / exact.norm()
    ours = torch.dot(gradient((scores.logprob * advantage).sum() / count, model), direction)
    assert float(ours) == pytest.approx(float(exact.norm()), rel=0.15)
    save_trajectories(tmp_path / "t.npz", trajectories[:3])
    for one, loaded in zip(trajectories, load_trajectories(tmp_path / "t.npz"), strict=False):
        np.testing.assert_array_equal(one.is_reveal, loaded.is_reveal)


# --- supervised ------------------------------------------------------------------------------------------------------


def test_the_bound_is_the_limit_of_d3pms(make_uniform: Any) -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[:, 4] = -1e9
    clean, token = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([0, 1, 1, 2, 0, 2, 3, 0])
    before = torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    known = torch.where(logits > -1e8, -1e3, -1e9).double().scatter(-1, clean[:, None], 0.0)
    short = 1e-5
    truth, model = (transition_logprobs(x, token, before, before + short) for x in (known, logits))
    divergence = (truth.exp() * (truth - model)).sum(-1) / short
    torch.testing.assert_close(rate_divergence(logits, token, clean, before), divergence, rtol=2e-3, atol=1e-5)


def test_the_bound_is_tight_where_the_prediction_is_right() -> None:
    """One token: the leave-one-out prediction is its law, the reverse process exact, and the bound its entropy."""
    law = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    levels = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    total = torch.zeros(())
    for clean, token in itertools.product(range(3), repeat=2):
        noised = levels * (clean == token) + (1 - levels) / 3
        at = (torch.full((2000,), x) for x in (token, clean))
        total = total + law[clean] * (noised * rate_divergence(law.log().expand(2000, 3), *at, levels)).mean()
    assert float(total) == pytest.approx(float(torch.special.entr(law).sum()), abs=1e-3)


def test_noised_answers(make_uniform: Any) -> None:
    model, count = make_uniform(vocab_size=6), 400
    sequences = [np.array([5, 4, 0, 1, 2, 3]) for _ in range(count)]
    rows, weight = random_noise_rows(
        sequences, [2] * count, noise_tokens(model).numpy(), np.random.default_rng(0), bound=False
    )
    assert noise_tokens(model).tolist() == [0, 1, 2, 3, 4]
    assert (weight == 1).all() and len(weight) == 4 * count
    assert (rows.input_ids[:, :2] == torch.tensor([5, 4])).all() and (rows.input_ids[:, 2:] < 5).all()
    # Levels are stratified, so their mean is 1/2; a token is kept with probability a + (1 - a) / 5.
    kept = (rows.input_ids[rows.row, rows.column] == rows.target).double()
    assert float(rows.before.mean()) == pytest.approx(0.5, abs=1e-3)
    assert float((kept - rows.before - (1 - rows.before) / 5).mean()) == pytest.approx(0.0, abs=0.03)
    # Without the bound the loss is the cross-entropy of the denoising prediction, by Bayes' rule.
    with torch.no_grad():
        scores, logits = rows.score(model), model(rows.input_ids)[rows.row, rows.column, :5].softmax(-1)
    assert scores.kl is None
    for i in (0, 7, 501):
        token, level = int(rows.input_ids[rows.row[i], rows.column[i]]), float(rows.before[i])
        posterior = logits[i] * noise_matrix(level, 5)[:, token]
        assert float(scores.logprob[i].exp()) == pytest.approx(float(posterior[rows.target[i]] / posterior.sum()))
    part, _ = random_noise_rows(
        sequences, [2] * count, noise_tokens(model).numpy(), np.random.default_rng(0), part=slice(10, 20)
    )
    assert torch.equal(part.input_ids, rows.input_ids[10:20]) and part.score(model).kl is not None


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm={name: espo}", r"'espo' scores masks, .* choose one of tracerl, cj_grpo"),
        ("sampler.preset=llada_random", r"sampler\.preset is for absorbing noise"),
        ("sampler.block_length=4", r"sampler\.block_length is for absorbing noise"),
        ("eval.sampler={selector: threshold}", r"sampler\.selector is for absorbing noise"),
        ("eval.backslide=true", r"eval\.backslide needs masks that are revealed"),
        ("rollout.cache=dual", r"rollout\.cache needs masks that are revealed"),
        ("model.attention=block_causal model.block_length=4", r"model\.attention needs masks that are revealed"),
        ("algorithm.shrink=2 algorithm.old_logprob=recompute", r"algorithm\.shrink needs masks that are revealed"),
        ("sampler.corrector=17", r"sampler\.corrector is 17, above sampler\.gen_length 16"),
        ("sampler.corrector=1 sampler.preset=entropy_bound", r"sampler\.corrector is for ancestral steps"),
        ("sampler.transition=euler sampler.preset=entropy_bound", r"sampler\.transition is for ancestral steps"),
        ("sampler.transition=euler model.noise=absorbing", r"sampler\.transition euler is for uniform noise"),
        ("sampler.corrector=1 model.noise=absorbing", r"sampler\.corrector 1 is for uniform noise"),
    ],
)  # fmt: skip
def test_what_needs_masks_is_refused(override: str, message: str, tmp_path: Any) -> None:
    always = [f"run.output_dir={tmp_path}", "eval.num_inference_steps=[4]"]
    overrides = [*always, *(override.split() if ": " not in override else [override])]
    with pytest.raises(ValueError, match=message):
        check_run(load_config("configs/sudoku_uniform.yaml", overrides))


def test_likelihoods_and_selectors_are_refused(make_uniform: Any) -> None:
    model = make_uniform()
    with pytest.raises(ValueError, match="likelihoods are of models with masks"):
        log_likelihoods(model, [([1], [2])])
    with pytest.raises(ValueError, match=r"sampler\.selector is for absorbing noise"):
        UniformEngine(model, SamplerOptions(selector="left_most"))
