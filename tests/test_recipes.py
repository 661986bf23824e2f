"""Every recipe: its file is short, its loss has the gradient of what it says, its masks are stable, it runs."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl.advantages import sandwich_advantage
from rl.batch import DecisionBatch
from rl.config import Config, load_config, save_config
from rl.estimators.base import Verdicts
from rl.losses.aggregate import decision_weights, weighted_sum
from rl.losses.regression import regression_loss
from rl.recipes.tracerl import TraceRL
from rl.registry import RECIPES, parse_recipe
from rl.train.plan import check_run
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import TokenTrajectory
from tests.runs import lines, tiny_config, train_here

ROOT = Path(__file__).resolve().parents[1]
MASKED = ["diffu_grpo", "coupled_grpo", "unigrpo", "wd1", "spg", "espo", "gdsd", "bgpo", "ebpo", "rspo", "vrpo"]
TRACED = ["tracerl", "d2_stepmerge", "cj_grpo", "justgrpo"]
STEPPED = ["mdpo", "egspo"]
ALL = [*MASKED, *TRACED, *STEPPED]


@pytest.mark.parametrize("name", list(RECIPES.known))
def test_a_recipe_file_has_at_most_80_lines(name: str) -> None:
    path = ROOT / (RECIPES.known[name].partition(":")[0].replace(".", "/") + ".py")
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    assert ("arXiv" in text and "Depart" in text) or name == "justgrpo"


MINE = """
from rl.recipes.tracerl import TraceRL

class Mine(TraceRL, defaults={"clip_low": 0.1, "old_logprob": "recompute"}):
    pass

class Wrong(TraceRL, defaults={"scale": "standard"}):
    pass
