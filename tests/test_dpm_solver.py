"""DPM-Solver++ as a sampler: diffusers' own steps, the exact solution of an ODE, and what may not use it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from rl.modalities.gradient_images import GradientImages
from rl.recipes.ddpo import DDPO
from rollouts.engines.base import SampleRequest
from rollouts.engines.latent import LatentEngine
from rollouts.samplers.latent_options import LatentSamplerOptions
from rollouts.search.latents import LatentSampler
from tests.image_models import CLASSES, FLOW, rollouts, tiny_policy

DPM = LatentSamplerOptions(kind="dpm_solver", num_inference_steps=7)


class Gaussian:
    """The exact model of data N(1, 0.5^2): of the noise on a variance-preserving schedule, or of a flow's velocity."""

    latent_shape = (1, 20, 20)

    def __init__(self, flow: bool):
        # Without an offset DDIM's and the solver's grids are not the same, but both end at the data.
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(clip_sample=False)
        self.prediction_type = "flow" if flow else "epsilon"

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        return {"num_inference_steps": num_inference_steps}

    def encode(self, prompts: Any) -> dict[str, torch.Tensor]:
        return {}

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.prediction_type == "flow":
            t = timesteps / 1000
            return 1 - t, t
        a = self.scheduler.alphas_cumprod.double()[timesteps.long()]
        return a.sqrt(), (1 - a).sqrt()

    def predict(self, x: torch.Tensor, timesteps: torch.Tensor, conditioning: Any, scale: float) -> torch.Tensor:
        s, n = (level.reshape(-1, 1, 1, 1) for level in self.levels(timesteps))
        residual = (x - s) / (s**2 * 0.25 + n**2)
        noise, data = n * residual, 1 + s * 0.25 * residual
        return noise - data if self.prediction_type == "flow" else noise

    def num_evaluations(self, guidance_scale: float) -> int:
        return 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("flow", [False, True])
def test_steps_are_those_of_diffusers(flow: bool) -> None:
    """Seven and sixteen steps: diffusers lowers the order at the end for the one as for the other."""
    model = Gaussian(flow)
    for count in (7, 16):
        engine = LatentEngine(model, DPM.model_copy(update={"num_inference_steps": count}), dtype=torch.float64)
        (trajectory,) = engine.generate([SampleRequest("", 3)])
        trajectory.validate()
        solver = DPMSolverMultistepScheduler.from_config(
            model.scheduler.config, final_sigmas_type="zero", use_flow_sigmas=flow,
            prediction_type="flow_prediction" if flow else "epsilon",
        )  # fmt: skip
        solver.set_timesteps(count)
        if flow:  # diffusers spaces the times of this solver in another way than those of the flow's own scheduler
            own = FlowMatchEulerDiscreteScheduler()
            own.set_timesteps(sigmas=np.linspace(1, 1 / count, count))
            solver.sigmas, solver.timesteps = own.sigmas, own.timesteps
        assert trajectory.timestep.tolist() == pytest.approx(solver.timesteps.tolist())
        latent = torch.from_numpy(trajectory.latents[:1])
        for index, timestep in enumerate(solver.timesteps):
            output = model.predict(latent, timestep.double()[None], {}, 1.0)
            latent = solver.step(output, timestep, latent).prev_sample.double()
            np.testing.assert_allclose(trajectory.latents[index + 1], latent[0], atol=2e-5)
        assert not trajectory.is_decision.any() and not trajectory.logprob.any()


@pytest.mark.parametrize("flow", [False, True])
def test_it_is_nearer_to_the_exact_solution_than_the_first_order_ode(flow: bool) -> None:
    """The flow of N(1, 0.5^2) carries noise z to 1 + z / 2; a variance-preserving one starts from signal, too."""
    model, error = Gaussian(flow), {}
    first_order = {"kind": "flow_sde", "noise_level": 0.0} if flow else {"kind": "ddim", "eta": 0.0}
    for name, options in {"dpm": {"kind": "dpm_solver"}, "first": first_order}.items():
        engine = LatentEngine(model, LatentSamplerOptions(num_inference_steps=10, **options), dtype=torch.float64)
        (trajectory,) = engine.generate([SampleRequest("", 3)])
        s, n = (float(level) for level in model.levels(torch.tensor(trajectory.timestep[0])))
        z = (trajectory.latents[0] - s) / np.sqrt(s**2 * 0.25 + n**2)
        error[name] = np.abs(trajectory.latents[-1] - (1 + z / 2)).max()
    assert error["dpm"] < 0.8 * error["first"], error


def test_branches_look_back_along_their_own_path() -> None:
    policy = tiny_policy()
    whole = rollouts(policy, DPM, count=2)
    dtype = next(policy.parameters()).dtype
    (second,) = LatentEngine(policy, DPM, dtype=dtype).generate([SampleRequest(CLASSES[1], 11)])
    np.testing.assert_allclose(second.latents, whole[1].latents, rtol=1e-12)
    # Branches differ in seeds alone, and no step draws noise: both are the rollout without branches.
    branched = rollouts(policy, DPM, count=2, branch_points=((3, 2),))
    for index, trajectory in enumerate(branched):
        np.testing.assert_allclose(trajectory.latents, whole[index // 2].latents, rtol=1e-12)


def test_what_needs_densities_or_single_steps_refuses_it() -> None:
    policy = tiny_policy(FLOW)
    with pytest.raises(ValueError, match="no step of the sampler has a density"):
        DDPO().rows(rollouts(policy, DPM), policy)
    engine = LatentEngine(policy, DPM)
    with pytest.raises(ValueError, match=r"sampler\.kind dpm_solver looks back"):
        LatentSampler(engine, ["one"])
    with pytest.raises(ValueError, match=r"sampler\.kind dpm_solver looks back: a reward"):
        GradientImages(type("Run", (), {"engine": lambda *_: engine, "model": policy})(), 2, False)
    with pytest.raises(ValueError, match="floor does nothing with dpm_solver"):
        LatentSamplerOptions(kind="dpm_solver", small_std="floor")
    with pytest.raises(ValueError, match="needs steps with an ODE"):
        LatentSamplerOptions(kind="dpm_solver", sde_window=(0, 2))
