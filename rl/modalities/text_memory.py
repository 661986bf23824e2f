"""What a text model needs of memory; `rl.train.memory` has the states, and the lines.

Activations are not estimated but counted: the model is built on the meta device, scores a micro-batch of the
shapes that the config implies, and autograd is asked what it keeps. What no config tells is the allocator's loss
to fragmentation, and the CUDA context (about 0.5 GiB).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig, DynamicCache

from rewards.causal_lm import empty_causal_lm
from rl.config import Config
from rl.errors import about
from rl.estimators.logprob import logprob_and_entropy
from rl.modalities.memory import ModelMemory, num_parameters, saved_bytes
from rl.models import routing
from rl.models.canvas_lm import CanvasLM, CleanText
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rl.models.families.diffusion_gemma import DiffusionGemma
from rl.models.folder import backbone_of, is_url, local_config, shape_of, vision_described
from rl.models.lora import add_adapters
from rl.models.vision import Vision
from rollouts.engines.base import Request
from rollouts.engines.tokens import token_engine

if TYPE_CHECKING:
    from rollouts.trajectory import TokenTrajectory


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


def activations(
    build: Callable[[int], DiffusionLM | CanvasLM], num_layers: int, shape: BatchShape, head_chunk: int | None = None
) -> Activations:
    """Count what a micro-batch keeps, on models of one and of two layers; layers are alike.

    Args:
        build: number of layers -> model on the meta device, in the dtype it computes in.
        head_chunk: see `model.head_chunk`.
    """
    # With chunks the head is counted for one of them; of the others, the states that it reads are kept.
    at_head = min(shape.decisions, head_chunk or shape.decisions)

    def kept(layers: int) -> tuple[int, DiffusionLM | CanvasLM]:
        model = build(layers)
        device = next(model.parameters()).device
        ids = torch.zeros(shape.rows, shape.width, dtype=torch.int64, device=device)
        visible = torch.ones(
            shape.rows, shape.width if shape.masked else 1, shape.width, dtype=torch.bool, device=device
        )
        place = torch.zeros(at_head, dtype=torch.int64, device=device)

        def score() -> object:
            if isinstance(model, CanvasLM):
                hidden = model.denoise(ids[:, -model.canvas_length :], _clean_text(model, ids))
            else:
                hidden = model.hidden_states(ids, visible=visible, position_ids=torch.zeros_like(ids))
            return logprob_and_entropy(model.token_logits(hidden[place, place]), place, 1.0)

        return saved_bytes(score, model), model

    one, model = kept(1)
    two, _ = kept(2)
    size = next(model.parameters()).element_size()
    # Built once for all layers, and again in the kernel's own form.
    mask = shape.rows * shape.width**2 * (1 + size) if shape.masked else 0
    width, vocab = model.hidden_size, model.vocab_size
    return Activations(
        num_layers=num_layers,
        layer=two - one,
        layer_input=size * shape.rows * shape.width * width,
        rest=2 * one - two + mask + (size * width * shape.decisions if at_head < shape.decisions else 0),
        # The logits' gradient, in float32 and in the model's precision.
        head_backward=at_head * vocab * (4 + size),
    )


def _clean_text(model: CanvasLM, ids: torch.Tensor) -> CleanText:
    """What stands before the canvases [R, W], as it is copied for every row; what its encoder keeps is not counted."""
    cache, before = DynamicCache(), ids.shape[1] - model.canvas_length
    for index, layer in enumerate(model.body.layers):
        size = (len(ids), layer.self_attn.k_proj.out_features // layer.self_attn.head_dim, before)
        states = torch.empty(*size, layer.self_attn.head_dim, dtype=model.dtype, device=ids.device)
        cache.update(states, torch.empty_like(states), index)
    return CleanText(cache, torch.zeros_like(ids[:, 0]))


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
    if config.algorithm.reward_gradient:
        raise ValueError("--plan counts no relaxed rollout: it needs another algorithm.gradient than pathwise")
    train = config.train
    per_update = train.prompts_per_step * train.group_size // train.updates_per_step
    count = min(train.micro_batch_size, per_update)
    model, trajectories = _rollouts(config, prompt_length, min(count, 2))
    rows = config.algorithm.rows(trajectories, model)
    per_trajectory = rows.num_rows / len(trajectories)
    width = -(-rows.num_tokens // rows.num_rows)
    tokens = len(rows.row) if hasattr(rows, "row") else rows.num_rows * config.sampler.gen_length
    if model.canvas_length:
        # A step may decide its whole canvas.
        tokens = rows.num_rows * model.canvas_length
    return BatchShape(
        rows=int(np.ceil(per_trajectory * count)),
        width=width,
        decisions=int(tokens / len(trajectories) * count),
        # A FlexAttention block mask holds tiles, not positions.
        masked=model.attention == "block_causal" and config.model.attn_implementation == "sdpa",
    )


class _Undecided:
    """A `DenoisingModel` to which all tokens are equally likely: rollouts take as many steps as the config allows."""

    mask_token_id = 15

    def __init__(self, config: Config, max_length: int):
        self.attention, self.block_length = config.model.attention, config.model.block_length
        self.logit_shift, self.max_length = config.model.logit_shift, max_length
        self.canvas_length = config.model.backbone.get("canvas_length")
        self.noise = "uniform" if self.canvas_length else config.model.noise
        self.vocab_size = self.mask_token_id + 1
        # Under full attention the shortest blocks make the most copies of the canvas. In packed rows a copy is as long
        # as its block, and the longest, which take the most steps each, make the most tokens.
        self.values = config.sampler.choose.values if config.sampler.choose is not None else []
        self.worst = max if self.attention == "block_causal" else min
        self.choice_head = SimpleNamespace(out_features=len(self.values))

    def choice_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*hidden.shape[:-1], len(self.values)), -1e9)
        logits[..., self.values.index(self.worst(self.values))] = 0
        return logits

    def hidden_states(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.zeros(*input_ids.shape, 1)

    def encode(self, *_: Any) -> _Undecided:
        return self

    def select(self, rows: torch.Tensor) -> _Undecided:
        return self

    def denoise(self, canvas: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.hidden_states(canvas)

    def signal(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], self.vocab_size)
        logits[..., self.mask_token_id] = -1e9
        return logits


def _rollouts(config: Config, prompt_length: int, count: int) -> tuple[Any, list[TokenTrajectory]]:
    model: Any = _Undecided(config, prompt_length + 2 * config.sampler.gen_length)
    # No end token: a response of the full length is the one that memory has to hold.
    # Neither a constraint nor a guide makes a rollout longer.
    options = config.sampler.model_copy(update={"constraint": None, "guide": None})
    engine = token_engine(model, options, eos_token_id=None, approximate_cache=config.rollout.cache)
    return model, engine.generate([Request([0] * prompt_length, seed=i) for i in range(count)])


def text_memory(config: Config, ranks: int, prompt_length: int, half: bool) -> ModelMemory:
    """See `rl.modalities.base.Modality.memory`."""
    if any("experts." in target for target in config.model.lora.targets or ()):
        raise ValueError("--plan counts no adapters on experts: take them out of model.lora.targets for it")
    file = local_config(config.model.path) if config.model.path is not None else None
    tower = vision_described(config.model, None if file is None else json.loads(file.read_text()))
    config, source = _as_loaded(config)
    sizes = dict(config.model.backbone)
    dtype = torch.bfloat16 if half else torch.float32

    def build(layers: int) -> DiffusionLM | CanvasLM:
        model: Any
        if sizes["model_type"] == DiffusionGemma.model_type:
            model = _canvas_model(sizes, layers)
            if config.model.lora.rank:
                with torch.device("meta"):
                    add_adapters(model, config.model.lora, "", 0)
            return model.to(dtype)  # type: ignore[no-any-return]
        backbone = AutoConfig.for_model(**sizes)
        if layers < backbone.num_hidden_layers and getattr(backbone, "first_k_dense_replace", 0):
            # The layers that activations are counted on are all of the kind that most are.
            backbone.first_k_dense_replace = 0
        backbone.num_hidden_layers = layers
        described = {**backbone.to_dict(), "layer_types": None}
        with torch.device("meta"):
            model = DiffusionLM(
                DiffusionLMConfig(
                    backbone=described,
                    mask_token_id=0,
                    attention=config.model.attention,
                    block_length=config.model.block_length,
                )
            )
            if config.model.lora.rank:
                add_adapters(model, config.model.lora, "", 0)
            if not config.model.train_router:
                routing.freeze(model)
        return model.to(dtype)

    backbone = AutoConfig.for_model(**sizes).get_text_config()
    layers = backbone.num_hidden_layers
    total, trained = num_parameters(build(layers))
    if tower is not None:
        with torch.device("meta"):
            vision = Vision(tower, backbone.hidden_size)
        total += num_parameters(vision)[0]
        # Adapters leave tower and projector as they are.
        if not config.model.lora.rank:
            trained += num_parameters(vision if config.model.vision.train_tower else vision.projector)[0]
        source += ", the activations of the vision tower not counted"
    shape = batch_shape(config, prompt_length)
    guide, read = _guide_bytes(config)
    recompute = config.model.gradient_checkpointing
    cache, logits = _rollout_bytes(config, backbone, 2 if half else 4, ranks, prompt_length)
    return ModelMemory(
        total,
        trained,
        activations(build, layers, shape, config.model.head_chunk).peak(recompute),
        f"{shape.rows} row(s) of {shape.width} tokens with {shape.decisions} decisions, prompts of {prompt_length}, "
        f"{'re' if recompute else 'not re'}computed",
        sampling={"rollout cache": cache, "logits": logits} | ({"logits of sampler.guide": read} if read else {}),
        held={"sampler.guide": guide} if guide else {},
        what=f"parameters by {source}",
        cure="take more ranks, a higher ZeRO stage or offloading (train.deepspeed), model.gradient_checkpointing, or a "
        "smaller train.micro_batch_size or rollout.max_batch_size",
    )


def _canvas_model(described: dict[str, Any], layers: int) -> CanvasLM:
    """DiffusionGemma on the meta device with its last layers, of which the last one sees the whole clean text."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    config: Any = DiffusionGemmaConfig(**described)
    kinds = config.text_config.layer_types[-layers:]
    text = {**described["text_config"], "num_hidden_layers": layers, "layer_types": kinds}
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(**{**described, "text_config": text}))
        return CanvasLM(model, None)


