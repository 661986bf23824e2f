"""Text: token trajectories of masked-diffusion language models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl.config import Config
from rl.errors import about
from rl.estimators.canvas_rows import random_canvas_rows
from rl.estimators.masking import random_mask_rows
from rl.estimators.rows import TokenRows, readout
from rl.estimators.uniform_rows import random_noise_rows
from rl.modalities.text_plan import TextPlan, check_recipe, evaluation_options, open_tokenizer, review, vision_of
from rl.models.causal import CausalLM, load_autoregressive
from rl.models.load import load_policy, save_policy
from rl.models.reader import beside_policy
from rl.tasks.base import Example, Task
from rl.tasks.chat import answer_text, prompt_text, token_ids
from rl.tasks.prompt_images import encode_prompts
from rollouts.engines.base import Engine
from rollouts.engines.causal import CausalEngine, ServedCausalEngine, causal_options
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.shared import SharedForwards
from rollouts.engines.tokens import token_engine
from rollouts.model_protocol import noise_of
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.uniform import noise_tokens
from rollouts.search.tokens import TokenSampler
from rollouts.trajectory import TokenTrajectory, load_trajectories, save_trajectories


class TextModality(TextPlan):
    """See `rl.modalities.base.Modality`.

    Attributes:
        rollout_block: block length of rollouts during a block-size curriculum; overrides `sampler.block_length`.
        vision: how prompts hold images, None for a model without a vision tower.
    """

    def __init__(self, config: Config, task: Task, tokenizer: Any):
        super().__init__(config, task)
        self.tokenizer, self.grid = tokenizer, task.grid
        self.rollout_block: int | None = None
        self.vision = vision_of(config)
        self._beside: dict[str, dict[str, Any]] = {}

    @classmethod
    def open(cls, config: Config, task: Task) -> TextModality:
        return cls(config, task, open_tokenizer(config, task))

    def load_model(self, path: str | None = None) -> Any:
        model = self.config.model if path is None else self.config.model.model_copy(update={"path": path})
        with about("model.backbone" if model.path is None else f"model.path {model.path!r}"):
            if model.autoregressive:
                return load_autoregressive(model, self.config.rollout.server)
            return load_policy(model, self.tokenizer, self.config.run.seed)

    def review(self, model: Any) -> None:
        block = model.block_length if model.attention == "block_causal" else None
        check_recipe(self.config, "canvas" if getattr(model, "canvas_length", None) else noise_of(model))
        review(self.config, self.task, self.tokenizer, model.mask_token_id, model.max_length, block, self.vision)

    def save_model(self, model: Any, path: str | Path) -> None:
        save_policy(model, self.tokenizer, path)

    def engine(self, model: Any, options: SamplerOptions, device: torch.device) -> Engine:
        if isinstance(model, CausalLM):
            eos, size = self.tokenizer.eos_token_id, self.config.rollout.max_batch_size
            if model.server is not None:
                return ServedCausalEngine(model.server, model, options, eos_token_id=eos, max_batch_size=size)
            return CausalEngine(model, options, eos_token_id=eos, max_batch_size=size, device=device)
        beside = options.model_dump_json(include={"constraint", "guide"})
        if beside not in self._beside:
            self._beside[beside] = beside_policy(options, self.tokenizer, model, device)
        return token_engine(
            SharedForwards(model),
            self._with_block(options),
            eos_token_id=self.tokenizer.eos_token_id,
            max_batch_size=self.config.rollout.max_batch_size,
            device=device,
            approximate_cache=self.config.rollout.cache,
            **self._beside[beside],
        )

    def options(self) -> SamplerOptions:
        return self._with_block(self.config.sampler)

    def _with_block(self, options: SamplerOptions) -> SamplerOptions:
        return (
            options if self.rollout_block is None else options.model_copy(update={"block_length": self.rollout_block})
        )

    def evaluation_options(self, num_inference_steps: int) -> SamplerOptions:
        if self.config.model.autoregressive:
            return causal_options(self.config.sampler, temperature=0.0)
        return evaluation_options(self.config, num_inference_steps)

    def prompt_text(self, row: Example) -> str:
        """What the model is given of a row: its prompt, as a chat turn where `task.chat` says so."""
        return prompt_text(self.tokenizer, row, self.config.task.chat)

    def prompt_ids(self, rows: Sequence[Example]) -> list[list[int]]:
        """Token ids of the prompts of some rows, images among them (`rl.tasks.prompt_images`)."""
        return encode_prompts(self.tokenizer, rows, self.config.task.chat, self.vision)

    def requests(
        self, rows: Sequence[Example], seeds: Sequence[Sequence[int]], steps: Sequence[int | None] | None = None
    ) -> list[Request]:
        return [
            Request(ids, seed, steps[i] if steps else None)
            for i, ids in enumerate(self.prompt_ids(rows))
            for seed in seeds[i]
        ]

    def finished(self, trajectories: Sequence[TokenTrajectory]) -> tuple[list[str], dict[str, list[Any]]]:
        completion_ids = [t.response_ids().tolist() for t in trajectories]
        # What an engine did not tell is None to a reward, not a number.
        num_steps = [None if t.detail == "sample" else t.num_steps for t in trajectories]
        # A step of self-speculative decoding is a token, and two forwards give several.
        forwards = [None if t.detail == "sample" else t.decoder.get("forwards", t.num_steps) for t in trajectories]
        columns: dict[str, list[Any]] = {
            "completion_ids": completion_ids,
            "num_forwards": forwards,
            "num_steps": num_steps,
            "reveal_steps": [
                None
                if t.detail == "sample"
                else t.reveal_step()[t.prompt_length : t.prompt_length + t.stop_length].tolist()
                for t in trajectories
            ],
        }
        return self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True), columns

    def x0_predictions(self, trajectory: TokenTrajectory) -> list[str]:
        """[T] texts of the x0 predictions, each up to its own end token."""
        if trajectory.x0_hat is None:
            raise ValueError("this recipe scores every step's x0 prediction: set sampler.record_x0=true")
        end = trajectory.prompt_length + min(
            trajectory.length - trajectory.prompt_length, self.config.sampler.gen_length
        )
        responses = [fill[trajectory.prompt_length : end].tolist() for fill in trajectory.x0_hat]
        eos = self.tokenizer.eos_token_id
        cut = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in responses]
        return self.tokenizer.batch_decode(cut, skip_special_tokens=True)

    def soft_reward(self, run: Any) -> Any:
        from rl.modalities.soft_text import SoftTextReward

        return SoftTextReward(run)

    def search_sampler(self, engine: InProcessEngine, rows: Sequence[Example]) -> TokenSampler:
        if self.config.model.autoregressive:
            raise ValueError("--search branches denoising steps, which model.autoregressive has none of: leave it out")
        if noise_of(engine.model) != "absorbing":
            raise ValueError(
                f"--search branches on revealed tokens, and model.noise is {noise_of(engine.model)}: leave it out"
            )
        requests = self.requests(rows, [[0]] * len(rows))
        return TokenSampler(engine, [request.prompt_ids for request in requests])

    def save_trajectories(self, path: Path, trajectories: Sequence[TokenTrajectory]) -> None:
        save_trajectories(path, trajectories)

    def load_trajectories(self, path: Path) -> list[TokenTrajectory]:
        return load_trajectories(path)

    def ended(self, trajectories: Sequence[TokenTrajectory]) -> np.ndarray:
        eos = self.tokenizer.eos_token_id
        return np.array([eos is None or eos in t.response_ids() for t in trajectories], dtype=bool)

    def smallest_trajectory(self, model: Any) -> TokenTrajectory:
        length = model.block_length or 2
        recorded: dict[str, Any] = {"x0_hat": np.zeros((1, length), dtype=np.int64)}
        recorded |= {
            "x0_confidence": np.ones((1, length)),
            "x0_logprob": np.where(np.arange(length) == 1, 0.0, np.nan)[None],
        }
        return TokenTrajectory(
            prompt_ids=np.array([0]),
            length=length,
            mask_token_id=model.mask_token_id,
            num_steps=1,
            step=np.array([0]),
            position=np.array([1]),
            token=np.array([0]),
            logprob=np.array([0.0]),
            confidence=np.array([1.0]),
            stop_length=1,
            block_length=model.block_length,
            sampler=self.config.sampler.distribution() | ({"noise": "uniform"} if noise_of(model) == "uniform" else {}),
            **(recorded if self.config.sampler.record_x0 else {}),
        )

    def supervised(
        self, model: Any, rows: Sequence[Example], part: slice, seed: Sequence[int]
    ) -> tuple[TokenRows, torch.Tensor]:
        """Masked or noised answers; the weights sum to the mean loss per response token (`sft.loss_weight`)."""
        config, levels = self.config, self.config.sft.levels
        sequences, prompt_lengths, answers = self._encode(model, rows)
        rng, share = np.random.default_rng(list(seed)), 1.0 / (len(rows) * config.sampler.gen_length)
        if getattr(model, "canvas_length", None):
            tokens, size = noise_tokens(model).numpy(), model.canvas_length
            canvases, weight = random_canvas_rows(sequences, prompt_lengths, answers, size, tokens, rng, part)
            return canvases, weight / (len(rows) * size)
        if noise_of(model) == "uniform":
            noised, weight = random_noise_rows(
                sequences, prompt_lengths, noise_tokens(model).numpy(), rng, model.logit_shift, part,
                bound=config.sft.loss_weight == "elbo",
            )  # fmt: skip
            return noised, weight * share
        masked, weight = random_mask_rows(
            sequences,
            prompt_lengths,
            model.mask_token_id,
            rng,
            model.block_length if model.attention == "block_causal" else None,
            semi_ar=config.sampler.block_length if config.sft.masking == "semi_ar" else None,
            part=part,
            effective=config.sft.loss_weight == "effective",
            levels=None if levels is None else levels.at(seed[-1] / max(config.sft.steps - 1, 1)),
            errors=config.sft.errors,
            error_tokens=noise_tokens(model).numpy() if config.sft.errors else None,
            consistency=config.sft.consistency,
            joint=config.sft.joint,
            **readout(model),
        )
        if config.sft.loss_weight == "uniform":
            weight = torch.ones_like(weight)
        return masked, weight * share

    @property
    def horizon(self) -> int:
        return self.config.sampler.gen_length

    def views(
        self, rows: Sequence[Example], trajectories: Sequence[TokenTrajectory], values: Sequence[float | None]
    ) -> list[dict[str, Any]]:
        """Step-by-step canvases (`rl.track.viewer`)."""
        from rl.track.pieces import Pieces
        from rl.track.viewer import trajectory_view

        pieces = Pieces(self.tokenizer)
        views = []
        for row, trajectory, value in zip(rows, trajectories, values, strict=True):
            view = trajectory_view(trajectory, pieces.texts, (value or 0.0) >= 1.0, self._givens(row))
            if self.grid is not None and hasattr(self.task, "violations"):
                cells = view["steps"][-1]["tokens"]
                # An answer that ended early leaves cells empty.
                cells = cells[: view["stop_length"]] + [""] * (self.grid[0] * self.grid[1])
                view["violations"] = self.task.violations(row, cells)
            views.append(view)
        return views

    def _givens(self, row: Example) -> list[str] | None:
        if self.grid is None or "puzzle" not in row:
            return None
        return ["" if cell == "0" else cell for cell in row["puzzle"]]

    def _encode(self, model: Any, rows: Sequence[Example]) -> tuple[list[np.ndarray], list[int], list[int]]:
        """Prompt and answer ids, the answer filled up to `sampler.gen_length` with end tokens; length of each prompt,
        and of each answer with one end token.

        Raises:
            ValueError: a row has no answer, or one that does not fit.
        """
        length = self.config.sampler.gen_length
        block = model.block_length if model.attention == "block_causal" else 1
        sequences, prompt_lengths, answer_lengths = [], [], []
        eos, chat = self.tokenizer.eos_token_id, self.config.task.chat
        if any(row.get("answer") is None for row in rows):
            raise ValueError("sft needs rows with an answer: set task.params.answer_column")
        prompts = self.prompt_ids(rows)
        answers = token_ids(self.tokenizer, [answer_text(self.tokenizer, row, chat) for row in rows])
        for prompt, answer in zip(prompts, answers, strict=True):
            if len(answer) > length:
                raise ValueError(f"an answer has {len(answer)} tokens, sampler.gen_length is {length}: raise it")
            # A block-causal canvas ends where a block does.
            length_here = -(-(len(prompt) + length) // block) * block - len(prompt)
            fill = [eos] * (length_here - len(answer))
            if fill and eos is None:
                raise ValueError("the tokenizer has no end token to follow an answer: set model.eos_token")
            if len(prompt) + length_here > model.max_length:
                raise ValueError(
                    f"a prompt of {len(prompt)} tokens plus sampler.gen_length {length} does not fit the model's "
                    f"{model.max_length} positions"
                )
            sequences.append(np.array([*prompt, *answer, *fill], dtype=np.int64))
            prompt_lengths.append(len(prompt))
            answer_lengths.append(min(len(answer) + 1, length_here))
        return sequences, prompt_lengths, answer_lengths
