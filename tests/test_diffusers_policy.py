"""diffusers pipelines as policies, against the pipelines themselves: tiny random ones in the published layouts."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from rl.estimators.gaussian_step import gaussian_rows
from rl.model_section import LoraOptions, PipelineConfig
from rl.models.diffusers_load import FAMILIES as KNOWN
from rl.models.diffusers_load import load_diffusers_policy
from rl.models.diffusers_policy import DiffusersPolicy
from rl.models.pipelines import SCHEDULERS, check_folder
from rollouts.engines.base import SampleRequest
from rollouts.engines.latent import LatentEngine
from rollouts.model_protocol import ImagePolicy
from rollouts.samplers.latent_options import LatentSamplerOptions
from tests.tiny_pipelines import FAMILIES, SIZE, save_pipeline

PROMPTS = ["a cat on a bike", "two dogs"]
GUIDANCE = {"sd": 5.0, "sdxl": 5.0, "sd3": 4.5, "flux": 3.5, "flux-schnell": 1.0, "sana": 4.5, "z-image": 4.0}
LENGTHS = {"sd3": {"max_sequence_length": 12}, "flux": {"max_sequence_length": 12}}
GUIDANCE |= {"flux2": 4.0, "qwen": 4.0}
# Qwen-Image's own words stand before a prompt; FLUX.2's pipeline has no negative prompt.
LENGTHS |= {"flux2": {"max_sequence_length": 12}, "qwen": {"max_sequence_length": 256}}
LENGTHS["flux-schnell"] = LENGTHS["sana"] = LENGTHS["z-image"] = LENGTHS["flux"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pipelines")
    for family in FAMILIES:
        save_pipeline(root / family, family)
    return {family: str(root / family) for family in FAMILIES}


def size_of(family: str) -> tuple[int, int]:
    """Height and width; Sana's pipeline asks for multiples of 32."""
    return (32, 64) if family == "sana" else (SIZE, SIZE + 8)


def load(folders: dict[str, str], family: str, lora: LoraOptions | None = None, **options: Any) -> DiffusersPolicy:
    size = dict(zip(("height", "width"), size_of(family), strict=True))
    return load_diffusers_policy(folders[family], PipelineConfig(**size, **LENGTHS.get(family, {}), **options), lora)


def draw(policy: DiffusersPolicy, count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, *policy.latent_shape), generator=torch.Generator().manual_seed(seed))


