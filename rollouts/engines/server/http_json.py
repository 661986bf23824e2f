"""JSON over HTTP with bounded retries. Standard library only."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from rollouts.engines.server.errors import RefusedError, UnavailableError

TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}


class JsonServer:
    """One server."""

    def __init__(self, url: str, timeout_seconds: float, api_key_variable: str):
        self.url, self.timeout_seconds, self.api_key_variable = url, timeout_seconds, api_key_variable
        # A proxy cannot reach this machine's own loopback address.
        own = _is_loopback(urllib.parse.urlsplit(url).hostname or "")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if own else None))

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to a POST of `body`, or to a GET without one; None where it is empty.

        Raises:
            UnavailableError: busy, down, too slow, or cut off in the middle.
            RefusedError: the server says no.
        """
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.api_key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with self._opener.open(request, timeout=self.timeout_seconds) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            with error:
                try:
                    detail = " ".join(error.read(300).decode(errors="replace").split())
                except (OSError, http.client.HTTPException):
                    detail = "no reason given"
            kind = UnavailableError if error.code in TRANSIENT_STATUS else RefusedError
            raise kind(f"{self.url}{path} answered {error.code}: {detail}") from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnavailableError(f"{self.url}{path}: {reason}", lost=True) from None
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            # A server that sends no length can be cut off without anybody noticing before this.
            raise UnavailableError(f"{self.url}{path} answered {len(text)} bytes that are no JSON", lost=True) from None


def retrying(
    attempt: Callable[[int], Any],
    retries: int,
    retry_seconds: float,
    stop: threading.Event,
    count: Callable[[], None] = lambda: None,
) -> Any:
    """`attempt(0)`, `attempt(1)`, ... until one is not unavailable.

    Args:
        stop: when set, somebody else has failed: no further attempt is made.
        count: called for every further attempt.

    Raises:
        UnavailableError: the last attempt's, with the number of them.
    """
    for index in range(retries + 1):
        try:
            return attempt(index)
        except UnavailableError as error:
            if index == retries or stop.wait(retry_seconds * 2**index):
                raise UnavailableError(f"{error} (attempt {index + 1} of {retries + 1})", error.lost) from None
            count()
    raise AssertionError("unreachable")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
