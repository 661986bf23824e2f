"""The loop, top to bottom: warm start, evaluate, reinforce, evaluate, report."""

from __future__ import annotations

import copy
import json
import os
import random
import time
from typing import Any

from rl.algorithms import parse_options
from rl.evaluate.accuracy import Accuracy, as_metrics, evaluate
from rl.models.load import load_policy, save_policy
from rl.tasks.base import Row, validation_rows
from rl.train import distributed
from rl.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from rl.train.learner import Learner
from rl.train.policy import Policy
from rl.train.session import ScoredRollouts, Session, join_metrics
from rl.train.sft import supervised
from rl.train.update import PolicyUpdater, rollout_metrics
from rl.values.model import PolicyWithValue, ValueModel


def train(session: Session) -> dict[str, Any]:
    """Run every stage the config asks for; returns what `summary.json` holds."""
    config = session.config
    heldout = session.task.heldout_rows(config.eval.num_prompts)
    if not heldout:
        raise ValueError("the task has no held-out rows: set task.params so that it has some")
    checkpoint, notes = find_checkpoint(session.run_dir) if config.run.resume else (None, [])
    for note in notes:
        session.progress.message(note)
    summary: dict[str, Any] = {
        "task": config.task.name,
        "algorithm": config.algorithm["name"],
        "seed": config.run.seed,
        "n_eval": len(heldout),
        "goal": None,
    }
    if checkpoint is None:
        if config.run.resume:
            session.progress.message("no complete checkpoint to resume from: starting over")
            session.metrics.truncate_after(-1, ("sft", "train", "eval"))
            _drop_samples(session, -1)
        if config.sft.steps:
            summary |= supervised(session)
        before, _ = evaluate(session, session.model, heldout, config.eval.num_inference_steps)
        session.metrics.log(0, "eval", as_metrics(before))
        summary |= _accuracy("before", before)
        views_before = _views(session, session.model, heldout)
        if distributed.rank() == 0:
            save_policy(session.model, session.tokenizer, session.run_dir / "warm_start")
            _write_json(session.run_dir / "before.json", summary | {"views": views_before})
        distributed.barrier()
    else:
        summary |= json.loads((session.run_dir / "before.json").read_text())
        views_before = summary.pop("views")
    if config.train.steps:
        summary |= reinforce(session, checkpoint)
        after, _ = evaluate(session, session.model, heldout, config.eval.num_inference_steps)
        session.metrics.log(summary["train_steps"], "eval", as_metrics(after))
        summary |= _accuracy("after", after)
        summary["goal"] = _goal(session, summary)
    views = _views(session, session.model, heldout)
    if distributed.rank() == 0:
        _write_json(session.run_dir / "viewer.json", _viewer(session, views_before, views))
        _write_json(session.run_dir / "summary.json", summary)
    distributed.barrier()
    return summary


