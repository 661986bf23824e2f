"""Actions: what is sampled in an environment, how DPPO scores it, and what an environment may do wrong."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rl.advantages import minus_regression, returns_to_go
from rl.cli import main
from rl.config import load_config
from rl.estimators.base import Verdicts
from rl.modalities.actions import ActionRows, Actions, Episode, action_rows
from rl.modalities.actions_plan import ActionOptions
from rl.models.action_policy import ActionModel, signal
from rl.recipes.dppo import DPPO
from rl.tasks.control import ControlTask, Space, episode_return
from rl.train.plan import check_run
from rollouts.engines.base import SampleRequest
from tests.runs import ROOT, lines

gymnasium = pytest.importorskip("gymnasium")
CONFIG = str(ROOT / "configs" / "pendulum_dppo.yaml")


class Short(gymnasium.Env):
    """Rewards 1 for each action 2; ends after 5 actions. What is seen is the time, and that action 1 breaks it."""

    observation_space = gymnasium.spaces.Box(0, 5, (2,))
    action_space = gymnasium.spaces.Discrete(2, start=1)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        if seed == 13:
            raise OSError("no such seed")
        self.time, self.fragile = 0, seed == 7
        return np.array([0, self.fragile], np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.fragile and action == 1:
            raise RuntimeError("gripper jammed")
        self.time += 1
        return np.array([self.time, self.fragile], np.float32), float(action == 2), self.time == 5, False, {}


BOX = gymnasium.spaces.Box(np.float32([-2, 0]), np.float32([2, 1]))
gymnasium.register("Short-v0", entry_point=Short)
SHORT = {"env": "tests.test_actions:Short-v0", "expert": "tests.test_actions:fair_expert", "demonstrations": 3}


def fair_expert(observation: np.ndarray) -> int:
    return 1 + int(observation[0]) % 2


def modality(task: ControlTask, together: int = 256, **options: Any) -> Actions:
    rollout = SimpleNamespace(max_batch_size=together)
    config: Any = SimpleNamespace(sampler=ActionOptions(**options), rollout=rollout)
    return Actions(config, task)


def sampled(task: ControlTask, seeds: Any = range(6), **options: Any) -> tuple[Actions, ActionModel, list[Episode]]:
    actions = modality(task, **options)
    torch.manual_seed(0)
    model = actions.new_model()
    engine = actions.engine(model, actions.options(), torch.device("cpu"))
    return actions, model, engine.generate([SampleRequest(str(seed), 100 + seed) for seed in seeds])


def test_a_denoising_step_is_the_posterior_of_the_noise() -> None:
    """q(x_{t-1} | x_t, x_0) by Bayes' rule on Gaussians: precisions add, means are weighted by them."""
    torch.manual_seed(0)
    model = ActionModel(2, 1, np.ones(3))
    chunk, seen, steps = torch.randn(1, 2, 1), torch.randn(1, 3), 4
    for t in range(1, steps + 1):
        clean = model.clean(chunk, torch.tensor([t / steps]), seen)
        now, before = signal(torch.tensor(t / steps)), signal(torch.tensor((t - 1) / steps))
        # x_t = sqrt(kept) x_{t-1} + noise of variance 1 - kept, and x_{t-1} = sqrt(before) x_0 + noise of 1 - before.
        kept = now / before
        likelihood, prior = kept / (1 - kept), 1 / (1 - before)
        step = model.denoise(chunk, torch.tensor([t]), seen, steps, min_std=1e-6)
        if t == 1:
            torch.testing.assert_close(step.mean, clean, rtol=0, atol=1e-6)
            assert float(step.std) == pytest.approx(1e-6)
            continue
        mean = (likelihood * chunk.double() / kept.sqrt() + prior * before.sqrt() * clean) / (likelihood + prior)
        torch.testing.assert_close(step.mean, mean)
        torch.testing.assert_close(step.std.squeeze(), (1 / (likelihood + prior)).sqrt())
    assert model.denoise(chunk, torch.tensor([2]), seen, steps, min_std=0.9).std.item() == 0.9


