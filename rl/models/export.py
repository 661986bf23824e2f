"""Write a policy in the layout its family publishes, for serving engines and other people's tools."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from rl.model_section import ModelConfig
from rl.models.families import open_family
from rl.models.load import load_policy, save_policy
from rl.models.lora import MergedWeights, has_adapters, merge_adapters
from rl.models.tokenizers import read_tokenizer
from rl.models.weights import lay_out, write_weights


def write_published(
    model: Any, tokenizer: Any, path: str | os.PathLike[str], layout: str | None, shard_size: str | int = "5GB"
) -> None:
    """A folder in a published layout or ours, adapters merged; `load_policy` reads it back bit for bit.

    Weights are computed and written shard by shard. Remote code is not written: a tool that wants it takes the
    publisher's .py files into the folder.

    Args:
        model: a `DiffusionLM`.
        layout: name or address of a family; None is our own layout.
        shard_size: bytes of a file, or like "5GB".

    Raises:
        ValueError: no such layout, or the model is of another family.
    """
    family = None if layout is None else open_family(layout, "--layout")
    if not hasattr(model, "lm_head"):
        raise ValueError(f"--layout {layout} is for diffusion LMs: a masked LM is in its own layout already")
    dtype = str(model.dtype).removeprefix("torch.")
    if family is None:
        described = model.config.to_diff_dict() | {"architectures": [type(model).__name__], "dtype": dtype}
    else:
        described = family.describe(model.config, model.backbone.config, dtype)
    weights = MergedWeights(model)
    if model.config.tie_word_embeddings:
        del weights.plain["lm_head.weight"]
    files = lay_out(weights.plain, family)
    Path(path).mkdir(parents=True, exist_ok=True)
    (Path(path) / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    write_weights(weights, files, path, shard_size)
    tokenizer.save_pretrained(path)


def write_whole(model: Any, tokenizer: Any, path: str | os.PathLike[str], layout: str | None) -> None:
    """Whole weights, adapters merged, in a published layout or (None) in ours.

    Raises:
        ValueError: see `write_published`.
    """
    if layout is not None or (has_adapters(model) and hasattr(model, "lm_head")):
        write_published(model, tokenizer, path, layout)
        return
    if has_adapters(model):
        # A masked LM, which transformers writes from the module itself.
        model = copy.deepcopy(model)
        merge_adapters(model)
    save_policy(model, tokenizer, path)


def convert_folder(source: Path, target: Path, layout: str | None) -> None:
    """A saved policy's folder, or one of adapters, as `write_whole` writes it.

    Raises:
        ValueError: see `write_published`.
    """
    write_whole(load_policy(ModelConfig(path=str(source)), None, seed=0), read_tokenizer(source), target, layout)
