"""DiffusionGemma as a policy: a canvas of uniform noise is denoised behind a clean text.

The model is transformers' `DiffusionGemmaForBlockDiffusion`. Its causal encoder reads the clean text (the prompt and
the finished canvases) once; its decoder reads the canvas, every token of which sees the whole canvas and the clean
text, in layers of sliding attention the last `sliding_window - 1` tokens of it. Encoder and decoder share their
weights, here also their modules, so that an adapter on a layer serves both (peft alone would give each its own).

Self-conditioning: the decoder also reads a signal [C, D] for every token of the canvas, the mean embedding under the
tempered prediction of the step before. It depends on that step's canvas and signal, and so on all canvases before.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache

from rl.models import routing
from rl.models.token_denoiser import SETTINGS, WrappedDenoiser
from rollouts.engines.shared import first_of_equal_rows
from rollouts.samplers.distribution import Ranges


@dataclass
class CleanText:
    """The clean text of B rows as the decoder sees it: keys and values of every layer, and where the canvas begins.

    Attributes:
        cache: keys and values of W positions.
        start: int64 [B], tokens of the clean text; what stands behind them in the cache is not seen.
    """

    cache: DynamicCache
    start: torch.Tensor

    def select(self, rows: torch.Tensor) -> CleanText:
        """Some rows [R], int64."""
        chosen, layers = DynamicCache(), cast("list[Any]", self.cache.layers)
        for index, layer in enumerate(layers):
            chosen.update(layer.keys[rows], layer.values[rows], index)
        return CleanText(chosen, self.start[rows])


class CanvasLM(WrappedDenoiser):
    """A `rollouts.model_protocol.DenoisingModel` of uniform noise whose response is a row of canvases.

    Attributes:
        canvas_length: C, tokens of a canvas.
        self_conditioning_gradient: see `rl/estimators/canvas_rows.py`.
    """

    attention = "full"
    noise = "uniform"
    block_length = None
    logit_shift = 0
    self_conditioning_gradient = False

    def __init__(self, model: Any, mask_token_id: int | None, excluded_token_ids: Ranges = ()):
        """
        Args:
            model: a transformers `DiffusionGemmaForBlockDiffusion` with its weights.
            mask_token_id: a token that no noise is, where the tokenizer has one.
            excluded_token_ids: half-open ranges of ids that are never predicted.
        """
        super().__init__()
        self.model = model.eval()
        self.config = model.config
        text = self.config.text_config
        # An id behind the vocabulary: trajectories name one, and no canvas here holds it.
        mask = text.vocab_size if mask_token_id is None else int(mask_token_id)
        self.keep({"mask_token_id": mask, "excluded_token_ids": [list(r) for r in excluded_token_ids]})
        self.share()
        for layer in self.body.layers:
            layer.router.top_k, layer.router.num_experts = text.top_k_experts, text.num_experts
        routing.prepare(model)
        # Images are no part of a prompt here.
        for part in (self.model.model.encoder.vision_tower, self.model.model.encoder.embed_vision):
            part.requires_grad_(False)
        self._signal: torch.Tensor | None = None
        self.body.self_conditioning.register_forward_pre_hook(self._conditioned)

    body = property(attrgetter("model.model.decoder"))
    canvas_length = property(attrgetter("config.canvas_length"))
    hidden_size = property(attrgetter("config.text_config.hidden_size"))
    vocab_size = property(attrgetter("config.text_config.vocab_size"))
    max_length = property(attrgetter("config.text_config.max_position_embeddings"))

    def share(self) -> None:
        """Make the encoder's modules the decoder's; asked again after adapters came in or went."""
        encoder = self.model.model.encoder.language_model
        encoder.embed_tokens, encoder.norm = self.body.embed_tokens, self.body.norm
        for own, layer in zip(encoder.layers, self.body.layers, strict=True):
            for name, module in layer.named_children():
                if name == "self_attn":
                    for part, projection in module.named_children():
                        setattr(own.self_attn, part, projection)
                else:
                    setattr(own, name, module)

    def get_input_embeddings(self) -> nn.Module:
        return self.body.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., V] in at least float32, softly capped."""
        logits, cap = self.model.lm_head(hidden), self.config.text_config.final_logit_softcapping
        return torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap) * cap

    def encode(self, input_ids: torch.Tensor, start: torch.Tensor) -> CleanText:
        """Read the clean text; equal texts are read once.

        Args:
            input_ids: int64 [B, >= W]; what stands behind the clean text does not matter.
            start: int64 [B], tokens of the clean text, at most W.
        """
        place = torch.arange(int(start.max()), device=input_ids.device)
        ids = input_ids[:, : len(place)].masked_fill(place >= start[:, None], 0)
        first, inverse = first_of_equal_rows(torch.cat([ids, start[:, None]], dim=1))
        past = place[:, None] - place
        causal = (past >= 0).expand(len(first), 1, -1, -1)
        cache = DynamicCache()
        self.model.model.encoder.language_model(
            input_ids=ids[first],
            attention_mask=self._masks(causal, past < self.config.text_config.sliding_window),
            position_ids=place[None],
            past_key_values=cache,
        )
        return CleanText(cache, start[first]).select(inverse)

    def denoise(self, canvas: torch.Tensor, text: CleanText, signal: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [B, C, D] of canvases.

        Args:
            canvas: int64 [B, C].
            signal: [B, C, D] of the step before; None at a canvas's first step.
        """
        start = text.start[:, None]
        clean = torch.arange(text.cache.get_seq_length(), device=canvas.device)
        own = torch.ones_like(canvas, dtype=torch.bool)
        seen = torch.cat([clean < start, own], dim=1)
        near = torch.cat([clean > start - self.config.text_config.sliding_window, own], dim=1)
        shape = (len(canvas), 1, canvas.shape[1], seen.shape[1])
        self._signal = signal
        try:
            return self.body(
                decoder_input_ids=canvas,
                past_key_values=text.cache,
                decoder_attention_mask=self._masks(seen[:, None, None].expand(shape), near[:, None, None]),
                decoder_position_ids=start + torch.arange(canvas.shape[1], device=canvas.device),
            ).last_hidden_state
        finally:
            self._signal = None

    def signal(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, C, D]: what a step's tempered logits [B, C, V] tell the next step."""
        embedding = self.body.embed_tokens
        dtype = embedding.weight.dtype
        law = logits.to(dtype).softmax(-1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
        return law @ embedding.weight * embedding.embed_scale.to(dtype)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        *,
        visible: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any | None = None,
        signal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, W, D], zeros outside of the canvas, which is the last `canvas_length` tokens that are visible of a row.

        Args:
            input_ids: int64 [B, W], each row a clean text and one canvas from position 0, right-padded.
            visible: bool [B, 1, W], all but the padding; None means all.
            signal: see `denoise`.
        """
        assert cache is None
        batch, width = input_ids.shape
        seen = torch.ones_like(input_ids, dtype=torch.bool) if visible is None else visible[:, 0].expand(batch, width)
        start = seen.sum(1) - self.canvas_length
        place = start[:, None] + torch.arange(self.canvas_length, device=input_ids.device)
        hidden = self.denoise(input_ids.gather(1, place), self.encode(input_ids, start), signal)
        return hidden.new_zeros(batch, width, hidden.shape[-1]).scatter(1, place[..., None].expand_as(hidden), hidden)

    def activation_checkpointing_enable(self) -> None:
        """The decoder's layers; transformers keeps the encoder's activations."""
        self.model.gradient_checkpointing_enable()

    def save_pretrained(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder that `DiffusionGemmaForBlockDiffusion` and `load_policy` read."""
        self.model.save_pretrained(path, **options)

    def _conditioned(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The decoder itself computes a signal from logits [B, C, V], which nobody has to keep."""
        embedded, nothing = inputs
        return embedded, nothing if self._signal is None else self._signal

    @staticmethod
    def _masks(full: torch.Tensor, near: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"full_attention": full, "sliding_attention": full & near}


def load_canvas_lm(path: str, tokenizer: Any) -> CanvasLM:
    """A DiffusionGemma folder or hub name, in the dtype of its files.

    Raises:
        ValueError: weights are missing, unexpected or of another shape.
    """
    from transformers import DiffusionGemmaForBlockDiffusion

    from rl.models.weights import refuse

    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, attn_implementation="sdpa", dtype="auto"
    )
    model, report = loaded
    refuse(
        f"model.path {path!r}",
        sorted(report["missing_keys"]),
        sorted(report["unexpected_keys"]),
        sorted((name, tuple(found), tuple(wanted)) for name, found, wanted in report["mismatched_keys"]),
    )
    settings = getattr(model.config, SETTINGS, None)
    if settings is None:
        settings = {"mask_token_id": None if tokenizer is None else tokenizer.mask_token_id}
    return CanvasLM(model, **settings)