def test_choices_keep_the_clean_chunk_among_one_hot_vectors() -> None:
    torch.manual_seed(0)
    model = ActionModel(2, 6, np.ones(3), choices=3)
    chunk, level, seen = torch.randn(4, 2, 6), torch.full((4,), 0.5), torch.randn(4, 3)
    clean = model.by_choice(model.clean(chunk, level, seen))
    assert clean.shape == (4, 2, 2, 3) and ((clean > -1) & (clean < 1)).all()
    torch.testing.assert_close(clean.sum(-1), torch.full((4, 2, 2), 2.0 - 3, dtype=torch.float64))
    target = torch.tensor([1.0, -1, -1, -1, -1, 1]).expand(4, 2, 6)
    probability = ((clean + 1) / 2)[..., [0, 1], [0, 2]]
    torch.testing.assert_close(model.fit(chunk, level, seen, target).double(), probability.log().mean((1, 2)))


def test_the_gradient_of_decisions_is_that_of_the_expected_reward() -> None:
    """T = 2, one action a of reward -(a - 0.4)^2: integrals over the three noises by Gauss and Hermite.

    The gradient of the expected reward by paths through the noise, and as DPPO's rows give it, by scores.
    """
    torch.manual_seed(0)
    model = ActionModel(1, 1, np.ones(2), width=6).double()
    seen = torch.tensor([[0.3, -0.8]])
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    z = torch.tensor(list(itertools.product(nodes, repeat=3)))
    weight = torch.tensor([np.prod(w) for w in itertools.product(weights / weights.sum(), repeat=3)])
    # The network reads float32 inputs elsewhere; here all is float64, or rounding would be the error of the integral.
    model.forward = lambda chunk, level, seen: model.layers(  # type: ignore[method-assign]
        torch.cat([seen.double(), chunk.flatten(1).double(), level[:, None].double()], 1)
    ).unflatten(1, model.shape)
    given, states = seen.expand(len(z), 2), [z[:, :1, None]]
    for index, t in enumerate((2, 1)):
        step = model.denoise(states[-1], torch.full((len(z),), t), given, 2, min_std=0.3)
        states.append(step.mean + step.std * z[:, index + 1, None, None])
    reward = -(states[-1].squeeze() - 0.4).square()
    by_paths = torch.autograd.grad((weight * reward).sum(), list(model.parameters()))
    fixed = [state.detach() for state in states]
    rows = ActionRows(
        latent=torch.cat(fixed[:2]),
        drawn=torch.cat(fixed[1:]),
        timestep=torch.tensor([2, 1]).repeat_interleave(len(z)),
        conditioning={"observation": given.repeat(2, 1)},
        trajectory=torch.arange(len(z)).repeat(2),
        step=torch.tensor([0, 1]).repeat_interleave(len(z)),
        num_steps=2,
        min_std=0.3,
    )
    logprob = rows.score(model).logprob  # type: ignore[arg-type]
    by_scores = torch.autograd.grad(((weight * reward.detach()).repeat(2) * logprob).sum(), list(model.parameters()))
    for one, other in zip(by_paths, by_scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert max(float(g.abs().max()) for g in by_paths) > 0.01


@pytest.mark.parametrize("bins", [0, 5])
def test_an_episode_is_what_the_environment_does_with_the_recorded_chunks(bins: int) -> None:
    task = ControlTask()
    options = {"num_inference_steps": 3, "chunk_length": 4, "max_actions": 10, "bins": bins}
    actions, _, episodes = sampled(task, seeds=(3,), **options)
    (episode,), space = episodes, task.space(bins)
    env = gymnasium.make("Pendulum-v1")
    seen, _ = env.reset(seed=3)
    assert episode.chunks.shape == (3, 4, 4, max(bins, 1)) and episode.actions == 10 and episode.num_steps == 9
    for chunk, given, count in zip(range(3), episode.rewards, (4, 4, 2), strict=True):
        np.testing.assert_array_equal(episode.observations[chunk], seen)
        total = 0.0
        for action in episode.chunks[chunk, -1][:count]:
            seen, reward, *_ = env.step(space.to_env(action))
            total += float(reward)
        assert given == pytest.approx(total)
    assert actions.completions(episodes) == [{"return": pytest.approx(episode.rewards.sum()), "actions": 10}]
    assert actions.horizon == 9 and actions.forwards(actions.config) == (9, False)


def test_an_episode_does_not_depend_on_what_shares_its_batch(tmp_path: Path) -> None:
    task = ControlTask(**SHORT)
    actions, model, together = sampled(task, chunk_length=2)
    alone = actions.engine(model, actions.options(), torch.device("cpu")).generate([SampleRequest("4", 104)])[0]
    # The rows of a batch share a product of matrices, whose last bit depends on its size.
    np.testing.assert_allclose(together[4].chunks, alone.chunks, rtol=0, atol=1e-5)
    few = modality(task, 4, chunk_length=2).engine(model, actions.options(), torch.device("cpu"))
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for one, other in zip(together, few.generate([SampleRequest(str(i), 100 + i) for i in range(6)]), strict=True):
        np.testing.assert_allclose(one.chunks, other.chunks, rtol=0, atol=1e-5)
    assert sizes[0] == max(sizes) == 4 and sizes[-1] == 2
    assert not np.allclose(together[3].chunks[0, 0], together[4].chunks[0, 0])
    assert not np.allclose(alone.chunks[0, 0], alone.chunks[1, 0]), "each chunk has its own noise"
    actions.save_trajectories(tmp_path / "kept.npz", together)
    kept = actions.load_trajectories(tmp_path / "kept.npz")
    assert np.array_equal(kept[2].chunks, together[2].chunks) and kept[2].rewards.sum() == together[2].rewards.sum()


def test_rows_are_the_steps_that_are_wanted() -> None:
    _, model, episodes = sampled(ControlTask(**SHORT), seeds=range(2), num_inference_steps=2, chunk_length=2)
    wanted = [np.arange(8) == 3, np.arange(8) >= 4]
    rows, every = action_rows(episodes, wanted), action_rows(episodes)
    assert rows.trajectory.tolist() == [0, 1, 1] and rows.step.tolist() == [3, 4, 5]
    assert rows.timestep.tolist() == [1, 2, 1]
    with torch.no_grad():
        torch.testing.assert_close(rows.score(model).logprob, every.score(model).logprob[[3, 10, 11]])
    assert [DPPO().num_decisions(e, w) for e, w in zip(episodes, wanted, strict=True)] == [1, 2]


def test_an_environment_that_raises_is_a_failed_sample() -> None:
    actions, model, episodes = sampled(ControlTask(**SHORT), seeds=(7, 13, 1), chunk_length=2)
    assert episodes[0].error == "RuntimeError: gripper jammed" and episodes[1].error == "OSError: no such seed"
    assert episodes[1].num_steps == 0 and episodes[2].error == ""
    completions = actions.completions(episodes)
    assert completions[:2] == [None, None] and completions[2] is not None
    returns = episode_return(completions)
    assert np.isnan(returns[:2]).all() and returns[2] == episodes[2].rewards.sum()
    # Those that are left are scored as ever, and an environment that raised is not played in again.
    assert len(action_rows(episodes).score(model).logprob) == episodes[0].num_steps + episodes[2].num_steps
    summaries = [DPPO().summary(episode) for episode in episodes]
    verdicts = Verdicts(torch.tensor(returns, dtype=torch.float64), torch.arange(3), summaries=summaries)
    advantage = DPPO(scale="none").advantage(verdicts)
    assert advantage[:2].isnan().all() and not advantage[2].isnan().any()
    nothing = Verdicts(verdicts.reward[:2], torch.arange(2), summaries=summaries[:2])
    assert DPPO().advantage(nothing).isnan().all()
    assert len(actions.task._free) == 1


def test_failed_samples_are_counted_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command: cloning, RL on the log-probs of the sampler, evaluation, a saved policy."""
    monkeypatch.setattr("rl.tasks.control._TRAIN", 0)
    small = ["sft.steps=3", "sft.batch_size=4", "train.steps=2", "train.prompts_per_step=14", "train.group_size=2"]
    small += [
        "train.updates_per_step=1",
        "eval.num_prompts=3",
        "sampler.num_inference_steps=2",
        "eval.num_inference_steps=[2]",
    ]
    small += [f"task.params={json.dumps(SHORT)}", "reward.max_failure_share=0.5", f"run.output_dir={tmp_path / 'run'}"]
    assert main(["train", "--config", CONFIG, *small]) == 0
    found = lines(tmp_path / "run", "train")
    # Seed 13 is in the first step, and breaks at once; seed 7 breaks where the policy does action 1.
    assert 2 <= found[0]["reward/episode_return/failures"] <= 4 and found[1]["reward/failed"] == 0
    assert all(line["policy/logprob_gap_max"] < 1e-6 and line["policy/decisions"] for line in found)
    assert 0 < found[0]["reward/mean"] < 5
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["completion"].keys() == {"return", "actions"}


def test_cloning_is_of_the_expert_and_does_not_depend_on_the_cut() -> None:
    task = ControlTask(**SHORT)
    actions, model, _ = sampled(task, seeds=(), chunk_length=3)
    rows: list[Any] = [{"prompt": str(i)} for i in range(8)]
    whole, weight = actions.supervised(model, rows, slice(0, 8), [0, 1])
    part, _ = actions.supervised(model, rows, slice(3, 5), [0, 1])
    assert torch.equal(whole.latent[3:5], part.latent) and torch.equal(whole.target[3:5], part.target)
    assert weight.sum() == pytest.approx(1)
    # The expert does 1, 2, 1, 2, 1, and a chunk starts anywhere.
    times = whole.conditioning["observation"][:, 0].long()
    assert set(times.tolist()) == {0, 1, 2}
    assert torch.equal(whole.target.argmax(-1), (times[:, None] + torch.arange(3)) % 2)
    share = signal(whole.timestep)[:, None, None]
    noise = (whole.latent - share.sqrt() * whole.target) / (1 - share).sqrt()
    assert noise.std() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(
    ("space", "bins", "action", "entries"),
    [
        (BOX, 0, [1.0, 0.25], [0.5, -0.5]),
        (BOX, 3, [2.0, 0.5], [-1, -1, 1, -1, 1, -1]),
        (gymnasium.spaces.Discrete(3, start=5), 0, 6, [-1, 1, -1]),
    ],
)
def test_actions_go_into_the_models_units_and_back(space: Any, bins: int, action: Any, entries: list[float]) -> None:
    env = SimpleNamespace(action_space=space, observation_space=gymnasium.spaces.Box(-np.inf, np.float32([4, np.inf])))
    own = Space("Own-v0", env, bins)
    np.testing.assert_allclose(own.from_env(action), entries)
    np.testing.assert_allclose(own.to_env(np.array(entries)), action)
    assert own.size == len(entries) and own.scale.tolist() == [1, 1]
    if bins:
        np.testing.assert_allclose(own.to_env(own.from_env([1.2, 0.2])), [2.0, 0.0])
    elif own.box:
        np.testing.assert_allclose(own.to_env(np.array([9.0, -9])), [2, 0])


def test_the_advantage_by_hand() -> None:
    """Two chunks against one, discount 0.5; the reward is the return, but for a bonus of 8 of the first."""
    summaries = [([[0.0], [0.0]], [1.0, 2.0], 3), ([[0.0]], [4.0], 3)]
    verdicts = Verdicts(torch.tensor([11.0, 4.0]).double(), torch.tensor([0, 0]), summaries=summaries)
    assert returns_to_go(verdicts.reward, [own[1] for own in summaries], 0.5).tolist() == [[6, 10], [4, 0]]
    advantage = DPPO(gamma=0.5, baseline="mean", scale="none").advantage(verdicts)
    # Returns: 1 + 0.5 x (2 + 8) = 6 and 10, against 4 and the end: 0.
    expected = [[1, 1, 1, 5, 5, 5], [-1, -1, -1, np.nan, np.nan, np.nan]]
    np.testing.assert_allclose(advantage, expected)
    scaled = DPPO(gamma=0.5, baseline="mean").advantage(verdicts)
    np.testing.assert_allclose(scaled, np.array(expected) / (np.std([1, 5, -1]) + 1e-4))


def test_what_can_be_told_from_the_state_is_no_advantage() -> None:
    rng = np.random.default_rng(0)
    seen = [torch.from_numpy(rng.normal(size=(count, 2))) for count in (5, 3, 4, 6, 5, 3)]
    value = torch.cat([3 - 2 * own[:, 0] + own[:, 0] * own[:, 1] + torch.arange(len(own)) ** 2 for own in seen])
    assert minus_regression(value, seen).abs().max() < 1e-2
    # What is left of anything else is uncorrelated with what is seen, and 0 on average.
    left = minus_regression(value.square(), seen)
    assert left.norm() > 1 and left.sum().abs() < 1e-4 * left.norm()
    assert (torch.cat(seen).T @ left).abs().max() < 1e-4 * left.norm()
    rewards = [own[:, 0].tolist() for own in seen]
    summaries = [(own.tolist(), given, 2) for own, given in zip(seen, rewards, strict=True)]
    verdicts = Verdicts(torch.tensor([sum(given) for given in rewards]), torch.arange(6), summaries=summaries)
    # With discount 0 a return is the reward of the chunk, which is what is seen before it.
    advantage = DPPO(gamma=0.0, scale="none").advantage(verdicts)
    assert advantage[~advantage.isnan()].abs().max() < 1e-2 and advantage.isnan().sum() == 2 * (6 * 6 - 26)
    assert not DPPO().needs_group and DPPO(baseline="mean").needs_group


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.params.env=Pendulun-v1", "task.params.env Pendulun-v1: "),
        ("task.params.env=FrozenLake-v1", "task.params.env FrozenLake-v1: observations must be a Box of one dimension"),
        ("task.params.demonstrations=0", "task.params.demonstrations must be at least 1, got 0"),
        ("task.params.expert=weak", "task.params.expert 'weak' must have the form"),
        ("sampler.bins=1", "sampler.bins 1: at least 2, of a Box"),
        ("sampler.eta=1", "known keys: num_inference_steps, chunk_length"),
        ("algorithm={name: tracerl}", "algorithm.name 'tracerl' trains text, and task.name 'control' is about actions"),
        ("convert.steps=1", "convert.steps is for text"),
    ],
)
def test_bad_input_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_run(load_config(CONFIG, [override]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_spaces_that_do_not_fit_are_named() -> None:
    box = gymnasium.spaces.Box(-1, 1, (2,))
    unbounded = SimpleNamespace(action_space=gymnasium.spaces.Box(-np.inf, np.inf, (1,)), observation_space=box)
    with pytest.raises(ValueError, match="actions must be Discrete or a bounded 1-D Box"):
        Space("Own-v0", unbounded)
    discrete = SimpleNamespace(action_space=gymnasium.spaces.Discrete(2), observation_space=box)
    with pytest.raises(ValueError, match=r"sampler\.bins 4: at least 2, of a Box; set it to 0 for Own-v0"):
        Space("Own-v0", discrete, 4)


def test_a_model_of_other_actions_is_refused_by_name(tmp_path: Path) -> None:
    config = load_config(CONFIG, [f"model.path={tmp_path}"])
    pendulum = Actions(config, ControlTask())
    pendulum.save_model(pendulum.new_model(), tmp_path)
    with pytest.raises(ValueError, match=r"is no model of task control as it is set: size mismatch for scale") as error:
        Actions(config, ControlTask(**SHORT)).load_model()
    assert "\n" not in str(error.value)
    assert pendulum.load_model().shape == (4, 1)


def test_a_missing_gymnasium_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ValueError, match=r"needs gymnasium: pip install 'denoise-rl\[control\]'"):
        ControlTask()


def test_the_expert_is_imperfect() -> None:
    """Mean return of its demonstrations; a controller that pumps energy and then balances reaches -150."""
    task, returns = ControlTask(demonstrations=10), []
    for number in range(10):
        seen, done = task.demonstration(number)
        angle, speed = np.arctan2(seen[:, 1], seen[:, 0]), seen[:, 2]
        returns.append(-(angle**2 + 0.1 * speed**2 + 0.001 * np.concatenate(done) ** 2)[:100].sum())
    assert -520 < np.mean(returns) < -300
