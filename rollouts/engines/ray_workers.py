"""Rollout workers: Ray actors that each hold a model and an engine, on other devices, hosts or just other cores.

Requests are cut into one part per worker and put together again in their order. A rollout is a function of its request
and the weights, so the trajectories do not depend on how many workers there are, nor on which one died on the way.

Weights travel by version as one safetensors file that every worker reads, with a checksum; a worker that does not see
the file gets its bytes through Ray's object store. A worker samples with the version it is asked for or refuses, and
has none after a push that failed.

A worker that dies, or takes longer than `timeout_seconds`, is replaced and its part is given out again. A part under
which workers died more than `max_restarts` times ends the call with the last cause: so does a machine that cannot hold
the model, in bounded time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import pickle
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save, save_file
from torch import nn

from rollouts.engines.base import (
    RAY_WORKERS,
    Capabilities,
    EngineError,
    EngineStats,
    StaleVersionError,
    TransientEngineError,
    WeightPushError,
    WeightSource,
)
from rollouts.engines.record import NonFiniteError

NICENESS = "RAY_worker_niceness"  # Ray's variable
# Builds what a worker holds, inside the worker: a model, and options -> the engine that samples it. It is pickled.
MakeSampler = Callable[[], tuple[nn.Module, Callable[[Any], Any]]]
# version, checksum, file or None, its bytes in Ray's object store or None
_Weights = tuple[int, str, Path | None, Any]


class RayWorker:
    """The inside of an actor."""

    def __init__(self) -> None:
        self.version: int | None = None

    def set_up(self, make: MakeSampler) -> None:
        self.model, self.engine_of = make()

    @torch.no_grad()
    def take_weights(self, version: int, digest: str, path: str | None, blob: bytes | None) -> bool:
        """Load the weights of a version; False when they are in a file that this worker does not see.

        Raises:
            WeightPushError: they are damaged, or another model's.
        """
        self.version = None
        if blob is None:
            assert path is not None
            if not Path(path).is_file():
                return False
            found, tensors = digest_of(path), load_file(path)
        else:
            found, tensors = hashlib.sha256(blob).hexdigest(), load(blob)
        if found != digest:
            raise WeightPushError(f"the weights of version {version} arrived damaged: their checksum is wrong")
        mine = dict(self.model.named_parameters())
        if mine.keys() != tensors.keys():
            name = sorted(mine.keys() ^ tensors.keys())[0]
            raise WeightPushError(f"the weights of version {version} are another model's: {name} is not in both")
        for name, parameter in mine.items():
            if parameter.shape != tensors[name].shape:
                raise WeightPushError(f"the weights of version {version} are another model's: {name} differs in shape")
            # The learner may compute in another precision than the model was built in.
            parameter.data = parameter.data.to(tensors[name].dtype).copy_(tensors[name])
        self.version = version
        return True

    def generate(self, requests: Sequence[Any], options: Any, branch_points: Any, version: int) -> bytes:
        """The trajectories and the work, pickled: arrays that Ray unpacks itself cannot be written to."""
        if self.version != version:
            raise StaleVersionError(f"a rollout worker has weights of version {self.version}, not {version}")
        engine = self.engine_of(options)
        engine.branch_points = branch_points
        trajectories = engine.generate(requests, version)
        return pickle.dumps((trajectories, engine.stats))


class RayEngine:
    """Samples with the workers' models. See `rollouts.engines.base.Engine`."""

    def __init__(
        self,
        make: MakeSampler,
        options: Any,
        *,
        workers: int,
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float = 0.0,
        address: str | None = None,
        weights_dir: str | os.PathLike[str] | None = None,
        max_restarts: int = 3,
        start_seconds: float = 300.0,
        timeout_seconds: float = 1800.0,
    ):
        """
        Args:
            address: Ray cluster to join; None starts one on this machine, unless this process is in one already.
            weights_dir: folder of the weight files, emptied first; None sends them through the object store.

        Raises:
            ValueError: Ray is not installed, or there is no cluster at the address.
            EngineError: the workers did not start.
        """
        try:
            import ray
        except ImportError:
            raise ValueError("rollout.engine ray needs Ray: pip install 'denoise-rl[ray]'") from None
        self._ray = ray
        self._make = make
        self._resources = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker}
        self._max_restarts, self._start_seconds, self._timeout_seconds = max_restarts, start_seconds, timeout_seconds
        self._folder = None if weights_dir is None else Path(weights_dir)
        self.options = options
        self.branch_points: tuple[tuple[int, int], ...] = ()
        self.stats = EngineStats()
        self._workers_lost = 0
        self._weights: _Weights | None = None
        self._closed = False
        self._busy = threading.Lock()
        self._workers: list[Any] = []
        self._owns_ray = not ray.is_initialized()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        if self._owns_ray:
            _start_ray(ray, address, math.ceil(workers * cpus_per_worker))
        try:
            self._workers = self._start(workers)
        except BaseException:
            self.close()
            raise

    def capabilities(self) -> Capabilities:
        return RAY_WORKERS

    def generate(self, requests: Sequence[Any], policy_version: int = 0) -> list[Any]:
        """See `Engine.generate`. The work done in workers that died is not in `stats`."""
        with self._busy:
            started = time.perf_counter()
            self.stats = EngineStats()
            if self._weights is None or self._weights[0] != policy_version:
                has = None if self._weights is None else self._weights[0]
                raise StaleVersionError(f"the rollout workers have weights of version {has}, not {policy_version}")
            parts = self._parts(len(requests))
            done: dict[int, list[Any]] = {}
            for index, answer in self._run([requests[part] for part in parts], policy_version):
                done[index], stats = pickle.loads(answer)
                self.stats.add(stats)
            # Those that died while they took weights are counted here too.
            self.stats.workers_lost, self._workers_lost = self._workers_lost, 0
            self.stats.seconds = time.perf_counter() - started
            return [trajectory for index in range(len(parts)) for trajectory in done[index]]

    def push_weights(self, version: int, source: WeightSource) -> None:
        with self._busy:
            old, self._weights = self._weights, None
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in source.tensors().items()}
            if self._folder is None:
                blob = save(tensors)
                weights: _Weights = (version, hashlib.sha256(blob).hexdigest(), None, self._ray.put(blob))
            else:
                path, partial = self._folder / f"version_{version}.safetensors", self._folder / "partial"
                save_file(tensors, partial)
                digest = digest_of(partial)
                os.replace(partial, path)
                weights = (version, digest, path, None)
            for place, taken in enumerate([self._give_weights(worker, weights) for worker in self._workers]):
                try:
                    taken()
                except TransientEngineError:
                    self._replace(place, weights)
            self._weights = weights
            if old is not None and old[2] is not None and old[2] != weights[2]:
                old[2].unlink(missing_ok=True)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for worker in self._workers:
            self._ray.kill(worker)
        # A call in another thread ends now, since its workers did.
        if self._busy.acquire(timeout=60):
            self._busy.release()
        if self._owns_ray:
            self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _parts(self, count: int) -> list[slice]:
        """Contiguous shares of the requests, one per worker; the branches of a tree stay together."""
        leaves = math.prod(branches for _, branches in self.branch_points)
        trees, workers = -(-count // leaves), len(self._workers)
        bounds = [trees * i // workers * leaves for i in range(workers)] + [count]
        return [slice(a, b) for a, b in itertools.pairwise(bounds) if a < b]

    def _run(self, parts: list[Sequence[Any]], version: int) -> Iterator[tuple[int, bytes]]:
        """Give the parts to workers; yields (part, answer) as they come.

        Raises:
            EngineError: workers kept dying under a part, or the engine was closed.
        """
        waiting, idle = deque(range(len(parts))), deque(range(len(self._workers)))
        deaths = [0] * len(parts)
        running: dict[Any, tuple[int, int, float]] = {}
        while waiting or running:
            while waiting and idle:
                part, place = waiting.popleft(), idle.popleft()
                ref = self._workers[place].generate.remote(parts[part], self.options, self.branch_points, version)
                running[ref] = part, place, time.monotonic() + self._timeout_seconds
            first_end = min(end for _, _, end in running.values())
            ready, _ = self._ray.wait(list(running), timeout=max(first_end - time.monotonic(), 0.0))
            late = [ref for ref, (_, _, end) in running.items() if end <= time.monotonic()]
            for ref in ready or late:
                part, place, _ = running.pop(ref)
                try:
                    yield part, self._answer(ref, timeout=0.0)
                except TransientEngineError as error:
                    deaths[part] += 1
                    if deaths[part] > self._max_restarts:
                        raise EngineError(
                            f"rollout workers died {deaths[part]} times under the same requests "
                            f"(rollout.ray.max_restarts {self._max_restarts}), the last one because {error}"
                        ) from error
                    self.stats.requests_reassigned += len(parts[part])
                    assert self._weights is not None
                    self._replace(place, self._weights)
                    waiting.append(part)
                idle.append(place)

    def _answer(self, ref: Any, timeout: float | None = None) -> Any:
        """What a worker's method returned.

        Args:
            timeout: how much longer to wait for it; None is `start_seconds`.

        Raises:
            TransientEngineError: the worker died, or did not come to an end.
            ValueError, EngineError, NonFiniteError: as the worker raised them.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref, timeout=self._start_seconds if timeout is None else timeout)
        except errors.RayTaskError as error:
            # Anything else is a bug, and keeps the worker's traceback.
            if isinstance(error.cause, ValueError | EngineError | NonFiniteError):
                raise error.cause from error
            raise
        except errors.GetTimeoutError as error:
            raise TransientEngineError("it gave no answer in time") from error
        except errors.RayError as error:
            if self._closed:
                raise EngineError("the rollout workers were closed") from error
            raise TransientEngineError(_cause(error)) from error

    def _start(self, count: int) -> list[Any]:
        """New workers without weights."""
        actor: Any = self._ray.remote(RayWorker).options(**self._resources, max_restarts=0)
        workers: list[Any] = [actor.remote() for _ in range(count)]
        refs = [worker.set_up.remote(self._make) for worker in workers]
        _, missing = self._ray.wait(refs, num_returns=count, timeout=self._start_seconds)
        try:
            if missing:
                raise EngineError(
                    f"{len(missing)} of {count} rollout workers did not start within rollout.ray.start_seconds "
                    f"({self._start_seconds:g}): each wants {self._resources}, the cluster has "
                    f"{self._ray.cluster_resources()}"
                )
            for ref in refs:
                self._answer(ref)
        except BaseException as error:
            for worker in workers:
                self._ray.kill(worker)
            if isinstance(error, TransientEngineError):
                raise TransientEngineError(f"a rollout worker died while it started: {error}") from error
            raise
        return workers

    def _replace(self, place: int, weights: _Weights) -> None:
        """A new worker, with weights, in the place of one that died or hangs."""
        self._ray.kill(self._workers[place])
        for attempt in range(1 + self._max_restarts):
            if self._closed:
                raise EngineError("the rollout workers were closed")
            self._workers_lost += 1
            try:
                (self._workers[place],) = self._start(1)
                self._give_weights(self._workers[place], weights)()
                return
            except TransientEngineError:
                if attempt == self._max_restarts:
                    raise

    def _give_weights(self, worker: Any, weights: _Weights) -> Callable[[], None]:
        """Send weights; what is returned waits until they are there, and raises as `_answer`."""
        version, digest, path, blob = weights
        ref = worker.take_weights.remote(version, digest, None if path is None else str(path.absolute()), blob)

        def taken() -> None:
            if not self._answer(ref):
                assert path is not None
                self._answer(worker.take_weights.remote(version, digest, None, path.read_bytes()))

        return taken


def digest_of(path: str | os.PathLike[str]) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _start_ray(ray: Any, address: str | None, num_cpus: int) -> None:
    """Join the cluster, or start one for as long as this process lives."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    # Ray starts workers at niceness 15, where any other process of a shared machine comes before half of the run.
    niceness = {NICENESS: os.environ.get(NICENESS, "0")}
    with _environment(RAY_USAGE_STATS_ENABLED="0", **niceness):
        if address is None:
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
            return
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"rollout.ray.address {address!r}: no Ray cluster answers there: {text[:200]}") from error


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _cause(error: Exception) -> str:
    """Ray's account of a death in one line, without its list of guesses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = next((line for line in lines if line.startswith("The actor is dead because")), lines[0])
    return text.partition(" Some common causes")[0].removeprefix("The actor is dead because ")