def recorded(folder: str, family: str, guidance: float, steps: int = 3, negative: str = "blurry") -> Any:
    """What a published pipeline's own run gives its scheduler at every step, and the images it ends with."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "unet"):  # PNDM averages predictions and Euler rescales what the network sees
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    calls = []
    step = pipeline.scheduler.step

    def watched(output: Any, timestep: Any, sample: Any, *rest: Any, **options: Any) -> Any:
        result = step(output, timestep, sample, *rest, **options)
        calls.append([output.clone(), timestep.clone(), sample.clone(), result[0].clone()])
        return result

    pipeline.scheduler.step = watched
    images = pipeline(
        prompt=PROMPTS,
        height=size_of(family)[0],
        width=size_of(family)[1],
        num_inference_steps=steps,
        **{"true_cfg_scale" if family == "qwen" else "guidance_scale": guidance - (family == "z-image")},
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **({} if family.startswith("flux") else {"negative_prompt": [negative] * 2}),
        **({"use_resolution_binning": False} if family == "sana" else {}),
        **LENGTHS.get(family, {}),
    ).images
    for call in calls:
        if family == "flux2":
            for place in (0, 2, 3):
                call[place] = call[place].transpose(1, 2).unflatten(2, (SIZE // 4, -1))
        elif family.startswith("flux") or family == "qwen":
            for place in (0, 2, 3):
                call[place] = pipeline._unpack_latents(call[place], SIZE, SIZE + 8, pipeline.vae_scale_factor).reshape(
                    2, 4, SIZE // 2, -1
                )
    return calls, images


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to this share of the largest entry: random networks amplify, and round as they amplify."""
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_and_images_are_the_pipelines_own(folders: dict[str, str], family: str) -> None:
    policy = load(folders, family, negative_prompt="" if family == "flux2" else "blurry")
    assert isinstance(policy, ImagePolicy)
    side, channels = (4, 16) if family == "flux2" else (2, 4)
    assert policy.latent_shape == (channels, size_of(family)[0] // side, size_of(family)[1] // side)
    guidances = {GUIDANCE[family], 1.0}
    for guidance in guidances:
        calls, images = recorded(folders[family], family, guidance)
        conditioning = policy.encode(PROMPTS)
        assert all(len(rows) == 2 for rows in conditioning.values())
        for output, timestep, sample, _ in calls:
            with torch.no_grad():
                found = policy.predict(sample, timestep.double().expand(2), conditioning, guidance)
            assert found.dtype == torch.float32
            assert_close(found, output)
            assert output.std() > 0.05
        found = policy.decode(calls[-1][3]).permute(0, 2, 3, 1).numpy()
        assert np.allclose(found, images, atol=1e-5)
        assert np.std(images) > 0.02
    assert not torch.allclose(policy.encode(["a cat"])["prompt_embeds"], policy.encode(["a dog"])["prompt_embeds"])


@pytest.mark.parametrize("family", FAMILIES)
def test_flow_pipelines_take_the_steps_their_pipeline_takes(folders: dict[str, str], family: str) -> None:
    policy = load(folders, family)
    if not hasattr(policy.scheduler, "alphas_cumprod"):
        calls, _ = recorded(folders[family], family, GUIDANCE[family], steps=4)
        own = copy.deepcopy(policy.scheduler)
        own.set_timesteps(**policy.schedule_options(4))
        assert own.timesteps.tolist() == [call[1].item() for call in calls]
        assert policy.prediction_type == "flow"
    else:
        # PNDM and Euler have no density; DDIM on the same noise schedule has, and starts from the same times.
        assert type(policy.scheduler) is diffusers.DDIMScheduler
        policy.scheduler.set_timesteps(**policy.schedule_options(20))
        assert policy.scheduler.timesteps.tolist() == list(range(951, 0, -50))
        assert torch.equal(policy.scheduler.alphas_cumprod, policy.frozen.pipeline.scheduler.alphas_cumprod)
        assert not policy.scheduler.config.clip_sample and not policy.scheduler.config.set_alpha_to_one
        assert policy.prediction_type == "epsilon"


def test_sana_keeps_the_times_of_its_solver(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "sana", "sana")
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0}
    for place, settings in (("flow", flow), ("none", {})):
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler(**settings)
        pipeline.save_pretrained(tmp_path / place)
    policy = load_diffusers_policy(str(tmp_path / "flow"), PipelineConfig(height=32, width=32))
    solver = policy.frozen.pipeline.scheduler
    policy.scheduler.set_timesteps(**policy.schedule_options(4))
    with warnings.catch_warnings():  # diffusers' own, of NumPy 2
        warnings.simplefilter("ignore", DeprecationWarning)
        solver.set_timesteps(4)
    np.testing.assert_allclose(policy.scheduler.sigmas, solver.sigmas, atol=1e-6)
    np.testing.assert_allclose(policy.scheduler.timesteps, solver.timesteps, atol=1)
    with pytest.raises(ValueError, match="of this SanaPipeline is not of a flow"):
        load_diffusers_policy(str(tmp_path / "none"), PipelineConfig(height=32, width=32))


