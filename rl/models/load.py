"""Build, load and save policies and tokenizers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rewards.weights import first_line
from rl.model_section import ContextOptions, ConvertOptions, ModelConfig, PipelineConfig
from rl.models import lora
from rl.models.context import stretched
from rl.models.families import family_of, open_family
from rl.models.families.causal import CausalFamily, causal_family, settings_of
from rl.models.families.diffusion_gemma import DiffusionGemma
from rl.models.folder import check_backbone, check_model_folder, local_folder, read_config
from rl.models.tokenizers import read_tokenizer
from rl.models.vision import add_vision
from rl.models.vocabulary import as_ranges, excluded_ranges
from rl.registry import FAMILIES

if TYPE_CHECKING:
    from rl.models.diffusion_lm import DiffusionLM

# Set on every small model built from a config: the policy that is scored must be the one that sampled.
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_dropout": 0.0}


def load_policy(config: ModelConfig, tokenizer: Any, seed: int) -> Any:
    """A policy from a folder or hub name, or a new one with weights drawn from `seed`.

    A folder of adapters gives the model they belong to with them in it; `model.lora.rank` puts new ones into any other.

    Args:
        tokenizer: says which ids can be decoded; None leaves that as the folder has it.

    Returns:
        a `DenoisingModel`: `DiffusionLM`, or `MaskedLM` around a Hugging Face masked LM.

    Raises:
        ValueError: the folder is missing or incomplete, or the config describes no model.
    """
    if config.pipeline != PipelineConfig():
        raise ValueError("model.pipeline is for image models: this task is text, take it out of the config")
    if config.path is not None:
        check_model_folder(config.path)
        base = lora.base_of(config.path)
        if base is None:
            model = _from_path(config, tokenizer)
            if config.lora.rank:
                lora.add_adapters(model, config.lora, config.path, seed)
        else:
            model = _with_adapters(config, base, tokenizer)
    elif config.family is not None:
        raise ValueError(f"model.family {config.family!r} is the layout of a trained model: set model.path")
    elif config.context.length:
        raise ValueError("model.context.length stretches a trained model: set model.path")
    elif config.lora.rank:
        raise ValueError(f"model.lora.rank is {config.lora.rank}: adapters need a model to adapt, set model.path")
    else:
        model = _new(config, tokenizer, seed)
    if config.vision.new:
        if lora.has_adapters(model) and model.vision is None:
            raise ValueError("model.vision puts new weights in front, which adapters are saved without: train it first")
        add_vision(model, config.vision, seed)
    if getattr(model, "vision", None) is not None and not config.vision.train_tower:
        model.vision.tower.requires_grad_(False)
    if config.choices:
        if lora.has_adapters(model) or not hasattr(model, "choose_between"):
            raise ValueError(
                "model.choices is a head of a diffusion language model, which adapters leave alone: leave it out"
            )
        model.choose_between(config.choices)
    if config.joint_head:
        if lora.has_adapters(model) or not hasattr(model, "add_joint_head"):
            raise ValueError(
                "model.joint_head is for diffusion language models, and is not saved with adapters: leave it out"
            )
        model.add_joint_head(seed)
    if getattr(model, "joint_head", None) is not None:
        # The stage `sft.joint` alone trains it.
        model.joint_head.requires_grad_(False)
    if config.conditions and config.path is None:
        raise ValueError("model.conditions are added to a trained model: set model.path")
    if tokenizer is not None:
        if config.conditions:
            from rl.models.conditions import add_to_model

            add_to_model(model, tokenizer, config.conditions)
        if tokenizer.mask_token_id not in (None, model.mask_token_id):
            raise ValueError(
                f"model.tokenizer has mask token id {tokenizer.mask_token_id} and the model {model.mask_token_id}: "
                "set model.tokenizer to the model's own"
            )
        # A folder keeps what it was trained without.
        never = [*config.never_generate, *config.conditions]
        ranges = [*model.excluded_token_ids, *excluded_ranges(tokenizer, model.vocab_size, never)]
        model.exclude(as_ranges(i for start, stop in ranges for i in range(start, stop)))
    if not config.train_router:
        from rl.models.routing import freeze

        freeze(model)
    model.head_chunk = config.head_chunk
    if config.self_conditioning_gradient:
        if not hasattr(model, "self_conditioning_gradient"):
            raise ValueError("model.self_conditioning_gradient is for DiffusionGemma: leave it out")
        model.self_conditioning_gradient = True
    if config.gradient_checkpointing:
        # It acts in the learner alone, which sets the layers' training flag.
        model.activation_checkpointing_enable()
    return model


def _new(config: ModelConfig, tokenizer: Any, seed: int) -> DiffusionLM:
    from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig

    if not config.backbone:
        raise ValueError("model.backbone or model.path is required: there is no model to train")
    check_backbone(config.backbone)
    if tokenizer.mask_token_id is None:
        raise ValueError("model.tokenizer has no mask token: a masked-diffusion model needs one")
    backbone = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    return DiffusionLM(
        DiffusionLMConfig(
            backbone={**backbone, **_NO_DROPOUT, **config.backbone},
            tie_word_embeddings=bool(config.backbone.get("tie_word_embeddings", False)),
            mask_token_id=tokenizer.mask_token_id,
            attention=config.attention,
            block_length=config.block_length,
            logit_shift=config.logit_shift,
            context_causal=config.context_causal,
            noise=config.noise,
            attn_implementation=config.attn_implementation,
        )
    ).eval()


def _from_path(config: ModelConfig, tokenizer: Any) -> Any:
    """The model that the folder's config.json describes, in eval mode."""
    from safetensors import SafetensorError
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    assert config.path is not None
    _quiet()
    try:
        described = read_config(config.path)
        family = family_of(described, config.family)
        causal_family(family, described, config.convert)
        if config.family is None and described.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            from rl.models.masked_lm import load_masked_lm

            if config.context.length:
                raise ValueError("model.context.length is for decoders with a rotary embedding: leave it out")
            return load_masked_lm(config.path, tokenizer, config.wrap)
        if isinstance(family, DiffusionGemma):
            from rl.models.canvas_lm import load_canvas_lm

            family.fields(described)
            return load_canvas_lm(config.path, tokenizer)
        return _diffusion_lm(config, described, None if tokenizer is None else tokenizer.mask_token_id)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model.path {config.path!r} cannot be loaded: {first_line(error)}") from error


