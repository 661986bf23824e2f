"""Teachers at the policy's own states: the divergence by hand, the optimum on an enumerable toy, the rows."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rewards.causal_lm import Reading
from rl.batch import DecisionBatch
from rl.config import load_config
from rl.estimators.base import Verdicts
from rl.estimators.trace_rows import masked_steps, targets_at
from rl.losses.aggregate import decision_weights, weighted_sum
from rl.losses.divergence import divergence
from rl.modalities.text_plan import open_tokenizer
from rl.registry import parse_recipe
from rl.tasks.load import load_task
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import TokenTrajectory
from tests.runs import lines, tiny_config, train_here
from tests.slopes import slopes
from tests.tabular import PROMPT, TabularModel

F64 = torch.float64


def logs(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=F64).log()


class Bigram:
    """A causal teacher over V tokens that is a table: p(next | token before)."""

    def __init__(self, num_tokens: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = (2 * torch.randn(num_tokens + 1, num_tokens, generator=generator, dtype=F64)).log_softmax(-1)

    def read(self, prompts: Any, answers: Any, top: int | None = 0) -> list[Reading]:
        readings = []
        for prompt, answer in zip(prompts, answers, strict=True):
            rows = self.table[[prompt[-1], *answer[:-1]]]
            own = rows[range(len(answer)), answer]
            best = rows.topk(top) if top else None
            readings.append(Reading(own, None, rows) if best is None else Reading(own, best.indices, best.values))
        return readings


def test_the_divergence_by_hand() -> None:
    student, teacher = logs(0.5, 0.25, 0.25), logs(0.75, 0.125, 0.125)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.125)
    logits = student + 3.0
    assert float(divergence("forward", logits, teacher)) == pytest.approx(forward)
    assert float(divergence("reverse", logits, teacher)) == pytest.approx(reverse)
    assert float(divergence("cross_entropy", logits, teacher)) == pytest.approx(forward + entropy)
    # The teacher's best token and the rest; all three tokens, in another order.
    assert float(divergence("forward", logits, teacher[:, :1], torch.tensor([[0]]))) == pytest.approx(forward)
    order = torch.tensor([[2, 0, 1]])
    assert float(divergence("reverse", logits, teacher.gather(-1, order), order)) == pytest.approx(reverse)
    uneven = logs(0.7, 0.2, 0.1)
    two = 0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5)
    assert float(divergence("forward", logits, uneven[:, :1], torch.tensor([[0]]))) == pytest.approx(two)
    assert two < float(divergence("forward", logits, uneven))


def test_what_the_student_never_says_is_taken_from_the_teacher() -> None:
    """Token 2 is excluded: the teacher's 1/2, 1/4, 1/4 becomes 2/3, 1/3. A fourth token is the student's own."""
    logits = torch.tensor([[0.0, 0.0, -1e9, -1e9]], dtype=F64, requires_grad=True)
    teacher = logs(0.5, 0.25, 0.25)
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    for given in ((teacher,), (teacher[:, [0, 2]], torch.tensor([[0, 2]]))):
        value = divergence("forward", logits, *given)
        assert value.item() == pytest.approx(expected)
        assert torch.isfinite(torch.autograd.grad(value.sum(), logits)[0]).all()
    assert math.isfinite(divergence("reverse", logits, teacher).item())


def sampled(model: Any, count: int, steps: int = 2, free: int = 2, **options: Any) -> list[TokenTrajectory]:
    engine = InProcessEngine(model, SamplerOptions(gen_length=free, num_inference_steps=steps, **options))
    return engine.generate([Request(PROMPT, seed=7 * s + 1) for s in range(count)])


def loss_of(recipe: Any, model: Any, trajectories: list[TokenTrajectory], advantage: torch.Tensor) -> torch.Tensor:
    rows = recipe.rows(trajectories, model)
    if recipe.anchor != "none":
        with torch.no_grad():
            rows.set_anchor(model)
    count = torch.tensor([recipe.num_decisions(t) for t in trajectories])
    total = float(count.sum())
    weight = decision_weights(recipe.aggregation, count, total, len(trajectories), 1.0)[rows.trajectory]
    weight = weight if rows.weight_factor is None else weight * rows.weight_factor
    scores = rows.distinct().score(model)
    old = scores.logprob.detach()
    batch = DecisionBatch(scores.logprob, scores.entropy, old, None, advantage[rows.trajectory], weight, kl=scores.kl)
    batch.check()
    return weighted_sum(recipe.loss(batch).loss, weight)


def taught(**options: Any) -> Any:
    recipe = parse_recipe({"name": "opd", **options})
    recipe._reader = Bigram(3)
    return recipe


def fitted(recipe: Any, model: Any, trajectories: list[TokenTrajectory]) -> float:
    """The least mean divergence on these rollouts; the model holds the weights that have it."""
    rows = recipe.rows(trajectories, model).distinct()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = rows.score(model).kl.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item()


@pytest.mark.parametrize(
    "options", [{}, {"divergence": "reverse"}, {"divergence": "cross_entropy"}, {"top": 1}, {"targets": "masked"}]
)
def test_the_optimum_of_opd_is_the_teachers_conditional(options: dict[str, Any]) -> None:
    """Left to right, one token a step: the policy's conditional at the next position becomes the teacher's.

    With the teacher's best token alone, its probability is what is learned.
    """
    model, recipe = TabularModel(3, 2, seed=1), taught(**{"targets": "committed", **options})
    trajectories = sampled(model, 24, selector="left_most")
    assert {int(t.final_canvas()[1]) for t in trajectories} == {0, 1, 2}
    least, teacher, mask = fitted(recipe, model, trajectories), recipe._reader.table, 3
    pairs = [(model.logp((mask, mask))[0], teacher[PROMPT[0]])]
    pairs += [(model.logp((first, mask))[1], teacher[first]) for first in range(3)]
    for mine, theirs in pairs:
        kept = theirs.argsort(descending=True)[: options.get("top")]
        torch.testing.assert_close(mine[kept].exp(), theirs[kept].exp(), rtol=0, atol=1e-4)
    if not options.keys() - {"divergence", "top"} and options.get("divergence") != "cross_entropy":
        assert least < 1e-7


def test_masked_positions_learn_the_mean_of_what_the_teacher_says() -> None:
    """Both tokens at once: the second one learns the teacher's conditional averaged over the drawn first tokens."""
    model, recipe = TabularModel(3, 2, seed=1), taught()
    trajectories = sampled(model, 24, steps=1)
    fitted(recipe, model, trajectories)
    first = [int(t.final_canvas()[1]) for t in trajectories]
    expected = recipe._reader.table[first].exp().mean(0)
    torch.testing.assert_close(model.logp((3, 3))[1].exp(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_kind", ["gpt2-full", "qwen3-block4"])
@pytest.mark.parametrize("targets", ["masked", "committed"])
def test_every_state_is_read_where_it_should_be(make_model, model_kind: str, targets: str) -> None:
    """Against one forward per state on the canvas itself, and the teacher's answer to the token before."""
    model = make_model(model_kind, vocab_size=8)
    size = model.block_length
    options = SamplerOptions(gen_length=8, num_inference_steps=4, block_length=size)
    trajectories = InProcessEngine(model, options).generate([Request([1, 2, 3, 1], seed=s) for s in range(3)])
    trajectories[0] = replace(trajectories[0], stop_length=5)
    recipe = parse_recipe({"name": "opd", "targets": targets})
    recipe._reader = Bigram(8)
    with torch.no_grad():
        rows = recipe.rows(trajectories, model)
        got = rows.score(model)
        assert rows.num_tokens > super(type(rows), rows).num_tokens
        expected: list[tuple[float, float]] = []
        for trajectory in trajectories:
            final, end = trajectory.final_canvas(), 4 + trajectory.stop_length
            for t in np.unique(trajectory.step):
                canvas = trajectory.canvas_at(int(t))
                block = np.arange(len(canvas)) // (size or 10**6)
                now = trajectory.position[trajectory.step == t]
                open_ = np.flatnonzero((canvas == trajectory.mask_token_id) & (block == block[now[0]]))
                seen = None if size is None else torch.from_numpy(block[None, :] <= block[:, None])[None]
                logits = model.token_logits(model.hidden_states(torch.from_numpy(canvas)[None], visible=seen))[0]
                for p in open_ if targets == "masked" else now:
                    if p < end:
                        theirs = recipe._reader.table[final[p - 1]]
                        log_p = logits[p].double().log_softmax(-1)
                        theirs = torch.cat([theirs, theirs.new_full((len(log_p) - 8,), -torch.inf)])
                        said = theirs.masked_fill(log_p < -1e8, -torch.inf).log_softmax(-1)
                        inside = said > -torch.inf
                        kl = (said.exp() * (said - log_p))[inside].sum()
                        expected.append((float(log_p[final[p]]), float(kl)))
    logprob, kl = zip(*expected, strict=True)
    assert sorted(got.logprob.tolist()) == pytest.approx(sorted(logprob), abs=1e-5)
    assert sorted(got.kl.tolist()) == pytest.approx(sorted(kl), abs=1e-5)
    assert [recipe.num_decisions(t) for t in trajectories] == np.bincount(rows.trajectory).tolist()
    assert (rows.sampler_logprob is None) == (targets == "masked")


def test_masked_targets_by_hand() -> None:
    """Canvas p M M | M M: step 0 takes position 2, step 1 position 1, step 2 both of the second block."""
    trajectory = TokenTrajectory(
        prompt_ids=np.array([5]), length=5, mask_token_id=9, num_steps=3, step=np.array([0, 1, 2, 2]),
        position=np.array([2, 1, 3, 4]), token=np.array([6, 7, 8, 6]), logprob=np.zeros(4), confidence=np.ones(4),
        stop_length=3, block_length=2, block_origin=1, sampler={"temperature": 1.0},
    )  # fmt: skip
    places, tokens = targets_at(trajectory, trajectory.canvas_at(0), np.array([0]), masked=True)
    assert places.tolist() == [1, 2] and tokens.tolist() == [7, 6]
    assert masked_steps(trajectory).tolist() == [0, 0, 1, 2, 2]
    assert masked_steps(trajectory, answer=True).tolist() == [0, 0, 1, 2]


def test_a_reward_beside_the_teacher_adds_its_own_gradient() -> None:
    """The gradient of the sum is that of OPD plus 0.3 times that of the policy gradient."""
    model, advantage = TabularModel(3, 2, seed=1), torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=F64)
    trajectories = sampled(model, 4)
    both, alone = taught(targets="committed", reward_coef=0.3), taught(targets="committed")
    rewarded = parse_recipe(
        {"name": "tracerl", "aggregation": "trajectory_mean", "old_logprob": "on_policy", "scope": "answer"}
    )
    gradients = [
        torch.autograd.grad(loss_of(recipe, model, trajectories, given), model.table)[0]
        for recipe, given in ((both, advantage), (alone, advantage * 0), (rewarded, advantage))
    ]
    torch.testing.assert_close(gradients[0], gradients[1] + 0.3 * gradients[2])
    reward, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    assert alone.advantage(Verdicts(reward, group)).tolist() == [0, 0] and not alone.needs_group
    assert both.advantage(Verdicts(reward, group)).tolist() == [0.5, -0.5] and both.needs_group
    with pytest.raises(ValueError, match="targets to committed"):
        taught(reward_coef=0.3)
    with pytest.raises(ValueError, match="set old_logprob to on_policy"):
        taught(old_logprob="sampler")


def self_taught(model: Any, trajectories: list[TokenTrajectory], reward: list[float], **options: Any) -> tuple:
    recipe = parse_recipe({"name": "d_opsd", **options})
    summaries = [recipe.summary(t) for t in trajectories]
    group = torch.zeros(len(reward), dtype=torch.int64)
    return recipe, recipe.advantage(Verdicts(torch.tensor(reward, dtype=F64), group, summaries=summaries))


def test_the_model_teaches_itself_with_a_right_answer_behind_the_canvas(make_model) -> None:
    """Against a forward per state with the suffix; a right rollout is shown its own answer, others the first right."""
    model = make_model("gpt2-full", vocab_size=8)
    options = SamplerOptions(gen_length=4, num_inference_steps=2)
    trajectories = InProcessEngine(model, options).generate([Request([1, 2, 3], seed=s) for s in (1, 2, 3)])
    recipe, advantage = self_taught(model, trajectories, [0.0, 1.0, 1.0], top=None)
    assert advantage.tolist() == [0, 0, 0]
    answers = [t.response_ids() for t in trajectories]
    rows = recipe.rows(trajectories, model).distinct()
    with torch.no_grad():
        rows.set_anchor(model)
        kl, expected = rows.score(model).kl, []
        for trajectory, shown in zip(trajectories, (answers[1], answers[1], answers[2]), strict=True):
            for t in np.unique(trajectory.step):
                canvas = trajectory.canvas_at(int(t))
                wide = np.concatenate([canvas, shown])
                mine, theirs = (
                    model.token_logits(model.hidden_states(torch.from_numpy(c)[None]))[0].log_softmax(-1)
                    for c in (canvas, wide)
                )
                for p in trajectory.position[trajectory.step == t]:
                    law = theirs[p].exp()
                    expected.append(float((law * (theirs[p] - mine[p]))[law > 0].sum()))
    assert kl.tolist() == pytest.approx(expected, abs=1e-6)
    # Nobody was right, and half of the answer is shown.
    _, none = self_taught(model, trajectories, [0.0, 0.5, 0.0])
    assert none.isnan().all()
    half, _ = self_taught(model, trajectories, [0.0, 1.0, 0.0], shown_tokens=2)
    assert [len(answer) for answer in half._shown.values()] == [2, 2, 2]
    coarse, _ = self_taught(model, trajectories, [0.0, 1.0, 1.0], top=2)
    rows = coarse.rows(trajectories, model)
    with torch.no_grad():
        rows.set_anchor(model)
        assert bool((rows.score(model).kl <= kl + 1e-6).all())


def test_gradients_are_slopes(make_model) -> None:
    """Central differences of both recipes' losses, with the whole vocabulary and with the likeliest tokens."""
    model = make_model("gpt2-full", vocab_size=8)
    options = SamplerOptions(gen_length=4, num_inference_steps=2)
    trajectories = InProcessEngine(model, options).generate([Request([1, 2, 3], seed=s) for s in (1, 2, 3)])
    for name, top, kind in itertools.product(("opd", "d_opsd"), (None, 3), ("forward", "reverse")):
        if name == "opd":
            recipe = parse_recipe({"name": "opd", "top": top, "divergence": kind})
            recipe._reader = Bigram(8)
        else:
            recipe, _ = self_taught(model, trajectories, [1.0, 0.0, 1.0], top=top, divergence=kind)
        rows = recipe.rows(trajectories, model)
        if name == "d_opsd":
            with torch.no_grad():
                rows.set_anchor(model)
        size, slope = slopes(lambda rows=rows: rows.score(model).kl.sum(), list(model.parameters()))
        assert slope == pytest.approx(size, rel=2e-3), (name, top, kind)


def test_bad_teachers_are_refused_by_name(make_model) -> None:
    recipe = parse_recipe({"name": "d_opsd"})
    run: Any = type("Run", (), {"model": make_model("qwen3-block4", vocab_size=8)})()
    with pytest.raises(ValueError, match="d_opsd shows the teacher what follows the canvas"):
        recipe.prepare(run)
    with pytest.raises(ValueError, match=r"algorithm\.shown_tokens: .* 64 positions"):
        model = make_model("gpt2-full", vocab_size=8)
        options = SamplerOptions(gen_length=40, num_inference_steps=2)
        trajectories = InProcessEngine(model, options).generate([Request([1, 2, 3], seed=1)])
        self_taught(model, trajectories, [1.0])[0].rows(trajectories, model)


def teacher_folder(folder: Path, arguments: list[str], rename: dict[str, str] | None = None) -> Path:
    """A tiny Llama with the tokenizer of a config's task, some of its tokens under other names."""
    config = load_config(arguments[1], arguments[2:])
    tokenizer = open_tokenizer(config, load_task(config.task.name, config.task.params))
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    for old, new in (rename or {}).items():
        path.write_text(path.read_text().replace(json.dumps(old), json.dumps(new)))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"initializer_range": 0.5}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["opd", "d_opsd"])