def test_sd3_and_flux_shift_their_times_with_the_resolution(tmp_path: Path) -> None:
    save_pipeline(tmp_path, "sd3", use_dynamic_shifting=True)
    policy = load_diffusers_policy(str(tmp_path), PipelineConfig(height=16, width=24, max_sequence_length=12))
    # 4 x 6 patches: 0.5 + (1.15 - 0.5) / (4096 - 256) * (24 - 256)
    assert policy.schedule_options(5)["mu"] == pytest.approx(0.5 + 0.65 / 3840 * (24 - 256))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_may_be_at_different_steps_and_do_not_see_each_other(folders: dict[str, str], family: str) -> None:
    policy = load(folders, family)
    latents, conditioning, times = draw(policy), policy.encode(PROMPTS), torch.tensor([801.0, 201.0])
    with torch.no_grad():
        both = policy.predict(latents, times, conditioning, GUIDANCE[family])
        for row in range(2):
            part = slice(row, row + 1)
            rows = {name: values[part] for name, values in conditioning.items()}
            alone = policy.predict(latents[part], times[part], rows, GUIDANCE[family])
            assert_close(both[part], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_train_and_off_they_leave_the_model_as_it_was(folders: dict[str, str], family: str) -> None:
    policy = load(folders, family, LoraOptions(rank=2))
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert len(trained) == 2 * sum("lora_A" in name for name in trained)
    frozen = {name: p.clone() for name, p in policy.named_parameters() if name not in trained}
    latents, conditioning, times = draw(policy), policy.encode(PROMPTS), torch.tensor([501.0, 501.0])

    def predict() -> torch.Tensor:
        return policy.predict(latents, times, conditioning, GUIDANCE[family])

    before = predict().detach()
    with policy.reference():
        assert torch.equal(predict(), before)  # new adapters add nothing
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B is 0 at first, so that A moves only in the second step
        loss = (predict() - 1).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (predict() - before).abs().max() > 1e-3
    with policy.reference(), torch.no_grad():
        assert torch.equal(predict(), before)
    for name, parameter in policy.named_parameters():
        assert name in trained or torch.equal(parameter, frozen[name]), name


def shake(policy: DiffusersPolicy, seed: int = 5) -> None:
    """Move every trained weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_policy_is_read_back_with_equal_outputs(
    folders: dict[str, str], family: str, rank: int, tmp_path: Path
) -> None:
    policy = load(folders, family, LoraOptions(rank=rank, alpha=3 if rank else None))
    latents, times = draw(policy), torch.tensor([701.0, 301.0])

    def outputs(model: DiffusersPolicy) -> torch.Tensor:
        with torch.no_grad():
            return model.predict(latents, times, model.encode(PROMPTS), GUIDANCE[family])

    before = outputs(policy)
    shake(policy)
    expected = outputs(policy)
    assert (expected - before).abs().max() > 1e-2
    policy.save_pretrained(tmp_path / "saved")
    size = {"height": size_of(family)[0], "width": size_of(family)[1], **LENGTHS.get(family, {})}
    again = load_diffusers_policy(str(tmp_path / "saved"), PipelineConfig(**size))
    assert torch.equal(outputs(again), expected)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in policy.parameters()]
    assert outputs(policy).equal(expected) and policy.frozen.pipeline is not None  # saving changes nothing
    policy.save_merged(tmp_path / "merged")
    merged = load_diffusers_policy(str(tmp_path / "merged"), PipelineConfig(**size))
    assert_close(outputs(merged), expected)
    assert outputs(policy).equal(expected)
    if rank:
        # The adapters are an ordinary diffusers LoRA: the untouched pipeline loads them and gives the same output.
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[family])
        pipeline.load_lora_weights(tmp_path / "saved")
        plain = load(folders, family)
        plain.denoiser = getattr(pipeline, policy.denoiser_name)
        assert_close(outputs(plain), expected, 1e-6)


def test_dora_trains_magnitudes_beside_its_adapters(folders: dict[str, str], tmp_path: Path) -> None:
    plain, policy = load(folders, "sd3"), load(folders, "sd3", LoraOptions(rank=2, dora=True))
    latents, times = draw(policy), torch.tensor([701.0, 301.0])

    def outputs(model: DiffusersPolicy) -> torch.Tensor:
        with torch.no_grad():
            return model.predict(latents, times, model.encode(PROMPTS), 4.5)

    assert_close(outputs(policy), outputs(plain))  # a magnitude starts as the norm of its weights
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    magnitudes = [name for name in names if "magnitude" in name]
    assert len(magnitudes) * 3 == len(names) and all("lora_" in name for name in names)
    shake(policy)
    moved = outputs(policy)
    assert (moved - outputs(plain)).abs().max() > 0.01
    with policy.reference():
        assert torch.equal(outputs(policy), outputs(plain))
    policy.save_pretrained(tmp_path / "dora")
    policy.save_merged(tmp_path / "merged")
    size = PipelineConfig(height=SIZE, width=SIZE + 8, **LENGTHS["sd3"])
    assert torch.equal(outputs(load_diffusers_policy(str(tmp_path / "dora"), size)), moved)
    assert_close(outputs(load_diffusers_policy(str(tmp_path / "merged"), size)), moved)
    with pytest.raises(ValueError, match=r"model.lora.dora is false, and the adapters in .* say otherwise"):
        load_diffusers_policy(str(tmp_path / "dora"), size, LoraOptions(rank=2))
    with pytest.raises(ValueError, match=r"model\.lora\.dora does nothing without adapters"):
        LoraOptions(dora=True)


def test_a_copy_shares_the_text_encoders_and_trains_its_own_adapters(folders: dict[str, str]) -> None:
    policy = load(folders, "sd", LoraOptions(rank=2))
    other = copy.deepcopy(policy)
    assert other.frozen is policy.frozen
    assert {name for name, _ in policy.named_parameters()} == {
        f"denoiser.{name}" for name, _ in policy.denoiser.named_parameters()
    }
    shake(other)
    latents, conditioning, times = draw(policy), policy.encode(PROMPTS), torch.tensor([701.0, 301.0])
    first, second = (model.predict(latents, times, conditioning, 2.0) for model in (policy, other))
    assert not torch.allclose(first, second, atol=1e-3)


def test_rewards_on_pixels_reach_the_adapters_through_the_decoder(folders: dict[str, str]) -> None:
    policy = load(folders, "sd", LoraOptions(rank=2))
    shake(policy)
    output = policy.predict(draw(policy), torch.tensor([501.0, 501.0]), policy.encode(PROMPTS), 1.0)
    policy.decode(output).mean().backward()
    gradients = [p.grad.abs().sum().item() for p in policy.parameters() if p.requires_grad and p.grad is not None]
    assert len(gradients) == sum(p.requires_grad for p in policy.parameters()) and min(gradients) > 0


@pytest.mark.parametrize("family", ["flux2", "qwen"])
def test_pictures_come_back_from_the_other_autoencoders(folders: dict[str, str], family: str) -> None:
    """Latents are those that the pipeline would decode: statistics undone, and the autoencoder's mode found again."""
    policy = load(folders, family)
    pictures = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE + 8, 3), dtype=np.uint8)
    vae, pipeline = policy.frozen.pipeline.vae, policy.frozen.pipeline
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        found = policy.latents_of(list(pictures))
        if family == "flux2":
            torch.testing.assert_close(found, pipeline._encode_vae_image(pixels, None))
            expected = vae.decode(vae.encode(pixels).latent_dist.mode(), return_dict=False)[0]
        else:
            mode = vae.encode(pixels[:, :, None]).latent_dist.mode()
            expected = vae.decode(mode, return_dict=False)[0][:, :, 0]
            mean, std = (torch.tensor(x).view(1, 4, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
            torch.testing.assert_close(found * std + mean, mode[:, :, 0])
        torch.testing.assert_close(policy.decode(found), (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_pictures_are_encoded_as_the_pipelines_do(folders: dict[str, str], family: str) -> None:
    policy = load(folders, family)
    pictures = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    vae, config = policy.frozen.pipeline.vae, policy.frozen.pipeline.vae.config
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        found = policy.latents_of(list(pictures))
        mode = vae.encode(2 * pixels - 1).latent_dist.mode()
    torch.testing.assert_close(found, (mode - (config.shift_factor or 0.0)) * config.scaling_factor)
    assert policy.image_size == (policy.options.height, policy.options.width)
    # Decoding undoes the scaling: the VAE sees the mode again.
    with torch.no_grad():
        expected = (vae.decode(mode, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(policy.decode(found), expected, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(folders: dict[str, str]) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = load(folders, "sd", gradient_checkpointing=checkpointing)
        policy.predict(draw(policy), torch.tensor([501.0, 1.0]), policy.encode(PROMPTS), 3.0).mean().backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_half_precision_weights_keep_latents_and_images_in_float32(folders: dict[str, str]) -> None:
    policy, exact = load(folders, "sdxl", dtype="bfloat16"), load(folders, "sdxl")
    assert policy.denoiser.dtype == torch.bfloat16 and policy.frozen.pipeline.vae.dtype == torch.float32
    latents, times = draw(policy), torch.tensor([501.0, 1.0])
    with torch.no_grad():
        found = policy.predict(latents, times, policy.encode(PROMPTS), 2.0)
        expected = exact.predict(latents, times, exact.encode(PROMPTS), 2.0)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.3 * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sd", {"height": 17}, r"model.pipeline.height is 17: this pipeline needs a multiple of 2"),
        ("flux", {"height": 18}, r"model.pipeline.height is 18: this pipeline needs a multiple of 4"),
    ],
)
def test_options_that_do_not_fit_are_one_line(folders: dict[str, str], family: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_diffusers_policy(folders[family], PipelineConfig(**{"height": 16, "width": 16, **options}))
    assert "\n" not in str(error.value)


def test_adapters_for_layers_that_are_not_there_are_one_line(folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"model.lora.targets \['to_z'\]: Target modules") as error:
        load(folders, "sd", LoraOptions(rank=2, targets=["to_z"]))
    assert "\n" not in str(error.value)


def test_folders_that_do_not_fit_are_one_line(folders: dict[str, str], tmp_path: Path) -> None:
    options = PipelineConfig(height=SIZE, width=SIZE)
    with pytest.raises(ValueError, match=r"model.path 'no/such' cannot be loaded as a diffusers pipeline: "):
        load_diffusers_policy("no/such", options)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "model_index.json").write_text(json.dumps({"_class_name": "AudioLDMPipeline"}))
    with pytest.raises(ValueError, match="is a AudioLDMPipeline: known pipelines are StableDiffusionPipeline, "):
        load_diffusers_policy(str(tmp_path / "odd"), options)
    policy = load(folders, "sd", LoraOptions(rank=2))
    policy.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"model.lora.rank is 4, the adapters in .* have rank 2"):
        load_diffusers_policy(str(tmp_path / "lora"), PipelineConfig(), LoraOptions(rank=4))
    index = json.loads((tmp_path / "lora" / "lora_policy.json").read_text())
    index["lora"]["target_modules"] = ["to_q"]
    (tmp_path / "lora" / "lora_policy.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="its adapters do not fit"):
        load_diffusers_policy(str(tmp_path / "lora"), options)
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is incomplete: pytorch_lora_weights.safetensors is missing"):
        load_diffusers_policy(str(tmp_path / "lora"), options)


def test_a_pipeline_is_refused_by_its_index_before_a_weight_is_read(folders: dict[str, str], tmp_path: Path) -> None:
    assert SCHEDULERS.keys() == KNOWN.keys()
    for family, own, wrong, kind, needed in (
        ("sd", "PNDMScheduler", "EDMEulerScheduler", "flow_sde", "ddim or ddpm"),
        ("sd3", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "ddim", "flow_sde, flow_cps or"),
    ):
        shutil.copytree(folders[family], tmp_path / family)
        index = tmp_path / family / "model_index.json"
        text = Path(folders[family], "model_index.json").read_text()
        index.write_text(text.replace(own, wrong))
        with pytest.raises(ValueError, match=f"Pipeline with a {wrong}, from which no steps with a density"):
            load_diffusers_policy(str(tmp_path / family), PipelineConfig())
        index.write_text(text)
        for path in (tmp_path / family, tmp_path / f"{family}-lora"):
            with pytest.raises(ValueError, match=f"sampler.kind '{kind}' is not for a Stable.*: set it to {needed}"):
                check_folder(str(path), kind)
            (tmp_path / f"{family}-lora").mkdir(exist_ok=True)
            (tmp_path / f"{family}-lora" / "lora_policy.json").write_text(json.dumps({"base": str(tmp_path / family)}))
        check_folder(str(tmp_path / f"{family}-lora"), "dpm_solver")
        check_folder(str(tmp_path / family), "ddpm" if family == "sd" else "flow_cps")


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("", "is no folder of a pipeline, and no owner/name of the hub"),
        ("model_index.json", "is incomplete: model_index.json is missing"),
        ("unet", "is incomplete: its folder unet is missing"),
        ("tokenizer", "is incomplete: its folder tokenizer is missing"),
        ("vae/diffusion_pytorch_model.safetensors", "is incomplete: its folder vae has no weights"),
        ("safety_checker", None),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused_before_a_weight_is_read(
    folders: dict[str, str], tmp_path: Path, lost: str, says: str | None
) -> None:
    folder = Path(shutil.copytree(folders["sd"], tmp_path / "sd"))
    part = folder / lost
    if part.is_file():
        part.unlink()
    else:
        shutil.rmtree(part, ignore_errors=True)
    if says is None:
        check_folder(str(folder), "ddim")
    else:
        with pytest.raises(ValueError, match=says):
            check_folder(str(folder), "ddim")
    if folder.is_dir():
        for text, complaint in (("[]", "holds a list"), ("{no", "is not JSON")):
            (folder / "model_index.json").write_text(text)
            with pytest.raises(ValueError, match=rf"model_index\.json.*{complaint}"):
                check_folder(str(folder), "ddim")


def test_guidance_and_prompts_that_the_model_cannot_take_are_refused(folders: dict[str, str]) -> None:
    policy = load(folders, "flux-schnell")
    with pytest.raises(
        ValueError, match=r"sampler.guidance_scale is 2.0: this FLUX model has no guidance, set it to 1"
    ):
        policy.predict(draw(policy), torch.tensor([501.0, 1.0]), policy.encode(PROMPTS), 2.0)
    klein = load(folders, "flux2")
    klein.frozen.pipeline.register_to_config(is_distilled=True)
    with pytest.raises(ValueError, match=r"sampler.guidance_scale is 2.0: this FLUX.2 model is distilled, set it to 1"):
        klein.predict(draw(klein), torch.tensor([501.0, 1.0]), klein.encode(PROMPTS), 2.0)
    with pytest.raises(ValueError, match="takes text prompts, the task gave 7"):
        policy.encode(["a cat", 7])
    with pytest.raises(ValueError, match=r"model.lora.rank is 0"), policy.reference():
        pass


FLOW_SDE = {"kind": "flow_sde"}
SAMPLERS = {
    "sd": {"kind": "ddim"},
    "sdxl": {"kind": "ddim"},
    **dict.fromkeys(("sd3", "flux", "flux2", "qwen", "sana", "z-image"), FLOW_SDE),
}


@pytest.mark.parametrize("family", SAMPLERS)
def test_the_learner_scores_what_the_engine_sampled_and_one_step_makes_it_likelier(
    folders: dict[str, str], family: str
) -> None:
    policy = load(folders, family, LoraOptions(rank=2))
    options = LatentSamplerOptions(**SAMPLERS[family], num_inference_steps=3, guidance_scale=GUIDANCE[family])
    requests = [SampleRequest(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    ran: list[int] = []
    counting = policy.denoiser.register_forward_pre_hook(
        lambda _, args, named: ran.append(len(args[0] if args else named["hidden_states"])), with_kwargs=True
    )
    engine = LatentEngine(policy, options)
    trajectories = engine.generate(requests)
    assert engine.stats.sequence_forwards == engine.stats.rows_asked == sum(ran)
    ran.clear()
    rows = gaussian_rows(trajectories, model=policy)
    assert rows.sampler_logprob is not None and len(rows.step) >= 4
    logprob = rows.score(policy).logprob
    # Guidance runs the network twice, but for FLUX, which is told of it.
    assert rows.num_rows == sum(ran) == len(rows.step) * (1 if family == "flux" else 2)
    counting.remove()
    assert (logprob - rows.sampler_logprob).abs().max() < 1e-4
    logprob[0].backward()
    # What the last block of Qwen-Image makes of its text goes nowhere.
    parameters = [p for p in policy.parameters() if p.grad is not None]
    with torch.no_grad():
        scale = 1e-3 / torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        for parameter in parameters:
            parameter += scale * parameter.grad
        assert rows.score(policy).logprob[0] > logprob[0]