"""


def test_a_recipe_of_ones_own_changes_defaults_and_goes_to_other_processes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    name = f"{tmp_path}/mine.py:Mine"
    config = load_config(None, [f"algorithm.name={name}", "algorithm.shrink=2"])
    recipe = config.algorithm
    assert (recipe.name, recipe.clip_low, recipe.shrink, TraceRL().clip_low) == (name, 0.1, 2, 0.2)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert Config(algorithm={"name": type(recipe), "clip_high": 0.3}).algorithm.clip_high == 0.3
    assert Config(algorithm=recipe).algorithm is recipe and TraceRL().name == "tracerl"
    (tmp_path / "pickled").write_bytes(pickle.dumps(config))
    code = (
        "import pickle, sys; recipe = pickle.load(open(sys.argv[1], 'rb')).algorithm; "
        "print(type(recipe).__name__, recipe.shrink)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pickled")], capture_output=True, text=True, cwd=ROOT
    )
    assert shown.stdout.split() == ["Mine", "2"], shown.stderr
    with pytest.raises(ValueError, match=r"algorithm\.scale.*'none', 'std', 'reward_std' or 'batch_std'"):
        load_config(None, [f"algorithm.name={tmp_path}/mine.py:Wrong"])
    with pytest.raises(TypeError, match="recipe Worse gives a default to 'clip_lo', which is none of its options"):
        type("Worse", (TraceRL,), {"__module__": __name__}, defaults={"clip_lo": 0.1})


def rollouts(model: Any, name: str, count: int = 6) -> list[TokenTrajectory]:
    order = {"selector": "left_most", "num_inference_steps": 4} if name == "justgrpo" else {"num_inference_steps": 3}
    options = SamplerOptions(gen_length=4, record_x0=name in STEPPED, **order)
    engine = InProcessEngine(model, options)
    return engine.generate([Request([1, 2, 3], seed=10 * s + 1) for s in range(count)])


def fixed_batch(model: Any, name: str, iteration: int = 0, **options: Any) -> tuple:
    """recipe, rows, advantage and weight of every decision, for six rollouts of two prompts."""
    recipe = parse_recipe({"name": name, **options})
    trajectories = rollouts(model, name)
    reward = torch.tensor([1, 0, 0.2, 0, 0.7, 1], dtype=torch.float64)
    table = torch.rand(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    table[:, -1] = reward
    summaries = [recipe.summary(t) for t in trajectories]
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    advantage = recipe.advantage(Verdicts(reward, group, table if recipe.needs_step_rewards else None, summaries))
    steps = None if advantage.dim() == 1 else [row.numpy() for row in ~advantage.isnan()]
    rows = recipe.rows(trajectories, model, None, steps, iteration)
    length = torch.tensor([recipe.num_decisions(t, s) for t, s in zip(trajectories, steps or [None] * 6, strict=True)])
    weight = decision_weights(recipe.aggregation, length, float(length.sum()), 6, 4)[rows.trajectory]
    weight = weight if rows.weight_factor is None else weight * rows.weight_factor
    of_decision = advantage[rows.trajectory] if advantage.dim() == 1 else advantage[rows.trajectory, rows.step]
    return recipe, rows, of_decision, weight


def loss_of(model: Any, batch: tuple, old: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    recipe, rows, advantage, weight = batch
    logprob, entropy, *_ = rows.distinct().score(model)
    decisions = DecisionBatch(logprob, entropy, old, reference, advantage, weight, rows.trajectory, rows.step)
    decisions.check()
    return weighted_sum(recipe.loss(decisions).loss, weight)


# VRPO's pairs have a test of their own (test_preferences.py).
@pytest.mark.parametrize("name", [name for name in ALL if name != "vrpo"])
def test_the_gradient_of_a_recipes_loss_is_its_slope(make_model, name: str) -> None:
    """Central differences along random directions, in float64; the old policy is a little behind, so that ratios and
    clips are not 1, and the reference further."""
    model = make_model("gpt2-full", vocab_size=8)
    # Inside its narrow clamp GDSD has a gradient only where nothing has moved.
    batch = fixed_batch(model, name, **({"clip_low": 0.5, "clip_high": 0.5} if name == "gdsd" else {}))
    with torch.no_grad():
        at = batch[1].score(model).logprob
    noise = torch.Generator().manual_seed(3)
    old = at + 0.1 * torch.randn(len(at), generator=noise, dtype=torch.float64)
    if batch[0].old_logprob == "on_policy":
        old = at
    reference = at + 0.3 * torch.randn(len(at), generator=noise, dtype=torch.float64)
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss_of(model, batch, old, reference), parameters)
    size = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    assert size > 1e-4
    for _ in range(3):
        direction = [torch.randn(p.shape, generator=noise, dtype=torch.float64) for p in parameters]
        # Half along the gradient: a random direction alone hardly sees it.
        direction = [d / 100 + g / size for d, g in zip(direction, gradient, strict=True)]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * 1e-6)
                values.append(float(loss_of(model, batch, old, reference)))
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=sign * 1e-6)
        slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("name", MASKED)
def test_masks_are_the_trajectorys_own(make_model, name: str) -> None:
    """The same rows when asked again (old, new and reference policy), whatever else is in the micro-batch; others in
    the next pass."""
    model = make_model("gpt2-full", vocab_size=8)
    recipe, rows, _, weight = fixed_batch(model, name)
    again = fixed_batch(model, name)[1]
    with torch.no_grad():
        together = rows.score(model).logprob
        assert torch.equal(again.score(model).logprob, together)
        for index, trajectory in enumerate(rollouts(model, name)):
            alone = recipe.rows([trajectory], model, None, None, iteration=0)
            mine = rows.trajectory == index
            torch.testing.assert_close(alone.score(model).logprob, together[mine], rtol=0, atol=1e-12)
            if alone.weight_factor is not None:
                torch.testing.assert_close(alone.weight_factor, rows.weight_factor[mine])
        later = fixed_batch(model, name, iteration=1)[1].score(model).logprob
    assert later.shape != together.shape or not torch.equal(later, together)
    assert torch.isfinite(weight).all()


def test_an_answer_counts_once_whatever_is_read_of_it(make_model) -> None:
    """Weights of six answers: a sixth each, spread over tokens; SPG's two bounds share one answer's advantage."""
    model = make_model("gpt2-full", vocab_size=8)
    for name in ("diffu_grpo", "coupled_grpo", "unigrpo", "wd1", "espo", "gdsd", "cj_grpo", "d2_stepmerge"):
        _, rows, _, weight = fixed_batch(model, name)
        total = torch.zeros(6, dtype=torch.float64).index_add(0, rows.trajectory, weight)
        torch.testing.assert_close(total, torch.full((6,), 1 / 6, dtype=torch.float64))


def test_the_two_bounds_share_the_advantage_by_hand() -> None:
    given = torch.tensor([2.0, -2.0, 0.0, math.nan])
    mixed = sandwich_advantage(given, 0.25).tolist()
    assert mixed[:3] == [[2, 0], [-1.5, -0.5], [0, 0]] and all(math.isnan(x) for x in mixed[3])


def test_the_regression_loss_by_hand() -> None:
    """psi A = 2, 2, -1; changes 0, 1, -3 of which the clamp (log 1/2, log 2) leaves 0, log 2, -log 2."""
    logprob = torch.tensor([0.0, 1.0, -3.0], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(3, dtype=torch.float64)
    batch = DecisionBatch(logprob, zeros, zeros, None, torch.tensor([1, 1, -0.5]), zeros + 1)
    output = regression_loss(batch, psi=2.0, clip_low=0.5, clip_high=1.0)
    log2 = math.log(2)
    assert output.loss.tolist() == pytest.approx([4, (log2 - 2) ** 2, (1 - log2) ** 2])
    assert torch.autograd.grad(output.loss.sum(), logprob)[0].tolist() == [-4, 0, 0]
    assert output.metrics["clip_fraction"].tolist() == [0, 1, 1]


def test_the_kl_of_gdsd_is_the_published_k2() -> None:
    """With a weight of 0.5 and a log-ratio of 2 to the reference: (0 - psi A)^2 + 0.5 * 2^2 / 2."""
    recipe = parse_recipe({"name": "gdsd", "kl_to": "reference", "kl_coef": 0.5, "psi": 2.0})
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    loss = recipe.loss(DecisionBatch(zero, zero, zero, zero - 2, one, one)).loss
    assert loss.tolist() == pytest.approx([4 + 1])


def test_traced_recipes_score_what_was_sampled(make_model) -> None:
    """Exact ones give the recorded log-probs; StepMerge with fewer segments than steps does not."""
    model = make_model("qwen3-full", vocab_size=8)
    for name in ("cj_grpo", "justgrpo", "mdpo"):
        _, rows, _, _ = fixed_batch(model, name)
        with torch.no_grad():
            torch.testing.assert_close(rows.score(model).logprob, rows.sampler_logprob, rtol=0, atol=1e-9)
    sampled = fixed_batch(model, "cj_grpo")[1].sampler_logprob
    for segments, exact in ((1, False), (3, True), (8, True)):
        _, rows, _, _ = fixed_batch(model, "d2_stepmerge", segments=segments)
        assert rows.sampler_logprob is None  # merged steps are no decisions the sampler scored
        with torch.no_grad():
            gap = float((rows.score(model).logprob - sampled).abs().max())
        assert (gap < 1e-9) == exact


def test_what_follows_the_end_token_is_left_out_on_request(make_model) -> None:
    """Two prompts of two and three tokens, answers of three and one, reveals in an order of their own."""
    for family, block in (("gpt2-full", None), ("qwen3-block4", 4)):
        model = make_model(family, vocab_size=8)
        options = SamplerOptions(gen_length=8, num_inference_steps=4, block_length=block)
        prompts = [[1, 2], [3, 4, 5]]
        drawn = InProcessEngine(model, options).generate([Request(p, seed=s) for s, p in enumerate(prompts)])
        cut = [replace(t, stop_length=n) for t, n in zip(drawn, (3, 1), strict=True)]
        for name in ("cj_grpo", "tracerl", "d2_stepmerge"):
            every, answer = (parse_recipe({"name": name, "scope": s}) for s in ("canvas", "answer"))
            assert [answer.num_decisions(t, None) for t in cut] == [3, 1]
            whole, rows = every.rows(cut, model, None, None), answer.rows(cut, model, None, None)
            assert len(whole.target) == sum(every.num_decisions(t, None) for t in cut) >= 16
            position = whole.position_ids[whole.row, whole.column]
            inside = torch.where(whole.trajectory == 0, position < 5, position < 4)
            assert rows.trajectory.tolist() == [0, 0, 0, 1] == whole.trajectory[inside].tolist()
            with torch.no_grad():
                assert torch.equal(rows.score(model).logprob, whole.score(model).logprob[inside])
            if name != "d2_stepmerge":
                assert torch.equal(rows.sampler_logprob, whole.sampler_logprob[inside])
    with pytest.raises(ValueError, match=r"algorithm\.value learns from every revealed token: set algorithm\.scope"):
        load_config(None, ["algorithm={name: tracerl, scope: answer, value: {}}"])


def test_every_pass_counts_the_same_whatever_it_committed(make_model) -> None:
    """Doubling quotas commit 1, 2 and 5 tokens; of two rollouts and three passes each, a pass is worth 1/6."""
    model = make_model("gpt2-full", vocab_size=8)
    options = SamplerOptions(gen_length=8, num_inference_steps=3, preset="ass")
    trajectories = InProcessEngine(model, options).generate([Request([1, 2], seed=s) for s in range(2)])
    recipe = parse_recipe({"name": "cj_grpo"})
    rows = recipe.rows(trajectories, model, None, None)
    assert recipe.aggregation == "trajectory_step_mean"
    weight = rows.weight_factor / (2 * 8)
    sizes = torch.bincount(rows.trajectory * 3 + rows.step)
    assert sizes.tolist() == [1, 2, 5] * 2
    torch.testing.assert_close(weight, (1 / 6 / sizes[rows.trajectory * 3 + rows.step]).double())
    plain = parse_recipe({"name": "cj_grpo", "aggregation": "trajectory_mean"})
    assert plain.rows(trajectories, model).weight_factor is None
    with pytest.raises(
        ValueError, match=r"algorithm.step_mean is called algorithm.aggregation \(true is trajectory_step"
    ):
        load_config(None, ["algorithm={name: cj_grpo, step_mean: false}"])


@pytest.mark.parametrize(
    ("options", "decisions", "expected"),
    [
        # Rollout A took tokens in steps 0, 0, 0, 2 and B in 0, 1, 5: five steps, worth 1/5 each, or halves of 1/2 and
        # thirds of it.
        ("aggregation: step_mean", [2, 3], [1 / 15] * 3 + [1 / 5] * 4),
        ("aggregation: trajectory_step_mean", [4, 3], [1 / 12] * 3 + [1 / 4] + [1 / 6] * 3),
        # Two neighbouring steps share a state: A is one step of 4, B steps of 2 and 1.
        ("aggregation: step_mean, shrink: 2, old_logprob: recompute", [1, 2], [1 / 12] * 4 + [1 / 6] * 2 + [1 / 3]),
        # The answers end after 3 and 2 tokens: A has steps of 2 and 1 token left, B two steps of 1.
        ("aggregation: step_mean, scope: answer", [2, 2], [1 / 8] * 2 + [1 / 4] * 3),
    ],
)
def test_a_mean_over_steps_by_hand(make_model, options: str, decisions: list[int], expected: list[float]) -> None:
    """TraceRL's average on full-attention models: within a step, then over the steps of all rollouts."""
    model = make_model("gpt2-full", vocab_size=8)
    trajectories = []
    for step, position, stop in (([0, 0, 0, 2], [2, 3, 5, 4], 3), ([0, 1, 5], [2, 4, 3], 2)):
        count = len(step)
        trajectories.append(
            TokenTrajectory(
                prompt_ids=np.array([1, 2]), length=6, mask_token_id=model.mask_token_id, num_steps=6,
                step=np.array(step), position=np.array(position), token=np.full(count, 3), logprob=np.zeros(count),
                confidence=np.ones(count, dtype=np.float32), stop_length=stop, block_length=None, block_origin=0,
                sampler={"temperature": 1.0, "top_p": 1.0, "top_k": 0}, policy_version=0,
            )
        )  # fmt: skip
    recipe = load_config(None, [f"algorithm={{name: tracerl, {options}}}"]).algorithm
    counted = [recipe.num_decisions(t) for t in trajectories]
    assert counted == decisions
    rows = recipe.rows(trajectories, model)
    weight = decision_weights(recipe.aggregation, torch.tensor(counted), sum(counted), 2, 4)
    torch.testing.assert_close(weight[rows.trajectory] * rows.weight_factor, torch.tensor(expected).double())


