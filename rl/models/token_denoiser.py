"""The part of a `DenoisingModel` of tokens that does not depend on its network."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from rl.models.rotary import ExactRotary
from rollouts.samplers.distribution import Ranges, exclude_
from rollouts.visibility import block_causal_visibility

# Under this key the settings of a `WrappedDenoiser` are kept in the model's own config.json.
SETTINGS = "denoise_rl"


class TokenDenoiser(ExactRotary):
    """A subclass has the attributes of a `DenoisingModel`, and two more.

    Attributes:
        body: the transformers model below the head; adapters go in there.
        head: a function that turns hidden states [..., D] into logits [..., V].
        head_chunk: decisions whose logits a learner holds at once (`TokenRows.score`); None for all.
    """

    context_causal: Any = False
    head_chunk: int | None = None

    def share(self) -> None:
        """Give every place of a layer that has several the layer as it is now, after adapters were put in or merged."""

    def head_parameters(self: Any) -> list[nn.Parameter]:
        """The parameters that `token_logits` alone uses."""
        below = [self.body, *([self.vision] if getattr(self, "vision", None) is not None else [])]
        body = {id(p) for part in below for p in part.parameters()}
        return [p for p in self.parameters() if id(p) not in body]

    def token_logits(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        """[..., V] in at least float32, the mask token and the excluded tokens out of reach."""
        return exclude_(self.head(hidden), self.mask_token_id, self.excluded_token_ids)

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        visible: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, Q, V] at every position, for inspection; training and sampling gather first."""
        if visible is None and self.attention == "block_causal":
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            assert self.block_length is not None
            clean = None
            if self.context_causal:
                # Blocks before the first mask are clean.
                decided = (input_ids != self.mask_token_id).cumprod(1).sum(1, keepdim=True)
                noisy = decided < input_ids.shape[1]
                clean = torch.where(noisy, decided // self.block_length * self.block_length, decided)
            visible = block_causal_visibility(positions, input_ids.shape[1], self.block_length, clean)
            visible = visible.expand(input_ids.shape[0], -1, -1)
        return self.token_logits(self.hidden_states(input_ids, visible=visible, position_ids=position_ids))


class WrappedDenoiser(TokenDenoiser):
    """A model of transformers as it is, in `model`, whose config.json keeps ours.

    Attributes:
        settings: JSON, with `mask_token_id` and `excluded_token_ids`.
    """

    model: Any
    config: Any
    settings: dict[str, Any]

    dtype = property(attrgetter("model.dtype"))
    device = property(attrgetter("model.device"))
    mask_token_id = property(lambda self: self.settings["mask_token_id"])
    excluded_token_ids = property(lambda self: self.settings["excluded_token_ids"])

    def keep(self, settings: dict[str, Any]) -> None:
        """Put settings into the model's config, to be saved with it."""
        self.settings = settings
        setattr(self.config, SETTINGS, settings)

    def exclude(self, ranges: Ranges) -> None:
        """Never predict these ids, besides the mask token; see `rl/models/vocabulary.py`."""
        self.settings["excluded_token_ids"] = [list(r) for r in ranges]

    def adopt(self, described: Mapping[str, Any]) -> None:
        """Take over the settings in the config.json of a saved policy."""
        self.settings.update(described[SETTINGS])
