"""What the updates of an RL step add up to: the work they took, and the sums behind their metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from rl.estimators.base import Rows
from rl.train import distributed
from rl.train.run import Costs


class Tally:
    """Sums over the micro-batches of one RL step on this rank. The updater adds to it; `metrics` sums over ranks.

    Attributes:
        spent: work of this rank.
        norms, value_norms: gradient norm of every update, of the policy and of the critic.
        gap_max: largest distance of a learner's log-prob from the sampler's, measured before the first update.
    """

    def __init__(self, lag: int, corrects_lag: bool):
        """
        Args:
            lag: most updates by which the weights that sampled are behind the learner's.
            corrects_lag: decisions are weighed for it (`lagged`).
        """
        self.lag, self.corrects_lag = lag, corrects_lag
        self.spent = Costs()
        self.norms: list[float] = []
        self.value_norms: list[float] = []
        self.gap_max = 0.0
        self._sums: dict[str, float] = defaultdict(float)

    def forwarded(self, rows: Rows, backward: bool = False) -> None:
        """Rows went through a model, and back."""
        self.spent.forward_passes += 1
        self.spent.backward_passes += backward
        self.spent.sequence_forwards += rows.num_rows
        self.spent.tokens_forwarded += rows.num_tokens

    def add(self, name: str, value: float) -> None:
        """Add to a metric that is a sum over the step; `loss/...` and `value/...` are divided by the updates."""
        self._sums[name] += value

    def decided(self, rows: Rows, logprob: torch.Tensor, metrics: Mapping[str, torch.Tensor]) -> None:
        """Decisions of one policy loss: their number, their metrics, and the gap, as long as nothing was updated."""
        self._sums["decisions"] += len(logprob)
        for name, values in metrics.items():
            self._sums[f"policy/{name}"] += float(values.double().sum())
        # Older weights than the learner's make a gap that is no mistake.
        if not self.norms and rows.sampler_logprob is not None and not self.lag:
            # In the learner's precision: a float32 learner cannot be nearer than float32 rounding.
            gap = (logprob.detach() - rows.sampler_logprob.to(logprob.dtype)).abs()
            self._sums["gap_sum"] += float(gap.double().sum())
            self._sums["gap_count"] += len(gap)
            self.gap_max = max(self.gap_max, float(gap.max()))

    def lagged(self, weight: torch.Tensor, truncated: torch.Tensor) -> None:
        """Weights [U] that correct for the lag, and bool [U], those that were truncated."""
        self._sums["lag/count"] += len(weight)
        self._sums["lag/weight"] += float(weight.sum())
        self._sums["lag/truncated"] += float(truncated.sum())

    def metrics(self, device: torch.device) -> dict[str, float]:
        """Over all ranks, which must all call this."""
        gap_max = distributed.reduce_number(self.gap_max, "max", device)
        # Ranks without a trajectory lack entries; every rank must reduce the same names.
        names = sorted({name for part in distributed.gather_objects(sorted(self._sums)) for name in part})
        total = distributed.sum_metrics({name: self._sums.get(name, 0.0) for name in names}, device)
        decisions, gaps = total.pop("decisions", 0.0), total.pop("gap_count", 0.0)
        metrics = {"policy/grad_norm": sum(self.norms) / len(self.norms), "policy/decisions": decisions}
        gap = total.pop("gap_sum", 0.0) / max(gaps, 1.0)
        # An estimator that scores other states than were sampled has no gap, and must not seem to have a small one.
        if gaps or (not decisions and not self.lag):
            metrics |= {"policy/logprob_gap": gap, "policy/logprob_gap_max": gap_max}
        if self.corrects_lag:
            count = max(total.pop("lag/count", 0.0), 1.0)
            metrics["policy/lag_weight"] = total.pop("lag/weight", 0.0) / count
            metrics["policy/lag_truncated"] = total.pop("lag/truncated", 0.0) / count
        if "policy/path_kl" in total:
            metrics["policy/path_kl"] = total.pop("policy/path_kl")
        per_update = [name for name in ("loss/total", "value/loss") if name in total]
        metrics |= {name: total.pop(name) / len(self.norms) for name in per_update}
        if self.value_norms:
            metrics["value/grad_norm"] = sum(self.value_norms) / len(self.value_norms)
        return metrics | {name: value / max(decisions, 1.0) for name, value in total.items()}
