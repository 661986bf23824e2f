"""How far a distribution over tokens is from another one, with the whole vocabulary or its likeliest tokens known."""

from __future__ import annotations

import torch

# A token with a smaller logit is never generated (`rollouts/samplers/distribution.py`).
_NEVER = -1e8
# What a token costs, in nats, that the teacher cannot say.
_MOST = 100.0


def divergence(kind: str, logits: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """[N], in nats, from a teacher's distributions to those of a student.

    Tokens that the student never generates are taken from the teacher, whose other probabilities then add up to 1: no
    policy can imitate it there. With `ids`, all tokens but these count as one. The divergence is then a lower bound of
    the whole one, with the same least value, 0.

    Example: student 1/2, 1/4, 1/4, teacher 3/4, 1/8, 1/8. KL(teacher || student) is 3/4 log 3/2 + 1/4 log 1/2, also
    with ids [[0]].

    Args:
        kind: "forward" is KL(teacher || student), "reverse" KL(student || teacher), "cross_entropy" that of the
            student under the teacher.
        logits: [N, V] of the student, with gradient.
        teacher: [N, U] log-probs of tokens 0..U-1, U <= V; with ids [N, K] log-probs of these.
        ids: int64 [N, K], distinct in a row.
    """
    student, sayable = logits.log_softmax(-1), logits > _NEVER
    teacher = teacher.to(student.dtype)
    if ids is None:
        absent = student.new_full((len(student), student.shape[-1] - teacher.shape[-1]), -torch.inf)
        teacher = torch.cat([teacher, absent], dim=-1).masked_fill(~sayable, -torch.inf)
    else:
        others = torch.log((1 - teacher.exp().sum(-1, keepdim=True)).clamp(min=0))
        teacher = teacher.masked_fill(~sayable.gather(-1, ids), -torch.inf)
        if ids.shape[-1] < student.shape[-1]:
            rest = student.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            student, teacher = torch.cat([student.gather(-1, ids), rest], dim=-1), torch.cat([teacher, others], dim=-1)
        else:
            student = student.gather(-1, ids)
    teacher = teacher.log_softmax(-1)
    if kind == "reverse":
        return _mean(student, student) - _mean(student, teacher.clamp(min=-_MOST))
    if kind not in ("forward", "cross_entropy"):
        raise ValueError(f"algorithm.divergence must be forward, reverse or cross_entropy, got {kind!r}")
    cross = -_mean(teacher, student)
    return cross if kind == "cross_entropy" else _mean(teacher, teacher) + cross


def _mean(law: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[N]: the mean of values [N, K] under a law given by log-probs [N, K]; what has probability 0 adds nothing."""
    weight = law.exp()
    return (weight * value.masked_fill(weight == 0, 0.0)).sum(-1)
