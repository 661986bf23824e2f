"""What a run will need of memory, per rank, before there is a GPU or a checkpoint: `denoise-rl check --plan`.

States follow ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054): a parameter costs its copy in the compute
precision, its gradient, and in float32 the accumulated gradient, the master copy and Adam's two moments; each is
whole on every rank or one part of `ranks`, by stage. In bfloat16 this is DeepSpeed's own estimate
(`estimate_zero2_model_states_mem_needs`), which knows neither stages 0 and 1 nor float32.

Activations are not estimated but counted: the model is built on the meta device, scores a micro-batch of the
shapes that the config implies, and autograd is asked what it keeps. What no config tells is the allocator's loss
to fragmentation, and the CUDA context (about 0.5 GiB).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from rl.config import Config
from rl.train.learner import read_deepspeed_config
from rl.train.plan import modality_of

if TYPE_CHECKING:
    from rl.models.diffusion_lm import DiffusionLM
    from rollouts.trajectory import TokenTrajectory

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
    half = any(deepspeed.get(kind, {}).get("enabled", False) for kind in ("bf16", "fp16"))
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


@dataclass
class Activations:
    """Bytes of a micro-batch: one layer's, everything outside the layers, and what the backward adds at the head."""

    num_layers: int
    layer: float
    layer_input: float
    rest: float
    head_backward: float

    def peak(self, recompute: bool) -> float:
        """With recomputation only a layer's input is kept, and the inside of one layer at a time."""
        layers = self.num_layers * self.layer_input + self.layer if recompute else self.num_layers * self.layer
        return layers + self.rest + self.head_backward


