"""Decisions that a teacher has an opinion on: its distribution over tokens at each of them, as dense targets.

`score` gives the divergence from the teacher's distribution to the policy's in `Scores.kl`, beside the log-prob and
entropy of every other estimator. The distributions themselves, [N, V], never leave it. The policy's is the model's own
(temperature 1, no filters); log-prob and entropy are of the sampling distribution, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch.nn import functional

from rl.estimators.base import Scores
from rl.estimators.rows import TokenRows
from rl.losses.divergence import divergence
from rollouts.model_protocol import DenoisingModel
from rollouts.trajectory import TokenTrajectory


@dataclass(kw_only=True)
class TaughtRows(TokenRows):
    """Token rows with a teacher; a subclass says where its distributions come from.

    Attributes:
        kind: of the divergence (`rl.losses.divergence`).
    """

    kind: str

    def taught(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs [N, V], or log-probs [N, K] and the ids [N, K] they belong to."""
        raise NotImplementedError

    def score(self, model: DenoisingModel, hidden: torch.Tensor | None = None) -> Scores:
        logits = self.logits(model, hidden)
        return Scores(*self.drawn(logits), kl=divergence(self.kind, logits, *self.taught()))


@dataclass(kw_only=True)
class ReadRows(TaughtRows):
    """A causal language model reads the finished answers: a token is judged from the tokens to its left.

    Attributes:
        reader: `rewards.causal_lm.CausalReader`, or anything with its `read`.
        prompts, answers: token ids of every trajectory.
        place: int64 [N], index of each decision's token in its answer.
        top: likeliest tokens of the teacher that are looked at; None takes the vocabulary.
    """

    reader: Any
    prompts: list[list[int]]
    answers: list[list[int]]
    place: torch.Tensor
    top: int | None

    @property
    def num_rows(self) -> int:
        return super().num_rows + len(self.answers)

    @property
    def num_tokens(self) -> int:
        return super().num_tokens + sum(map(len, self.prompts + self.answers))

    def taught(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Read anew in every forward: [N, V] of a whole RL step would not fit into memory.
        readings = self.reader.read(self.prompts, self.answers, self.top)
        start = torch.tensor([0, *map(len, self.answers)]).cumsum(0).to(self.place.device)
        at = start[self.trajectory] + self.place
        logprobs = torch.cat([reading.logprobs for reading in readings]).to(at.device)[at]
        if self.top is None:
            return logprobs, None
        return logprobs, torch.cat([reading.ids for reading in readings]).to(at.device)[at]


def read_rows(
    rows: TokenRows, trajectories: Sequence[TokenTrajectory], reader: Any, kind: str, top: int | None
) -> ReadRows:
    """Rows whose decisions lie in the answers, with a causal teacher."""
    start = torch.tensor([t.prompt_length for t in trajectories])
    return ReadRows(
        **vars(rows),
        kind=kind,
        reader=reader,
        prompts=[t.prompt_ids.tolist() for t in trajectories],
        answers=[t.response_ids().tolist() for t in trajectories],
        place=rows.position_ids[rows.row, rows.column] - start[rows.trajectory],
        top=top,
    )


@dataclass(kw_only=True)
class ShownRows(TaughtRows):
    """The teacher is a policy that is shown more than the student: the same decisions in other rows.

    Attributes:
        shown: rows with the same decisions in the same order.
        top: K, likeliest tokens of the teacher that are kept; None keeps the vocabulary.
        targets: what the teacher said, once `set_anchor` has asked it.
    """

    shown: TokenRows
    top: int | None
    targets: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def distinct(self) -> Self:
        rows: Any = super().distinct()
        return replace(rows, shown=self.shown.distinct())

    def set_anchor(self, model: Any) -> None:
        logprobs = self.shown.logits(model).log_softmax(-1)
        if self.top is None:
            self.targets = logprobs, None
        else:
            best = logprobs.topk(min(self.top, logprobs.shape[-1]))
            self.targets = best.values, best.indices

    def taught(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self.targets is not None, "call set_anchor with the teacher first"
        return self.targets


@dataclass(kw_only=True)
class BridgedRows(TokenRows):
    """The teacher is the model itself, which sees more of the answer: some of the masks are revealed.

    The consistency of Consistent Diffusion Language Models (Amin et al. 2026, arXiv 2605.00161): x_s is drawn from
    q(x_s | x_t, x_0), s < t, and the prediction at x_t is fitted to that at x_s, which gets no gradient. Where x_s
    shows the token, that is the token. Masked Consistency Distillation (Chen et al. 2026, arXiv 2602.00792) draws one
    Gaussian noise per position for all times; a pair of masks then has the very same law (tests/test_sft.py).

    The mean of the prediction at x_s over x_s is that at x_t for the true posterior: the least loss is where it is
    without, and a step still draws its tokens independently of each other. We read abstracts and notes, not the
    papers: that the target is a mixture with the token itself, and its share, are choices of ours.

    Attributes:
        shown: the same decisions at x_s.
        open: bool [N], masked at x_s too.
        share: of the target, the prediction at x_s.
    """

    shown: TokenRows
    open: torch.Tensor
    share: float

    def score(self, model: DenoisingModel, hidden: torch.Tensor | None = None) -> Scores:
        with torch.no_grad():
            own = self.share * self.open.double()
            teacher = self.shown.logits(model).double().softmax(-1) * own[:, None]
            teacher.scatter_add_(1, self.target[:, None], 1 - own[:, None])
        logits = self.logits(model, hidden)
        return Scores(*self.drawn(logits), kl=divergence("cross_entropy", logits, teacher.log()))


@dataclass(kw_only=True)
class JointRows(TokenRows):
    """The student is the joint head (`rl/models/joint_head.py`), the teacher the frozen model that sees more tokens.

    From the model's states at a canvas x, the head is told which masks of x were revealed, and is fitted to the model's
    predictions of the other masks on the canvas with these tokens: KL(model || head). The model gets no gradient.

    Attributes:
        shown: the same decisions, masks still, on the canvases with more tokens.
    """

    shown: TokenRows

    def score(self, model: Any, hidden: torch.Tensor | None = None) -> Scores:
        with torch.no_grad():
            before = self.hidden(model) if hidden is None else hidden
            teacher = self.shown.logits(model).log_softmax(-1)
        now = self.shown.input_ids
        states = model.joint_states(
            before, now, now != self.input_ids, visible=self.seen(model), position_ids=self.position_ids
        )
        logits = self.logits(model, states)
        return Scores(*self.drawn(logits), kl=divergence("forward", logits, teacher))


def shown_rows(rows: TokenRows, suffixes: Sequence[np.ndarray], kind: str, top: int | None) -> ShownRows:
    """Rows of canvases under full attention, with a teacher that sees a suffix behind each.

    Args:
        rows: one canvas a row.
        suffixes: int64, of every trajectory; empty ones show nothing.
    """
    width = max(map(len, suffixes))
    fill = {name: 0 for name in ("input_ids", "position_ids", "segment", "block")} | {"document": -1}
    if rows.unprompted is not None:
        fill["unprompted"] = 0
    wide: dict[str, Any] = {
        name: functional.pad(getattr(rows, name), (0, width), value=value) for name, value in fill.items()
    }
    for row, owner in {int(row): int(owner) for row, owner in zip(rows.row, rows.trajectory, strict=True)}.items():
        suffix, end = torch.from_numpy(suffixes[owner]), int((rows.document[row] >= 0).sum())
        place = slice(end, end + len(suffix))
        wide["position_ids"][row, place] = torch.arange(end, end + len(suffix))
        wide["document"][row, place] = 0
        for name in ("input_ids", "unprompted"):
            if name in wide:
                wide[name][row, place] = suffix
    return ShownRows(**vars(rows), kind=kind, top=top, shown=replace(rows, **wide))
