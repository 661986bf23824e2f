"""The options of the section `model`, each once: type, default and one sentence (see `rl.sections`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rl.run_folder import model_folder
from rl.sections import Section


class PipelineConfig(Section):
    height: int | None = Field(None, ge=1, description="Height of the images in pixels; null takes the pipeline's.")
    width: int | None = Field(None, ge=1, description="Width of the images in pixels; null takes the pipeline's.")
    negative_prompt: str = Field("", description="Prompt of the unconditional half of guidance.")
    max_sequence_length: int | None = Field(
        None,
        ge=1,
        description="Tokens of T5 in SD3 and FLUX.1, of the text encoder in FLUX.2, Qwen-Image, Sana and Z-Image; "
        "null: the pipeline's.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the weights; the VAE stays in float32, since it overflows in half precision."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute the denoiser's activations in the backward.")


class LoraOptions(Section):
    rank: int = Field(0, ge=0, description="Rank of adapters on a model that is loaded; 0 trains all its weights.")
    alpha: int | None = Field(None, ge=1, description="Scale of the adapters times their rank; null is the rank.")
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Layers that get an adapter, by the ends of their names; null takes every linear layer below a "
        "language model's head, and the attention projections of an image model. Stacked experts are named: "
        "experts.gate_up_proj, experts.down_proj.",
    )
    dora: bool = Field(
        False,
        description="Image pipelines: the size of every output of a layer is trained apart from its adapter (DoRA).",
    )
    dropout: float = Field(0.0, description="Must be 0: the policy that is trained has to be the one that sampled.")

    @field_validator("dropout")
    @classmethod
    def _none(cls, value: float) -> float:
        if value != 0:
            raise ValueError(
                f"model.lora.dropout is {value:g}: rollout and update would see different policies, set it to 0"
            )
        return value

    @model_validator(mode="after")
    def _used(self) -> LoraOptions:
        set_without = [n for n in ("alpha", "targets", "dora") if getattr(self, n)]
        if not self.rank and set_without:
            name = set_without[0]
            raise ValueError(f"model.lora.{name} does nothing without adapters: set model.lora.rank or leave it out")
        return self


class ConvertOptions(Section):
    block_length: int | None = Field(
        None, ge=1, description="Block length of the diffusion model that an autoregressive model.path becomes."
    )
    mask_token: int | str = Field(
        "new", description="Its mask token: an id or a token of the tokenizer that no text uses, or new for one more."
    )
    readout: Literal["shifted", "unshifted"] = Field(
        "shifted", description="Token p is read at position p - 1, as the autoregressive model does, or at p (SDAR)."
    )
    context: Literal["causal", "block", "full"] = Field(
        "causal",
        description="Clean tokens see those to their left (NBDiff), or their whole block too; full has no blocks "
        "(Dream), block_length 1 stands for it.",
    )

    @model_validator(mode="after")
    def _used(self) -> ConvertOptions:
        if self.block_length is None and self.model_dump(exclude_defaults=True):
            raise ValueError("model.convert.block_length is missing: set it, or leave model.convert out")
        return self


class ContextOptions(Section):
    length: int | None = Field(
        None,
        ge=2,
        description="Positions that a loaded model is stretched to, by a larger base of its rotary embedding "
        "(LongLLaDA).",
    )
    trained_length: int | None = Field(
        None, ge=16, description="Positions it was trained with; null takes those of its config.json."
    )

    @model_validator(mode="after")
    def _used(self) -> ContextOptions:
        if self.length is None and self.trained_length is not None:
            raise ValueError("model.context.trained_length does nothing without model.context.length: set it too")
        return self


class VisionOptions(Section):
    tower: dict[str, Any] = Field(
        {},
        description="transformers config of a new vision tower in front of a decoder, with model_type "
        "(siglip_vision_model, clip_vision_model, vit); prompts may then hold images (docs/vision.md). A model that "
        "has a tower keeps it.",
    )
    path: str | None = Field(
        None,
        description="Folder or hub name of a trained vision tower to put in front of a decoder instead of a new one.",
    )
    placeholder: str | None = Field(
        None,
        min_length=1,
        description="Text of a prompt that stands for an image; null takes the model's, <image> of a new tower.",
    )
    train_tower: bool = Field(True, description="false keeps the tower as it is; its projector is trained anyway.")

    @model_validator(mode="after")
    def _one(self) -> VisionOptions:
        if self.tower and self.path is not None:
            raise ValueError("model.vision.tower describes a new tower and model.vision.path loads one: leave one out")
        return self

    @property
    def new(self) -> bool:
        """Whether a tower is put in front of the model."""
        return bool(self.tower) or self.path is not None


class ModelConfig(Section):
    path: str | None = Field(
        None,
        description="Folder or hub name of a model to start from, a .gguf file or package:NAME/FILE.gguf; a run folder "
        "stands for its newest checkpoint, null builds a new one.",
    )
    autoregressive: bool = Field(
        False,
        description="The model in path is an autoregressive one, to compare with: a folder, hub name, .gguf file or "
        "package:NAME/FILE.gguf that is sampled here, or http://HOST:PORT of a vLLM server (docs/vllm.md).",
    )
    autoregressive_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Weights and sampling of an autoregressive model here, that of eval.baseline included; float32 is "
        "the faster one on CPUs without AMX.",
    )
    family: str | None = Field(
        None,
        description="Layout of the model in path: llada, dream, sdar, llada_moe, llada2, sdar_moe, llama, qwen2, "
        "qwen3, mistral, gemma, gpt_neox, llava, llava_hub, diffusion_gemma, file.py:Class or pkg.module:Class; null "
        "goes by its config.json.",
    )
    convert: ConvertOptions = ConvertOptions()
    context: ContextOptions = ContextOptions()
    vision: VisionOptions = VisionOptions()
    tokenizer: str | None = Field(
        None, description="Folder or hub name of the tokenizer; null takes the model's, or the task's alphabet."
    )
    backbone: dict[str, Any] = Field(
        {},
        description="transformers config of a new model's backbone, with model_type; for images the built-in "
        "mlp_denoiser's, word_denoiser's or a diffusers network's arguments.",
    )
    scheduler: dict[str, Any] = Field(
        {}, description="Noise schedule of a new image model: name of a diffusers scheduler and its arguments."
    )
    pipeline: PipelineConfig = PipelineConfig()
    lora: LoraOptions = LoraOptions()
    initial_noise: Literal["standard", "learned"] = Field(
        "standard",
        description="Image models: learned freezes the denoiser and learns a Gaussian over the initial noise of every "
        "prompt of the task (recipe find).",
    )
    attention: Literal["full", "block_causal"] = Field("full", description="What a position of a new model may see.")
    block_length: int | None = Field(
        None, ge=1, description="Block size of a block-causal model; null takes that of a loaded one."
    )
    context_causal: bool = Field(
        False,
        description="Block-causal attention of a new model: clean tokens see only clean tokens to their left, also in "
        "their block (NBDiff).",
    )
    noise: Literal["absorbing", "uniform"] = Field(
        "absorbing", description="Noise that a new model takes away: tokens become masks, or random tokens."
    )
    logit_shift: Literal[0, 1] = Field(0, description="1 when the state at j-1 predicts token j (Dream).")
    train_router: bool = Field(
        True,
        description="Mixtures of experts: false keeps the routers as they are loaded; adapters leave them so anyway.",
    )
    attn_implementation: Literal["sdpa", "flex_attention"] = Field(
        "sdpa", description="Attention of the learner; flex_attention needs a GPU and skips what a mask hides."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute a layer's activations in the backward pass: less memory, one more forward."
    )
    head_chunk: int | None = Field(
        None,
        ge=1,
        description="Decisions whose logits the learner holds at once and computes again in the backward pass: less "
        "memory for long responses; null holds all, and so does guidance.",
    )
    self_conditioning_gradient: bool = Field(
        False,
        description="DiffusionGemma: the gradient of a step also passes through the earlier predictions that it was "
        "conditioned on; exact, and every step's activations are kept.",
    )
    eos_token: str | None = Field(
        None, description="Token that ends a response, such as <|im_end|>; null takes the tokenizer's end token."
    )
    never_generate: list[int | str] = Field(
        [],
        description="Token ids or strings that are never generated, besides the mask token and ids the tokenizer does "
        "not know; special stands for all of the tokenizer's special tokens.",
    )
    conditions: dict[str, str] = Field(
        {},
        description="New prompt tokens, and the token of the trained model whose embedding each starts with (recipe "
        "ctrl); new classes of the built-in image model.",
    )
    choices: int | None = Field(
        None, ge=2, description="Add a head that chooses between so many values of sampler.choose; a saved one stays."
    )
    joint_head: bool = Field(
        False,
        description="Add one layer that tells what the model would say after tokens are revealed, for sft.joint and "
        "sampler.joint_steps; a saved one stays.",
    )
    wrap: bool = Field(
        True, description="Masked LMs: put the tokenizer's begin and end tokens around every canvas, inside the model."
    )

    @field_validator("path")
    @classmethod
    def _of_a_run(cls, path: str | None) -> str | None:
        return None if path is None else model_folder(path)
