"""Where the servers are and how to talk to them. No torch at import."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rollouts.samplers.options import PARTS, SamplerOptions


class ServerOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    dialect: Literal["sglang", "vllm", "lmdeploy"] = Field(
        "sglang", description="Whose HTTP interface the servers speak (docs/engines.md)."
    )
    urls: list[str] = Field([], description="One address per server, http://host:port; requests are spread over them.")
    model: str | None = Field(
        None, description="Model name in requests to a vLLM server; null takes the first it lists."
    )
    concurrency: int = Field(64, ge=1, description="Requests of a rank that are under way at once.")
    timeout_seconds: float = Field(600.0, gt=0, description="Limit of one request, a weight update included.")
    retries: int = Field(
        4, ge=0, description="Further attempts of a request whose server was down, busy or cut the connection."
    )
    retry_seconds: float = Field(1.0, gt=0, description="Wait before the first of them; each further wait is doubled.")
    weights_dir: str | None = Field(
        None, description="Folder that trainer and servers share, for new weights; null is one in run.output_dir."
    )
    layout: str | None = Field(
        None, description="Published layout to write weights in: llada, dream, sdar or file.py:Class; null writes ours."
    )
    api_key_variable: str = Field(
        "ROLLOUT_API_KEY", description="Environment variable with the servers' key; no key is sent when it is unset."
    )

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"rollout.server.urls must begin with http:// or https://, got {url!r}")
        return [url.rstrip("/") for url in urls]


def check_server(server: ServerOptions, options: SamplerOptions) -> None:
    """Raise ValueError when there is no server, or the sampler is to do what is up to servers."""
    if not server.urls:
        raise ValueError("rollout.server.urls is empty: name the servers that sample, http://host:port")
    for name in ("cfg_scale", "record_x0", "constraint"):
        if getattr(options, name):
            raise ValueError(
                f"sampler.{name} is {getattr(options, name)}, which rollout.engine server cannot do: unset it"
            )
    for name in ("preset", *PARTS):
        default = SamplerOptions.model_fields[name].default
        if getattr(options, name) != default:
            raise ValueError(
                f"sampler.{name} is {getattr(options, name)!r}: with rollout.engine server the rule that reveals "
                f"positions is the one the servers were started with, leave it at {default!r}"
            )