def test_left_to_right_is_refused_in_another_order(tmp_path: Path) -> None:
    arguments = tiny_config(tmp_path, "algorithm.name=justgrpo", "algorithm.entropy_coef=0")
    with pytest.raises(ValueError, match=r"algorithm\.name justgrpo needs sampler\.selector=left_most"):
        check_run(load_config(arguments[1], arguments[2:]))
    right = [*arguments[2:], "sampler.selector=left_most", "sampler.num_inference_steps=16"]
    check_run(load_config(arguments[1], right))


@pytest.mark.parametrize("name", [*MASKED, *TRACED[1:], "trafl", "egspo", "lightningrl"])
def test_a_recipe_runs(tmp_path: Path, name: str) -> None:
    """Two passes over the rollouts of two steps, in micro-batches, through the real loop."""
    extra = ["sampler.selector=left_most", "sampler.num_inference_steps=16"] if name == "justgrpo" else []
    flat = "filters.drop_zero_variance=false"
    lightning = [flat, "algorithm.right=0", "algorithm.min_speed_range=0"]
    extra += {"trafl": [flat], "egspo": ["sampler.record_x0=true"], "lightningrl": lightning}.get(name, [])
    arguments = tiny_config(
        tmp_path, f"algorithm.name={name}", "algorithm.entropy_coef=0", "train.steps=2", "train.micro_batch_size=4",
        "eval.num_prompts=2", "eval.viewer_items=0", *extra,
    )  # fmt: skip
    train_here(arguments)
    train = lines(tmp_path / "run", "train")
    assert [line["cost/updates"] for line in train] == [2, 4]
    assert all(np.isfinite(line["loss/total"]) and line["policy/grad_norm"] > 0 for line in train)


