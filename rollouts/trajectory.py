"""The contract between sampler and learner: what was sampled, exactly.

A `TokenTrajectory` is an edit script. It stores the prompt and a ragged list of edits
`(step, position, token, logprob, confidence)`; replaying the edits of the first t steps gives the
exact canvas the model saw at step t. Revealing is an edit from mask to token, remasking an edit from
token to mask, token editing an edit from token to token. Edits of step -1 fill the canvas before the first step. Under
uniform noise they are random tokens, and each step edits every position, also where its token stays. The script holds
token ids, never text.

Shape legend used in this project: B rollouts, G rollouts per prompt, L canvas positions, E edits,
T denoising steps, V vocabulary, D width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from rollouts.npz_file import read_records, write_records

FORMAT_VERSION = 1
_KIND = "token trajectories"
_EDIT_FIELDS = {
    "step": np.int32,
    "position": np.int32,
    "token": np.int64,
    "logprob": np.float64,
    "confidence": np.float32,
}
X0_FIELDS = {"x0_hat": np.int64, "x0_confidence": np.float32, "x0_logprob": np.float64}
# What only some trajectories have.
_SOME = (*X0_FIELDS, "allowed", "allowed_at", "is_noise", "choices")

# How much of a rollout is known, each with what comes before it: the finished answer, the step of every token, and the
# log-prob it was drawn with. Our own engines know everything, serving engines often not.
Detail = Literal["sample", "steps", "logprobs"]
DETAILS: tuple[Detail, ...] = get_args(Detail)


@dataclass
class TokenTrajectory:
    """One rollout of a discrete diffusion sampler.

    Example: prompt `[5, 6]`, a canvas of 4, the last two positions revealed at steps 0 and 1::

        TokenTrajectory(
            prompt_ids=np.array([5, 6]), length=4, mask_token_id=9, num_steps=2,
            step=np.array([0, 1]), position=np.array([3, 2]), token=np.array([7, 8]),
            logprob=np.array([-0.1, -0.7]), confidence=np.array([0.9, 0.5]),
            stop_length=2, block_length=None, block_origin=0,
            sampler={"temperature": 1.0, "top_p": 1.0, "top_k": 0}, policy_version=0,
        )

    Attributes:
        prompt_ids: int64 [P], the conditioning; never edited.
        length: L, prompt plus generated canvas up to the end of the terminal block (complete, also
            what was decoded after an end token); with full attention the whole canvas, on which blocks behind
            the terminal one are still masked.
        mask_token_id: the id that marks an undecided position.
        num_steps: T, denoising forwards this rollout took part in.
        step, position, token: int [E], the edits ordered by step; a step may edit many positions. Step -1 holds tokens
            that a constraint placed before the first forward, since every match has them: they are no decisions.
        logprob: float64 [E], natural log of the probability the sampler gave this token when it chose
            it (after temperature and filters; 0 for a remasking edit and for greedy choices).
        confidence: float32 [E], probability of the token under the score distribution, in [0, 1]; 0 for a remasking
            edit.
        stop_length: response tokens to keep as the answer (up to and including the end token), <= L-P.
        block_length: block size of the decoding grid, None when the response is one block or has blocks of chosen
            lengths (`choices`).
        block_origin: absolute position of the grid's first block boundary: 0 for block-causal models that choose
            nothing, the prompt's length otherwise.
        sampler: the sampler settings that define the distribution (temperature, top_p, top_k, and cfg_scale
            where there is guidance: the learner combines its logits in the same way).
        decoder: the rule that chose positions: the preset's name and every part (`SamplerOptions.decoder`).
        policy_version: optimizer steps taken by the weights that sampled this.
        exact: False when an approximate cache was used: log-probs then carry an unknown error.
        detail: "logprobs" when everything is known; "steps" without log-probs and confidences, which are NaN; "sample"
            when only the answer is: every token then seems to be revealed at step 0, with NaN too, and what was
            decoded behind the answer is missing.
        x0_hat: int64 [T, L], the x0 prediction of every step, recorded on request only: the canvas with a draw for
            every masked position, committed or not.
        x0_confidence: float32 [T, L], recorded with it: `confidence` of each of these draws; NaN where the step
            drew nothing (the position held a token).
        x0_logprob: float64 [T, L], recorded with it: `logprob` of each of these draws; NaN likewise.
        seed: the per-request seed; the same seed, weights and settings give the same rollout.
        allowed: uint8 [sets, V / 8], under a constraint the sets of tokens that tokens were drawn among, a bit for each
            token (`numpy.packbits`); trajectories may share the array.
        allowed_at: int32 [E], the set of every edit; -1 where it was no draw among some tokens only.
        is_noise: bool [E], edits of later steps that put random tokens, which are no decisions; None without such.
        choices: float64 [C, 4], what the policy chose of its decoder (`sampler.choose`), None where it has no choice:
            step, position whose state before that step made the choice, index of the value, log-prob.
    """

    prompt_ids: np.ndarray
    length: int
    mask_token_id: int
    num_steps: int
    step: np.ndarray
    position: np.ndarray
    token: np.ndarray
    logprob: np.ndarray
    confidence: np.ndarray
    stop_length: int
    block_length: int | None = None
    block_origin: int = 0
    sampler: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)
    policy_version: int = 0
    exact: bool = True
    detail: Detail = "logprobs"
    x0_hat: np.ndarray | None = None
    x0_confidence: np.ndarray | None = None
    x0_logprob: np.ndarray | None = None
    seed: int = 0
    allowed: np.ndarray | None = None
    allowed_at: np.ndarray | None = None
    is_noise: np.ndarray | None = None
    choices: np.ndarray | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_ids)

    @property
    def total_logprob(self) -> float:
        """Of all decisions: tokens, and what was chosen of the decoder. One taken back was no draw: its edit has 0."""
        chosen = 0.0 if self.choices is None else self.choices[:, 3].sum()
        return float(self.logprob.sum() + chosen)

    @property
    def is_reveal(self) -> np.ndarray:
        """bool [E]: edits that chose a token: all but remasking, noise, and what was placed before the first step."""
        chosen = (self.token != self.mask_token_id) & (self.step >= 0)
        return chosen if self.is_noise is None else chosen & ~self.is_noise

    @property
    def placed(self) -> np.ndarray:
        """int [K]: positions of tokens that stood on the canvas before the first step, and stayed."""
        first = self.position[self.step < 0]
        return first[self.reveal_step()[first] < 0]

    def canvas_at(self, step: int) -> np.ndarray:
        """int64 [L]: the canvas the model saw at `step`, that is after the edits of all earlier steps."""
        canvas = np.full(self.length, self.mask_token_id, dtype=np.int64)
        canvas[: self.prompt_length] = self.prompt_ids
        before = self.step < step
        # Edits are ordered by step, and NumPy assigns repeated indices in order: the last edit wins.
        canvas[self.position[before]] = self.token[before]
        return canvas

    def final_canvas(self) -> np.ndarray:
        """int64 [L]: the canvas after the last edit."""
        return self.canvas_at(self.num_steps)

    def response_ids(self) -> np.ndarray:
        """int64 [stop_length]: the answer, up to and including the end token."""
        start = self.prompt_length
        return self.final_canvas()[start : start + self.stop_length]

    def reveal_step(self) -> np.ndarray:
        """int32 [L]: the step of each position's last edit, -1 where nothing was edited (the prompt)."""
        steps = np.full(self.length, -1, dtype=np.int32)
        steps[self.position] = self.step
        return steps

    def block_of(self, position: np.ndarray | int) -> np.ndarray | int:
        """Index of the grid block that holds an absolute position (0 when there is no grid)."""
        if self.block_length is None:
            return np.zeros_like(position)
        return (np.asarray(position) - self.block_origin) // self.block_length

    def validate(self) -> None:
        """Raise ValueError, naming the field, when the record contradicts itself."""
        for name in _EDIT_FIELDS:
            if len(getattr(self, name)) != len(self.step):
                raise ValueError(
                    f"trajectory field {name!r} has {len(getattr(self, name))} entries, step has {len(self.step)}"
                )
        if len(self.step) and (np.any(np.diff(self.step) < 0) or self.step[0] < -1 or self.step[-1] >= self.num_steps):
            raise ValueError("trajectory field 'step' must be ordered and lie in [0, num_steps), or be -1")
        if np.any(self.position < self.prompt_length) or np.any(self.position >= self.length):
            raise ValueError("trajectory field 'position' must lie behind the prompt and inside the canvas")
        if not 0 <= self.stop_length <= self.length - self.prompt_length:
            raise ValueError(f"trajectory field 'stop_length' is {self.stop_length}, outside the response")
        for name in X0_FIELDS:
            values = getattr(self, name)
            if values is not None and values.shape != (self.num_steps, self.length):
                raise ValueError(
                    f"trajectory field {name!r} has shape {values.shape}, num_steps and length are "
                    f"{(self.num_steps, self.length)}"
                )
        if self.detail not in DETAILS:
            raise ValueError(f"trajectory field 'detail' is {self.detail!r}, not one of {', '.join(DETAILS)}")
        if self.detail == "logprobs" and not np.all(np.isfinite(self.logprob)):
            raise ValueError("trajectory field 'logprob' holds a value that is not finite")
        if self.detail != "logprobs" and not np.all(np.isnan(self.logprob)):
            raise ValueError(f"trajectory field 'logprob' must be NaN where 'detail' is {self.detail!r}")
        order = np.lexsort((self.position, self.step))
        step, position = self.step[order], self.position[order]
        if np.any((np.diff(step) == 0) & (np.diff(position) == 0)):
            raise ValueError("trajectory edits one position twice in one step")
        if self.is_noise is not None and len(self.is_noise) != len(self.step):
            raise ValueError(f"trajectory field 'is_noise' has {len(self.is_noise)} entries, step has {len(self.step)}")
        if self.choices is not None and (self.choices.ndim != 2 or not np.isin(self.choices[:, 0], self.step).all()):
            raise ValueError("trajectory field 'choices' must have rows of steps that revealed something")
        if (self.allowed is None) != (self.allowed_at is None):
            raise ValueError("trajectory fields 'allowed' and 'allowed_at' belong together")
        if self.allowed is not None and self.allowed_at is not None:
            drawn = self.allowed_at >= 0
            at, token = self.allowed_at[drawn], self.token[drawn]
            if not np.all(np.unpackbits(self.allowed[at], axis=1)[np.arange(len(at)), token]):
                raise ValueError("trajectory field 'allowed' excludes a token that was drawn")


