"""Reward gradients through the image sampler: the sampler's own images, finite differences, memory, and real runs."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from rewards.load import load_reward
from rl.config import load_config
from rl.models.class_policy import ClassPolicy
from rl.recipes.class_tokens import ClassTokens
from rl.train.plan import check_run
from rl.train.reward_gradient import RewardGradientUpdater
from rl.train.run import Run
from rollouts.engines.base import SampleRequest
from rollouts.engines.latent import LatentEngine
from rollouts.samplers.gradient_latent import LatentSegment, gradient_rollout
from rollouts.samplers.latent_options import LatentSamplerOptions
from tests import runs
from tests.image_models import CLASSES, FLOW, rollouts, tiny_policy
from tests.test_images import image_config, unet
from tests.test_relaxed import SavedBytes

OPTIONS = LatentSamplerOptions(num_inference_steps=5, guidance_scale=2.0, min_std=0.02)
FLOW_OPTIONS = LatentSamplerOptions(kind="flow_sde", num_inference_steps=5)


def segments(
    policy: ClassPolicy,
    reference: ClassPolicy | None = None,
    options: LatentSamplerOptions = OPTIONS,
    count: int = 3,
    start: torch.Tensor | None = None,
    **settings: Any,
) -> list[LatentSegment]:
    """Rollouts with the prompts and seeds of `tests.image_models.rollouts`."""
    return list(generate(policy, reference, options, count, start, **settings))


def generate(
    policy: ClassPolicy,
    reference: ClassPolicy | None,
    options: LatentSamplerOptions,
    count: int = 3,
    start: torch.Tensor | None = None,
    **settings: Any,
) -> Any:
    engine = LatentEngine(policy, options, dtype=torch.float64)
    given = engine.encode([CLASSES[i % 3] for i in range(count)])
    seed = torch.arange(10, 10 + count)

    def through(model: ClassPolicy) -> Any:
        def predict(index: int, latent: torch.Tensor) -> torch.Tensor:
            timestep = torch.full((count,), engine.steps.timestep[index])
            return model.predict(latent, timestep, given, options.guidance_scale)

        return predict

    return gradient_rollout(
        through(policy),
        None if reference is None else through(reference),
        engine.steps,
        engine.noise(seed, 0) if start is None else start,
        lambda index: engine.noise(seed, index + 1),
        min_std=options.min_std,
        **settings,
    )


def reward(sample: torch.Tensor) -> torch.Tensor:
    flat = sample.flatten(1)
    return (flat * torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)).sum(1).tanh() + 0.1 * flat[:, 0] ** 2


@pytest.mark.parametrize("options", [OPTIONS, FLOW_OPTIONS], ids=["ddim", "flow"])
def test_the_images_are_the_samplers(options: LatentSamplerOptions) -> None:
    policy = tiny_policy(FLOW if options is FLOW_OPTIONS else None)
    trajectories = rollouts(policy, options)
    for settings in ({"gradient_steps": 5}, {"gradient_steps": 2, "recompute": True}):
        sample = segments(policy, options=options, **settings)[-1].sample
        assert sample is not None
        np.testing.assert_array_equal(sample.detach().numpy(), np.stack([t.latents[-1] for t in trajectories]))


def objective(parts: list[LatentSegment], alpha: float) -> torch.Tensor:
    assert parts[-1].sample is not None
    return reward(parts[-1].sample).sum() - alpha * torch.stack([part.kl for part in parts]).sum()


def moved(policy: ClassPolicy, direction: dict[str, torch.Tensor], step: float) -> ClassPolicy:
    other = tiny_policy(FLOW if policy.prediction_type == "flow" else None)
    with torch.no_grad():
        for (name, parameter), own in zip(other.named_parameters(), policy.parameters(), strict=True):
            parameter.copy_(own + step * direction[name])
    return other


@pytest.mark.parametrize(
    ("options", "alpha", "recompute"),
    [(OPTIONS, 0.0, False), (OPTIONS, 0.3, True), (FLOW_OPTIONS, 0.3, False)],
    ids=["ddim", "ddim with KL, recomputed", "flow with KL"],
)
def test_the_gradient_through_all_steps_is_the_finite_difference(
    options: LatentSamplerOptions, alpha: float, recompute: bool
) -> None:
    scheduler = FLOW if options is FLOW_OPTIONS else None
    policy, reference = tiny_policy(scheduler, seed=0), tiny_policy(scheduler, seed=1) if alpha else None
    settings = {"options": options, "gradient_steps": 5}
    objective(segments(policy, reference, recompute=recompute, **settings), alpha).backward()
    gradient = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = {n: torch.randn(p.shape, generator=generator).double() for n, p in policy.named_parameters()}
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                ends.append(objective(segments(moved(policy, direction, sign * 1e-6), reference, **settings), alpha))
        expected = float(ends[0] - ends[1]) / 2e-6
        ours = sum(float((g * direction[name]).sum()) for name, g in gradient.items())
        assert ours == pytest.approx(expected, rel=1e-5)
        assert abs(expected) > 0.01


def gradient_of(policy: ClassPolicy, **settings: Any) -> torch.Tensor:
    policy.zero_grad()
    objective(segments(policy, **settings), 0.0).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def test_the_last_k_steps_are_a_chain_that_starts_from_a_constant() -> None:
    """K of 5 steps: the finite difference of moving the weights in the last K steps alone."""
    policy = tiny_policy()
    start = torch.from_numpy(np.stack([t.latents[3] for t in rollouts(policy, OPTIONS)]))
    ours = gradient_of(policy, gradient_steps=2)
    engine = LatentEngine(policy, OPTIONS, dtype=torch.float64)
    given, seed = engine.encode(CLASSES), torch.arange(10, 13)
    latent = start
    from rollouts.samplers.gaussian import gaussian_step

    for index in (3, 4):
        output = policy.predict(latent, torch.full((3,), engine.steps.timestep[index]), given, 2.0)
        table = torch.from_numpy(engine.steps.coefficients[index]).expand(3, -1)
        std = torch.full((3,), engine.steps.std[index], dtype=torch.float64)
        latent = gaussian_step(table, std, None, output, latent, engine.noise(seed, index + 1))[0]
    policy.zero_grad()
    reward(latent).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert (ours - gradient_of(policy, gradient_steps=5)).abs().max() > 1e-3


def test_a_k_of_its_own_for_every_image() -> None:
    """The gradient of a batch is the sum of its images' gradients, each through its own number of steps."""
    policy = tiny_policy()
    length = torch.tensor([1, 4, 2])
    whole = gradient_of(policy, gradient_steps=4, length=length)
    parts = []
    for row, steps in enumerate(length.tolist()):
        policy.zero_grad()
        sample = segments(policy, gradient_steps=steps)[-1].sample
        assert sample is not None
        reward(sample)[row].backward()
        parts.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    torch.testing.assert_close(whole, torch.stack(parts).sum(0), rtol=0, atol=1e-12)


