"""What distinguishes one server's HTTP interface from another's: paths, field names, and who returns what.

The interfaces are those of SGLang 0.5 with the dLLM replay fields of its pull request 27943, vLLM 0.2x/0.3x in
development mode, and LMDeploy 0.16, as their documentation and sources define them; docs/engines.md says what was
tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rollouts.engines.server.answers import Answer, Ask
from rollouts.engines.server.errors import BadAnswerError, UnavailableError

# Replay fields of SGLang that this code knows how to read.
REPLAY_CONTRACT = 1


@dataclass(frozen=True)
class Dialect:
    """One interface.

    Attributes:
        about: GETs that say what the server is; each must answer.
        generate: path of a generation.
        request: (ask, model name) -> body.
        answer: body of the reply -> `Answer`.
        describe: replies of `about`, in order -> what a trajectory records of the decoder: engine, version, rule.
        push: POSTs that load new weights, in order; `{folder}` and `{version}` stand for these.
        after_failed_push: a POST that undoes what a push that did not end has begun; None where there is nothing.
        weight_version: replies of `about` -> the weights the server says it holds; None where it does not say.
        started_from: replies of `about` -> the folder it loads when it is started, asked of servers that do not name
            their weights; None for others.
        model_name: replies of `about` -> name that requests must carry.
    """

    name: str
    about: Sequence[str]
    generate: str
    request: Callable[[Ask, str | None], dict[str, Any]]
    answer: Callable[[Mapping[str, Any]], Answer]
    describe: Callable[[Sequence[Any]], dict[str, object]]
    push: Sequence[tuple[str, Mapping[str, Any]]] = ()
    after_failed_push: str | None = None
    weight_version: Callable[[Sequence[Any]], str] | None = None
    started_from: Callable[[Sequence[Any]], str | None] = field(default=lambda replies: None)
    model_name: Callable[[Sequence[Any]], str | None] = field(default=lambda replies: None)


def filled(body: Mapping[str, Any], folder: str, version: int) -> dict[str, Any]:
    """A body of `Dialect.push` with its placeholders replaced."""
    names = {"{folder}": folder, "{version}": str(version)}
    return {key: names.get(value, value) for key, value in body.items()}


# --- reading answers --------------------------------------------------------------------------------------------------


def _get(body: Any, *path: str | int) -> Any:
    """The value at a path.

    Raises:
        BadAnswerError: there is none.
    """
    for depth, key in enumerate(path):
        try:
            body = body[key]
        except (KeyError, IndexError, TypeError):
            raise BadAnswerError(f"it has no {'.'.join(str(part) for part in path[: depth + 1])}") from None
    return body


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadAnswerError(f"its {name} is {value!r}, not an integer")
    return value


def _integers(value: Any, name: str) -> list[int]:
    if not isinstance(value, list):
        raise BadAnswerError(f"its {name} is {type(value).__name__}, not a list")
    return [_integer(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _numbers(value: Any, name: str) -> list[float]:
    if not isinstance(value, list):
        raise BadAnswerError(f"its {name} is {type(value).__name__}, not a list")
    for index, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise BadAnswerError(f"its {name}[{index}] is {item!r}, not a number")
    return [float(item) for item in value]


def _finish(value: Any) -> str:
    """The reason, given as text or as {"type": text}.

    Raises:
        UnavailableError: the request was aborted, as on a weight update.
    """
    reason = str(value.get("type") if isinstance(value, Mapping) else value)
    if reason in ("abort", "error"):
        raise UnavailableError(f"the server ended a request with {value!r}")
    return reason


# --- SGLang -----------------------------------------------------------------------------------------------------------


def _sglang_request(ask: Ask, model: str | None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "input_ids": list(ask.prompt_ids),
        "sampling_params": {
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "top_k": ask.top_k or -1,
            "max_new_tokens": ask.max_new_tokens,
            "sampling_seed": ask.seed,
            **_until(ask),
        },
    }
    return body if ask.detail == "sample" else {**body, "return_step_maps": True}


def _sglang_answer(body: Mapping[str, Any]) -> Answer:
    meta = _get(body, "meta_info")
    answer = Answer(
        prompt_length=_integer(_get(meta, "prompt_tokens"), "meta_info.prompt_tokens"),
        token_ids=_integers(_get(body, "output_ids"), "output_ids"),
        finish=_finish(_get(meta, "finish_reason")),
        weight_version=str(_get(meta, "weight_version")),
    )
    contract = meta.get("dllm_replay_contract_version")
    if contract is None:
        return answer
    if contract != REPLAY_CONTRACT:
        raise BadAnswerError(f"its dllm_replay_contract_version is {contract!r}, this code reads {REPLAY_CONTRACT}")
    stop = _integer(_get(meta, "dllm_stop_length"), "dllm_stop_length")
    if stop != len(answer.token_ids):
        raise BadAnswerError(f"its dllm_stop_length is {stop} and it has {len(answer.token_ids)} output_ids")
    # output_token_logprobs is no substitute: it is of the last step, not of the step that decided the token.
    logprobs = meta.get("dllm_replay_logprobs")
    return Answer(
        prompt_length=answer.prompt_length,
        token_ids=answer.token_ids,
        finish=answer.finish,
        weight_version=answer.weight_version,
        replay_ids=_integers(_get(meta, "dllm_replay_token_ids"), "dllm_replay_token_ids"),
        step_map=_integers(_get(meta, "dllm_replay_step_maps"), "dllm_replay_step_maps"),
        logprobs=None if logprobs is None else _numbers(logprobs, "dllm_replay_logprobs"),
    )


def _sglang_describe(replies: Sequence[Any]) -> dict[str, object]:
    info = replies[0]
    if not _get(info, "dllm_algorithm"):
        raise BadAnswerError("it decodes left to right: start it with --dllm-algorithm")
    names = ("version", "dllm_algorithm", "dllm_algorithm_config")
    return {"engine": "sglang", **{name: info.get(name) for name in names}}


# --- vLLM -------------------------------------------------------------------------------------------------------------


def _vllm_request(ask: Ask, model: str | None) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(ask.prompt_ids),
        "max_tokens": ask.max_new_tokens,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "top_k": ask.top_k or -1,
        "seed": ask.seed,
        "return_token_ids": True,
        **_until(ask),
    }


def _vllm_causal_request(ask: Ask, model: str | None) -> dict[str, Any]:
    """As above, and nothing that the model's generation_config.json would add: its own ends, and penalties."""
    return {**_vllm_request(ask, model), "ignore_eos": True, "min_p": 0.0, "repetition_penalty": 1.0}