def _with_adapters(config: ModelConfig, base: str, tokenizer: Any) -> Any:
    """The base model with the adapters of the folder `config.path` and what else that folder says about the policy."""
    assert config.path is not None
    try:
        check_model_folder(base)
        saved = read_config(config.path)
        settings = config.model_copy(update={"path": base, "family": config.family or saved.get("family")})
        if saved.get("context"):
            settings.context = ContextOptions(**saved["context"])
        if isinstance(family_of(read_config(base), settings.family), CausalFamily):
            settings.convert = settings_of(saved)
        model = _from_path(settings, tokenizer or read_tokenizer(config.path))
    except ValueError as error:
        raise ValueError(f"model.path {config.path!r}, adapters of another model: {error}") from error
    model.adopt(saved)
    if config.block_length is not None:
        model.config.block_length = config.block_length
    lora.load_adapters(model, config.path, config.lora)
    return model


def model_fields(
    described: Mapping[str, Any],
    block_length: int | None = None,
    family: str | None = None,
    convert: ConvertOptions | None = None,
    mask_token_id: int | None = None,
) -> dict[str, Any]:
    """Arguments of `DiffusionLMConfig` from a config.json in our own layout or a published one.

    Args:
        block_length: overrides the file's.
        family: `model.family`.
        convert, mask_token_id: see `CausalFamily.fields`.

    Raises:
        ValueError: it is neither, or a published one that this code does not know how to read.
    """
    found = family_of(described, family)
    if isinstance(found, CausalFamily):
        return found.fields(described, block_length, convert, mask_token_id)
    if found is not None:
        return found.fields(described, block_length) | ({"family": _from_anywhere(family)} if family else {})
    if described.get("model_type") != "diffusion_lm":
        # LLaDA and its mixture of experts have one model_type.
        known = ", ".join(dict.fromkeys(open_family(name).model_type for name in FAMILIES.names()))
        raise ValueError(
            f"config.json says model_type {described.get('model_type')!r}: known are diffusion_lm, {known}, and masked "
            "LMs of transformers; model.family names a family of your own"
        )
    return dict(described) | ({"block_length": block_length} if block_length else {})