def test_the_path_kl_is_that_of_the_recorded_steps() -> None:
    from rl.estimators.gaussian_step import gaussian_rows

    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1)
    rows = gaussian_rows(rollouts(policy, OPTIONS), reduce="sum")
    rows.set_anchor(reference)
    with torch.no_grad():
        expected = torch.zeros(3, dtype=torch.float64).index_add(0, rows.trajectory, rows.score(policy).kl)
        parts = segments(policy, reference, gradient_steps=2)
    assert len(parts) == 4 and float(parts[0].kl.min()) > 0
    torch.testing.assert_close(torch.stack([part.kl for part in parts]).sum(0), expected)
    # Nothing is left to chance in steps without noise.
    assert len(rows.step) < 3 * 5


def peak_bytes(steps: int, **settings: Any) -> int:
    policy, reference, meter = tiny_policy(), tiny_policy(seed=1).requires_grad_(False), SavedBytes()
    options = OPTIONS.model_copy(update={"num_inference_steps": steps})
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda held: held.tensor):
        for segment in generate(policy, reference, options, **settings):
            loss = segment.kl.sum() if segment.sample is None else segment.kl.sum() - reward(segment.sample).sum()
            loss.backward()
            del loss, segment
    gc.collect()
    return meter.peak


def test_memory_grows_with_the_steps_that_have_a_gradient_and_not_with_all() -> None:
    assert peak_bytes(40, gradient_steps=3) == peak_bytes(10, gradient_steps=3)
    assert peak_bytes(10, gradient_steps=6) > 1.5 * peak_bytes(10, gradient_steps=3)
    plain = peak_bytes(10, gradient_steps=6) - peak_bytes(10, gradient_steps=3)
    kept = peak_bytes(10, gradient_steps=6, recompute=True) - peak_bytes(10, gradient_steps=3, recompute=True)
    assert kept < 0.2 * plain


