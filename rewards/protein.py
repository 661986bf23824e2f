"""Differentiable terms of protein sequences: net charge, hydropathy, residue content. Each adds up over residues.

With a `target` the reward is -((value - target) / tolerance)^2, highest at the target; without one it is the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewards.soft import SoftReward

if TYPE_CHECKING:
    import torch

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
# At pH 7.4 by Henderson and Hasselbalch, side-chain pKa 10.5 (K), 12.5 (R), 6.0 (H), 3.65 (D), 4.25 (E).
_CHARGE = {"K": 0.999, "R": 1.0, "H": 0.038, "D": -1.0, "E": -0.999}
# Kyte and Doolittle 1982, J. Mol. Biol. 157:105.
_HYDROPATHY = {
    "A": 1.8, "C": 2.5, "D": -3.5, "E": -3.5, "F": 2.8, "G": -0.4, "H": -3.2, "I": 4.5, "K": -3.9, "L": 3.8,
    "M": 1.9, "N": -3.5, "P": -1.6, "Q": -3.5, "R": -4.5, "S": -0.8, "T": -0.7, "V": 4.2, "W": -0.9, "Y": -1.3,
}  # fmt: skip


class _ResidueSum(SoftReward):
    """A number per residue, summed or averaged over the completion."""

    alphabet = AMINO_ACIDS

    def __init__(self, table: dict[str, float], mean: bool, target: float | None, tolerance: float, name: str) -> None:
        import torch

        if tolerance <= 0:
            raise ValueError(f"reward '{name}': tolerance must be positive, got {tolerance}")
        self.table = torch.tensor([table.get(letter, 0.0) for letter in AMINO_ACIDS])
        self.mean, self.target, self.tolerance = mean, target, tolerance
        self.__name__ = name

    def soft(self, prompts: Sequence[str], completions: torch.Tensor, **columns: Any) -> torch.Tensor:
        per_residue = completions @ self.table.to(completions)
        value = per_residue.mean(1) if self.mean else per_residue.sum(1)
        return value if self.target is None else -(((value - self.target) / self.tolerance) ** 2)


class NetCharge(_ResidueSum):
    """Net charge of the completion's side chains at pH 7.4, in elementary charges.

    Args:
        target: wanted charge; null rewards the charge itself.
        tolerance: distance from the target that costs 1.
    """

    def __init__(self, target: float | None = None, tolerance: float = 1.0) -> None:
        super().__init__(_CHARGE, False, target, tolerance, "net_charge")


class Hydropathy(_ResidueSum):
    """Mean Kyte-Doolittle hydropathy of the completion.

    Args:
        target: wanted mean; null rewards the mean itself.
        tolerance: distance from the target that costs 1.
    """

    def __init__(self, target: float | None = None, tolerance: float = 1.0) -> None:
        super().__init__(_HYDROPATHY, True, target, tolerance, "hydropathy")


class ResidueContent(_ResidueSum):
    """Share of the completion made of certain residues.

    Args:
        residues: one-letter codes, such as "KRH".
        target: wanted share; null rewards the share itself.
        tolerance: distance from the target that costs 1.

    Raises:
        ValueError: a letter that is no amino acid.
    """

    def __init__(self, residues: str, target: float | None = None, tolerance: float = 1.0) -> None:
        foreign = sorted(set(residues) - set(AMINO_ACIDS))
        if foreign or not residues:
            raise ValueError(f"reward 'residue_content': residues {residues!r} must be letters of {AMINO_ACIDS}")
        super().__init__(dict.fromkeys(residues, 1.0), True, target, tolerance, "residue_content")
