"""What the policy chooses of its decoder: the law of choices and tokens, and that the learner scores the same law."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl.cli import main
from rl.model_section import ModelConfig
from rl.models.load import load_policy
from rl.registry import parse_recipe
from rollouts.engines.base import RAY_WORKERS, require
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.tokens import token_engine
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import TokenTrajectory, load_trajectories, save_trajectories
from tests import runs

BLOCKS = ["qwen3-block2", "gpt2-block2-causal", "qwen3-block2-shifted-causal", "qwen3-block4-shifted"]
LENGTHS, BOUNDS = {"block_length": [1, 2, 4]}, {"bound": [0.2, 0.5, 0.9]}


@pytest.fixture
def chooser(make_model: Any) -> Any:
    """A model with a head of random weights."""

    def make(family: str = "gpt2-full", values: int = 3, **settings: Any) -> Any:
        model = make_model(family, **settings)
        model.choose_between(values)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.choice_head.parameters():
                parameter.normal_(std=0.4, generator=generator)
        return model

    return make


def options(**changed: Any) -> SamplerOptions:
    return SamplerOptions(**{"gen_length": 8, "num_inference_steps": 8, "choose": LENGTHS, **changed})


def requests(count: int = 12) -> list[Request]:
    return [Request([1 + (3 * i + n) % 9 for i in range(1 + n % 4)], seed=n) for n in range(count)]


def outcomes(model: Any, canvas: list[int], borders: list[int], steps: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every way to go on from a canvas, lengths and tokens, with its probability: a loop over single steps.

    Args:
        borders: where the finished blocks begin, and where the next one does.
    """
    length, start = len(canvas), borders[-1]
    if start == length:
        yield tuple(canvas), 1.0
        return
    state = states(model, canvas, borders, start)[start - 1]
    for size, chance in zip((1, 2, 4), model.choice_head(state).softmax(-1).tolist(), strict=True):
        end = min(start + size, length)
        taken = -(-(end - start) * steps // (length - 2))
        quotas = [(end - start) // taken + (i < (end - start) % taken) for i in range(taken)]
        for after, p in tokens_of(model, canvas, [*borders, end], start, quotas):
            for last, q in outcomes(model, after, [*borders, end], steps):
                yield (size, *last), chance * p * q


def tokens_of(
    model: Any, canvas: list[int], borders: list[int], first: int, quotas: list[int]
) -> Iterator[tuple[list[int], float]]:
    if not quotas:
        yield canvas, 1.0
        return
    probs = model.token_logits(states(model, canvas, borders, borders[-2])).softmax(-1)
    for drawn in itertools.product(range(3), repeat=quotas[0]):
        chance = float(np.prod([probs[first + i - model.logit_shift, token].item() for i, token in enumerate(drawn)]))
        after = [*canvas[:first], *drawn, *canvas[first + quotas[0] :]]
        for last, q in tokens_of(model, after, borders, first + quotas[0], quotas[1:]):
            yield last, chance * q


def states(model: Any, canvas: list[int], borders: list[int], noisy: int) -> torch.Tensor:
    """[L, D] of the whole canvas. In blocks, a position sees all before the next border; in a causal context, one
    before `noisy` sees what is left of it."""
    visible, position = None, torch.arange(len(canvas))
    if model.attention == "block_causal":
        ends = torch.tensor([min([b for b in borders if b > p], default=len(canvas)) for p in position.tolist()])
        if model.context_causal:
            ends = torch.where(position < noisy, position + 1, ends)
        visible = (position < ends[:, None])[None]
    return model.hidden_states(torch.tensor([canvas]), visible=visible)[0]


@pytest.mark.parametrize("family", ["gpt2-full", *BLOCKS])
def test_the_law_of_lengths_and_tokens(chooser: Any, family: str) -> None:
    """3 tokens in 2 steps, left-most first: all 108 ways, lengths 4 and 2 cut at the end, against 4,000 rollouts."""
    model, count = chooser(family, vocab_size=4, scale=0.7), 4000
    law: dict[tuple[int, ...], float] = {}
    with torch.no_grad():
        for way, chance in outcomes(model, [1, 2, 3, 3, 3], [0, 2], 2):
            law[way] = law.get(way, 0.0) + chance
    assert sum(law.values()) == pytest.approx(1.0)
    decoder = options(gen_length=3, num_inference_steps=2, selector="left_most")
    engine = token_engine(model, decoder, max_batch_size=count)
    drawn: dict[tuple[int, ...], int] = {}
    for trajectory in engine.generate([Request([1, 2], seed) for seed in range(count)]):
        way = (
            *(LENGTHS["block_length"][int(i)] for i in trajectory.choices[:, 2]),
            *trajectory.final_canvas().tolist(),
        )
        drawn[way] = drawn.get(way, 0) + 1
    assert drawn.keys() <= law.keys()
    share = np.array([drawn.get(way, 0) / count for way in law])
    exact = np.array(list(law.values()))
    np.testing.assert_array_less(np.abs(share - exact), 4.5 * np.sqrt(exact * (1 - exact) / count) + 1e-3)


@pytest.mark.parametrize("family", ["gpt2-full", "qwen3-full-shifted", *BLOCKS])
@pytest.mark.parametrize("choose", [LENGTHS, BOUNDS], ids=["lengths", "bounds"])
def test_the_learner_scores_choices_and_tokens(chooser: Any, family: str, choose: Any) -> None:
    model = chooser(family)
    changed = {"selector": "threshold", "block_length": 4} if choose is BOUNDS else {}
    decoder = options(choose=choose, temperature=1.3, top_k=5, **changed)
    trajectories = token_engine(model, decoder, eos_token_id=0, max_batch_size=5).generate(requests())
    for trajectory in trajectories:
        trajectory.validate()
        assert len(trajectory.choices) >= 1 and (trajectory.choices[0, :2] == [0, trajectory.prompt_length - 1]).all()
        # A block-causal model forwards finished blocks for the next choice.
        stored = trajectory.num_steps + len(trajectory.choices) - 1 if family in BLOCKS else None
        assert trajectory.decoder.get("forwards") == stored
    recorded = sum(t.logprob.sum() + t.choices[:, 3].sum() for t in trajectories)
    for settings in ({}, {"pack_to": 60}, {"scope": "answer"}, {"aggregation": "step_mean"}):
        recipe = parse_recipe({"name": "tracerl", **settings})
        rows = recipe.rows(trajectories, model).distinct()
        with torch.no_grad():
            scores = rows.score(model)
        np.testing.assert_allclose(scores.logprob.numpy(), rows.sampler_logprob.numpy(), rtol=0, atol=1e-9)
        if settings != {"scope": "answer"}:
            assert scores.logprob.sum().item() == pytest.approx(recorded)
        if settings != {"aggregation": "step_mean"}:
            assert sum(recipe.num_decisions(t) for t in trajectories) == len(rows.target)
        steps = [recipe.trained(t).tolist() for t in trajectories]
        assert [s for own in steps for s in own] == rows.step.tolist()
    # Under other weights of the head, the choices alone are scored otherwise.
    with torch.no_grad():
        model.choice_head.weight.mul_(0.5)
        moved = (rows.score(model).logprob - scores.logprob).abs() > 1e-6
    assert moved.tolist() == rows.is_choice.tolist()


def test_a_choice_acts_as_the_option_would(chooser: Any) -> None:
    """A rollout that chose a bound is the rollout of a decoder with that bound; chosen lengths are blocks."""
    model = chooser()

    def plain(request: Request, **changed: Any) -> TokenTrajectory:
        return InProcessEngine(model, options(choose=None, **changed), eos_token_id=0).generate([request])[0]

    chosen = token_engine(model, options(choose=BOUNDS, selector="threshold"), eos_token_id=0).generate(requests(30))
    assert len({t.choices[0, 2] for t in chosen}) == 3
    for request, trajectory in zip(requests(30), chosen, strict=True):
        same = plain(request, selector="threshold", threshold=BOUNDS["bound"][int(trajectory.choices[0, 2])])
        assert (trajectory.step.tolist(), trajectory.token.tolist()) == (same.step.tolist(), same.token.tolist())
    with torch.no_grad():
        model.choice_head.weight.zero_()
        model.choice_head.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    chosen = token_engine(model, options(num_inference_steps=4), eos_token_id=0, max_batch_size=3).generate(requests())
    for request, trajectory in zip(requests(), chosen, strict=True):
        same = plain(request, block_length=2, num_inference_steps=4)
        assert (trajectory.step.tolist(), trajectory.token.tolist()) == (same.step.tolist(), same.token.tolist())


def test_choices_are_saved_with_trajectories_and_heads_with_models(chooser: Any, tmp_path: Path) -> None:
    model = chooser()
    trajectories = token_engine(model, options()).generate(requests(3))
    save_trajectories(tmp_path / "t.npz", trajectories)
    for before, after in zip(trajectories, load_trajectories(tmp_path / "t.npz"), strict=True):
        np.testing.assert_array_equal(before.choices, after.choices)
    with pytest.raises(ValueError, match="field 'choices'"):
        replace(trajectories[0], choices=np.array([[99.0, 0, 0, 0]])).validate()
    model.save_pretrained(tmp_path / "model")
    again = load_policy(ModelConfig(path=str(tmp_path / "model"), choices=3), None, seed=0)
    torch.testing.assert_close(again.choice_head.state_dict(), model.choice_head.state_dict())
    with pytest.raises(ValueError, match=r"model\.choices is 4, and the model chooses between 3"):
        load_policy(ModelConfig(path=str(tmp_path / "model"), choices=4), None, seed=0)


def test_what_it_cannot_do_is_refused(chooser: Any, make_model: Any) -> None:
    with pytest.raises(ValueError, match=r"sampler\.choose has 2 values, .* set model\.choices to 2"):
        token_engine(chooser(), options(choose={"block_length": [1, 2]}))
    with pytest.raises(ValueError, match=r"sampler\.choose reads forwards of the whole canvas"):
        token_engine(chooser(), options(), approximate_cache="dual")
    for changed, message in (
        ({"preset": "rcr"}, r"does not go with sampler\.reviser"),
        ({"quota": "linear"}, r"needs steps that reveal something"),
        ({"block_length": 4}, r"leave sampler\.block_length out"),
        ({"choose": BOUNDS}, r"sampler\.choose\.bound needs a selector that has one"),
        (
            {"choose": {"bound": [0.5, 5]}, "selector": "threshold"},
            r"bound has 5\.0, and no score of a threshold is above",
        ),
        ({"choose": {"bound": [0.5, 0.5]}, "selector": "threshold"}, r"takes each value once"),
        ({"choose": {"block_length": [2, 8, 16]}}, r"two lengths that hold the whole answer"),
        ({"choose": {}}, r"takes one of block_length and bound"),
        ({"choose": {"block_length": [0, 2]}}, r"takes numbers above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            options(**changed)
    with pytest.raises(ValueError, match=r"cannot give what the policy chose"):
        require("ray", RAY_WORKERS, {"choices": "sampler.choose"})


def test_trajectories_with_and_without_choices_do_not_mix(chooser: Any) -> None:
    model = chooser()
    plain = token_engine(model, options(choose=None)).generate(requests(2))
    chosen = token_engine(model, options()).generate(requests(2))
    for mixed in (plain + chosen, chosen + plain):
        with pytest.raises(ValueError, match="must all have choices"):
            parse_recipe({"name": "tracerl"}).rows(mixed, model)


def test_the_prompt_keeps_the_grid_it_was_sampled_with(chooser: Any) -> None:
    """A block size of training changes nothing: the record has the borders."""
    model = chooser("qwen3-block2")
    decoder = options(choose=BOUNDS, selector="threshold", block_length=4)
    trajectories = token_engine(model, decoder).generate([Request([1, 2, 3, 4, 5], seed) for seed in range(3)])
    rows = parse_recipe({"name": "tracerl"}).rows(trajectories, model)
    assert rows.block[0, :9].tolist() == [0, 0, 1, 1, 2, 3, 3, 3, 3]
    torch.testing.assert_close(parse_recipe({"name": "tracerl"}).rows(trajectories, model, 8).block, rows.block)
    with torch.no_grad():
        np.testing.assert_allclose(rows.score(model).logprob.numpy(), rows.sampler_logprob.numpy(), rtol=0, atol=1e-9)


def test_blocks_of_one_chosen_length_are_those_of_the_plain_decoder(chooser: Any) -> None:
    """Equal prompts that end where a block does, the number of steps by request, fewer slots than requests."""
    model = chooser("qwen3-block4-shifted")
    with torch.no_grad():
        model.choice_head.weight.zero_()
        model.choice_head.bias.copy_(torch.tensor([0.0, 0.0, 50.0]))
    asked = [Request([1, 2, 3, 4] * (1 + n % 2), n, 2 + 2 * (n % 3)) for n in range(7)]
    chosen = token_engine(model, options(), eos_token_id=0, max_batch_size=4).generate(asked)
    plain = InProcessEngine(model, options(choose=None, block_length=4), eos_token_id=0).generate(asked)
    for mine, other in zip(chosen, plain, strict=True):
        assert (mine.step.tolist(), mine.token.tolist()) == (other.step.tolist(), other.token.tolist())
        assert (mine.length, mine.stop_length) == (other.length, other.stop_length)
        np.testing.assert_allclose(mine.logprob, other.logprob, rtol=0, atol=1e-9)


def test_trafl_balances_choices_too(chooser: Any) -> None:
    """At the sampler's own weights, what it takes as drawn is what the learner scores."""
    model, recipe = chooser(), parse_recipe({"name": "trafl"})
    trajectories = token_engine(model, options()).generate(requests(4))
    with torch.no_grad():
        scored = recipe.rows(trajectories, model).score(model).logprob
    np.testing.assert_allclose([recipe.summary(t)[1] for t in trajectories], scored.numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["eval.backslide=true"], r"an evaluation in 4 steps \(sampler and eval.backslide\): sampler.choose does not"),
        (["eval.sampler={block_length: 4}"], r"leave sampler.block_length out"),
        (
            ["eval.sampler={choose: null}", "model.attention=block_causal", "model.block_length=4",
             "sampler.num_inference_steps=6", "eval.num_inference_steps=[6]"],
            r"an evaluation in 6 steps \(sampler and eval.sampler\)",
        ),
        (["sampler.selector=threshold", "sampler.choose={bound: [0.5, 0.9]}", "eval.sampler={selector: top_n}"],
         r"needs a selector that has one"),
        (["sft.trajectories=TRAJECTORIES"], r"set model.choices to how many there were"),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_refused_before(
    chooser: Any, overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_trajectories(tmp_path / "t.npz", token_engine(chooser(), options()).generate(requests(20)))
    overrides = [text.replace("TRAJECTORIES", str(tmp_path / "t.npz")) for text in overrides]
    arguments = runs.tiny_config(tmp_path, "model.choices=2", "sampler.choose={block_length: [1, 8]}", *overrides)
    assert main(["sft" if "t.npz" in overrides[0] else "check", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("blocks", "decisions"),
    [([], 2 * (16 + 16)), (["model.attention=block_causal", "model.block_length=4"], 2 * (16 + 1))],
    ids=["full", "blocks"],
)
def test_memory_is_planned_for_the_lengths_that_make_the_largest_rows(
    blocks: list[str], decisions: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rollouts of 16 tokens, and their choices. Full attention: a canvas a step. Blocks: of 16 in four copies."""

    def planned(choose: str, count: int) -> tuple[float, int, int]:
        """GiB of activations, tokens in the rows of a micro-batch, decisions in them."""
        chosen = [f"model.choices={count}", f"sampler.choose={{block_length: {choose}}}", *blocks]
        chosen.append("model.backbone.vocab_size=20")
        assert main(["check", *runs.tiny_config(tmp_path, *chosen), "--plan", "--ranks", "1"]) == 0
        pattern = r"activations ([\d.]+) \((\d+) row\(s\) of (\d+) tokens with (\d+) decisions"
        found = re.search(pattern, capsys.readouterr().out)
        assert found is not None
        return float(found[1]), int(found[2]) * int(found[3]), int(found[4])

    largest = planned("[1, 8, 16]", 3)
    assert largest == planned("[16, 1]", 2) and largest[2] == decisions
    for others in ("[2, 4]", "[4, 8]"):
        other = planned(others, 2)
        assert largest[0] >= other[0] and largest[1] > other[1]


@pytest.mark.parametrize("attention", ["full", "block_causal"])
def test_rl_learns_to_choose(attention: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Paid for few forwards alone, the policy takes longer blocks; learner and sampler agree at every step."""
    reward = "def dense(prompts, completions, num_forwards, **columns):\n    return [1 / n for n in num_forwards]\n"
    arguments = runs.tiny_config(
        tmp_path, "model.choices=2", "sampler.choose={block_length: [1, 8]}", "train.max_logprob_gap=1e-4",
        "train.steps=6", "sft.steps=0", f"model.attention={attention}", reward=reward,
    ) + (["model.block_length=4"] if attention == "block_causal" else [])  # fmt: skip
    assert main(["train", *arguments, "algorithm.name=espo"]) == 2
    assert "sampler.choose is trained with the tokens of the exact trace" in capsys.readouterr().err
    assert main(["train", *arguments, "train.block_schedule=[{until: 1, rollout: 4, train: 4}]"]) == 2
    assert "train.block_schedule" in capsys.readouterr().err
    runs.train_here(arguments)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    paid = [line["reward/mean"] for line in metrics if "reward/mean" in line]
    assert len(paid) == 6 and sum(paid[-2:]) > sum(paid[:2])
    bias = load_policy(ModelConfig(path=str(tmp_path / "run")), None, seed=0).choice_head.bias
    assert bias[1] > bias[0]
