"""Published decoders as choices of parts. Length, steps, blocks and temperature are the user's own.

Explicit options win over a preset's. docs/decoders.md says where each comes from and what of it is exact in training.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # LLaDA (Nie et al. 2025, arXiv 2502.09992): untempered confidence of the draw, even quotas.
    # Semi-autoregressive with sampler.block_length, classifier-free guidance with sampler.cfg_scale.
    "llada": {},
    "llada_random": {"score": "random"},
    # Dream (Ye et al. 2025, arXiv 2508.15487): its own quotas, scores of the tempered and filtered distribution.
    # Its alg_temp is sampler.order_temperature.
    "dream_origin": {"selector": "bernoulli"},
    "dream_maskgit_plus": {"quota": "dream", "score_from": "sampling"},
    "dream_topk_margin": {"quota": "dream", "score": "margin", "score_from": "sampling"},
    "dream_entropy": {"quota": "dream", "score": "neg_entropy", "score_from": "sampling"},
    # SDAR (Cheng et al. 2025, arXiv 2510.06303). The entropy bound has no published default.
    "sdar_sequential": {"quota": "block", "selector": "left_most"},
    "sdar_static": {"quota": "block", "score_from": "sampling"},
    "sdar_dynamic": {"quota": "block", "score_from": "sampling", "selector": "dynamic", "threshold": 0.9},
    "sdar_entropy": {"score": "neg_entropy", "score_from": "sampling", "selector": "entropy_sum"},
    # EB-Sampler (Ben-Hamu et al. 2025, arXiv 2505.24857).
    "entropy_bound": {"score": "neg_entropy", "selector": "entropy_bound", "entropy_bound": 0.1},
    # Fast-dLLM (Wu et al. 2025, arXiv 2505.22618).
    "fast_dllm_threshold": {"selector": "threshold", "threshold": 0.9},
    "fast_dllm_factor": {"selector": "factor", "factor": 1.0},
    # DCD (Shu et al. 2026, arXiv 2601.02076): a window over the masks that are left in place of blocks.
    "dcd": {"score_from": "sampling", "selector": "threshold", "threshold": 0.9, "window": 32},
    # CCD with its adaptive number of tokens, CCD-DS (Chen et al. 2025, arXiv 2512.02044, and the published code).
    "ccd": {"score": "neg_entropy", "score_from": "sampling", "selector": "consistent", "memory": 4},
    # LLaDA2.0 (block 32), and LLaDA2.1's quality and speed modes of joint threshold decoding (arXiv 2602.08676).
    "llada2": {"quota": "block", "score_from": "sampling", "selector": "dynamic", "threshold": 0.95},
    "llada2_1_quality": {
        "score_from": "sampling", "selector": "threshold", "threshold": 0.7,
        "reviser": "edit", "edit_threshold": 0.5, "max_post_steps": 16,
    },
    "llada2_1_speed": {
        "score_from": "sampling", "selector": "threshold", "threshold": 0.5,
        "reviser": "edit", "edit_threshold": 0.0, "max_post_steps": 16,
    },
    # MDPO (He et al. 2025, arXiv 2508.13148): its rollouts, and running-confidence remasking of the paper and its code.
    "mdpo": {"quota": "linear", "score_from": "sampling"},
    "rcr": {"quota": "linear", "reviser": "rcr", "running_confidence": "max", "revise_scope": "all_previous"},
    "rcr_last": {
        "quota": "linear", "score_from": "sampling", "reviser": "rcr", "running_confidence": "last",
        "revise_scope": "all_previous",
    },
    # ReMDM with a capped remasking probability (Wang et al. 2025, arXiv 2503.00307).
    "remdm": {"selector": "bernoulli", "reviser": "remdm"},
    # Ascending step sizes and the end-token ramp of CJ-GRPO (arXiv 2509.23924).
    "ass": {"quota": "doubling"},
    "eoser": {"eos_confidence": 0.4},
    "eoser_ass": {"quota": "doubling", "eos_confidence": 0.01},
}  # fmt: skip
