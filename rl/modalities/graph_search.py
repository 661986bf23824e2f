"""Searches over graphs: the discrete denoiser as a `rollouts.search.protocol.GuidedSampler`.

Guidance by a predictor, as in DiffusionNAG (An et al. 2024, arXiv 2305.16943), which adds scale times the gradient of
the predictor to the score of a continuous diffusion model. Graphs are categories here: the log-probabilities of the
clean kinds are tilted by scale times the gradient of the predictor at them, and Bayes' rule makes the step of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rl.modalities.graph_engine import GraphEngine, GraphTrajectory, chosen
from rl.models.graph_policy import drawn, kept
from rollouts.samplers.noise import CHOICE_STREAM, TOKEN_STREAM, uniform
from rollouts.search.protocol import ArrayStates, Budget


@dataclass(frozen=True)
class GraphStates(ArrayStates):
    """B states.

    Attributes:
        states: int64 [B, T + 1, S], up to entry `at`; zeros after it.
    """

    states: np.ndarray


class GraphSampler:
    """On an engine's model, steps and device; a search that only starts and finishes draws the engine's samples."""

    random_start = True

    def __init__(self, engine: GraphEngine, prompts: Sequence[str]):
        self.engine, self.budget, self.steps = engine, Budget(), engine.options.num_inference_steps
        self.asked = np.array([engine.prompts.index(prompt) for prompt in prompts])

    def start(self, row: np.ndarray, seed: np.ndarray) -> GraphStates:
        first = drawn(self.engine.model.limit, self._draws(seed, 0)).cpu().numpy()
        states = np.zeros((len(row), self.steps + 1, first.shape[1]), dtype=np.int64)
        states[:, 0] = first
        zeros = np.zeros(len(row), dtype=np.int64)
        return GraphStates(np.asarray(row), zeros, np.asarray(seed), np.zeros((len(row), self.steps)), states)

    def join(self, parts: Sequence[GraphStates]) -> GraphStates:
        return GraphStates.join(parts)

    def keys(self, states: GraphStates) -> list[Any]:
        """What is left to denoise depends on where a state stands alone."""
        here = states.states[np.arange(len(states)), states.at]
        return [(int(r), int(a), s.tobytes()) for r, a, s in zip(states.row, states.at, here, strict=True)]

    def step(self, states: GraphStates) -> GraphStates:
        return self._branch(states, states.seed[:, None])

    def candidates(self, states: GraphStates, seed: np.ndarray) -> GraphStates:
        return self._branch(states, np.asarray(seed))

    def x0_hat(self, states: GraphStates) -> GraphStates:
        """The likeliest clean kind of every place; the steps between are not in the record."""
        whole, at = states.states.copy(), states.at.copy()
        for _, place, clean, _, _ in self._clean(states):
            whole[place, -1], at[place] = clean.argmax(-1).cpu().numpy(), self.steps
        return replace(states, states=whole, at=at)

    def renoise(self, states: GraphStates, num_steps: int, seed: np.ndarray) -> GraphStates:
        """Back by `num_steps` steps (at most to the start), by the noise of the model.

        The record of the state there is its log-prob under the policy's own step to it.
        """
        back = np.maximum(states.at - num_steps, 0)
        level = [torch.from_numpy(1 - at / self.steps) for at in (states.at, back)]
        stays = (kept(level[1]) / kept(level[0])).numpy()[:, None]
        fresh = drawn(self.engine.model.limit, self._draws(seed, 0)).cpu().numpy()
        rows, whole, logprob = np.arange(len(states)), states.states.copy(), states.logprob.copy()
        still = uniform(self._put(seed)[:, None], torch.tensor(0), self._places(), CHOICE_STREAM).cpu().numpy() < stays
        there = np.where(still, whole[rows, states.at], fresh)
        whole[np.arange(self.steps + 1) > back[:, None]] = 0
        logprob[np.arange(self.steps) >= back[:, None]] = 0
        whole[rows, back] = there
        moved = replace(states, at=back, seed=np.asarray(seed), states=whole, logprob=logprob)
        later = np.flatnonzero(back > 0)
        before = replace(moved.select(later), at=back[later] - 1)
        for index, place, clean, here, t in self._clean(before):
            kinds = self.engine.model.posterior(clean, here, t, self.steps)
            own = chosen(kinds, self._put(there[later[place]])).log().sum(-1)
            logprob[later[place], index] = own.cpu().numpy()
        return moved

    def reseed(self, states: GraphStates, seed: np.ndarray) -> GraphStates:
        return replace(states, seed=np.asarray(seed))

    def perturb(self, states: GraphStates, share: float, seed: np.ndarray) -> GraphStates:
        """Initial states of which a share of the places is drawn anew; the noise of later steps stays as it is."""
        assert not np.any(states.at), "neighbours are those of initial noise"
        again = uniform(self._put(seed)[:, None], torch.tensor(0), self._places(), CHOICE_STREAM).cpu().numpy() < share
        whole = states.states.copy()
        whole[:, 0] = np.where(again, self.start(states.row, seed).states[:, 0], whole[:, 0])
        return replace(states, states=whole)

    def trajectories(self, states: GraphStates) -> list[GraphTrajectory]:
        assert bool(states.done.all())
        rows = zip(states.states, states.logprob, self.asked[states.row], strict=True)
        return [GraphTrajectory(own, logprob, int(prompt)) for own, logprob, prompt in rows]

    def guided_step(
        self, states: GraphStates, gradient: Callable[[torch.Tensor, Any], torch.Tensor], scale: float
    ) -> tuple[GraphStates, np.ndarray]:
        """One step from clean kinds of probability p exp(scale d reward / d p), normalised; see the module.

        Log-probs of the record are the policy's.
        """
        model, ratio = self.engine.model, np.zeros(len(states))
        whole, logprob, at = states.states.copy(), states.logprob.copy(), states.at.copy()
        for index, place, clean, here, t in self._clean(states):
            slope = gradient(clean, states.select(place))
            guided = tilted(clean, slope, scale)
            own, proposal = (model.posterior(kinds, here, t, self.steps) for kinds in (clean, guided))
            after = drawn(proposal, self._draws(states.seed[place], index + 1))
            density, other = (chosen(kinds, after).log().sum(-1).cpu().numpy() for kinds in (own, proposal))
            whole[place, index + 1], logprob[place, index] = after.cpu().numpy(), density
            ratio[place], at[place] = density - other, index + 1
        return replace(states, states=whole, logprob=logprob, at=at), ratio

    def _branch(self, states: GraphStates, seed: np.ndarray) -> GraphStates:
        """k next states of each, one for every column of seeds [B, k], from one forward; candidates together."""
        count = seed.shape[1]
        moved = states.select(np.repeat(np.arange(len(states)), count))
        seeds = np.where(moved.done, moved.seed, seed.reshape(-1))
        whole, logprob, at = moved.states.copy(), moved.logprob.copy(), moved.at.copy()
        for index, place, clean, here, t in self._clean(states):
            kinds = self.engine.model.posterior(clean, here, t, self.steps).repeat_interleave(count, 0)
            rows = (place[:, None] * count + np.arange(count)).reshape(-1)
            after = drawn(kinds, self._draws(seeds[rows], index + 1))
            whole[rows, index + 1], at[rows] = after.cpu().numpy(), index + 1
            logprob[rows, index] = chosen(kinds, after).log().sum(-1).cpu().numpy()
        return GraphStates(moved.row, at, seeds, logprob, whole)

    @torch.no_grad()
    def _clean(self, states: GraphStates) -> list[tuple[int, np.ndarray, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Steps taken, the unfinished states [n] that took them, their clean kinds [n, S, K], states [n, S], t [n]."""
        found, size = [], self.engine.max_batch_size
        for index in np.unique(states.at[~states.done]):
            every = np.flatnonzero(states.at == index)
            for place in np.split(every, range(size, len(every), size)):
                here, asked = self._put(states.states[place, index]), self._put(self.asked[states.row[place]])
                t = torch.full_like(asked, self.steps - int(index))
                clean = self.engine.model(here, t / self.steps, asked).double().softmax(-1)
                found.append((int(index), place, clean, here, t))
                self.budget.denoiser_evaluations += len(place)
        return found

    def _draws(self, seed: np.ndarray, step: int) -> torch.Tensor:
        return uniform(
            self._put(seed)[:, None], torch.tensor(step, device=self.engine.device), self._places(), TOKEN_STREAM
        )

    def _places(self) -> torch.Tensor:
        return torch.arange(len(self.engine.model.limit), device=self.engine.device)

    def _put(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.engine.device)


def tilted(clean: torch.Tensor, slope: torch.Tensor, scale: float) -> torch.Tensor:
    """[B, S, K]: probabilities proportional to clean exp(scale slope)."""
    return (clean.log() + scale * slope).softmax(-1)
