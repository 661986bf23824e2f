"""What a run does, one function each: sample, score log-probs, judge, evaluate. Exported by `rl`.

Shape legend: N prompts, G samples of each, T denoising steps, U decisions of a trajectory.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rewards.run import RewardRunner
from rewards.table import RewardPart
from rl.config import validate
from rl.errors import in_words
from rl.files import write_whole
from rl.inputs import Reward, Rows, as_lines, reward_part, rows_of, several
from rl.model_section import ModelConfig
from rl.models.load import load_policy
from rl.models.reader import beside_policy
from rl.models.tokenizers import load_tokenizer
from rl.registry import parse_recipe
from rl.tasks.chat import prompt_text, token_ids
from rl.train.rollouts import request_seed
from rl.trainer import Trainer
from rollouts.engines.base import Request
from rollouts.engines.shared import SharedForwards
from rollouts.engines.tokens import token_engine
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import TokenTrajectory


def sample(
    model: Any,
    prompts: Sequence[Any],
    decoder: SamplerOptions | Mapping[str, Any] | str | None = None,
    *,
    tokenizer: Any = None,
    num_samples: int = 1,
    seed: int = 0,
    max_batch_size: int = 256,
) -> list[TokenTrajectory]:
    """Sample answers of a language model, with everything that the sampler decided.

    Example::

        trajectories = rl.sample("path/to/model", ["17 + 25 ="], {"gen_length": 16, "num_inference_steps": 8})
        print(tokenizer.decode(trajectories[0].response_ids()))

    Args:
        model: folder or hub name, or a loaded policy.
        prompts: [N] text as it is, messages (rendered by the tokenizer's chat template), or token ids.
        decoder: options of `SamplerOptions`, or the name of a preset; None is its defaults.
        tokenizer: needed for prompts of text with a loaded policy; answers end at its end token.
        num_samples: G.
        seed: the only source of randomness; sample g of prompt n is the same whatever is sampled beside it.

    Returns:
        [N * G], the samples of a prompt together. They hold token ids, never text.

    Raises:
        ValueError: a prompt or an option that does not fit, in one line.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is a text: give a list of them")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: draw at least 1")
    with in_words({"model.tokenizer or model.path": "model", "model.path": "model", "sampler": "decoder"}):
        options: Any = decoder
        if not isinstance(decoder, SamplerOptions):
            options = validate({"sampler": _options(decoder)}).sampler
        if isinstance(model, str | Path):
            config = ModelConfig(path=str(model))
            tokenizer = tokenizer or load_tokenizer(config, None)
            model = load_policy(config, tokenizer, seed)
    _check_policy(model)
    size = getattr(model, "vocab_size", None)
    ids = [_ids(tokenizer, prompt, f"prompts[{index}]", size) for index, prompt in enumerate(prompts)]
    requests = [
        Request(prompt, request_seed(seed, index, number))
        for index, prompt in enumerate(ids)
        for number in range(num_samples)
    ]
    device = next(model.parameters()).device
    engine = token_engine(
        SharedForwards(model),
        options,
        eos_token_id=getattr(tokenizer, "eos_token_id", None),
        max_batch_size=max_batch_size,
        device=device,
        **beside_policy(options, tokenizer, model, device),
    )
    return engine.generate(requests)


def logprobs(model: Any, trajectories: Sequence[TokenTrajectory], estimator: Any = "tracerl") -> list[torch.Tensor]:
    """Log-probabilities of sampled trajectories under a model, by the estimator of a recipe.

    Example: under the weights that sampled them, the exact trace gives back what the sampler recorded::

        scored = rl.logprobs(model, trajectories)
        (scored[0] - torch.tensor(trajectories[0].logprob)).abs().max()      # rounding

    Args:
        model: a loaded policy, a `rollouts.model_protocol.DenoisingModel`.
        estimator: name of a recipe, its class, or an instance: what it calls a decision is scored, such as every
            revealed token (tracerl), every token of masked copies (coupled_grpo), the whole answer (espo).

    Returns:
        [U] with gradient for each trajectory, in nats; the trace's decisions in the order they were made.

    Raises:
        ValueError: there are no trajectories, or the estimator is of another modality or needs more than they recorded.
    """
    _check_policy(model)
    if not isinstance(trajectories, Sequence) or not trajectories:
        raise ValueError(f"trajectories is {type(trajectories).__name__} or empty: give a list of what rl.sample gave")
    recipe = parse_recipe({"name": estimator}) if isinstance(estimator, str | type) else estimator
    if recipe.modality != "text":
        raise ValueError(f"estimator {recipe.name!r} scores {recipe.modality}: name a recipe of text")
    rows = recipe.rows(trajectories, model).distinct().to(next(model.parameters()).device)
    scores, owner = rows.score(model).logprob, rows.trajectory
    order = torch.argsort(rows.step, stable=True)
    return [scores[order[owner[order] == index]] for index in range(len(trajectories))]


