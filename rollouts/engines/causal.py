"""Samples of an autoregressive model, the baseline of evaluations: one token a forward, with keys and values kept.

Its rollouts are trajectories like any other, of blocks of one token that are decided from left to right. A draw depends
on (seed, step, position), as with `InProcessEngine`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rollouts.engines.base import EngineStats, SharedModelEngine
from rollouts.engines.in_process import Request
from rollouts.engines.server.engine import ServerEngine
from rollouts.engines.server.options import ServerOptions
from rollouts.samplers import noise
from rollouts.samplers.distribution import draw, sampling_logprobs
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import TokenTrajectory

# No token has this id: an autoregressive model has no mask.
NO_MASK = -1


def causal_options(options: SamplerOptions, temperature: float | None = None) -> SamplerOptions:
    """The options that mean something to an autoregressive model: lengths, temperature and filters.

    Args:
        temperature: takes the place of the options' own; 0 is greedy.

    Raises:
        ValueError: the options have a constraint.
    """
    if options.constraint is not None:
        raise ValueError("an autoregressive model is not sampled under a constraint: set sampler.constraint to null")
    return SamplerOptions(
        gen_length=options.gen_length,
        num_inference_steps=options.gen_length,
        block_length=1,
        temperature=options.temperature if temperature is None else temperature,
        top_p=options.top_p,
        top_k=options.top_k,
    )


class CausalEngine(SharedModelEngine):
    """Samples with a causal language model of transformers in this process.

    Args:
        model: has `lm`, whose cache can drop rows, and `max_length`.
        eos_token_id: an answer ends with it.
        max_batch_size: requests decoded together.
    """

    def __init__(
        self,
        model: Any,
        options: SamplerOptions,
        *,
        eos_token_id: int | None = None,
        max_batch_size: int = 256,
        device: torch.device | str = "cpu",
    ):
        if max_batch_size < 1:
            raise ValueError(f"rollout.max_batch_size must be at least 1, got {max_batch_size}")
        self.model, self.options = model, causal_options(options)
        self.eos_token_id, self.max_batch_size, self.device = eos_token_id, max_batch_size, torch.device(device)
        self.stats = EngineStats()

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], policy_version: int = 0) -> list[TokenTrajectory]:
        """Answer every request; the result has the requests' order.

        Raises:
            ValueError: a request does not fit the model's context, or has no prompt.
        """
        started = time.perf_counter()
        self.stats = EngineStats()
        for index, request in enumerate(requests):
            length = len(request.prompt_ids)
            if not length:
                raise ValueError(f"request {index} has an empty prompt: give it at least one token")
            if length + self.options.gen_length > self.model.max_length:
                raise ValueError(
                    f"request {index}: prompt of {length} tokens plus sampler.gen_length {self.options.gen_length} "
                    f"does not fit the model's {self.model.max_length} positions"
                )
        # Prompts of like length together: less padding.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids))
        found: dict[int, TokenTrajectory] = {}
        for start in range(0, len(order), self.max_batch_size):
            rows = order[start : start + self.max_batch_size]
            answers = self._answer([requests[row] for row in rows])
            for row, answer in zip(rows, answers, strict=True):
                found[row] = self._trajectory(requests[row], answer, policy_version)
                self.stats.generated_tokens += len(answer)
        self.stats.seconds = time.perf_counter() - started
        return [found[row] for row in range(len(requests))]

    def _answer(self, requests: Sequence[Request]) -> list[list[tuple[int, float, float]]]:
        """The answers of a batch: token, log-prob and confidence of each of their tokens.

        Prompts are padded on the left, so that all of them end in one column: of [5, 6] and [7], the second becomes
        [0, 7] with `seen` [False, True] and positions [0, 0].
        """
        lengths = torch.tensor([len(request.prompt_ids) for request in requests], device=self.device)
        width = int(lengths.max())
        padded = [[0] * (width - len(request.prompt_ids)) + list(request.prompt_ids) for request in requests]
        tokens = torch.tensor(padded, device=self.device)
        seen = torch.arange(width, device=self.device) >= width - lengths[:, None]
        positions = (seen.long().cumsum(-1) - 1).clamp(min=0)
        seed = torch.tensor([request.seed for request in requests], device=self.device)
        going = torch.arange(len(requests), device=self.device)
        answers: list[list[tuple[int, float, float]]] = [[] for _ in requests]
        cache = None
        for step in range(self.options.gen_length):
            out = self.model.lm(
                input_ids=tokens,
                attention_mask=seen.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            self.stats.forwards += 1
            self.stats.rows_asked += len(going)
            self.stats.sequence_forwards += len(going)
            self.stats.query_tokens += tokens.numel()
            positions = positions[:, -1:] + 1
            token, logprob, confidence = self._draw(out.logits[:, -1].float(), seed, step, positions[:, 0])
            decided = zip(token.tolist(), logprob.tolist(), confidence.tolist(), strict=True)
            for row, decision in zip(going.tolist(), decided, strict=True):
                answers[row].append(decision)
            keep = token != self.eos_token_id if self.eos_token_id is not None else torch.ones_like(token) > 0
            if not keep.any():
                break
            if not keep.all():
                cache.batch_select_indices(keep.nonzero().squeeze(-1))
            going, seed, positions, tokens = going[keep], seed[keep], positions[keep], token[keep, None]
            seen = torch.cat([seen[keep], torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        return answers

    def _draw(
        self, logits: torch.Tensor, seed: torch.Tensor, step: int, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N] each: a token, its log-prob under the sampling distribution (0 for greedy), its probability."""
        options = self.options
        if options.temperature == 0:
            token = logits.argmax(-1)
            logprob = torch.zeros_like(token, dtype=torch.float64)
        else:
            logprobs = sampling_logprobs(logits, options.temperature, options.top_p, options.top_k)
            token = draw(logprobs, noise.uniform(seed, torch.full_like(seed, step), position, noise.TOKEN_STREAM))
            logprob = logprobs.gather(-1, token[:, None]).squeeze(-1).double()
        return token, logprob, logits.softmax(-1).gather(-1, token[:, None]).squeeze(-1)

    def _trajectory(
        self, request: Request, answer: Sequence[tuple[int, float, float]], policy_version: int
    ) -> TokenTrajectory:
        prompt, count = len(request.prompt_ids), len(answer)
        token, logprob, confidence = zip(*answer, strict=True)
        return TokenTrajectory(
            prompt_ids=np.asarray(request.prompt_ids, dtype=np.int64),
            length=prompt + count,
            mask_token_id=NO_MASK,
            num_steps=count,
            step=np.arange(count, dtype=np.int32),
            position=prompt + np.arange(count, dtype=np.int32),
            token=np.array(token, dtype=np.int64),
            logprob=np.array(logprob, dtype=np.float64),
            confidence=np.array(confidence, dtype=np.float32),
            stop_length=count,
            block_length=1,
            block_origin=prompt,
            sampler=self.options.distribution(),
            decoder={"engine": "transformers"},
            policy_version=policy_version,
            seed=request.seed,
        )


