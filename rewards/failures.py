"""When too many verdicts of a reward fail, the run stops with the reason."""

from __future__ import annotations

from collections import Counter, deque

from rewards.score import Score

WINDOW = 256  # verdicts over which the share is taken, so that a few failures in a small batch cannot stop a run
WINDOW_MIN = 8


class RewardFailureError(RuntimeError):
    """Too large a share of a reward's verdicts failed; training on the rest would be training on noise."""


class FailureLimit:
    """Watches one reward.

    Args:
        name: the reward, for the message.
        max_share: raise above this share of failures among the latest verdicts; 0 tolerates none, 1 all.
    """

    def __init__(self, name: str, max_share: float) -> None:
        self.name = name
        self.max_share = max_share
        self._recent: deque[Score] = deque(maxlen=WINDOW)

    def book(self, score: Score, batch_size: int) -> None:
        """Count one verdict of a batch of `batch_size`.

        Raises:
            RewardFailureError: one line naming the reward, the share and the commonest reason.
        """
        if batch_size > (self._recent.maxlen or 0):
            self._recent = deque(self._recent, maxlen=batch_size)
        self._recent.append(score)
        if not score.failed:
            return
        reasons = [entry.reason for entry in self._recent if entry.failed]
        # The whole batch counts from its first verdict on, or the order of the completions would decide.
        if len(reasons) > self.max_share * max(len(self._recent), batch_size, WINDOW_MIN):
            reason, count = Counter(reasons).most_common(1)[0]
            raise RewardFailureError(
                f"reward '{self.name}' failed on {len(reasons)} of its latest {len(self._recent)} completions "
                f"(limit {self.max_share:.0%}); commonest reason ({count}x): {reason}"
            )
