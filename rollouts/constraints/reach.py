"""Which tokens every open position may take, given all that is decided: forward and backward reachability.

A token may stand at an open position when some choice for the other open positions makes the whole response a match.
That is exact in any order of decoding: a state is reached from the left over the positions before, and leads to a match
over the positions behind. The masks of two positions say nothing about both together (`ab|ba` allows a and b at both),
so the tokens that one step reveals are drawn from left to right, each under the mask that the ones before it leave
(`Reach.walk`). The positions behind are open then as they were before the step, so one pass from the right serves all.

Legend: B requests, R positions of a response, S states, C classes of tokens, N open positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from rollouts.constraints.automaton import TokenAutomaton
from rollouts.samplers.options import SamplerOptions

# Bound on the entries of [pairs of state sets, C, S] that are made at once.
_CHUNK = 2**26


class Constraint:
    """An automaton on a device, for responses of one length.

    Args:
        length: R, tokens of a response; what is decoded behind them is free.

    Raises:
        ValueError: no response of that length matches.
    """

    def __init__(self, automaton: TokenAutomaton, length: int, mask_token_id: int, device: torch.device | str = "cpu"):
        reason = automaton.refusal(length)
        if reason is not None:
            raise ValueError(f"sampler.constraint cannot be met: {reason}")
        self.automaton, self.length, self.mask_token_id = automaton, length, mask_token_id
        size = automaton.num_states
        # State S is none: nothing leads out of it.
        after = np.pad(automaton.after, ((0, 0), (0, 1)), constant_values=size)
        self.after = torch.from_numpy(after).to(device)
        self.steps = torch.from_numpy(np.pad(automaton.steps(), (0, 1))).to(device, torch.float32)
        self.accepting = torch.from_numpy(np.append(automaton.accepting, False)).to(device, torch.float32)
        self.classes = torch.from_numpy(automaton.classes).to(device)

    def tokens(self, classes: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """bool [N, V]: the tokens of some classes, bool [N, C], among the V of a model's logits."""
        missing = vocab_size - len(self.classes)
        if missing > 0:
            self.classes = torch.nn.functional.pad(self.classes, (0, missing))
        return classes[:, self.classes[:vocab_size]]

    def forced(self) -> np.ndarray:
        """int64 [E, 2]: places in the response, and the one token that every match has there.

        Raises:
            ValueError: it has at every place, so that nothing is left to decide.
        """
        canvas = torch.full((1, self.length), self.mask_token_id, device=self.after.device)
        place = torch.arange(self.length, device=self.after.device)
        classes = self.reach(canvas, torch.zeros(1, dtype=torch.int64, device=canvas.device)).allowed(0 * place, place)
        allowed = self.tokens(classes, len(self.classes))
        found = [(i, int(row.nonzero()[0])) for i, row in enumerate(allowed) if row.sum() == 1]
        if len(found) == self.length:
            raise ValueError("sampler.constraint has one match of sampler.gen_length tokens: nothing is to decide")
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def reach(self, canvas: torch.Tensor, prompt: torch.Tensor) -> Reach:
        """Both passes over B canvases int64 [B, L], whose responses begin at `prompt` int64 [B]."""
        return Reach(self, canvas, prompt)

    def advance(self, states: torch.Tensor, token_class: torch.Tensor, open_: torch.Tensor) -> torch.Tensor:
        """[B, S + 1]: the states that are reached over one more position.

        Args:
            states: float32 [B, S + 1], 1 where a state is reached.
            token_class: int64 [B], of its token.
            open_: bool [B], it is not decided: any token may follow.
        """
        moved = torch.zeros_like(states).scatter_reduce(1, self.after[token_class], states, "amax")
        moved[:, -1] = 0
        return torch.where(open_[:, None], (states @ self.steps > 0).to(states), moved)

    def between(self, before: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        """bool [N, C]: the classes that lead from a state of `before` to one of `behind`, float32 [N, S + 1] each."""
        # Most positions share their two sets of states with others.
        pairs, inverse = torch.unique(torch.cat([before, behind], dim=1), dim=0, return_inverse=True)
        found = [
            (part[:, self.steps.shape[0] :][:, self.after] * part[:, None, : self.steps.shape[0]]).amax(-1) > 0
            for part in pairs.split(max(1, _CHUNK // self.after.numel()))
        ]
        return torch.cat(found)[inverse]


def opened(
    automaton: TokenAutomaton | None, options: SamplerOptions, mask_token_id: int, device: torch.device
) -> Constraint | None:
    """The constraint of an engine, from `options.constraint` as it was compiled.

    Raises:
        ValueError: it was not, or cannot be met.
    """
    if (automaton is None) != (options.constraint is None):
        raise ValueError("sampler.constraint has to be compiled with a tokenizer: give the engine its automaton")
    return None if automaton is None else Constraint(automaton, options.gen_length, mask_token_id, device)


class Reach:
    """What is reachable on some canvases.

    Attributes:
        constraint: whose automaton it is.
        prompt: int64 [B].
        forward: float32 [R + 1, B, S + 1], 1 where a state is reached before a position.
        backward: float32 [R + 1, B, S + 1], 1 where a state before a position leads to a match.
    """

    def __init__(self, constraint: Constraint, canvas: torch.Tensor, prompt: torch.Tensor):
        self.constraint, self.prompt = constraint, prompt
        index = prompt[:, None] + torch.arange(constraint.length, device=canvas.device)
        tokens = canvas.gather(1, index)
        self._open = (tokens == constraint.mask_token_id).T
        largest = torch.where(self._open.T, 0, tokens)
        self._class = constraint.classes[largest].T
        states = torch.zeros(len(canvas), len(constraint.accepting), device=canvas.device)
        states[:, constraint.automaton.start] = 1
        forward, backward = [states], [constraint.accepting.expand_as(states)]
        for own, open_ in zip(self._class, self._open, strict=True):
            forward.append(constraint.advance(forward[-1], own, open_))
        for own, open_ in zip(self._class.flip(0), self._open.flip(0), strict=True):
            behind = backward[-1]
            led = (behind @ constraint.steps.T > 0).to(behind)
            backward.append(torch.where(open_[:, None], led, behind.gather(1, constraint.after[own])))
        self.forward, self.backward = torch.stack(forward), torch.stack(backward[::-1])

    def allowed(self, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """bool [N, C]: the classes of tokens that positions of the canvas may take, one at a time.

        Raises:
            ValueError: there is none.
        """
        place = position - self.prompt[row]
        free = place >= self.constraint.length
        at = torch.where(free, 0, place)
        found = self.constraint.between(self.forward[at, row], self.backward[at + 1, row]) | free[:, None]
        if not bool(found.any(-1).all()):
            first = int((~found.any(-1)).nonzero()[0])
            raise ValueError(
                f"sampler.constraint leaves no token for position {int(place[first])} of response {int(row[first])}: "
                "the tokens that are decided already contradict it"
            )
        return found

    def walk(self, row: np.ndarray, position: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """Positions that are decided one after the other, from left to right.

        Args:
            row, position: int64 [N], one entry per decision.

        Yields:
            indices int64 [n] of decisions that are taken now, at one place of different rows; the classes bool [n, C]
            that they may take; and int64 [n], into which the caller writes the classes that they took.
        """
        rows = np.unique(row)
        prompt = self.prompt.cpu().numpy()
        place = position - prompt[row]
        at = torch.from_numpy(rows).to(self.prompt.device)
        states = self.forward[0, at]
        for step in range(self.constraint.length):
            token_class, open_ = self._class[step, at].clone(), self._open[step, at].clone()
            now = np.flatnonzero(place == step)
            if len(now):
                own = torch.from_numpy(np.searchsorted(rows, row[now])).to(at.device)
                taken = torch.zeros_like(own)
                yield now, self.constraint.between(states[own], self.backward[step + 1, at[own]]), taken
                token_class[own], open_[own] = taken, False
            states = self.constraint.advance(states, token_class, open_)
        beyond = np.flatnonzero(place >= self.constraint.length)
        if len(beyond):
            taken = torch.zeros(len(beyond), dtype=torch.int64, device=at.device)
            yield beyond, torch.ones(len(beyond), len(self.constraint.after), dtype=torch.bool, device=at.device), taken
