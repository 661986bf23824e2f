"""Mixture-of-experts layouts: tiny random LLaDA-MoE, LLaDA2 and SDAR-MoE folders against a forward written out by hand.

The forward goes token by token and expert by expert; nothing of ours or of transformers takes part in it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from rl.cli import main
from rl.model_section import ModelConfig
from rl.models.diffusion_lm import DiffusionLM
from rl.models.families import family_of
from rl.models.folder import shape_of
from rl.values.model import Policy
from tests import runs
from tests.test_families import IDS, MASK, TOKENIZER, load, refusal

D, HEADS, KV, WIDTH, LAYERS, INNER, DENSE, VOCAB, THETA, BLOCK = 16, 4, 2, 8, 3, 8, 12, 20, 500.0, 4
EXPERTS, CHOSEN, GROUPS, GROUPS_CHOSEN, SCALE = 8, 3, 4, 2, 2.5
FAMILIES = ["llada_moe", "llada2", "sdar_moe"]

# The published config.json of each family, in its own words, with small numbers. The files name no mask token: the
# published id is beyond this vocabulary.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llada_moe": {
        "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "dense_intermediate_size": DENSE, "eos_token_id": 7, "expert_intermediate_size": INNER, "hidden_act": "silu",
        "hidden_size": HEADS * WIDTH, "initializer_range": 0.02, "mask_token_id": MASK, "max_position_embeddings": 64,
        "model_type": "llada", "moe_layer_freq": [1, 0, 1], "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax", "norm_topk_prob": None, "num_attention_heads": HEADS,
        "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV, "pad_token_id": 7, "partial_rotary_factor": 1.0, "qk_layernorm": True,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": THETA, "routed_scaling_factor": 1,
        "router_num_group": None, "router_topk_group": None, "shared_expert_intermediate_size": None,
        "tie_word_embeddings": False, "torch_dtype": "float64", "use_cache": False, "vocab_size": VOCAB,
    },
    "llada2": {
        "architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0, "embedding_dropout": 0.0,
        "first_k_dense_replace": 1, "head_dim": WIDTH, "hidden_act": "silu", "hidden_size": D,
        "initializer_range": 0.02, "intermediate_size": DENSE, "mask_token_id": MASK, "max_position_embeddings": 64,
        "model_type": "llada2_moe", "moe_intermediate_size": INNER, "moe_router_enable_expert_bias": True,
        "n_group": GROUPS, "norm_head": False, "norm_softmax": False, "norm_topk_prob": True,
        "num_attention_heads": HEADS, "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN,
        "num_hidden_layers": LAYERS, "num_key_value_heads": KV, "num_shared_experts": 2, "output_dropout": 0.0,
        "pad_token_id": 7, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": THETA, "rotary_dim": WIDTH // 2, "routed_scaling_factor": SCALE, "router_dtype": "fp32",
        "score_function": "sigmoid", "tie_word_embeddings": False, "topk_group": GROUPS_CHOSEN,
        "torch_dtype": "float64", "use_bias": False, "use_cache": False, "use_qk_norm": True, "use_qkv_bias": True,
        "use_rmsnorm": True, "use_sliding_window": False, "using_split_qkv_in_self_attention": False,
        "vocab_size": VOCAB,
    },
    "sdar_moe": {
        "architectures": ["SDARMoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "block_size": BLOCK,
        "decoder_sparse_step": 1, "eos_token_id": 7, "head_dim": WIDTH, "hidden_act": "silu", "hidden_size": D,
        "intermediate_size": DENSE, "mask_token_id": MASK, "max_position_embeddings": 64, "mlp_only_layers": [1],
        "model_type": "sdar_moe", "moe_intermediate_size": INNER, "norm_topk_prob": True,
        "num_attention_heads": HEADS, "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN,
        "num_hidden_layers": LAYERS, "num_key_value_heads": KV, "output_router_logits": False, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": THETA, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
        "torch_dtype": "float64", "use_sliding_window": False, "vocab_size": VOCAB,
    },
}  # fmt: skip
DENSE_LAYERS = {"llada_moe": [1], "llada2": [0], "sdar_moe": [1]}
BLOCKS = {"llada_moe": None, "llada2": 32, "sdar_moe": BLOCK}


def width_of(family: str) -> int:
    return int(PUBLISHED[family]["hidden_size"])


def tensors(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the published names: experts of unequal size, routers that are far from even, biases."""
    generator = torch.Generator().manual_seed(seed)
    hidden, own = width_of(family), family == "llada2"

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        std = scale * (shape[-1] ** -0.5 if shape[1:] else 0.2)
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * std

    embed = "word_embeddings" if own else "embed_tokens"
    result = {f"model.{embed}.weight": draw(VOCAB, hidden) * 4, "lm_head.weight": draw(VOCAB, hidden) * 3}
    result["model.norm.weight"] = 1 + draw(hidden)
    q, kv = HEADS * WIDTH, KV * WIDTH

    def mlp(at: str, inner: int, scale: float = 1.0) -> None:
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            result[f"{at}.{name}_proj.weight"] = draw(*shape, scale=scale)

    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            result[f"{at}{name}.weight"] = 1 + draw(hidden)
        if own:
            result[f"{at}attention.query_key_value.weight"] = draw(q + 2 * kv, hidden)
            result[f"{at}attention.query_key_value.bias"] = draw(q + 2 * kv)
            result[f"{at}attention.dense.weight"] = draw(hidden, q)
            result |= {f"{at}attention.{name}_layernorm.weight": 1 + draw(WIDTH) for name in ("query", "key")}
        else:
            shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
            result |= {f"{at}self_attn.{name}_proj.weight": draw(*shape) for name, shape in shapes.items()}
            if family == "sdar_moe":
                result |= {f"{at}self_attn.{name}_proj.bias": draw(shape[0]) for name, shape in shapes.items()}
            result |= {f"{at}self_attn.{name}_norm.weight": 1 + draw(WIDTH) for name in "qk"}
        if layer in DENSE_LAYERS[family]:
            mlp(f"{at}mlp", DENSE)
            continue
        result[f"{at}mlp.gate.weight"] = draw(EXPERTS, hidden, scale=2.0)
        if own:
            # float32 in the file whatever the others are; some so low that score plus bias is negative.
            result[f"{at}mlp.gate.expert_bias"] = 0.3 * torch.randn(EXPERTS, generator=generator) - 0.5
            mlp(f"{at}mlp.shared_experts", 2 * INNER)
        for expert in range(EXPERTS):
            mlp(f"{at}mlp.experts.{expert}", INNER, scale=1 + expert / 3)
    return result