def save_trajectories(path: str | os.PathLike[str], trajectories: Sequence[TokenTrajectory]) -> None:
    """Write trajectories to one `.npz` file (no pickle). The file appears only when it is complete."""
    arrays: dict[str, np.ndarray] = {
        "prompt_ids": _concatenate((t.prompt_ids for t in trajectories), np.int64),
        "prompt_offsets": _offsets(len(t.prompt_ids) for t in trajectories),
        "edit_offsets": _offsets(len(t.step) for t in trajectories),
    }
    for name, dtype in _EDIT_FIELDS.items():
        arrays[name] = _concatenate((getattr(t, name) for t in trajectories), dtype)
    for index, trajectory in enumerate(trajectories):
        for name, dtype in X0_FIELDS.items():
            values = getattr(trajectory, name)
            if values is not None:
                arrays[f"{name}_{index}"] = values.astype(dtype, copy=False)
        for name in ("is_noise", "choices"):
            if getattr(trajectory, name) is not None:
                arrays[f"{name}_{index}"] = getattr(trajectory, name)
        if trajectory.allowed is not None and trajectory.allowed_at is not None:
            # Of the sets that many trajectories share, this one's.
            used = np.unique(trajectory.allowed_at[trajectory.allowed_at >= 0])
            at = np.searchsorted(used, trajectory.allowed_at)
            arrays[f"allowed_{index}"] = trajectory.allowed[used]
            arrays[f"allowed_at_{index}"] = np.where(trajectory.allowed_at < 0, -1, at).astype(np.int32)
    items = [
        {
            "length": t.length,
            "mask_token_id": t.mask_token_id,
            "num_steps": t.num_steps,
            "stop_length": t.stop_length,
            "block_length": t.block_length,
            "block_origin": t.block_origin,
            "sampler": t.sampler,
            "decoder": t.decoder,
            "policy_version": t.policy_version,
            "exact": t.exact,
            "detail": t.detail,
            "seed": t.seed,
        }
        for t in trajectories
    ]
    write_records(path, _KIND, FORMAT_VERSION, items, arrays)


def load_trajectories(path: str | os.PathLike[str]) -> list[TokenTrajectory]:
    """Read what `save_trajectories` wrote, validating every record.

    Raises:
        ValueError: the file is not a trajectory file, has another version, or a record is inconsistent.
    """
    items, arrays = read_records(path, _KIND, FORMAT_VERSION)
    trajectories = []
    for index, item in enumerate(items):
        prompt = slice(*arrays["prompt_offsets"][index : index + 2])
        edits = slice(*arrays["edit_offsets"][index : index + 2])
        trajectory = TokenTrajectory(
            prompt_ids=arrays["prompt_ids"][prompt],
            **{name: arrays[f"{name}_{index}"] for name in _SOME if f"{name}_{index}" in arrays},
            **{name: arrays[name][edits] for name in _EDIT_FIELDS},
            **item,
        )
        trajectory.validate()
        trajectories.append(trajectory)
    return trajectories


def _concatenate(parts: Iterable[np.ndarray], dtype: Any) -> np.ndarray:
    parts = [np.asarray(part, dtype=dtype) for part in parts]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(list(lengths), dtype=np.int64)]).astype(np.int64)
