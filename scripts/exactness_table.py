"""Which recipe scores which decoder exactly, found by trying: the table of docs/decoders.md.

    python scripts/exactness_table.py            # writes it

Every decoder samples with a tiny model, and the estimator of every recipe for text scores what was recorded.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards.causal_lm import CausalReader
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rl.registry import RECIPES, parse_recipe
from rollouts.constraints.automaton import edges_of, from_edges
from rollouts.engines.in_process import Request
from rollouts.engines.tokens import token_engine
from rollouts.samplers.options import SamplerOptions

PAGE, MARK = Path(__file__).resolve().parent.parent / "docs" / "decoders.md", "<!-- exactness -->"
VOCAB = 9
# Name in the table -> options of the sampler, arguments of the engine, and whether the model is block-causal.
DECODERS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "`llada_random`": ({"preset": "llada_random"}, {}, False),
    "`llada`, order as given": ({"preset": "llada"}, {}, False),
    "`dcd`": ({"preset": "dcd", "window": 3}, {}, False),
    "`ccd`": ({"preset": "ccd"}, {}, False),
    "`sdar_static`, blocks": ({"preset": "sdar_static", "block_length": 4}, {}, True),
    "`verify` (S2D2), blocks": ({"verify": True, "block_length": 4}, {}, True),
    "`constraint`": ({"constraint": {"regex": "."}}, {}, False),
    "`guide`, agree": ({"guide": {"model": "random", "top": 4, "relative": 0.1}}, {}, False),
    "`choose`, lengths": ({"choose": {"block_length": [1, 4]}}, {}, False),
    "`choose`, lengths, blocks": ({"choose": {"block_length": [1, 4]}}, {}, True),
    "`cfg_scale`": ({"cfg_scale": 0.5}, {}, False),
    "`record_x0`": ({"preset": "llada_random", "record_x0": True}, {}, False),
    "`rcr`, remasking": ({"preset": "rcr"}, {}, False),
    "`arpc`, blocks": ({"reviser": "arpc", "block_length": 4}, {}, True),
    "`llada2_1_quality`, editing": ({"preset": "llada2_1_quality", "threshold": 0.3, "edit_threshold": 0.1}, {}, False),
    "`rollout.cache: dual`": ({"block_length": 4}, {"approximate_cache": "dual"}, False),
    "`rollout.cache: frozen`": ({"block_length": 4}, {"approximate_cache": "frozen"}, False),
}


def tiny(block: bool) -> DiffusionLM:
    """A float64 model of random weights; the last id is the mask."""
    torch.manual_seed(0)
    backbone = {"model_type": "gpt2", "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCAB}
    config = DiffusionLMConfig(
        backbone={**backbone, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.5},
        mask_token_id=VOCAB - 1, attention="block_causal" if block else "full", block_length=4 if block else None,
        choices=2,
    )  # fmt: skip
    return DiffusionLM(config).double().eval()


def sampled(model: Any, options: dict[str, Any], settings: dict[str, Any]) -> Any:
    sampler = SamplerOptions(**{"gen_length": 8, "num_inference_steps": 4, **options})
    if sampler.constraint is not None:
        # Any token but the one before it.
        follows = {a: {b: b for b in range(VOCAB - 1) if a != b} for a in range(VOCAB)}
        settings = {
            "constraint": from_edges(
                edges_of(follows), VOCAB - 1, range(VOCAB - 1), VOCAB, None, torch.zeros(0).numpy()
            )
        }
    if sampler.guide is not None:
        torch.manual_seed(1)
        causal = GPT2Config(
            n_positions=32, n_embd=16, n_layer=1, n_head=2, vocab_size=VOCAB, bos_token_id=None, eos_token_id=None
        )
        settings = {"guide": CausalReader(GPT2LMHeadModel(causal).eval())}
    requests = [Request([1 + n, 2], seed) for n in range(2) for seed in range(2)]
    return token_engine(model, sampler, **settings).generate(requests)


def cell(name: str, trajectories: Any, model: Any) -> str:
    """exact: every recorded log-prob is given back to 1e-9; off: not; own: states are scored that no sampler saw."""
    recipe = parse_recipe({"name": name})
    if trajectories[0].choices is not None and not recipe.trains_choices:
        # What `check` says of it.
        return "refused"
    try:
        rows = recipe.rows(trajectories, model)
        if recipe.anchor != "none":
            rows.set_anchor(model)
    except ValueError:
        return "refused"
    if rows.sampler_logprob is None:
        return "own"
    with torch.no_grad():
        gap = float((rows.score(model).logprob - rows.sampler_logprob).abs().max())
    return "exact" if gap < 1e-9 else "off"


def table() -> str:
    """The table in Markdown: a row for every decoder, a column for recipes that answer alike."""
    models = {block: tiny(block) for block in (False, True)}
    # Recipes of reward gradients score no recorded decision, and `opd` needs a teacher of its own.
    text = {name: parse_recipe({"name": name}) for name in RECIPES.known if RECIPES.resolve(name).modality == "text"}
    names = [n for n, r in text.items() if not r.reward_gradient and n != "opd" and "absorbing" in r.noises]
    cells: dict[str, list[str]] = {name: [] for name in names}
    for options, settings, block in DECODERS.values():
        trajectories = sampled(models[block], options, settings)
        for name in names:
            cells[name].append(cell(name, trajectories, models[block]))
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, column in cells.items():
        alike.setdefault(tuple(column), []).append(name)
    heads = [", ".join(f"`{name}`" for name in own) for own in alike.values()]
    lines = [f"| decoder | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for index, decoder in enumerate(DECODERS):
        lines.append(f"| {decoder} | {' | '.join(column[index] for column in alike)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    before, _, after = PAGE.read_text().split(MARK)
    PAGE.write_text(f"{before}{MARK}\n{table()}\n{MARK}{after}")