class _KernelAttention(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs, its output and one float32 per query and head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise AssertionError("only the forward pass is counted")


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch would take the attention apart and keep every query's row of weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _KernelAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def saved_bytes(run: Callable[[], object], parameters: set[int]) -> int:
    """Bytes that autograd keeps for the backward pass of `run`, each storage once, parameters left out."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _FusedAttention():
        result = run()
    del result
    return sum(storage.nbytes() for storage in kept.values())


def activations(build: Callable[[int], DiffusionLM], num_layers: int, shape: BatchShape) -> Activations:
    """Count what a micro-batch keeps, on models of one and of two layers; layers are alike.

    Args:
        build: number of layers -> model on the meta device, in the dtype it computes in.
    """
    from rl.estimators.logprob import logprob_and_entropy

    def kept(layers: int) -> tuple[int, DiffusionLM]:
        model = build(layers)
        device = next(model.parameters()).device
        ids = torch.zeros(shape.rows, shape.width, dtype=torch.int64, device=device)
        visible = torch.ones(
            shape.rows, shape.width if shape.masked else 1, shape.width, dtype=torch.bool, device=device
        )
        place = torch.zeros(shape.decisions, dtype=torch.int64, device=device)

        def score() -> object:
            hidden = model.hidden_states(ids, visible=visible, position_ids=torch.zeros_like(ids))
            return logprob_and_entropy(model.token_logits(hidden[place, place]), place, 1.0)

        return saved_bytes(score, {p.untyped_storage()._cdata for p in model.parameters()}), model

    one, model = kept(1)
    two, _ = kept(2)
    size = next(model.parameters()).element_size()
    # Built once for all layers, and again in the kernel's own form.
    mask = shape.rows * shape.width**2 * (1 + size) if shape.masked else 0
    width, vocab = model.lm_head.in_features, model.lm_head.out_features
    return Activations(
        num_layers=num_layers,
        layer=two - one,
        layer_input=size * shape.rows * shape.width * width,
        rest=2 * one - two + mask,
        # The logits' gradient, in float32 and in the model's precision.
        head_backward=shape.decisions * vocab * (4 + size),
    )


@dataclass
class BatchShape:
    """A micro-batch: rows x width tokens, token decisions, and whether every query has a mask of its own."""

    rows: int
    width: int
    decisions: int
    masked: bool


def batch_shape(config: Config, prompt_length: int) -> BatchShape:
    """What the recipe's estimator builds from the trajectories of a micro-batch.

    The trajectories are real ones, of the config's own sampler.
    """
    train = config.train
    per_update = train.prompts_per_step * train.group_size // train.updates_per_step
    count = min(train.micro_batch_size, per_update)
    model, trajectories = _rollouts(config, prompt_length, min(count, 2))
    rows = config.algorithm.build().rows(trajectories, model, None, None)
    per_trajectory = rows.num_rows / len(trajectories)
    width = -(-rows.num_tokens // rows.num_rows)
    tokens = len(rows.row) if hasattr(rows, "row") else rows.num_rows * config.sampler.gen_length
    return BatchShape(
        rows=int(np.ceil(per_trajectory * count)),
        width=width,
        decisions=int(tokens / len(trajectories) * count),
        masked=model.attention == "block_causal",
    )


class _Undecided:
    """A `DenoisingModel` to which all tokens are equally likely: rollouts take as many steps as the config allows."""

    mask_token_id = 15

    def __init__(self, config: Config, max_length: int):
        self.attention, self.block_length = config.model.attention, config.model.block_length
        self.logit_shift, self.max_length = config.model.logit_shift, max_length

    def hidden_states(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.zeros(*input_ids.shape, 1)

    def token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], self.mask_token_id + 1)
        logits[..., self.mask_token_id] = -1e9
        return logits


def _rollouts(config: Config, prompt_length: int, count: int) -> tuple[Any, list[TokenTrajectory]]:
    from rollouts.engines.in_process import InProcessEngine, Request

    model: Any = _Undecided(config, prompt_length + 2 * config.sampler.gen_length)
    # No end token: a response of the full length is the one that memory has to hold.
    engine = InProcessEngine(model, config.sampler, eos_token_id=None, approximate_cache=config.rollout.cache)
    return model, engine.generate([Request([0] * prompt_length, seed=i) for i in range(count)])


def memory_lines(config: Config, ranks: int, prompt_length: int, limit_gib: float | None = None) -> list[str]:
    """The plan, one line each.

    Args:
        ranks: processes, one device each.
        prompt_length: tokens of a prompt.
        limit_gib: memory of a device.

    Raises:
        ValueError: the config does not say how large the model is, or more than `limit_gib` is needed.
    """
    from transformers import AutoConfig

    from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
    from rl.models.lora import add_adapters

    if modality_of(config) == "images":
        from rl.train.image_memory import image_memory_lines

        return image_memory_lines(config, ranks, limit_gib)
    deepspeed = read_deepspeed_config(config.train.deepspeed)
    half = any(deepspeed.get(kind, {}).get("enabled", False) for kind in ("bf16", "fp16"))
    dtype = torch.bfloat16 if half else torch.float32
    shape_of = _backbone(config)

    def build(layers: int) -> DiffusionLM:
        backbone = AutoConfig.for_model(**shape_of)
        backbone.num_hidden_layers = layers
        described = {**backbone.to_dict(), "layer_types": None}
        with torch.device("meta"):
            model: Any = DiffusionLM(
                DiffusionLMConfig(
                    backbone=described,
                    mask_token_id=0,
                    attention=config.model.attention,
                    block_length=config.model.block_length,
                )
            )
            if config.model.lora.rank:
                add_adapters(model, config.model.lora, "", 0)
        return model.to(dtype)

    backbone = AutoConfig.for_model(**shape_of)
    layers = backbone.num_hidden_layers
    weights = list(build(layers).parameters())
    total, trained = sum(p.numel() for p in weights), sum(p.numel() for p in weights if p.requires_grad)
    # What is frozen exists once, shared by all models of a rank; a learner that shards has its part of it besides.
    own = total if deepspeed.get("zero_optimization", {}).get("stage", 0) == 3 else trained
    recipe = config.algorithm.build()
    value = getattr(recipe, "value", None)
    policy = model_states(own, trained, deepspeed, ranks)
    critic = model_states(own, trained, deepspeed, ranks) if value and not value.share_backbone else None
    shape = batch_shape(config, prompt_length)
    recompute = config.model.gradient_checkpointing
    micro = activations(build, layers, shape).peak(recompute)
    size = 2 if half else 4
    # Everybody samples with a whole copy, whatever the stage.
    copies = size * (total + trained * recipe.needs_reference)
    cache, logits = _rollout_bytes(config, backbone, size, ranks, prompt_length)
    states = policy.device + (critic.device if critic else 0.0)
    learning, sampling = states + copies + micro, states + copies + cache + logits
    part = "" if trained == total else f"{trained / 1e6:.3g} M of them trained, "
    lines = [
        f"memory: {total / 1e9:.3g} B parameters, {part}{ranks} rank(s), {config.train.deepspeed}, per rank in GiB",
        f"memory: {learner_line('policy', policy)}",
        *([f"memory: {learner_line('value model', critic)}"] if critic else []),
        f"memory: copy that samples{' and frozen reference' if recipe.needs_reference else ''} {copies / GIB:.2f}",
        f"memory: learning: activations {micro / GIB:.2f} ({shape.rows} row(s) of {shape.width} tokens with "
        f"{shape.decisions} decisions, prompts of {prompt_length}, {'re' if recompute else 'not re'}computed)",
        f"memory: sampling: rollout cache {cache / GIB:.2f}, logits {logits / GIB:.2f}",
        f"memory: peak {max(learning, sampling) / GIB:.1f} while {'learning' if learning > sampling else 'sampling'}",
    ]
    host = policy.host + (critic.host if critic else 0.0)
    if host:
        lines.append(f"memory: on the host {host / GIB:.2f} per rank")
    if trained == total:
        lines += _deepspeed_says(total, deepspeed, ranks)
    if limit_gib is not None and max(learning, sampling) > limit_gib * GIB:
        raise ValueError(
            f"the plan needs {max(learning, sampling) / GIB:.1f} GiB per rank and --memory is {limit_gib:g}: take more "
            "ranks, a higher ZeRO stage or offloading (train.deepspeed), model.gradient_checkpointing, or a smaller "
            "train.micro_batch_size or rollout.max_batch_size"
        )
    return lines


def learner_line(name: str, states: States) -> str:
    parts = {name: getattr(states, name) for name in ("parameters", "gradients", "optimizer", "buffers")}
    return f"{name}: " + ", ".join(f"{key} {value / GIB:.2f}" for key, value in parts.items())


def _deepspeed_says(total: int, deepspeed: dict[str, Any], ranks: int) -> list[str]:
    """DeepSpeed's own estimate of a learner's states; it assumes 16-bit parameters and stage 2 or 3."""
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


def _backbone(config: Config) -> dict[str, Any]:
    """The model's dimensions, from the config or from the folder it names.

    Raises:
        ValueError: neither says.
    """
    described = dict(config.model.backbone)
    file = Path(config.model.path or "") / "config.json"
    if not described and config.model.path and file.is_file():
        from rl.models.load import backbone_of

        described = backbone_of(json.loads(file.read_text()), config.model.family)
    if "model_type" not in described or "vocab_size" not in described:
        raise ValueError(
            "model.backbone must give model_type, vocab_size and the model's dimensions for --plan; with model.path "
            "set they describe the checkpoint and build nothing"
        )
    return described


def _rollout_bytes(config: Config, backbone: Any, size: int, ranks: int, prompt_length: int) -> tuple[float, float]:
    """Key-value store of the requests decoded together, and the sampler's logits of a denoising step."""
    train, sampler = config.train, config.sampler
    together = min(config.rollout.max_batch_size, -(-train.prompts_per_step * train.group_size // ranks))
    cached = config.model.attention == "block_causal" or config.rollout.cache != "none"
    heads = getattr(backbone, "num_key_value_heads", None) or backbone.num_attention_heads
    head = getattr(backbone, "head_dim", None) or backbone.hidden_size // backbone.num_attention_heads
    states = 2 * backbone.num_hidden_layers * heads * head * size
    length = prompt_length + sampler.gen_length
    masked = together * (sampler.gen_length if sampler.record_x0 else sampler.block_length or sampler.gen_length)
    # Logits in the model's precision and in float32, tempered, as log-probs, and their cumulative sum in float64.
    return cached * together * (length + 1) * states, masked * backbone.vocab_size * (size + 4 + 4 + 4 + 8 + 8)
