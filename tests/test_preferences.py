"""Pairs of answers: the loss by hand and its slope, files of preferences and their mistakes, a run on each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rl.advantages import best_and_worst
from rl.batch import DecisionBatch
from rl.estimators.base import Verdicts
from rl.losses.preference import preference_loss
from rl.models.class_policy import new_policy
from rl.recipes.vrpo import VRPO
from rl.registry import parse_recipe
from rl.tasks.preferences import read_pairs
from rl.train.pairs import open_source
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.latent_options import LatentSamplerOptions
from rollouts.samplers.options import SamplerOptions
from tests.runs import lines, tiny_config, train_here
from tests.slopes import slopes
from tests.test_images import image_config

F64 = torch.float64


def pair_batch(logprob: torch.Tensor, reference: list[float], advantage: list[float]) -> DecisionBatch:
    zeros = torch.zeros(len(advantage), dtype=F64)
    given = (torch.tensor(values, dtype=F64) for values in (reference, advantage))
    return DecisionBatch(logprob, zeros, zeros, *given, zeros + 1 / len(advantage))


def test_the_loss_of_two_pairs_by_hand() -> None:
    """Scores 0.3 and -0.1 with the first preferred; 0.5 and 0.2 with the second. Beta 2: margins 0.8 and -0.6."""
    logprob = torch.tensor([-1.0, -2.0, -1.5, -1.0], dtype=F64, requires_grad=True)
    output = preference_loss(pair_batch(logprob, [-1.3, -1.9, -2.0, -1.2], [1, -1, -1, 1]), beta=2.0)
    first, second = math.log(1 + math.exp(-0.8)), math.log(1 + math.exp(0.6))
    assert output.loss.tolist() == pytest.approx([first, first, second, second])
    assert output.metrics["margin"].tolist() == pytest.approx([0.8, 0.8, -0.6, -0.6])
    assert output.metrics["preferred"].tolist() == [1, 1, 0, 0]
    (slope,) = torch.autograd.grad((output.loss / 4).sum(), logprob)
    # The mean over two pairs: beta / 2 sigmoid(-margin), up for the preferred side.
    push = [1 / (1 + math.exp(margin)) for margin in (0.8, -0.6)]
    assert slope.tolist() == pytest.approx([-push[0], push[0], push[1], -push[1]])
    with pytest.raises(AssertionError, match="side by side"):
        preference_loss(pair_batch(logprob, [0.0] * 4, [1, 1, -1, -1]), beta=2.0)
    assert preference_loss(pair_batch(logprob[:1], [0.0], [0.0]), beta=2.0).loss.shape == (1,)


def test_the_best_and_the_worst_of_a_prompt_are_a_pair() -> None:
    reward = torch.tensor([0.2, 0.9, 0.2, 1.0, 1.0, math.nan, 0.5, 0.5], dtype=F64)
    group = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    value = best_and_worst(reward, group)
    assert value[:2].tolist() == [-1, 1] and value[2:].isnan().all()
    assert torch.equal(VRPO().advantage(Verdicts(reward, group)).nan_to_num(), value.nan_to_num())


def loss_of(recipe: Any, model: Any, reference: Any, trajectories: Any) -> torch.Tensor:
    rows = recipe.rows(trajectories, model)
    with torch.no_grad():
        ref = rows.score(reference).logprob
    logprob = rows.score(model).logprob
    zeros = torch.zeros_like(ref)
    batch = DecisionBatch(logprob, zeros, zeros, ref, torch.tensor([1.0, -1.0, -1.0, 1.0]).to(ref), zeros + 0.25)
    return (recipe.loss(batch).loss * 0.25).sum()


def test_the_gradient_of_vrpo_is_its_slope_and_masks_are_shared(make_model) -> None:
    """Central differences; without training the margin is 0, because the reference sees the same masks."""
    model, reference = (make_model("gpt2-full", vocab_size=8, seed=seed) for seed in (0, 1))
    options = SamplerOptions(gen_length=4, num_inference_steps=2)
    trajectories = InProcessEngine(model, options).generate([Request([1, 2, 3], seed=s) for s in range(4)])
    recipe = parse_recipe({"name": "vrpo", "beta": 0.5, "draws": 2})
    size, slope = slopes(lambda: loss_of(recipe, model, reference, trajectories), list(model.parameters()))
    assert slope == pytest.approx(size, rel=1e-4)
    with torch.no_grad():
        assert float(loss_of(recipe, model, model, trajectories)) == pytest.approx(math.log(2), abs=1e-12)
        # The bound is of the whole answer: 4 tokens, where `espo` has it per token.
        whole = recipe.rows(trajectories, model).score(model).logprob
        single = parse_recipe({"name": "vrpo", "draws": 2}).rows(trajectories[:1], model)
        assert float(single.score(model).logprob) == pytest.approx(float(whole[0]), abs=1e-12)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 2 has no 'rejected'"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "row 2 has no 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "row 2: chosen and rejected are equal"),
        ({"chosen": "b", "rejected": "c"}, "row 2 has no prompt"),
        ({"chosen": turns("q", "b"), "rejected": turns("r", "c")}, "row 2: .* differ before their last turn"),
        (GOOD | {"score_chosen": 3, "score_rejected": 3}, "row 2: score_chosen 3 and score_rejected 3 are a tie"),
        (GOOD | {"score_chosen": 2, "score_rejected": 3}, "row 2: .* are the wrong way round"),
        (GOOD | {"chosen": [1]}, "row 2: column 'chosen' is a list, and not of messages"),
    ],
)
def test_a_row_that_is_no_preference_is_one_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_pairs(write(tmp_path / "pairs.jsonl", GOOD, row))
    assert "\n" not in str(caught.value)


def test_both_layouts_are_read(tmp_path: Path) -> None:
    whole = {"chosen": turns("q", "b"), "rejected": turns("q", "c")}
    first, second = read_pairs(write(tmp_path / "pairs.jsonl", GOOD | {"score_chosen": 2, "score_rejected": 1}, whole))
    assert first == GOOD
    assert second == {"prompt": turns("q"), "chosen": turns("q", "b")[1:], "rejected": turns("q", "c")[1:]}


def config(folder: Path, *options: str) -> list[str]:
    common = ["algorithm.entropy_coef=0", "algorithm.name=vrpo", "eval.num_prompts=2", "eval.viewer_items=0"]
    return tiny_config(folder, *common, "sft.steps=0", *options)


@pytest.mark.parametrize("model", ["full", "block_causal"])
def test_a_policy_learns_the_pairs_of_a_file(tmp_path: Path, model: str) -> None:
    """Every pair prefers 1s to 2s: the margin rises above 0 on all of them."""
    prompts = ["".join(str((7 * i + k) % 5) for k in range(16)) + "=" for i in range(4)]
    rows = [{"prompt": prompt, "chosen": "1" * 16, "rejected": "2" * 16} for prompt in prompts]
    options = ["train.steps=4", "train.epochs=1", f"algorithm.pairs={write(tmp_path / 'pairs.jsonl', *rows)}"]
    if model == "block_causal":
        options += ["model.attention=block_causal", "model.block_length=4", "sampler.block_length=4"]
    train_here(config(tmp_path, *options))
    train = lines(tmp_path / "run", "train")
    assert train[0]["policy/margin"] == pytest.approx(0, abs=1e-6) and train[0]["reward/mean"] == 0.5
    assert train[-1]["policy/margin"] > 0.1 and train[-1]["policy/preferred"] == 1
    assert train[-1]["policy/decisions"] == 16


def image_pairs(folder: Path) -> str:
    """The model shall draw white for every digit and not black: pictures, and once latents."""
    for name, shade in (("white", 255), ("black", 0)):
        Image.fromarray(np.full((8, 8), shade, dtype=np.uint8)).save(folder / f"{name}.png")
        np.save(folder / f"{name}.npy", np.full((1, 8, 8), shade / 127.5 - 1))
    rows = [{"prompt": str(digit), "chosen": "white.png", "rejected": "black.png"} for digit in range(3)]
    return write(folder / "pairs.jsonl", *rows, {"prompt": "3", "chosen": "white.npy", "rejected": "black.npy"})


def test_an_image_model_learns_the_pairs_of_a_file(tmp_path: Path) -> None:
    pairs = image_pairs(tmp_path)
    dpo = f"algorithm={{name: diffusion_dpo, beta: 5.0, num_draws: 4, pairs: {pairs}}}"
    options = ["sft.steps=0", "train.group_size=2", "train.epochs=1", "train.steps=6", "train.optimizer.lr=1e-2"]
    train_here(image_config(tmp_path, dpo, *options, "train.max_logprob_gap=null", "eval.num_prompts=4"))
    train = lines(tmp_path / "run", "train")
    assert train[0]["policy/margin"] == pytest.approx(0, abs=1e-6) and train[0]["reward/mean"] == 0.5
    assert train[-1]["policy/margin"] > 0.1 and train[-1]["policy/decisions"] == 8


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "grey.png"}, "row 1: there is no file .*grey.png"),
        ({"chosen": "pairs.jsonl"}, "row 1: .*jsonl is no picture"),
        ({"chosen": "small.png"}, r"row 1: .*small.png has \(4, 4\) pixels"),
        ({"rejected": "flat.npy"}, r"row 1: .*holds latents \[8, 8\]"),
        ({"prompt": turns("3")}, "row 1: a prompt of images must be text"),
    ],
)
def test_a_pair_of_images_that_is_none_is_one_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    image_pairs(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "small.png")
    np.save(tmp_path / "flat.npy", np.zeros((8, 8)))
    path = write(tmp_path / "wrong.jsonl", {"prompt": "3", "chosen": "white.png", "rejected": "black.png"} | row)
    model = SimpleNamespace(latent_shape=(1, 8, 8), image_size=(8, 8))
    asked = SimpleNamespace(algorithm=SimpleNamespace(preference_file=path))
    run: Any = SimpleNamespace(config=asked, modality=SimpleNamespace(name="images"), model=model)
    with pytest.raises(ValueError, match=message):
        open_source(run)


def test_a_picture_and_its_latents_are_the_same_pair(tmp_path: Path) -> None:
    asked = SimpleNamespace(preference_file=image_pairs(tmp_path))
    config = SimpleNamespace(algorithm=asked, sampler=LatentSamplerOptions())
    model = new_policy({"sample_size": 8, "width": 8, "num_blocks": 1}, {}, list("0123"), 0)
    run: Any = SimpleNamespace(config=config, modality=SimpleNamespace(name="images"), model=model)
    source: Any = open_source(run)
    for picture, stored in zip(*(source._trajectories(source.pairs[row], 0) for row in (0, 3)), strict=True):
        picture.validate()
        np.testing.assert_allclose(picture.latents, stored.latents, rtol=0, atol=1e-6)
        assert (int(picture.conditioning["label"]), int(stored.conditioning["label"])) == (0, 3)


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", {"prompt": "0=", "chosen": "1" * 90, "rejected": "2"})
    for options, message in [
        (["train.micro_batch_size=1"], r"train\.micro_batch_size \(1\) must be even"),
        ([f"algorithm.pairs={pairs}"], "row 1: prompt and 'chosen' have .* tokens, more than the model's 64"),
        ([f"algorithm.pairs={pairs}", "train.group_size=4"], r"vrpo needs train\.group_size=2"),
        (["algorithm.pairs=nowhere.jsonl"], "data file nowhere.jsonl does not exist"),
        (["algorithm.kl_to=reference", "algorithm.kl_coef=0.1"], r"algorithm\.kl_to"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_here(config(tmp_path, *options))
    assert not lines(tmp_path / "run", "train")