def test_a_policy_comes_nearer_to_its_teacher_in_a_run(tmp_path: Path, name: str) -> None:
    """Through the real loop, on new rollouts every step; the teacher reads them in half precision."""
    options = ["algorithm.entropy_coef=0", "filters.drop_zero_variance=false", "train.steps=6", "eval.num_prompts=2"]
    options += ["sft.steps=0", f"algorithm.name={name}", "eval.viewer_items=0", "algorithm.targets=committed"]
    arguments = tiny_config(tmp_path, *options)
    if name == "opd":
        arguments.append(f"algorithm.teacher={teacher_folder(tmp_path / 'teacher', arguments)}")
    else:
        arguments.append("algorithm.right=0.2")
    train_here(arguments)
    train = lines(tmp_path / "run", "train")
    kl = [line["policy/teacher_kl"] for line in train]
    assert all(math.isfinite(value) and value > 0 for value in kl)
    assert all(line["policy/logprob_gap_max"] < 1e-4 for line in train)
    if name == "opd":
        assert kl[-1] < 0.75 * kl[0]


def test_another_vocabulary_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    options = ["algorithm.entropy_coef=0", "filters.drop_zero_variance=false", "algorithm.name=opd"]
    arguments = tiny_config(tmp_path, *options)
    with pytest.raises(ValueError, match=r"algorithm\.teacher is null and there is no model\.path"):
        train_here(arguments)
    teacher = teacher_folder(tmp_path / "teacher", arguments, {"4": "four"})
    with pytest.raises(ValueError, match=r"another vocabulary than the policy: its token 'four' is \d+ and nothing"):
        train_here([*arguments, f"algorithm.teacher={teacher}"])
    assert not lines(tmp_path / "run", "sft") and not lines(tmp_path / "run", "train")
    with pytest.raises(ValueError, match="package:nowhere: there is no installed package"):
        train_here([*arguments, "algorithm.teacher=package:nowhere"])
    with pytest.raises(ValueError, match=r"needs filters\.drop_zero_variance=false"):
        train_here([*arguments, f"algorithm.teacher={teacher}", "filters.drop_zero_variance=true"])
