"""What a run will need of memory, per rank, before there is a GPU or a checkpoint: `denoise-rl check --plan`.

States follow ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054): a parameter costs its copy in the compute
precision, its gradient, and in float32 the accumulated gradient, the master copy and Adam's two moments; each is
whole on every rank or one part of `ranks`, by stage. In bfloat16 this is DeepSpeed's own estimate
(`estimate_zero2_model_states_mem_needs`), which knows neither stages 0 and 1 nor float32. The modality says how large
the model is and what a micro-batch keeps (`Modality.memory`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from rl.config import Config
from rl.tasks.load import modality_of
from rl.train.deepspeed_json import half_precision, read_deepspeed_config

GIB = 2**30


@dataclass
class States:
    """Bytes of one learner on a rank's device, and in the host's memory for it."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    host: float = 0.0

    @property
    def device(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def model_states(total: int, trained: int, deepspeed: dict[str, Any], ranks: int) -> States:
    """Bytes of a learner.

    Args:
        total, trained: parameters of the model, and those of them with a gradient.
        deepspeed: the DeepSpeed config.
    """
    zero = deepspeed.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    half = half_precision(deepspeed)
    size = 2 if half else 4
    part = 1 / ranks
    parameters = size * total * (part if stage == 3 else 1)
    gradients = size * trained * (part if stage >= 2 else 1)
    # In float32 the parameters are their own master copy, and gradients are accumulated where they are.
    optimizer = (16 if half else 8) * trained * (part if stage >= 1 else 1)
    if stage and not half:
        # The flat part that the optimizer works on.
        optimizer += 4 * trained * part
    buffers = 0.0
    if stage in (1, 2):
        buckets = zero.get("reduce_bucket_size", 5e8) + zero.get("allgather_bucket_size", 5e8)
        buffers = size * min(buckets, 2 * trained)
    elif stage == 3:
        buffers = size * (
            min(zero.get("stage3_max_live_parameters", 1e9), total) + min(zero.get("reduce_bucket_size", 5e8), trained)
        )
    states = States(parameters, gradients, optimizer, buffers)
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        states.host, states.optimizer = states.host + states.optimizer, 0.0
    if zero.get("offload_param", {}).get("device", "none") != "none":
        states.host, states.parameters = states.host + states.parameters, 0.0
    return states


def memory_lines(config: Config, ranks: int, prompt_length: int, limit_gib: float | None = None) -> list[str]:
    """The plan, one line each.

    Args:
        ranks: processes, one device each.
        prompt_length: tokens of a prompt.
        limit_gib: memory of a device.

    Raises:
        ValueError: the config does not say how large the model is, or more than `limit_gib` is needed.
    """
    deepspeed = read_deepspeed_config(config.train.deepspeed)
    half = half_precision(deepspeed)
    model = modality_of(config.task.name).memory(config, ranks, prompt_length, half)
    total, trained = model.total, model.trained
    # What is frozen exists once, shared by all models of a rank; a learner that shards has its part of it besides.
    own = total if deepspeed.get("zero_optimization", {}).get("stage", 0) == 3 else trained
    value, reference = config.algorithm.critic(), config.algorithm.needs_reference
    learners = {"policy": model_states(own, trained, deepspeed, ranks)}
    if value and not value.share_backbone:
        learners["value model"] = model_states(own, trained, deepspeed, ranks)
    # Everybody samples with a whole copy, whatever the stage.
    copies = (2 if half else 4) * (total + trained * reference)
    if config.rollout.quantize != "none":
        model.held = {**model.held, "copy of 8 bits": total}
    states = sum(learner.device for learner in learners.values()) + copies + sum(model.held.values())
    learning, sampling = states + model.activations, states + sum(model.sampling.values())
    part = "" if trained == total else f"{trained / 1e6:.3g} M of them trained, "
    needed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in model.sampling.items())
    lines = [
        f"memory: {total / 1e9:.3g} B {model.what}, {part}{ranks} rank(s), {config.train.deepspeed}, per rank in GiB",
        *(f"memory: {learner_line(name, learner)}" for name, learner in learners.items()),
        f"memory: copy that samples{' and frozen reference' if reference else ''} {copies / GIB:.2f}",
        *(f"memory: {name} {size / GIB:.2f}" for name, size in model.held.items()),
        f"memory: learning: activations {model.activations / GIB:.2f} ({model.micro_batch})",
        *([f"memory: sampling: {needed}"] if needed else []),
        f"memory: peak {max(learning, sampling) / GIB:.1f} while {'learning' if learning > sampling else 'sampling'}"
        f"{model.without}",
    ]
    host = sum(learner.host for learner in learners.values())
    if host:
        lines.append(f"memory: on the host {host / GIB:.2f} per rank")
    if trained == total:
        lines += _deepspeed_says(total, deepspeed, ranks)
    if limit_gib is not None and max(learning, sampling) > limit_gib * GIB:
        raise ValueError(
            f"the plan needs {max(learning, sampling) / GIB:.1f} GiB per rank and --memory is {limit_gib:g}: "
            f"{model.cure}"
        )
    return lines


def learner_line(name: str, states: States) -> str:
    parts = {name: getattr(states, name) for name in ("parameters", "gradients", "optimizer", "buffers")}
    return f"{name}: " + ", ".join(f"{key} {value / GIB:.2f}" for key, value in parts.items())


def _deepspeed_says(total: int, deepspeed: dict[str, Any], ranks: int) -> list[str]:
    """DeepSpeed's own estimate of a learner's states; it assumes 16-bit parameters and stage 2 or 3."""
    import torch

    if not torch.cuda.is_available():
        # DeepSpeed would say at its import that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    zero = deepspeed.get("zero_optimization", {})
    offload = "offload_optimizer" in zero
    if zero.get("stage") == 2:
        _, device = estimate_zero2_model_states_mem_needs(total, ranks, 1, offload)
    elif zero.get("stage") == 3:
        _, device, _ = estimate_zero3_model_states_mem_needs(total, 0, ranks, 1, offload, "offload_param" in zero)
    else:
        return []
    return [f"memory: DeepSpeed's estimate of the policy's states, in 16 bits and without buffers: {device / GIB:.2f}"]