def _vllm_answer(body: Mapping[str, Any]) -> Answer:
    choice = _get(body, "choices", 0)
    return Answer(
        prompt_length=_integer(_get(body, "usage", "prompt_tokens"), "usage.prompt_tokens"),
        prompt_ids=_integers(_get(choice, "prompt_token_ids"), "prompt_token_ids"),
        token_ids=_integers(_get(choice, "token_ids"), "token_ids"),
        finish=_finish(_get(choice, "finish_reason")),
    )


# --- LMDeploy ---------------------------------------------------------------------------------------------------------


def _lmdeploy_request(ask: Ask, model: str | None) -> dict[str, Any]:
    return {
        "input_ids": list(ask.prompt_ids),
        "max_tokens": ask.max_new_tokens,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "top_k": ask.top_k,
        # Without it the end token is taken off the ids.
        "include_stop_str_in_output": True,
        **_until(ask),
    }


def _lmdeploy_answer(body: Mapping[str, Any]) -> Answer:
    meta = _get(body, "meta_info")
    return Answer(
        prompt_length=_integer(_get(meta, "prompt_tokens"), "meta_info.prompt_tokens"),
        token_ids=_integers(_get(body, "output_ids"), "output_ids"),
        finish=_finish(_get(meta, "finish_reason")),
    )


def _until(ask: Ask) -> dict[str, Any]:
    """What ends a response before its length does; three servers, one spelling."""
    if ask.eos_token_id is None:
        return {"ignore_eos": True}
    return {"ignore_eos": False, "stop_token_ids": [ask.eos_token_id]}


DIALECTS = {
    "sglang": Dialect(
        name="sglang",
        about=("/server_info", "/model_info"),
        generate="/generate",
        request=_sglang_request,
        answer=_sglang_answer,
        describe=_sglang_describe,
        push=(
            (
                "/update_weights_from_disk",
                {"model_path": "{folder}", "weight_version": "{version}", "flush_cache": True},
            ),
        ),
        weight_version=lambda replies: str(_get(replies, 1, "weight_version")),
    ),
    "vllm": Dialect(
        name="vllm",
        about=("/version", "/v1/models"),
        generate="/v1/completions",
        request=_vllm_request,
        answer=_vllm_answer,
        describe=lambda replies: {"engine": "vllm", "version": _get(replies, 0, "version")},
        push=(
            ("/pause?mode=wait", {}),
            # From where it was started, which is the link to the newest weights.
            ("/collective_rpc", {"method": "reload_weights"}),
            ("/reset_prefix_cache", {}),
            ("/resume", {}),
        ),
        after_failed_push="/resume",
        started_from=lambda replies: str(_get(replies, 1, "data", 0, "root")),
        model_name=lambda replies: str(_get(replies, 1, "data", 0, "id")),
    ),
    "lmdeploy": Dialect(
        name="lmdeploy",
        about=("/v1/models",),
        generate="/generate",
        request=_lmdeploy_request,
        answer=_lmdeploy_answer,
        describe=lambda replies: {"engine": "lmdeploy", "model": _get(replies, 0, "data", 0, "id")},
        # Its own updates hand over CUDA memory; there is none from disk.
    ),
}
# An autoregressive model, which is sampled and not trained; `rollouts.engines.causal` asks for it.
DIALECTS["vllm_causal"] = replace(
    DIALECTS["vllm"], request=_vllm_causal_request, push=(), started_from=lambda replies: None
)
