"""What a modality says about the memory of its model, and what autograd keeps of a forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@dataclass
class ModelMemory:
    """A modality's part of the memory plan, in bytes.

    Attributes:
        total, trained: parameters of the model, and those of them with a gradient.
        activations: what the backward pass of a micro-batch needs.
        micro_batch: what that micro-batch is, for the plan's line about it.
        sampling: name -> bytes that only sampling needs.
        held: name -> bytes of frozen models beside the policy, which stay where they are.
        what: what `total` counts.
        without: what the plan leaves out.
        cure: what to change when it is too much.
    """

    total: int
    trained: int
    activations: float
    micro_batch: str
    sampling: Mapping[str, float] = field(default_factory=dict)
    held: Mapping[str, float] = field(default_factory=dict)
    what: str = "parameters"
    without: str = ""
    cure: str = "lower train.micro_batch_size"


def num_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters, and those of them with a gradient."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


class _KernelAttention(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs, its output and one float32 per query and head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise AssertionError("only the forward pass is counted")


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch would take the attention apart and keep every query's row of weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _KernelAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def saved_bytes(run: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `run`, each storage once, the model's parameters left out."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _FusedAttention():
        result = run()
    del result
    return sum(storage.nbytes() for storage in kept.values())
