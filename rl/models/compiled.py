"""A view of a policy whose forwards torch.compile has compiled, for rollouts (`rollout.compile`)."""

from __future__ import annotations

import copy
from typing import Any

import torch

from rollouts.engines.block_cache import BlockCache

# Graphs of one view. Rollouts need few: see `compiled`.
GRAPHS = 32


def compiled(model: Any) -> Any:
    """`model` with a compiled `hidden_states`; parameters, modules and config are the very ones of `model`.

    The model itself stays as it is, so what the learner forwards is not compiled, and what it learns is seen at once.
    Sizes are symbols (`dynamic=True`): a graph serves every number of rows, queries and keys but 0 and 1, which torch
    specialises. Further graphs are made for a mask or none, for neighbouring slots of the cache or others. The first
    forward of a cache, which makes its tensors, runs as it is.

    CUDA graphs (mode "reduce-overhead") are not used: they are recorded anew for every size, which in rollouts changes
    from block to block, and not where a graph writes to its inputs, as it does to the cache. No GPU has been tried.

    Raises:
        ValueError: a kind of model that is not compiled.
    """
    # Late, since it takes a second that runs of images need not wait for.
    from rl.models.diffusion_lm import DiffusionLM

    if not isinstance(model, DiffusionLM) or model.vision is not None or model.wants_block_mask:
        raise ValueError("rollout.compile is for decoders of text with sdpa attention: set it to false")
    # Late, since it takes seconds that other runs need not wait for.
    from torch._dynamo import mark_static
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    plain = model.hidden_states
    # Its types do not know all of its arguments.
    compiler: Any = torch.compile
    try:
        run = compiler(plain, dynamic=True, fullgraph=True, recompile_limit=GRAPHS, isolate_recompiles=True)
    except TypeError as error:
        raise ValueError("rollout.compile needs a newer torch, such as 2.13: set it to false") from error

    def hidden_states(
        input_ids: torch.Tensor,
        *,
        visible: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: BlockCache | None = None,
    ) -> torch.Tensor:
        # Strides are part of what a graph is made for, and so is whether two inputs are one tensor.
        made = (None if x is None else x.clone(memory_format=torch.contiguous_format) for x in (visible, position_ids))
        ids, (seen, places) = input_ids.contiguous(), made
        more: dict[str, Any] = {"visible": seen, "position_ids": places, "cache": cache}
        if cache is not None and not cache.tensors():
            hidden = plain(ids, **more)
            for states in cache.tensors():
                # Heads and their width, which attention chooses its kernel by.
                mark_static(states, 1)
                mark_static(states, 3)
            return hidden
        try:
            return run(ids, **more)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            said = " ".join(str(error).splitlines()[:2])
            raise ValueError(f"rollout.compile does not work here ({said}): set it to false") from error

    view: Any = copy.copy(model)
    view.hidden_states = hidden_states
    return view
