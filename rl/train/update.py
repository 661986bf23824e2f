"""From scored rollouts to optimizer updates: advantage -> estimator -> loss -> step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rl.advantages import zero_variance_groups
from rl.algorithms.options import Recipe
from rl.batch import DecisionBatch
from rl.estimators.dedupe import merge_equal_rows
from rl.estimators.rows import ScoringRows, score_rows
from rl.losses.aggregate import decision_weights, weighted_sum
from rl.losses.value import clipped_value_loss
from rl.train import distributed
from rl.train.learner import Learner, TrainingError
from rl.train.session import ScoredRollouts, Session
from rl.values.targets import explained_variance, outcome_rewards, step_targets
from rollouts.trajectory import TokenTrajectory


@dataclass
class MicroBatch:
    """Some trajectories of an update, ready to be scored. N decisions, flat.

    Attributes:
        weight: float64 [N], see `rl/losses/aggregate.py`.
        advantage, sampler_logprob: [N].
        old_logprob, ref_logprob: [N] or None until they are needed.
        old_value, returns: [N] when there is a critic.
    """

    rows: ScoringRows
    weight: torch.Tensor
    advantage: torch.Tensor
    sampler_logprob: torch.Tensor
    reward: torch.Tensor
    old_logprob: torch.Tensor | None = None
    ref_logprob: torch.Tensor | None = None
    old_value: torch.Tensor | None = None
    returns: torch.Tensor | None = None


class PolicyUpdater:
    """Applies a recipe to the rollouts of a step."""

    def __init__(
        self,
        session: Session,
        recipe: Recipe,
        learner: Learner,
        reference: Any | None = None,
        critic: Learner | None = None,
    ):
        """
        Args:
            reference: frozen model for the KL term.
            critic: learner of a `ValueModel`; None with a critic option means that the policy carries the head.
        """
        self.session, self.recipe, self.learner = session, recipe, learner
        self.reference, self.critic = reference, critic
        self.train = session.config.train
        self.sums: dict[str, float] = defaultdict(float)
        # Set by the loop during a block-size curriculum; None scores every trajectory on its own grid.
        self.block_length: int | None = None

    def step(self, rollouts: ScoredRollouts) -> dict[str, float]:
        """Take `updates_per_step x epochs` optimizer updates.

        Returns:
            metrics over all ranks; the log-prob gap is measured before the first update.

        Raises:
            TrainingError: a value is not finite, or sampler and learner disagree beyond
                `train.max_logprob_gap`.
        """
        self.sums = defaultdict(float)
        before = self.learner.updates
        chunks = [self._micro_batches(rollouts, chosen) for chosen in self._chosen(rollouts)]
        spare = self._spare(rollouts)
        for chunk in chunks:
            self._prepare(chunk, spare)
        norms: list[float] = []
        for epoch in range(self.train.epochs):
            for index, chunk in enumerate(chunks):
                if self.critic is not None:
                    losses = [self._value_loss(batch) for batch in chunk]
                    # Every rank knows the global norm: its share adds up to it once.
                    norm = self.critic.update(losses, self._value_loss(spare))
                    self.sums["value/grad_norm"] += norm / distributed.world_size()
                first = epoch == index == 0
                losses = [self._policy_loss(batch, measure_gap=first) for batch in chunk]
                norms.append(self.learner.update(losses, self._policy_loss(spare, count=False)))
                if first:
                    self._check_gap()
        work = ("forward_passes", "backward_passes", "sequence_forwards", "tokens_forwarded")
        self.session.spend(**{name: self.sums.pop(name, 0.0) for name in work})
        self.session.costs.updates += self.learner.updates - before
        return self._metrics(norms, chunks)

    def _advantage(self, rollouts: ScoredRollouts) -> torch.Tensor:
        """[M] of this rank; statistics of the batch are taken over the rollouts of all ranks."""
        reward: list[float] = []
        group: list[int] = []
        start = offset = 0
        for rank, (values, groups) in enumerate(
            distributed.gather_objects((rollouts.reward.tolist(), rollouts.group.tolist()))
        ):
            start = len(reward) if rank == distributed.rank() else start
            reward += values
            group += [offset + g for g in groups]
            offset = max(group, default=-1) + 1
        everything = self.recipe.advantage(
            torch.tensor(reward, dtype=torch.float64), torch.tensor(group, dtype=torch.int64)
        )
        return everything[start : start + len(rollouts.reward)]

    def _chosen(self, rollouts: ScoredRollouts) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """For every update: indices of its trajectories, all advantages [M], all weights [M].

        Prompts are split over the updates, never a prompt's group. Weights count the trajectories of the update
        over all ranks, with those that are left out because their rewards are all equal: skipping work that
        has no gradient must not change the weights.
        """
        if any(steps is not None for steps in rollouts.table.steps) and self.recipe.value is None:
            raise TrainingError("a reward gives per-step values, which need a value model: set algorithm.value")
        advantage = self._advantage(rollouts)
        valid = ~torch.isnan(advantage)
        used = valid & rollouts.keep
        # Equal rewards carry no gradient and count with it; what any other filter left out is not in the batch.
        flat = zero_variance_groups(rollouts.reward, rollouts.group)
        valid &= rollouts.keep | flat[rollouts.group] if len(flat) else rollouts.keep
        length = torch.tensor([int(t.is_reveal.sum()) for t in rollouts.trajectories])
        chosen = []
        for index in range(self.train.updates_per_step):
            # Every rank holds a multiple of updates_per_step prompts, so a prompt's update is the same on any
            # number of ranks.
            inside = rollouts.group % self.train.updates_per_step == index
            scored = inside & valid
            device = self.session.device
            decisions = distributed.reduce_number(float(length[scored].sum()), "sum", device)
            trajectories = distributed.reduce_number(float(scored.sum()), "sum", device)
            constant = self.session.config.sampler.gen_length
            weight = decision_weights(
                self.recipe.aggregation, length, max(decisions, 1.0), max(trajectories, 1.0), constant
            )
            chosen.append(((inside & used).nonzero().flatten().tolist(), advantage, weight))
        return chosen

    def _micro_batches(
        self, rollouts: ScoredRollouts, chosen: tuple[list[int], torch.Tensor, torch.Tensor]
    ) -> list[MicroBatch]:
        indices, advantage, weight = chosen
        size = self.train.micro_batch_size
        parts = [indices[i : i + size] for i in range(0, len(indices), size)]
        return [self._micro_batch(rollouts, part, advantage[part], weight[part]) for part in parts]

    def _micro_batch(
        self, rollouts: ScoredRollouts, indices: list[int], advantage: torch.Tensor, weight: torch.Tensor
    ) -> MicroBatch:
        trajectories = [rollouts.trajectories[i] for i in indices]
        rows = merge_equal_rows(self.recipe.rows(trajectories, self.session.model, self.block_length))
        rows = rows.to(self.session.device)
        recorded = np.concatenate([t.logprob[t.is_reveal] for t in trajectories])
        owner = rows.trajectory.cpu()
        per_step = [rollouts.table.steps[i] if rollouts.table.steps else None for i in indices]
        if any(steps is not None for steps in per_step):
            reward = torch.from_numpy(_process_rewards(trajectories, per_step))
        else:
            outcome = advantage if self.recipe.value_reward == "advantage" else rollouts.reward[indices]
            reward = outcome_rewards(outcome, owner, rows.step.cpu())
        device = self.session.device
        return MicroBatch(
            rows=rows,
            weight=weight[owner].to(device, torch.float64),
            advantage=advantage[owner].to(device, torch.float64),
            sampler_logprob=torch.from_numpy(recorded).to(device, torch.float64),
            reward=reward.to(device, torch.float64),
        )

    def _spare(self, rollouts: ScoredRollouts) -> MicroBatch:
        """Something to run on a rank that has less to learn from than the others; its loss counts 0 times."""
        nothing = torch.zeros(1, dtype=torch.float64)
        if rollouts.trajectories:
            spare = self._micro_batch(rollouts, [0], nothing, nothing)
        else:
            trajectory = _smallest_trajectory(self.session)
            scored = ScoredRollouts(
                [], [trajectory], [], rollouts.table, nothing, torch.zeros(1, dtype=torch.int64), rollouts.stats,
                torch.ones(1, dtype=torch.bool),
            )  # fmt: skip
            spare = self._micro_batch(scored, [0], nothing, nothing)
        spare.old_value = spare.returns = torch.zeros_like(spare.weight)
        spare.old_logprob = spare.ref_logprob = spare.sampler_logprob
        return spare

    @torch.no_grad()
    def _prepare(self, chunk: list[MicroBatch], spare: MicroBatch) -> None:
        """Fill in what is computed once, under the weights before the first update."""
        if self.recipe.old_logprob == "recompute":
            for batch, scored in zip(chunk, self._forward(self.learner, chunk, spare), strict=True):
                batch.old_logprob = scored[0].double()
        if self.reference is not None:
            for batch in chunk:
                batch.ref_logprob = score_rows(self.reference, batch.rows)[0].double()
                self._count(batch)
        if self.recipe.value is not None:
            learner = self.critic or self.learner
            for batch, scored in zip(chunk, self._forward(learner, chunk, spare), strict=True):
                value = (scored if self.critic else scored[2]).double()
                batch.old_value = value
                batch.returns, batch.advantage = step_targets(
                    batch.reward,
                    value,
                    batch.rows.trajectory,
                    batch.rows.step,
                    self.recipe.value.gamma,
                    self.recipe.value.lam,
                )

    def _forward(self, learner: Learner, chunk: list[MicroBatch], spare: MicroBatch) -> list[Any]:
        """Forward without gradient; every rank runs the same number, since a sharded forward is collective."""
        count = int(distributed.reduce_number(len(chunk), "max", self.session.device))
        outputs = []
        for batch in [*chunk, *[spare] * (count - len(chunk))]:
            outputs.append(learner.engine(batch.rows))
            self._count(batch)
        return outputs[: len(chunk)]

    def _policy_loss(
        self, batch: MicroBatch, measure_gap: bool = False, count: bool = True
    ) -> Callable[[], torch.Tensor]:
        """A callable that scores a micro-batch and returns its share of the update's loss."""

        def loss() -> torch.Tensor:
            scored = self.learner.engine(batch.rows)
            logprob, entropy = scored[:2]
            old = {
                "sampler": batch.sampler_logprob,
                "recompute": batch.old_logprob,
                "on_policy": logprob.detach(),
            }[self.recipe.old_logprob]
            assert old is not None
            decisions = DecisionBatch(
                logprob=logprob,
                entropy=entropy,
                old_logprob=old.to(logprob.dtype),
                ref_logprob=None if batch.ref_logprob is None else batch.ref_logprob.to(logprob.dtype),
                advantage=batch.advantage.to(logprob.dtype),
                weight=batch.weight,
            )
            decisions.check()
            output = self.recipe.loss(decisions)
            per_decision = output.loss
            if self.recipe.value is not None and self.critic is None:
                value_loss = self._value_terms(scored[2], batch, count)
                per_decision = per_decision + self.recipe.value.coef * value_loss
            total = weighted_sum(per_decision, batch.weight)
            if count:
                self.sums["decisions"] += len(logprob)
                self.sums["loss/total"] += float(total.detach())
                for name, values in output.metrics.items():
                    self.sums[f"policy/{name}"] += float(values.double().sum())
                if measure_gap:
                    # In the learner's precision: a float32 learner cannot be nearer than float32 rounding.
                    gap = (logprob.detach() - batch.sampler_logprob.to(logprob.dtype)).abs()
                    self.sums["gap_sum"] += float(gap.double().sum())
                    self.sums["gap_count"] += len(gap)
                    self.sums["gap_max"] = max(self.sums["gap_max"], float(gap.max()))
                self._count(batch, backward=True)
            return total

        return loss

    def _value_loss(self, batch: MicroBatch) -> Callable[[], torch.Tensor]:
        """A callable that returns this micro-batch's share of the critic's loss."""

        def loss() -> torch.Tensor:
            assert self.critic is not None
            self._count(batch, backward=True)
            return weighted_sum(self._value_terms(self.critic.engine(batch.rows), batch), batch.weight)

        return loss

    def _value_terms(self, value: torch.Tensor, batch: MicroBatch, count: bool = True) -> torch.Tensor:
        assert self.recipe.value is not None and batch.old_value is not None and batch.returns is not None
        old, returns = batch.old_value.to(value.dtype), batch.returns.to(value.dtype)
        terms = clipped_value_loss(value, old, returns, self.recipe.value.clip)
        if count:
            self.sums["value/loss"] += float((terms.detach() * batch.weight).sum())
        return terms

    def _count(self, batch: MicroBatch, backward: bool = False) -> None:
        self.sums["forward_passes"] += 1
        self.sums["backward_passes"] += backward
        self.sums["sequence_forwards"] += batch.rows.input_ids.shape[0]
        self.sums["tokens_forwarded"] += batch.rows.num_tokens

    def _check_gap(self) -> None:
        limit = self.train.max_logprob_gap
        gap = distributed.reduce_number(self.sums.get("gap_max", 0.0), "max", self.session.device)
        if limit is not None and gap > limit:
            raise TrainingError(
                f"learner and sampler disagree on a recorded log-prob by {gap:.3g}, more than train.max_logprob_gap "
                f"({limit:g}): what is trained is not what was sampled"
            )

    def _metrics(self, norms: list[float], chunks: list[list[MicroBatch]]) -> dict[str, float]:
        device = self.session.device
        gap_max = distributed.reduce_number(self.sums.pop("gap_max", 0.0), "max", device)
        # Ranks without a trajectory lack entries; every rank must reduce the same names.
        names = sorted({name for part in distributed.gather_objects(sorted(self.sums)) for name in part})
        total = distributed.sum_metrics({name: self.sums.get(name, 0.0) for name in names}, device)
        decisions, gaps = total.pop("decisions", 0.0), total.pop("gap_count", 0.0)
        metrics = {
            "policy/grad_norm": sum(norms) / len(norms),
            "policy/logprob_gap": total.pop("gap_sum", 0.0) / max(gaps, 1.0),
            "policy/logprob_gap_max": gap_max,
            "policy/decisions": decisions,
        }
        per_update = [name for name in ("loss/total", "value/loss", "value/grad_norm") if name in total]
        metrics |= {name: total.pop(name) / len(norms) for name in per_update}
        if self.recipe.value is not None:
            both = [(b.old_value, b.returns) for chunk in chunks for b in chunk]
            value, returns = (
                torch.cat([torch.as_tensor(x) for part in distributed.gather_objects(_lists(column)) for x in part])
                for column in (zip(*both, strict=True) if both else ((), ()))
            )
            metrics["value/explained_variance"] = float(explained_variance(value, returns)) if len(value) else 0.0
            metrics["value/mean"] = float(value.mean()) if len(value) else 0.0
        metrics.update({name: value / max(decisions, 1.0) for name, value in total.items()})
        return metrics


