"""Token rows: the documents that are forwarded, and the places in them where decisions are read.

This file is the only one that puts documents (`rl/estimators/documents.py`) into rows, and says what a token may see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from rl.estimators.allowed import allowed_sets, among_allowed
from rl.estimators.base import Rows, Scores
from rl.estimators.documents import Document, Reads, read_columns
from rl.estimators.logprob import logprob_and_entropy
from rl.estimators.packing import placed
from rollouts.engines.shared import first_of_equal_rows
from rollouts.model_protocol import DenoisingModel
from rollouts.samplers.distribution import guided_logits
from rollouts.trajectory import TokenTrajectory
from rollouts.visibility import Pieces

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Larger than any block number.
_NO_BLOCK = 2**62


@dataclass(kw_only=True)
class TokenRows(Rows):
    """R rows of width W that score N decisions.

    Every token belongs to a document (one trajectory) and to a segment of it. Segment 0 is clean; each other segment is
    a noisy copy of one block. The canvas of a full-attention model is one segment. Decisions are ordered by trajectory,
    and within it as they were recorded.

    Attributes:
        input_ids, position_ids: int64 [R, W].
        document: int64 [R, W], 0, 1, ... within a row, -1 on padding.
        context: int64 [R, W], the document of the prompt that these tokens share with others, their own without one;
            None where no prompt is shared.
        segment: int64 [R, W].
        block: int64 [R, W], block of each token in the grid, 0 everywhere without a grid.
        row, column: int64 [N], the place of each decided position.
        read: int64 [N], the column whose hidden state predicts it (`read_columns`); `column` without a logit shift.
        target: int64 [N], the token that was chosen.
        unprompted: int64 [R, W], input_ids with every prompt token masked, None without guidance.
        cfg_scale: scale of the guidance against them (`rollouts.samplers.distribution.guided_logits`).
        temperature, top_p, top_k: the sampling distribution.
        context_causal: a clean token sees the clean tokens up to itself only, also inside its block.
        allowed: uint8 [sets, V / 8], under a constraint the sets of tokens that tokens were drawn among, else None.
        allowed_at: int64 [N], the set of each decision; -1 for all tokens.
        is_choice: bool [N], decisions of the model's choice head, whose target is the index of a value; None without.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    document: torch.Tensor
    segment: torch.Tensor
    block: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    read: torch.Tensor
    target: torch.Tensor
    context: torch.Tensor | None = None
    unprompted: torch.Tensor | None = None
    cfg_scale: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    context_causal: bool = False
    allowed: torch.Tensor | None = None
    allowed_at: torch.Tensor | None = None
    is_choice: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0] * (1 if self.unprompted is None else 2)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel() * (1 if self.unprompted is None else 2)

    def distinct(self) -> TokenRows:
        """The same decisions on the distinct rows only. Log-probs and gradients stay what they were."""
        layout = ["input_ids", "position_ids", "document", "segment", "block"]
        layout += [name for name in ("context", "unprompted") if getattr(self, name) is not None]
        key = torch.cat([getattr(self, name) for name in layout], dim=1)
        first, inverse = first_of_equal_rows(key)
        if len(first) == len(key):
            return self
        kept = {name: getattr(self, name)[first] for name in layout}
        return replace(self, row=inverse[self.row], **kept)

    def score(self, model: DenoisingModel, hidden: torch.Tensor | None = None) -> Scores:
        """Log-prob and entropy of every decision under the model's weights.

        Args:
            hidden: [R, W, D] when the backbone has already run on these rows.
        """
        if self.is_choice is not None:
            return self._with_choices(model, self.hidden(model) if hidden is None else hidden)
        size = getattr(model, "head_chunk", None)
        if size is None or len(self.target) <= size or self.unprompted is not None:
            return Scores(*self.drawn(self.logits(model, hidden)))
        states = (self.hidden(model) if hidden is None else hidden)[self.row, self.read]
        parts = []
        for start in range(0, len(states), size):
            at = slice(start, start + size)
            parts.append(checkpoint(self.some(at)._from_states, model, states[at], use_reentrant=False))
        return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _with_choices(self, model: Any, hidden: torch.Tensor) -> Scores:
        """`score`, with the numbers of the choice head where it decided."""
        assert self.is_choice is not None
        at = self.is_choice.nonzero().squeeze(1)
        scores = replace(self, is_choice=None).score(model, hidden)
        logits = model.choice_logits(hidden[self.row[at], self.read[at]])
        logprob, entropy = (
            old.index_put((at,), new.to(old.dtype))
            for old, new in zip(scores[:2], logprob_and_entropy(logits, self.target[at], 1.0), strict=True)
        )
        return scores._replace(logprob=logprob, entropy=entropy)

    def some(self, kept: torch.Tensor | slice) -> Self:
        """The same rows with some of the decisions: bool [N], or a slice."""
        flat = ("row", "column", "read", "target", "trajectory", "step", "sampler_logprob", "weight_factor")
        own = {
            name: getattr(self, name, None) for name in (*flat, "allowed_at", "is_choice", "before", "after", "stay")
        }
        return replace(self, **{name: values[kept] for name, values in own.items() if values is not None})

    def _from_states(self, model: DenoisingModel, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`drawn`, from the hidden states [N, D] that the decisions are read from."""
        return self.drawn(model.token_logits(states))

    def logits(self, model: DenoisingModel, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """[N, V] at every decision. Hidden states are gathered before the output head: it never makes [R, W, V]."""
        place = (self.row, self.read)
        logits = model.token_logits((self.hidden(model) if hidden is None else hidden)[place])
        if self.unprompted is None:
            return logits
        unconditional = model.token_logits(self.hidden(model, self.unprompted)[place])
        return guided_logits(logits, unconditional, self.cfg_scale)

    def drawn(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob of the targets, and entropy [N], in the sampling distribution."""
        logits = among_allowed(logits, self.allowed, self.allowed_at)
        return logprob_and_entropy(logits, self.target, self.temperature, self.top_p, self.top_k)

    def hidden(self, model: DenoisingModel, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """[R, W, D]: the backbone on the rows, or on other tokens [R, W] in their place."""
        ids = self.input_ids if input_ids is None else input_ids
        return model.hidden_states(ids, visible=self.seen(model), position_ids=self.position_ids)

    def seen(self, model: DenoisingModel) -> Any:
        """`visible` in the form that suits the model: built once here, not in every layer."""
        if getattr(model, "wants_block_mask", False):
            return self.block_mask()
        if getattr(model, "takes_pieces", False) and bool((self.document > 0).any()):
            return self.pieces()
        if self._one_segment():
            # What padding sees does not matter, so one mask serves all queries of a row.
            seen = self.document == 0
            return None if bool(seen.all()) else seen[:, None, :]
        return self.visible()

    def visible(self) -> torch.Tensor | None:
        """bool [R, W, W]: may query (second axis) look at key (third axis)?

        None when every token sees its whole row.
        """
        if self._one_segment() and bool((self.document == 0).all()):
            return None
        rows, width = (torch.arange(size, device=self.document.device) for size in self.document.shape)
        return self.mask_mod()(rows[:, None, None], torch.zeros_like(rows[0]), width[:, None], width)

    def _one_segment(self) -> bool:
        """Whether a row is one document without a grid: padding alone then limits what is seen."""
        several = bool((self.segment != 0).any() | (self.block != 0).any() | (self.document > 0).any())
        return not several and not self.context_causal

    def pieces(self) -> Pieces:
        """The same visibility, document by document."""
        document = self.document.cpu().numpy()
        context = document if self.context is None else self.context.cpu().numpy()
        queries, keys, width = [], [], document.shape[1]
        for row in range(len(document)):
            for own in range(document[row].max() + 1):
                query = np.flatnonzero(document[row] == own)
                shared = context[row, query[0]]
                key = query if shared == own else np.append(np.flatnonzero(document[row] == shared), query)
                queries.append(row * width + query)
                keys.append(row * width + key)
        return Pieces.of(queries, keys, document.shape, self.mask_mod(), self.document.device)

    def block_mask(self) -> BlockMask:
        """The same visibility as a FlexAttention block mask; it skips whole tiles of keys."""
        from torch.nn.attention.flex_attention import create_block_mask

        num_rows, width = self.input_ids.shape
        device = self.input_ids.device
        # Building the tiles without compiling holds the dense mask for a moment; compiling needs a GPU's time only.
        return create_block_mask(
            self.mask_mod(), num_rows, None, width, width, device=device, _compile=device.type == "cuda"
        )

    def mask_mod(self) -> Any:
        """The rule, in FlexAttention's form: (row, head, query index, key index) -> bool.

        A clean token sees the clean blocks up to its own, with `context_causal` of its own block only the tokens up to
        itself. A noisy token sees the clean blocks before its own, and its own segment. Nothing crosses documents, but
        that many may see the one of their shared prompt.
        """
        noisy = self.segment > 0
        last = self.block - noisy.long()
        # A noisy key is not reached by comparing blocks, and a clean query has no segment of its own.
        clean_block = torch.where(noisy, _NO_BLOCK, self.block)
        document, segment, position = self.document, self.segment, self.position_ids
        causal = self.context_causal
        context = document if self.context is None else self.context

        def may_see(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            own = (segment[b, q] == segment[b, k]) & (segment[b, q] > 0)
            clean = clean_block[b, k] <= last[b, q]
            if causal:
                clean = clean & (noisy[b, q] | (position[b, k] <= position[b, q]))
            inside = (document[b, q] == document[b, k]) | (context[b, q] == document[b, k])
            return inside & (clean | own)

        return may_see


def readout(model: DenoisingModel) -> dict[str, Any]:
    """How a model is read, as arguments of `assemble`."""
    return {"logit_shift": model.logit_shift, "context_causal": getattr(model, "context_causal", False)}


def assemble(
    documents: Sequence[Document],
    reads: Sequence[Reads],
    trajectories: Sequence[TokenTrajectory] = (),
    pack_to: int | None = None,
    logit_shift: int = 0,
    context_causal: bool = False,
    heads: Sequence[int] | None = None,
) -> TokenRows:
    """Lay documents out in rows.

    Args:
        reads: one entry per document.
        trajectories: give the sampling distribution and its guidance; without them it is the model's own.
        pack_to: put several documents into one row while they fit into this many tokens; a longer document has a row
            of its own. None gives every document a row, right-padded to the longest.
        logit_shift, context_causal: as of the model.
        heads: how many first tokens of each document see nothing behind them. Documents of a row that begin with the
            same ones share them, where `pack_to` lets rows be shared.

    Raises:
        ValueError: trajectories that were decoded greedily, or drawn from more than one distribution.
    """
    sampler = _sampler_of(trajectories)
    if len({read.is_choice is None for read in reads}) > 1:
        raise ValueError("trajectories of one batch must all have choices (sampler.choose), or none of them")
    parts, row, columns = placed([document.input_ids for document in documents], heads, pack_to)
    shape = (int(row.max()) + 1, max(part.end for part in parts))
    # Padding sees padding of its own row only (document -1), never nothing: no row of the softmax is empty.
    layout: dict[str, Any] = {"document": np.full(shape, -1), "context": np.full(shape, -1)}
    layout |= {name: np.zeros(shape, dtype=np.int64) for name in Document._fields}
    if sampler.get("cfg_scale"):
        layout["unprompted"] = np.zeros(shape, dtype=np.int64)
    for part in parts:
        document, place = documents[part.document], (part.row, slice(part.begin, part.end))
        layout["document"][place], layout["context"][place] = part.number, part.context
        for name, values in document._asdict().items():
            layout[name][place] = values[part.tokens]
        if "unprompted" in layout:
            trajectory = trajectories[reads[part.document].trajectory]
            in_prompt = document.position_ids < trajectory.prompt_length
            unprompted = np.where(in_prompt, trajectory.mask_token_id, document.input_ids)
            layout["unprompted"][place] = unprompted[part.tokens]
    if np.array_equal(layout["context"], layout["document"]):
        del layout["context"]
    layout = {name: torch.from_numpy(values) for name, values in layout.items()}
    counts = [len(read.target) for read in reads]
    pairs = list(zip(documents, reads, columns, strict=True))
    column = [own[read.column] for _, read, own in pairs]
    read = [own[read_columns(document, read.column, logit_shift)] for document, read, own in pairs]
    for index, (_, own, columns_of) in enumerate(pairs):
        if own.is_choice is not None:
            read[index] = np.where(own.is_choice, columns_of[own.column], read[index])

    def flat(name: str, dtype: type = np.int64) -> Any:
        parts = [getattr(read, name) for read in reads]
        if parts[0] is None:
            return None
        spread = [np.broadcast_to(part, count) for part, count in zip(parts, counts, strict=True)]
        return torch.from_numpy(np.concatenate(spread).astype(dtype))

    return TokenRows(
        **layout,
        row=torch.from_numpy(np.repeat(row, counts)),
        column=torch.from_numpy(np.concatenate(column)),
        read=torch.from_numpy(np.concatenate(read)),
        target=flat("target"),
        trajectory=flat("trajectory"),
        step=flat("step"),
        sampler_logprob=flat("sampler_logprob", np.float64),
        weight_factor=flat("weight_factor", np.float64),
        is_choice=flat("is_choice", bool),
        context_causal=context_causal,
        **{name: sampler[name] for name in ("temperature", "top_p", "top_k", "cfg_scale") if name in sampler},
        **allowed_sets(
            [(r.trajectory, d.position_ids[r.column]) for d, r in zip(documents, reads, strict=True)], trajectories
        ),
    )


def _sampler_of(trajectories: Sequence[TokenTrajectory]) -> dict[str, Any]:
    for index, trajectory in enumerate(trajectories):
        if trajectory.sampler.get("temperature", 0) == 0:
            raise ValueError(f"trajectory {index} was decoded greedily: set sampler.temperature > 0 to train on it")
        if trajectory.sampler != trajectories[0].sampler:
            raise ValueError("trajectories of one batch must share their sampler settings")
    return trajectories[0].sampler if trajectories else {}
