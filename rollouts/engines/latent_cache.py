"""diffusers' cache hooks on a denoiser for the time of one batch: parts of a forward are reused at later steps.

Their outputs are approximate, and depend on what shares the batch. What each does stands in `diffusers.hooks`:
first-block (the other blocks' residual, while the first block's barely changes), MagCache (the residual, while its
recorded growth stays near 1), pyramid attention broadcast (attention outputs), TaylorSeer (attention outputs, continued
as a Taylor series), FasterCache (attention outputs, and the unconditional half from the conditional one).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rollouts.samplers.latent_options import CACHES


class LatentCache:
    """One cache, as `sampler.cache` describes it.

    Attributes:
        timestep: of the step that is computed next; infinite at the first one, which nothing can be reused in.
    """

    def __init__(self, options: dict[str, Any], num_steps: int, evaluations: int):
        """
        Args:
            options: `name`, and fields of diffusers' config of that cache.
            evaluations: `ImagePolicy.num_evaluations` at the sampler's guidance.

        Raises:
            ValueError: the installed diffusers lacks the cache, or an option is none of its.
        """
        import diffusers.hooks
        import diffusers.hooks.hooks

        self.timestep = torch.inf
        self.name, (config, apply) = options["name"], CACHES[options["name"]]
        if not hasattr(diffusers.hooks, config) or not hasattr(diffusers.hooks.hooks, "CacheContext"):
            raise ValueError(f"sampler.cache {self.name}: the installed diffusers is too old, install 0.42 or newer")
        self._config, self._apply = getattr(diffusers.hooks, config), getattr(diffusers.hooks, apply)
        self._given = {name: value for name, value in options.items() if name != "name"}
        own: dict[str, Any] = {}
        if self.name in ("pab", "faster_cache"):
            own["current_timestep_callback"] = self._now
        if self.name == "pab" and not any(name.endswith("block_skip_range") for name in self._given):
            own["spatial_attention_block_skip_range"] = 2
        if self.name == "faster_cache":
            inputs = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")
            own |= {"tensor_format": "BCHW", "is_guidance_distilled": evaluations == 1}
            own["attention_weight_callback"] = _half
            own["_unconditional_conditional_input_kwargs_identifiers"] = (*inputs, "pooled_projections")
        if self.name == "taylor_seer":
            own["taylor_factors_dtype"] = torch.float32
            self._given.setdefault("cache_identifiers", [r".*(blocks|layers)\.\d+\.(attn1?|attention)"])
        if self.name == "mag_cache":
            own["num_inference_steps"] = num_steps
        self._own = own
        known = sorted(set(self._config.__dataclass_fields__) - set(own))
        for name in self._given:
            if name not in known:
                raise ValueError(f"sampler.cache {self.name} has no option {name!r}: it has {', '.join(known)}")

    @contextlib.contextmanager
    def on(self, denoiser: nn.Module, calibrate: bool = False) -> Iterator[LatentCache]:
        """The hooks are on the denoiser inside, with empty caches, and taken off afterwards.

        Args:
            calibrate: compute everything. MagCache then measures the ratios that it goes by, others do nothing.

        Raises:
            ValueError: an option's value is refused, or nothing of the denoiser can be reused.
        """
        from diffusers.hooks import HookRegistry
        from diffusers.hooks.hooks import CacheContext, _set_cache_context
        from diffusers.utils import logging

        if calibrate and (self.name != "mag_cache" or "mag_ratios" in self._given):
            yield self
            return
        changes: dict[str, Any] = {}
        if calibrate:  # one step more than there are, or the hook prints its ratios and forgets them
            changes = {"calibrate": True, "num_inference_steps": self._own["num_inference_steps"] + 1}
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        before = {id(module): set(_hooks(module)) for module in denoiser.modules()}
        level = logging.get_verbosity()
        try:
            logging.set_verbosity_error()  # FasterCache says at each use that it is experimental
            try:
                self._apply(denoiser, self._config(**{**self._own, **self._given, **changes}))
            except (TypeError, ValueError) as error:
                raise ValueError(f"sampler.cache {self.name}: {str(error).strip().splitlines()[0]}") from error
            finally:
                logging.set_verbosity(level)
            added = [(m, name) for m in denoiser.modules() for name in set(_hooks(m)) - before[id(m)]]
            if not added or (self._own.get("is_guidance_distilled") and len(added) == 1):
                raise ValueError(f"sampler.cache {self.name} finds nothing to reuse in a {type(denoiser).__name__}")
            registry.invalidate_child_registries_cache()
            _set_cache_context(denoiser, CacheContext("rollout"))
            self.timestep = torch.inf
            yield self
            if calibrate:
                states = [getattr(hook, "state_manager", None) for m, name in added for hook in [_hooks(m)[name]]]
                self._own["mag_ratios"] = next(s for s in states if s).get_state().calibration_ratios
        finally:
            for module in denoiser.modules():
                for name in set(_hooks(module)) - before[id(module)]:
                    module._diffusers_hook.remove_hook(name, recurse=False)  # type: ignore[union-attr, operator]
                if hasattr(module, "_diffusers_hook") and not _hooks(module):  # as it came
                    del module._diffusers_hook
                    if getattr(module.forward, "__func__", None) is type(module).forward:
                        module.__dict__.pop("forward", None)

    def _now(self) -> float:
        return self.timestep


def _hooks(module: nn.Module) -> dict[str, Any]:
    return module._diffusers_hook.hooks if hasattr(module, "_diffusers_hook") else {}  # type: ignore[union-attr, return-value]


def _half(module: nn.Module) -> float:
    """Weight of the last change of an attention output in its continuation: FasterCache's default."""
    return 0.5
