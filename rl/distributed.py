"""Processes: start DeepSpeed's communication with or without a launcher, and reduce numbers over ranks."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def pick_device(name: str) -> torch.device:
    """The device of this process; `auto` is a GPU when there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("run.device is cuda, but torch sees no GPU: set run.device to cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)


def launched() -> bool:
    """Whether a launcher (deepspeed, torchrun) started this process as one of several.

    Raises:
        ValueError: the environment says so and leaves out how the ranks meet.
    """
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if "RANK" in os.environ and missing:
        raise ValueError(
            f"the environment sets RANK and not {' and '.join(missing)}: use torchrun or deepspeed, or unset RANK"
        )
    return "RANK" in os.environ


def start(device: torch.device, timeout_seconds: float = 1800.0) -> None:
    """Join the process group: the launcher's if there is one, else a group of one.

    A collective that waits for a rank longer than the timeout fails, and with it the run.

    Nothing is compiled: DeepSpeed's shared-memory all-reduce, the one op it would build here, is turned
    off (a killed build leaves a lock that hangs every later job).
    """
    if dist.is_initialized():
        return
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not launched():
        # Port 0: the store binds a free one itself. One looked for here could be taken before the store has it.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import logging

    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        verbose=False,
    )


def stop() -> None:
    """Leave the process group; `start` may be called again afterwards."""
    if dist.is_initialized():
        import deepspeed.comm

        # DeepSpeed keeps groups of its own, which a later `start` in this process would find stale.
        deepspeed.comm.destroy_process_group()


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed: another rank has ended, or did not come within the timeout."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def reduce_number(value: float, op: str, device: torch.device | str = "cpu") -> float:
    """Sum ("sum"), maximum ("max") or minimum ("min") of a number over ranks, in float64."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op])
    return float(tensor)


def sum_metrics(sums: Mapping[str, float], device: torch.device | str = "cpu") -> dict[str, float]:
    """Sum every entry over ranks; all ranks must hold the same keys."""
    if world_size() == 1:
        return dict(sums)
    names = sorted(sums)
    tensor = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return dict(zip(names, tensor.tolist(), strict=True))


def gather_objects(value: object) -> list:
    """The value of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank, which must all call this; the others do not run `make`.

    Raises:
        ValueError, OSError: what `make` raised on rank 0, so that no rank waits for one that has gone.
    """
    value: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            value = make()
        except (ValueError, OSError) as raised:
            error = raised
    value, there = gather_objects((value, error))[0]
    if there is not None:
        # Rank 0 raises the one that has its traceback.
        raise error or there
    return value


class Means:
    """Numbers whose mean over all ranks is asked for once, however they were cut into micro-batches.

    Example: `means.add("policy/ratio", float(ratio.sum()), len(ratio))` for micro-batches, `means.reduced()` at last.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, total: float, count: int) -> None:
        self.totals[name] += total
        self.counts[name] += count

    def reduced(self) -> dict[str, float]:
        """Name -> total / count over all ranks, which must all call this; a count of 0 divides by 1."""
        parts = gather_objects((self.totals, self.counts))
        names = sorted({name for totals, _ in parts for name in totals})
        return {name: sum(t[name] for t, _ in parts) / max(sum(c[name] for _, c in parts), 1) for name in names}


def shard(rows: Sequence[T]) -> tuple[int, list[T]]:
    """This rank's contiguous part of the rows, and the index of its first one."""
    bounds = [len(rows) * r // world_size() for r in range(world_size() + 1)]
    return bounds[rank()], list(rows[bounds[rank()] : bounds[rank() + 1]])


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
