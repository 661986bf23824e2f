"""What a run does, one function each: sample, score log-probs, judge, evaluate. Exported by `rl`.

Shape legend: N prompts, G samples of each, T denoising steps, U decisions of a trajectory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rewards.run import RewardRunner
from rewards.table import RewardPart
from rl.files import write_whole
from rl.inputs import Reward, Rows, as_lines, reward_part, rows_of, several
from rl.model_section import ModelConfig
from rl.models.load import load_policy
from rl.models.reader import open_guide
from rl.models.tokenizers import read_tokenizer
from rl.models.vocabulary import compiled_constraint
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
    if isinstance(model, str):
        tokenizer = tokenizer or read_tokenizer(model)
        model = load_policy(ModelConfig(path=model), tokenizer, seed)
    if tokenizer is None and any(not _is_ids(prompt) for prompt in prompts):
        raise ValueError("tokenizer is required for prompts of text with a loaded policy: give it, or token ids")
    given = {"preset": decoder} if isinstance(decoder, str) else decoder or {}
    options = given if isinstance(given, SamplerOptions) else SamplerOptions.model_validate(given)
    requests = [
        Request(ids, request_seed(seed, index, number))
        for index, ids in enumerate(_ids(tokenizer, prompt) for prompt in prompts)
        for number in range(num_samples)
    ]
    constraint = None
    if options.constraint is not None:
        if tokenizer is None:
            raise ValueError("tokenizer is required for a constraint with a loaded policy: give it")
        constraint = compiled_constraint(options.constraint, tokenizer, getattr(model, "excluded_token_ids", ()))
    device = next(model.parameters()).device
    if options.guide is not None and tokenizer is None:
        raise ValueError("tokenizer is required for a guide with a loaded policy: give it")
    engine = token_engine(
        SharedForwards(model),
        options,
        eos_token_id=getattr(tokenizer, "eos_token_id", None),
        max_batch_size=max_batch_size,
        device=device,
        constraint=constraint,
        guide=open_guide(options, tokenizer, model, device),
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
    """
    recipe = parse_recipe({"name": estimator}) if isinstance(estimator, str | type) else estimator
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
        [N]; None where a reward failed or does not apply.

    Raises:
        ValueError: no such reward, or a column that has another length.
    """
    for name, values in {"completions": completions, **columns}.items():
        if len(values) != len(prompts):
            raise ValueError(f"{name} has {len(values)} entries and there are {len(prompts)} prompts")
    parts = [RewardPart(**reward_part(found, i)) for i, found in enumerate(several(reward_funcs))]
    with RewardRunner(parts, max_failure_share=1.0) as runner:
        return runner.score(prompts, completions, {name: list(values) for name, values in columns.items()}).values


def evaluate(
    model: Any,
    dataset: Rows,
    reward_funcs: Reward | Sequence[Reward],
    num_inference_steps: Sequence[int] = (4,),
    decoder: Mapping[str, Any] | None = None,
    *,
    processing_class: Any = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Greedy mean reward of a model on a dataset by number of denoising steps, with 95 % intervals over prompts.

    Example: `rl.evaluate("path/to/model", rows, "math_answer", [4, 8])` has `eval_reward@4`, `eval_reward_low@4`,
    `eval_reward_high@4`, `eval_unscored@4`, and the same at 8.

    Args:
        dataset, reward_funcs, processing_class, options: see `rl.Trainer`.
        decoder: options of the sampler; rewards of 0 and 1 make a mean reward an accuracy.
    """
    settings = {f"sampler.{name}": value for name, value in (decoder or {}).items()}
    steps = list(num_inference_steps)
    settings |= {"eval.num_inference_steps": steps, "train.steps": 0} | {"sampler.num_inference_steps": steps[0]}
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"run.output_dir": folder, "eval.num_prompts": 10**9}
        # One file for both: nothing is trained.
        rows = str(write_whole(Path(folder) / "dataset.jsonl", as_lines(rows_of(dataset, "dataset"), "dataset")))
        trainer = Trainer(model, reward_funcs, settings, rows, rows, processing_class=processing_class, options=options)
        return trainer.evaluate()


def _is_ids(prompt: Any) -> bool:
    return not isinstance(prompt, str) and (not len(prompt) or not isinstance(prompt[0], Mapping))


def _ids(tokenizer: Any, prompt: Any) -> list[int]:
    if _is_ids(prompt):
        return [int(token) for token in prompt]
    return token_ids(tokenizer, [prompt_text(tokenizer, {"prompt": prompt}, chat=False)])[0]
