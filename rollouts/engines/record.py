"""The decisions that a call of the engine has made so far, and the trajectories they become."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from rollouts.samplers.step import StepResult
from rollouts.trajectory import X0_FIELDS

_COLUMNS = ("request", "step", "position", "token", "allowed_at", "logprob", "confidence", "is_noise")


class NonFiniteError(RuntimeError):
    """A model that gives NaN decodes to something all the same; nobody should score it."""


def on_host(*tensors: torch.Tensor | None) -> list[np.ndarray]:
    """The tensors as arrays, in one transfer; nothing for None."""
    given = [torch.zeros(0, dtype=torch.uint8) if tensor is None else tensor.contiguous() for tensor in tensors]
    parts = [tensor.to(given[0].device).flatten().view(torch.uint8) for tensor in given]
    flat = np.split(torch.cat(parts).cpu().numpy(), np.cumsum([len(part) for part in parts]))
    kinds = [torch.empty(0, dtype=tensor.dtype).numpy().dtype for tensor in given]
    return [part.view(kind).reshape(tensor.shape) for part, kind, tensor in zip(flat, kinds, given, strict=False)]


class Record:
    """Edits of all requests in the order they were made, as one array per forward."""

    def __init__(self, num_requests: int, classes: np.ndarray | None = None):
        """
        Args:
            classes: int64 [V], the class of every token, under a constraint.
        """
        self._classes = classes
        # The sets of classes that tokens were drawn among, packed -> their number.
        self._sets: dict[bytes, int] = {}
        self._parts: list[np.ndarray] = []
        self.length = np.zeros(num_requests, dtype=np.int64)
        self.num_steps = np.zeros(num_requests, dtype=np.int64)
        self._x0: list[dict[str, list[np.ndarray]]] = [{name: [] for name in X0_FIELDS} for _ in range(num_requests)]

    def add(
        self,
        result: StepResult,
        request: np.ndarray,
        step: np.ndarray,
        mask_token_id: int,
        counts: torch.Tensor | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keep what a step revealed and took back.

        Args:
            request, step: int64 [N], of each row of the step.
            counts: int64, numbers that the caller wants on the host.

        Returns:
            row [E] and token [E] of the revealed positions, and the counts. They are on the host: one transfer carries
            everything.
        """
        # Floats travel as their bits, so that one tensor holds all columns; what is revealed is picked on the host.
        floats = [x.double().view(torch.int64) for x in (result.logprob, result.confidence)]
        is_noise = torch.zeros_like(result.row) if result.is_noise is None else result.is_noise.long()
        reveal = result.reveal.long()
        found = torch.stack([result.row, result.position, result.token, *floats, is_noise, reveal])
        columns, counted, remask, allowed = on_host(found, counts, result.remask, result.allowed)
        kept = columns[-1] > 0
        columns = columns[:-1, kept]
        row, token = columns[0], columns[2]
        sets = np.full_like(row, -1)
        if result.allowed is not None:
            packed = np.packbits(allowed[kept], axis=1)
            sets[:] = [self._sets.setdefault(own.tobytes(), len(self._sets)) for own in packed]
        self._parts.append(np.concatenate([request[row][None], step[row][None], columns[1:3], sets[None], columns[3:]]))
        if result.remask is not None:
            back, position = remask.nonzero()
            # Log-prob and confidence are 0, whose bits are 0: taking a token back is no draw.
            nothing = np.zeros((3, len(back)), dtype=np.int64)
            masks = np.full((1, len(back)), mask_token_id)
            self._parts.append(np.concatenate([[request[back], step[back], position], masks, nothing[:1] - 1, nothing]))
        return row, token, counted

    def place(self, request: int, position: np.ndarray, token: np.ndarray) -> None:
        """Keep tokens int64 [E] that stand on a canvas before its first step: no decision, so of log-prob 0."""
        sure = np.ones(len(token)).view(np.int64)
        columns = [np.full_like(token, request), np.full_like(token, -1), position, token, np.full_like(token, -1)]
        self._parts.append(np.stack([*columns, np.zeros_like(token), sure, np.zeros_like(token)]))

    def add_x0(self, result: StepResult, canvas: torch.Tensor, masked: torch.Tensor, request: np.ndarray) -> None:
        """Keep all draws of a step.

        Args:
            canvas: int64 [N, L], before the step.
            masked: bool [N, L], its masks.
            request: int64 [N], of each row.
        """
        # Token editing also looks at tokens it then leaves as they are.
        drawn = masked[result.row, result.position] | result.reveal
        place, token = (result.row[drawn], result.position[drawn]), result.token[drawn]
        unknown = torch.full(canvas.shape, torch.nan, dtype=torch.float64, device=canvas.device)
        drawn_fields = {
            "x0_hat": canvas.index_put(place, token),
            "x0_confidence": unknown.index_put(place, result.confidence.double()[drawn]),
            "x0_logprob": unknown.index_put(place, result.logprob.double()[drawn]),
        }
        for name, values in drawn_fields.items():
            for i, row in zip(request, values.cpu().numpy().astype(X0_FIELDS[name]), strict=True):
                self._x0[i][name].append(row)

    def by_request(self) -> list[dict[str, Any]]:
        """For every request its fields of a `TokenTrajectory`: length, number of steps, edits and x0 predictions."""
        edits = np.concatenate(self._parts, axis=1)
        # Stable: the edits of a request keep their order.
        edits = edits[:, np.argsort(edits[0], kind="stable")]
        bounds = np.searchsorted(edits[0], np.arange(len(self.length) + 1))
        records, allowed = [], self._allowed()
        for request, (start, stop) in enumerate(itertools.pairwise(bounds.tolist())):
            columns = dict(zip(_COLUMNS, np.ascontiguousarray(edits[:, start:stop]), strict=True))
            del columns["request"]
            for name in ("logprob", "confidence"):
                columns[name] = columns[name].view(np.float64)
            # A greedy choice has log-prob 0 whatever the logits were; its confidence shows them.
            if not (np.isfinite(columns["logprob"]).all() and np.isfinite(columns["confidence"]).all()):
                raise NonFiniteError("the model's logits are not finite: its weights are damaged or training diverged")
            length = int(self.length[request])
            fields: dict[str, Any] = {"length": length, "num_steps": int(self.num_steps[request]), **columns}
            for name, kind in (("step", np.int32), ("position", np.int32), ("confidence", np.float32)):
                fields[name] = columns[name].astype(kind)
            is_noise = columns["is_noise"].astype(bool)
            fields["is_noise"] = is_noise if is_noise.any() else None
            if allowed is None:
                del fields["allowed_at"]
            else:
                fields |= {"allowed": allowed, "allowed_at": columns["allowed_at"].astype(np.int32)}
            x0 = {name: np.stack(rows)[:, :length] for name, rows in self._x0[request].items() if rows}
            records.append(fields | x0)
        return records

    def _allowed(self) -> np.ndarray | None:
        """uint8 [sets, V / 8]: the tokens of every set, packed; all trajectories of the call share it."""
        if self._classes is None:
            return None
        packed = np.frombuffer(b"".join(self._sets), dtype=np.uint8).reshape(len(self._sets), -1)
        return np.packbits(np.unpackbits(packed, axis=1)[:, self._classes], axis=1)
