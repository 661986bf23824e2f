"""diffusers' caches in rollouts: which denoiser can have which, what a cache leaves behind, and what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", minversion="0.42")

from rl.estimators.gaussian_step import gaussian_rows
from rl.model_section import PipelineConfig
from rl.models.class_policy import new_policy
from rl.models.diffusers_load import load_diffusers_policy
from rl.models.pipelines import CACHED, check_folder
from rollouts.engines.base import SampleRequest
from rollouts.engines.latent import LatentEngine
from rollouts.latent_trajectory import LatentTrajectory, load_latents, save_latents
from rollouts.samplers.latent_options import CACHES, LatentSamplerOptions
from tests.tiny_pipelines import save_pipeline

# Of each cache a setting that never reuses anything, and one that reuses a lot.
WHOLE: dict[str, dict[str, Any]] = {
    "first_block": {"threshold": 0.0},
    "mag_cache": {"max_skip_steps": 0},
    "pab": {"spatial_attention_block_skip_range": 1},
    "taylor_seer": {"cache_interval": 1},
    "faster_cache": {"spatial_attention_block_skip_range": 1, "unconditional_batch_skip_range": 1},
}
ALWAYS = (-1, 1001)
MUCH: dict[str, dict[str, Any]] = {
    "first_block": {"threshold": 1e9},
    "mag_cache": {"threshold": 1e9, "retention_ratio": 0.0},
    "pab": {"spatial_attention_timestep_skip_range": ALWAYS},
    "taylor_seer": {"cache_interval": 3, "disable_cache_before_step": 2},
    "faster_cache": {
        "spatial_attention_timestep_skip_range": ALWAYS,
        "unconditional_batch_timestep_skip_range": ALWAYS,
    },
}
# FasterCache's own call of torch.meshgrid.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
PROMPTS = ("a cat", "a dog", "a cat")


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3", "flux", "flux2", "qwen", "sana", "z-image"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    save_pipeline(folder, request.param)
    return load_diffusers_policy(
        str(folder), PipelineConfig(height=16, width=16, max_sequence_length=256 if request.param == "qwen" else 12)
    )


def options(policy: Any, cache: dict[str, Any] | None, **changes: Any) -> LatentSamplerOptions:
    kind = "ddim" if hasattr(policy.scheduler, "alphas_cumprod") else "flow_sde"
    return LatentSamplerOptions(kind=kind, num_inference_steps=5, guidance_scale=3.0, cache=cache, **changes)


def sampled(policy: Any, cache: dict[str, Any] | None, size: int = 256) -> tuple[list[LatentTrajectory], LatentEngine]:
    engine = LatentEngine(policy, options(policy, cache), max_batch_size=size)
    prompts = PROMPTS if hasattr(policy, "pipeline_class") else ("one", "two", "one")
    return engine.generate([SampleRequest(prompt, 7 + i) for i, prompt in enumerate(prompts)]), engine


def ends(found: list[LatentTrajectory]) -> np.ndarray:
    return np.stack([t.latents[-1] for t in found])


def test_a_cache_is_exact_when_it_never_reuses_and_leaves_the_denoiser_as_it_was(policy: Any) -> None:
    plain, _ = sampled(policy, None)
    before = {name: dict(vars(module)) for name, module in policy.denoiser.named_modules()}
    for name in CACHED[policy.pipeline_class]:
        whole, engine = sampled(policy, {"name": name, **WHOLE[name]})
        np.testing.assert_allclose(ends(whole), ends(plain), atol=1e-6, err_msg=name)
        assert engine.stats.image_gap < 1e-5 and engine.stats.image_probes == 1
        much, engine = sampled(policy, {"name": name, **MUCH[name]})
        assert np.abs(ends(much) - ends(plain)).max() > 1e-3, name
        assert engine.stats.image_gap > 1e-5 and not any(t.exact for t in much)
        # 3 rollouts with the cache and 1 without, each counted whole.
        assert engine.stats.sequence_forwards == 4 * 5 * policy.num_evaluations(3.0)
        # Nothing is left over from the last call.
        np.testing.assert_array_equal(ends(sampled(policy, {"name": name, **MUCH[name]})[0]), ends(much))
    assert {name: dict(vars(module)) for name, module in policy.denoiser.named_modules()}.keys() == before.keys()
    for name, module in policy.denoiser.named_modules():
        assert vars(module).keys() == before[name].keys(), name
    np.testing.assert_array_equal(ends(sampled(policy, None)[0]), ends(plain))
    assert all(t.exact for t in plain)


def test_the_other_caches_are_refused_by_name(policy: Any) -> None:
    for name in set(CACHES) - set(CACHED[policy.pipeline_class]):
        with pytest.raises(ValueError, match=rf"sampler\.cache {name} is not for"):
            LatentEngine(policy, options(policy, {"name": name}))
        with pytest.raises(ValueError, match=rf"sampler\.cache {name} is not for a {policy.pipeline_class}, which"):
            check_folder(policy.source, options(policy, None).kind, {"name": name})


@pytest.fixture(scope="module")
def unet() -> Any:
    sizes = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
    }
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    extra = {"norm_num_groups": 2, "attention_head_dim": 4}
    return new_policy({"model_type": "UNet2DModel", **sizes, **blocks, **extra}, {}, ["one", "two"], 0)


def test_batches_have_caches_of_their_own(unet: Any) -> None:
    cache = {"name": "pab", **MUCH["pab"]}
    whole, _ = sampled(unet, cache)
    alone, engine = sampled(unet, cache, size=1)
    np.testing.assert_allclose(ends(alone), ends(whole), atol=1e-5)
    assert engine.stats.forwards == 4 * 5  # 3 batches and what is sampled without


def test_the_learner_sees_what_the_cache_changed(unet: Any, tmp_path: Path) -> None:
    found, _ = sampled(unet, {"name": "pab", **MUCH["pab"]})
    rows = gaussian_rows(found, reduce="sum")
    assert rows.sampler_logprob is not None
    gap = (rows.score(unet).logprob - rows.sampler_logprob).abs()
    first = rows.step == 0
    assert gap[first].max() < 1e-3 and gap[~first].max() > 1e-2
    save_latents(tmp_path / "t.npz", found)
    assert [t.exact for t in load_latents(tmp_path / "t.npz")] == [False] * 3


def test_attention_is_computed_at_every_second_step(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = next(m for m in unet.unet.modules() if type(m).__name__ == "Attention")
    calls = []
    monkeypatch.setattr(
        attention, "forward", lambda *a, **k: calls.append(1) or type(attention).forward(attention, *a, **k)
    )
    sampled(unet, {"name": "pab", **MUCH["pab"]})
    assert len(calls) == 5 + 3  # all 5 of the plain rollout; steps 0, 2 and 4


def test_mistakes_are_one_line(unet: Any) -> None:
    with pytest.raises(ValueError, match=r"sampler\.cache needs a name, one of first_block, mag_cache, pab"):
        LatentSamplerOptions(cache={"name": "teacache"})
    with pytest.raises(ValueError, match=r"set sampler\.guidance_cosine to null"):
        options(unet, {"name": "pab"}, guidance_cosine=0.9)
    with pytest.raises(ValueError, match=r"sampler\.cache pab has no option 'skip': it has cross_attention"):
        LatentEngine(unet, options(unet, {"name": "pab", "skip": 2}))
    engine = LatentEngine(unet, options(unet, {"name": "pab"}), branch_points=((1, 2),))
    with pytest.raises(ValueError, match=r"sampler\.cache needs one batch for all steps"):
        engine.generate([SampleRequest("one", 1)] * 2)
