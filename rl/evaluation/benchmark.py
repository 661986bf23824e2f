"""Evaluate a model on a task: every decoder, every problem, every sample, kept and resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rl import distributed
from rl.config import Config
from rl.evaluation.answers import Evaluator, Problem
from rl.evaluation.figures import Figures
from rl.evaluation.generations import BatchCost, GenerationFolder
from rl.evaluation.scoring import as_asked, judge_of, load_examples, reward_settings, write_results
from rl.evaluation.settings import (
    device_name,
    file_hash,
    model_settings,
    package_versions,
    template_settings,
    texts_hash,
)
from rl.sections import MAX_GROUP
from rl.tasks.base import Example
from rl.tasks.chat import token_ids
from rl.tasks.load import load_task
from rl.tasks.templates import Template, choose_template, with_chat
from rl.train.run import Run
from rollouts.engines.causal import causal_options
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions, with_changes
from rollouts.samplers.presets import PRESETS

# What papers call a decoder -> our selector.
DECODINGS = {"static": "top_n", "dynamic": "dynamic", "threshold": "threshold", "left_to_right": "left_most"}


@dataclass(frozen=True)
class EvalPlan:
    """The options of an evaluation that are not in the config.

    Attributes:
        data: file of problems in the task's published format; None takes the hub's or the task's own.
        template: name or file of the prompt template; None takes the one that suits the tokenizer.
        decodings: keys of `DECODINGS`, or presets (`rollouts/samplers/presets.py`); empty takes the config's decoder.
        samples: completions per problem and decoder.
        temperature: None is greedy.
        limit: only the first so many problems.
        output: the folder; None puts it below run.output_dir.
        ks: pass@k to give; empty takes powers of two.
        reward: judge by another reward than the task's own; see `rl.evaluation.scoring.judge_of`.
    """

    data: str | None = None
    template: str | None = None
    decodings: Sequence[str] = ()
    samples: int = 1
    temperature: float | None = None
    limit: int | None = None
    output: str | None = None
    ks: Sequence[int] = ()
    reward: str | None = None


def decoders(
    plan: EvalPlan, sampler: SamplerOptions, step_counts: Sequence[int], autoregressive: bool = False
) -> dict[str, SamplerOptions]:
    """`static@8` -> options, for every decoding and step count; of an autoregressive model one, whose steps are tokens.

    Raises:
        ValueError: an unknown decoding, steps that do not divide over the blocks, or greedy samples that would all
            be the same.
    """
    for name in plan.decodings:
        if name not in DECODINGS and name not in PRESETS:
            raise ValueError(f"--decoding {name!r} does not exist: choose from {', '.join([*DECODINGS, *PRESETS])}")
    if not 1 <= plan.samples <= MAX_GROUP:
        raise ValueError(f"--samples must lie in [1, {MAX_GROUP}], got {plan.samples}")
    temperature = plan.temperature or 0.0
    if plan.ks and not 1 <= min(plan.ks) <= max(plan.ks) <= plan.samples:
        raise ValueError(f"--pass-k must lie between 1 and --samples {plan.samples}, got {max(plan.ks)}")
    if autoregressive:
        if plan.decodings:
            raise ValueError("--decoding chooses positions, and model.autoregressive knows one order: leave it out")
        if plan.samples > 1 and not temperature:
            raise ValueError(f"--samples {plan.samples} needs --temperature above 0: greedy samples are all the same")
        return {f"autoregressive@{sampler.gen_length}": causal_options(sampler, temperature)}
    selectors = {selector: name for name, selector in DECODINGS.items()}
    # A config's own decoder is named by its preset, or by its selector where the papers have no name for it.
    configured = sampler.preset or selectors.get(sampler.selector, sampler.selector)
    options = {}
    for name in plan.decodings or [configured]:
        parts: dict[str, Any] = {}
        if plan.decodings:
            parts = {"preset": None, "selector": DECODINGS[name]} if name in DECODINGS else {"preset": name}
        for steps in step_counts:
            update = {"num_inference_steps": steps, "temperature": temperature, "record_x0": False}
            option = with_changes(sampler, {**parts, **update})
            if plan.samples > 1 and not temperature and not option.random_order:
                raise ValueError(
                    f"--samples {plan.samples} needs --temperature above 0: greedy samples are all the same"
                )
            options[f"{name}@{steps}"] = option
    return options


def default_folder(config: Config) -> str:
    """Where generations are kept when no folder is named."""
    return f"{config.run.output_dir}/eval/{config.task.name.replace(':', '-')}"


def run_benchmark(
    config: Config, plan: EvalPlan
) -> tuple[GenerationFolder, dict[str, Figures], Template, list[Example]]:
    """Generate what the folder lacks, judge it, and write the figures.

    Returns:
        the folder, figures by decoder, and the template and examples the generations belong to.

    Raises:
        ValueError: anything the user got wrong, in one line.
    """
    if config.model.path is None:
        raise ValueError("model.path is required: name the folder of the model to evaluate")
    task = load_task(config.task.name, config.task.params)
    causal = config.model.autoregressive
    options = decoders(plan, config.sampler, config.evaluation_steps(), causal)
    examples = load_examples(task, plan.data, plan.limit, config.eval.num_prompts)
    judge = judge_of(config.reward, task, plan.reward)
    folder = GenerationFolder(plan.output or default_folder(config))
    with Run.open(config.model_copy(update={"reward": judge}), write=False) as run:
        chat = bool(getattr(run.tokenizer, "chat_template", None))
        template = choose_template(task, plan.template, chat)
        if plan.template is None and config.task.chat:
            template = replace(template, chat=True)
        examples = as_asked(examples, template)
        settings = {
            "task": {"name": config.task.name, "params": config.task.params},
            "data": {
                "origin": None if plan.data else getattr(task, "origin", "its own held-out ones"),
                "file": plan.data,
                "sha256": file_hash(plan.data) if plan.data else None,
                "limit": plan.limit,
                "num_problems": len(examples),
                "prompts_sha256": texts_hash(example["prompt"] for example in examples),
            },
            "template": template_settings(template, chat and template.chat),
            "model": model_settings(run.model, config.model.path, config.model.tokenizer),
            "reward": reward_settings(judge),
            "rollout": config.rollout.model_dump(exclude={"max_batch_size"}),
            "seed": config.run.seed,
            "samples": plan.samples,
            "decoders": {name: option.model_dump() for name, option in options.items()},
            "device": device_name(run.device),
            "versions": package_versions(),
        }
        evaluator = Evaluator(
            run,
            _problems(run.tokenizer, template, examples),
            run.judge.rewards,
            config.run.seed,
            cut=template.cut,
            unfit=_too_long,
        )
        main = distributed.rank() == 0

        def begin() -> set[tuple[str, str, int]]:
            folder.open(settings)
            return {generation.key for generation in folder.generations()}

        try:
            done = distributed.from_first(begin)
            for name, option in options.items():
                _generate(evaluator, folder if main else None, name, option, plan.samples, done)
            results = write_results(folder, plan.ks) if main else {}
        finally:
            folder.close()
    return folder, results, template, examples


def _problems(tokenizer: Any, template: Template, examples: Sequence[Example]) -> list[Problem]:
    problems = []
    for example in examples:
        prompt = with_chat(tokenizer, template, example["prompt"])
        try:
            (ids,) = token_ids(tokenizer, [prompt])
        except ValueError as error:
            raise ValueError(f"model.tokenizer cannot encode the prompt of {example['prompt_id']}: {error}") from None
        problems.append(Problem(example["prompt_id"], example, Request(ids, 0)))
    return problems


def _generate(
    evaluator: Evaluator,
    folder: GenerationFolder | None,
    name: str,
    options: SamplerOptions,
    samples: int,
    done: set[tuple[str, str, int]],
) -> None:
    """Get what one decoder lacks, in batches shared by all ranks; rank 0 holds the folder and writes."""
    run, problems = evaluator.run, evaluator.problems
    engine = run.engine(run.model, options)
    pending = [
        (index, sample)
        for index, problem in enumerate(problems)
        for sample in range(samples)
        if (name, problem.prompt_id, sample) not in done
    ]
    size = engine.max_batch_size * distributed.world_size()
    run.progress.stage(name, total=len(problems) * samples)
    finished = len(problems) * samples - len(pending)
    if finished:
        run.progress.message(f"{name}: {finished} completions are there already")
    for start in range(0, len(pending), size):
        _, mine = distributed.shard(pending[start : start + size])
        own = evaluator.ask(engine, name, mine)
        parts = distributed.gather_objects((own.generations, own.batch))
        generations = [generation for part, _ in parts for generation in part]
        batch = BatchCost(
            name,
            len(generations),
            tokens=sum(part.tokens for _, part in parts),
            seconds=max(part.seconds for _, part in parts),
            reward_seconds=max(part.reward_seconds for _, part in parts),
        )
        if folder is not None:
            folder.append(generations, batch)
        finished += len(generations)
        run.progress.update(finished, tokens_per_s=batch.tokens / max(batch.seconds, 1e-9))


def _too_long(engine: InProcessEngine, request: Request) -> str | None:
    """Why a request cannot be answered: its prompt does not fit, or has no token; None when it can."""
    prompt_ids = request.prompt_ids
    if not prompt_ids:
        return "the prompt has no token"
    length = len(prompt_ids) + engine.options.gen_length
    if engine.model.attention == "block_causal" and engine.options.block_length:
        length = -(-length // engine.options.block_length) * engine.options.block_length
    if length <= engine.model.max_length:
        return None
    return (
        f"prompt too long: {len(prompt_ids)} tokens and sampler.gen_length {engine.options.gen_length} do not fit the "
        f"model's {engine.model.max_length} positions"
    )