ALIGNPROP = [
    "algorithm={name: alignprop, gradient_steps: 3, alpha: 0.001}",
    *("train.epochs=1", "train.max_logprob_gap=null", "train.steps=2", "sft.steps=0", "eval.num_prompts=20"),
]


BRIGHT = """
class Bright:
    differentiable = True

    def on_tensors(self, prompts, images, **columns):
        return images.flatten(1).mean(1)

    def __call__(self, prompts, completions, **columns):
        return [float(image.mean()) / 255 for image in completions]
"""


def test_updates_raise_the_reward_of_the_very_images(tmp_path: Path) -> None:
    """The same step again draws the same prompts and the same noise: only the weights have moved."""
    (tmp_path / "bright.py").write_text(BRIGHT)
    reward = f"reward.functions=[{{name: '{tmp_path}/bright.py:Bright'}}]"
    arguments = image_config(tmp_path, *ALIGNPROP, "algorithm.alpha=0.0", "train.optimizer.warmup_steps=0", reward)
    config = load_config(arguments[1], [*arguments[2:], "train.optimizer.lr=0.01"])
    with Run.open(config, write=False) as run:
        updater = RewardGradientUpdater(run, config.algorithm, 3)
        rewards = [updater.step(0).metrics["reward/mean"] for _ in range(4)]
    assert rewards == sorted(rewards) and rewards[-1] > rewards[0] + 0.003


def test_mmd_is_the_published_statistic_and_its_gradient(tmp_path: Path) -> None:
    """Pixels 0, 1 against 0, 0, 1 (rbf, gamma 1): e = exp(-1), MMD^2 = e - 2 (3 + 3 e) / 6 + (1 + 2 e) / 3."""
    np.save(tmp_path / "real.npy", np.array([0, 0, 255], np.uint8).reshape(3, 1, 1))
    reward = load_reward("mmd", {"images": str(tmp_path / "real.npy"), "gamma": 1.0})
    e = float(np.exp(-1))
    made = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1).requires_grad_()
    values = reward.on_tensors([], made)
    # Image 0: 2 (1 + 1 + e) / 3 - e - (1 + 2 e) / 3; image 1: 2 (e + e + 1) / 3 - e - (1 + 2 e) / 3.
    assert values.tolist() == pytest.approx([1 - e, (1 - e) / 3])
    assert -values.mean().item() == pytest.approx(e - (3 + 3 * e) / 3 + (1 + 2 * e) / 3)
    # The paper's loss by its own formula has the same gradient; a constant of the real images has none.
    x, y = made.flatten(), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    kernel = lambda a, b: (-((a[:, None] - b) ** 2)).exp()  # noqa: E731
    own = kernel(x, x)
    loss = (own.sum() - own.diagonal().sum()) / 2 - 2 * kernel(x, y).mean()
    (wanted,) = torch.autograd.grad(loss, made)
    torch.testing.assert_close(torch.autograd.grad(-values.mean(), made)[0], wanted)
    assert reward([], [np.zeros((1, 1), np.uint8), np.full((1, 1), 255, np.uint8)]) == pytest.approx(values.tolist())
    linear = load_reward("mmd", {"images": str(tmp_path / "real.npy"), "kernel": "polynomial", "degree": 1})
    # x y + 1: 1 between the two, 1 + 1/6 to the real ones, 1 among these.
    assert -linear.on_tensors([], made).mean().item() == pytest.approx(1 - 2 * (1 + 1 / 6) + 1)
    with pytest.raises(ValueError, match=r"raise train\.micro_batch_size to 2 or more"):
        reward.on_tensors([], made[:1])


def test_class_tokens_trains_the_embedding_and_nothing_else(tmp_path: Path) -> None:
    arguments = image_config(
        tmp_path, *ALIGNPROP, "algorithm={name: class_tokens}", "train.optimizer={lr: 0.01, warmup_steps: 0}"
    )
    runs.train_here([*arguments, "train.steps=1", "sft.steps=1"])
    before = load_file(tmp_path / "run" / "warm_start" / "unet" / "diffusion_pytorch_model.safetensors")
    moved = {name: np.abs(before[name] - value).max(-1) for name, value in unet(tmp_path / "run", 1).items()}
    assert [name for name, change in moved.items() if change.any()] == ["label.weight"]
    # Four prompts of ten classes learn; the null label does not.
    assert 1 <= (moved["label.weight"] > 1e-6).sum() <= 4 and moved["label.weight"][10] == 0
    with pytest.raises(ValueError, match=r"trains the class embedding of the built-in model: model\.path is a Linear"):
        ClassTokens().prepare(SimpleNamespace(model=torch.nn.Linear(1, 1)))


