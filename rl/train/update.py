"""RL steps of a policy-gradient recipe: rollouts -> advantage -> micro-batches -> loss -> optimizer updates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rl import distributed
from rl.estimators.base import Scores, Verdicts
from rl.losses.aggregate import weighted_sum
from rl.losses.value import clipped_value_loss
from rl.models import routing
from rl.recipes.base import Recipe
from rl.train.contract import checked_advantage, checked_loss
from rl.train.learner import Learner, TrainingError
from rl.train.microbatch import Cutter, MicroBatch
from rl.train.rollouts import RolloutSource, ScoredRollouts, joined_groups, padded, rollout_metrics, sample_lines
from rl.train.run import Costs, Run
from rl.values.model import Policy, PolicyWithValue, ValueModel
from rl.values.targets import explained_variance
from rollouts.engines.base import StaleVersionError


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


class Updater:
    """What takes the RL steps of a run; a subclass says how.

    Attributes:
        sampling: the run's model as the learner wraps it; it has the weights of the last update and samples.
        learners: name -> learner; all of them are saved in checkpoints.
        memory: what the recipe remembers from step to step, None for most; it is saved, too.
    """

    def __init__(self, run: Run, sampling: nn.Module, total_updates: int):
        """
        Args:
            total_updates: length of the learning-rate schedule.
        """
        self.run, self.train, self.sampling = run, run.config.train, sampling
        self.learner = Learner(sampling, self.train.deepspeed, self.train.optimizer, total_updates, run.device)
        self.learners = {"policy": self.learner}
        self.memory: Any = None
        # Also before the first step: the learner may compute in another precision than the model was loaded in.
        self.learner.copy_weights_into(sampling)

    def step(self, step: int) -> StepOutcome:
        """Take RL step `step` (0, 1, ...)."""
        raise NotImplementedError

    def resumed(self, step: int) -> None:
        """Called when the learners hold the weights after `step` steps."""
        self.learner.copy_weights_into(self.sampling)


class PolicyUpdater(Updater):
    """Applies a recipe to the rollouts of a step."""

    def __init__(self, source: RolloutSource, recipe: Recipe, total_updates: int, resumed: bool = False):
        """
        Args:
            total_updates: length of the learning-rate schedules.
            resumed: the run goes on from a checkpoint, which the loop loads into the learners.
        """
        run, config, critic = source.run, source.run.config, recipe.critic()
        recipe.prepare(run)
        # The frozen policy is the one RL started from, also after a resume.
        self.reference = run.starting_policy(resumed) if recipe.needs_reference else None
        if recipe.needs_log_ratio and config.filters.drop_zero_variance:
            raise ValueError(
                "filters.drop_zero_variance leaves prompts without their KL to the reference: set it to false for this "
                "recipe"
            )
        shared = critic is not None and critic.share_backbone
        super().__init__(run, PolicyWithValue(run.model) if shared else Policy(run.model), total_updates)
        self.source, self.recipe, self.cutter = source, recipe, Cutter(run, recipe)
        self.routers = routing.routers(self.learner.module)
        # None with critic options means that the policy carries the value head.
        self.critic_options = critic
        self.critic: Learner | None = None
        if critic and not critic.share_backbone:
            self.critic = self.learners["value"] = Learner(
                ValueModel(run.model), self.train.deepspeed, critic.optimizer, total_updates, run.device
            )
        if self.train.block_schedule and run.model.attention != "block_causal":
            raise ValueError("train.block_schedule needs a block-causal model: this one attends fully")
        self.memory = recipe.memory()
        # A ratio to the sampler's own log-probs needs no correction for other weights, whatever the lag.
        other = config.rollout.asynchronous or config.rollout.quantize != "none"
        corrects = other and recipe.old_logprob != "sampler"
        self.max_weight = config.rollout.max_importance_weight if corrects else None
        if self.max_weight is not None:
            smallest = run.modality.smallest_trajectory(run.model)
            if recipe.rows([smallest], run.model).sampler_logprob is None:
                raise ValueError(
                    "rollout.asynchronous and rollout.quantize correct for the weights that sampled by the log-probs "
                    "that the sampler recorded, and this recipe scores other states: set rollout.max_importance_weight "
                    "to null to go without"
                )

    def step(self, step: int) -> StepOutcome:
        """Sample the rollouts of an RL step, score them, and learn from them."""
        tick = time.perf_counter()
        self._use_blocks(step)
        pushed = self.source.push_seconds
        rollouts = self.source.sample(step, self.learner.updates)
        self.recipe.look_at(self.run, rollouts)
        pushed = self.source.push_seconds - pushed
        rolled = time.perf_counter()
        waited = rolled - tick - rollouts.reward_seconds - pushed
        metrics = rollout_metrics(rollouts, self.run.device) | self._lag(rollouts, waited)
        metrics |= self.update(rollouts, step, int(metrics.get("rollout/lag_max", 0)))
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
        most = int(distributed.reduce_number(max(lags, default=0), "max", device))
        limit = self.run.config.staleness_limit()
        if most > limit:
            raise StaleVersionError(
                f"rollouts were sampled {most} updates ago, more than rollout.max_staleness ({limit})"
            )
        total = distributed.sum_metrics({"lag": sum(lags), "rollouts": len(lags)}, device)
        return {
            "rollout/lag": total["lag"] / max(total["rollouts"], 1),
            "rollout/lag_max": most,
            "speed/overlap": max(0.0, 1 - waited / max(rollouts.stats.seconds, 1e-9)),
        }

    def resumed(self, step: int) -> None:
        super().resumed(step)
        self._use_blocks(max(step - 1, 0))

    def _use_blocks(self, step: int) -> None:
        blocks = self.train.blocks_at(step)
        if blocks is not None:
            # The model that is saved decodes with the block length it was last sampled with.
            self.run.modality.rollout_block = self.run.model.config.block_length = blocks.rollout
            self.cutter.block_length = blocks.train

    def update(self, rollouts: ScoredRollouts, step: int, lag: int = 0) -> dict[str, float]:
        """Take `updates_per_step x epochs` optimizer updates.

        Args:
            lag: most updates by which the weights that sampled are behind the learner's.

        Returns:
            metrics over all ranks; the log-prob gap is measured before the first update.

        Raises:
            TrainingError: a value is not finite, or sampler and learner disagree beyond
                `train.max_logprob_gap`.
        """
        self.spent, self.means = Costs(), distributed.Means()
        routing.count_loads(self.routers)
        # There also when nothing is learned from.
        for name in ("decisions", *(["lag_weight", "lag_truncated"] if self.max_weight is not None else [])):
            self.means.add(f"policy/{name}", 0.0, 0)
        # Older weights than the learner's make a gap that is no mistake.
        self.measures_gap, self.gap_max = not lag, 0.0
        before, norms, value_norms = self.learner.updates, [], []
        passes = self.cutter.passes(rollouts, self.advantages(rollouts, step))
        spare = self.cutter.spare(rollouts)
        # All are prepared before the first update, also those of a random estimator's later passes.
        self._prepare([batch for updates in passes for update in updates for batch in update], spare)
        for epoch in range(self.train.epochs):
            for batches in passes[epoch % len(passes)]:
                if self.critic is not None:
                    value_norms.append(self.critic.update(batches, self.value_loss, spare))
                norms.append(self.learner.update(batches, self.policy_loss, spare))
                if len(norms) == 1:
                    self._check_gap()
        self.run.spend(self.spent)
        self.run.costs.updates += self.learner.updates - before
        metrics = self.means.reduced() | {"policy/grad_norm": sum(norms) / len(norms)}
        metrics |= {name: metrics[name] / len(norms) for name in ("loss/total", "value/loss") if name in metrics}
        if value_norms:
            metrics["value/grad_norm"] = sum(value_norms) / len(value_norms)
        # Without decisions, or with an estimator that scores other states than were sampled, there is no gap.
        if "policy/logprob_gap" in metrics:
            metrics["policy/logprob_gap_max"] = self.gap_max
        metrics |= routing.load_metrics(self.routers)
        return metrics | self._value_metrics([batch for update in passes[0] for batch in update])

    def advantages(self, rollouts: ScoredRollouts, step: int) -> torch.Tensor:
        """[M] or [M, T] of this rank; the recipe sees the verdicts on the rollouts of all ranks."""
        recipe = self.recipe
        mine = (
            rollouts.reward.tolist(),
            rollouts.group.tolist(),
            rollouts.step_reward or [],
            [recipe.summary(trajectory) for trajectory in rollouts.trajectories],
            self._log_ratio(rollouts) if recipe.needs_log_ratio else [],
        )
        parts = distributed.gather_objects(mine)
        columns = zip(*parts, strict=True)
        reward, _, steps, summaries, log_ratio = ([value for part in column for value in part] for column in columns)
        verdicts = Verdicts(
            torch.tensor(reward, dtype=torch.float64),
            joined_groups(part[1] for part in parts),
            padded(steps) if recipe.needs_step_rewards else None,
            summaries,
            torch.tensor(log_ratio, dtype=torch.float64) if recipe.needs_log_ratio else None,
            step,
            self.memory,
        )
        start = sum(len(part[0]) for part in parts[: distributed.rank()])
        advantage = checked_advantage(recipe, recipe.advantage(verdicts), len(reward))
        return advantage[start : start + len(rollouts.reward)]

    @torch.no_grad()
    def _log_ratio(self, rollouts: ScoredRollouts) -> list[float]:
        """[M] of this rank; see `Verdicts.log_ratio`."""
        assert self.reference is not None
        total = torch.zeros(len(rollouts.trajectories), dtype=torch.float64)
        size = self.train.micro_batch_size
        for start in range(0, len(total), size):
            rows = self.cutter.rows(rollouts.trajectories[start : start + size]).to(self.run.device)
            assert rows.sampler_logprob is not None, "a log-ratio needs an estimator of the sampler's own decisions"
            ratio = rows.sampler_logprob - rows.score(self.reference).logprob.double()
            total.index_add_(0, rows.trajectory.cpu() + start, ratio.cpu())
            self.spent.forwarded(rows)
        self.means.add("policy/path_kl", float(total.sum()) / max(len(total), 1) / distributed.world_size(), 0)
        return total.tolist()

    @torch.no_grad()
    def _prepare(self, batches: Sequence[MicroBatch], spare: MicroBatch) -> None:
        """Fill in what is computed once, under the weights before the first update."""
        if self.recipe.old_logprob == "recompute" or self.max_weight is not None:
            for batch, scores in zip(batches, self._forward(self.learner, batches, spare), strict=True):
                batch.old_logprob = scores.logprob.double()
        if self.recipe.anchor != "none":
            # run.model still has the weights before the first update.
            anchor = self.reference if self.recipe.anchor == "reference" else self.run.model
            for batch in (*batches, spare):
                batch.rows.set_anchor(anchor)
                if self.recipe.anchor == "old" and self.reference is not None:
                    batch.rows.set_reference(self.reference)
                if not batch.spare:
                    self.spent.forwarded(batch.rows)
        elif self.reference is not None and not self.recipe.needs_log_ratio:
            for batch in batches:
                batch.ref_logprob = batch.rows.score(self.reference).logprob.double()
                self.spent.forwarded(batch.rows)
        if self.critic_options is not None:
            learner = self.critic or self.learner
            for batch, output in zip(batches, self._forward(learner, batches, spare), strict=True):
                batch.set_value(output if self.critic else output.value, self.critic_options)
        if self.max_weight is not None:
            for batch in batches:
                weight, truncated = batch.correct_lag(self.max_weight)
                self.means.add("policy/lag_weight", float(weight.sum()), len(weight))
                self.means.add("policy/lag_truncated", float(truncated.sum()), len(weight))

    def _forward(self, learner: Learner, batches: Sequence[MicroBatch], spare: MicroBatch) -> list[Any]:
        """Forward without gradient; every rank runs the same number, since a sharded forward is collective."""
        count = int(distributed.reduce_number(len(batches), "max", self.run.device))
        outputs = [learner.forward(batch.rows) for batch in [*batches, *[spare] * (count - len(batches))]]
        for batch in batches:
            self.spent.forwarded(batch.rows)
        return outputs[: len(batches)]

    def policy_loss(self, batch: MicroBatch) -> torch.Tensor:
        """Score a micro-batch; its share of the update's loss."""
        scores: Scores = self.learner.forward(batch.rows)
        decisions = batch.decisions(scores, self.recipe.old_logprob)
        output = checked_loss(self.recipe, self.recipe.loss(decisions), len(batch.weight))
        loss = output.loss
        if self.critic_options is not None and self.critic is None:
            assert scores.value is not None
            loss = loss + self.critic_options.coef * self._value_terms(scores.value, batch)
        total = weighted_sum(loss, batch.weight)
        if not batch.spare:
            self.spent.forwarded(batch.rows, backward=True)
            self.means.add("loss/total", float(total.detach()), 0)
            self.means.add("policy/decisions", len(loss), 0)
            for name, values in output.metrics.items():
                self.means.add(f"policy/{name}", float(values.double().sum()), len(values))
            if self.measures_gap and batch.rows.sampler_logprob is not None:
                self._measure_gap(scores.logprob.detach(), batch.rows.sampler_logprob)
        return total

    def value_loss(self, batch: MicroBatch) -> torch.Tensor:
        """A micro-batch's share of the critic's loss."""
        assert self.critic is not None
        if not batch.spare:
            self.spent.forwarded(batch.rows, backward=True)
        return weighted_sum(self._value_terms(self.critic.forward(batch.rows), batch), batch.weight)

    def _value_terms(self, value: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        assert self.critic_options is not None and batch.old_value is not None and batch.returns is not None
        old, returns = batch.old_value.to(value.dtype), batch.returns.to(value.dtype)
        terms = clipped_value_loss(value, old, returns, self.critic_options.clip)
        if not batch.spare:
            self.means.add("value/loss", float((terms.detach() * batch.weight).sum()), 0)
        return terms

    def _measure_gap(self, logprob: torch.Tensor, sampler_logprob: torch.Tensor) -> None:
        # In the learner's precision: a float32 learner cannot be nearer than float32 rounding.
        gap = (logprob - sampler_logprob.to(logprob.dtype)).abs()
        self.means.add("policy/logprob_gap", float(gap.double().sum()), len(gap))
        self.gap_max = max(self.gap_max, float(gap.max()))

    def _check_gap(self) -> None:
        """End the measurement after the first update, whose log-probs are those of the weights that sampled."""
        self.measures_gap = False
        self.gap_max = distributed.reduce_number(self.gap_max, "max", self.run.device)
        limit = self.train.max_logprob_gap
        if limit is not None and self.gap_max > limit:
            raise TrainingError(
                f"learner and sampler disagree on a recorded log-prob by {self.gap_max:.3g}, more than "
                f"train.max_logprob_gap ({limit:g}): what is trained is not what was sampled"
            )

    def _value_metrics(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """How well the critic knew the returns before the first update, over all ranks."""
        if self.critic_options is None:
            return {}
        nothing, names = torch.zeros(0, dtype=torch.float64), ("old_value", "returns")
        mine = [torch.cat([nothing, *(getattr(batch, name).cpu() for batch in batches)]) for name in names]
        value, returns = (torch.cat(column) for column in zip(*distributed.gather_objects(mine), strict=True))
        if not len(value):
            return {"value/explained_variance": 0.0, "value/mean": 0.0}
        return {
            "value/explained_variance": float(explained_variance(value, returns)),
            "value/mean": float(value.mean()),
        }