def test_an_update_does_not_depend_on_its_cut(tmp_path: Path) -> None:
    """Estimators with masks give the same weights in micro-batches of 2 and of 16 (to float32 rounding)."""
    from tests.runs import largest_difference, weights

    ends = []
    for size in (2, 16):
        folder = tmp_path / str(size)
        train_here(
            tiny_config(
                folder,
                "algorithm.name=espo",
                "algorithm.entropy_coef=0",
                "train.steps=2",
                f"train.micro_batch_size={size}",
                "eval.num_prompts=2",
                "eval.viewer_items=0",
            )
        )
        ends.append(weights(folder / "run"))
    assert largest_difference(*ends) < 1e-5


def test_an_answer_that_ended_early_is_scored_up_to_its_end(make_model) -> None:
    model = make_model("gpt2-full", vocab_size=8)
    trajectories = [replace(t, stop_length=2) for t in rollouts(model, "wd1", 2)]
    answer = parse_recipe({"name": "diffu_grpo"})
    canvas = parse_recipe({"name": "diffu_grpo", "scope": "canvas"})
    for recipe, count in ((answer, 2), (canvas, 4)):
        rows = recipe.rows(trajectories, model, None, None, iteration=0)
        assert len(rows.trajectory) == 2 * count and recipe.num_decisions(trajectories[0], None) == count


