"""Text sampled with a gradient: relaxed rollouts whose one-hot ends go to differentiable rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rewards.soft import DifferentiableSum
from rl.estimators.relaxed import free_canvas
from rl.modalities.gradient import Forward, GradientSegment
from rl.tasks.base import Example, reward_columns
from rl.tasks.chat import token_ids
from rollouts.samplers.relaxed import relaxed_rollout
from rollouts.samplers.relaxed_options import RelaxedOptions


class SoftTextReward:
    """The rewards of a config as a differentiable function of soft responses over the vocabulary."""

    def __init__(self, run: Any):
        """
        Raises:
            ValueError: a reward without gradient, or letters without a token.
        """
        parts = run.config.reward.trained(run.task.reward)
        self.sum = DifferentiableSum([(part.name, part.weight, part.params) for part in parts])
        letters = [run.tokenizer.convert_tokens_to_ids(letter) for letter in self.sum.alphabet]
        unknown = [
            letter
            for letter, index in zip(self.sum.alphabet, letters, strict=True)
            if index is None or index == run.tokenizer.unk_token_id
        ]
        if unknown:
            raise ValueError(f"model.tokenizer has no token for the letter {unknown[0]!r} that the rewards read")
        self.letters = torch.tensor(letters, device=run.device)

    def __call__(self, one_hot: torch.Tensor, rows: Sequence[Example]) -> torch.Tensor:
        """[B] of responses [B, L, V] to the prompts of B rows."""
        return self.sum.soft([row["prompt"] for row in rows], one_hot[..., self.letters], **reward_columns(rows))


class RelaxedText:
    """A `GradientSampler` for fixed-length responses of full-attention models."""

    def __init__(self, run: Any, options: RelaxedOptions, with_reference: bool):
        """
        Raises:
            ValueError: a reward without gradient, letters without a token, or a sampler that cannot be relaxed.
        """
        config = run.config
        self.run, self.options, self.sampler = run, options, config.sampler
        # The relaxed rollout is MDLM's ancestral sampler; score, quota and selector have no part in it.
        plain_options: dict[str, Any] = {"block_length": None, "top_p": 1.0, "top_k": 0, "cfg_scale": 0.0}
        plain_options |= {"reviser": "none", "constraint": None, "guide": None, "verify": False, "choose": None}
        plain_options |= {"joint_steps": 0}
        if self.sampler.temperature == 0:
            raise ValueError("sampler.temperature is 0: algorithm.gradient pathwise needs it above 0")
        for name, plain in plain_options.items():
            if getattr(self.sampler, name) != plain:
                raise ValueError(
                    f"sampler.{name} is {getattr(self.sampler, name)}: algorithm.gradient pathwise needs {plain}"
                )
        steps = self.sampler.num_inference_steps
        if options.relaxed_steps > steps:
            raise ValueError(
                f"algorithm.relaxed.relaxed_steps ({options.relaxed_steps}) must not exceed "
                f"sampler.num_inference_steps ({steps})"
            )
        self.reward = SoftTextReward(run)
        self.num_segments = steps - options.relaxed_steps + 1 if with_reference else 1

    def segments(
        self, policy: Forward, reference: Forward | None, rows: Sequence[Example], seeds: list[int]
    ) -> Iterator[GradientSegment]:
        prompts = [self.run.modality.prompt_text(row) for row in rows]
        prompt_ids = token_ids(self.run.tokenizer, prompts)
        canvas = free_canvas(prompt_ids, self.sampler.gen_length, seeds, self.run.model)
        canvas = canvas.at_temperature(self.sampler.temperature).to(self.run.device)
        tokens = int(canvas.length.sum())
        for segment in relaxed_rollout(
            lambda token: policy(canvas.holding(token)),
            None if reference is None else lambda token: reference(canvas.holding(token)),
            canvas.free,
            self.sampler.num_inference_steps,
            self.options,
        ):
            if segment.one_hot is None:
                yield GradientSegment(segment.kl, segment.forwards, tokens)
                continue
            one_hot = segment.one_hot.view(len(rows), self.sampler.gen_length, -1)
            reward = self.reward(one_hot, rows)
            texts = self.run.tokenizer.batch_decode(segment.token.view(len(rows), -1))
            metrics = {"policy/last_mask_mass": float(segment.mask_mass.mean())}
            yield GradientSegment(segment.kl, segment.forwards, tokens, reward, texts, metrics)
