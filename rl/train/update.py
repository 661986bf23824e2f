"""One RL step of a policy-gradient recipe: rollouts -> advantage -> estimator -> loss -> optimizer updates."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from rl.batch import DecisionBatch
from rl.estimators.base import Rows, Scores, Verdicts
from rl.losses.aggregate import decision_weights, weighted_sum
from rl.losses.value import clipped_value_loss
from rl.recipes.base import Recipe
from rl.train import distributed
from rl.train.learner import Learner, TrainingError
from rl.train.policy import Policy
from rl.train.rollouts import RolloutSource, ScoredRollouts, joined_groups, padded, rollout_metrics, sample_lines
from rl.values.model import PolicyWithValue, ValueModel
from rl.values.targets import explained_variance, outcome_rewards, step_targets
from rollouts.engines.base import StaleVersionError
from rollouts.trajectory import TokenTrajectory


@dataclass
class StepOutcome:
    """What an RL step did.

    Attributes:
        metrics: numbers to log.
        seconds: by stage: rollout, reward, learn, sync (weights to the copy that samples).
        samples: a few samples as plain JSON, for samples.jsonl.
    """

    metrics: dict[str, float]
    seconds: dict[str, float]
    samples: list[dict[str, Any]] = field(default_factory=list)


class Updater(Protocol):
    """What the loop asks of an algorithm. `run.model` samples with the weights of the last update.

    Attributes:
        learners: name -> learner; all of them are saved in checkpoints.
    """

    learners: dict[str, Learner]

    def step(self, step: int) -> StepOutcome:
        """Take RL step `step` (0, 1, ...)."""
        ...

    def resumed(self, step: int) -> None:
        """Called when the learners hold the weights after `step` steps."""
        ...


@dataclass
class MicroBatch:
    """Some trajectories of an update, ready to be scored. U decisions, flat.

    Attributes:
        weight: float64 [U], see `rl/losses/aggregate.py`.
        advantage: [U].
        old_logprob, ref_logprob: [U] or None until they are needed.
        reward, old_value, returns: [U] when there is a critic.
    """

    rows: Rows
    weight: torch.Tensor
    advantage: torch.Tensor
    reward: torch.Tensor | None = None
    old_logprob: torch.Tensor | None = None
    ref_logprob: torch.Tensor | None = None
    old_value: torch.Tensor | None = None
    returns: torch.Tensor | None = None


class PolicyUpdater:
    """Applies a recipe to the rollouts of a step."""

    def __init__(self, source: RolloutSource, recipe: Recipe, total_updates: int, resumed: bool = False):
        """
        Args:
            total_updates: length of the learning-rate schedules.
            resumed: the run goes on from a checkpoint, which the loop loads into the learners.
        """
        run = source.run
        self.source, self.run, self.recipe = source, run, recipe
        self.train = config = run.config.train
        # The frozen policy is the one RL started from, also after a resume.
        self.reference = run.starting_policy(resumed) if recipe.needs_reference else None
        if recipe.needs_log_ratio and run.config.filters.drop_zero_variance:
            raise ValueError(
                "filters.drop_zero_variance leaves prompts without their KL to the reference: set it to false for this "
                "recipe"
            )
        value = self.value_options = recipe.critic()
        # run.model is the copy that samples; it gets the learner's weights after every update.
        self.sampling: nn.Module = PolicyWithValue(run.model) if value and value.share_backbone else Policy(run.model)
        self.learner = Learner(self.sampling, config.deepspeed, config.optimizer, total_updates, run.device)
        # Also before the first step: the learner may compute in another precision than the model was loaded in.
        self.learner.copy_weights_into(self.sampling)
        self.learners = {"policy": self.learner}
        # None with a value option means that the policy carries the head.
        self.critic: Learner | None = None
        if value and not value.share_backbone:
            self.critic = self.learners["value"] = Learner(
                ValueModel(run.model), config.deepspeed, value.optimizer, total_updates, run.device
            )
        if config.block_schedule and run.model.attention != "block_causal":
            raise ValueError("train.block_schedule needs a block-causal model: this one attends fully")
        self.sums: dict[str, float] = defaultdict(float)
        # Set during a block-size curriculum; None scores every trajectory on its own grid.
        self.block_length: int | None = None
        self.rl_step = 0
        # Most updates by which the weights that sampled this step's rollouts are behind the learner's.
        self.lag = 0
        self.memory = recipe.memory()
        # A ratio to the sampler's own log-probs is corrected as it is, whatever the lag.
        rollout = run.config.rollout
        self.max_weight = rollout.max_importance_weight if recipe.old_logprob != "sampler" else None
        if not rollout.asynchronous:
            self.max_weight = None
        if self.max_weight is not None:
            smallest = run.modality.smallest_trajectory(run.model)
            if recipe.rows([smallest], run.model).sampler_logprob is None:
                raise ValueError(
                    "rollout.asynchronous corrects for older weights by the log-probs that the sampler recorded, and "
                    "this recipe scores other states: set rollout.max_importance_weight to null to go without"
                )

    def step(self, step: int) -> StepOutcome:
        """Sample the rollouts of an RL step, score them, and learn from them."""
        tick = time.perf_counter()
        self._use_blocks(step)
        self.rl_step = step
        pushed = self.source.push_seconds
        rollouts = self.source.sample(step, self.learner.updates)
        pushed = self.source.push_seconds - pushed
        rolled = time.perf_counter()
        waited = rolled - tick - rollouts.reward_seconds - pushed
        metrics = rollout_metrics(rollouts, self.run.device) | self._lag(rollouts, waited) | self.update(rollouts)
        learned = time.perf_counter()
        self.learner.copy_weights_into(self.sampling)
        seconds = {
            "rollout": waited,
            "reward": rollouts.reward_seconds,
            "learn": learned - rolled,
            "sync": time.perf_counter() - learned + pushed,
        }
        return StepOutcome(metrics, seconds, sample_lines(self.run, rollouts))

    def _lag(self, rollouts: ScoredRollouts, waited: float) -> dict[str, float]:
        """How old the weights were that sampled; nothing when they are the learner's own.

        Args:
            waited: seconds until the rollouts were there.

        Raises:
            StaleVersionError: they are older than `rollout.max_staleness`.
        """
        device = self.run.device
        if self.source.remote is None:
            return {}
        lags = [self.learner.updates - t.policy_version for t in rollouts.trajectories]
        self.lag = int(distributed.reduce_number(max(lags, default=0), "max", device))
        limit = self.run.config.staleness_limit()
        if self.lag > limit:
            raise StaleVersionError(
                f"rollouts were sampled {self.lag} updates ago, more than rollout.max_staleness ({limit})"
            )
        total = distributed.sum_metrics({"lag": sum(lags), "rollouts": len(lags)}, device)
        return {
            "rollout/lag": total["lag"] / max(total["rollouts"], 1),
            "rollout/lag_max": self.lag,
            "speed/overlap": max(0.0, 1 - waited / max(rollouts.stats.seconds, 1e-9)),
        }

    def resumed(self, step: int) -> None:
        self.learner.copy_weights_into(self.sampling)
        self._use_blocks(max(step - 1, 0))

    def _use_blocks(self, step: int) -> None:
        blocks = self.train.blocks_at(step)
        if blocks is not None:
            # The model that is saved decodes with the block length it was last sampled with.
            self.run.modality.rollout_block = self.run.model.config.block_length = blocks.rollout
            self.block_length = blocks.train

    def update(self, rollouts: ScoredRollouts) -> dict[str, float]:
        """Take `updates_per_step x epochs` optimizer updates.

        Returns:
            metrics over all ranks; the log-prob gap is measured before the first update.

        Raises:
            TrainingError: a value is not finite, or sampler and learner disagree beyond
                `train.max_logprob_gap`.
        """
        self.sums = defaultdict(float)
        before = self.learner.updates
        updates = self._chosen(rollouts)
        spare = self._spare(rollouts)
        # A random estimator has rows of its own for every pass; all are prepared before the first update.
        passes = [
            [self._micro_batches(rollouts, chosen, iteration) for chosen in updates]
            for iteration in range(self.train.epochs if self.recipe.redraw else 1)
        ]
        for chunks in passes:
            for chunk in chunks:
                self._prepare(chunk, spare)
        norms: list[float] = []
        for epoch in range(self.train.epochs):
            for index, chunk in enumerate(passes[epoch % len(passes)]):
                if self.critic is not None:
                    losses = [self._value_loss(batch) for batch in chunk]
                    # Every rank knows the global norm: its share adds up to it once.
                    norm = self.critic.update(losses, self._value_loss(spare, count=False))
                    self.sums["value/grad_norm"] += norm / distributed.world_size()
                first = epoch == index == 0
                losses = [self._policy_loss(batch, measure_gap=first) for batch in chunk]
                norms.append(self.learner.update(losses, self._policy_loss(spare, count=False)))
                if first:
                    self._check_gap()
        work = ("forward_passes", "backward_passes", "sequence_forwards", "tokens_forwarded")
        self.run.spend(**{name: self.sums.pop(name, 0.0) for name in work})
        self.run.costs.updates += self.learner.updates - before
        return self._metrics(norms, passes[0])

    def _advantage(self, rollouts: ScoredRollouts) -> torch.Tensor:
        """[M] or [M, T] of this rank; statistics of the batch are taken over the rollouts of all ranks."""
        own = [self.recipe.summary(t) for t in rollouts.trajectories]
        log_ratio = self._log_ratio(rollouts) if self.recipe.needs_log_ratio else []
        mine = (rollouts.reward.tolist(), rollouts.group.tolist(), rollouts.step_reward or [], own, log_ratio)
        parts = distributed.gather_objects(mine)
        reward, _, steps, summaries, ratio = (
            [x for part in column for x in part] for column in zip(*parts, strict=True)
        )
        start = sum(len(part[0]) for part in parts[: distributed.rank()])
        everything = self.recipe.advantage(
            Verdicts(
                torch.tensor(reward, dtype=torch.float64),
                joined_groups(part[1] for part in parts),
                padded(steps) if self.recipe.needs_step_rewards else None,
                summaries,
                torch.tensor(ratio, dtype=torch.float64) if self.recipe.needs_log_ratio else None,
                self.rl_step,
                self.memory,
            )
        )
        return everything[start : start + len(rollouts.reward)]

    @torch.no_grad()
    def _log_ratio(self, rollouts: ScoredRollouts) -> list[float]:
        """[M] of this rank; see `Verdicts.log_ratio`."""
        assert self.reference is not None
        total = torch.zeros(len(rollouts.trajectories), dtype=torch.float64)
        size = self.train.micro_batch_size
        for start in range(0, len(total), size):
            part = rollouts.trajectories[start : start + size]
            rows = self.recipe.rows(part, self.run.model, self.block_length, None).distinct()
            rows = rows.to(self.run.device)
            assert rows.sampler_logprob is not None, "a log-ratio needs an estimator of the sampler's own decisions"
            ratio = rows.sampler_logprob - rows.score(self.reference).logprob.double()
            total.index_add_(0, rows.trajectory.cpu() + start, ratio.cpu())
            self.sums["forward_passes"] += 1
            self.sums["sequence_forwards"] += rows.num_rows
            self.sums["tokens_forwarded"] += rows.num_tokens
        self.sums["path_kl"] += float(total.sum()) / max(len(total), 1) / distributed.world_size()
        return total.tolist()

    def _chosen(self, rollouts: ScoredRollouts) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """For every update: indices of its trajectories, all advantages [M] or [M, T], all weights [M].

        Prompts are split over the updates, never a prompt's group. Weights count the trajectories of the update
        over all ranks, with those that are left out because their rewards are all equal (`ScoredRollouts.counted`).
        """
        if any(steps is not None for steps in rollouts.process_rewards) and self.value_options is None:
            raise TrainingError("a reward gives per-step values, which need a value model: set algorithm.value")
        advantage = self._advantage(rollouts)
        wanted = ~torch.isnan(advantage)
        valid = rollouts.counted & (wanted if wanted.dim() == 1 else wanted.any(dim=1))
        used = valid & rollouts.keep
        length = torch.tensor(
            [
                self.recipe.num_decisions(t, None if wanted.dim() == 1 else w.numpy())
                for t, w in zip(rollouts.trajectories, wanted, strict=True)
            ]
        )
        chosen = []
        for index in range(self.train.updates_per_step):
            # Every rank holds a multiple of updates_per_step prompts, so a prompt's update is the same on any
            # number of ranks.
            inside = rollouts.group % self.train.updates_per_step == index
            scored = inside & valid
            device = self.run.device
            decisions = distributed.reduce_number(float(length[scored].sum()), "sum", device)
            trajectories = distributed.reduce_number(float(scored.sum()), "sum", device)
            constant = self.run.modality.horizon
            weight = decision_weights(
                self.recipe.aggregation, length, max(decisions, 1.0), max(trajectories, 1.0), constant
            )
            chosen.append(((inside & used).nonzero().flatten().tolist(), advantage, weight))
        return chosen

    def _micro_batches(
        self, rollouts: ScoredRollouts, chosen: tuple[list[int], torch.Tensor, torch.Tensor], iteration: int
    ) -> list[MicroBatch]:
        indices, advantage, weight = chosen
        size, window = self.train.micro_batch_size, self.train.micro_batch_steps
        if window is not None and advantage.dim() == 1:
            raise ValueError("train.micro_batch_steps needs a recipe with an advantage for every step: set it to null")
        parts = [indices[i : i + size] for i in range(0, len(indices), size)]
        batches = []
        for part in parts:
            for own in _windows(advantage[part], window):
                batches.append(self._micro_batch(rollouts, part, own, weight[part], iteration))
        return batches

    def _micro_batch(
        self,
        rollouts: ScoredRollouts,
        indices: list[int],
        advantage: torch.Tensor,
        weight: torch.Tensor,
        iteration: int = 0,
    ) -> MicroBatch:
        trajectories = [rollouts.trajectories[i] for i in indices]
        steps = None if advantage.dim() == 1 else [row.numpy() for row in ~torch.isnan(advantage)]
        rows = self.recipe.rows(trajectories, self.run.model, self.block_length, steps, iteration).distinct()
        owner, step = rows.trajectory, rows.step
        decision_advantage = advantage[owner] if advantage.dim() == 1 else advantage[owner, step]
        weight = weight[owner].double()
        if rows.weight_factor is not None:
            weight = weight * rows.weight_factor
        device = self.run.device
        batch = MicroBatch(
            rows=rows.to(device),
            weight=weight.to(device),
            advantage=decision_advantage.to(device, torch.float64),
        )
        if self.value_options is not None:
            per_step = [rollouts.process_rewards[i] if rollouts.process_rewards else None for i in indices]
            if any(given is not None for given in per_step):
                reward = torch.from_numpy(_process_rewards(trajectories, per_step))
            else:
                outcome = self.recipe.outcome(advantage, rollouts.reward[indices])
                reward = outcome_rewards(outcome, owner, step)
            batch.reward = reward.to(device, torch.float64)
        return batch

    def _spare(self, rollouts: ScoredRollouts) -> MicroBatch:
        """Something to run on a rank that has less to learn from than the others; its loss counts 0 times."""
        nothing = torch.zeros(1, dtype=torch.float64)
        scored = rollouts
        if not rollouts.trajectories:
            smallest = self.run.modality.smallest_trajectory(self.run.model)
            scored = replace(rollouts, trajectories=[smallest], reward=nothing, process_rewards=[])
        spare = self._micro_batch(scored, [0], nothing, nothing)
        spare.old_value = spare.returns = torch.zeros_like(spare.weight)
        spare.old_logprob = spare.ref_logprob = torch.zeros_like(spare.weight)
        return spare

    @torch.no_grad()
    def _prepare(self, chunk: list[MicroBatch], spare: MicroBatch) -> None:
        """Fill in what is computed once, under the weights before the first update."""
        if self.recipe.old_logprob == "recompute" or self.max_weight is not None:
            for batch, scored in zip(chunk, self._forward(self.learner, chunk, spare), strict=True):
                batch.old_logprob = scored.logprob.double()
        if self.recipe.anchor != "none":
            # run.model still has the weights before the first update.
            held = self.reference if self.recipe.anchor == "reference" else self.run.model
            for batch in (*chunk, spare):
                batch.rows.set_anchor(held)  # type: ignore[attr-defined]
                if batch is not spare:
                    self._count(batch)
        elif self.reference is not None and not self.recipe.needs_log_ratio:
            for batch in chunk:
                batch.ref_logprob = batch.rows.score(self.reference).logprob.double()
                self._count(batch)
        if self.value_options is not None:
            learner = self.critic or self.learner
            for batch, scored in zip(chunk, self._forward(learner, chunk, spare), strict=True):
                value = (scored if self.critic else scored.value).double()
                batch.old_value = value
                assert batch.reward is not None
                batch.returns, batch.advantage = step_targets(
                    batch.reward,
                    value,
                    batch.rows.trajectory,
                    batch.rows.step,
                    self.value_options.gamma,
                    self.value_options.lam,
                )

        if self.max_weight is not None:
            for batch in chunk:
                self._correct_lag(batch, self.max_weight)

    def _correct_lag(self, batch: MicroBatch, most: float) -> None:
        """Weigh every decision by how much likelier the policy makes it than the older one that sampled it.

        The weight min(exp(logprob before the first update - the sampler's), most) multiplies the advantage, and so the
        policy term, as a constant: truncated importance sampling beside the clipped ratio of the updates (decoupled
        PPO, Hilton et al. 2021, arXiv 2110.00641).
        """
        assert batch.old_logprob is not None and batch.rows.sampler_logprob is not None
        log_ratio = batch.old_logprob - batch.rows.sampler_logprob.to(batch.old_logprob.dtype)
        weight = log_ratio.clamp(max=math.log(most)).exp()
        batch.advantage = batch.advantage * weight
        self.sums["lag/count"] += len(weight)
        self.sums["lag/weight"] += float(weight.sum())
        self.sums["lag/truncated"] += float((log_ratio > math.log(most)).sum())

    def _forward(self, learner: Learner, chunk: list[MicroBatch], spare: MicroBatch) -> list[Any]:
        """Forward without gradient; every rank runs the same number, since a sharded forward is collective."""
        count = int(distributed.reduce_number(len(chunk), "max", self.run.device))
        outputs = []
        for batch in [*chunk, *[spare] * (count - len(chunk))]:
            outputs.append(learner.engine(batch.rows))
        for batch in chunk:
            self._count(batch)
        return outputs[: len(chunk)]

    def _policy_loss(
        self, batch: MicroBatch, measure_gap: bool = False, count: bool = True
    ) -> Callable[[], torch.Tensor]:
        """A callable that scores a micro-batch and returns its share of the update's loss."""

        def loss() -> torch.Tensor:
            scores: Scores = self.learner.engine(batch.rows)
            logprob = scores.logprob
            old = {
                "sampler": batch.rows.sampler_logprob,
                "recompute": batch.old_logprob,
                "on_policy": logprob.detach(),
            }[self.recipe.old_logprob]
            assert old is not None, f"an estimator of old_logprob {self.recipe.old_logprob} must give it"
            decisions = DecisionBatch(
                logprob=logprob,
                entropy=scores.entropy,
                old_logprob=old.to(logprob.dtype),
                ref_logprob=None if batch.ref_logprob is None else batch.ref_logprob.to(logprob.dtype),
                advantage=batch.advantage.to(logprob.dtype),
                weight=batch.weight,
                trajectory=batch.rows.trajectory,
                step=batch.rows.step,
                kl=scores.kl,
                negative=scores.negative,
            )
            decisions.check()
            output = self.recipe.loss(decisions)
            per_decision = output.loss
            if self.value_options is not None and self.critic is None:
                assert scores.value is not None
                value_loss = self._value_terms(scores.value, batch, count)
                per_decision = per_decision + self.value_options.coef * value_loss
            total = weighted_sum(per_decision, batch.weight)
            if count:
                self.sums["decisions"] += len(logprob)
                self.sums["loss/total"] += float(total.detach())
                for name, values in output.metrics.items():
                    self.sums[f"policy/{name}"] += float(values.double().sum())
                # Older weights than the learner's make a gap that is no mistake.
                if measure_gap and batch.rows.sampler_logprob is not None and not self.lag:
                    # In the learner's precision: a float32 learner cannot be nearer than float32 rounding.
                    gap = (logprob.detach() - batch.rows.sampler_logprob.to(logprob.dtype)).abs()
                    self.sums["gap_sum"] += float(gap.double().sum())
                    self.sums["gap_count"] += len(gap)
                    self.sums["gap_max"] = max(self.sums["gap_max"], float(gap.max()))
                self._count(batch, backward=True)
            return total

        return loss

    def _value_loss(self, batch: MicroBatch, count: bool = True) -> Callable[[], torch.Tensor]:
        """A callable that returns this micro-batch's share of the critic's loss."""

        def loss() -> torch.Tensor:
            assert self.critic is not None
            if count:
                self._count(batch, backward=True)
            return weighted_sum(self._value_terms(self.critic.engine(batch.rows), batch, count), batch.weight)

        return loss

    def _value_terms(self, value: torch.Tensor, batch: MicroBatch, count: bool = True) -> torch.Tensor:
        assert self.value_options is not None and batch.old_value is not None and batch.returns is not None
        old, returns = batch.old_value.to(value.dtype), batch.returns.to(value.dtype)
        terms = clipped_value_loss(value, old, returns, self.value_options.clip)
        if count:
            self.sums["value/loss"] += float((terms.detach() * batch.weight).sum())
        return terms

    def _count(self, batch: MicroBatch, backward: bool = False) -> None:
        self.sums["forward_passes"] += 1
        self.sums["backward_passes"] += backward
        self.sums["sequence_forwards"] += batch.rows.num_rows
        self.sums["tokens_forwarded"] += batch.rows.num_tokens

    def _check_gap(self) -> None:
        limit = self.train.max_logprob_gap
        gap = distributed.reduce_number(self.sums.get("gap_max", 0.0), "max", self.run.device)
        if limit is not None and gap > limit:
            raise TrainingError(
                f"learner and sampler disagree on a recorded log-prob by {gap:.3g}, more than train.max_logprob_gap "
                f"({limit:g}): what is trained is not what was sampled"
            )

    def _metrics(self, norms: list[float], chunks: list[list[MicroBatch]]) -> dict[str, float]:
        device = self.run.device
        gap_max = distributed.reduce_number(self.sums.pop("gap_max", 0.0), "max", device)
        # Ranks without a trajectory lack entries; every rank must reduce the same names.
        names = sorted({name for part in distributed.gather_objects(sorted(self.sums)) for name in part})
        total = distributed.sum_metrics({name: self.sums.get(name, 0.0) for name in names}, device)
        decisions, gaps = total.pop("decisions", 0.0), total.pop("gap_count", 0.0)
        metrics = {
            "policy/grad_norm": sum(norms) / len(norms),
            "policy/decisions": decisions,
        }
        gap = total.pop("gap_sum", 0.0) / max(gaps, 1.0)
        # An estimator that scores other states than were sampled has no gap, and must not seem to have a small one.
        if gaps or (not decisions and not self.lag):
            metrics |= {"policy/logprob_gap": gap, "policy/logprob_gap_max": gap_max}
        if self.max_weight is not None:
            count = max(total.pop("lag/count", 0.0), 1.0)
            metrics["policy/lag_weight"] = total.pop("lag/weight", 0.0) / count
            metrics["policy/lag_truncated"] = total.pop("lag/truncated", 0.0) / count
        if "path_kl" in total:
            metrics["policy/path_kl"] = total.pop("path_kl")
        per_update = [name for name in ("loss/total", "value/loss", "value/grad_norm") if name in total]
        metrics |= {name: total.pop(name) / len(norms) for name in per_update}
        if self.value_options is not None:
            both = [(b.old_value, b.returns) for chunk in chunks for b in chunk]
            value, returns = (
                torch.cat([torch.as_tensor(x) for part in distributed.gather_objects(_lists(column)) for x in part])
                for column in (zip(*both, strict=True) if both else ((), ()))
            )
            metrics["value/explained_variance"] = float(explained_variance(value, returns)) if len(value) else 0.0
            metrics["value/mean"] = float(value.mean()) if len(value) else 0.0
        metrics.update({name: value / max(decisions, 1.0) for name, value in total.items()})
        return metrics


def _windows(advantage: torch.Tensor, steps: int | None) -> list[torch.Tensor]:
    """The advantages [M] or [M, T] cut along T, NaN outside of each part; parts without a trained step are left out."""
    if steps is None:
        return [advantage]
    parts = []
    for start in range(0, advantage.shape[1], steps):
        part = torch.full_like(advantage, torch.nan)
        part[:, start : start + steps] = advantage[:, start : start + steps]
        parts += [] if part.isnan().all() else [part]
    return parts


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
