"""Our models in lm-evaluation-harness, as the model `denoise_rl` (`pip install denoise-rl[eval]`).

    python -m rl.evaluation.lm_eval_model run --model denoise_rl --model_args path=MODEL,gen_length=256 --tasks gsm8k

is lm-eval's own command with this model known to it. From Python:
`lm_eval.simple_evaluate(model=DenoiseLM("MODEL"), tasks=["gsm8k"])`.

Two things differ from an autoregressive model, and the results' config says both. A likelihood is the diffusion bound,
by random masks unless it can be had exactly (`rl.evaluation.likelihood`). A completion has a fixed room, `gen_length`,
and a decoder to fill it.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from rl.distributed import pick_device
from rl.evaluation.likelihood import Likelihood, log_likelihoods
from rl.model_section import ModelConfig
from rl.models.load import load_policy
from rl.models.reader import beside_policy
from rl.models.tokenizers import load_tokenizer
from rollouts.engines.base import Request
from rollouts.engines.tokens import token_engine
from rollouts.samplers.options import SamplerOptions, with_changes
from rollouts.samplers.sub_options import ConstraintOptions

log = logging.getLogger("denoise-rl")
Pair = tuple[list[int], list[int]]


@register_model("denoise_rl")
class DenoiseLM(TemplateLM):
    """A model of ours for lm-eval; the arguments are its `--model_args`.

    Args:
        path: model folder or hub name.
        tokenizer: another tokenizer than the model's.
        gen_length: room of a completion in tokens; the task's `max_gen_toks` when None, rounded up to whole blocks.
        num_inference_steps: denoising steps for that room; one per token when None.
        block_length, selector, threshold, score, top_p, top_k: the decoder (`SamplerOptions`).
        temperature: for tasks that do not set one.
        constraint: what completions must match (`ConstraintOptions`), or the path of a JSON file with it; likelihoods
            and greedy checks are of any text.
        num_likelihood_samples: mask patterns per likelihood.
        check_greedy: also decode every text greedily, to say whether it is what the model would write (lm-eval's
            `is_greedy`, which few tasks use); False answers False.
        batch_size: sequences per forward.
        device: auto, cpu or cuda.
        seed: of masks and sampling.
        max_batch_size: lm-eval passes it; not used.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        gen_length: int | None = None,
        num_inference_steps: int | None = None,
        block_length: int | None = None,
        selector: str = "top_n",
        threshold: float = 0.9,
        score: str = "probability",
        top_p: float = 1.0,
        top_k: int = 0,
        temperature: float = 0.0,
        constraint: dict[str, Any] | str | None = None,
        num_likelihood_samples: int = 128,
        check_greedy: bool = True,
        batch_size: int | str = 32,
        device: str | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        config = ModelConfig(path=path, tokenizer=tokenizer)
        no_task: Any = SimpleNamespace(alphabet=None)
        self.tokenizer: Any = load_tokenizer(config, no_task)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {path} has no end token, which stands for an empty context")
        self._device = pick_device(device or "auto")
        model: Any = load_policy(config, self.tokenizer, seed)
        self.model: Any = model.to(self._device)
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size must be a number for denoise_rl, got {batch_size!r}")
        self.batch_size = int(batch_size)
        self.path, self.seed, self.gen_length = path, seed, gen_length
        self.num_inference_steps = num_inference_steps
        self.num_likelihood_samples, self.check_greedy = num_likelihood_samples, check_greedy
        if self.model.attention == "block_causal" and block_length is None:
            block_length = self.model.block_length
        self.block_length = block_length
        self.decoder = {
            "block_length": block_length, "selector": selector, "threshold": threshold, "score": score,
            "top_p": top_p, "top_k": top_k, "temperature": temperature,
        }  # fmt: skip
        if isinstance(constraint, str):
            constraint = json.loads(Path(constraint).read_text(encoding="utf-8"))
        self.constraint = None if constraint is None else ConstraintOptions.model_validate(constraint)
        asked = SamplerOptions(constraint=self.constraint)
        self.beside = beside_policy(asked, self.tokenizer, self.model, self._device)
        self.likelihoods: list[Likelihood] = []
        self.truncated: Counter[str] = Counter()

    # --- facts about the model ---------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def max_length(self) -> int:
        """Positions of the model that texts may use: whole blocks of them."""
        block = self.model.block_length or 1
        return int(self.model.max_length) // block * block

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        # Never a special token that the prompt's text does not hold: that is also how training encodes.
        return list(self.tokenizer(string, add_special_tokens=False).input_ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the results' config: the decoder, and how every likelihood so far was come by."""
        bounds = [item for item in self.likelihoods if not item.exact]
        errors = [item.std_error for item in bounds if item.std_error]
        return {
            "denoise_rl": {
                "path": self.path,
                "attention": self.model.attention,
                "gen_length": self.gen_length or "max_gen_toks of the task",
                "num_inference_steps": self.num_inference_steps or "one per token",
                **self.decoder,
                "constraint": None if self.constraint is None else self.constraint.model_dump(exclude_none=True),
                "seed": self.seed,
                "num_likelihood_samples": self.num_likelihood_samples,
                "likelihoods": len(self.likelihoods),
                "likelihoods_exact": len(self.likelihoods) - len(bounds),
                "likelihoods_bounds_without_error": len(bounds) - len(errors),
                "likelihoods_mean_std_error": sum(errors) / len(errors) if errors else 0.0,
                "check_greedy": self.check_greedy,
                "truncated": dict(self.truncated),
            }
        }

    # --- likelihoods -----------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fit(context, text) for _, context, text in requests]
        scored = self._score(pairs)
        greedy = self._is_greedy(pairs) if self.check_greedy else [False] * len(pairs)
        answers = [(item.logprob, agrees) for item, agrees in zip(scored, greedy, strict=True)]
        for (request, _, _), answer in zip(requests, answers, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts after the end token; texts longer than the model in windows, as lm-eval cuts them."""
        answers = []
        for (string,) in [request.args for request in requests]:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            scored = self._score([self._fit(*make_disjoint_window(window)) for window in windows])
            answers.append(sum(item.logprob for item in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), answers[-1])
        return answers

    def _score(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        scored = log_likelihoods(
            self.model, pairs, self.num_likelihood_samples, self.batch_size, self.seed, self._device
        )
        self.likelihoods += scored
        return scored

    def _fit(self, context: list[int], text: list[int]) -> Pair:
        """Cut a context on the left so that the text after it fits, as lm-eval's own models do; counted."""
        if len(text) >= self.max_length:
            raise ValueError(f"a text of {len(text)} tokens does not fit the model's {self.max_length} positions")
        room = self.max_length - len(text)
        if len(context) > room:
            self._note("contexts of likelihoods")
        return context[-room:], text

    def _is_greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Would greedy decoding, one token per step, write this text?"""
        answers = [True] * len(pairs)
        for length in {len(text) for _, text in pairs if text}:
            own = [index for index, (_, text) in enumerate(pairs) if len(text) == length]
            room = self._whole_blocks(length)
            # The decoder fills whole blocks, so a long context may have to lose more than the likelihood's does.
            keep = self.max_length - room
            if keep < 1 or any(len(pairs[index][0]) > keep for index in own):
                self._note("contexts of greedy checks")
            if keep < 1:
                answers = [answer and index not in own for index, answer in enumerate(answers)]
                continue
            prompts = [pairs[index][0][-keep:] for index in own]
            options = SamplerOptions.model_validate(
                {**self.decoder, "selector": "top_n", "temperature": 0.0, "gen_length": room,
                 "num_inference_steps": room}
            )  # fmt: skip
            for index, ids in zip(own, self._decode(prompts, options), strict=True):
                answers[index] = ids[:length] == pairs[index][1]
        return answers

    # --- completions -----------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions cut at the task's stop strings and at the end token; requests with equal settings in batches."""
        answers: list[str] = [""] * len(requests)
        groups: dict[SamplerOptions, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._options(request.args[1]), []).append(index)
        for options, own in groups.items():
            room = self.max_length - options.gen_length
            if room < 1:
                raise ValueError(
                    f"gen_length {options.gen_length} leaves no room for a prompt in {self.max_length} positions: "
                    f"set gen_length in --model_args"
                )
            prompts = [self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in own]
            for prompt in prompts:
                if len(prompt) > room:
                    self._note("prompts")
            # A schema has no hash, so it comes after the requests are grouped.
            constrained = with_changes(options, {"constraint": self.constraint})
            ids = self._decode([prompt[-room:] for prompt in prompts], constrained)
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for index, text in zip(own, texts, strict=True):
                context, settings = requests[index].args
                for stop in _stops(settings):
                    text = text.split(stop)[0]
                answers[index] = text
                self.cache_hook.add_partial("generate_until", (context, settings), text)
        return answers

    def _options(self, settings: dict[str, Any]) -> SamplerOptions:
        """The decoder for a request's generation settings."""
        length = self._whole_blocks(self.gen_length or int(settings.get("max_gen_toks", 256)))
        temperature = self.decoder["temperature"]
        if settings.get("do_sample") and settings.get("temperature") is not None:
            temperature = float(settings["temperature"])
        steps = self.num_inference_steps or length
        return SamplerOptions.model_validate(
            {**self.decoder, "gen_length": length, "num_inference_steps": steps, "temperature": temperature}
        )

    def _decode(self, prompts: Sequence[list[int]], options: SamplerOptions) -> list[list[int]]:
        engine = token_engine(
            self.model,
            options,
            eos_token_id=self.tokenizer.eos_token_id,
            max_batch_size=self.batch_size,
            device=self._device,
            **(self.beside if options.constraint is not None else {}),
        )
        trajectories = engine.generate([Request(ids, self.seed + index) for index, ids in enumerate(prompts)])
        return [trajectory.response_ids().tolist() for trajectory in trajectories]

    def _whole_blocks(self, length: int) -> int:
        return -(-length // (self.block_length or 1)) * (self.block_length or 1)

    def _note(self, what: str) -> None:
        if not self.truncated[what]:
            log.warning("%s longer than the model's %d positions lose their beginning", what, self.max_length)
        self.truncated[what] += 1


def _stops(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [word for word in ([until] if isinstance(until, str) else until) if word]


def main() -> None:
    """lm-eval's own command line, with `--model denoise_rl`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
