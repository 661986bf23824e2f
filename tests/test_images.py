"""Image runs through the one loop: supervised start, RL with every recipe, evaluation, resume; the digits task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from rewards.digits import DigitClassifier, DigitJudge, digits
from rl.cli import main
from rl.config import load_config
from rl.estimators.denoising import noised
from rl.evaluation.compare import ComparisonPlan, _warm_start
from rl.models.class_policy import ClassPolicy, new_policy
from rl.tasks.digits import DigitsTask
from rl.track.report import write_report
from rollouts.engines.latent import LatentEngine
from rollouts.samplers.gaussian import make_steps, predicted_x0
from rollouts.samplers.latent_options import LatentSamplerOptions
from tests.runs import ZERO, cli, lines, series, train_here


def image_config(folder: Path, *overrides: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "run": {"output_dir": str(folder / "run"), "device": "cpu", "num_threads": 1},
        "model": {"backbone": {"width": 24, "num_blocks": 1}},
        "task": {"name": "digits", "params": {"label_noise": 0.5}},
        "sampler": {"num_inference_steps": 6, "min_std": 0.02},
        "reward": {"functions": [{"name": "digit_classifier", "params": {"value": "logprob"}}]},
        "sft": {"steps": 3, "batch_size": 16},
        "algorithm": {"name": "b2_diffurl", "num_steps": 6, "branches": 4, "first_interval": 3, "interval_steps": 3},
        "train": {
            "steps": 3,
            "prompts_per_step": 4,
            "group_size": 4,
            "epochs": 2,
            "max_logprob_gap": 1e-4,
            "deepspeed": ZERO[0],
        },
        "filters": {"drop_zero_variance": False},
        "eval": {"num_inference_steps": [6], "num_prompts": 40, "viewer_items": 0},
        "checkpoint": {"every": 1, "keep": 5},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path), *overrides]


def unet(run: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / f"step_{step}" / "hf" / "unet" / "diffusion_pytorch_model.safetensors")


RUNS = {
    "b2_diffurl": [],
    "ddpo": ["algorithm={name: ddpo, kl_to: reference, kl_coef: 0.1, min_count: 2}"],
    "flow_grpo": [
        "algorithm={name: flow_grpo, shared_noise: 4}",
        "model.scheduler={name: FlowMatchEulerDiscreteScheduler}",
        "sampler.kind=flow_sde",
        "sampler.guidance_scale=2.0",
    ],
    "mix_grpo": [
        "algorithm={name: mix_grpo, window_size: 2, window_interval: 1}",
        "model.scheduler={name: FlowMatchEulerDiscreteScheduler}",
        "sampler.kind=flow_cps",
    ],
    "diffusion_nft": ["algorithm={name: diffusion_nft, num_draws: 3}", "sampler.eta=0.0"],
    "branch_grpo": ["algorithm={name: branch_grpo, branch_steps: [1, 3]}"],
}


def test_the_exact_kl_is_to_the_policy_that_rl_started_from(tmp_path: Path) -> None:
    """With one update a step, the KL to the policy that sampled would be 0 in every step."""
    once = ["train.steps=2", "train.epochs=1", "train.optimizer={lr: 1e-3, warmup_steps: 0}"]
    train_here(image_config(tmp_path, *RUNS["ddpo"], *once))
    first, second = series(tmp_path / "run", "train", "policy/kl")
    assert abs(first) < 1e-9 < 1e-6 < second


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_through_the_loop(name: str, tmp_path: Path) -> None:
    train_here(image_config(tmp_path, *RUNS[name]))
    run = tmp_path / "run"
    before, after = load_file(run / "warm_start" / "unet" / "diffusion_pytorch_model.safetensors"), unet(run, 3)
    assert max(float(np.abs(before[k] - after[k]).max()) for k in before) > 1e-5
    train = lines(run, "train")
    if name == "diffusion_nft":  # it scores clean samples under fresh noise: no recorded decision, so no gap
        assert not any("policy/logprob_gap_max" in line for line in train)
    else:  # the first update's ratio is 1 to rounding; the run would have stopped above max_logprob_gap
        assert max(series(run, "train", "policy/logprob_gap_max")) < 1e-4
    assert [line["cost/reward_queries"] for line in train] == [16, 32, 48]
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["after"]["6"] <= 1
    names = {"precision", "recall", "frechet", "vendi", "vendi_correct", "distance_correct"}
    assert set(summary["after_quality"]["6"]) == names


def test_a_finished_supervised_stage_is_not_repeated(tmp_path: Path) -> None:
    """The folder is there when it is whole; a comparison takes it for every variant of the seed."""
    arguments = image_config(tmp_path, f"run.output_dir={tmp_path / 'out' / 'warm-0'}")
    assert main(["sft", *arguments]) == 0
    assert ClassPolicy.from_pretrained(tmp_path / "out" / "warm-0" / "model").classes == list("0123456789")
    assert not list((tmp_path / "out" / "warm-0").glob("*.partial"))
    _warm_start(ComparisonPlan(arguments[1], {}, (0,), tmp_path / "out"), load_config(arguments[1]), 0)
    assert not (tmp_path / "out" / "warm-0.log").exists()


def test_branches_share_the_cost_of_their_prefix(tmp_path: Path) -> None:
    """First step of the run: interval of 3 of 6 steps, 4 trees of 4 branches; then every scored row, 2 epochs."""
    train_here(image_config(tmp_path, "train.steps=1"))
    line = lines(tmp_path / "run", "train")[0]
    sampled = 4 * 3 + 16 * 3
    trained = 2 * line["policy/decisions"] / 2
    assert line["cost/sequence_forwards"] == sampled + trained


@pytest.mark.parametrize("where", ["image", "latent"])
def test_a_sample_that_is_not_finite_has_failed(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN would be cast to a black image, and a black image has a reward; a NaN latent would make the loss NaN."""
    decode, noise = ClassPolicy.decode, LatentEngine.noise

    def damaged(policy: ClassPolicy, latents: torch.Tensor) -> torch.Tensor:
        pixels = decode(policy, latents)
        pixels[:1, :, 2, 3] = torch.nan
        return pixels

    def broken(engine: LatentEngine, seed: torch.Tensor, step: int) -> torch.Tensor:
        drawn = noise(engine, seed, step)
        # After the branch point: the other leaves of the first tree are whole.
        drawn[:1, :, 2, 3] = torch.nan if step == 5 else drawn[:1, :, 2, 3]
        return drawn

    if where == "image":
        monkeypatch.setattr(ClassPolicy, "decode", damaged)
    else:
        monkeypatch.setattr(LatentEngine, "noise", broken)
    train_here(image_config(tmp_path, "sft.steps=0", "train.steps=1", "eval.viewer_items=2", "algorithm.kl_coef=0.1",
                            "algorithm.kl_to=reference", "reward.max_failure_share=0.1"))  # fmt: skip
    (line,) = lines(tmp_path / "run", "train")
    assert line["reward/masked"] == line["filters/unscored"] == line["reward/digit_classifier/failures"] == 1
    first, second, *_ = (json.loads(text) for text in (tmp_path / "run" / "samples.jsonl").read_text().splitlines())
    assert (first["completion"], first["reward"]) == ("", None) and second["reward"] is not None
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["after_unscored"] == {"6": 1}
    assert "Failed rewards: 1." in write_report(tmp_path / "run").read_text()