def route(family: str, logits: list[float], bias: list[float]) -> dict[int, float]:
    """The experts of one token and their weights, from the router's logits; plain Python."""
    if family != "llada2":
        total = sum(math.exp(z) for z in logits)
        best = sorted(range(EXPERTS), key=lambda e: -logits[e])[:CHOSEN]
        weights = {e: math.exp(logits[e]) / total for e in best}
        return weights if family == "llada_moe" else {e: w / sum(weights.values()) for e, w in weights.items()}
    score = [1 / (1 + math.exp(-z)) for z in logits]
    biased = [s + b for s, b in zip(score, bias, strict=True)]
    size = EXPERTS // GROUPS
    groups = [list(range(g * size, (g + 1) * size)) for g in range(GROUPS)]
    good = sorted(groups, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))[:GROUPS_CHOSEN]
    best = sorted((e for group in good for e in group), key=lambda e: -biased[e])[:CHOSEN]
    return {e: SCALE * score[e] / sum(score[e] for e in best) for e in best}


def reference(
    family: str, weights: dict[str, torch.Tensor], ids: list[int], block: int | None
) -> tuple[torch.Tensor, list[dict[int, float]]]:
    """[L, V] logits of one sequence, and the routes of its tokens layer by layer."""
    own = family == "llada2"
    turned = WIDTH // 2 if own else WIDTH

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))

    def mlp(x: torch.Tensor, at: str) -> torch.Tensor:
        return linear(silu(linear(x, f"{at}.gate_proj")) * linear(x, f"{at}.up_proj"), f"{at}.down_proj")

    def rotate(x: torch.Tensor) -> torch.Tensor:
        """[L, width]: pair (i, i + turned/2) of position p turns by p * theta^(-2i/turned); the rest stays."""
        out, half = x.clone(), turned // 2
        for p in range(len(x)):
            for i in range(half):
                angle = p * THETA ** (-2 * i / turned)
                a, b = x[p, i], x[p, i + half]
                out[p, i] = a * math.cos(angle) - b * math.sin(angle)
                out[p, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = weights["model.word_embeddings.weight" if own else "model.embed_tokens.weight"][ids]
    position = torch.arange(len(ids))
    blind = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    if block is not None:
        blind = position[None, :] // block > position[:, None] // block
    routes = []
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm")
        if own:
            sizes = [HEADS * WIDTH, KV * WIDTH, KV * WIDTH]
            q, k, v = (part.split(WIDTH, -1) for part in linear(h, at + "attention.query_key_value").split(sizes, -1))
            names = (at + "attention.query_layernorm", at + "attention.key_layernorm", at + "attention.dense")
        else:
            q, k, v = (linear(h, f"{at}self_attn.{name}_proj").split(WIDTH, -1) for name in "qkv")
            names = (at + "self_attn.q_norm", at + "self_attn.k_norm", at + "self_attn.o_proj")
        mixed = []
        for head in range(HEADS):
            group = head // (HEADS // KV)
            score = rotate(norm(q[head], names[0])) @ rotate(norm(k[group], names[1])).T / WIDTH**0.5
            mixed.append(score.masked_fill(blind, -torch.inf).softmax(-1) @ v[group])
        x = x + linear(torch.cat(mixed, -1), names[2])
        h = norm(x, at + "post_attention_layernorm")
        if layer in DENSE_LAYERS[family]:
            x = x + mlp(h, at + "mlp")
            continue
        logits = (h @ weights[at + "mlp.gate.weight"].T).tolist()
        bias = weights.get(at + "mlp.gate.expert_bias", torch.zeros(EXPERTS)).tolist()
        out = []
        for token, state in enumerate(h):
            chosen = route(family, logits[token], bias)
            routes.append(chosen)
            out.append(sum(weight * mlp(state, f"{at}mlp.experts.{e}") for e, weight in chosen.items()))
        x = x + torch.stack(out) + (mlp(h, at + "mlp.shared_experts") if own else 0.0)
    return linear(norm(x, "model.norm"), "lm_head"), routes


def write(path: Path, family: str, weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in {**PUBLISHED[family], **changes}.items() if v != "absent"}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors(family) if weights is None else weights, path / "model.safetensors", metadata={"format": "pt"})
    TOKENIZER.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_published_checkpoint_predicts_what_it_should(family: str, tmp_path: Path) -> None:
    weights = tensors(family)
    model = load(write(tmp_path, family), **({"block_length": BLOCK} if family == "llada2" else {}))
    expected, routes = reference(family, weights, IDS, None if family == "llada_moe" else BLOCK)
    known = range(MASK)
    torch.testing.assert_close(model(torch.tensor([IDS]))[0][:, known], expected[:, known], rtol=0, atol=2e-4)
    assert model.dtype == torch.float64 and model.mask_token_id == MASK and model.logit_shift == 0
    # Tokens choose different experts, none has all of them, and the predictions are peaked.
    used = {e for chosen in routes for e in chosen}
    assert len(used) >= EXPERTS - 2 and len({tuple(sorted(chosen)) for chosen in routes}) > 8
    assert expected[:, known].softmax(-1).max(-1).values.mean() > 0.6
    # The comparison would notice two experts that change places, and a gate taken for its neighbour.
    for a, b in (("experts.2.", "experts.5."), ("gate_proj", "up_proj")):
        swapped = {n.replace(a, "X").replace(b, a).replace("X", b): t for n, t in weights.items()}
        assert (reference(family, swapped, IDS, None)[0] - reference(family, weights, IDS, None)[0]).abs().max() > 0.1


