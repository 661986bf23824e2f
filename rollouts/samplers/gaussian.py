"""One denoising step as a Gaussian, for every scheduler we sample with.

All of them predict x0 from the latent x and the model's output o, clip it or not, and draw the next latent from

    N(mean_x0 x0 + mean_latent x + mean_output o, std^2)    with    x0 = clip(x0_latent x + x0_output o),

so a scheduler is a table of five coefficients and a standard deviation per step. A table is made once from a
diffusers scheduler; steps are pure functions of it. Notation: a_t is the cumulative product alpha-bar.

* `ddim_steps`: Song et al. 2021 (arXiv 2010.02502), equation 12 with the sigma of equation 16 times eta.
* `ddpm_steps`: Ho et al. 2020 (arXiv 2006.11239), equation 7.
* `flow_sde_steps`: Liu et al. 2025, Flow-GRPO (arXiv 2505.05470): an SDE with the marginals of the flow's ODE.
* `flow_cps_steps`: Wang and Yu 2025 (arXiv 2509.05952) as in the code of Flow-GRPO: noise is replaced, never added.
* `dpm_solver_steps`: Lu et al. 2022, DPM-Solver++ (arXiv 2211.01095), algorithm 2 as in diffusers: a solver of the ODE.
* `flow_stochastic_steps`: diffusers' FlowMatchEulerDiscreteScheduler with stochastic_sampling: jump to x0, noise again.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rollouts.samplers.latent_options import LatentSamplerOptions

COEFFICIENTS = ("x0_latent", "x0_output", "mean_x0", "mean_latent", "mean_output")


@dataclass(frozen=True)
class GaussianSteps:
    """T steps of a sampler.

    Attributes:
        timestep: float64 [T], what the model is told.
        coefficients: float64 [T, 5], columns as in `COEFFICIENTS`.
        std: float64 [T].
        clip: bound on |x0|, None without one.
        initial_std: standard deviation of the initial noise.
        mean_previous: float64 [T], coefficient of the x0 that the step before predicted, of a solver that looks back
            (no such step is a decision); None for all others.
    """

    timestep: np.ndarray
    coefficients: np.ndarray
    std: np.ndarray
    clip: float | None = None
    initial_std: float = 1.0
    mean_previous: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.timestep)


def make_steps(scheduler: Any, options: LatentSamplerOptions, schedule: dict[str, Any] | None = None) -> GaussianSteps:
    """The steps that sampler options describe.

    Args:
        scheduler: a diffusers scheduler; its config holds the noise schedule. It is left as it is.
        schedule: arguments of `set_timesteps`; None for the options' step count.

    Raises:
        ValueError: the scheduler does not fit the options.
    """
    schedule = schedule or {"num_inference_steps": options.num_inference_steps}
    if options.timesteps is not None:
        schedule = explicit_schedule(scheduler, options.timesteps, schedule)
    if options.kind == "dpm_solver":
        return dpm_solver_steps(copy.deepcopy(scheduler), schedule)
    flow = options.kind.startswith("flow")
    if flow != (not hasattr(scheduler, "alphas_cumprod")):
        needed = "a flow-matching scheduler" if flow else "a scheduler with alphas_cumprod"
        raise ValueError(f"sampler.kind {options.kind!r} needs {needed}, the model has {type(scheduler).__name__}")
    count, trained = options.num_inference_steps, scheduler.config.num_train_timesteps
    if not flow and count > trained:
        raise ValueError(
            f"sampler.num_inference_steps {count} is more than the {trained} that the model was trained with"
        )
    own = copy.deepcopy(scheduler)
    if options.kind == "ddim":
        steps = ddim_steps(own, schedule, options.eta)
    elif options.kind == "ddpm":
        steps = ddpm_steps(own, schedule)
    elif options.kind == "flow_sde":
        steps = flow_sde_steps(own, schedule, options.noise_level)
    elif options.kind == "flow_cps":
        steps = flow_cps_steps(own, schedule, options.noise_level)
    else:
        steps = flow_stochastic_steps(own, schedule)
    if options.small_std == "floor":
        steps = replace(steps, std=np.maximum(steps.std, options.min_std))
    if options.sde_window is not None:
        first, length = options.sde_window
        ode = flow_sde_steps(own, schedule, 0.0) if flow else ddim_steps(own, schedule, 0.0)
        index = np.arange(len(steps))
        inside = (index >= first) & (index < first + length)
        steps = replace(
            steps,
            coefficients=np.where(inside[:, None], steps.coefficients, ode.coefficients),
            std=np.where(inside, steps.std, 0.0),
        )
    return steps


def explicit_schedule(scheduler: Any, timesteps: Sequence[float], schedule: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `set_timesteps` for a list of timesteps: flow schedulers take them as t / 1000, before their shift.

    Raises:
        ValueError: the scheduler's own steps are of equal length, or a timestep is none that it was trained on.
    """
    size = scheduler.config.num_train_timesteps
    if not hasattr(scheduler, "alphas_cumprod"):
        if timesteps[0] > size or timesteps[-1] <= 0:
            raise ValueError(f"sampler.timesteps of a flow must lie above 0 and at most at {size}")
        rest = {name: value for name, value in schedule.items() if name == "mu"}
        return {"sigmas": [t / size for t in timesteps], **rest}
    if any(t != int(t) for t in timesteps) or timesteps[0] >= size:
        raise ValueError(f"sampler.timesteps must be whole numbers below {size} for {type(scheduler).__name__}")
    return {"timesteps": [int(t) for t in timesteps]}


