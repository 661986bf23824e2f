"""Write a policy in the layout its family publishes, for serving engines and other people's tools."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from rl.config import ModelConfig
from rl.models.families import FAMILIES
from rl.models.families.family import rename
from rl.models.load import load_policy, read_tokenizer, save_policy
from rl.models.lora import has_adapters, merge_adapters
from rl.models.weights import write_weights


def write_published(
    model: Any, tokenizer: Any, path: str | os.PathLike[str], layout: str, shard_size: str | int = "5GB"
) -> None:
    """A folder with the family's config.json and tensor names; `load_policy` reads it back bit for bit.

    Remote code is not written: a tool that wants it takes the publisher's .py files into the folder.

    Args:
        model: a `DiffusionLM`.
        layout: a name in `FAMILIES`.
        shard_size: bytes of a file, or like "5GB".

    Raises:
        ValueError: no such layout, or the model is of another family.
    """
    if layout not in FAMILIES:
        raise ValueError(f"--layout {layout!r} is unknown: there are {', '.join(FAMILIES)}")
    family = FAMILIES[layout]
    if not hasattr(model, "lm_head"):
        raise ValueError(f"--layout {layout} is for diffusion LMs: a masked LM is in its own layout already")
    described = family.describe(model.config, model.backbone.config, str(model.dtype).removeprefix("torch."))
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        theirs = rename(name, family.names, to_ours=False)
        if theirs is None:
            raise ValueError(f"--layout {layout} has no place for {name}")
        weights[theirs] = tensor
    Path(path).mkdir(parents=True, exist_ok=True)
    (Path(path) / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    write_weights(weights, path, shard_size)
    tokenizer.save_pretrained(path)


def write_whole(model: Any, tokenizer: Any, path: str | os.PathLike[str], layout: str | None) -> None:
    """Whole weights, adapters merged into a copy, in a published layout or (None) in ours.

    Raises:
        ValueError: see `write_published`.
    """
    if has_adapters(model):
        model = copy.deepcopy(model)
        merge_adapters(model)
    if layout is None:
        save_policy(model, tokenizer, path)
    else:
        write_published(model, tokenizer, path, layout)


def convert_folder(source: Path, target: Path, layout: str | None) -> None:
    """A saved policy's folder, or one of adapters, as `write_whole` writes it.

    Raises:
        ValueError: see `write_published`.
    """
    write_whole(load_policy(ModelConfig(path=str(source)), None, seed=0), read_tokenizer(source), target, layout)
