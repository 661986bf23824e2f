"""Low-rank adapters on language models (Hu et al. 2021, arXiv 2106.09685), through peft.

Adapters sit below the output head, in the policy's `body`, and are all that is trained. The policy keeps its class, so
sampling, scoring, copies and ZeRO know nothing of them. A saved policy is the adapters in peft's layout, the name of
the model they belong to, and the config.json that the policy would have without them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rl.model_section import LoraOptions
from rl.models.weights import check_weights, shapes_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Under this name peft keeps the weights of the module it was given.
_PREFIX = "base_model.model."


def has_adapters(policy: Any) -> bool:
    return hasattr(policy.body, "peft_config")


def add_adapters(policy: Any, options: LoraOptions, base: str, seed: int) -> None:
    """Put new adapters into a policy, which change nothing yet, and freeze everything else.

    Args:
        base: the folder or name that the policy was loaded from. A folder is remembered by its full path, so that the
            adapters find it from wherever they are loaded.

    Raises:
        ValueError: the targets name no layer, or one that is not linear.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    if options.dora:
        raise ValueError("model.lora.dora is for image pipelines: set it to false")
    below = policy.body
    linear = {
        name: type(m)
        for name, m in below.named_modules()
        # The router of DiffusionGemma alone is a linear layer; none is adapted.
        if isinstance(m, nn.Linear | Conv1D) and ".router." not in name
    }
    # Experts are no layers but stacked tensors, which get an adapter only where they are named.
    experts = [name for name, p in below.named_parameters() if p.ndim == 3]
    stacked = [t for t in options.targets or () if any(n.endswith(f".{t}") for n in experts)]
    stacked = [t for t in stacked if not any(n.endswith(f".{t}") for n in linear)]
    layers = [target for target in options.targets or () if target not in stacked]
    if not linear:
        raise ValueError(f"model.lora.rank is {options.rank}: the backbone {type(below).__name__} has no linear layers")
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        target_modules=layers if options.targets else sorted({name.rpartition(".")[2] for name in linear}),
        target_parameters=stacked or None,
        # transformers' Conv1D, the linear layer of GPT-2, holds its weight the other way round.
        fan_in_fan_out=Conv1D in linear.values(),
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).exists() else base,
    )
    torch.manual_seed(seed)
    _inject(policy, config, f"model.lora.targets {options.targets}")


def _inject(policy: Any, config: Any, field: str) -> None:
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    below = policy.body
    try:
        inject_adapter_in_model(config, below)
    except ValueError as error:
        raise ValueError(f"{field}: {str(error).splitlines()[0]}") from error
    policy.share()
    for name, module in below.named_modules():
        linear = not isinstance(module, BaseTunerLayer) or isinstance(module.get_base_layer(), nn.Linear | Conv1D)
        if not linear and not hasattr(module, "parameter_name"):
            raise ValueError(f"{field}: {name} is no linear layer, only those take an adapter")
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _state(policy: Any) -> dict[str, torch.Tensor]:
    """The adapters under the names they have in files."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(policy.body, save_embedding_layers=False)
    return {_PREFIX + name: tensor for name, tensor in state.items()}


def save_adapters(policy: Any, path: str | os.PathLike[str]) -> None:
    """Write a folder that `load_policy` reads back with equal logits, and `peft.PeftModel` on the backbone too."""
    from safetensors.torch import save_file

    Path(path).mkdir(parents=True, exist_ok=True)
    config = copy.copy(policy.body.peft_config["default"])
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _state(policy).items()}
    save_file(state, Path(path) / WEIGHTS, metadata={"format": "pt"})
    policy.config.save_pretrained(path)


def base_of(path: str | os.PathLike[str]) -> str | None:
    """The model that the adapters in a folder belong to; None for any other folder.

    Raises:
        ValueError: they are of a kind that is not read here, or do not name it.
    """
    if not (Path(path) / CONFIG).is_file():
        return None
    base = _read_config(path).base_model_name_or_path
    if not base:
        raise ValueError(f"model.path {str(path)!r}: {CONFIG} does not name the base model")
    return base


def _read_config(path: str | os.PathLike[str]) -> Any:
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(path))
    plain = config.peft_type == "LORA" and config.bias == "none" and not (config.modules_to_save or config.use_dora)
    if not plain:
        raise ValueError(f"model.path {str(path)!r}: only plain LoRA is read, without biases, DoRA or whole modules")
    return config


def load_adapters(policy: Any, path: str | os.PathLike[str], options: LoraOptions) -> None:
    """Put saved adapters into the policy they belong to; its weights take their dtype.

    Raises:
        ValueError: they are incomplete, do not fit, or are of another rank than the options ask for.
    """
    from safetensors.torch import load_file

    where = f"model.path {str(path)!r}"
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise ValueError(f"{where} is incomplete: {WEIGHTS} is missing")
    config = _read_config(path)
    if options.rank not in (0, config.r):
        raise ValueError(f"model.lora.rank is {options.rank}, the adapters in {str(path)!r} have rank {config.r}")
    saved = load_file(file)
    policy.to(next(iter(saved.values())).dtype)
    config.inference_mode = False
    _inject(policy, config, where)
    own = _state(policy)
    check_weights(shapes_of(own), shapes_of(saved), where)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def merge_adapters(policy: Any) -> None:
    """Add the adapters to the weights they adapt: a policy without adapters, each weight rounded once to its dtype."""
    below = policy.body
    for name, module in _adapted(below).items():
        owner, _, leaf = name.rpartition(".")
        setattr(below.get_submodule(owner), leaf, _merge(module))
    del below.peft_config
    policy.share()
    policy.requires_grad_(True)


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by name; experts are one layer, in which peft nests a wrapper for each tensor."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name: module for name, module in found.items() if not name.endswith(".base_layer")}


def _wrappers(module: Any) -> list[Any]:
    """An adapted layer and the wrappers inside it, from the outermost."""
    inner = getattr(module, "base_layer", None)
    return [] if inner is None else [module, *_wrappers(inner)]


def _merge(module: Any) -> nn.Module:
    """The layer that an adapted one becomes, which is changed."""
    dtype = next(module.get_base_layer().parameters()).dtype
    module.to(torch.promote_types(dtype, torch.float32))
    for wrapper in _wrappers(module):
        wrapper.merge()
    merged: nn.Module = module.get_base_layer().to(dtype)
    return merged


class MergedWeights(Mapping[str, torch.Tensor]):
    """The weights that `merge_adapters` would give, each computed when it is asked for; the policy stays as it is."""

    def __init__(self, policy: Any):
        """
        Attributes:
            plain: the same without the adapters.
        """
        state = policy.state_dict()
        self.plain = {n.replace(".base_layer", ""): t for n, t in state.items() if ".lora_" not in n}
        self._adapted = {
            f"{name}.{getattr(wrapper, 'parameter_name', 'weight')}": module
            for name, module in _adapted(policy).items()
            for wrapper in _wrappers(module)
        }
        # The layer that was merged last: a file takes the tensors of its experts one after another.
        self._last: tuple[Any, nn.Module] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._adapted:
            return self.plain[name]
        module = self._adapted[name]
        if self._last is None or self._last[0] is not module:
            self._last = None
            self._last = (module, _merge(copy.deepcopy(module)))
        tensor: torch.Tensor = getattr(self._last[1], name.rpartition(".")[2])
        return tensor.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)
