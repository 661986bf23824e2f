"""A decoder's options for one model: what they leave to the model, and what does not go together."""

from __future__ import annotations

from typing import Any

from rollouts.model_protocol import noise_of
from rollouts.samplers.options import SamplerOptions


def fitted_options(
    options: SamplerOptions, model: Any, approximate_cache: str, eos_token_id: int | None
) -> SamplerOptions:
    """The options with the block length of a block-causal model, where they have none.

    Args:
        model: a `DenoisingModel`, or what a config says of one: attention, block_length, noise and the heads.
        approximate_cache: "none", "prefix", "dual" or "frozen".

    Raises:
        ValueError: a choice that this model, cache or tokenizer does not go with.
    """
    block_causal = model.attention == "block_causal"
    if noise_of(model) == "absorbing":
        options.check_absorbing()
    if approximate_cache not in ("none", "prefix", "dual", "frozen"):
        raise ValueError(f"rollout.cache must be none, prefix, dual or frozen, got {approximate_cache!r}")
    if block_causal and approximate_cache != "none":
        raise ValueError(
            f"rollout.cache {approximate_cache} is for full-attention models: the cache of a block-causal model "
            "is exact, set rollout.cache to none"
        )
    if block_causal and options.block_length is None and not (options.choose and options.choose.block_length):
        assert model.block_length is not None
        options = options.model_copy(update={"block_length": model.block_length})
        options.steps_per_block()
    if block_causal and options.record_x0:
        raise ValueError("sampler.record_x0 needs a full-attention model: a block-causal one predicts no whole canvas")
    if approximate_cache != "none" and options.record_x0:
        raise ValueError("sampler.record_x0 needs forwards of the whole canvas: set rollout.cache to none")
    for name, reads in (("verify", options.verify), ("reviser arpc", options.reviser == "arpc")):
        if reads and not block_causal:
            raise ValueError(f"sampler.{name} reads a block-causal model at block length 1: this model has no blocks")
    if options.choose is not None:
        if approximate_cache != "none":
            raise ValueError("sampler.choose reads forwards of the whole canvas: set rollout.cache to none")
        head, count = getattr(model, "choice_head", None), len(options.choose.values)
        if head is None or head.out_features != count:
            raise ValueError(
                f"sampler.choose has {count} values, and the model no head for so many: set model.choices to {count}"
            )
    cached = block_causal or approximate_cache != "none"
    if options.joint_steps and cached:
        raise ValueError("sampler.joint_steps is for full attention and rollout.cache none: set it to 0")
    if options.joint_steps and getattr(model, "joint_head", None) is None:
        raise ValueError("sampler.joint_steps needs a trained joint head: set model.joint_head to true")
    if cached and options.cfg_scale:
        raise ValueError(
            "sampler.cfg_scale needs forwards of the whole canvas, with and without its prompt: use a "
            "full-attention model and rollout.cache none, or set sampler.cfg_scale to 0"
        )
    if cached and options.reach_back:
        raise ValueError("sampler.revise_scope all_previous changes blocks that a cache has stored: set it to block")
    if options.eos_confidence < 1 and eos_token_id is None:
        raise ValueError("sampler.eos_confidence needs an end token, the tokenizer has none: set it to 1")
    return options
