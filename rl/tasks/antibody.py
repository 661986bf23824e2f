"""Antibody heavy chains: given framework and CDRs up to the third, write CDR-H3 and the last framework.

Prompts are human germline V genes (IMGT), which end where the third CDR begins. The response has a fixed length.
"""

from __future__ import annotations

from rl.tasks.base import Example

# IMGT/GENE-DB, translated up to the conserved cysteine and the two residues behind it.
GERMLINES = {
    "IGHV1-69": "QVQLVQSGAEVKKPGSSVKVSCKASGGTFSSYAISWVRQAPGQGLEWMGGIIPIFGTANYAQKFQGRVTITADESTSTAYMELSSLRSEDTAVYYCAR",
    "IGHV3-23": "EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK",
    "IGHV3-30": "QVQLVESGGGVVQPGRSLRLSCAASGFTFSSYAMHWVRQAPGKGLEWVAVISYDGSNKYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAR",
    "IGHV4-34": "QVQLQQWGAGLLKPSETLSLTCAVYGGSFSGYYWSWIRQPPGKGLEWIGEINHSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCAR",
}


class AntibodyTask:
    """The germlines in turn; every row says which it is."""

    reward = "net_charge"
    grid = None
    alphabet = None

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        return self._rows(seed + step, count)

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        """The same prompts: what is held out is the randomness of the samples."""
        return self._rows(0, count)

    def file_examples(self, path: str) -> list[Example]:
        raise ValueError("task antibody has its prompts built in and reads no file")

    def _rows(self, first: int, count: int) -> list[Example]:
        genes = list(GERMLINES)
        chosen = [genes[(first + index) % len(genes)] for index in range(count)]
        return [{"prompt": GERMLINES[gene], "germline": gene} for gene in chosen]
