"""The exact settings of an evaluation: everything a score depends on, as one JSON object."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rewards.causal_lm import plain_folder
from rl.tasks.templates import Template

PACKAGES = ("denoise-rl", "torch", "transformers", "tokenizers", "mpmath", "reasoning-gym", "numpy")
_WHOLE_BELOW = 2**25
_END_BYTES = 2**20


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a score may depend on; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def folder_fingerprint(path: str) -> str | None:
    """A hash of a model or tokenizer folder's content, None for a hub name.

    Files of 32 MiB and more (weights) count by name, size, first and last MiB: any training changes these.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.suffix not in (".json", ".safetensors", ".model", ".txt", ".jinja"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            if size < _WHOLE_BELOW:
                digest.update(content.read())
            else:
                digest.update(content.read(_END_BYTES))
                content.seek(-_END_BYTES, 2)
                digest.update(content.read())
    return digest.hexdigest()[:16]


def file_hash(path: str) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def texts_hash(texts: Iterable[str]) -> str:
    """SHA-256 of texts in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} ".encode() + text.encode())
    return digest.hexdigest()


def model_settings(model: Any, path: str, tokenizer_path: str | None) -> dict[str, Any]:
    """The identity of a model: its content, not its place."""
    commit = getattr(model.config, "_commit_hash", None)
    return {
        "path": path,
        "tokenizer": tokenizer_path,
        "fingerprint": folder_fingerprint(plain_folder(path)) or commit,
        "tokenizer_fingerprint": folder_fingerprint(tokenizer_path) if tokenizer_path else None,
        "attention": model.attention,
        "block_length": model.block_length,
        "logit_shift": model.logit_shift,
        **({"context_causal": True} if model.context_causal else {}),
        "dtype": next((str(weight.dtype) for weight in model.parameters()), "of the server").removeprefix("torch."),
    }


def template_settings(template: Template, chat: bool) -> dict[str, Any]:
    """The template, text and all, and whether the tokenizer's chat template goes around it."""
    return asdict(template) | {"stop": list(template.stop), "chat": chat}


def saved_template(settings: Mapping[str, Any]) -> Template:
    """The template that `template_settings` described."""
    return Template(**{**settings, "stop": tuple(settings["stop"])})


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's own name: kernels differ, and with them greedy answers."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