def test_steps_scored_a_few_at_a_time_change_nothing(tmp_path: Path) -> None:
    train_here(image_config(tmp_path / "whole", "train.steps=1"))
    train_here(image_config(tmp_path / "cut", "train.steps=1", "train.micro_batch_steps=2", "train.micro_batch_size=4"))
    one, other = unet(tmp_path / "whole" / "run", 1), unet(tmp_path / "cut" / "run", 1)
    assert max(float(np.abs(one[name] - other[name]).max()) for name in one) < 2e-6
    whole, cut = (lines(tmp_path / name / "run", "train")[0] for name in ("whole", "cut"))
    assert cut["cost/backward_passes"] > whole["cost/backward_passes"]
    for name in ("policy/decisions", "cost/sequence_forwards"):
        assert cut[name] == whole[name]
    with pytest.raises(ValueError, match=r"train\.micro_batch_steps needs a recipe with an advantage for every step"):
        train_here(image_config(tmp_path / "nft", *RUNS["diffusion_nft"], "train.micro_batch_steps=2"))


def test_resume_repeats_the_run_with_its_history(tmp_path: Path) -> None:
    """Killed after step 1, the run ends with the very weights it would have had, histories of prompts included."""
    whole = image_config(tmp_path / "whole")
    train_here(whole)
    shutil.copytree(tmp_path / "whole" / "run", tmp_path / "run")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step}")
    train_here([*whole, f"run.output_dir={tmp_path / 'run'}", "run.resume=true"])
    one, other = unet(tmp_path / "whole" / "run", 3), unet(tmp_path / "run", 3)
    assert all((one[name] == other[name]).all() for name in one)
    assert lines(tmp_path / "run", "train") == lines(tmp_path / "whole" / "run", "train")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm={name: tracerl}"], "algorithm.name 'tracerl' trains text"),
        (["task={name: sudoku}", "sampler={}"], "algorithm.name 'b2_diffurl' trains images"),
        (["sampler.num_inference_steps=8"], "algorithm.num_steps must be"),
        (["train.mixed_steps=[2]"], "train.mixed_steps is for text"),
        (["model.path=./nowhere"], "model.path './nowhere' is not a folder"),
        (["algorithm={name: flow_grpo}"], "needs sampler.kind=flow_sde"),
    ],
)
def test_a_config_that_cannot_run_is_one_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    from rl.train.plan import check_run

    arguments = image_config(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_run(load_config(arguments[1], overrides))


def test_the_command_ends_with_code_2(tmp_path: Path) -> None:
    result = cli("train", *image_config(tmp_path, "algorithm={name: tracerl}"))
    assert result.returncode == 2 and result.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_supervised_target_is_what_the_sampler_expects(kind: str) -> None:
    """A model that hits its target exactly predicts the clean image: training and sampling agree on the convention."""
    flow = kind == "flow"
    scheduler = {"name": "FlowMatchEulerDiscreteScheduler"} if flow else {"name": "DDIMScheduler"}
    policy = new_policy({}, scheduler if flow else {**scheduler, "prediction_type": kind}, "0123456789", 0)
    steps = make_steps(policy.scheduler, LatentSamplerOptions(kind="flow_sde" if flow else "ddim"))
    data, noise = torch.randn(20, 1, 8, 8).double(), torch.randn(20, 1, 8, 8).double()
    mixed, target, timestep = noised(policy.scheduler, kind, data, noise, (steps.timestep + 0.5 * (not flow)) / 1000)
    np.testing.assert_allclose(timestep.double().numpy(), steps.timestep, rtol=1e-6)
    x0 = predicted_x0(torch.from_numpy(steps.coefficients), None, target, mixed)
    torch.testing.assert_close(x0, data, rtol=1e-3, atol=2e-4)


def test_a_policy_survives_its_folder(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    unet_config = {
        "model_type": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4,
        "block_out_channels": [8, 8], "layers_per_block": 1, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 4,
    }  # fmt: skip
    for name, backbone in (("mlp", {}), ("unet", unet_config)):
        policy = new_policy(backbone, {}, "0123456789", 3)
        policy.save_pretrained(tmp_path / name)
        loaded = ClassPolicy.from_pretrained(tmp_path / name)
        given = policy.encode(["3", ""])
        latents, time = torch.randn(2, 1, 8, 8), torch.tensor([10, 900])
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.predict(latents, time, given, 2.0), policy.predict(latents, time, given, 2.0), rtol=0, atol=0
            )
        assert loaded.scheduler.config["steps_offset"] == 1
    assert isinstance(UNet2DModel.from_pretrained(tmp_path / "unet", subfolder="unet"), UNet2DModel)
    with pytest.raises(ValueError, match="not a class of the model"):
        policy.encode(["ten"])
    shutil.rmtree(tmp_path / "mlp" / "scheduler")
    with pytest.raises(ValueError, match="no folder 'scheduler'"):
        ClassPolicy.from_pretrained(tmp_path / "mlp")


def test_the_halves_share_nothing_and_the_judges_can_tell_digits() -> None:
    (train, train_labels), (judge, judge_labels) = digits("train"), digits("judge")
    assert len(train) + len(judge) == 1797
    probability = np.array(DigitClassifier()([], list(judge), label=judge_labels.tolist()))
    assert probability.mean() > 0.85
    verdicts = [score.value for score in DigitJudge()([], list(train), label=train_labels.tolist())]
    assert np.mean(verdicts) > 0.98  # type: ignore[arg-type]
    # Noise is nobody's digit: the reward stays near a tenth.
    noise = list(np.random.default_rng(0).integers(0, 256, (200, 8, 8)).astype(np.uint8))
    assert np.mean(DigitClassifier()([], noise, label=[3] * 200)) < 0.25


def test_the_reward_with_gradients_is_the_reward() -> None:
    images, labels = digits("judge")
    reward = DigitClassifier(value="logprob")
    pixels = torch.from_numpy(images[:50, None] / 255).requires_grad_()
    value = reward.on_tensors([], pixels, label=labels[:50].tolist())
    np.testing.assert_allclose(value.detach().numpy(), reward([], list(images[:50]), label=labels[:50]), atol=1e-9)
    value.sum().backward()
    assert pixels.grad is not None and bool((pixels.grad.flatten(1).abs().sum(1) > 0).all())


def test_label_noise_is_a_property_of_the_image() -> None:
    rows = DigitsTask(label_noise=0.7).train_examples(0, 0, 3000)
    images, labels = digits("train")
    place = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    right = np.mean([row["label"] == place[row["image"].tobytes()] for row in rows])
    assert abs(right - (0.3 + 0.7 / 10)) < 0.05
    assert all(row["prompt"] == str(row["label"]) for row in rows)
    seen: dict[bytes, set[int]] = {}
    for row in rows:
        seen.setdefault(row["image"].tobytes(), set()).add(row["label"])
    # Copies of one image in the data would be allowed two labels; there are none.
    assert all(len(given) == 1 for given in seen.values())