def test_a_lone_rollout_is_trained_with_a_value_and_refused_without_a_baseline(tmp_path: Path) -> None:
    """A group of one has no mean to differ from: its reward is compared with the critic's value, or with history."""
    lone = parse_recipe({"name": "tracerl", "value": {}})
    reward = torch.tensor([2.0, math.nan, 5.0], dtype=torch.float64)
    alone = Verdicts(reward, torch.arange(3), None, [], None, 0, None)
    torch.testing.assert_close(lone.advantage(alone), reward, equal_nan=True)
    assert lone.advantage(replace(alone, group=torch.tensor([0, 0, 0]))).nan_to_num().tolist() == [-1.5, 0.0, 1.5]
    assert {name for name in RECIPES.known if not parse_recipe({"name": name}).needs_group} == {
        "alignprop", "b2_diffurl", "class_tokens", "ctrl", "d_opsd", "ddpo", "dgpo", "diffusion_opd", "dpok", "dppo",
        "drakes", "opd", "rediff", "trafl",
    }  # fmt: skip
    assert parse_recipe({"name": "b2_diffurl", "history": 0}).needs_group
    arguments = tiny_config(tmp_path, "train.group_size=1", "train.steps=2", "eval.viewer_items=0")
    with pytest.raises(
        ValueError, match=r"train.group_size 1 leaves algorithm.name tracerl no other .* algorithm.value"
    ):
        train_here(arguments)
    assert not (tmp_path / "run").exists()
    train_here([*arguments, "algorithm.value={}"])
    for line in lines(tmp_path / "run", "train"):
        assert line["policy/decisions"] > 0 and line["policy/grad_norm"] > 0 and line["value/grad_norm"] > 0
        assert line["reward/zero_variance_share"] == line["filters/zero_variance"] == 0
