"""A modality in one file: graphs of atoms and bonds, denoised from uniform noise; graphs.md goes through it.

Discrete diffusion with uniform noise (Austin et al. 2021, arXiv 2107.03006) on nodes and edges, as in DiGress (Vignac
et al. 2023, arXiv 2209.14734). A state holds one kind for every atom and one for every pair of atoms. Noise at time t
of T keeps a kind with probability 1 - t/T and else draws one of the K kinds.

Shape legend: B graphs, U scored steps, N atoms, P = N (N - 1) / 2 pairs, S = N + P places of a state, K kinds, T steps.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from rl.estimators.base import Scores
from rl.estimators.latent_rows import LatentRows
from rl.modalities.base import Modality
from rl.recipes.base import Recipe
from rollouts.engines.base import BatchedEngine, EngineStats, SampleRequest
from rollouts.samplers.noise import TOKEN_STREAM, uniform

ATOMS = ("C", "N", "O", "F")
BONDS = ("none", "single", "double", "triple")
K = 4


# The model: which kind every place had before the noise.


class GraphModel(nn.Module):
    """Logits [B, S, K] of the clean kinds; the numbering of the atoms does not matter to it."""

    def __init__(self, num_atoms: int, width: int = 64):
        super().__init__()
        self.pairs = list(itertools.combinations(range(num_atoms), 2))
        self.num_atoms, self.num_places = num_atoms, num_atoms + len(self.pairs)
        self.atom, self.bond, self.prompt = (nn.Embedding(K, width) for _ in range(3))
        self.time = nn.Linear(1, width)
        self.message = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.atom_head, self.bond_head = (
            nn.Sequential(nn.SiLU(), nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, K)) for _ in range(2)
        )

    def forward(self, state: torch.Tensor, left: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """
        Args:
            state: int64 [B, S], atoms first.
            left: [B], t / T of the state.
            prompt: int64 [B], the kind of bond that is asked for.
        """
        first, second = torch.tensor(self.pairs, device=state.device).T
        given = self.prompt(prompt) + self.time(left.float()[:, None])
        atom, bond = self.atom(state[:, : self.num_atoms]), self.bond(state[:, self.num_atoms :])
        # A pair sees its atoms in no order, and an atom sees the sum over its pairs.
        two = torch.stack([atom[:, first], atom[:, second]])
        message = self.message(torch.cat([two.sum(0), two.prod(0), bond + given[:, None]], dim=-1))
        heard = torch.zeros_like(atom).index_add(1, first, message).index_add(1, second, message)
        atoms = self.atom_head(torch.cat([atom + given[:, None], heard / self.num_atoms], dim=-1))
        return torch.cat([atoms, self.bond_head(torch.cat([two.prod(0) + given[:, None], message], dim=-1))], dim=1)


def next_kinds(
    model: GraphModel, state: torch.Tensor, t: torch.Tensor, num_steps: int, prompt: torch.Tensor
) -> torch.Tensor:
    """float64 [B, S, K]: probabilities of every place's kind at time t - 1, given the state at time t (int64 [B]).

    The sum over clean kinds k of p(k) q(kind at t - 1 | state, k). Sampler and learner both call this function.
    """
    clean = model(state, t / num_steps, prompt).double().softmax(-1)
    kept, kept_before = (1 - t.double()[:, None, None] / num_steps for t in (t, t - 1))
    here = nn.functional.one_hot(state, K).double()
    step = kept / kept_before  # what one step of noise keeps
    weight = clean / (kept * here + (1 - kept) / K)
    before = kept_before * weight + (1 - kept_before) / K * weight.sum(-1, keepdim=True)
    return (step * here + (1 - step) / K) * before


# Sampler: its options, its record, its engine.


class GraphOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    num_inference_steps: int = Field(4, ge=1, description="Denoising steps (T).")
    num_atoms: int = Field(5, ge=2, description="Atoms of a graph.")


@dataclass
class GraphTrajectory:
    """One rollout.

    Attributes:
        states: int64 [T + 1, S], noise first.
        logprob: float64 [T], of every step's draw.
        prompt: index of the bond that was asked for.
    """

    states: np.ndarray
    logprob: np.ndarray
    prompt: int
    policy_version: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.logprob)


class GraphEngine(BatchedEngine):
    """A rollout's draws depend on its seed, its step and its place alone, whatever shares the batch."""

    def __init__(self, model: GraphModel, options: GraphOptions, device: torch.device, max_batch_size: int = 256):
        self.model, self.options, self.device = model, options, device
        self.max_batch_size, self.stats = max_batch_size, EngineStats()

    @torch.no_grad()
    def _together(self, requests: Sequence[SampleRequest], policy_version: int) -> list[GraphTrajectory]:
        steps, count = self.options.num_inference_steps, len(requests)
        seed = torch.tensor([request.seed for request in requests], dtype=torch.int64, device=self.device)
        prompt = torch.tensor([BONDS.index(request.prompt) for request in requests], device=self.device)
        place = torch.arange(self.model.num_places, device=self.device)

        def draws(step: int) -> torch.Tensor:
            return uniform(seed[:, None], torch.tensor(step, device=self.device), place, TOKEN_STREAM)

        states, logprobs = [(draws(0) * K).long()], []
        for left in range(steps, 0, -1):
            kinds = next_kinds(self.model, states[-1], torch.full_like(prompt, left), steps, prompt)
            below = kinds.cumsum(-1)[..., :-1]
            states.append((draws(steps - left + 1)[..., None] > below).sum(-1))
            logprobs.append(kinds.gather(-1, states[-1][..., None])[..., 0].log().sum(-1))
        rows, places = count * steps, count * len(place)
        self.stats.add(EngineStats(steps, rows, rows, steps * places, places))
        every, logprob = torch.stack(states, dim=1).cpu().numpy(), torch.stack(logprobs, dim=1).cpu().numpy()
        asked = prompt.tolist()
        return [GraphTrajectory(every[i], logprob[i], asked[i], policy_version) for i in range(count)]


