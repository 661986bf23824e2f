"""Pairs of answers from a file in the place of rollouts: `chosen` is preferred to `rejected`."""

from __future__ import annotations

import random

import numpy as np
import torch

from rl import distributed
from rl.tasks.base import Example
from rl.tasks.chat import answer_text, token_ids
from rl.tasks.preferences import SIDES, read_pairs
from rl.train.filters import keep_mask
from rl.train.rollouts import RolloutSource, ScoredRollouts
from rl.train.run import Run
from rollouts.engines.base import EngineStats
from rollouts.trajectory import TokenTrajectory


def open_source(run: Run) -> RolloutSource:
    """What gives a run's rollouts: the file of pairs that its recipe names, or the engine of `rollout.engine`."""
    path = run.config.algorithm.preference_file
    return PairSource(run, path) if path else RolloutSource.open(run)


class PairSource(RolloutSource):
    """Gives the answers of a file instead of sampling: rewards 1 and 0, the prompts in an order of the seed."""

    def __init__(self, run: Run, path: str):
        super().__init__(run)
        self.pairs = read_pairs(path)
        for number, pair in enumerate(self.pairs, start=1):
            try:
                self._trajectories(pair, 0)
            except ValueError as error:
                raise ValueError(f"{path}: row {number}: {error}") from None

    def sample(self, step: int, policy_version: int) -> ScoredRollouts:
        run = self.run
        count, seed = run.config.train.prompts_per_step, run.config.run.seed
        chosen = []
        for index in range(step * count, (step + 1) * count):
            epoch, place = divmod(index, len(self.pairs))
            order = list(range(len(self.pairs)))
            random.Random(f"pairs {seed} {epoch}").shuffle(order)
            chosen.append((index, self.pairs[order[place]]))
        _, mine = distributed.shard(chosen)
        trajectories = [t for index, pair in mine for t in self._trajectories(pair, 2 * index)]
        for trajectory in trajectories:
            trajectory.policy_version = policy_version
        reward = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(mine))
        group = torch.arange(len(mine)).repeat_interleave(2)
        overlong = torch.zeros(len(trajectories), dtype=torch.bool)
        keep, counted, filtered = keep_mask(run.config.filters, reward, group, overlong)
        return ScoredRollouts(
            examples=[pair for _, pair in mine for _ in SIDES],
            trajectories=trajectories,
            completions=run.modality.finished(trajectories)[0],
            reward=reward,
            parts=[{} for _ in trajectories],
            group=group,
            keep=keep,
            counted=counted,
            process_rewards=[],
            reward_metrics={},
            filtered=filtered,
            stats=EngineStats(),
            reward_seconds=0.0,
            reward_queries=0,
        )

    def _trajectories(self, pair: Example, seed: int) -> list[TokenTrajectory]:
        """Both sides as finished answers, with an end token behind each where the tokenizer has one."""
        run, tokenizer = self.run, self.run.tokenizer
        eos, chat = tokenizer.eos_token_id, run.config.task.chat
        (prompt,) = run.modality.prompt_ids([pair])
        texts = [answer_text(tokenizer, {"prompt": pair["prompt"], "answer": pair[side]}, chat) for side in SIDES]
        block = run.model.block_length if run.model.attention == "block_causal" else None
        trajectories: list[TokenTrajectory] = []
        for side, answer in zip(SIDES, token_ids(tokenizer, texts), strict=True):
            if eos is not None and answer[-1:] != [eos]:
                answer = [*answer, eos]
            length = -(-(len(prompt) + len(answer)) // (block or 1)) * (block or 1)
            if length > run.model.max_length:
                raise ValueError(
                    f"prompt and {side!r} have {length} tokens, more than the model's {run.model.max_length}"
                )
            unknown = np.full(len(answer), np.nan)
            trajectories.append(
                TokenTrajectory(
                    prompt_ids=np.array(prompt),
                    length=length,
                    mask_token_id=run.model.mask_token_id,
                    num_steps=1,
                    step=np.zeros(len(answer), dtype=np.int64),
                    position=len(prompt) + np.arange(len(answer)),
                    token=np.array(answer),
                    logprob=unknown,
                    confidence=unknown,
                    stop_length=len(answer),
                    block_length=block,
                    sampler=run.config.sampler.distribution(),
                    detail="sample",
                    seed=seed + len(trajectories),
                )
            )
        return trajectories
