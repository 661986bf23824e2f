"""Any Hugging Face masked language model (BERT, RoBERTa, ESM, ...) as a diffusion policy.

One denoising step of a masked diffusion model predicts masked tokens given all others, at any share of masks. A masked
LM does just that, so it is used as it is. This file splits it into hidden states and head, and puts the tokens that it
was trained to see around a canvas (`[CLS] ... [SEP]`) there, so that trajectories hold the sequence alone.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from rl.models.token_denoiser import SETTINGS, WrappedDenoiser
from rollouts.samplers.distribution import Ranges


class MaskedLM(WrappedDenoiser):
    """A `rollouts.model_protocol.DenoisingModel` with full attention and no shift around an `AutoModelForMaskedLM`."""

    attention = "full"
    block_length = None
    logit_shift = 0

    def __init__(
        self,
        model: Any,
        mask_token_id: int,
        begin_token_ids: Sequence[int] = (),
        end_token_ids: Sequence[int] = (),
        excluded_token_ids: Ranges = (),
    ):
        """
        Args:
            model: a transformers `...ForMaskedLM` with its weights.
            begin_token_ids, end_token_ids: put around every canvas inside the model. Example: (0,) and (2,).
            excluded_token_ids: half-open ranges of ids that are never predicted.

        Raises:
            ValueError: the architecture's head is not known to this file.
        """
        super().__init__()
        if getattr(model.config, "is_encoder_decoder", False) or getattr(model.config, "is_decoder", False):
            raise ValueError(f"model.path: {type(model).__name__} is no encoder, a masked LM has to be one")
        self.model = model
        self.eval()
        self.config = model.config
        settings = {
            "mask_token_id": int(mask_token_id),
            "begin_token_ids": [int(i) for i in begin_token_ids],
            "end_token_ids": [int(i) for i in end_token_ids],
            "excluded_token_ids": [list(r) for r in excluded_token_ids],
        }
        self.keep(settings)
        vocab_size = self.config.vocab_size
        for i in (mask_token_id, *begin_token_ids, *end_token_ids):
            if not 0 <= i < vocab_size:
                raise ValueError(f"model.path: special token id {i} must lie in the vocabulary of {vocab_size}")
        # RoBERTa and its kin count positions from behind the padding token's id.
        table = next((m for n, m in self.body.named_modules() if n.endswith("embeddings.position_embeddings")), None)
        padding = getattr(table, "padding_idx", None)
        self._first_position = 0 if padding is None else padding + 1
        takes = inspect.signature(self.body.forward).parameters
        self._takes_positions = "position_ids" in takes
        if table is not None and not self._takes_positions:
            raise ValueError(f"model.path: {type(model).__name__} takes no position_ids, which a padded canvas needs")
        self._check_split()

    @classmethod
    def from_weights(
        cls, config: Any, state_dict: Mapping[str, torch.Tensor], mask_token_id: int, **settings: Any
    ) -> MaskedLM:
        """A policy from weights in memory.

        Args:
            config: a transformers config, or a dict of one with `model_type`.
            state_dict: the weights of its `...ForMaskedLM`, under transformers' names; tied ones may be left out.
            settings: as of the constructor.

        Raises:
            ValueError: the weights do not fit the config; names the first.
        """
        from transformers import AutoConfig, AutoModelForMaskedLM

        from rl.models.weights import check_weights, shapes_of

        if isinstance(config, Mapping):
            config = AutoConfig.for_model(**config)
        model = AutoModelForMaskedLM.from_config(config)
        found = shapes_of(state_dict)
        optional = {*model.all_tied_weights_keys, *(name for name, _ in model.named_buffers())}
        check_weights(shapes_of(model.state_dict()), found, "the state_dict", optional, _is_spare)
        kept = {name: tensor for name, tensor in state_dict.items() if not _is_spare(name)}
        model.load_state_dict(kept, strict=False)
        model.tie_weights()
        return cls(model, mask_token_id, **settings)

    body = property(attrgetter("model.base_model"))
    hidden_size = property(attrgetter("config.hidden_size"))
    vocab_size = property(attrgetter("config.vocab_size"))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return _head(self.model)(hidden)

    @property
    def max_length(self) -> int:
        """Longest canvas; the tokens around it take positions too."""
        around = len(self.settings["begin_token_ids"]) + len(self.settings["end_token_ids"])
        return int(self.config.max_position_embeddings) - self._first_position - around

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        *,
        visible: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, Q, D]; see `DenoisingModel.hidden_states`. A row is one canvas from position 0, right-padded.

        Raises:
            ValueError: a cache, rows that hold several canvases, or soft inputs of a model that looks at the ids too.
        """
        if inputs_embeds is not None and getattr(self.config, "token_dropout", False):
            raise ValueError("this model (ESM) scales by its share of mask tokens: it takes no mixtures of tokens")
        if cache is not None:
            raise ValueError("a masked LM keeps no keys and values: set rollout.cache to none")
        batch, width = input_ids.shape
        device = input_ids.device
        seen = torch.ones_like(input_ids, dtype=torch.bool)
        if visible is not None:
            if visible.shape[1] != 1:
                raise ValueError("a masked LM takes one canvas per row: set algorithm.pack_to to null")
            seen = visible[:, 0].expand(batch, width)
        canvas = torch.arange(width, device=device)
        if position_ids is not None and bool(((position_ids != canvas) & seen).any()):
            raise ValueError("a masked LM takes canvases that begin at position 0: set algorithm.pack_to to null")
        begin = torch.tensor(self.settings["begin_token_ids"], dtype=torch.int64, device=device)
        end = torch.tensor(self.settings["end_token_ids"], dtype=torch.int64, device=device)
        # A hidden position must not be a mask token: ESM scales a row by its share of them.
        spare = self.config.pad_token_id or 0
        ids = torch.cat(
            [
                begin.expand(batch, -1),
                input_ids.masked_fill(~seen, spare),
                torch.full((batch, len(end)), spare, device=device),
            ],
            dim=1,
        )
        place = torch.arange(ids.shape[1], device=device)
        after = len(begin) + seen.sum(1, keepdim=True)
        ids = ids.scatter(1, after + torch.arange(len(end), device=device), end.expand(batch, -1))
        inputs = {"attention_mask": (place < after + len(end)).long()}
        if inputs_embeds is None:
            inputs["input_ids"] = ids
        else:
            around = self.get_input_embeddings()(ids)
            inside = torch.nn.functional.pad(inputs_embeds, (0, 0, len(begin), len(end)))
            soft = torch.nn.functional.pad(seen, (len(begin), len(end)))
            inputs["inputs_embeds"] = torch.where(soft[..., None], inside, around)
        if self._takes_positions:
            inputs["position_ids"] = (place + self._first_position).expand(batch, -1)
        return self.body(**inputs).last_hidden_state[:, len(begin) : len(begin) + width]

    def activation_checkpointing_enable(self) -> None:
        self.model.activation_checkpointing_enable()

    def save_pretrained(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder that `AutoModelForMaskedLM` and `load_policy` read."""
        self.model.save_pretrained(path, **options)

    @torch.no_grad()
    def _check_split(self) -> None:
        """Encoder and head, put together here, must give what the model itself gives on a short canvas.

        Positions are part of it: the model numbers them itself, this class is explicit about them. And padding must
        not be seen: ConvBERT's convolutions and FNet's Fourier transform do see it.

        Raises:
            ValueError: naming the architecture.
        """
        ids = [i for i in range(min(self.vocab_size, 64)) if i != self.config.pad_token_id][:6]
        canvas = torch.tensor([[*ids, self.mask_token_id]], device=self.device)
        around = [
            torch.tensor([self.settings[name]], dtype=torch.int64, device=self.device)
            for name in ("begin_token_ids", "end_token_ids")
        ]
        whole = torch.cat([around[0], canvas, around[1]], dim=1)
        theirs = self.model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits
        theirs = theirs[:, around[0].shape[1] :][:, : canvas.shape[1]].float()
        ours = self.head(self.hidden_states(canvas)).float()
        name = type(self.model).__name__
        tolerance = (1e-2 if self.dtype in (torch.bfloat16, torch.float16) else 1e-4) * float(theirs.abs().max())
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0, atol=tolerance):
            raise ValueError(f"model.path: {name} computes its logits in a way unknown to rl/models/masked_lm.py")
        padded = torch.cat([canvas, canvas[:, :1]], dim=1)
        visible = (torch.arange(padded.shape[1], device=self.device) < canvas.shape[1])[None, None]
        again = self.head(self.hidden_states(padded, visible=visible)).float()[:, :-1]
        if not torch.allclose(ours, again, rtol=0, atol=tolerance):
            raise ValueError(
                f"model.path: {name} mixes padding into its predictions: a rollout would depend on its batch"
            )


def _head(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The module that turns hidden states into logits; the architectures of transformers name it in five ways.

    Raises:
        ValueError: none of them.
    """
    for name in ("cls", "lm_head", "predictions"):  # BERT; RoBERTa, ESM, XLM-R; ALBERT
        if hasattr(model, name):
            return getattr(model, name)
    if hasattr(model, "head") and hasattr(model, "decoder"):  # ModernBERT
        return lambda hidden: model.decoder(model.head(hidden))
    if hasattr(model, "generator_predictions"):  # ELECTRA
        return lambda hidden: model.generator_lm_head(model.generator_predictions(hidden))
    if hasattr(model, "vocab_transform"):  # DistilBERT
        return lambda hidden: model.vocab_projector(
            model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
        )
    raise ValueError(f"model.path: the head of {type(model).__name__} is not known to rl/models/masked_lm.py")


def _is_spare(name: str) -> bool:
    """Whether a masked LM has no use for this weight of a checkpoint."""
    return (
        ".pooler." in name or ".seq_relationship." in name or name.endswith(".position_ids") or "contact_head" in name
    )


def load_masked_lm(path: str, tokenizer: Any, wrap: bool = True) -> MaskedLM:
    """A masked LM from a folder or hub name in transformers' layout.

    Args:
        tokenizer: gives the mask token and the tokens around a sequence. None needs a folder this class wrote.
        wrap: put the tokenizer's begin and end tokens around every canvas.

    Raises:
        ValueError: weights are missing, unexpected or of another shape, or there is no mask token.
    """
    from transformers import AutoModelForMaskedLM

    from rl.models.weights import refuse

    loaded: Any = AutoModelForMaskedLM.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True)
    model, report = loaded
    where = f"model.path {path!r}"
    refuse(
        where,
        sorted(report["missing_keys"]),
        sorted(name for name in report["unexpected_keys"] if not _is_spare(name)),
        sorted((name, tuple(found), tuple(wanted)) for name, found, wanted in report["mismatched_keys"]),
    )
    settings = getattr(model.config, SETTINGS, None)
    if settings is None:
        if tokenizer is None or tokenizer.mask_token_id is None:
            raise ValueError(f"{where}: the tokenizer has no mask token: set model.tokenizer to one that has")
        settings = {"mask_token_id": tokenizer.mask_token_id}
        if wrap:
            ids = tokenizer(tokenizer.mask_token).input_ids
            at = ids.index(tokenizer.mask_token_id)
            settings |= {"begin_token_ids": ids[:at], "end_token_ids": ids[at + 1 :]}
    return MaskedLM(model, **settings)
