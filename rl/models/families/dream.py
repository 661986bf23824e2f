"""Dream 7B and DiffuCoder (Ye et al. 2025, arXiv 2508.15487): Qwen2, full attention, logits shifted by one position."""

from __future__ import annotations

from rl.models.families.family import Family


class Dream(Family):
    model_type = "Dream"
    architecture = "DreamModel"
    backbone = "qwen2"
    logit_shift = 1