def test_a_run_counts_every_forward(tmp_path: Path) -> None:
    runs.train_here(image_config(tmp_path, *ALIGNPROP))
    lines = runs.lines(tmp_path / "run", "train")
    # 6 steps; the last two add next to no noise (sampler.min_std) and need no reference.
    assert lines[0]["cost/sequence_forwards"] == 16 * (6 + 4) and lines[0]["cost/backward_passes"] == 4
    assert abs(lines[0]["policy/path_kl"]) < 1e-9 < lines[1]["policy/path_kl"]


def test_micro_batches_and_recomputation_change_nothing(tmp_path: Path) -> None:
    uniform = ["algorithm.truncation=uniform", "sampler.guidance_scale=2.0"]
    runs.train_here(image_config(tmp_path / "whole", *ALIGNPROP, *uniform))
    cut = ["train.micro_batch_size=8", "algorithm.recompute=true"]
    runs.train_here(image_config(tmp_path / "cut", *ALIGNPROP, *uniform, *cut))
    one, other = unet(tmp_path / "whole" / "run", 2), unet(tmp_path / "cut" / "run", 2)
    assert max(float(np.abs(one[name] - other[name]).max()) for name in one) < 2e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.gradient_steps=7", r"algorithm.gradient_steps \(7\) must not exceed"),
        ("reward.functions=[{name: jpeg_compressibility}]", "reward 'jpeg_compressibility' has no gradient to images"),
        ("reward.functions=[]", "reward 'digit_judge' has no gradient to images"),
        ("algorithm.clip_low=0.1", "unknown config key 'algorithm.clip_low'"),
    ],
)
def test_mistakes_are_one_clear_line(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        runs.train_here(image_config(tmp_path, *ALIGNPROP, override))


def test_a_check_finds_what_a_reward_gradient_would_not_heed(tmp_path: Path) -> None:
    _, path, *overrides = image_config(tmp_path, *ALIGNPROP)
    check_run(load_config(path, overrides))
    with pytest.raises(ValueError, match=r"train\.updates_per_step is 2: a reward gradient samples anew"):
        check_run(load_config(path, [*overrides, "train.updates_per_step=2"]))


def test_adapters_alone_take_the_gradient(tmp_path: Path) -> None:
    """A tiny Stable Diffusion with LoRA: decoded pixels, and only the adapters learn."""
    from rl.model_section import LoraOptions, PipelineConfig
    from rl.models.diffusers_load import load_diffusers_policy
    from tests.tiny_pipelines import save_pipeline

    save_pipeline(tmp_path / "sd", "sd")
    options = PipelineConfig(gradient_checkpointing=True)
    policy: Any = load_diffusers_policy(str(tmp_path / "sd"), options, LoraOptions(rank=2))
    engine = LatentEngine(policy, LatentSamplerOptions(num_inference_steps=3, guidance_scale=2.0))
    requests = [SampleRequest("a cat", 1), SampleRequest("a dog", 2)]
    given, seed = engine.encode([r.prompt for r in requests]), torch.tensor([1, 2])

    def predict(index: int, latent: torch.Tensor) -> torch.Tensor:
        return policy.predict(latent, torch.full((2,), engine.steps.timestep[index]), given, 2.0)

    (segment,) = gradient_rollout(
        predict, None, engine.steps, engine.noise(seed, 0).float(), lambda i: engine.noise(seed, i + 1), 2
    )
    assert segment.sample is not None
    np.testing.assert_array_equal(segment.sample.detach(), np.stack([t.latents[-1] for t in engine.generate(requests)]))
    policy.decode(segment.sample).mean().backward()
    assert all(("lora" in name) == (p.grad is not None) for name, p in policy.denoiser.named_parameters())
    assert any(float(p.grad.abs().max()) > 0 for p in policy.denoiser.parameters() if p.grad is not None)