@torch.no_grad()
def test_the_bias_of_experts_chooses_and_does_not_weigh(tmp_path: Path) -> None:
    """Scores 0.5 for all: the bias alone chooses, by groups first, and every chosen expert weighs the same."""
    chosen = route("llada2", [0.0] * EXPERTS, [0.9, -0.9, 0.5, 0.4, 0.3, 0.5, -1.0, 2.0])
    # Best two of the groups: 0, 0.9, 0.8, 1.0 (plus 1): groups 3 and 1; in these 7, 2 and 3, though 0 beats them.
    assert chosen == {7: SCALE / 3, 2: SCALE / 3, 3: SCALE / 3}
    model = load(write(tmp_path, "llada2"))
    router = model.backbone.layers[1].mlp.gate
    router.weight.zero_()
    router.e_score_correction_bias.copy_(torch.tensor([0.9, -0.9, 0.5, 0.4, 0.3, 0.5, -1.0, 2.0]))
    _, weight, index = router(torch.randn(5, D, dtype=torch.float64))
    assert [set(row) for row in index.tolist()] == [{7, 2, 3}] * 5
    torch.testing.assert_close(weight, torch.full((5, 3), SCALE / 3))


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
            assert torch.equal(again(torch.tensor([IDS])), model(torch.tensor([IDS])))


def test_what_the_published_files_leave_out(tmp_path: Path) -> None:
    """Mask token and block size of LLaDA2 stand in no file; LLaDA-MoE has LLaDA's model_type."""
    described = {k: v for k, v in PUBLISHED["llada2"].items() if k != "mask_token_id"} | {"vocab_size": 157184}
    assert shape_of(described, ModelConfig(), None) == (64, 156895, 32)
    assert shape_of(described, ModelConfig(block_length=16), None) == (64, 156895, 16)
    assert load(write(tmp_path, "llada2")).block_length == 32
    found = {name: family_of(config) for name, config in PUBLISHED.items()}
    assert [f.name for f in found.values() if f] == ["lladamoe", "llada2", "sdarmoe"]
    without = {k: v for k, v in PUBLISHED["llada_moe"].items() if k != "num_experts"}
    family = family_of(without)
    assert family is not None and family.name == "llada"


