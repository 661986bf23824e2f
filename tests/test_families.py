"""Published checkpoint layouts: tiny random LLaDA, Dream and SDAR folders against a forward written out by hand.

The folders are written tensor by tensor under the published names; nothing of ours takes part in making them.
"""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from rl.cli import main
from rl.config import Config, load_config
from rl.modalities.text import TextModality
from rl.model_section import ModelConfig
from rl.models import attention
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rl.models.export import write_published
from rl.models.families.family import SIZES, Family, Part
from rl.models.load import load_policy
from rl.models.tokenizers import load_tokenizer
from rl.models.weights import lay_out, write_weights
from rl.tasks.char_tokenizer import char_tokenizer
from rl.tasks.sudoku import SudokuTask
from rl.train.plan import check_run
from rl.values.model import Policy
from rollouts.engines.block_cache import BlockCache
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from tests import runs

D, HEADS, KV, LAYERS, INNER, VOCAB, THETA, BLOCK = 16, 4, 2, 2, 24, 20, 500.0, 4
FAMILIES = ["llada", "dream", "sdar"]
TOKENIZER = char_tokenizer("01234=")
MASK = TOKENIZER.mask_token_id

# The published config.json of each family, in its own words, with small numbers.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llada": {
        "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
        "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": D,
        "embedding_dropout": 0.0, "embedding_size": VOCAB, "eos_token_id": 7, "include_bias": False,
        "include_qkv_bias": False, "init_device": "meta", "init_fn": "mitchell", "input_emb_norm": False,
        "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": MASK, "max_sequence_length": 64,
        "mlp_hidden_size": INNER, "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None,
        "n_heads": HEADS, "n_kv_heads": KV, "n_layers": LAYERS, "pad_token_id": 7, "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05, "rope": True, "rope_full_precision": True, "rope_theta": THETA, "scale_logits": False,
        "transformers_version": "4.46.3", "use_cache": False, "vocab_size": VOCAB, "weight_tying": False,
    },
    "dream": {
        "architectures": ["DreamModel"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "bos_token_id": 7, "eos_token_id": 7, "hidden_act": "silu", "hidden_size": D, "initializer_range": 0.02,
        "intermediate_size": INNER, "mask_token_id": MASK, "max_position_embeddings": 64, "max_window_layers": 28,
        "model_type": "Dream", "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "num_key_value_heads": KV,
        "pad_token_id": 7, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": THETA, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "float64", "use_cache": True, "use_sliding_window": False,
        "vocab_size": VOCAB,
    },
    "sdar": {
        "architectures": ["SDARForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel"},
        "bos_token_id": 7, "block_size": BLOCK, "debug": False, "eos_token_id": 7, "fuse_cross_entropy": True,
        "head_dim": 8, "hidden_act": "silu", "hidden_size": D, "intermediate_size": INNER, "mask_token_id": MASK,
        "max_position_embeddings": 64, "model_type": "sdar", "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS, "num_key_value_heads": KV, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": THETA, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "float64",
        "use_sliding_window": False, "vocab_size": VOCAB,
    },
}  # fmt: skip

# Roles of a layer's tensors, and what each layout calls them.
QWEN = {
    "embed": "model.embed_tokens", "final": "model.norm", "head": "lm_head", "layer": "model.layers.{}.",
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
    "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
}  # fmt: skip
NAMES = {
    "dream": QWEN,
    "sdar": QWEN,
    "llada": {
        "embed": "model.transformer.wte", "final": "model.transformer.ln_f", "head": "model.transformer.ff_out",
        "layer": "model.transformer.blocks.{}.", "norm1": "attn_norm", "norm2": "ff_norm", "q": "q_proj",
        "k": "k_proj", "v": "v_proj", "o": "attn_out", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
    },
}  # fmt: skip


def head_dim(family: str) -> int:
    return 8 if family == "sdar" else D // HEADS