def _as_loaded(config: Config) -> tuple[Config, str]:
    """The config whose `model` section describes the model that will be trained, and where its sizes come from.

    A folder in `model.path` describes itself. A hub name, or no path at all, leaves it to `model.backbone`.

    Raises:
        ValueError: neither says.
    """
    path = config.model.path
    file = local_config(path) if path is not None else None
    if file is not None:
        with about(f"model.path {path!r}"):
            described = json.loads(file.read_text())
            _, _, block = shape_of(described, config.model, None)
            known = {
                # Of DiffusionGemma the canvas belongs to it.
                "backbone": described if "canvas_length" in described else backbone_of(described, config.model.family),
                "attention": "full" if block is None else "block_causal",
                "block_length": block,
                "noise": described.get("noise", "absorbing"),
            }
        config = config.model_copy(update={"model": config.model.model_copy(update=known)})
    backbone = config.model.backbone
    if "model_type" not in backbone or "vocab_size" not in backbone.get("text_config", backbone):
        raise ValueError(
            "model.backbone must give model_type, vocab_size and the model's dimensions for --plan; with a hub name in "
            "model.path they describe the checkpoint and build nothing"
        )
    return config, str(file) if file is not None else "model.backbone"


def _guide_bytes(config: Config) -> tuple[float, float]:
    """The weights of a guide in this process, and its logits of the answers that it reads in one forward."""
    guide = config.sampler.guide
    if guide is None or is_url(guide.model):
        return 0.0, 0.0
    with torch.device("meta"):
        model = empty_causal_lm(guide.model)
    size = 2 if guide.dtype == "bfloat16" else 4
    # In its own precision; those of one answer in float32 too, and as log-probs.
    tokens = size * guide.batch_size + 4 + 4
    return num_parameters(model)[0] * size, config.sampler.gen_length * model.config.vocab_size * tokens