def reinforce(session: Session, checkpoint: Any = None) -> dict[str, Any]:
    """The RL stage on `session.model`; the model holds the trained weights afterwards."""
    config = session.config
    recipe = parse_options(config.algorithm).build()
    reference = None
    if recipe.needs_reference:
        # The frozen policy is the one RL started from, also after a resume.
        start = session.model
        if checkpoint is not None:
            warm = config.model.model_copy(update={"path": str(session.run_dir / "warm_start")})
            start = load_policy(warm, session.tokenizer, config.run.seed)
        reference = copy.deepcopy(start).to(session.device).eval().requires_grad_(False)
    total = config.train.steps * config.train.updates_per_step * config.train.epochs
    # session.model is the copy that samples; it gets the learner's weights after every update.
    shared = recipe.value is not None and recipe.value.share_backbone
    sampling = PolicyWithValue(session.model) if shared else Policy(session.model)
    learner = Learner(sampling, config.train.deepspeed, config.train.optimizer, total, session.device)
    # Also before the first step: the learner may compute in another precision than the model was loaded in.
    learner.copy_weights_into(sampling)
    if config.train.block_schedule and session.model.attention != "block_causal":
        raise ValueError("train.block_schedule needs a block-causal model: this one attends fully")
    learners = {"policy": learner}
    if recipe.value is not None and not recipe.value.share_backbone:
        learners["value"] = Learner(
            ValueModel(session.model), config.train.deepspeed, recipe.value.optimizer, total, session.device
        )
    updater = PolicyUpdater(session, recipe, learner, reference, learners.get("value"))
    step = 0
    if checkpoint is not None:
        step, state = load_checkpoint(checkpoint, learners)
        vars(session.costs).update(state["costs"])
        learner.copy_weights_into(sampling)
        blocks = config.train.blocks_at(max(step - 1, 0))
        if blocks is not None:
            session.rollout_block = session.model.config.block_length = blocks.rollout
        session.metrics.truncate_after(step)
        _drop_samples(session, step)
        session.progress.message(f"resumed from {checkpoint}")
    session.progress.stage("train", config.train.steps)
    stage = {"rollout": 0.0, "reward": 0.0, "learn": 0.0}
    started = time.perf_counter()
    while step < config.train.steps:
        tick = time.perf_counter()
        blocks = config.train.blocks_at(step)
        if blocks is not None:
            # The model that is saved decodes with the block length it was last sampled with.
            session.rollout_block = session.model.config.block_length = blocks.rollout
            updater.block_length = blocks.train
        rollouts = _sample(session, step, learner.updates)
        rolled = time.perf_counter()
        metrics = join_metrics(
            distributed.gather_objects((rollouts.table.metrics, len(rollouts.completions)))
        ) | rollout_metrics(rollouts, session.device)
        metrics |= distributed.sum_metrics(rollouts.filtered, session.device)
        metrics |= updater.step(rollouts)
        learner.copy_weights_into(sampling)
        learned = time.perf_counter()
        step += 1
        seconds = {
            "rollout": rolled - tick - rollouts.reward_seconds,
            "reward": rollouts.reward_seconds,
            "learn": learned - rolled,
        }
        stage = {name: stage[name] + seconds[name] for name in stage}
        generated = distributed.reduce_number(rollouts.stats.generated_tokens, "sum", session.device)
        metrics |= {f"time/{name}": value for name, value in seconds.items()}
        metrics["speed/distinct_row_share"] = rollouts.rows_run / max(rollouts.rows_asked, 1)
        metrics |= {"speed/tokens_per_s": generated / (learned - tick), "optimizer/lr": learner.learning_rate()}
        session.metrics.log(step, "train", metrics | session.costs.as_metrics())
        _log_samples(session, step, rollouts)
        session.progress.update(step, reward=metrics["reward/mean"], tokens_per_s=metrics["speed/tokens_per_s"])
        out_of_time = bool(config.train.max_seconds and learned - started > config.train.max_seconds)
        out_of_time = bool(distributed.reduce_number(out_of_time, "max", session.device))
        last = step == config.train.steps or out_of_time
        if config.eval.every and step % config.eval.every == 0 and not last:
            rows = validation_rows(session.task, config.eval.every_prompts)
            results, _ = evaluate(session, session.model, rows, config.eval.num_inference_steps)
            session.metrics.log(step, "eval", as_metrics(results))
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            _checkpoint(session, step, learners)
        if out_of_time:
            session.progress.message(f"train.max_seconds reached after {step} of {config.train.steps} steps")
            break
    return {
        "train_steps": step,
        "train_seconds": time.perf_counter() - started,
        "stage_seconds": stage,
        **vars(session.costs),
    }


def _sample(session: Session, step: int, policy_version: int) -> ScoredRollouts:
    """The rollouts of an RL step; batches of prompts are added while the filters leave too few of them."""
    config = session.config
    wanted, rounds = config.train.prompts_per_step, config.filters.refill_rounds
    rows = session.task.train_rows(config.run.seed, step, wanted * (1 + rounds))
    parts: list[ScoredRollouts] = []
    kept = 0.0
    for start in range(0, len(rows), wanted):
        first, mine = session.shard(rows[start : start + wanted])
        first += start
        part = session.rollout(
            session.engine(session.model),
            mine,
            config.train.group_size,
            seed=_step_seed(config.run.seed, step),
            first=first,
            steps=_step_counts(session, step, first, len(mine)),
            policy_version=policy_version,
        )
        parts.append(part)
        kept += distributed.reduce_number(len(part.group[part.keep].unique()), "sum", session.device)
        if kept >= wanted:
            break
    return ScoredRollouts.join(parts)


