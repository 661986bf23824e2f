"""What a recipe or a decoder has beside the policy: a causal model that reads answers, here or on a vLLM server, and a
compiled constraint.
"""

from __future__ import annotations

from typing import Any

import torch

from rewards.causal_lm import CausalReader, load_causal_lm, load_causal_tokenizer
from rewards.served_reader import ServedReader
from rl.models.folder import is_url, served_model
from rl.models.vocabulary import compiled_constraint
from rollouts.engines.server.options import ServerOptions
from rollouts.samplers.options import SamplerOptions


def open_reader(
    path: str, tokenizer: Any, mask_token_id: int, device: torch.device | str, *,
    option: str, top_option: str, dtype: str, batch_size: int, top: int | None,
) -> CausalReader | ServedReader:  # fmt: skip
    """The `read(prompts, answers, top)` of a causal model that has the policy's tokens.

    Args:
        path: folder, hub name, .gguf file, package:NAME/FILE, or http://HOST:PORT of a vLLM server.
        tokenizer, mask_token_id: the policy's.
        option, top_option: what messages call the path and `top`.
        top: likeliest tokens that will be asked for; a server has a limit.

    Raises:
        ValueError: it cannot be loaded, has other tokens than the policy, or refuses `top`.
    """
    # A server's tokenizer is read from where the server's own model is.
    served = served_model(path) if is_url(path) else None
    known = tokenizer.get_vocab()
    for token, index in load_causal_tokenizer(served["root"] if served else path).get_vocab().items():
        # The mask token may have taken the place of one that nobody uses.
        if known.get(token) != index != mask_token_id:
            there = f"its token {token!r} is {index} and {known.get(token, 'nothing')} there"
            raise ValueError(f"{option} {path} has another vocabulary than the policy: {there}")
    if not served:
        return CausalReader(load_causal_lm(path, dtype).to(device), batch_size)
    url = path.rstrip("/").removesuffix("/v1") + "/v1"
    reader = ServedReader(url, served["id"], batch_size, 4, ServerOptions().api_key_variable)
    try:
        reader.read([[0]], [[0]], top)
    except ValueError as error:
        raise ValueError(f"{option} {path} refuses {top_option} {top}: {error}") from None
    return reader


def beside_policy(options: SamplerOptions, tokenizer: Any, model: Any, device: torch.device | str) -> dict[str, Any]:
    """An engine's settings `constraint` and `guide`: what `sampler.constraint` and `sampler.guide` stand for, or None.

    Compiling a large constraint and loading a guide take seconds: keep what comes back.

    Raises:
        ValueError: there is no tokenizer; see `compiled_constraint` and `open_reader`.
    """
    for name in ("constraint", "guide"):
        if tokenizer is None and getattr(options, name) is not None:
            raise ValueError(f"tokenizer is required for a {name} with a loaded policy: give it")
    constraint, guide = options.constraint, options.guide
    excluded = getattr(model, "excluded_token_ids", ())
    return {
        "constraint": None if constraint is None else compiled_constraint(constraint, tokenizer, excluded),
        "guide": None
        if guide is None
        else open_reader(
            guide.model, tokenizer, model.mask_token_id, device, option="sampler.guide.model",
            top_option="sampler.guide.top", dtype=guide.dtype, batch_size=guide.batch_size,
            top=guide.top if guide.rule == "agree" else 0,
        ),
    }  # fmt: skip
