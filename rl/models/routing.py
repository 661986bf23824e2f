"""Mixture-of-experts layers of transformers' backbones: the product with the chosen experts, and their routers.

A router returns logits [N, E], weights [N, k] and the chosen experts [N, k] of N tokens. Routers are watched by a hook:
it counts how many tokens each expert got, and can put recorded experts in place of the chosen ones (router replay). In
bfloat16 the learner's rounding may send a token to another expert than the sampler's did; replayed, it goes where it
went, with weights from the learner's own logits, so that gradients reach the router.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from rl import distributed

NAME = "diffusion"


def experts_forward(experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """transformers' experts interface: one product grouped by expert, and a loop over experts where it has no kernel.

    That is in float64, and where rows of the weights are no multiples of 16 bytes. No expert has a capacity: no token
    is dropped.

    Args:
        hidden: [N, D].
        chosen: int64 [N, k], the experts of each token.
        weight: [N, k], what their outputs are multiplied with.

    Returns:
        [N, D].
    """
    widths = {hidden.shape[-1], experts.down_proj.shape[-1]}
    if hidden.dtype == torch.float64 or any(width * hidden.element_size() % 16 for width in widths):
        return type(experts).forward.__wrapped__(experts, hidden, chosen, weight)
    return grouped_mm_experts_forward(experts, hidden, chosen, weight)


ExpertsInterface.register(NAME, experts_forward)


def routers(model: nn.Module) -> list[Any]:
    """The routers of a model in the order of its layers; empty without experts."""
    return [m for m in model.modules() if hasattr(m, "top_k") and hasattr(m, "num_experts")]


def prepare(backbone: Any) -> None:
    """Give a new backbone our product, and its routers their hook; nothing without experts."""
    found = routers(backbone)
    if found:
        backbone.set_experts_implementation(NAME)
    for router in found:
        router.counts = router.replayed = router.recorded = None
        router.records = False
        router.register_forward_hook(_routed)


def freeze(model: nn.Module) -> None:
    """Train no router.

    Raises:
        ValueError: there is none.
    """
    found = routers(model)
    if not found:
        raise ValueError("model.train_router is false, and the model has no routers: leave it out")
    for router in found:
        router.requires_grad_(False)


def _routed(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    logits, weight, chosen = output
    if router.replayed is not None:
        chosen = torch.where(router.replayed >= 0, router.replayed, chosen)
        weight = _weights(router, logits, chosen).to(weight.dtype)
    if router.records:
        router.recorded = chosen
    if router.counts is not None:
        flat = chosen.reshape(-1)
        router.counts = router.counts.to(flat.device).scatter_add(0, flat, torch.ones_like(flat))
    return logits, weight, chosen


def _weights(router: Any, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[N, k]: what the outputs of given experts are multiplied with."""
    sigmoid = hasattr(router, "e_score_correction_bias")
    scores = logits.float().sigmoid() if sigmoid else logits.softmax(-1, dtype=torch.float32)
    weight = scores.gather(1, chosen)
    if router.norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return weight * getattr(router, "routed_scaling_factor", 1.0)


def replay(model: nn.Module, experts: torch.Tensor | None) -> None:
    """Route the next forwards of a model to given experts, until this is called again.

    They stay for the backward, in which layers with gradient checkpointing route once more.

    Args:
        experts: integers [B, Q, number of routers, k], -1 where the router chooses itself; None: everywhere.
    """
    for index, router in enumerate(routers(model)):
        router.replayed = None if experts is None else experts[:, :, index].flatten(0, 1).long()


def record(model: nn.Module) -> None:
    """Keep what the routers choose, for `recorded`.

    Raises:
        ValueError: there are none.
    """
    found = routers(model)
    if not found:
        raise ValueError("replay is for mixtures of experts, and this model has no routers")
    for router in found:
        router.records = True


def recorded(model: nn.Module, batch: int) -> torch.Tensor:
    """int16 [B, Q, number of routers, k]: the experts that the last forward of `batch` rows chose."""
    return torch.stack([r.recorded.unflatten(0, (batch, -1)) for r in routers(model)], dim=2).to(torch.int16)


def count_loads(found: Sequence[Any]) -> None:
    """Begin to count how many tokens each expert of some routers gets."""
    for router in found:
        router.counts = torch.zeros(router.num_experts, dtype=torch.int64)


def load_metrics(found: Sequence[Any]) -> dict[str, float]:
    """How evenly the routers spread the tokens of all ranks since `count_loads`, padding included.

    Returns:
        empty without routers. `moe/load_entropy`: entropy of the experts' shares over its maximum, mean of the layers;
        1 is even. `moe/load_max`: largest share over the even one. `moe/unused`: share of experts without a token.
    """
    if not found:
        return {}
    mine = [router.counts.tolist() for router in found]
    counts = torch.tensor(distributed.gather_objects(mine), dtype=torch.float64).sum(0)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    even = counts.shape[1]
    return {
        "moe/load_entropy": float(torch.special.entr(share).sum(1).mean() / math.log(even)),
        "moe/load_max": float(share.max() * even),
        "moe/unused": float((counts == 0).double().mean()),
    }
