"""Pairs of answers from a file in the place of rollouts: `chosen` is preferred to `rejected`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rl import distributed
from rl.tasks.base import Example
from rl.tasks.chat import answer_text, token_ids
from rl.tasks.preferences import SIDES, read_pairs
from rl.train.filters import keep_mask
from rl.train.rollouts import RolloutSource, ScoredRollouts
from rl.train.run import Run
from rollouts.engines.base import EngineStats
from rollouts.latent_trajectory import LatentTrajectory
from rollouts.trajectory import TokenTrajectory


def open_source(run: Run) -> RolloutSource:
    """What gives a run's rollouts: the file of pairs that its recipe names, or the engine of `rollout.engine`."""
    path = run.config.algorithm.preference_file
    if path is None:
        return RolloutSource.open(run)
    return ImagePairSource(run, path) if run.modality.name == "images" else PairSource(run, path)


class PairSource(RolloutSource):
    """Gives the answers of a file instead of sampling: rewards 1 and 0, the prompts in an order of the seed."""

    def __init__(self, run: Run, path: str):
        super().__init__(run)
        self.folder, self.pairs = Path(path).parent, read_pairs(path)
        for number, pair in enumerate(self.pairs, start=1):
            try:
                self._check(pair)
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

    def _check(self, pair: Example) -> None:
        """Raise ValueError for a row that the model cannot take."""
        self._trajectories(pair, 0)

    def _trajectories(self, pair: Example, seed: int) -> list[Any]:
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


class ImagePairSource(PairSource):
    """The same of images: the sides are files, of pictures or (`.npy`) of latents, named from the pairs' folder."""

    def _check(self, pair: Example) -> None:
        """Pictures are opened and not read: a file may name very many."""
        if not isinstance(pair["prompt"], str):
            raise ValueError("a prompt of images must be text")
        for side in SIDES:
            path = self.folder / str(pair[side])
            if not path.is_file():
                raise ValueError(f"there is no file {path} for {side!r}")
            if path.suffix == ".npy":
                found, wanted = np.load(path, mmap_mode="r").shape, tuple(self.run.model.latent_shape)
                if found != wanted:
                    raise ValueError(f"{path} holds latents {list(found)}, the model's are {list(wanted)}")
                continue
            try:
                with Image.open(path) as picture:
                    size = (picture.height, picture.width)
            except OSError as error:
                raise ValueError(f"{path} is no picture that Pillow can open ({error})") from None
            if size != self.run.model.image_size:
                raise ValueError(
                    f"{path} has {size} pixels (height, width), the model's are {self.run.model.image_size}"
                )

    @torch.no_grad()
    def _trajectories(self, pair: Example, seed: int) -> list[Any]:
        """Samples that nobody sampled: finished latents without a step."""
        model, sampler = self.run.model, self.run.config.sampler.record()
        given = {name: rows[0].cpu().numpy() for name, rows in model.encode([pair["prompt"]]).items()}
        none = np.zeros(0)
        return [
            LatentTrajectory(
                latents=latents[None],
                timestep=none,
                coefficients=np.zeros((0, 5)),
                mean=np.zeros((0, *latents.shape), latents.dtype),
                std=none,
                logprob=none,
                conditioning=given,
                seed=np.array([seed + place]),
                sampler=sampler,
            )
            for place, latents in enumerate(map(self._latents, (pair[side] for side in SIDES)))
        ]

    def _latents(self, name: str) -> np.ndarray:
        """float32 [C, H, W] of a file."""
        path, model = self.folder / name, self.run.model
        if path.suffix == ".npy":
            return np.load(path).astype(np.float32)
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L" if model.image_channels == 1 else "RGB"))
        return model.latents_of([pixels])[0].float().cpu().numpy()
