"""Fixtures for all tests: one thread, tiny models with peaked and distinct predictions, shared data files."""

from __future__ import annotations

import os
import tempfile

# Before torch starts its thread pool. The tests of a run share few cores, and results must not depend on them.
os.environ["OMP_NUM_THREADS"] = "1"
# No test may reach for the network or write into the user's cache.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DENOISE_RL_CACHE", os.path.join(tempfile.gettempdir(), "denoise-rl-cache"))
os.environ.setdefault("HF_DATASETS_CACHE", os.path.join(tempfile.gettempdir(), f"denoise-rl-datasets-{os.getpid()}"))

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

# name -> (backbone, attention, block_length, logit_shift)
FAMILIES = {
    "gpt2-full": ("gpt2", "full", None, 0),
    "qwen3-full": ("qwen3", "full", None, 0),
    "gpt2-full-shifted": ("gpt2", "full", None, 1),
    "gpt2-block4": ("gpt2", "block_causal", 4, 0),
    "qwen3-block4": ("qwen3", "block_causal", 4, 0),
}
_BACKBONES = {
    "gpt2": {
        "n_positions": 64,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 2,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "qwen3": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
    },
}


# The files that take longest, in CPU seconds. A worker that begins one of them last would work on alone.
LONGEST = ("distributed", "ray_workers", "faults", "kill_loop", "sandbox_hostile", "presets", "loop", "sandbox")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def products_of_torch() -> Iterator[None]:
    """DeepSpeed's stage 3 puts its own product into torch for the rest of the process, and it keeps more memory."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run(*arguments): a command in this process; its exit code, what it printed, and its complaints."""
    from rl.cli import main

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data files, which is no part of the project; the test is skipped without it."""
    folder = Path(os.environ.get("DENOISE_RL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no shared data: set DENOISE_RL_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """make_model(family, vocab_size=12, seed=0, scale=1.5): a float64 model in eval mode; the last id is the mask.

    `family` is one of FAMILIES or another combination of its words: "qwen3-block2-shifted-causal" has blocks of 2, the
    shifted readout and causal context.
    Weights are drawn so that every position and every context gets a different, peaked distribution: with
    the usual initialisation all predictions are nearly uniform, and a test would not see a wrong state.
    """

    from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig

    def make(family: str, vocab_size: int = 12, seed: int = 0, scale: float = 1.5) -> DiffusionLM:
        backbone, kind, *more = family.split("-")
        block_length = None if kind == "full" else int(kind.removeprefix("block"))
        sizes = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None, **_BACKBONES[backbone]}
        config = DiffusionLMConfig(
            backbone={"model_type": backbone, **sizes},
            mask_token_id=vocab_size - 1,
            attention="full" if kind == "full" else "block_causal",
            block_length=block_length,
            logit_shift=int("shifted" in more),
            context_causal="causal" in more,
        )
        model = DiffusionLM(config).double().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() < 2:
                    continue
                spread = 1.0 if "emb" in name or ".wte" in name or ".wpe" in name else min(parameter.shape) ** -0.5
                parameter.normal_(0.0, spread, generator=generator)
            model.lm_head.weight.mul_(scale)
        return model

    return make