def _rollout_bytes(config: Config, backbone: Any, size: int, ranks: int, prompt_length: int) -> tuple[float, float]:
    """Key-value store of the requests decoded together, and the sampler's logits of a denoising step."""
    train, sampler = config.train, config.sampler
    together = min(config.rollout.max_batch_size, -(-train.prompts_per_step * train.group_size // ranks))
    canvas = config.model.backbone.get("canvas_length")
    cached = config.model.attention == "block_causal" or config.rollout.cache != "none" or canvas is not None
    layers = range(backbone.num_hidden_layers)
    if canvas:
        # Layers differ.
        width = sum(
            backbone.per_layer_config[i].num_key_value_heads * backbone.per_layer_config[i].head_dim for i in layers
        )
    else:
        heads = getattr(backbone, "num_key_value_heads", None) or backbone.num_attention_heads
        head = getattr(backbone, "head_dim", None) or backbone.hidden_size // backbone.num_attention_heads
        width = len(layers) * heads * head
    states = 2 * width * size
    length = prompt_length + sampler.gen_length
    masked = together * (
        sampler.gen_length if sampler.record_x0 else sampler.block_length or canvas or sampler.gen_length
    )
    # Logits in the model's precision and in float32, tempered, as log-probs, and their cumulative sum in float64.
    return cached * together * (length + 1) * states, masked * backbone.vocab_size * (size + 4 + 4 + 4 + 8 + 8)