def _lists(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.cpu() for tensor in tensors] or [torch.zeros(0, dtype=torch.float64)]


def _process_rewards(trajectories: list[TokenTrajectory], per_step: list[list[float] | None]) -> np.ndarray:
    """float64 [N]: the reward of each token's denoising step.

    Raises:
        TrainingError: a reward judged another number of steps than the trajectory has.
    """
    parts = []
    for trajectory, steps in zip(trajectories, per_step, strict=True):
        if steps is None or len(steps) != trajectory.num_steps:
            raise TrainingError(
                f"a process reward gave {0 if steps is None else len(steps)} step values for a trajectory of "
                f"{trajectory.num_steps} steps"
            )
        parts.append(np.asarray(steps, dtype=np.float64)[trajectory.step[trajectory.is_reveal]])
    return np.concatenate(parts)


def _smallest_trajectory(session: Session) -> TokenTrajectory:
    """One revealed token, for a rank without rollouts."""
    size = session.model.block_length or 2
    return TokenTrajectory(
        prompt_ids=np.array([0]),
        length=size,
        mask_token_id=session.model.mask_token_id,
        num_steps=1,
        step=np.array([0]),
        position=np.array([1]),
        token=np.array([0]),
        logprob=np.array([0.0]),
        confidence=np.array([1.0]),
        stop_length=1,
        block_length=session.model.block_length,
        sampler=session.config.sampler.distribution(),
    )


def rollout_metrics(rollouts: ScoredRollouts, device: torch.device) -> dict[str, float]:
    """Reward mean with a 95 % interval over prompts, failures and zero-variance groups, over all ranks."""
    reward: list[float] = []
    group: list[int] = []
    for values, groups in distributed.gather_objects((rollouts.reward.tolist(), rollouts.group.tolist())):
        offset = max(group, default=-1) + 1
        reward += values
        group += [g + offset for g in groups]
    rewards, groups = torch.tensor(reward, dtype=torch.float64), torch.tensor(group)
    valid = ~torch.isnan(rewards)
    prompts = [rewards[(groups == g) & valid] for g in range(max(group, default=-1) + 1)]
    means = torch.stack([p.mean() for p in prompts if len(p)] or [torch.tensor(torch.nan, dtype=torch.float64)])
    mean = float(means.mean())
    half = 1.96 * float(means.std(correction=1)) / len(means) ** 0.5 if len(means) > 1 else float("nan")
    return {
        "reward/mean": mean,
        "reward/low": mean - half,
        "reward/high": mean + half,
        "reward/failed": float((~valid).sum()),
        "reward/zero_variance_share": float(zero_variance_groups(rewards, groups).double().mean()),
    }
