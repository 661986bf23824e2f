"""Search over noise (Ma et al. 2025, arXiv 2501.09732). Random search is best-of-N.

Zero-order search keeps a pivot noise, judges neighbours of it (a share of the noise redrawn), and moves to the best
when that beats the pivot; when none does, the next round starts from a new pivot, and the best ever is returned.

Search over paths denoises several paths to some step, then again and again noises copies of each back, denoises
them further than that, values where they stand, and keeps the best. For masked diffusion noising back is masking
revealed positions again.

Gradient search moves the noise itself, along the reward's gradient through every step: ascent on
scale * reward - |z|^2 / 2, whose maximum is the likeliest noise z under p(z) exp(scale * reward). It needs latents and
memory for all steps; what is kept is the best sample that was judged.

A search for failures is zero-order search on minus the reward.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from rollouts.search.protocol import Search, SearchProblem, SearchResult, fan, split
from rollouts.search.values import ValuedSearch


class ZeroOrder(Search):
    num_rounds: int = Field(4, ge=1, description="Rounds of neighbours after the first sample.")
    num_neighbours: int = Field(4, ge=1, description="Neighbours of the pivot noise per round.")
    share: float = Field(0.25, gt=0, le=1, description="Share of the noise that a neighbour redraws.")

    def run(self, problem: SearchProblem, row: np.ndarray, seed: np.ndarray) -> SearchResult:
        """One sample per request.

        Cost: (1 + rounds * neighbours) samples, T denoiser and one reward evaluation each, and one more sample for
        every new pivot.
        """
        count, requests = self.num_neighbours, len(row)
        pivot = problem.sampler.start(row, split(seed, 0))
        best = problem.finish(pivot)
        pivot_reward = problem.judge(best)
        reward = pivot_reward.copy()
        for turn in range(self.num_rounds):
            seeds = fan(split(seed, 1, turn), count).reshape(-1)
            copies = pivot.select(np.repeat(np.arange(requests), count))
            neighbours = problem.sampler.perturb(copies, self.share, seeds)
            ends = problem.finish(neighbours)
            rewards = problem.judge(ends).reshape(requests, count)
            first = np.arange(requests) * count + rewards.argmax(1)
            better = rewards.max(1) > pivot_reward
            pivot = _replaced(problem, pivot, better, neighbours.select(first[better]))
            pivot_reward = np.where(better, rewards.max(1), pivot_reward)
            record = rewards.max(1) > reward
            best = _replaced(problem, best, record, ends.select(first[record]))
            reward = np.maximum(reward, rewards.max(1))
            stuck = np.flatnonzero(~better)
            # A new pivot pays only when a round follows.
            if len(stuck) and turn + 1 < self.num_rounds:
                fresh = problem.sampler.start(row[stuck], split(seed[stuck], 2, turn))
                ends = problem.finish(fresh)
                pivot = _replaced(problem, pivot, ~better, fresh)
                pivot_reward[stuck] = problem.judge(ends)
                record = np.zeros(requests, dtype=bool)
                record[stuck] = pivot_reward[stuck] > reward[stuck]
                best = _replaced(problem, best, record, ends.select(np.flatnonzero(record[stuck])))
                reward[stuck] = np.maximum(reward[stuck], pivot_reward[stuck])
        return SearchResult(best, np.arange(requests), reward, problem.budget)


class Failures(ZeroOrder):
    """The sample of lowest reward that zero-order search finds for every prompt; the same options and cost."""

    def run(self, problem: SearchProblem, row: np.ndarray, seed: np.ndarray) -> SearchResult:
        """One sample per request, with its own reward."""
        turned = SearchProblem(problem.sampler, lambda states: -np.asarray(problem.reward(states), dtype=np.float64))
        found = super().run(turned, row, seed)
        return SearchResult(found.states, found.request, -found.reward, found.budget)


class Gradient(Search):
    guided = True
    num_rounds: int = Field(10, ge=1, description="Steps of gradient ascent after the first sample.")
    step_size: float = Field(0.1, gt=0, description="Length of a step, times the gradient.")
    scale: float = Field(1.0, ge=0, description="Factor of the reward against the noise's own log-density.")

    def run(self, problem: SearchProblem, row: np.ndarray, seed: np.ndarray) -> SearchResult:
        """One sample per request. Cost: (1 + 2 rounds) T denoiser and 1 + 2 rounds reward evaluations.

        Raises:
            ValueError: the sampler's noise has no gradient, as that of tokens.
        """
        sampler = problem.sampler
        if not hasattr(sampler, "noise_gradient"):
            raise ValueError("noise_gradient moves continuous noise, which tokens do not have: take noise_zero_order")
        noise = sampler.start(row, seed)
        best = problem.finish(noise)
        reward = problem.judge(best)
        for _ in range(self.num_rounds):
            z = sampler.noise_of(noise)
            slope = sampler.noise_gradient(noise, problem.gradient)
            noise = sampler.with_noise(noise, z + self.step_size * (self.scale * slope - z))
            ends = problem.finish(noise)
            rewards = problem.judge(ends)
            better = rewards > reward
            best = _replaced(problem, best, better, ends.select(np.flatnonzero(better)))
            reward = np.maximum(reward, rewards)
        return SearchResult(best, np.arange(len(row)), reward, problem.budget)


def _replaced(problem: SearchProblem, states, where: np.ndarray, by):  # type: ignore[no-untyped-def]
    """The states with those `where` [B] replaced by the states `by`, in order."""
    place = np.arange(len(states))
    place[where] = len(states) + np.arange(int(where.sum()))
    return problem.sampler.join([states, by]).select(place)


class Paths(ValuedSearch):
    num_paths: int = Field(4, ge=1, description="Paths that are kept.")
    num_renoisings: int = Field(4, ge=1, description="Noised copies made of every path per round.")
    start_steps: int = Field(1, ge=1, description="Denoising steps before the first round.")
    renoise_steps: int = Field(1, ge=1, description="Steps that a copy is noised back by.")
    denoise_steps: int = Field(2, ge=2, description="Steps that a copy is denoised by; more than renoise_steps.")

    @model_validator(mode="after")
    def _moves_on(self) -> Paths:
        if self.denoise_steps <= self.renoise_steps:
            raise ValueError(
                f"denoise_steps ({self.denoise_steps}) must be larger than renoise_steps ({self.renoise_steps})"
            )
        return self

    def run(self, problem: SearchProblem, row: np.ndarray, seed: np.ndarray) -> SearchResult:
        """One sample per request: the best of the paths that are left at the end."""
        value = self.of(problem, 0.0)
        requests, kept, copies = len(row), self.num_paths, self.num_renoisings
        paths = problem.sampler.start(np.repeat(row, kept), fan(split(seed, 0), kept).reshape(-1))
        for _ in range(self.start_steps):
            paths = problem.sampler.step(paths)
        turn = 0
        while not np.all(paths.done):
            seeds = fan(split(seed, 1, turn), kept * copies).reshape(-1)
            moved = paths.select(np.repeat(np.arange(len(paths)), copies))
            ended = moved.done
            # A path that has ended stays as it is, and competes with the others.
            noised = problem.sampler.renoise(moved.select(np.flatnonzero(~ended)), self.renoise_steps, seeds[~ended])
            moved = _replaced(problem, moved, ~ended, noised)
            for _ in range(self.denoise_steps):
                moved = problem.sampler.step(moved)
            values = value(moved, split(seeds, 0)).reshape(requests, kept * copies)
            best = np.sort(np.argsort(-values, axis=1, kind="stable")[:, :kept], axis=1)
            paths = moved.select((np.arange(requests)[:, None] * kept * copies + best).reshape(-1))
            turn += 1
        reward = problem.judge(paths).reshape(requests, kept)
        index = np.arange(requests)
        chosen = reward.argmax(1)
        return SearchResult(paths.select(index * kept + chosen), index, reward[index, chosen], problem.budget)