def test_a_bfloat16_checkpoint_keeps_the_bias_of_its_experts(tmp_path: Path) -> None:
    """It stands in float32 beside weights in bfloat16, which decide the model's dtype; no cast rounds it."""
    weights = {n: t if n.endswith("expert_bias") else t.bfloat16() for n, t in tensors("llada2").items()}
    model: Any = load(write(tmp_path, "llada2", weights))
    assert model.dtype == torch.bfloat16
    for cast in (lambda m: m, lambda m: Policy(m).bfloat16().model, lambda m: m.to(torch.float16)):
        model = cast(model)
        bias = model.backbone.layers[2].mlp.gate.e_score_correction_bias
        assert torch.equal(bias, weights["model.layers.2.mlp.gate.expert_bias"])


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_routers_that_do_not_fit_are_named(family: str, tmp_path: Path) -> None:
    weights = tensors(family)
    fewer = {n: t for n, t in weights.items() if ".experts.7." not in n}
    message = refusal(write(tmp_path / "a", family, fewer))
    assert "6 weights are missing, model.layers." in message and ".mlp.experts.7.gate_proj.weight first" in message
    more = weights | {n.replace(".experts.7.", ".experts.8."): t.clone() for n, t in weights.items()}
    message = refusal(write(tmp_path / "b", family, more))
    assert "belong to no such model, model.layers." in message and ".mlp.experts.8." in message
    key = "model.layers.2.mlp.gate.weight"
    message = refusal(write(tmp_path / "c", family, weights | {key: weights[key][:6].clone()}))
    assert f"{key} has shape [6, {width_of(family)}] instead of [8, {width_of(family)}]" in message
    message = refusal(write(tmp_path / "d", family, num_experts_per_tok=9))
    assert "config.json says num_experts_per_tok 9 and num_experts 8" in message


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llada2", {"n_group": 3}, "config.json says n_group 3 and num_experts 8: groups are of equal size"),
        ("llada2", {"topk_group": 1}, "config.json says topk_group 1, n_group 4 and num_experts_per_tok 3"),
        ("llada2", {"num_shared_experts": 0}, "config.json says num_shared_experts 0"),
        ("llada2", {"score_function": "softmax"}, "config.json says score_function 'softmax', the llada2 layout is"),
        ("llada2", {"partial_rotary_factor": "absent"}, "config.json has no 'partial_rotary_factor'"),
        ("llada_moe", {"norm_topk_prob": True}, "config.json says norm_topk_prob True, the lladamoe layout is"),
        ("llada_moe", {"moe_layer_freq": [1, 1]}, "config.json says moe_layer_freq of 2 layers, num_hidden_layers is"),
        ("llada_moe", {"shared_expert_intermediate_size": 8}, "config.json says shared_expert_intermediate_size 8"),
        ("sdar_moe", {"block_size": "absent"}, "config.json has no block_size: set model.block_length"),
        ("sdar_moe", {"num_experts": "absent"}, "config.json has no 'num_experts'"),
    ],
)
def test_configs_that_are_read_otherwise_are_refused(
    family: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refusal(write(tmp_path, family, **change))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_checkpoint_is_trained_and_exported(family: str, tmp_path: Path) -> None:
    """Load, sample, train, export: what comes out loads with the logits of the run's own checkpoint."""
    weights = {name: tensor.float() for name, tensor in tensors(family).items()}
    source = write(tmp_path / "published", family, weights, torch_dtype="float32")
    blocks = ["model.block_length=8"] if family == "llada2" else []
    out = runs.train_and_export(tmp_path, source, family, *blocks, "eval.viewer_items=0")
    trained = load_file(out / "model.safetensors")
    assert trained.keys() == weights.keys()
    # Experts and routers are trained; the bias is no parameter.
    for part in (".experts.", ".gate.weight", "embed"):
        assert max(float((trained[n] - weights[n]).abs().max()) for n in weights if part in n) > 1e-3
    assert all(torch.equal(trained[n], weights[n]) for n in weights if n.endswith("expert_bias"))
    ours: DiffusionLM = load(tmp_path / "run" / "checkpoints" / "step_1" / "hf")
    with torch.no_grad():
        torch.testing.assert_close(load(out)(torch.tensor([IDS])), ours(torch.tensor([IDS])), rtol=0, atol=1e-6)