def _step_seed(seed: int, step: int) -> int:
    return seed * 1_000_003 + step + 1


def _step_counts(session: Session, step: int, first: int, count: int) -> list[int] | None:
    """num_inference_steps of every prompt, drawn from `train.mixed_steps` by (seed, step, prompt)."""
    choices = session.config.train.mixed_steps
    if not choices:
        return None
    seed = session.config.run.seed
    return [random.Random(f"steps {seed} {step} {first + i}").choice(choices) for i in range(count)]


def _checkpoint(session: Session, step: int, learners: dict[str, Learner]) -> None:
    save_checkpoint(
        session.run_dir,
        step,
        learners,
        lambda path: save_policy(session.model, session.tokenizer, path),
        {"costs": vars(session.costs), "world_size": distributed.world_size()},
        session.config.checkpoint.keep,
    )


def _accuracy(name: str, results: dict[int, Accuracy]) -> dict[str, Any]:
    return {
        name: {str(steps): result.accuracy for steps, result in results.items()},
        f"{name}_interval": {str(steps): [result.low, result.high] for steps, result in results.items()},
        f"{name}_unscored": {str(steps): result.unscored for steps, result in results.items()},
    }


def _goal(session: Session, summary: dict[str, Any]) -> dict[str, Any] | None:
    goal = session.config.goal
    if goal is None:
        return None
    key = str(goal.steps)
    met = summary["before"][key] <= goal.before_max and summary["after"][key] >= goal.after_min
    return {"metric": key, "before_max": goal.before_max, "after_min": goal.after_min, "met": met}


def _views(session: Session, model: Any, heldout: list[Row]) -> list[dict[str, Any]]:
    """Step-by-step views of the first held-out prompts (rank 0 decodes them all)."""
    from rl.track.viewer import trajectory_view
    from rollouts.engines.in_process import Request

    count = min(session.config.eval.viewer_items, len(heldout))
    if not count or distributed.rank() != 0:
        return []
    steps = session.config.eval.viewer_steps or session.config.sampler.num_inference_steps
    options = session.config.sampler.model_copy(update={"temperature": 0.0, "num_inference_steps": steps})
    prompt_ids = session.tokenizer([row["prompt"] for row in heldout[:count]], add_special_tokens=False).input_ids
    trajectories = session.engine(model, options).generate([Request(ids, seed=i) for i, ids in enumerate(prompt_ids)])
    _, table = session.judge(heldout[:count], trajectories, verifier=True)
    return [
        {
            "prompt": row["prompt"],
            "view": trajectory_view(
                trajectory,
                lambda token: session.tokenizer.decode([token]),
                (value or 0.0) >= 1.0,
                _givens(row, session.task.grid),
            ),
        }
        for row, trajectory, value in zip(heldout, trajectories, table.values, strict=False)
    ]


def _givens(row: Row, grid: tuple[int, int] | None) -> list[str] | None:
    if grid is None or "puzzle" not in row:
        return None
    return ["" if cell == "0" else cell for cell in row["puzzle"]]


def _viewer(session: Session, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    items = [
        {"prompt": b["prompt"], "before": b["view"], "after": a["view"]} for b, a in zip(before, after, strict=False)
    ]
    return {"grid": list(session.task.grid) if session.task.grid else None, "items": items}


def _log_samples(session: Session, step: int, rollouts: ScoredRollouts, count: int = 2) -> None:
    """Append the first rollouts of a step to samples.jsonl."""
    if distributed.rank() != 0:
        return
    with (session.run_dir / "samples.jsonl").open("a") as file:
        for i in range(min(count, len(rollouts.completions))):
            line = {
                "step": step,
                "prompt": rollouts.rows[i]["prompt"],
                "completion": rollouts.completions[i],
                "reward": rollouts.table.values[i],
                "num_steps": rollouts.trajectories[i].num_steps,
            }
            file.write(json.dumps(line) + "\n")


def _drop_samples(session: Session, step: int) -> None:
    """Drop the samples of later steps, which a resumed run draws again."""
    path = session.run_dir / "samples.jsonl"
    if distributed.rank() == 0 and path.is_file():
        # A kill in the middle of a write leaves a last line without its end.
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))


def _write_json(path: Any, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, default=float))
    os.replace(partial, path)