def tensors(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the published names, peaked enough to tell any two of them apart."""
    generator = torch.Generator().manual_seed(seed)
    names, width = NAMES[family], head_dim(family)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * (shape[-1] ** -0.5 if shape[1:] else 0.2)

    shapes = {"q": (HEADS * width, D), "k": (KV * width, D), "v": (KV * width, D), "o": (D, HEADS * width)}
    shapes |= {"gate": (INNER, D), "up": (INNER, D), "down": (D, INNER)}
    result = {f"{names['embed']}.weight": draw(VOCAB, D) * 4, f"{names['head']}.weight": draw(VOCAB, D) * 2}
    result[f"{names['final']}.weight"] = 1 + draw(D)
    for layer in range(LAYERS):
        at = names["layer"].format(layer)
        result |= {f"{at}{names[role]}.weight": draw(*shape) for role, shape in shapes.items()}
        result |= {f"{at}{names[role]}.weight": 1 + draw(D) for role in ("norm1", "norm2")}
        if family == "dream":
            result |= {f"{at}{names[role]}.bias": draw(shapes[role][0]) for role in "qkv"}
        if family == "sdar":
            result |= {f"{at}{names[role]}.weight": 1 + draw(width) for role in ("q_norm", "k_norm")}
    return result


def reference(family: str, weights: dict[str, torch.Tensor], ids: list[int], theta: float = THETA) -> torch.Tensor:
    """[L, V] logits of one sequence, by the book: no batch, no cache, rotation angles one by one."""
    names, width = NAMES[family], head_dim(family)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        """[L, width]: pair (i, i + width/2) of position p turns by p * theta^(-2i/width)."""
        out, half = x.clone(), width // 2
        for p in range(len(x)):
            for i in range(half):
                angle = p * theta ** (-2 * i / width)
                a, b = x[p, i], x[p, i + half]
                out[p, i] = a * math.cos(angle) - b * math.sin(angle)
                out[p, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = weights[f"{names['embed']}.weight"][ids]
    position = torch.arange(len(ids))
    blind = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    if family == "sdar":
        blind = position[None, :] // BLOCK > position[:, None] // BLOCK
    for layer in range(LAYERS):
        at = names["layer"].format(layer)
        h = norm(x, at + names["norm1"])
        q, k, v = (linear(h, at + names[role]).split(width, -1) for role in "qkv")
        mixed = []
        for head in range(HEADS):
            query, key = q[head], k[head // (HEADS // KV)]
            if family == "sdar":
                query, key = norm(query, at + names["q_norm"]), norm(key, at + names["k_norm"])
            score = rotate(query) @ rotate(key).T / width**0.5
            mixed.append(score.masked_fill(blind, -torch.inf).softmax(-1) @ v[head // (HEADS // KV)])
        x = x + linear(torch.cat(mixed, -1), at + names["o"])
        h = norm(x, at + names["norm2"])
        x = x + linear(silu(linear(h, at + names["gate"])) * linear(h, at + names["up"]), at + names["down"])
    return linear(norm(x, names["final"]), names["head"])


def write(path: Path, family: str, weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """A published folder; three shards with an index, as big checkpoints have."""
    path.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in {**PUBLISHED[family], **changes}.items() if v != "absent"}
    (path / "config.json").write_text(json.dumps(config))
    weights = tensors(family) if weights is None else weights
    index = {name: f"model-{1 + i % 3:05}-of-00003.safetensors" for i, name in enumerate(weights)}
    for file in set(index.values()):
        save_file({n: t for n, t in weights.items() if index[n] == file}, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    TOKENIZER.save_pretrained(path)
    return path


def load(path: Path, **settings: Any) -> DiffusionLM:
    return load_policy(ModelConfig(path=str(path), **settings), TOKENIZER, seed=0)


IDS = [1, 4, 0, 2, 5, 3, 3, 1, MASK, 0, MASK, 4, 2, MASK, MASK, 5]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_published_checkpoint_predicts_what_it_should(family: str, tmp_path: Path) -> None:
    model = load(write(tmp_path, family))
    expected = reference(family, tensors(family), IDS)
    known = range(MASK)
    # transformers computes angles in float32.
    torch.testing.assert_close(model(torch.tensor([IDS]))[0][:, known], expected[:, known], rtol=0, atol=1e-4)
    assert model.dtype == torch.float64 and model.mask_token_id == MASK and model.max_length == 64
    assert model.logit_shift == (family == "dream") and model.block_length == (BLOCK if family == "sdar" else None)
    # The comparison would notice wrong angles, and a gate taken for its neighbour.
    wrong = reference(family, tensors(family), IDS, theta=THETA * 1.1)
    assert (wrong - expected)[:, known].abs().max() > 1e-2
    swapped = {n.replace("up_proj", "X"): t for n, t in tensors(family).items()}
    swapped = {n.replace("gate_proj", "up_proj").replace("ff_proj", "up_proj"): t for n, t in swapped.items()}
    swapped = {n.replace("X", NAMES[family]["gate"].split(".")[-1]): t for n, t in swapped.items()}
    assert (reference(family, swapped, IDS) - expected)[:, known].abs().max() > 1e-1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_there_and_back_is_exact(family: str, tmp_path: Path) -> None:
    """Published -> ours -> saved -> published: every bit of every tensor, and every key of config.json."""
    model = load(write(tmp_path / "published", family))
    model.save_pretrained(tmp_path / "ours")
    TOKENIZER.save_pretrained(tmp_path / "ours")
    for source in ("published", "ours"):
        target = tmp_path / f"from_{source}"
        assert main(["export", str(tmp_path / source), str(target), "--layout", family]) == 0
        assert json.loads((target / "config.json").read_text()) == PUBLISHED[family]
        written = load_file(target / "model.safetensors")
        assert written.keys() == tensors(family).keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in tensors(family).items())
        again = load(target)
        with torch.no_grad():
            assert torch.allclose(again(torch.tensor([IDS])), model(torch.tensor([IDS])), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_was_never_published_is_written_and_read_back(family: str, tmp_path: Path) -> None:
    backbone = {"llada": "llama", "dream": "qwen2", "sdar": "qwen3"}[family]
    sizes = {"hidden_size": D, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 48, "head_dim": 8}
    if family == "dream":
        del sizes["head_dim"]
    config = ModelConfig(
        backbone={"model_type": backbone, **sizes, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        attention="block_causal" if family == "sdar" else "full",
        block_length=8 if family == "sdar" else None,
        logit_shift=int(family == "dream"),
    )
    model = load_policy(config, TOKENIZER, seed=3)
    write_published(model, TOKENIZER, tmp_path / "out", family, shard_size=4000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    again = load(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(again(torch.tensor([IDS])), model(torch.tensor([IDS])), rtol=0, atol=1e-6)
    other = next(f for f in FAMILIES if f != family)
    with pytest.raises(ValueError, match=f"--layout {other} needs backbone"):
        write_published(model, TOKENIZER, tmp_path / "other", other)
    with pytest.raises(ValueError, match="--layout 'gpt' does not exist: known: llada, dream, sdar"):
        write_published(model, TOKENIZER, tmp_path / "other", "gpt")


def test_what_a_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    backbone = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "mlp_bias": True}
    config = DiffusionLMConfig(backbone={**backbone, "num_hidden_layers": 1, "num_attention_heads": 1}, mask_token_id=8)
    with pytest.raises(ValueError, match="--layout llada has no place for the backbone's mlp_bias True"):
        write_published(DiffusionLM(config), TOKENIZER, tmp_path, "llada")


class Experts(Family):
    """Qwen3-MoE as published: two or three matrices for each expert, which transformers 5 stacks in memory."""

    model_type, architecture, backbone = "qwen3_moe", "Qwen3MoeForCausalLM", "qwen3_moe"
    keys: ClassVar[Mapping[str, str]] = SIZES | {
        key: key for key in ("head_dim", "moe_intermediate_size", "num_local_experts", "num_experts_per_tok")
    }

    def places(self, name: str, shape: tuple[int, ...]) -> Mapping[str, Part]:
        above, experts, stacked = name.replace("backbone", "model").partition(".experts.")
        if not experts:
            return super().places(name, shape)
        file, half = f"{above}.experts.{{}}.{{}}_proj.weight", shape[1] // 2
        if stacked == "down_proj":
            return {file.format(i, "down"): Part(i) for i in range(shape[0])}
        return {file.format(i, "gate"): Part((i, slice(0, half))) for i in range(shape[0])} | {
            file.format(i, "up"): Part((i, slice(half, None))) for i in range(shape[0])
        }


def test_experts_that_memory_stacks_and_the_file_splits(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV, head_dim=8, max_position_embeddings=64, moe_intermediate_size=12, num_experts=3,
        num_experts_per_tok=2, mask_token_id=MASK, is_causal=False, rms_norm_eps=1e-5,
    )  # fmt: skip
    theirs = Qwen3MoeForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "published")
    TOKENIZER.save_pretrained(tmp_path / "published")
    files = load_file(tmp_path / "published" / "model.safetensors")
    assert "model.layers.1.mlp.experts.2.up_proj.weight" in files  # the file does split them
    address = f"{__name__}:Experts"
    model = load(tmp_path / "published", family=address)
    assert model.backbone.layers[1].mlp.experts.gate_up_proj.shape == (3, 24, D)
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[..., :MASK]
        torch.testing.assert_close(model(torch.tensor([IDS]))[..., :MASK], expected, rtol=0, atol=1e-5)
    assert main(["export", str(tmp_path / "published"), str(tmp_path / "x"), "--layout", "llada"]) == 2
    write_published(model, TOKENIZER, tmp_path / "out", address, shard_size=9000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    written = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    assert written.keys() == files.keys() and all(torch.equal(written[n], t) for n, t in files.items())
    again = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[n], t) for n, t in theirs.state_dict().items())
    # A damaged expert is named as the file names it.
    del files["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(files, tmp_path / "published" / "model.safetensors", metadata={"format": "pt"})
    missing = "1 weights are missing, model.layers.1.mlp.experts.2.up_proj.weight first"
    assert missing in refusal(tmp_path / "published", family=address)


class Odd(Family):
    """Places that a test sets."""

    given: ClassVar[dict[str, Part]] = {}

    def places(self, name: str, shape: tuple[int, ...]) -> Mapping[str, Part]:
        return self.given


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({}, "has no place for w"),
        ({"a": Part(slice(0, 3))}, r"has no place for all of w \[4, 2\]"),
        ({"a": Part(slice(0, 2)), "b": Part(slice(0, 2))}, r"has no place for all of w \[4, 2\]"),
        ({"a": Part(slice(0, 3)), "b": Part(slice(2, 4))}, r"has no place for all of w \[4, 2\]"),
        ({"a": Part(piece=1)}, r"the layout of a has pieces \[1\]"),
    ],
)
def test_places_that_do_not_cover_a_tensor_are_refused(
    places: dict[str, Part], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Odd, "given", places)
    with pytest.raises(ValueError, match=message):
        lay_out({"w": torch.zeros(4, 2)}, Odd())


def test_at_most_one_shard_of_computed_weights_is_alive(tmp_path: Path) -> None:
    """As adapters are merged: each tensor exists from the time it is asked for until its shard is written."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    class Computed(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            nonlocal most
            tensor = super().__getitem__(name) + 1
            alive.add(tensor)
            most = max(most, len(alive))
            return tensor

    weights = Computed({f"w{i}": torch.full((8,), float(i)) for i in range(6)})
    write_weights(weights, lay_out(dict(weights.items()), None), tmp_path, shard_size=64)
    written = {n: t for file in tmp_path.glob("*.safetensors") for n, t in load_file(file).items()}
    assert all(torch.equal(written[f"w{i}"], torch.full((8,), i + 1.0)) for i in range(6)) and len(written) == 6
    assert most <= 2


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    weights = tensors("sdar")
    del weights["lm_head.weight"]
    model = load(write(tmp_path / "tied", "sdar", weights, tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    expected = reference("sdar", weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, IDS)
    with torch.no_grad():
        logits = model(torch.tensor([IDS]))[0]
    torch.testing.assert_close(logits[:, :MASK], expected[:, :MASK], rtol=0, atol=1e-3)
    assert main(["export", str(tmp_path / "tied"), str(tmp_path / "out"), "--layout", "sdar"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weights.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_frequencies_survive_casts(family: str, tmp_path: Path) -> None:
    """What DeepSpeed's bf16 mode does to the learner's copy must not turn its angles away from the sampler's."""
    model = load(write(tmp_path, family))
    width = head_dim(family)
    exact = torch.tensor([THETA ** (-2 * i / width) for i in range(width // 2)])
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: Policy(m).bfloat16().model, lambda m: m.half().double()):
        model = cast(model)
        frequencies = model.backbone.rotary_emb.inv_freq
        assert frequencies.dtype == torch.float32
        torch.testing.assert_close(frequencies, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precise", [True, False])
@torch.no_grad()
def test_llada_rotates_in_float32_where_its_config_says_so(precise: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """Queries and keys in bfloat16 as attention gets them, against pairs turned one by one."""
    model = load(write(tmp_path, "llada", rope_full_precision=precise)).to(torch.bfloat16)
    taken, raw = [], []
    plain = attention.scaled_dot_product_attention

    def watch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rest: Any) -> torch.Tensor:
        taken.append((query, key, value))
        return plain(query, key, value, **rest)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watch)
    layer = model.backbone.layers[0].self_attn
    for projection in (layer.q_proj, layer.k_proj):
        projection.register_forward_hook(lambda module, arguments, output: raw.append(output))
    cache = BlockCache(1, len(IDS))
    cache.aim([0], torch.arange(len(IDS))[None], len(IDS))
    model.hidden_states(torch.tensor([IDS]), position_ids=torch.arange(len(IDS))[None], cache=cache)
    width = head_dim("llada")
    angle = torch.arange(len(IDS))[:, None] * THETA ** (-2 * torch.arange(width // 2) / width)
    for got, flat in zip(taken[0][:2], raw, strict=True):
        assert got.dtype == taken[0][2].dtype == torch.bfloat16
        x = flat.unflatten(-1, (-1, width)).transpose(1, 2)
        for dtype in (torch.float32, torch.bfloat16):
            a, b = x.to(dtype).split(width // 2, dim=-1)
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
            by_hand = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).bfloat16()
            # Angles may differ by an ulp of float32, which now and then rounds to the next bfloat16.
            assert ((got != by_hand).float().mean() < 0.01) == (precise == (dtype == torch.float32))


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load(path, **settings)
    message = str(caught.value)
    assert "\n" not in message and f"model.path {str(path)!r}" in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_do_not_fit_are_named(family: str, tmp_path: Path) -> None:
    weights = tensors(family)
    key = NAMES[family]["layer"].format(1) + NAMES[family]["down"] + ".weight"
    missing = {name: tensor for name, tensor in weights.items() if name != key}
    assert f"1 weights are missing, {key} first" in refusal(write(tmp_path / "a", family, missing))
    assert f"{key} has shape [3, {INNER}] instead of [{D}, {INNER}]" in refusal(
        write(tmp_path / "b", family, weights | {key: weights[key][:3].clone()})
    )
    other = key.replace("1", "7")
    assert f"1 weights belong to no such model, {other} first" in refusal(
        write(tmp_path / "c", family, weights | {other: weights[key].clone()})
    )
    folder = write(tmp_path / "d", family)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "shard model-00002-of-00003.safetensors is missing" in refusal(folder)
    # Old checkpoints carry the rotary buffer.
    old = weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2, dtype=torch.float64)}
    load(write(tmp_path / "e", family, old))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llada", {"block_type": "sequential"}, "config.json says block_type 'sequential', the llada layout is read"),
        ("llada", {"weight_tying": True}, "config.json says weight_tying True"),
        ("llada", {"d_model": "absent"}, "config.json has no 'd_model', which the llada layout needs"),
        ("dream", {"use_sliding_window": True}, "config.json says use_sliding_window True"),
        ("dream", {"mask_token_id": "absent"}, "config.json has no 'mask_token_id'"),
        ("sdar", {"block_size": "absent"}, "config.json has no block_size: set model.block_length"),
        ("sdar", {"model_type": "sdar_two"}, "config.json says model_type 'sdar_two': known are diffusion_lm, llada"),
    ],
)
def test_configs_that_are_read_otherwise_are_refused(
    family: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refusal(write(tmp_path, family, **change))


def test_the_block_size_can_be_chosen(tmp_path: Path) -> None:
    assert load(write(tmp_path, "sdar"), block_length=8).block_length == 8
    assert load(write(tmp_path / "b", "sdar", block_size="absent"), block_length=2).block_length == 2
    with pytest.raises(ValueError, match="block_length is for attention block_causal, and this model's is full"):
        load_policy(ModelConfig(path=str(write(tmp_path / "c", "dream")), block_length=2), TOKENIZER, 0)


def test_a_family_by_a_wrong_name_is_one_line(tmp_path: Path) -> None:
    arguments = runs.tiny_config(tmp_path)
    for key in ("model.family", "rollout.server.layout"):
        with pytest.raises(ValueError, match=f"{key} 'lada' does not exist: did you mean 'llada'?"):
            check_run(load_config(arguments[1], [f"{key}=lada"]))
        with pytest.raises(ValueError, match=f"{key} 'rl.config:Config' is no subclass of rl.models.families"):
            check_run(load_config(arguments[1], [f"{key}=rl.config:Config"]))
    with pytest.raises(ValueError, match=r"model\.family 'sdar' is the layout of a trained model: set model\.path"):
        load_policy(ModelConfig(family="sdar"), TOKENIZER, 0)
    path = write(tmp_path / "llada", "llada")
    assert "config.json says model_type 'llada', which is not the sdar layout" in refusal(path, family="sdar")


def test_a_family_of_an_installed_package_is_found_by_model_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry point needs no option: its family reads the folders of its model_type."""
    package = tmp_path / "site"
    (package / "plug-1.0.dist-info").mkdir(parents=True)
    (package / "plug-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (package / "plug-1.0.dist-info" / "entry_points.txt").write_text("[denoise_rl.families]\nmine = plug_family:Mine\n")
    (package / "plug_family.py").write_text(
        "from rl.models.families.dream import Dream\n\nclass Mine(Dream):\n    model_type = 'mine'\n"
    )
    folder = write(tmp_path / "mine", "dream", model_type="mine")
    assert (
        "known are diffusion_lm, llada, Dream, sdar, llada2_moe, sdar_moe, diffusion_gemma, llama, qwen2,"
        in refusal(folder)
    )
    monkeypatch.syspath_prepend(str(package))
    assert torch.equal(load(folder).lm_head.weight, tensors("dream")["lm_head.weight"])
    assert main(["export", str(folder), str(tmp_path / "out"), "--layout", "mine"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == PUBLISHED["dream"] | {"model_type": "mine"}


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_ids_that_no_token_has_are_never_sampled(tmp_path: Path) -> None:
    """Embeddings are padded beyond the tokenizer. Here the head likes the padding best."""
    weights = tensors("llada")
    head = weights["model.transformer.ff_out.weight"]
    head[len(TOKENIZER) :] = 30 * head[2]
    model = load(write(tmp_path, "llada", weights))
    assert model.excluded_token_ids == [[len(TOKENIZER), VOCAB]]
    requests = [Request([1, 2, 5], seed) for seed in range(20)]
    for temperature in (0.0, 1.0, 5.0):
        options = SamplerOptions(gen_length=8, num_inference_steps=2, temperature=temperature)
        for trajectory in InProcessEngine(model, options).generate(requests):
            assert trajectory.token.max() < len(TOKENIZER) and MASK not in trajectory.token
    bare = load_policy(ModelConfig(path=str(tmp_path)), None, 0)
    drawn = InProcessEngine(bare, SamplerOptions(gen_length=8, num_inference_steps=2)).generate(requests)
    assert max(trajectory.token.max() for trajectory in drawn) >= len(TOKENIZER)


def test_a_tokenizer_without_a_mask_token_is_no_obstacle(tmp_path: Path) -> None:
    """LLaDA's has none; the model knows its id. One that has another is refused."""
    folder = write(tmp_path, "llada")
    silent = char_tokenizer("01234=")
    silent.mask_token = None
    silent.save_pretrained(folder)
    config = ModelConfig(path=str(folder), eos_token="=")
    tokenizer = load_tokenizer(config, SudokuTask())
    assert tokenizer.mask_token_id is None and tokenizer.eos_token_id == TOKENIZER.convert_tokens_to_ids("=")
    assert load_policy(config, tokenizer, 0).mask_token_id == MASK
    with pytest.raises(ValueError, match=rf"model\.tokenizer has mask token id 4 and the model {MASK}"):
        load_policy(config, char_tokenizer("012="), 0)
    with pytest.raises(ValueError, match=r"model\.eos_token '<eot>' is no token of the tokenizer"):
        load_tokenizer(ModelConfig(path=str(folder), eos_token="<eot>"), SudokuTask())


def test_the_published_chat_template_is_applied(shared_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(shared_data / "tokenizers" / "qwen3_sdar", folder)
    config = Config.model_validate(
        {"model": {"tokenizer": str(folder), "eos_token": "<|im_end|>"}, "task": {"chat": True}}
    )
    modality = TextModality.open(config, SudokuTask())
    request = modality.requests([{"prompt": "What is 2 + 3?"}], [[7]])[0]
    text = modality.tokenizer.decode(request.prompt_ids)
    assert text == "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    assert request.prompt_ids[0] == 151644 and modality.tokenizer.eos_token_id == 151645
    plain = TextModality.open(
        config.model_copy(update={"task": config.task.model_copy(update={"chat": False})}), SudokuTask()
    )
    assert plain.tokenizer.decode(plain.requests([{"prompt": "Hi"}], [[7]])[0].prompt_ids) == "Hi"
    # A padded head: SDAR has 151,936 ids, its tokenizer 151,670.
    from rl.models.vocabulary import excluded_ranges

    assert excluded_ranges(modality.tokenizer, 151936, ["<|im_start|>"]) == [[151644, 151645], [151670, 151936]]
    with pytest.raises(ValueError, match=r"needs a tokenizer with a chat template: .* task\.chat=false"):
        TextModality(config, SudokuTask(), TOKENIZER).requests([{"prompt": "1"}], [[0]])


# --- from a name, and through a run -----------------------------------------------------------------------------------


def test_a_hub_name_is_loaded_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, offline, on a cache laid out as a download leaves it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny-llada"
    commit = "0" * 40
    write(repository / "snapshots" / commit, "llada")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = load_policy(ModelConfig(path="someone/tiny-llada"), TOKENIZER, 0)
    assert torch.equal(model.lm_head.weight, tensors("llada")["model.transformer.ff_out.weight"])
    with pytest.raises(ValueError, match=r"model\.path 'someone/else' cannot be loaded") as caught:
        load_policy(ModelConfig(path="someone/else"), TOKENIZER, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_checkpoint_is_trained_and_exported(family: str, tmp_path: Path) -> None:
    """Load, sample, train, export: what comes out loads with the logits of the run's own checkpoint."""
    weights = {name: tensor.float() for name, tensor in tensors(family).items()}
    source = write(tmp_path / "published", family, weights, **({} if family == "llada" else {"torch_dtype": "float32"}))
    out = runs.train_and_export(tmp_path, source, family)
    trained = load_file(out / "model.safetensors")
    assert trained.keys() == weights.keys()
    assert max(float((trained[name] - weights[name]).abs().max()) for name in weights) > 1e-3
    ours, theirs = load(tmp_path / "run" / "checkpoints" / "step_1" / "hf"), load(out)
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([IDS])), ours(torch.tensor([IDS])), rtol=0, atol=1e-6)
