"""docs/examples/phi3_family.py: a file that joins what memory holds apart, against transformers' own Phi-3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Phi3Config, Phi3ForCausalLM

from docs.examples import phi3_family
from rl.cli import main
from rl.model_section import LoraOptions, ModelConfig
from rl.models.load import load_policy
from tests import runs
from tests.test_families import MASK, TOKENIZER

ADDRESS = f"{runs.ROOT}/docs/examples/phi3_family.py:Phi3"
IDS = torch.tensor([[1, 4, 0, 2, 5, 3, 3, 1, MASK, 0, MASK, 4, 2, MASK, MASK, 5]])
SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 64}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A random Phi-3 as transformers writes it, peaked enough that wrong places would show."""
    torch.manual_seed(0)
    ids = {"mask_token_id": MASK, "eos_token_id": 7, "pad_token_id": 7, "bos_token_id": 7}
    model = Phi3ForCausalLM(Phi3Config(**SIZES, **ids, is_causal=False, initializer_range=0.3))
    model.save_pretrained(tmp_path / "phi3")
    TOKENIZER.save_pretrained(tmp_path / "phi3")
    files = load_file(tmp_path / "phi3" / "model.safetensors")
    assert files["model.layers.1.self_attn.qkv_proj.weight"].shape == (32, 16)
    assert files["model.layers.1.mlp.gate_up_proj.weight"].shape == (48, 16)
    return tmp_path / "phi3"


def load(path: Path, **settings: Any) -> Any:
    return load_policy(ModelConfig(path=str(path), **settings), TOKENIZER, 0)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found = model(IDS)
    return getattr(found, "logits", found)[..., :MASK]


def theirs(path: Path) -> torch.Tensor:
    return logits(Phi3ForCausalLM.from_pretrained(path).eval())


def test_logits_are_those_of_transformers(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = theirs(published)
    torch.testing.assert_close(logits(load(published, family=ADDRESS)), expected, rtol=0, atol=1e-5)
    for one, other in (("gate_proj", "up_proj"), ("k_proj", "v_proj")):
        swapped = {**phi3_family.FUSED, one: phi3_family.FUSED[other], other: phi3_family.FUSED[one]}
        monkeypatch.setattr(phi3_family, "FUSED", swapped)
        wrong = logits(load(published, family="docs.examples.phi3_family:Phi3"))
        assert (wrong - expected).abs().max() > 0.05
        monkeypatch.undo()


@pytest.mark.parametrize("rank", [0, 2])
def test_train_and_export(published: Path, tmp_path: Path, rank: int) -> None:
    """One step of the real command, whole or with adapters; the export is what transformers reads."""
    arguments = runs.tiny_config(
        tmp_path,
        "model.backbone={}",
        f"model.path={published}",
        f"model.family={ADDRESS}",
        f"model.lora.rank={rank}",
        "sft.steps=0",
        "train.steps=1",
        "train.max_logprob_gap=1e-3",
        "sampler.num_inference_steps=8",
        "eval.num_inference_steps=[8]",
    )
    runs.train_here(arguments)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--layout", ADDRESS]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (published, tmp_path / "out"))
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
    # The checkpoint is in our own layout; adapters say themselves through which family their model is read.
    ours = logits(load(tmp_path / "run" / "checkpoints" / "step_1" / "hf"))
    torch.testing.assert_close(theirs(tmp_path / "out"), ours, rtol=0, atol=1e-5)
    assert (ours - theirs(published)).abs().max() > 1e-3


def test_what_the_example_does_not_read_is_refused(published: Path) -> None:
    file = published / "config.json"
    text = file.read_text()
    for old, new, message in (
        ('"hidden_act": "silu"', '"hidden_act": "gelu"', "hidden_act 'gelu', the phi3 layout is read with 'silu' only"),
        ('"partial_rotary_factor": 1.0', '"partial_rotary_factor": 0.75', "rotary embeddings of other kinds"),
        ('"mask_token_id"', '"mask"', "config.json has no 'mask_token_id', which the phi3 layout needs"),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            load(published, family=ADDRESS)
    file.write_text(text)
    with pytest.raises(ValueError, match=r"model\.family names a family of your own"):
        load(published)
    with pytest.raises(ValueError, match="did you mean 'Phi3'"):
        load(published, family=ADDRESS.replace("Phi3", "Phi"))
    load(published, family=ADDRESS, lora=LoraOptions(rank=1))