def ddim_steps(scheduler: Any, schedule: dict[str, Any], eta: float) -> GaussianSteps:
    """DDIM; the step after the last timestep is diffusers' `final_alpha_cumprod`.

    With `steps_offset=0` (diffusers' default) and `set_alpha_to_one=False` the last step has std 0, with
    `set_alpha_to_one=True` it has std 0 whatever the offset.
    """
    t, s = _ddim_timesteps(scheduler, schedule)
    alphas = scheduler.alphas_cumprod.double().numpy()
    final = float(getattr(scheduler, "final_alpha_cumprod", alphas[0]))
    a_t, a_s = alphas[t], np.where(s >= 0, alphas[np.maximum(s, 0)], final)
    std = eta * np.sqrt(np.maximum((1 - a_s) / (1 - a_t) * (1 - a_t / a_s), 0.0))
    x0_latent, x0_output, noise_latent, noise_output = _prediction(scheduler.config.prediction_type, a_t)
    direction = np.sqrt(np.maximum(1 - a_s - std**2, 0.0))
    return _steps(
        scheduler, t, std, x0_latent, x0_output, np.sqrt(a_s), direction * noise_latent, direction * noise_output
    )


def _ddim_timesteps(scheduler: Any, schedule: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [T] each: the timestep of every step and the one it leads to, which is negative after the last."""
    if "timesteps" in schedule:
        # DDIMScheduler takes no list. The last step leads to the end, as the last of a list of DDPMScheduler's does.
        t = np.array(schedule["timesteps"], dtype=np.int64)
        return t, np.append(t[1:], -1)
    scheduler.set_timesteps(**schedule)
    t = scheduler.timesteps.numpy().astype(np.int64)
    return t, t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps


def ddpm_steps(scheduler: Any, schedule: dict[str, Any]) -> GaussianSteps:
    """DDPM's ancestral step; the last one adds no noise."""
    from diffusers import DDPMScheduler

    # Any variance-preserving scheduler's config describes a DDPM; one that was made for DDIM lacks its variance.
    scheduler = DDPMScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(**schedule)
    kind = scheduler.config.variance_type
    if kind not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise ValueError(
            f"the scheduler's variance_type {kind!r} is learned or unknown: sampler.kind ddpm needs a fixed one"
        )
    t = scheduler.timesteps.numpy().astype(np.int64)
    s = np.array([int(scheduler.previous_timestep(int(step))) for step in t])
    alphas = scheduler.alphas_cumprod.double().numpy()
    a_t, a_s = alphas[t], np.where(s >= 0, alphas[np.maximum(s, 0)], 1.0)
    alpha, beta = a_t / a_s, 1 - a_t / a_s
    variance = beta if kind == "fixed_large" else np.maximum((1 - a_s) / (1 - a_t) * beta, 1e-20)
    std = np.where(t > 0, np.sqrt(variance), 0.0)
    x0_latent, x0_output, _, _ = _prediction(scheduler.config.prediction_type, a_t)
    mean_x0, mean_latent = np.sqrt(a_s) * beta / (1 - a_t), np.sqrt(alpha) * (1 - a_s) / (1 - a_t)
    return _steps(scheduler, t, std, x0_latent, x0_output, mean_x0, mean_latent, np.zeros_like(std))


def flow_sde_steps(scheduler: Any, schedule: dict[str, Any], noise_level: float) -> GaussianSteps:
    """Euler-Maruyama steps of dx = [v + sigma^2 (x + (1-t) v) / 2t] dt + sigma dw, sigma = a sqrt(t / (1 - t)).

    At t = 1, where sigma is infinite, the second t stands in the denominator, as in the published code; a single step
    has 0 there.
    """
    scheduler.set_timesteps(**schedule)
    sigmas = scheduler.sigmas.double().numpy()
    t, delta = sigmas[:-1], np.diff(sigmas)
    inside = np.where(t >= 1, sigmas[1], t)
    sigma = noise_level * np.sqrt(t / (1 - inside))
    mean_latent = 1 + sigma**2 * delta / (2 * t)
    mean_output = (1 + sigma**2 * (1 - t) / (2 * t)) * delta
    timestep = scheduler.timesteps.double().numpy()
    return _steps(
        scheduler, timestep, sigma * np.sqrt(-delta), np.ones_like(t), -t, np.zeros_like(t), mean_latent, mean_output
    )


def flow_cps_steps(scheduler: Any, schedule: dict[str, Any], noise_level: float) -> GaussianSteps:
    """x' = (1 - t') x0 + t' (cos(a pi / 2) x1 + sin(a pi / 2) z) with x0 = x - t v and x1 = x + (1 - t) v.

    The weights of data and noise are those of the schedule, whatever a is. a = 0 is the ODE's Euler step. The published
    code leaves out the density's factor 1 / (2 std^2); here it is the whole log-density.
    """
    scheduler.set_timesteps(**schedule)
    sigmas = scheduler.sigmas.double().numpy()
    t, after = sigmas[:-1], sigmas[1:]
    kept = after * math.cos(noise_level * math.pi / 2)
    std = after * math.sin(noise_level * math.pi / 2)
    timestep = scheduler.timesteps.double().numpy()
    return _steps(scheduler, timestep, std, np.ones_like(t), -t, 1 - after, kept, kept * (1 - t))


def flow_stochastic_steps(scheduler: Any, schedule: dict[str, Any]) -> GaussianSteps:
    """x' = (1 - t') x0 + t' z with x0 = x - t v; deterministic at the last step, where t' is 0."""
    scheduler.set_timesteps(**schedule)
    sigmas = scheduler.sigmas.double().numpy()
    t, after = sigmas[:-1], sigmas[1:]
    timestep = scheduler.timesteps.double().numpy()
    zeros = np.zeros_like(t)
    return _steps(scheduler, timestep, after, np.ones_like(t), -t, 1 - after, zeros, zeros)


def dpm_solver_steps(scheduler: Any, schedule: dict[str, Any]) -> GaussianSteps:
    """DPM-Solver++(2M): with signal s, noise n and h = log(s' / n') - log(s / n),

        x' = (n' / n) x + s' (1 - e^-h) (x0 + h / (2 h_before) (x0 - x0_before)),

    and without the second term at the first and at the last step. Levels and times are those of diffusers'
    `DPMSolverMultistepScheduler`; those of a flow are 1, ..., 2/T, 1/T, shifted as its own scheduler does.
    """
    if hasattr(scheduler, "alphas_cumprod"):
        from diffusers import DPMSolverMultistepScheduler

        solver = DPMSolverMultistepScheduler.from_config(scheduler.config, final_sigmas_type="zero")
        with warnings.catch_warnings():  # diffusers' own, of NumPy 2
            warnings.simplefilter("ignore", DeprecationWarning)
            solver.set_timesteps(**schedule)
        timestep, ratio = solver.timesteps.double().numpy(), solver.sigmas.double().numpy()
        signal = 1 / np.sqrt(1 + ratio**2)
        noise = ratio * signal
        x0_latent, x0_output, _, _ = _prediction(scheduler.config.prediction_type, signal[:-1] ** 2)
    else:
        given = {name: value for name, value in schedule.items() if name != "num_inference_steps"}
        count = schedule.get("num_inference_steps", 1)
        scheduler.set_timesteps(**{"sigmas": np.linspace(1.0, 1 / count, count), **given})
        timestep, noise = scheduler.timesteps.double().numpy(), scheduler.sigmas.double().numpy()
        signal = 1 - noise
        x0_latent, x0_output = np.ones_like(timestep), -noise[:-1]
    kept = signal[:-1] * noise[1:] / (signal[1:] * noise[:-1])
    gain = signal[1:] * (1 - kept)
    second = np.zeros_like(gain)
    # From pure noise the step before has an infinite h, and so nothing is taken from it.
    before = -np.log(np.maximum(kept[:-2], 1e-300)) if kept[:1].any() else np.append(np.inf, -np.log(kept[1:-2]))
    second[1:-1] = -np.log(kept[1:-1]) / (2 * before)
    zeros = np.zeros_like(gain)
    steps = _steps(scheduler, timestep, zeros, x0_latent, x0_output, gain * (1 + second), noise[1:] / noise[:-1], zeros)
    return replace(steps, mean_previous=-gain * second)


def _prediction(kind: str, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients of x0 and of the noise in (latent, output), before clipping."""
    signal, noise, zeros, ones = np.sqrt(a), np.sqrt(1 - a), np.zeros_like(a), np.ones_like(a)
    if kind == "epsilon":
        return 1 / signal, -noise / signal, zeros, ones
    if kind == "sample":
        return zeros, ones, 1 / noise, -signal / noise
    if kind == "v_prediction":
        return signal, -noise, noise, signal
    raise ValueError(f"the scheduler's prediction_type {kind!r} must be epsilon, sample or v_prediction")


def x0_coefficients(scheduler: Any, kind: str, timestep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of x0 in (latent, output) at training timesteps, float64 [N] each; `kind` as in `ImagePolicy`."""
    if kind == "flow":
        t = timestep.astype(np.float64) / 1000
        return np.ones_like(t), -t
    return _prediction(kind, scheduler.alphas_cumprod.double().numpy()[timestep])[:2]


def _steps(scheduler: Any, timestep: np.ndarray, std: np.ndarray, *coefficients: np.ndarray) -> GaussianSteps:
    config = scheduler.config
    if config.get("thresholding", False):
        raise ValueError("the scheduler's thresholding depends on the whole image: set thresholding to false")
    clip = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", False) else None
    return GaussianSteps(
        np.asarray(timestep, dtype=np.float64),
        np.stack(coefficients, axis=1),
        np.asarray(std, dtype=np.float64),
        clip,
        float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else 1.0,
    )


def predicted_x0(
    coefficients: torch.Tensor, clip: float | None, output: torch.Tensor, latent: torch.Tensor
) -> torch.Tensor:
    """[N, ...]: the data the model's output stands for; see `step_mean`."""
    x0_latent, x0_output = (_like(c, latent) for c in coefficients.unbind(-1)[:2])
    x0 = x0_latent * latent + x0_output * output
    return x0 if clip is None else x0.clamp(-clip, clip)


def step_mean(
    coefficients: torch.Tensor, clip: float | None, output: torch.Tensor, latent: torch.Tensor
) -> torch.Tensor:
    """Mean of the next latent, [N, ...] float64, with gradient in `output`.

    Args:
        coefficients: float64 [N, 5] (rows may be at different steps).
        output, latent: [N, ...]; raised to float64, so that the mean adds no rounding of its own.
    """
    output, latent = output.double(), latent.double()
    mean_x0, mean_latent, mean_output = (_like(c, latent) for c in coefficients.unbind(-1)[2:])
    x0 = predicted_x0(coefficients, clip, output, latent)
    return mean_x0 * x0 + mean_latent * latent + mean_output * output


def log_density(sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """float64 [N]: log N(sample; mean, std^2), summed over entries; 0 where std is 0, as for any sure choice.

    Args:
        sample, mean: [N, ...].
        std: float64 [N].
    """
    sure = std == 0
    safe = torch.where(sure, torch.ones_like(std), std)
    square = (sample.double() - mean.double()).square().flatten(1).sum(1)
    entries = mean[0].numel()
    density = -0.5 * square / safe**2 - entries * (safe.log() + 0.5 * math.log(2 * math.pi))
    return torch.where(sure, torch.zeros_like(density), density)


def diagonal_log_density(sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """float64 [N]: log N(sample; mean, std^2), summed over entries that each have a deviation of their own.

    Args:
        sample, mean, std: [N, ...]; std above 0.
    """
    std = std.double()
    error = (sample.double() - mean.double()) / std
    return -(0.5 * error.square() + std.log() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def gaussian_kl(mean: torch.Tensor, other: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """float64 [N]: KL between two Gaussians that share their standard deviation, summed over entries.

    Args:
        std: float64 [N], above 0.
    """
    return (mean.double() - other.double()).square().flatten(1).sum(1) / (2 * std**2)


def gaussian_step(
    coefficients: torch.Tensor,
    std: torch.Tensor,
    clip: float | None,
    output: torch.Tensor,
    latent: torch.Tensor,
    noise: torch.Tensor,
    shift: torch.Tensor | float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of a sampler.

    Args:
        noise: [N, ...], standard normal.
        shift: [N, ...] added to the mean, of a solver that looks back.

    Returns:
        the next latent in the dtype of `latent`, its mean (float64) and its log-prob (float64 [N]). The log-prob is
        that of the rounded latent, which is the one that is kept.
    """
    mean = step_mean(coefficients, clip, output, latent) + shift
    sample = (mean + _like(std, latent) * noise.double()).to(latent.dtype)
    return sample, mean, log_density(sample, mean, std)


def _like(values: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """[N] -> [N, 1, ...]."""
    return values.reshape(-1, *[1] * (latent.dim() - 1))
