"""Rewards of molecules as graphs, judged by RDKit (`pip install 'denoise-rl[molecules]'`).

A completion is {"nodes": ["C", "O"], "edges": [[0, 1, "double"]]}: heavy atoms, and bonds between them. Hydrogen
fills up the valences. RDKit refuses a molecule by its own rules of valence; one of several pieces is refused too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Graph = Mapping[str, Any]


class RdkitValid:
    """1 where RDKit takes the graph for one molecule, else 0."""

    def __init__(self) -> None:
        try:
            from rdkit import Chem, rdBase
        except ImportError:
            raise ValueError(f"reward '{self.name}' needs RDKit: pip install 'denoise-rl[molecules]'") from None
        self.chem, self.base = Chem, rdBase
        self.__name__ = self.name

    name = "rdkit_valid"

    def molecule(self, graph: Graph) -> Any:
        """RDKit's molecule, None where it refuses the graph."""
        built = self.chem.RWMol()
        for atom in graph["nodes"]:
            built.AddAtom(self.chem.Atom(atom))
        for first, second, bond in graph["edges"]:
            built.AddBond(first, second, getattr(self.chem.BondType, bond.upper()))
        with self.base.BlockLogs():
            refused = self.chem.SanitizeMol(built, catchErrors=True)
        return None if refused or len(self.chem.GetMolFrags(built)) > 1 else built

    def value(self, molecule: Any) -> float:
        return 1.0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Graph], **columns: Any) -> list[float]:
        found = [self.molecule(graph) for graph in completions]
        return [0.0 if molecule is None else self.value(molecule) for molecule in found]


class Qed(RdkitValid):
    """Drug-likeness in (0, 1), the weighted QED of Bickerton et al. 2012 (doi 10.1038/nchem.1243) as RDKit computes it.

    A graph that is no molecule has 0.
    """

    name = "qed"

    def value(self, molecule: Any) -> float:
        from rdkit.Chem import QED

        return float(QED.qed(molecule))