class ServedCausalEngine(ServerEngine):
    """Samples with vLLM servers that serve an autoregressive model ; nothing is pushed to them.

    Args:
        model: has `max_length`; it is never run.
        max_batch_size: requests that an evaluation hands over together.
    """

    def __init__(
        self,
        server: ServerOptions,
        model: Any,
        options: SamplerOptions,
        *,
        eos_token_id: int | None = None,
        max_batch_size: int = 256,
    ):
        self.max_batch_size = max_batch_size
        # The folder of weights stays unused: what the servers were started with is version 0.
        server = server.model_copy(update={"dialect": "vllm_causal"})
        super().__init__(server, model, causal_options(options), weights_dir="", eos_token_id=eos_token_id)
        self._newest = 0

    def generate(self, requests: Sequence[Request], policy_version: int = 0) -> list[TokenTrajectory]:
        """As of `ServerEngine`; the order of the tokens is known, their log-probs are not."""
        trajectories = super().generate(requests, policy_version)
        for trajectory in trajectories:
            trajectory.detail, trajectory.num_steps = "steps", len(trajectory.step)
            trajectory.step = np.arange(len(trajectory.step), dtype=np.int32)
        self.stats.rows_asked = self.stats.sequence_forwards = sum(t.num_steps for t in trajectories)
        return trajectories
