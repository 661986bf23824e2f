"""Score equal rows once: rollouts of one prompt share their first canvas, and often several more."""

from __future__ import annotations

from dataclasses import replace

import torch

from rl.estimators.rows import ScoringRows
from rollouts.engines.shared import first_of_equal_rows


def merge_equal_rows(rows: ScoringRows) -> ScoringRows:
    """The same decisions on the distinct rows only. Log-probs and gradients stay what they were."""
    layout = ["input_ids", "position_ids", "document", "segment", "block"]
    if rows.unprompted is not None:
        layout.append("unprompted")
    key = torch.cat([getattr(rows, name) for name in layout], dim=1)
    first, inverse = first_of_equal_rows(key)
    if len(first) == len(key):
        return rows
    kept = {name: getattr(rows, name)[first] for name in layout}
    return replace(rows, row=inverse[rows.row], **kept)
