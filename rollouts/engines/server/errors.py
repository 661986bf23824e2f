"""What can go wrong with a server, beside the errors of every engine (`rollouts/engines/base.py`)."""

from __future__ import annotations

from rollouts.engines.base import EngineError, TransientEngineError


class UnavailableError(TransientEngineError):
    """Down, busy, or the connection was cut: the same request may succeed later.

    Args:
        lost: the server itself was not heard of; it may be another one, or have other weights, when it comes back.
    """

    def __init__(self, message: str, lost: bool = False):
        super().__init__(message)
        self.lost = lost


class RefusedError(EngineError):
    """The server understood and said no: the same request fails again."""


class BadAnswerError(EngineError):
    """An answer contradicts itself, the request or the model. It is never repaired and never dropped in silence."""
