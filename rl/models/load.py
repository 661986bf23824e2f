"""Build, load and save policies and tokenizers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rl.config import ModelConfig
from rl.models.vocabulary import as_ranges, excluded_ranges
from rl.tasks.base import Task

if TYPE_CHECKING:
    from rl.models.diffusion_lm import DiffusionLM

# Set on every small model built from a config: the policy that is scored must be the one that sampled.
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_dropout": 0.0}


def load_tokenizer(config: ModelConfig, task: Task) -> Any:
    """The tokenizer named by the config, the model folder's, or the task's character tokenizer.

    Raises:
        ValueError: none of them exists.
    """
    from transformers import AutoTokenizer

    import rl.models.diffusion_lm  # noqa: F401  (registers the config that AutoTokenizer finds in a model folder)

    source = config.tokenizer or config.path
    if source is None:
        if task.alphabet is None:
            raise ValueError("model.tokenizer is required: this task does not bring its own alphabet")
        from rl.tasks.char_tokenizer import char_tokenizer

        return char_tokenizer(task.alphabet, getattr(task, "ends", True))
    if os.sep in source and not Path(source).is_dir():
        raise ValueError(f"model.tokenizer or model.path {source!r} is not a folder")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer can be loaded from {source!r}: {_first_line(error)}; set model.tokenizer"
        ) from error


def load_policy(config: ModelConfig, tokenizer: Any, seed: int) -> Any:
    """A policy from a folder or hub name, or a new one with weights drawn from `seed`.

    Args:
        tokenizer: says which ids can be decoded; None leaves that as the folder has it.

    Returns:
        a `DenoisingModel`: `DiffusionLM`, or `MaskedLM` around a Hugging Face masked LM.

    Raises:
        ValueError: the folder is missing or incomplete, or the config describes no model.
    """
    if config.path is not None:
        check_model_folder(config.path)
        model = _from_path(config, tokenizer)
    else:
        model = _new(config, tokenizer, seed)
    if tokenizer is not None:
        if tokenizer.mask_token_id not in (None, model.mask_token_id):
            raise ValueError(
                f"model.tokenizer has mask token id {tokenizer.mask_token_id} and the model {model.mask_token_id}: "
                "set model.tokenizer to the model's own"
            )
        # A folder keeps what it was trained without.
        ranges = [*model.excluded_token_ids, *excluded_ranges(tokenizer, model.vocab_size, config.never_generate)]
        model.exclude(as_ranges(i for start, stop in ranges for i in range(start, stop)))
    if config.gradient_checkpointing:
        # It acts in the learner alone, which sets the layers' training flag.
        model.activation_checkpointing_enable()
    return model


def _new(config: ModelConfig, tokenizer: Any, seed: int) -> DiffusionLM:
    from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig

    if not config.backbone:
        raise ValueError("model.backbone or model.path is required: there is no model to train")
    if tokenizer.mask_token_id is None:
        raise ValueError("model.tokenizer has no mask token: a masked-diffusion model needs one")
    backbone = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    return DiffusionLM(
        DiffusionLMConfig(
            backbone={**backbone, **_NO_DROPOUT, **config.backbone},
            mask_token_id=tokenizer.mask_token_id,
            attention=config.attention,
            block_length=config.block_length,
            logit_shift=config.logit_shift,
            attn_implementation=config.attn_implementation,
        )
    ).eval()


def _from_path(config: ModelConfig, tokenizer: Any) -> Any:
    """What the folder's config.json says it is, in eval mode."""
    from safetensors import SafetensorError
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    assert config.path is not None
    _quiet()
    try:
        described, _ = PreTrainedConfig.get_config_dict(config.path)
        if described.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            from rl.models.masked_lm import load_masked_lm

            return load_masked_lm(config.path, tokenizer, config.wrap)
        return _from_pretrained(config.path, config.attn_implementation)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model.path {config.path!r} cannot be loaded: {_first_line(error)}") from error


def _from_pretrained(path: str, attn_implementation: str) -> DiffusionLM:
    """A saved policy in eval mode; transformers would fill missing weights with random ones and go on."""
    from rl.models.diffusion_lm import DiffusionLM

    loaded: Any = DiffusionLM.from_pretrained(path, attn_implementation=attn_implementation, output_loading_info=True)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"model.path {path!r} is incomplete: {len(missing)} weights are missing, {missing[0]} first")
    return model.eval()


def check_model_folder(path: str) -> None:
    """Raise ValueError when a local model folder lacks its config or weights (hub names pass)."""
    folder = Path(path)
    if not folder.exists() and os.sep not in path and not path.startswith("."):
        return
    if not folder.is_dir():
        raise ValueError(f"model.path {path!r} is not a folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.path {path!r} is incomplete: config.json is missing")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"model.path {path!r} is incomplete: it has no .safetensors weights")


def save_policy(model: Any, tokenizer: Any, path: str | os.PathLike[str]) -> None:
    """Write a Hugging Face folder that `load_policy` reads back with equal logits."""
    _quiet()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")


def _quiet() -> None:
    """Turn transformers' progress bars off: a run has a display of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
