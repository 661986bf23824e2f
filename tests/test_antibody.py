"""The antibody task, and the conversion of fairseq's checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from rewards.protein import AMINO_ACIDS
from rl.models.sapiens import TOKENS, _renamed, convert
from rl.tasks.antibody import GERMLINES
from rl.tasks.load import load_task


def test_prompts_are_v_genes_up_to_the_third_cdr() -> None:
    rows = load_task("antibody", {}).train_examples(0, 1, 5)
    assert [row["germline"] for row in rows] == [*list(GERMLINES)[1:], *list(GERMLINES)[:2]]
    for gene, text in GERMLINES.items():
        assert set(text) <= set(AMINO_ACIDS) and text[-5:-2] == "YYC" and 97 <= len(text) <= 98, gene


def fairseq_checkpoint(path: Path, width: int = 8, layers: int = 2) -> dict[str, torch.Tensor]:
    """Random weights in the published layout."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    encoder = "decoder.sentence_encoder."
    weights = {f"{encoder}embed_tokens.weight": draw(25, width), f"{encoder}embed_positions.weight": draw(20, width)}
    linear = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    linear |= {"fc1": (12, width), "fc2": (width, 12)}
    for layer in range(layers):
        for name, shape in linear.items():
            weights[f"{encoder}layers.{layer}.{name}.weight"] = draw(*shape)
            weights[f"{encoder}layers.{layer}.{name}.bias"] = draw(shape[0])
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            weights[f"{encoder}layers.{layer}.{name}.weight"] = 1 + draw(width)
            weights[f"{encoder}layers.{layer}.{name}.bias"] = draw(width)
    weights |= {f"{encoder}emb_layer_norm.weight": 1 + draw(width), f"{encoder}emb_layer_norm.bias": draw(width)}
    head = "decoder.lm_head."
    weights |= {f"{head}weight": draw(25, width), f"{head}bias": draw(25), f"{head}dense.weight": draw(width, width),
                f"{head}dense.bias": draw(width), f"{head}layer_norm.weight": 1 + draw(width),
                f"{head}layer_norm.bias": draw(width)}  # fmt: skip
    args = argparse.Namespace(
        encoder_embed_dim=width, encoder_layers=layers, encoder_attention_heads=2, encoder_ffn_embed_dim=12
    )
    torch.save({"args": args, "model": weights}, path)
    return weights


def reference_logits(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """fairseq's forward written out: post-norm layers, positions counted from behind the padding id."""
    from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

    def apply(name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    encoder = "decoder.sentence_encoder."
    positions = torch.arange(len(ids)) + 2
    x = weights[f"{encoder}embed_tokens.weight"][ids] + weights[f"{encoder}embed_positions.weight"][positions]
    x = norm(f"{encoder}emb_layer_norm", x)
    for layer in range(2):
        at = f"{encoder}layers.{layer}."
        q, k, v = (apply(f"{at}self_attn.{n}_proj", x).view(-1, 2, 4).transpose(0, 1) for n in "qkv")
        mixed = scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(-1, 8)
        x = norm(f"{at}self_attn_layer_norm", x + apply(f"{at}self_attn.out_proj", mixed))
        x = norm(f"{at}final_layer_norm", x + apply(f"{at}fc2", gelu(apply(f"{at}fc1", x))))
    x = norm("decoder.lm_head.layer_norm", gelu(apply("decoder.lm_head.dense", x)))
    return apply("decoder.lm_head", x)


def test_a_fairseq_checkpoint_becomes_a_folder_with_the_same_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    weights = fairseq_checkpoint(tmp_path / "checkpoint.pt")
    folder = convert(tmp_path / "model", tmp_path / "checkpoint.pt")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)
    ids = tokenizer("ACWY<mask>").input_ids
    assert ids == [0, 4, 5, 22, 23, 24, 2] and TOKENS[24] == "<mask>"
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, reference_logits(weights, torch.tensor(ids)), rtol=1e-4, atol=1e-5)


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        convert(tmp_path / "model", tmp_path / "nothing.pt")
    weights = fairseq_checkpoint(tmp_path / "checkpoint.pt")
    del weights["decoder.lm_head.dense.weight"]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    torch.save({"args": saved["args"], "model": weights}, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"is another model: lm_head.dense.weight"):
        convert(tmp_path / "model", tmp_path / "broken.pt")
    assert _renamed("decoder.lm_head.weight") == "lm_head.decoder.weight"
