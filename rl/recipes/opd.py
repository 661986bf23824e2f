"""OPD: a frozen autoregressive teacher reads what the policy wrote, and is imitated at the policy's own states.

Su et al. 2026, "Data-Efficient Autoregressive-to-Diffusion Language Models via On-Policy Distillation" (OPDLM, arXiv
2606.06712). The policy samples with its real decoder. The teacher reads the finished answer from left to right, which
gives its distribution p(. | prompt, answer before j) at every position j. The loss at a state x of the rollout is the
mean over its masked j, up to the end token, of KL(p(. | prompt, answer before j) || policy(. | x) at j).

Choices (published code): forward KL at temperature 1; all masked tokens of the block up to and with the end token.

Departs: every state of a rollout is trained (published: one state, drawn); published code can also fill the block with
the policy's likeliest tokens before the teacher reads it (here: always the tokens of the finished answer); tokens that
the policy may not generate are taken from the teacher. `reward_coef` adds the clipped policy gradient of a reward.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PrivateAttr

from rl.config import Config
from rl.recipes.distilled import DistilledRecipe


class OPD(DistilledRecipe):
    teacher: str | None = Field(
        None,
        description="Causal language model: folder, hub name, .gguf file, package:NAME/FILE, or http://HOST:PORT of a "
        "vLLM server; null is model.path.",
    )
    teacher_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Weights of a teacher read here.")
    teacher_batch_size: int = Field(16, ge=1, description="Answers that the teacher reads in one forward or request.")
    _reader: Any = PrivateAttr(None)

    def check(self, config: Config) -> None:
        from rewards.causal_lm import resolve
        from rl.models.folder import is_url

        path = self.teacher or config.model.path
        if path is None:
            raise ValueError("algorithm.teacher is null and there is no model.path to take: name a causal model")
        if not is_url(path):
            resolve(path)
        elif self.top is None:
            told = f"algorithm.teacher {path} gives its likeliest tokens, not the whole vocabulary"
            raise ValueError(f"{told}: set algorithm.top (at most the server's --max-logprobs, 20)")

    def prepare(self, run: Any) -> None:
        from rl.models.reader import open_reader

        if self._reader is None:
            self._reader = open_reader(
                self.teacher or run.config.model.path, run.tokenizer, run.model.mask_token_id, run.device,
                option="algorithm.teacher", top_option="algorithm.top", dtype=self.teacher_dtype,
                batch_size=self.teacher_batch_size, top=self.top,
            )  # fmt: skip

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.taught import read_rows

        rows = super().rows(trajectories, model, block, steps, iteration)
        return read_rows(rows, trajectories, self._reader, self.divergence, self.top)