def _from_anywhere(address: str) -> str:
    """The address with a file's full path, so that a saved model finds it wherever it is loaded."""
    file, _, name = address.rpartition(":")
    return f"{Path(file).resolve()}:{name}" if file.endswith(".py") else address


def _diffusion_lm(config: ModelConfig, described: dict[str, Any], mask_token_id: int | None) -> DiffusionLM:
    from transformers.initialization import no_init_weights

    from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
    from rl.models.weights import Folder, check_weights, lay_out, shapes_in_file

    assert config.path is not None
    where = f"model.path {config.path!r}"
    try:
        fields = model_fields(described, config.block_length, config.family, config.convert, mask_token_id)
        asked = config.context.model_dump() if config.context.length else None
        before = fields.get("context")
        if asked and before is None:
            fields |= {"backbone": stretched(fields["backbone"], config.context), "context": asked}
        elif asked and asked != before:
            assert before is not None
            raise ValueError(f"model.context.length: it is stretched to {before['length']} already, leave it out")
        # A mask token of its own lies behind the vocabulary until there are weights to make it of.
        mask_token_id, new = fields["mask_token_id"], 0
        if config.convert.block_length and mask_token_id is not None:
            new = max(0, mask_token_id + 1 - int(fields["backbone"]["vocab_size"]))
            fields["mask_token_id"] = 0 if new else mask_token_id
        files = Folder(local_folder(config.path))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    # Built where it stays and not on the meta device: buffers that no file holds (rotary frequencies) are then right.
    before = torch.get_default_dtype()
    torch.set_default_dtype(files.dtype)
    try:
        with no_init_weights():
            settings = DiffusionLMConfig.from_dict(fields)
            settings._attn_implementation = config.attn_implementation
            model = DiffusionLM(settings)
    finally:
        torch.set_default_dtype(before)
    try:
        layout = lay_out(model.state_dict(), family_of(described, config.family))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    # A tied head is the embedding: a second one in the file is not read.
    spare = {
        file for file, pieces in layout.items() if settings.tie_word_embeddings and pieces[0].name == "lm_head.weight"
    }
    for file in spare:
        del layout[file]
    # Messages name weights as the files do.
    check_weights(
        shapes_in_file(layout),
        files.shapes,
        where,
        ignored=lambda name: name in spare or name.endswith("rotary_emb.inv_freq"),
    )
    files.copy_into(model, layout)
    if new:
        model.grow(new)
        model.config.mask_token_id = mask_token_id
        table: Any = model.get_input_embeddings()
        with torch.no_grad():
            table.weight[-new:] = table.weight[:-new].float().mean(0)
    return model.eval()


def save_policy(model: Any, tokenizer: Any, path: str | os.PathLike[str], shard_size: str = "5GB") -> None:
    """Write a Hugging Face folder that `load_policy` reads back with equal logits, a file per `shard_size`."""
    _quiet()
    if lora.has_adapters(model):
        lora.save_adapters(model, path)
    else:
        model.save_pretrained(path, max_shard_size=shard_size)
    tokenizer.save_pretrained(path)


def _quiet() -> None:
    """Turn transformers' progress bars off: a run has a display of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
