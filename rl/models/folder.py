"""What a model folder, or a config of a new model, says about itself before there are weights. No torch at import."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.causal_lm import plain_folder, resolve
from rl.errors import about
from rl.model_section import ModelConfig, VisionOptions
from rl.models.families import family_of
from rl.models.families.causal import CausalFamily, causal_family
from rl.models.vision_settings import vision_settings
from rl.tasks.prompt_images import PromptImages
from rollouts.engines.base import EngineError
from rollouts.engines.server.http_json import JsonServer
from rollouts.engines.server.options import ServerOptions


def read_config(path: str) -> dict[str, Any]:
    """The config.json of a folder or hub name, or of an unpacked GGUF file."""
    from transformers import PreTrainedConfig

    described, _ = PreTrainedConfig.get_config_dict(plain_folder(path))
    return dict(described)


def local_config(path: str) -> Path | None:
    """The config.json of a model on this machine; None for a hub name."""
    file = Path(plain_folder(path)) / "config.json"
    return file if file.is_file() else None


def backbone_of(described: Mapping[str, Any], family: str | None = None) -> dict[str, Any]:
    """The transformers config of the backbone a config.json describes; empty for a masked LM, which has none."""
    found = family_of(described, family)
    if isinstance(found, CausalFamily):
        return found.read(described)
    if found is not None:
        return dict(found.fields(described, described.get("block_size") or 1)["backbone"])
    return dict(described.get("backbone", {}))


def shape_of(
    described: Mapping[str, Any], model: ModelConfig, mask_token_id: int | None
) -> tuple[int | None, int | None, int | None]:
    """Positions, mask token and block length of the model that a config.json describes; None where it does not say.

    Args:
        mask_token_id: the tokenizer's, for a config.json that names none.
    """
    found = family_of(described, model.family)
    fields = described
    causal = causal_family(found, described, model.convert)
    if causal is not None:
        fields = causal.fields(described, model.block_length, model.convert, mask_token_id)
        return (
            _at_least(fields["backbone"]["max_position_embeddings"], model),
            fields["mask_token_id"],
            fields["block_length"],
        )
    if found is not None:
        fields = found.fields(described, model.block_length or described.get("block_size") or 1)
    backbone, attention = fields.get("backbone", {}), fields.get("attention", "full")
    block = model.block_length
    if attention == "block_causal":
        usual = None if found is None else found.defaults.get("block_size")
        block = block or described.get("block_size") or described.get("block_length") or usual
    if (attention == "block_causal") != (block is not None):
        raise ValueError(block_length_message(attention))
    positions = backbone.get("max_position_embeddings", backbone.get("n_positions"))
    return _at_least(positions, model), fields.get("mask_token_id", mask_token_id), block


def new_vision(options: VisionOptions) -> dict[str, Any]:
    """The settings (`rl.models.vision.Vision`) of the tower that `model.vision` puts in front of a model.

    Raises:
        ValueError: there is no such tower.
    """
    if options.path is not None:
        field = f"model.vision.path {options.path!r}"
        with about(field):
            described, mean = read_config(options.path), pixel_statistics(options.path)
        # CLIP and SigLIP have a text tower beside it.
        tower = described.get("vision_config", described)
    else:
        tower, field, mean = options.tower, "model.vision.tower", {}
        check_network(tower, field)
    return vision_settings(tower, field) | mean | {"placeholder": options.placeholder or "<image>"}


def pixel_statistics(path: str) -> dict[str, list[float]]:
    """The mean and scale of pixels in a folder's preprocessor_config.json; empty without one."""
    file = local_folder(path) / "preprocessor_config.json"
    described = json.loads(file.read_text()) if file.is_file() else {}
    keys = {"mean": "image_mean", "std": "image_std"}
    return {ours: described[theirs] for ours, theirs in keys.items() if theirs in described}