def score(
    reward_funcs: Reward | Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    **columns: Sequence[Any],
) -> list[float | None]:
    """Judge completions by one or several rewards.

    Example: `rl.score("math_answer", ["17 + 25 ="], ["42"], answer=["42"])` is `[1.0]`.

    Args:
        reward_funcs: names, functions, or mappings with `name`, `weight` and `params`; their values add up.
        prompts, completions: [N].
        columns: [N] each, what the rewards need beside them.

    Returns:
        [N]; None where a reward failed (a warning says why) or does not apply.

    Raises:
        ValueError: no such reward, or a column that has another length.
    """
    for name, values in {"prompts": prompts, "completions": completions, **columns}.items():
        if isinstance(values, str):
            raise ValueError(f"{name} is a text: give a list of them")
        if len(values) != len(prompts):
            raise ValueError(f"{name} has {len(values)} entries and there are {len(prompts)} prompts")
    with in_words({"reward.functions": "reward_funcs"}):
        given = [reward_part(found, i) for i, found in enumerate(several(reward_funcs))]
        checked = validate({"reward": {"functions": given}}).reward.functions
        parts = [RewardPart(**part.model_dump()) for part in checked]
    with RewardRunner(parts, max_failure_share=1.0) as runner:
        table = runner.score(prompts, completions, {name: list(values) for name, values in columns.items()})
    for name, scores in table.parts.items():
        reasons = [found.reason for found in scores if found.failed]
        if reasons:
            text = f"reward {name!r} failed on {len(reasons)} of {len(scores)} completions: {reasons[0]}"
            warnings.warn(text, stacklevel=2)
    return table.values


def evaluate(
    model: Any,
    dataset: Rows,
    reward_funcs: Reward | Sequence[Reward],
    num_inference_steps: int | Sequence[int] = (4,),
    decoder: SamplerOptions | Mapping[str, Any] | str | None = None,
    *,
    processing_class: Any = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Greedy mean reward of a model on a dataset by number of denoising steps, with 95 % intervals over prompts.

    Example: `rl.evaluate("path/to/model", rows, "math_answer", [4, 8])` has `eval_reward@4`, `eval_reward_low@4`,
    `eval_reward_high@4`, `eval_unscored@4`, and the same at 8.

    Args:
        dataset, reward_funcs, processing_class, options: see `rl.Trainer`.
        decoder: as of `sample`; rewards of 0 and 1 make a mean reward an accuracy.
    """
    settings = {f"sampler.{name}": value for name, value in _options(decoder).items()}
    steps = [num_inference_steps] if isinstance(num_inference_steps, int) else list(num_inference_steps)
    if not steps:
        raise ValueError("num_inference_steps is empty: give at least one number of denoising steps")
    settings |= {"eval.num_inference_steps": steps, "train.steps": 0} | {"sampler.num_inference_steps": steps[0]}
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"run.output_dir": folder, "eval.num_prompts": 10**9}
        # One file for both: nothing is trained.
        rows = str(write_whole(Path(folder) / "dataset.jsonl", as_lines(rows_of(dataset, "dataset"), "dataset")))
        with in_words({"sampler": "decoder"}):
            trainer = Trainer(
                model, reward_funcs, settings, rows, rows, processing_class=processing_class, options=options
            )
        return trainer.evaluate()


def _options(decoder: SamplerOptions | Mapping[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(decoder, SamplerOptions):
        return decoder.model_dump()
    return {"preset": decoder} if isinstance(decoder, str) else dict(decoder or {})


def _check_policy(model: Any) -> None:
    if not hasattr(model, "mask_token_id") or not hasattr(model, "hidden_states"):
        raise ValueError(f"model is a {type(model).__name__}: give a loaded policy (rl.models.load.load_policy)")


def _ids(tokenizer: Any, prompt: Any, where: str, vocab_size: int | None) -> list[int]:
    """Token ids of a prompt that is text, messages or ids.

    Raises:
        ValueError: it is something else, needs a tokenizer, or an id lies outside the vocabulary.
    """
    if not isinstance(prompt, str) and not hasattr(prompt, "__len__"):
        raise ValueError(f"{where} is a {type(prompt).__name__}: give text, messages, or token ids")
    if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Mapping)):
        if tokenizer is None:
            raise ValueError("tokenizer is required for prompts of text with a loaded policy: give it, or token ids")
        return token_ids(tokenizer, [prompt_text(tokenizer, {"prompt": prompt}, chat=False)])[0]
    ids = [int(token) for token in prompt]
    wrong = next((i for i in ids if vocab_size is not None and not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"{where} holds token id {wrong}, the model has {vocab_size}: give ids of its own tokenizer")
    return ids
