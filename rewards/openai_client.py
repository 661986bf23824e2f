"""The few requests we make of an OpenAI-compatible server (vLLM, SGLang, llama.cpp, OpenAI). Standard library only."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from rewards.call import TRANSIENT, one_line
from rewards.score import Score, TransientRewardError

T = TypeVar("T")
TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}


class ChatClient:
    """One server: chats, and whatever else `post` is asked for.

    Args:
        base_url: for example `http://localhost:8000/v1`.
        model: model name the server knows.
        api_key_variable: environment variable that holds the key; no key is sent when it is unset.
        timeout_seconds: limit of one request.
    """

    def __init__(
        self, base_url: str, model: str, api_key_variable: str = "OPENAI_API_KEY", timeout_seconds: float = 60.0
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got '{base_url}'")
        self.url = base_url.rstrip("/")
        self.model = model
        self.api_key_variable = api_key_variable
        self.timeout_seconds = timeout_seconds
        # A proxy cannot reach this machine's own loopback address.
        proxies: dict[str, str] | None = {} if _is_loopback(urllib.parse.urlsplit(base_url).hostname or "") else None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))

    def complete(
        self, messages: Sequence[dict[str, Any]], temperature: float, max_tokens: int, num_choices: int = 1
    ) -> list[str]:
        """Texts of `num_choices` answers.

        Raises:
            TransientRewardError: the server is busy, down or too slow; worth another attempt.
            ValueError: the server refuses the request or answers something else; the same request fails again.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": max_tokens,
            "n": num_choices,
        }
        return self.post("/chat/completions", body, _chat_texts)

    def post(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer to a request.

        Args:
            path: below `base_url`; `/../classify` leaves its `/v1`.
            read: may raise KeyError, IndexError or TypeError where the answer is not of the expected form.

        Raises:
            TransientRewardError, ValueError: see `complete`.
        """
        base = self.url.removesuffix("/v1") if path.startswith("/../") else self.url
        url = base + path.removeprefix("/..")
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.api_key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.timeout_seconds) as response:
                answer = json.load(response)
            return read(answer)
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read(300).decode(errors="replace")
            kind = TransientRewardError if error.code in TRANSIENT_STATUS else ValueError
            raise kind(f"{url} answered {error.code}: {' '.join(detail.split())}") from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
            raise TransientRewardError(f"{url}: {one_line(error)}") from None
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{url} did not answer as an OpenAI server does: {one_line(error)}") from None


def _chat_texts(answer: Any) -> list[str]:
    return [choice["message"]["content"] or "" for choice in answer["choices"]]


def map_concurrently(function: Callable[[T], Score], items: Sequence[T], concurrency: int) -> list[Score]:
    """`function` of every item on `concurrency` threads; an exception becomes that item's failed score."""

    def guarded(item: T) -> Score:
        try:
            return function(item)
        except Exception as error:
            return Score(None, reason=one_line(error), transient=isinstance(error, TRANSIENT))

    with ThreadPoolExecutor(max_workers=concurrency) as threads:
        return list(threads.map(guarded, items))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
