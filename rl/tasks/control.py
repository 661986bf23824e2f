"""Control: any gymnasium environment with flat observations; its return is the reward (extra `control`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rewards.address import load_address
from rl.tasks.base import Example

# Seeds that environments are reset with: training's lie behind those of evaluations and demonstrations.
_HELDOUT, _DEMONSTRATIONS, _TRAIN = 0, 10**6, 2 * 10**6


class Space:
    """What an environment takes and shows, as the model needs it.

    An entry of a bounded box of actions is one number in [-1, 1], beyond which it is clipped; or, with `bins`, a choice
    among so many equally spaced values. A choice has an entry for each value, and the largest is done: [-0.9, 0.7, -1]
    does the second of three.

    Attributes:
        size: A, entries of an action.
        choices: values of a choice, 0 where entries are numbers.
        scale: [O], what observations are divided by.
    """

    def __init__(self, name: str, env: Any, bins: int = 0):
        from gymnasium.spaces import Box, Discrete

        space, seen = env.action_space, env.observation_space
        if not (isinstance(seen, Box) and len(seen.shape) == 1):
            raise ValueError(f"task.params.env {name}: observations must be a Box of one dimension, they are {seen}")
        box = isinstance(space, Box) and len(space.shape) == 1 and bool(np.isfinite([space.low, space.high]).all())
        if not (box or isinstance(space, Discrete)):
            raise ValueError(f"task.params.env {name}: actions must be Discrete or a bounded 1-D Box, they are {space}")
        if bins == 1 or (bins and not box):
            raise ValueError(f"sampler.bins {bins}: at least 2, of a Box; set it to 0 for {name}, which takes {space}")
        self.box, self.space = box, space
        self.choices = bins if box else int(space.n)
        self.size = (len(space.low) if box else 1) * max(1, self.choices)
        largest = np.maximum(np.abs(seen.low), np.abs(seen.high))
        # Some environments write "no bound" as the largest float.
        self.scale = np.where(largest < 1e6, np.maximum(largest, 1e-6), 1.0)

    def to_env(self, action: np.ndarray) -> Any:
        """What the environment takes, from [A]."""
        if not self.box:
            return self.space.start + int(action.argmax())
        if self.choices:
            action = 2 * action.reshape(-1, self.choices).argmax(1) / (self.choices - 1) - 1
        low, high = self.space.low, self.space.high
        return (low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)).astype(self.space.dtype)

    def from_env(self, action: Any) -> np.ndarray:
        """[A] that `to_env` maps to the action, or to the nearest one there is."""
        if not self.box:
            return self._choice(int(action) - self.space.start)
        scaled = 2 * (np.asarray(action, dtype=float) - self.space.low) / (self.space.high - self.space.low) - 1
        return self._choice(np.rint((scaled + 1) / 2 * (self.choices - 1))) if self.choices else scaled

    def _choice(self, index: Any) -> np.ndarray:
        return (2.0 * (np.asarray(index)[..., None] == np.arange(self.choices)) - 1).ravel()


class ControlTask:
    """Prompt "17": the episode that the environment begins when it is reset with seed 17."""

    modality = "actions"
    reward = None
    grid = None
    alphabet = None

    def __init__(
        self, env: str = "Pendulum-v1", expert: str = "rl.tasks.control:weak_pendulum", demonstrations: int = 64
    ):
        """
        Args:
            env: gymnasium id, or `package.module:Id` of a module that registers it.
            expert: address of a function observation -> action, which the supervised stage imitates.
            demonstrations: episodes of the expert that there are.

        Raises:
            ValueError: no gymnasium, no such environment, or one whose spaces do not fit.
        """
        if demonstrations < 1:
            raise ValueError(f"task.params.demonstrations must be at least 1, got {demonstrations}")
        self.env, self.demonstrations = env, demonstrations
        self.expert: Callable[[np.ndarray], Any] = load_address(expert, f"task.params.expert {expert!r}")
        self._shown: dict[int, tuple[np.ndarray, list[Any]]] = {}
        self._free: list[Any] = []
        self.space()

    def environments(self, count: int) -> list[Any]:
        """Environments to play in, made where none is free; `give_back` takes those that still work."""
        made = [self._free.pop() if self._free else self._new() for _ in range(count)]
        return made

    def give_back(self, envs: Sequence[Any]) -> None:
        self._free += envs

    def _new(self) -> Any:
        try:
            import gymnasium
        except ModuleNotFoundError:
            raise ValueError(f"task.params.env {self.env} needs gymnasium: pip install 'denoise-rl[control]'") from None
        try:
            return gymnasium.make(self.env, disable_env_checker=True)
        except (gymnasium.error.Error, ModuleNotFoundError) as error:
            raise ValueError(f"task.params.env {self.env}: {error}".splitlines()[0]) from None

    def space(self, bins: int = 0) -> Space:
        """What the environment takes and shows, its actions quantised to `bins` values unless that is 0."""
        [env] = self.environments(1)
        self.give_back([env])
        return Space(self.env, env, bins)

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        first = _TRAIN + seed * 10**8 + step * count
        return [{"prompt": str(first + i)} for i in range(count)]

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        return [{"prompt": str(_HELDOUT + i)} for i in range(count)]

    def file_examples(self, path: str) -> list[Example]:
        raise ValueError("the control task has no file format: its episodes come from the environment")

    def demonstration(self, number: int) -> tuple[np.ndarray, list[Any]]:
        """Observations [N, O] and N actions of an episode of the expert.

        Args:
            number: which demonstration, modulo their number.
        """
        number %= self.demonstrations
        if number not in self._shown:
            [env] = self.environments(1)
            observation, _ = env.reset(seed=_DEMONSTRATIONS + number)
            seen, done, over = [], [], False
            while not over:
                seen.append(observation)
                done.append(np.asarray(self.expert(observation), dtype=env.action_space.dtype))
                observation, _, ended, cut, _ = env.step(done[-1])
                over = ended or cut
            self.give_back([env])
            self._shown[number] = np.stack(seen), done
        return self._shown[number]


def weak_pendulum(observation: np.ndarray) -> list[float]:
    """An imperfect expert for Pendulum-v1: it swings up with half the torque, and is often too fast to stay up."""
    cos, sin, speed = (float(x) for x in observation)
    if cos > 0.85:
        return [max(-2.0, min(2.0, -5 * math.atan2(sin, cos) - speed))]
    return [math.copysign(1.0, speed)]


def episode_return(completions: Sequence[dict[str, Any] | None], **columns: Any) -> list[float]:
    """Sum of the environment's rewards; NaN, which is a failed sample, where the environment raised."""
    return [math.nan if episode is None else episode["return"] for episode in completions]
