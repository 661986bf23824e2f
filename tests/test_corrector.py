"""ARPC: the block is filled, read from left to right, and what that finds least likely is masked again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rl.estimators.trace_rows import packed_rows
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers import noise
from rollouts.samplers.distribution import draw, sampling_logprobs
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.parts import step_quota
from rollouts.visibility import block_causal_visibility

MASK, BLOCK = 11, 4
OPTIONS: dict[str, Any] = {"gen_length": 8, "num_inference_steps": 8, "reviser": "arpc", "quota": "linear"}


def logits_at(model: Any, ids: list[int], position: int, block: int) -> torch.Tensor:
    """One position of one text, in blocks of any length; nothing is cached or shared."""
    tokens = torch.tensor([ids])
    index = torch.arange(len(ids))[None]
    clean = index[:, :1] + position // block * block if getattr(model, "context_causal", False) else None
    visible = block_causal_visibility(index, len(ids), block, clean)
    hidden = model.hidden_states(tokens, visible=visible, position_ids=index)
    return model.token_logits(hidden[:, position - model.logit_shift])[0]


def by_hand(model: Any, prompt: list[int], seed: int) -> tuple[list[int], list[list[tuple[int, int]]], int]:
    """The answer, per step its edits (position, token), sorted, and how many tokens were taken back."""
    end = -(-(len(prompt) + 8) // BLOCK) * BLOCK
    canvas, steps, step, back = [*prompt, *[MASK] * (end - len(prompt))], [], 0, 0
    for start in range(len(prompt) // BLOCK * BLOCK, end, BLOCK):
        block = [p for p in range(start, start + BLOCK) if p >= len(prompt)]
        for number in range(4):
            masks = [p for p in block if canvas[p] == MASK]
            if not masks:
                break
            size = torch.tensor([len(block)])
            left = torch.tensor([len(masks)])
            quota = int(step_quota("linear", size, left, torch.tensor([4]), torch.tensor([number]), size))
            filled = list(canvas)
            for p in masks:
                law = sampling_logprobs(logits_at(model, canvas[: start + BLOCK], p, BLOCK)[None], 1.0, 1.0, 0)
                where = (torch.tensor([seed]), torch.tensor([step]), torch.tensor([p]))
                filled[p] = int(draw(law, noise.uniform(*where, noise.TOKEN_STREAM)))
            likely = {}
            for p in block:
                # In blocks of one token a position sees the tokens before it, and a mask where it stands itself.
                ids = filled[:p] + ([] if model.logit_shift else [MASK])
                read = logits_at(model, ids, p, 1).log_softmax(-1)
                likely[p] = float(read[filled[p]])
            kept = sorted(block, key=lambda p: -likely[p])[: len(block) - len(masks) + quota]
            edits = []
            for p in block:
                new = filled[p] if p in kept else MASK
                if new != canvas[p]:
                    edits.append((p, new))
                    back += new == MASK
                canvas[p] = new
            steps.append(sorted(edits))
            step += 1
    return canvas, steps, back


@pytest.mark.parametrize("family", ["qwen3-block4", "gpt2-block4", "qwen3-block4-shifted-causal"])
def test_the_corrector_is_a_loop_over_single_positions(make_model: Any, family: str) -> None:
    model, prompts = make_model(family), [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 1]]
    with torch.no_grad():
        wanted = [by_hand(model, prompt, seed) for seed, prompt in enumerate(prompts)]
    assert sum(back for *_, back in wanted) > 1, "tokens must be taken back"
    engine = InProcessEngine(model, SamplerOptions(**OPTIONS))
    found = engine.generate([Request(prompt, seed) for seed, prompt in enumerate(prompts)])
    for trajectory, (canvas, steps, _) in zip(found, wanted, strict=True):
        assert trajectory.final_canvas().tolist() == canvas
        edits: list[list[tuple[int, int]]] = [[] for _ in steps]
        for step, position, token in zip(trajectory.step, trajectory.position, trajectory.token, strict=True):
            edits[step].append((int(position), int(token)))
        assert [sorted(own) for own in edits] == steps
        # Two forwards a step, and no others but those of prompts.
        assert trajectory.decoder["forwards"] == 2 * trajectory.num_steps == 2 * len(steps)
    scored = packed_rows(found, logit_shift=model.logit_shift, context_causal=model.context_causal).score(model)
    logprobs = np.concatenate([t.logprob[t.is_reveal] for t in found])
    np.testing.assert_allclose(scored.logprob.detach().numpy(), logprobs, rtol=0, atol=1e-9)


def test_where_it_does_not_go() -> None:
    with pytest.raises(ValueError, match=r"sampler\.reviser arpc keeps the quota's most confident"):
        SamplerOptions(reviser="arpc", selector="threshold")


def test_a_model_without_blocks_is_refused(make_model: Any) -> None:
    with pytest.raises(ValueError, match=r"sampler\.reviser arpc reads a block-causal model"):
        InProcessEngine(make_model("gpt2-full"), SamplerOptions(**OPTIONS))
