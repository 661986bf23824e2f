"""The evaluator: sample answers to problems and judge them.

`accuracy.py` counts the answers and lets them go; `benchmark.py` keeps them in a folder.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewards.run import RewardRunner
from rl.evaluation.generations import BatchCost, Generation
from rl.evaluation.scoring import score
from rl.tasks.base import Example
from rl.train.rollouts import request_seed
from rl.train.run import Run


@dataclass(frozen=True)
class Problem:
    """An example of the task, and how the model is asked.

    Attributes:
        prompt_id: unique among the problems.
        example: what rewards are told; its prompt has no chat markup.
        request: what the engine is given; `seed` is set for every sample.
    """

    prompt_id: str
    example: Example
    request: Any


@dataclass
class Answers:
    """The part of a batch that one rank sampled.

    Attributes:
        generations: in the order they were asked for.
        batch: work and time.
        stats: work of the engine, all zero where nothing was sampled.
        step_reward: float64 [T_i] for each trajectory, with `Evaluator.every_step`.
    """

    generations: list[Generation]
    batch: BatchCost
    stats: dict[str, float]
    step_reward: list[np.ndarray]


@dataclass
class Evaluator:
    """Asks the model of a run, and judges what it answers.

    Attributes:
        rewards: judge the answers.
        seed: base of the seeds of all requests.
        cut: the part of a completion that is judged; None judges all of it.
        unfit: why an engine cannot answer a request, None when it can. Such a generation has the reason and no text.
            Without `unfit` the engine raises.
        every_step: also let the verifier judge the x0 prediction of every denoising step.
    """

    run: Run
    problems: Sequence[Problem]
    rewards: RewardRunner
    seed: int
    cut: Callable[[str], str] | None = None
    unfit: Callable[[Any, Any], str | None] | None = None
    every_step: bool = False

    def ask(self, engine: Any, decoder: str, pairs: Sequence[tuple[int, int]]) -> Answers:
        """Sample and judge.

        Args:
            decoder: name of the engine's decoder.
            pairs: (index of a problem, sample). Seeds depend on nothing else, so they are the same on any number of
                ranks and for every decoder.
        """
        generations: list[Generation] = []
        sampled: list[Generation] = []
        requests, examples = [], []
        for index, sample in pairs:
            problem = self.problems[index]
            request = dataclasses.replace(problem.request, seed=request_seed(self.seed, index, sample))
            reason = self.unfit(engine, request) if self.unfit else None
            made = Generation(decoder, problem.prompt_id, sample, request.seed, "", [], [], 0, False, None, reason)
            generations.append(made)
            if reason is None:
                sampled.append(made)
                requests.append(request)
                examples.append(problem.example)
        trajectories = engine.generate(requests)
        started = time.perf_counter()
        modality = self.run.modality
        completions, columns = modality.finished(trajectories)
        eos = getattr(modality.tokenizer, "eos_token_id", None)
        for i, (made, trajectory) in enumerate(zip(sampled, trajectories, strict=True)):
            made.completion, made.steps = completions[i], trajectory.num_steps
            # Some decoders take several forwards a step.
            made.steps = columns.get("num_forwards", {i: None})[i] or made.steps
            if "completion_ids" in columns:
                made.completion_ids, made.reveal_steps = columns["completion_ids"][i], columns["reveal_steps"][i]
            made.ended = eos in made.completion_ids
        step_reward: list[np.ndarray] = []
        if sampled:
            table = score(self.rewards, self.cut, examples, sampled, columns)
            if self.every_step:
                step_reward, _ = self.run.judge.score_x0(examples, trajectories, completions, table, verifier=True)
        batch = BatchCost(
            decoder,
            len(pairs),
            tokens=sum(len(made.completion_ids) for made in generations),
            seconds=engine.stats.seconds,
            reward_seconds=time.perf_counter() - started,
        )
        return Answers(generations, batch, vars(engine.stats), step_reward)
