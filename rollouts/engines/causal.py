"""A frozen autoregressive model as an engine: what a converted model is compared with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rollouts.engines.base import EngineStats, SharedModelEngine
from rollouts.engines.in_process import Request
from rollouts.trajectory import TokenTrajectory


class CausalEngine(SharedModelEngine):
    """Greedy answers of a causal language model, one token a forward, by transformers' `generate` and its KV cache.

    Its trajectories say at which step every token came, and nothing about log-probs (`detail` steps).
    """

    def __init__(
        self, model: Any, gen_length: int, eos_token_id: int, mask_token_id: int, max_batch_size: int, device: Any
    ):
        """
        Args:
            mask_token_id: of the converted model; only written into the trajectories.
        """
        self.model, self.gen_length, self.device = model, gen_length, device
        self.eos_token_id, self.mask_token_id = eos_token_id, mask_token_id
        self.max_batch_size, self.options, self.stats = max_batch_size, None, EngineStats()

    def generate(self, requests: Sequence[Request], policy_version: int = 0) -> list[TokenTrajectory]:
        started = time.perf_counter()
        self.stats = EngineStats()
        # Prompts of like length together: less padding. The order is restored below.
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
        made: dict[int, TokenTrajectory] = {}
        for start in range(0, len(order), self.max_batch_size):
            chosen = order[start : start + self.max_batch_size]
            answers = self._answers([list(requests[index].prompt_ids) for index in chosen])
            for index, answer in zip(chosen, answers, strict=True):
                made[index] = self._trajectory(requests[index], answer, policy_version)
                self.stats.generated_tokens += len(answer)
            self.stats.forwards += max(map(len, answers))
            self.stats.sequence_forwards += sum(map(len, answers))
        self.stats.seconds = time.perf_counter() - started
        return [made[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _answers(self, prompts: list[list[int]]) -> list[list[int]]:
        width, end = max(map(len, prompts)), self.eos_token_id
        ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts], device=self.device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        made = self.model.generate(
            input_ids=ids,
            attention_mask=seen,
            max_new_tokens=self.gen_length,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )[:, width:].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in made]

    def _trajectory(self, request: Request, answer: list[int], policy_version: int) -> TokenTrajectory:
        prompt, count = len(request.prompt_ids), len(answer)
        unknown = np.full(count, np.nan)
        return TokenTrajectory(
            prompt_ids=np.array(request.prompt_ids, dtype=np.int64),
            length=prompt + self.gen_length,
            mask_token_id=self.mask_token_id,
            num_steps=count,
            step=np.arange(count, dtype=np.int32),
            position=np.arange(prompt, prompt + count, dtype=np.int32),
            token=np.array(answer, dtype=np.int64),
            logprob=unknown,
            confidence=unknown.astype(np.float32),
            stop_length=count,
            policy_version=policy_version,
            detail="steps",
            seed=request.seed,
        )
