"""An engine that makes one full forward for several steps: a joint head goes on from its hidden states.

See `rl/models/joint_head.py` for the head and its source (arXiv 2509.22738). After a full forward of a block,
`sampler.joint_steps` steps read the states that forward left, with what was revealed since, through the head alone. The
head is an approximation: such trajectories say `exact=False`, and no recipe learns from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rollouts.engines.block_cache import BlockCache
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.slots import Plan, Slots
from rollouts.trajectory import TokenTrajectory
from rollouts.visibility import full_visibility


class JointEngine(InProcessEngine):
    """Samples with `sampler.joint_steps` a full-attention model with a `joint_head`, without a cache."""

    def _decoded(self, plans: Sequence[Plan], requests: Sequence[Request]) -> list[dict[str, Any]]:
        self._forwards = np.zeros(len(plans), dtype=np.int64)
        # Of each slot the canvas of its last full forward, and the states [slots, W, D] that it left.
        self._canvas = self._states = torch.zeros(0, device=self.device)
        found = super()._decoded(plans, requests)
        return [arrays | {"forwards": int(n)} for arrays, n in zip(found, self._forwards, strict=True)]

    def _hidden(
        self,
        tokens: torch.Tensor,
        cache: BlockCache | None,
        slots: Slots,
        group: np.ndarray,
        start: torch.Tensor,
        length: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Full forwards for the rows that are due, which are kept, and the head for the others."""
        due = slots.block_step[group] % (self.options.joint_steps + 1) == 0
        full, later, own = (
            torch.from_numpy(rows).to(self.device) for rows in (np.flatnonzero(due), np.flatnonzero(~due), group)
        )
        if len(full):
            hidden, _ = super()._hidden(tokens[full], cache, slots, group[due], start[full], length[full])
            if not len(self._states):
                self._canvas = tokens.new_zeros(len(slots.index), tokens.shape[1])
                self._states = hidden.new_zeros(*self._canvas.shape, hidden.shape[2])
            self._canvas[own[full]] = tokens[full]
            self._states[own[full], : hidden.shape[1]] = hidden
            self._forwards[slots.index[group[due]]] += 1
        width, shortest = int(slots.length[group].max()), int(slots.length[group].min())
        states = self._states[own, :width]
        if len(later):
            now = tokens[later, :width]
            states[later] = self.model.joint_states(  # type: ignore[attr-defined]
                states[later],
                now,
                now != self._canvas[own[later], :width],
                visible=full_visibility(length[later], width, shortest),
            )
        return states, torch.zeros_like(start)

    def trajectory(self, prompt_ids: Sequence[int] | np.ndarray, *given: Any, **arrays: Any) -> TokenTrajectory:
        """See `InProcessEngine.trajectory`; only full forwards are counted."""
        forwards = arrays.pop("forwards")
        made = super().trajectory(prompt_ids, *given, **arrays)
        made.exact = False
        made.decoder["forwards"] = forwards
        return made
