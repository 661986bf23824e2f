"""Mixture-of-experts layers: where the experts stand in a file, and what a router's numbers must fulfil.

transformers holds the experts of a layer in two tensors, `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I]; published
files have three matrices for each expert. The stacked tensor is one parameter: every rank of ZeRO 3 gathers it whether
or not its tokens chose all experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from rl.models.families.family import Family, Part


class MixtureFamily(Family):
    """A layout whose experts stand under the name that they have in memory."""

    def places(self, name: str, shape: tuple[int, ...]) -> Mapping[str, Part]:
        where, _, kind = name.replace("backbone.", "model.", 1).rpartition(".")
        return expert_places(where, kind, shape) if where.endswith(".experts") else super().places(name, shape)


def expert_places(where: str, kind: str, shape: tuple[int, ...]) -> dict[str, Part]:
    """The matrices that hold the stacked experts of a layer.

    Args:
        where: name of the experts in the file, "model.layers.0.mlp.experts".
        kind: "gate_up_proj" or "down_proj".
        shape: in memory.

    Returns:
        as of `Family.places`. Example with 2 experts of inner width 12: "...experts.1.up_proj.weight" holds
        `gate_up_proj[1, 12:24]`.
    """
    if kind == "down_proj":
        return {f"{where}.{e}.down_proj.weight": Part(e) for e in range(shape[0])}
    inner = shape[1] // 2
    halves = {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner)}
    return {f"{where}.{e}.{name}.weight": Part((e, rows)) for e in range(shape[0]) for name, rows in halves.items()}


def check_router(num_experts: int, num_experts_per_tok: int, n_group: int = 1, topk_group: int = 1) -> None:
    """Refuse numbers of a config.json with which no token finds its experts.

    Raises:
        ValueError: one line with the keys.
    """
    if not 1 <= num_experts_per_tok <= num_experts:
        raise ValueError(
            f"config.json says num_experts_per_tok {num_experts_per_tok} and num_experts {num_experts}: a token needs "
            "1 to num_experts of them"
        )
    if n_group == 1:
        return
    if num_experts % n_group or num_experts // n_group < 2:
        raise ValueError(
            f"config.json says n_group {n_group} and num_experts {num_experts}: groups are of equal size, 2 or more"
        )
    if not 1 <= topk_group <= n_group or topk_group * (num_experts // n_group) < num_experts_per_tok:
        raise ValueError(
            f"config.json says topk_group {topk_group}, n_group {n_group} and num_experts_per_tok "
            f"{num_experts_per_tok}: that many groups must exist, and hold the experts of a token"
        )