# Learner: the estimator and the recipe.


@dataclass(kw_only=True)
class GraphRows(LatentRows):
    """U recorded steps; `latent` int64 [U, S] is the state before one, `drawn` [U, S] the one after it."""

    drawn: torch.Tensor
    num_steps: int

    def score(self, model: GraphModel) -> Scores:
        kinds = next_kinds(model, self.latent, self.timestep, self.num_steps, self.conditioning["prompt"])
        logprob = kinds.gather(-1, self.drawn[..., None])[..., 0].log().sum(-1)
        return Scores(logprob, -(kinds * kinds.clamp_min(1e-30).log()).sum((-1, -2)))


class GraphPPO(Recipe, defaults={"scale": "std"}):
    """Group advantage and clipped loss, as `Recipe` has them; a decision is a whole denoising step."""

    modality = "graphs"

    def rows(
        self, trajectories: Sequence[Any], model: Any, block: Any = None, steps: Any = None, iteration: int = 0
    ) -> GraphRows:
        count = trajectories[0].num_steps
        owner, step = (torch.arange(len(trajectories) * count) // count, torch.arange(count).repeat(len(trajectories)))
        states = torch.from_numpy(np.stack([t.states for t in trajectories]))
        return GraphRows(
            latent=states[owner, step],
            drawn=states[owner, step + 1],
            timestep=count - step,
            conditioning={"prompt": torch.tensor([t.prompt for t in trajectories])[owner]},
            trajectory=owner,
            step=step,
            num_steps=count,
            sampler_logprob=torch.from_numpy(np.concatenate([t.logprob for t in trajectories])),
        )

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        return trajectory.num_steps


# The modality, and a task.


class Graphs(Modality):
    name = "graphs"
    Options = GraphOptions
    Trajectory = GraphTrajectory

    def new_model(self) -> GraphModel:
        return GraphModel(self.config.sampler.num_atoms)

    def engine(self, model: Any, options: Any, device: torch.device) -> GraphEngine:
        return GraphEngine(model, options, device, self.config.rollout.max_batch_size)

    def completions(self, trajectories: Sequence[GraphTrajectory]) -> list[dict[str, Any]]:
        """{"atoms": ["C", "C", "O"], "bonds": [[0, 1, "single"], ...]}, pairs without a bond left out."""
        count = self.config.sampler.num_atoms
        pairs = list(itertools.combinations(range(count), 2))
        return [
            {
                "atoms": [ATOMS[kind] for kind in t.states[-1][:count]],
                "bonds": [[*pair, BONDS[k]] for pair, k in zip(pairs, t.states[-1][count:], strict=True) if k],
            }
            for t in trajectories
        ]


class BondTask:
    """Asked for a kind of bond, a graph is to have it between all its atoms."""

    modality = Graphs
    reward = f"{__file__}:right_bonds"
    grid = None
    alphabet = None

    def train_examples(self, seed: int, step: int, count: int) -> list[dict[str, Any]]:
        rng = random.Random(f"{seed} {step}")
        return [{"prompt": rng.choice(BONDS[1:])} for _ in range(count)]

    def heldout_examples(self, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """What is held out is the noise a graph starts from."""
        return [{"prompt": BONDS[1 + i % 3]} for i in range(count)]


def right_bonds(prompts: Sequence[str], completions: Sequence[dict[str, Any]], **columns: Any) -> list[float]:
    """Share of the pairs with the bond that is asked for: 0.25 of a graph of noise."""

    def share(prompt: str, atoms: list[str], bonds: list[Any]) -> float:
        return sum(kind == prompt for _, _, kind in bonds) / math.comb(len(atoms), 2)

    return [share(prompt, graph["atoms"], graph["bonds"]) for prompt, graph in zip(prompts, completions, strict=True)]
