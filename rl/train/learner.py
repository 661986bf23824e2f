"""One DeepSpeed engine, and what an optimizer update is here.

An update is a list of micro-batches whose losses *add up* to the loss of the whole update over all ranks
(the weights come from `losses/aggregate.py`). DeepSpeed averages gradients over ranks, so every
loss is multiplied by the number of ranks; its own accumulation boundary marks the last micro-batch. The
result depends neither on the number of ranks nor on how the update is cut.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rl import distributed
from rl.models.copies import trained_copy
from rl.sections import OptimizerConfig
from rl.train.deepspeed_json import half_precision, read_deepspeed_config

B = TypeVar("B")

# Folder of the DeepSpeed files inside a saved state.
STATE = "state"
# Overflows in a row that end a run: DeepSpeed's scale of 2^32 takes 33 to come down to 1.
MOST_OVERFLOWS = 40


class TrainingError(RuntimeError):
    """A step that must not be taken: a loss or gradient that is not finite."""


class Learner:
    """A module, its optimizer and its schedule under DeepSpeed."""

    def __init__(
        self,
        module: nn.Module,
        deepspeed_json: str,
        optimizer: OptimizerConfig,
        total_updates: int,
        device: torch.device,
    ):
        """
        Args:
            module: what `forward` runs; a copy of it is trained, the original stays plain torch. Below stage 3 the two
                share what is frozen.
            deepspeed_json: path of the DeepSpeed config; stage, precision and offload are its business.
            total_updates: length of the learning-rate schedule.
        """
        import deepspeed

        distributed.start(device)
        config = read_deepspeed_config(deepspeed_json)
        config["train_micro_batch_size_per_gpu"] = 1
        # The number of micro-batches varies from update to update, so boundaries are set explicitly below.
        config["gradient_accumulation_steps"] = 1
        config["gradient_clipping"] = optimizer.max_grad_norm
        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        # Stage 3 cuts frozen weights up, too.
        module = (copy.deepcopy(module) if self.stage == 3 else trained_copy(module)).to(device)
        half, self.scales_loss = half_precision(config), bool(config.get("fp16", {}).get("enabled", False))
        if not half:
            # A checkpoint in half precision without DeepSpeed's master weights would swallow small updates.
            for parameter in module.parameters():
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()
        parameters = [p for p in module.parameters() if p.requires_grad]
        settings: Any = {name: getattr(optimizer, name) for name in ("lr", "betas", "eps", "weight_decay")}
        client = None
        offloaded = "offload_optimizer" in config.get("zero_optimization", {})
        if offloaded and config.get("zero_force_ds_cpu_optimizer", True):
            config["optimizer"] = {"type": "AdamW", "params": settings}
        else:
            client = torch.optim.AdamW(parameters, fused=offloaded, **settings)
        self._engine, self.optimizer, _, self.schedule = deepspeed.initialize(
            model=module,
            model_parameters=parameters,
            optimizer=client,
            config=config,
            lr_scheduler=lambda adam: LambdaLR(adam, lambda update: rate_factor(optimizer, update, total_updates)),
        )
        self.device = device
        self.updates = self.overflows = self._overflows_in_a_row = 0
        self._last_lr = 0.0
        self._whole_gradients = self.stage == 0 and not half
        # Dropout would make the learner score another policy than the one that sampled.
        self._engine.eval()
        for layer in self._engine.module.modules():
            # Layers of transformers recompute their activations only in training mode. It is the layer's own flag that
            # they ask; whatever could drop something is inside it and stays in eval mode.
            layer.training = bool(getattr(layer, "gradient_checkpointing", False))

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def forward(self, inputs: Any) -> Any:
        """The module's output under today's weights; collective where DeepSpeed shards them."""
        return self._engine(inputs)

    def update(self, batches: Sequence[B], loss_of: Callable[[B], torch.Tensor], spare: B) -> float:
        """Back-propagate every micro-batch and take one optimizer step.

        Args:
            batches: micro-batches of this rank, of whatever type `loss_of` takes.
            loss_of: runs a micro-batch through `forward` and gives its share of the loss.
            spare: fills up ranks with fewer micro-batches, its loss times zero (ZeRO 2 and 3 hang or abort when ranks
                run unequal numbers of backwards).

        Returns:
            the gradient norm before clipping; 0 when no step was taken: no rank had a micro-batch, or gradients in
            float16 overflowed, so that DeepSpeed lowers its loss scale (`overflows` counts).

        Raises:
            TrainingError: a loss or the gradient norm is not finite, or float16 overflowed too often in a row. No
                checkpoint may be written after it.
        """
        count = int(distributed.reduce_number(len(batches), "max", self.device))
        if count == 0:
            # No rank has anything to learn from: a step would only replay the optimizer's momentum.
            return 0.0
        scale = distributed.world_size()
        for index in range(count):
            loss = loss_of(batches[index]) if index < len(batches) else loss_of(spare) * 0.0
            finite = float(torch.isfinite(loss.detach()).all())
            if not distributed.reduce_number(finite, "min", self.device):
                raise TrainingError(f"the loss of update {self.updates} is not finite; no step was taken")
            self._engine.set_gradient_accumulation_boundary(index == count - 1)
            self._engine.backward(loss * scale)
            if self._whole_gradients and index == count - 1:
                norm = self._norm_of_gradients()
                self._check_norm(norm)
            if index == count - 1:
                self._last_lr = float(self.optimizer.param_groups[0]["lr"])
            self._step()
        if self.scales_loss and not self._engine.was_step_applied():
            self._count_overflow()
            return 0.0
        self._overflows_in_a_row = 0
        self.updates += 1
        if not self._whole_gradients:
            norm = float(self._engine.get_global_grad_norm())
            self._check_norm(norm)
        return norm

    def _step(self) -> None:
        try:
            self._engine.step()
        except Exception as error:
            # DeepSpeed has no error of its own for a scale that cannot be lowered.
            if "loss scale already at minimum" not in str(error):
                raise
            raise TrainingError(
                "float16 overflows at the smallest loss scale that fp16 in train.deepspeed allows: train in bf16"
            ) from None

    def _count_overflow(self) -> None:
        self.overflows += 1
        self._overflows_in_a_row += 1
        if self._overflows_in_a_row == MOST_OVERFLOWS:
            raise TrainingError(
                f"float16 overflowed in {MOST_OVERFLOWS} updates in a row: lower fp16.loss_scale in "
                "train.deepspeed, or train in bf16"
            )

    def _norm_of_gradients(self) -> float:
        # DeepSpeed's plain fp32 path has averaged the gradients by now and does not report their norm.
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def _check_norm(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient norm of update {self.updates} is {norm}: go back to a checkpoint")

    def learning_rate(self) -> float:
        """The rate the last update was taken with; 0 before the first."""
        return self._last_lr

    def save_state(self, folder: Path) -> None:
        """Write weights, optimizer and schedule; every rank writes its part."""
        # What is frozen never changes: a resumed run has it from where this one had it.
        client = {"updates": self.updates}
        self._engine.save_checkpoint(str(folder), tag=STATE, client_state=client, exclude_frozen_parameters=True)

    def load_state(self, folder: Path, universal: bool = False) -> None:
        """Read what `save_state` wrote, or the universal form of it, which any number of ranks can read."""
        config = self._engine._config
        config.load_universal_checkpoint = universal
        try:
            path, client = self._engine.load_checkpoint(str(folder), tag=STATE, custom_load_fn=_load_trained)
        finally:
            config.load_universal_checkpoint = False
        assert path is not None, f"DeepSpeed found no state in {folder}"
        self.updates = client["updates"]

    @torch.no_grad()
    def copy_weights_into(self, plain: nn.Module) -> None:
        """Put today's weights into a plain module of the same shape, for sampling and saving.

        Sampling never runs on the engine's module: under ZeRO 3 it dies with mismatched collectives as soon
        as ranks run different numbers of forwards. Weights are gathered parameter by parameter, in the same
        order on every rank, and `plain` takes their dtype, so that it computes what the learner computes. Frozen
        ones are equal already, up to that dtype.
        """
        import deepspeed

        theirs = dict(plain.named_parameters())
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad and theirs[name].dtype == parameter.dtype:
                continue
            gather = deepspeed.zero.GatheredParameters([parameter]) if self.stage == 3 else contextlib.nullcontext()
            with gather:
                theirs[name].data = theirs[name].data.to(parameter.dtype).copy_(parameter)
            if not bool(theirs[name].isfinite().all()):
                raise TrainingError(
                    f"update {self.updates - 1} left weights that are not finite: lower the learning rate"
                )


def _load_trained(src: dict[str, torch.Tensor], dst: nn.Module) -> None:
    """Read the weights of a saved state, which has no frozen ones."""
    frozen = {name for name, p in dst.named_parameters(remove_duplicate=False) if not p.requires_grad}
    found = dst.load_state_dict(src, strict=False)
    assert frozen.issuperset(found.missing_keys) and not found.unexpected_keys, f"the state does not fit: {found}"


def rate_factor(optimizer: OptimizerConfig, update: int, total: int) -> float:
    """Learning rate of an update (0, 1, ...) over its peak.

    Warm-up rises from 1/(warmup_steps + 1): a first update with rate 0 would count and move nothing.
    """
    warmup = optimizer.warmup_steps
    if update < warmup:
        return (update + 1) / (warmup + 1)
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    if optimizer.schedule == "linear":
        return 1.0 - progress
    if optimizer.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
