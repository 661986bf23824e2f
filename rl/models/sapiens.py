"""Sapiens, antibody masked language models (Prihoda et al. 2022, mAbs 14:2020203), as Hugging Face folders.

The PyPI package `sapiens` (MIT) carries two RoBERTa checkpoints of 0.57 M parameters in fairseq's layout, one for heavy
and one for light chains. It depends on fairseq, which nothing here needs: `pip install --no-deps sapiens`.

    python -m rl.models.sapiens runs/sapiens_vh            # or, with a file: ... runs/sapiens_vh checkpoint_vh.pt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
# fairseq's dictionary: its special tokens, the residues in the order of dict.txt, the mask.
TOKENS = ["<s>", "<pad>", "</s>", "<unk>", *RESIDUES, "<mask>"]
_PARTS = {
    "decoder.sentence_encoder.embed_tokens.": "roberta.embeddings.word_embeddings.",
    "decoder.sentence_encoder.embed_positions.": "roberta.embeddings.position_embeddings.",
    "decoder.sentence_encoder.emb_layer_norm.": "roberta.embeddings.LayerNorm.",
    "decoder.sentence_encoder.layers.": "roberta.encoder.layer.",
    "decoder.lm_head.weight": "lm_head.decoder.weight",
    "decoder.lm_head.bias": "lm_head.bias",
    "decoder.lm_head.": "lm_head.",
    "self_attn.q_proj.": "attention.self.query.",
    "self_attn.k_proj.": "attention.self.key.",
    "self_attn.v_proj.": "attention.self.value.",
    "self_attn.out_proj.": "attention.output.dense.",
    "self_attn_layer_norm.": "attention.output.LayerNorm.",
    "fc1.": "intermediate.dense.",
    "fc2.": "output.dense.",
    "final_layer_norm.": "output.LayerNorm.",
}


def convert(output: str | Path, checkpoint: str | Path | None = None, chain: str = "vh") -> Path:
    """Write a folder that `model.path` and the reward `pseudo_likelihood` read.

    Args:
        checkpoint: fairseq checkpoint; the installed package's when None.
        chain: vh or vl.

    Raises:
        ValueError: the package is not installed, or the file holds something else.
    """
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM

    path = Path(checkpoint) if checkpoint else _package_checkpoint(chain)
    if not path.is_file():
        raise ValueError(f"sapiens checkpoint {path} is not a file")
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(path, map_location="cpu", weights_only=True)
    settings, weights = saved["args"], saved["model"]
    position_rows = weights["decoder.sentence_encoder.embed_positions.weight"].shape[0]
    config = RobertaConfig(
        vocab_size=len(TOKENS),
        hidden_size=settings.encoder_embed_dim,
        num_hidden_layers=settings.encoder_layers,
        num_attention_heads=settings.encoder_attention_heads,
        intermediate_size=settings.encoder_ffn_embed_dim,
        max_position_embeddings=position_rows,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = RobertaForMaskedLM(config).eval()
    state: dict[str, Any] = {_renamed(name): tensor for name, tensor in weights.items()}
    # RoBERTa adds a token-type embedding, which fairseq has not: zeros.
    state["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, config.hidden_size)
    state["lm_head.decoder.bias"] = state["lm_head.bias"]
    report = model.load_state_dict(state, strict=False)
    missing = [name for name in report.missing_keys if not name.endswith("position_ids")]
    if missing or report.unexpected_keys:
        raise ValueError(f"sapiens checkpoint {path} is another model: {[*missing, *report.unexpected_keys][0]}")
    model.save_pretrained(output)
    _tokenizer().save_pretrained(output)
    return Path(output)


def _renamed(name: str) -> str:
    for old, new in _PARTS.items():
        name = name.replace(old, new)
    return name


def _tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        clean_up_tokenization_spaces=False,
    )


def _package_checkpoint(chain: str) -> Path:
    from importlib.metadata import PackageNotFoundError, files

    try:
        found = [file for file in files("sapiens") or [] if file.name == f"checkpoint_{chain}.pt"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ValueError("the antibody models are in the package sapiens: pip install --no-deps sapiens")
    return Path(str(found[0].locate()))


if __name__ == "__main__":
    try:
        print(convert(*sys.argv[1:3]))
    except ValueError as error:
        sys.exit(f"sapiens: {error}")