def vision_described(model: ModelConfig, described: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The settings of the vision tower that the model will have; None for a model of text alone.

    Args:
        described: the config.json of `model.path`, None without one.

    Raises:
        ValueError: see `new_vision`.
    """
    if described is not None:
        family = family_of(described, model.family)
        found = described.get("vision") if family is None else family.vision(described)
        if found:
            return dict(found)
    return new_vision(model.vision) if model.vision.new else None


def prompt_images(model: ModelConfig, described: Mapping[str, Any] | None = None) -> PromptImages | None:
    """How prompts hold images for the model that a config names; None for a model without a vision tower.

    Raises:
        ValueError: see `new_vision`; or an option of a tower, and none there.
    """
    settings = vision_described(model, described)
    if settings is None:
        if model.vision != VisionOptions():
            raise ValueError("model.vision is for a model with a vision tower: set model.vision.tower, or leave it out")
        return None
    return PromptImages(model.vision.placeholder or settings["placeholder"], settings["num_tokens"])


def _at_least(positions: int | None, model: ModelConfig) -> int | None:
    """Positions of a model that `model.context` may stretch."""
    return max(positions, model.context.length) if positions and model.context.length else positions


def check_backbone(backbone: Mapping[str, Any]) -> None:
    """Refuse keys that the architecture of a new model's backbone does not have: it would be built without them.

    Raises:
        ValueError: one line with the nearest key.
    """
    if backbone.get("model_type") is None:
        raise ValueError("model.backbone needs model_type, for example gpt2, llama, qwen2 or qwen3")
    check_network(backbone, "model.backbone")


def check_network(described: Mapping[str, Any], field: str) -> None:
    """Refuse keys that a transformers config of this model_type does not have.

    Raises:
        ValueError: one line with the nearest key.
    """
    import inspect

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(described.get("model_type"))
    if kind not in CONFIG_MAPPING:
        import rl.models.conv  # noqa: F401  registers the architecture that is ours
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING, n=1)
        raise ValueError(f"{field}.model_type {kind!r} is unknown" + (f": did you mean {near[0]!r}?" if near else ""))
    config_class = CONFIG_MAPPING[kind]
    known = {*config_class().to_dict(), *config_class.attribute_map, *inspect.signature(config_class).parameters}
    for key in described:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else f" of {kind}"
            raise ValueError(f"unknown config key '{field}.{key}'{hint}")


def block_length_message(attention: str) -> str:
    """The complaint about a block length that does not go with a model's attention."""
    if attention == "block_causal":
        return "model.block_length must be set: the model's attention is block_causal"
    return f"model.block_length is for attention block_causal, and this model's is {attention}: leave it out"


def local_folder(path: str) -> Path:
    """The folder of a model, downloaded first when `path` is a hub name, unpacked when it is a GGUF file.

    Raises:
        OSError: there is no such model, or no connection.
    """
    path = plain_folder(path)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))


def is_url(path: str) -> bool:
    """Whether this is the address of a server."""
    return path.startswith(("http://", "https://"))


def served_model(url: str) -> dict[str, Any]:
    """What a vLLM server says of its model: `id`, `root` (folder or hub name), `max_model_len`, and its `version`.

    Raises:
        EngineError: nothing answers there, or no vLLM server.
    """
    http = JsonServer(url.removesuffix("/").removesuffix("/v1"), 60.0, ServerOptions().api_key_variable)
    try:
        return {**http.call("/v1/models")["data"][0], **http.call("/version")}
    except (KeyError, IndexError, TypeError):
        raise EngineError(f"{url} does not answer as a vLLM server does") from None


def is_hub_name(path: str) -> bool:
    """Whether this reads as `owner/name` or `name`, and not as a path in a folder that exists."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) is not None and (
        "/" not in path or not Path(path).parent.is_dir()
    )


def check_model_folder(path: str) -> None:
    """Raise ValueError when a local model folder lacks its config or weights (hub names pass)."""
    folder = Path(resolve(path))
    if folder.suffix == ".gguf" and folder.is_file():
        return
    if not folder.exists() and is_hub_name(path):
        return
    if not folder.is_dir():
        raise ValueError(f"model.path {path!r} is not a folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.path {path!r} is incomplete: config.json is missing")
    # transformers reads the .bin of older masked LMs; what we read ourselves refuses it (`rl.models.weights`).
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise ValueError(f"model.path {path!r} is incomplete: it has no .safetensors weights")
