"""The engine whose model runs in other people's servers.

At the start every server is asked what it is and for one short rollout, and what that rollout carries decides which
recipes may run (`capabilities`). Weights go to all servers as a folder on a disk they share, by version; a server
that does not hold the version asked for samples nothing. Requests are independent of each other: each carries its own
seed, goes to one server, and to the next one when that is down.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rollouts.engines.base import (
    Capabilities,
    EngineError,
    EngineStats,
    StaleVersionError,
    WeightPushError,
    WeightSource,
)
from rollouts.engines.in_process import Request
from rollouts.engines.server.answers import Ask, Canvas, to_trajectory
from rollouts.engines.server.dialects import DIALECTS, filled
from rollouts.engines.server.errors import BadAnswerError, RefusedError, UnavailableError
from rollouts.engines.server.http_json import JsonServer, retrying
from rollouts.engines.server.options import ServerOptions, check_server
from rollouts.engines.server.weight_folder import current_folder, version_folder, write_version
from rollouts.model_protocol import DenoisingModel, mask_token_of
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import DETAILS, Detail, TokenTrajectory


@dataclass
class Peer:
    """One server.

    Attributes:
        decoder: what its trajectories record of the rule that chose positions.
        model: name that requests must carry.
        detail: what its answers carry.
        version: of the weights it holds; None until it has said so, and after it was lost.
        lock: held while that is found out.
    """

    http: JsonServer
    decoder: dict[str, object]
    model: str | None
    detail: Detail
    version: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class ServerEngine:
    """Samples trajectories with servers that hold the policy's weights. An `Engine` (`rollouts/engines/base.py`)."""

    _options: SamplerOptions

    def __init__(
        self,
        server: ServerOptions,
        model: DenoisingModel,
        options: SamplerOptions,
        *,
        weights_dir: str | Path,
        eos_token_id: int | None = None,
        leader: bool = True,
        from_leader: Callable[[Any], Any] = lambda value: value,
    ):
        """
        Args:
            model: the learner's; its layout is read, it is never run.
            options: temperature, filters and lengths go into the requests; which positions a step reveals is the
                servers' own rule.
            weights_dir: folder that the servers see under the same name.
            eos_token_id: end token.
            leader: this rank's engine is the one that pushes.
            from_leader: waits until every rank has called it, and gives the leader's value to all.

        Raises:
            ValueError: an option that no server can follow, or no server.
            EngineError: a server that is down, or none of this dialect.
        """
        self.dialect = DIALECTS[server.dialect]
        self.peers: list[Peer] = []
        self.server, self.model, self.eos_token_id = server, model, eos_token_id
        self.options = options
        self.weights_dir = Path(weights_dir)
        self.leader, self.from_leader = leader, from_leader
        self.branch_points: tuple[tuple[int, int], ...] = ()
        self.stats = EngineStats()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._cause: BaseException | None = None
        self._newest: int | None = None  # the version in `weights_dir`/current, which servers load when started anew
        self.peers = [self._meet(url) for url in server.urls]

    @property
    def options(self) -> SamplerOptions:
        return self._options

    @options.setter
    def options(self, options: SamplerOptions) -> None:
        check_server(self.server, options)
        causal = self.model.attention == "block_causal"
        if causal and (self.model.logit_shift or getattr(self.model, "context_causal", False)):
            raise ValueError("rollout.engine server: no shifted readout of blocks, no causal context; set in_process")
        if causal and options.block_length is None:
            options = options.model_copy(update={"block_length": self.model.block_length})
        if self.peers and options.block_length != self._options.block_length:
            raise ValueError(
                "train.block_schedule changes the block length of rollouts, and servers keep the one they were started "
                "with: empty it"
            )
        self._options = options
        self.canvas = Canvas(
            gen_length=options.gen_length,
            block_length=options.block_length,
            block_causal=causal,
            mask_token_id=mask_token_of(self.model),
            vocab_size=getattr(self.model, "vocab_size", None),
            excluded=getattr(self.model, "excluded_token_ids", ()),
        )

    # --- the handshake ------------------------------------------------------------------------------------------------

    def _meet(self, url: str) -> Peer:
        """Ask a server what it is, and for one short rollout.

        Raises:
            EngineError: it is down, does not speak the dialect, or its rollout does not hold up.
        """
        dialect = self.dialect
        http = JsonServer(url, self.server.timeout_seconds, self.server.api_key_variable)
        try:
            replies = self._patiently(lambda: self._about(http))
            self._check_start(dialect.started_from(replies))
            model = self.server.model or dialect.model_name(replies)
            # Where nothing can be pushed, version 0 is what the server was started with.
            peer = Peer(http, dialect.describe(replies), model, "sample", None if dialect.push else 0)
            # Any token will do, as long as it is no mask.
            prompt = Request([0 if self.canvas.mask_token_id else 1], seed=0)
            for detail in (DETAILS[-1], DETAILS[0]):
                # One token more than the prompt: the blocks of the answer then show the server's block length.
                ask = replace(self._ask(0, prompt, detail), max_new_tokens=1)
                try:
                    peer.detail = self._patiently(partial(self._sample, peer, ask, None)).detail
                    break
                except RefusedError:
                    # It may not know the fields that ask for more than the answer.
                    if detail == DETAILS[0]:
                        raise
        except EngineError as error:
            raise type(error)(f"rollout.server.urls: {url} cannot be used as {dialect.name}: {error}") from None
        return peer

    def _check_start(self, folder: str | None) -> None:
        """Raise EngineError when a server that does not name its weights could come back with others."""
        current = current_folder(self.weights_dir)
        if folder is not None and Path(folder) != current:
            raise EngineError(
                f"it was started from {folder}, and does not say later which weights it holds: make {current} a "
                "link to the first weights and start it from there, then it comes back with the newest"
            )

    def _about(self, http: JsonServer) -> list[Any]:
        return [http.call(path) for path in self.dialect.about]

    def capabilities(self) -> Capabilities:
        """What all servers can do."""
        detail = min((peer.detail for peer in self.peers), key=DETAILS.index)
        return Capabilities(
            step_maps=detail != "sample",
            sampled_logprobs=detail == "logprobs",
            asynchronous=True,
            policy_version=bool(self.dialect.push),
            push="folder",
        )

    # --- sampling -----------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], policy_version: int = 0) -> list[TokenTrajectory]:
        """One checked trajectory per request, in order; see `Engine.generate`.

        Servers do not tell their batches: in `stats`, `forwards` and `query_tokens` stay 0, and `sequence_forwards` and
        `rows_asked` count the steps that step maps show.

        Raises:
            ValueError: a request cannot be served as it is.
            StaleVersionError: a server has other weights, and they cannot be pushed to it again.
            EngineError: an answer that does not hold up, or no server that answers.
        """
        started = time.perf_counter()
        self.stats = EngineStats()
        asks = [self._ask(index, request, DETAILS[-1]) for index, request in enumerate(requests)]
        if not asks:
            return []
        if self.dialect.weight_version is not None:
            for peer in self.peers:
                # It may have been started anew since it was last heard of.
                peer.version = None
        self._stop.clear()
        self._cause = None
        with ThreadPoolExecutor(min(self.server.concurrency, len(asks)), "rollout") as threads:
            futures = [threads.submit(self._serve, index, ask, policy_version) for index, ask in enumerate(asks)]
            try:
                # `close` ends it too: what is under way then comes to nothing.
                while wait(futures, timeout=1.0, return_when=FIRST_EXCEPTION).not_done and not self._stop.is_set():
                    pass
            finally:
                # After an error nobody waits for what is left.
                self._stop.set()
                threads.shutdown(wait=True, cancel_futures=True)
        if self._cause is not None:
            raise self._cause
        trajectories = [future.result() for future in futures]
        self.stats.generated_tokens = sum(len(t.step) for t in trajectories)
        self.stats.rows_asked = self.stats.sequence_forwards = sum(
            t.num_steps for t in trajectories if t.detail != "sample"
        )
        self.stats.seconds = time.perf_counter() - started
        return trajectories

    def _ask(self, index: int, request: Request, detail: Detail) -> Ask:
        """A request as servers are asked for it.

        Raises:
            ValueError: it does not fit the model's context, has no prompt, or wants what servers do not do.
        """
        prompt = len(request.prompt_ids)
        if not prompt:
            raise ValueError(f"request {index} has an empty prompt: give it at least one token")
        if self.canvas.mask_token_id in request.prompt_ids:
            raise ValueError(f"request {index} has the mask token in its prompt: take it out")
        if request.num_inference_steps is not None:
            raise ValueError(f"request {index} has its own num_inference_steps, which servers do not take: use None")
        length = self.canvas.length(prompt)
        if length > self.model.max_length:
            raise ValueError(
                f"request {index}: prompt of {prompt} tokens plus sampler.gen_length {self.options.gen_length} needs "
                f"{length} positions, the model has {self.model.max_length}"
            )
        return Ask(
            prompt_ids=tuple(int(token) for token in request.prompt_ids),
            seed=request.seed,
            max_new_tokens=length - prompt,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            top_k=self.options.top_k,
            eos_token_id=self.eos_token_id,
            detail=detail,
        )

    def _serve(self, index: int, ask: Ask, policy_version: int) -> TokenTrajectory:
        """A rollout from the server whose turn it is, or from the next one that is up."""

        def attempt(number: int) -> TokenTrajectory:
            peer = self.peers[(index + number) % len(self.peers)]
            try:
                self._settle(peer, policy_version)
                return self._sample(peer, ask, policy_version)
            except UnavailableError as error:
                if error.lost:
                    peer.version = None
                raise

        try:
            trajectory: TokenTrajectory = retrying(
                attempt, self.server.retries, self.server.retry_seconds, self._stop, self._count_retry
            )
        except BaseException as error:
            with self._lock:
                self._cause = self._cause or error
            self._stop.set()
            raise
        return trajectory

    def _sample(self, peer: Peer, ask: Ask, policy_version: int | None) -> TokenTrajectory:
        """One request to one server; None takes whatever weights it has."""
        body = peer.http.call(self.dialect.generate, self.dialect.request(ask, peer.model))
        try:
            answer = self.dialect.answer(body)
            told = policy_version is not None and self.dialect.weight_version is not None
            if told and answer.weight_version != str(policy_version):
                raise StaleVersionError(
                    f"{peer.http.url} sampled with weight version {answer.weight_version}: {policy_version} was asked "
                    "for, and nobody else may update these servers"
                )
            trajectory = to_trajectory(answer, ask, self.canvas, self.options, peer.decoder, policy_version or 0)
            if policy_version is not None and trajectory.detail != peer.detail:
                raise BadAnswerError(f"it carries {trajectory.detail}, the server's first answer {peer.detail}")
        except BadAnswerError as error:
            raise BadAnswerError(f"bad answer of {peer.http.url}: {error}") from None
        return trajectory

    def _count_retry(self) -> None:
        with self._lock:
            self.stats.retries += 1

    def _patiently(self, attempt: Callable[[], Any]) -> Any:
        """`attempt` with the retries of the options, outside of a `generate`."""
        return retrying(lambda number: attempt(), self.server.retries, self.server.retry_seconds, threading.Event())

    # --- weights ------------------------------------------------------------------------------------------------------

    def push_weights(self, version: int, source: WeightSource) -> None:
        """Write the weights and have every server load them; see `Engine.push_weights`."""
        if not self.dialect.push:
            raise WeightPushError(f"rollout.server.dialect {self.dialect.name} has no weight update from disk")
        # Until the last rank has its rollouts of the old weights.
        self.from_leader(None)
        for peer in self.peers:
            peer.version = None
        self._newest = None
        if self.leader:
            write_version(self.weights_dir, version, source)
            self._spread(version)
        # A server that was down has none, and is settled by whoever asks it next.
        held = self.from_leader([peer.version for peer in self.peers])
        self._newest = version
        for peer, its_version in zip(self.peers, held, strict=True):
            peer.version = its_version

    def _spread(self, version: int) -> None:
        """Have the servers load a version that is written. One that is down gets it when it is back (`_settle`).

        Raises:
            WeightPushError: no server took it, or one refused.
        """
        down: list[EngineError] = []
        for peer in self.peers:
            try:
                self._patiently(partial(self._load, peer, version))
            except UnavailableError as error:
                down.append(error)
            except EngineError as error:
                raise WeightPushError(f"weight version {version} was refused: {error}") from None
        if len(down) == len(self.peers):
            raise WeightPushError(f"weight version {version} did not reach a server: {down[0]}")

    def _load(self, peer: Peer, version: int) -> None:
        """Have one server load the folder of a version. Until it says that it has, it has none.

        Raises:
            RefusedError: it says no, or the version it then names is another.
            UnavailableError: it went away meanwhile.
        """
        peer.version = None
        try:
            for path, body in self.dialect.push:
                reply = peer.http.call(path, filled(body, str(version_folder(self.weights_dir, version)), version))
                if isinstance(reply, dict) and reply.get("success") is False:
                    raise RefusedError(f"{peer.http.url}{path}: {reply.get('message')}")
        except EngineError:
            # Not left paused for whoever else uses it, whatever it holds now: this engine asks nothing of it until it
            # has taken a version whole.
            if self.dialect.after_failed_push is not None:
                with contextlib.suppress(EngineError):
                    peer.http.call(self.dialect.after_failed_push, {})
            raise
        if self.dialect.weight_version is not None:
            held = self.dialect.weight_version(self._about(peer.http))
            if held != str(version):
                raise RefusedError(f"{peer.http.url} still has weight version {held}")
        peer.version = version

    def _settle(self, peer: Peer, version: int) -> None:
        """Make sure that a server holds a version: one that was started anew gets it again.

        Raises:
            StaleVersionError: it does not, and the version is not there to be pushed.
        """
        with peer.lock:
            if peer.version == version:
                return
            if self.dialect.weight_version is not None:
                held = self.dialect.weight_version(self._about(peer.http))
                if held == str(version):
                    peer.version = version
                    return
            if self._newest != version:
                raise StaleVersionError(f"{peer.http.url} does not have weight version {version}: push it first")
            self._load(peer, version)
            with self._lock:
                self.stats.repushes += 1

    def close(self) -> None:
        """Let a `generate` that runs in another thread end with an error."""
        with self._lock:
            self._cause = self._cause or EngineError("the engine was closed while it sampled")
        self._stop.set()
