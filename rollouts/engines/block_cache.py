"""Key-value store of a decoder that rewrites positions: every request owns a slot.

The states of position p lie at index p of its slot, whatever the lengths of its neighbours. Attention
layers call `update`, which writes the queries' states to their absolute positions and returns the slots'
keys from position 0 on. A noisy block is written over and over while it is denoised and once more when
it is clean, and visibility (not bookkeeping) hides what is stale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch


class BlockCache:
    """Duck type of `transformers.Cache`, for one forward at a time: call `aim` before each."""

    is_compileable = False

    def __init__(self, num_slots: int, max_length: int, device: torch.device | str = "cpu"):
        self.num_slots = num_slots
        self.max_length = max_length
        self.device = torch.device(device)
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # [slots, D]: the hidden state of the last clean position, from which a shifted model reads the next.
        self._last_clean: torch.Tensor | None = None
        self._slots = self._positions = torch.empty(0)
        # The first of neighbouring slots; None where others lie between them.
        self._first: int | None = None
        self._num_keys = 0

    def aim(self, slots: Sequence[int], positions: torch.Tensor, num_keys: int) -> None:
        """Say where the next forward's states go.

        Args:
            slots: one per row of the forward, ascending.
            positions: int64 [B, Q], absolute positions of the queries, below max_length.
            num_keys: K, how many positions to hand back to attention.
        """
        self._slots = torch.as_tensor(slots, device=self.device)
        self._positions, self._num_keys = positions.contiguous(), num_keys
        # Neighbouring slots are handed out as they lie; others have to be copied together.
        self._first = int(slots[0]) if slots[-1] - slots[0] + 1 == len(slots) else None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, H, Q, D/H] states and return [B, H, K, D/H] of the aimed slots."""
        if layer_idx not in self._layers:
            shape = (self.num_slots, key_states.shape[1], self.max_length, key_states.shape[3])
            self._layers[layer_idx] = (value_states.new_zeros(shape), value_states.new_zeros(shape))
        keys, values = self._layers[layer_idx]
        where = (self._slots[:, None], slice(None), self._positions)
        keys[where] = key_states.transpose(1, 2).to(keys.dtype)
        values[where] = value_states.transpose(1, 2)
        return self._hold(keys), self._hold(values)

    def _hold(self, states: torch.Tensor) -> torch.Tensor:
        states = states[:, :, : self._num_keys]
        if self._first is None:
            return states.index_select(0, self._slots)
        return states[self._first : self._first + len(self._slots)]

    def tensors(self) -> list[torch.Tensor]:
        """Keys and values of all layers, [slots, H, max_length, D/H]; none before the first forward."""
        return [states for pair in self._layers.values() for states in pair]

    def keep_last_clean(self, hidden: torch.Tensor) -> None:
        """Keep the hidden states [B, D] of the last clean position of the aimed slots."""
        if self._last_clean is None:
            self._last_clean = hidden.new_zeros(self.num_slots, hidden.shape[1])
        self._last_clean[self._slots] = hidden

    def last_clean(self, slots: np.ndarray) -> torch.Tensor:
        """What `keep_last_clean` kept of some slots, [N, D]."""
        assert self._last_clean is not None
        return self._last_clean[torch.from_numpy(slots).to(self.device)]

    def with_last_clean(self, hidden: torch.Tensor, begin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [B, 1 + Q, D] that begin at the last clean position, and that position, int64 [B].

        Args:
            hidden: [B, Q, D] of the aimed slots' current blocks.
            begin: int64 [B], their positions.
        """
        if self._last_clean is None:
            self._last_clean = hidden.new_zeros(self.num_slots, hidden.shape[2])
        return torch.cat([self._last_clean[self._slots, None], hidden], dim=1), begin - 1

    def copy(self, sources: Sequence[int], targets: Sequence[int], num_keys: int) -> None:
        """Give slots the states of other slots, from position 0 on."""
        source, target = (torch.as_tensor(slots, device=self.device) for slots in (sources, targets))
        if self._last_clean is not None:
            self._last_clean[target] = self._last_clean[source]
        for pair in self._layers.values():
            for states in pair:
                states[target, :, :num_keys] = states[source, :, :num_keys]

    def share(self, copies: Mapping[int, Sequence[int]], num_keys: np.ndarray) -> None:
        """Give the slots of equal prompts the states of one of them.

        Args:
            copies: slot -> slots that take a copy, maybe none.
            num_keys: int64 [slots], how many states of each slot count.
        """
        for source, targets in copies.items():
            if targets:
                self.copy([source] * len(targets), targets, int(num_keys[source]))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always passed explicitly, so nothing may be derived from a length."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._num_keys, 0
