"""CTRL: new conditions on a trained model, a classifier of them as reward, and the law that is their optimum."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards.levels import LevelLogprob, LevelReached
from rewards.soft import SoftReward, one_hot_of
from rl.config import load_config
from rl.model_section import ModelConfig
from rl.models.class_policy import ClassPolicy, new_policy
from rl.models.load import load_policy, save_policy
from rl.models.tokenizers import load_tokenizer
from rl.tasks.base import Example
from rl.tasks.dna import DnaTask
from rl.train.plan import check_run
from tests import runs
from tests.image_models import tiny_policy
from tests.test_images import image_config

LENGTH, NOISE, BOUNDS = 4, 0.7, ([None, 1.5], [1.5, None])
CONDITIONS = {"0": ">", "1": ">"}


class Count(SoftReward):
    """How many b there are."""

    alphabet = "ab"

    def soft(self, prompts: Any, completions: torch.Tensor, **columns: Any) -> torch.Tensor:
        return completions[..., 1].sum(1)


class ToyTask:
    """Words of four letters, few of them b; with conditions the prompt says whether there are to be many."""

    reward, grid, alphabet, ends = "tests.test_ctrl:Count", None, "ab>", False

    def __init__(self, conditions: bool = False):
        self.conditions = conditions

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        words = torch.rand(count, LENGTH, generator=generator) < 0.3
        rows = [{"answer": "".join("ab"[int(b)] for b in word)} for word in words]
        if not self.conditions:
            return [{"prompt": ">", **row} for row in rows]
        return [{"prompt": str(i % 2), "between": BOUNDS[i % 2], **row} for i, row in enumerate(rows)]

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        return self.train_examples(seed, 999, count)

    def file_examples(self, path: str) -> list[Example]:
        raise ValueError(path)


def toy_config(folder: Path, *overrides: str, **sections: Any) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "run": {"output_dir": str(folder / "run"), "device": "cpu", "num_threads": 1},
        "model": {"backbone": {"model_type": "dilated_conv", "hidden_size": 16, "kernel_size": 9, "dilations": [1]}},
        "task": {"name": "tests.test_ctrl:ToyTask"},
        "sampler": {"gen_length": LENGTH, "num_inference_steps": LENGTH, "selector": "left_most"},
        "eval": {"num_inference_steps": [LENGTH], "num_prompts": 2, "viewer_items": 0},
        "train": {"steps": 0},
        **sections,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return ["--config", str(folder / "config.json"), *overrides]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pretrained")
    optimizer = {"lr": 0.02, "warmup_steps": 1}
    runs.train_here(toy_config(folder, sft={"steps": 40, "batch_size": 64, "optimizer": optimizer}))
    return str(folder / "run" / "warm_start")


def conditioned(pretrained: str, folder: Path, *overrides: str, **algorithm: Any) -> list[str]:
    return toy_config(
        folder,
        *overrides,
        model={"path": pretrained, "conditions": CONDITIONS, "never_generate": [">"]},
        task={"name": "tests.test_ctrl:ToyTask", "params": {"conditions": True}},
        reward={
            "functions": [
                {"name": "level_logprob", "params": {"reward": {"name": "tests.test_ctrl:Count"}, "noise": NOISE}}
            ]
        },
        filters={"drop_zero_variance": False},
        algorithm={"name": "ctrl", **algorithm},
        train={
            "prompts_per_step": 2,
            "group_size": 64,
            "optimizer": {"lr": 0.02, "schedule": "linear", "warmup_steps": 1},
        },
    )


def policy_of(path: str, **options: Any) -> tuple[Any, Any]:
    config = ModelConfig(path=path, **options)
    tokenizer = load_tokenizer(config, ToyTask())
    return load_policy(config, tokenizer, seed=0), tokenizer


def law_of(path: str, prompt: str) -> torch.Tensor:
    """[16]: exact probability of every word, decoded left to right."""
    model, tokenizer = policy_of(path, conditions=CONDITIONS, never_generate=[">"])
    words = torch.tensor([tokenizer(w, add_special_tokens=False).input_ids for w in WORDS])
    start = torch.tensor(tokenizer(prompt, add_special_tokens=False).input_ids)
    total = torch.zeros(len(words))
    for i in range(LENGTH):
        canvas = torch.full((len(words), 1 + LENGTH), tokenizer.mask_token_id)
        canvas[:, 0] = start
        canvas[:, 1 : 1 + i] = words[:, :i]
        with torch.no_grad():
            logp = model(canvas)[:, 1 + i].log_softmax(-1)
        total += logp.gather(1, words[:, i : i + 1])[:, 0]
    return total.exp()


WORDS = ["".join(letters) for letters in itertools.product("ab", repeat=LENGTH)]


def classifier(level: int) -> torch.Tensor:
    """[16] p(level | word), by hand."""
    few = torch.tensor([0.5 * math.erfc((word.count("b") - 1.5) / NOISE / 2**0.5) for word in WORDS])
    return 1 - few if level else few


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    return float(0.5 * (p - q).abs().sum())


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_every_condition_comes_near_its_optimum(pretrained: str, tmp_path: Path, gamma: float) -> None:
    """p_pre(x) p(y | x)^gamma / Z_y, enumerated; real rollouts, rewards, reference and learner."""
    start = law_of(pretrained, ">")
    runs.train_here(conditioned(pretrained, tmp_path, "train.steps=60", gradient="score_function", gamma=gamma))
    lines = runs.lines(tmp_path / "run", "train")
    assert abs(lines[0]["policy/path_kl"]) < 1e-5 and lines[0]["policy/logprob_gap_max"] < 1e-4
    trained = str(tmp_path / "run" / "checkpoints" / "step_60" / "hf")
    for level in (0, 1):
        # Untrained, a condition is the pretrained model.
        torch.testing.assert_close(law_of(pretrained, str(level)), start)
        optimum = start * classifier(level) ** gamma
        optimum = optimum / optimum.sum()
        assert distance(start, optimum) > 0.2
        assert distance(law_of(trained, str(level)), optimum) < 0.05
    # What the pretrained model did without a condition is hardly part of the loss and free to move; its row is not.
    before, after = (policy_of(path)[0].get_input_embeddings().weight for path in (pretrained, trained))
    assert torch.equal(before[2], after[2]) and not torch.equal(after[4], after[5])


def test_the_pathwise_gradient_raises_both_conditions(pretrained: str, tmp_path: Path) -> None:
    options = {"gradient": "pathwise", "gamma": 10.0, "relaxed": {"relaxed_steps": 2}}
    runs.train_here(conditioned(pretrained, tmp_path, "train.steps=30", "train.group_size=32", **options))
    lines = runs.lines(tmp_path / "run", "train")
    assert abs(lines[0]["policy/path_kl"]) < 1e-5 < lines[-1]["policy/path_kl"]
    trained = str(tmp_path / "run" / "checkpoints" / "step_30" / "hf")
    for level in (0, 1):
        logprob = classifier(level).log()
        before, after = ((law_of(path, str(level)) * logprob).sum() for path in (pretrained, trained))
        assert after > before + 0.1


def test_conditions_are_new_rows_that_nothing_generates(pretrained: str, tmp_path: Path) -> None:
    model, tokenizer = policy_of(pretrained, conditions=CONDITIONS)
    known, _ = policy_of(pretrained)
    ids = tokenizer.convert_tokens_to_ids(["0", "1"])
    assert ids == [4, 5] and model.vocab_size == 6 == len(model.lm_head.weight)
    assert model.excluded_token_ids == [[4, 6]]
    assert torch.equal(model.get_input_embeddings().weight[:4], known.get_input_embeddings().weight)
    with torch.no_grad():
        model.get_input_embeddings().weight[4] += 1.0
    save_policy(model, tokenizer, tmp_path / "one")
    again, tokenizer = policy_of(str(tmp_path / "one"), conditions={**CONDITIONS, "2": "a"})
    table = again.get_input_embeddings().weight
    # What was trained stays, what is new starts as what it is told to.
    assert torch.equal(table[:6], model.get_input_embeddings().weight) and torch.equal(table[6], table[0])
    assert tokenizer.decode(tokenizer("2ab", add_special_tokens=False).input_ids) == "2ab"
    plain, _ = policy_of(str(tmp_path / "one"))
    assert plain.config.conditions == CONDITIONS and plain.excluded_token_ids == [[4, 6]]


def test_a_tied_head_grows_with_its_embedding() -> None:
    from rl.model_section import LoraOptions
    from rl.models.conditions import add_to_model
    from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
    from rl.models.lora import add_adapters

    backbone = {"model_type": "qwen3", "vocab_size": 5, **{k: v for k, v in runs.QWEN3.items() if k != "model_type"}}
    model = DiffusionLM(DiffusionLMConfig(backbone=backbone, mask_token_id=4, tie_word_embeddings=True)).eval()
    before = model(torch.tensor([[0, 4, 4]]))
    model.grow(2)
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.vocab_size == 7
    torch.testing.assert_close(model(torch.tensor([[0, 4, 4]]))[..., :5], before)
    add_adapters(model, LoraOptions(rank=2), "base", seed=0)
    with pytest.raises(ValueError, match=r"which adapters leave alone: set model\.lora\.rank to 0"):
        add_to_model(model, None, CONDITIONS)


def test_mistakes_are_one_clear_line(pretrained: str, tmp_path: Path) -> None:
    for conditions, message in (
        ({"a": ">"}, "'a' is a token of the model already, name a new one"),
        ({"0": "c"}, "'0' is to start as 'c', which is no token of the model"),
        ({"0": "1", "1": ">"}, "'0' is to start as '1', which is no token of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            policy_of(pretrained, conditions=conditions)
    new = ModelConfig(backbone={"model_type": "dilated_conv"}, conditions=CONDITIONS)
    with pytest.raises(ValueError, match=r"model\.conditions are added to a trained model: set model\.path"):
        load_policy(new, load_tokenizer(new, ToyTask()), seed=0)
    _, path, *overrides = conditioned(pretrained, tmp_path, "model.conditions={}")
    with pytest.raises(ValueError, match=r"ctrl needs model\.conditions: name a new token for every condition"):
        check_run(load_config(path, overrides))
    with pytest.raises(ValueError, match="noise must be positive"):
        LevelLogprob({"name": "motif_activity"}, 0.0)
    with pytest.raises(ValueError, match="the rows have no column between"):
        LevelLogprob({"name": "motif_activity"}, 0.3).soft(["x"], one_hot_of(["ACGT"], "ACGT"))
    with pytest.raises(ValueError, match="'sudoku' has no gradient"):
        LevelLogprob({"name": "sudoku"}, 1.0)


def test_the_log_probability_of_a_level_by_hand() -> None:
    reward = LevelLogprob({"name": "tests.test_ctrl:Count"}, 0.5)
    texts, between = ["abbb", "aaaa", "abab", "bbbb"], [[2.0, 4.0], [None, 1.0], [0.5, None], [-9.0, 0.0]]
    ends = [(-2.0, 2.0), (-math.inf, 2.0), (-3.0, math.inf), (-26.0, -8.0)]
    # Phi(b) - Phi(a); the last is far out, where only its logarithm is a number of this size.
    exact = [math.log(0.5 * (math.erfc(-b / 2**0.5) - math.erfc(-a / 2**0.5))) for a, b in ends]
    values = [score.value for score in reward([""] * 4, texts, between=between)]
    assert values == pytest.approx(exact, rel=1e-5)
    x = (0.8 * one_hot_of(texts, "ab") + 0.1).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda y: reward.soft([""] * 4, y, between=between), x)


def test_the_task_asks_for_levels_and_judges_them_by_the_truth() -> None:
    task = DnaTask(levels=[0.5, 1.5])
    rows = task.train_examples(0, 0, 6)
    assert task.reward == "level_reached"
    assert [row["prompt"] for row in rows] == ["0", "1", "2"] * 2
    assert [row["between"] for row in rows[:3]] == [[None, 0.5], [0.5, 1.5], [1.5, None]]
    sites = "GTTAATAATT" + "TGTTTACTTA" + "ATTACGCAAT" + "A" * 10
    scores = LevelReached()(["2"] * 4, [sites, sites, "A" * 40, ""], between=[*BOUNDS[::-1], [None, 0.5], [None, 0.5]])
    assert [score.value for score in scores] == [1.0, 0.0, 1.0, None]
    with pytest.raises(ValueError, match=r"task\.params\.levels must grow"):
        DnaTask(levels=[1.0, 1.0])


def test_new_classes_of_an_image_model_start_as_the_ones_they_name(tmp_path: Path) -> None:
    policy = tiny_policy()
    latents, time = torch.randn(2, *policy.latent_shape).double(), torch.full((2,), 300)

    def outputs(of: ClassPolicy, *prompts: str) -> torch.Tensor:
        with torch.no_grad():
            return of.predict(latents, time, of.encode(prompts), 1.0)

    before = outputs(policy, "one", "")
    policy.add_classes({"thin": "one", "thick": "two", "zero": "two"})
    # What is there stays, the null label too, which has moved to the end.
    assert policy.classes == ["zero", "one", "two", "thin", "thick"] and policy.encode([""])["label"].item() == 5
    assert torch.equal(outputs(policy, "one", ""), before) and torch.equal(outputs(policy, "thin", ""), before)
    assert torch.equal(outputs(policy, "thick", "zero")[:1], outputs(policy, "two", "zero")[:1])
    policy.save_pretrained(tmp_path)
    again = ClassPolicy.from_pretrained(tmp_path).double()
    assert again.classes == policy.classes and torch.equal(outputs(again, "thin", ""), before)
    with pytest.raises(ValueError, match=r"model\.conditions: 'thin' is to start as 'three', which is no class"):
        tiny_policy().add_classes({"thin": "three"})
    letters = new_policy({"model_type": "word_denoiser"}, {}, "abcdefghijkl", 0)
    with pytest.raises(ValueError, match="need one embedding of the classes: WordDenoiser has 0"):
        letters.add_classes({"x": "a"})


def test_an_image_model_without_conditions_learns_them_from_a_classifier(tmp_path: Path) -> None:
    """Every condition begins as the pretrained model, so the path KL begins at 0; the old class stays."""
    untold = ["task.params={told: false}", "train.steps=0", "algorithm={name: alignprop}"]
    untold += ["sft={steps: 100, batch_size: 64, optimizer: {lr: 0.01}}", "model.scheduler={prediction_type: sample}"]
    runs.train_here(image_config(tmp_path / "start", *untold))
    start = str(tmp_path / "start" / "run" / "warm_start")
    conditions = "{" + ", ".join(f'"{digit}": digit' for digit in range(10)) + "}"
    runs.train_here(
        image_config(
            *(tmp_path, f"model={{path: {start}, conditions: {conditions}}}", "task.params={}", "sft.steps=0"),
            *("algorithm={name: class_tokens, gradient_steps: 6, alpha: 0.1}", "train.epochs=1", "train.steps=4"),
            *("train.optimizer={lr: 0.1, weight_decay: 0.0, warmup_steps: 0}", "train.max_logprob_gap=null"),
            *("train.prompts_per_step=10", "train.group_size=8"),
        )
    )
    lines = runs.lines(tmp_path / "run", "train")
    assert abs(lines[0]["policy/path_kl"]) < 1e-9 < lines[-1]["policy/path_kl"]
    assert lines[-1]["reward/mean"] > lines[0]["reward/mean"] + 0.1
    before = ClassPolicy.from_pretrained(start)
    after = ClassPolicy.from_pretrained(tmp_path / "run" / "checkpoints" / "step_4" / "hf")
    classes, trained = before.class_table().weight, after.class_table().weight
    assert torch.equal(trained[[0, -1]], classes) and len(trained) == 12
    assert (trained[1:-1] - classes[0]).abs().max(1).values.min() > 1e-3
    assert torch.equal(*(policy.unet.get_parameter("out.weight") for policy in (before, after)))
    with pytest.raises(ValueError, match=r"model\.conditions are added to a trained model of the built-in kind"):
        runs.train_here(image_config(tmp_path / "new", 'model.conditions={"7": digit}'))
