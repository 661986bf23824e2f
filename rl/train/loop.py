"""The loop, top to bottom: warm start, evaluate, reinforce, evaluate, report."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from rewards.failures import WINDOW, RewardFailureError
from rl import distributed
from rl.evaluation.accuracy import as_metrics, evaluate, task_measures
from rl.evaluation.generations import Generation
from rl.files import write_json, write_whole, writing
from rl.run_folder import find_checkpoint
from rl.tasks.base import Example, validation_examples
from rl.tasks.chat import shown_prompt
from rl.track.callbacks import Wishes
from rl.track.stopwatch import Stopwatch
from rl.train.checkpoint import load_checkpoint, save_checkpoint
from rl.train.convert import convert
from rl.train.interrupt import heeding_signals
from rl.train.pairs import open_source
from rl.train.reward_gradient import RewardGradientUpdater
from rl.train.rollouts import RolloutSource
from rl.train.run import Run
from rl.train.sft import supervised
from rl.train.update import PolicyUpdater, Updater


def train(run: Run) -> dict[str, Any]:
    """Run every stage the config asks for; returns what `summary.json` holds."""
    heldout = run.task.heldout_examples(run.config.eval.num_prompts)
    if not heldout:
        raise ValueError("the task has no held-out rows: set task.params so that it has some")
    if run.config.train.steps:
        # Before anything else is trained, too.
        recipe = run.config.algorithm
        recipe.prepare(run)
        if run.config.rollout.engine != "server" and not recipe.reward_gradient:
            # The rollouts' own decoder, which no evaluation before them may use.
            run.engine(run.model, recipe.sampler_options(run.modality.options(), 0))
    with open_source(run) as source:
        return _stages(run, source, heldout)


def _stages(run: Run, source: RolloutSource, heldout: list[Example]) -> dict[str, Any]:
    config = run.config
    checkpoint, notes = find_checkpoint(run.folder) if config.run.resume else (None, [])
    for note in notes:
        run.progress.message(note)
    summary: dict[str, Any] = {
        "task": config.task.name,
        **run.judge.names,
        "algorithm": config.algorithm.name,
        "seed": config.run.seed,
        "n_eval": len(heldout),
        "goal": None,
    }
    begun = config.run.resume and (run.folder / "before.json").is_file()
    if checkpoint is None and not begun:
        if config.run.resume:
            run.progress.message("no complete checkpoint to resume from: starting over")
            run.metrics.truncate_after(-1)
        if config.eval.baseline:
            summary |= _baseline(run, heldout)
        # A checkpoint of the later stage holds what the earlier one has made.
        fitted = config.run.resume and find_checkpoint(run.folder / "sft")[0] is not None
        for steps, stage in ((0 if fitted else config.convert.steps, convert), (config.sft.steps, supervised)):
            if steps:
                with heeding_signals() as told_to_stop:
                    summary |= stage(run, told_to_stop=told_to_stop)
        summary |= _evaluated(run, "before", heldout, 0)
        views_before = _views(run, heldout, 0)
        if distributed.rank() == 0:
            run.save_model(run.folder / "warm_start")
            write_json(run.folder / "before.json", summary | {"views": views_before})
        distributed.barrier()
    else:
        before = json.loads((run.folder / "before.json").read_text())
        # In runs of an earlier version math_answer judged where a task named no verifier.
        judge = before.get("judge", "math_answer" if run.judge.by_rewards else summary["judge"])
        if judge != summary["judge"]:
            raise ValueError(
                f"run.resume: {judge} judged before training, {summary['judge']} would judge after it: choose another "
                "run.output_dir"
            )
        summary |= before
        views_before = summary.pop("views")
        if checkpoint is None:
            run.progress.message("no complete checkpoint to resume from: going on from the warm start")
            run.take_warm_start()
    if config.train.steps:
        with heeding_signals() as told_to_stop:
            summary |= reinforce(run, source, checkpoint, told_to_stop)
        summary |= _evaluated(run, "after", heldout, summary["train_steps"])
        summary["goal"] = _goal(run, summary)
    views = _views(run, heldout, summary.get("train_steps", 0))
    if distributed.rank() == 0:
        pairs = zip(views_before, views, strict=False)
        items = [
            {"prompt": b["prompt"], "answer": a["answer"], "before": b["view"], "after": a["view"]} for b, a in pairs
        ]
        grid = list(run.task.grid) if run.task.grid else None
        write_json(run.folder / "viewer.json", {"grid": grid, "items": items})
        write_json(run.folder / "summary.json", summary)
    distributed.barrier()
    run.heard()
    return summary


def reinforce(
    run: Run,
    source: RolloutSource | None = None,
    checkpoint: Any = None,
    told_to_stop: Callable[[], int] = lambda: 0,
) -> dict[str, Any]:
    """The RL stage on `run.model`; the model holds the trained weights afterwards.

    Args:
        source: gives the rollouts; without one the model of this process samples them.

    Raises:
        Stopped: a rank was told to stop; the step it was in is finished and in a checkpoint.
    """
    config = run.config
    total = config.train.steps * config.train.updates_per_step * config.train.epochs
    if source is None:
        source = open_source(run) if config.algorithm.preference_file else RolloutSource(run)
    resumed, step = checkpoint is not None, 0
    updater: Updater
    if config.algorithm.reward_gradient:
        updater = RewardGradientUpdater(run, config.algorithm, total, resumed)
    else:
        updater = PolicyUpdater(source, config.algorithm, total, resumed)
    saved = dict(updater.learners) | ({"ahead": source.ahead} if source.ahead is not None else {})
    if checkpoint is not None:
        step, state = load_checkpoint(checkpoint, saved)
        vars(run.costs).update(state["costs"])
        updater.resumed(step)
        if updater.memory is not None:
            updater.memory.restore(state["memory"])
        run.metrics.truncate_after(step)
        _drop_samples(run, step)
        run.progress.message(f"resumed from {checkpoint}")
    run.progress.stage("train", config.train.steps)
    objects = {"model": run.model, "processing_class": run.tokenizer}
    objects |= {"optimizer": updater.learner.optimizer, "lr_scheduler": updater.learner.schedule}
    run.callbacks.begin(step, config.train.steps, distributed.rank() == 0, **objects)
    stage: Counter[str] = Counter()
    kept = step if resumed else None
    silent = 0.0 if resumed else float(WINDOW)
    watch = Stopwatch()
    while step < config.train.steps:
        run.callbacks.step_begins()
        if run.wishes().failed:
            if kept != step:
                _save(run, updater, saved, step)
            run.heard()
        tick, before = time.perf_counter(), _overflows(updater)
        outcome = updater.step(step)
        learned = time.perf_counter()
        step += 1
        run.callbacks.step_ends(step)
        stage.update(outcome.seconds)
        metrics = outcome.metrics | {f"time/{name}": value for name, value in outcome.seconds.items()}
        # Of images an engine counts pixels or latents: their speed is in samples, as that of rollouts with gradient.
        made = {"tokens": metrics.pop("rollout/tokens", 0.0), "samples": metrics.pop("rollout/samples")}
        unit = run.modality.unit if made["tokens"] else "samples"
        speed = made[unit] / (learned - tick)
        metrics[f"speed/{unit}_per_s"] = speed
        metrics["optimizer/lr"] = updater.learner.learning_rate()
        if updater.learner.scales_loss:
            metrics["optimizer/overflows"] = _overflows(updater) - before
        run.metrics.log(step, "train", metrics | run.costs.as_metrics())
        _log_samples(run, step, outcome.samples)
        silent = _without_score(run, step, metrics, silent)
        run.progress.update(step, reward=metrics["reward/mean"], **{f"{unit}_per_s": speed})
        out_of_time = bool(config.train.max_seconds and learned - watch.started > config.train.max_seconds)
        # Reduced, because all ranks have to end after the same step.
        ending = distributed.reduce_number(max(told_to_stop(), out_of_time), "max", run.device)
        asked = run.wishes()
        # Costs are sums over all ranks already.
        spent = run.costs.sequence_forwards >= (config.train.max_sequence_forwards or math.inf)
        last = step == config.train.steps or ending > 0 or spent or asked.stop
        if (asked.evaluate or (config.eval.every and step % config.eval.every == 0)) and not last:
            rows = validation_examples(run.task, config.eval.every_prompts)
            _evaluated(run, "on the way", rows, step)
            asked = Wishes.of_all([asked, run.wishes()])
        if last or any(asked) or (config.checkpoint.every and step % config.checkpoint.every == 0):
            _save(run, updater, saved, step)
            kept = step
        stopped = run.heard().stop
        if ending > 1:
            raise run.stopped(ending, step)
        if ending or spent or stopped:
            option = "train.max_seconds" if ending else "train.max_sequence_forwards"
            why = f"{option} reached" if ending or spent else "a callback stopped training"
            run.progress.message(f"{why} after {step} of {config.train.steps} steps")
            break
    run.callbacks.tell("on_train_end")
    return {
        "train_steps": step,
        **watch.read("train", run.device),
        "stage_seconds": dict(stage),
        **vars(run.costs),
    }


def _save(run: Run, updater: Updater, saved: Mapping[str, Any], step: int) -> None:
    """Write a checkpoint of the run after `step` steps; `saved` has a sub-folder each."""
    state = {"costs": vars(run.costs)}
    if updater.memory is not None:
        state["memory"] = updater.memory.state()
    save_checkpoint(run.folder, step, saved, run.save_model, state, run.config.checkpoint.keep)
    run.callbacks.tell("on_save")


def _without_score(run: Run, step: int, metrics: Mapping[str, float], before: float) -> float:
    """Rollouts in a row that got no score because no reward applies to them: `before` this step -> after it.

    Raises:
        RewardFailureError: none of the run so far, or of the latest 256, has a score (`reward.max_failure_share` < 1).
    """
    failures = sum(value for name, value in metrics.items() if name.endswith("/failures"))
    if not math.isnan(metrics["reward/mean"]) or failures:
        return 0.0
    silent = before + metrics["filters/unscored"]
    if silent > WINDOW:
        text = (
            f"step {step}: none of {metrics['filters/unscored']:.0f} rollouts got a score from "
            f"{run.judge.names['reward']}, so nothing is learned: a reward gives None where it does not apply"
        )
        if run.config.reward.max_failure_share < 1:
            raise RewardFailureError(f"{text} (reward.max_failure_share=1 goes on all the same)")
        run.progress.message(text)
    return silent


def _baseline(run: Run, heldout: list[Example]) -> dict[str, Any]:
    """The part `baseline` of the summary: how `eval.baseline` answers. A run that resumes keeps what it found."""
    path = run.folder / "baseline.json"
    if not (run.config.run.resume and path.is_file()):
        found = _evaluated(run.of_baseline(), "baseline", heldout, 0)
        if distributed.rank() == 0:
            write_json(path, found)
        distributed.barrier()
        return found
    found = json.loads(path.read_text())
    return found


def _evaluated(run: Run, name: str, rows: list[Example], step: int) -> dict[str, Any]:
    """Evaluate the model as it is, log it, and give its part of the summary."""
    watch = Stopwatch()
    results, completions = evaluate(run, rows, run.config.evaluation_steps())
    quality: dict[str, Any] = {}
    for steps, made in completions.items():
        rewards = [math.nan if answer.reward is None else answer.reward for answer in made]
        texts = [answer.completion for answer in made]
        quality[str(steps)] = run.modality.measure(rows, texts, rewards)
        quality[str(steps)] |= task_measures(run, rows, results[steps], made)
    metrics = {f"eval/{key}@{steps}": value for steps, values in quality.items() for key, value in values.items()}
    metrics |= as_metrics(results)
    stage = "baseline" if name == "baseline" else "eval"
    run.metrics.log(step, stage, metrics)
    if stage == "eval":
        run.callbacks.evaluated(run.callbacks.named(stage, metrics), name == "on the way")
    if name != "on the way" and run.config.eval.keep_answers and distributed.rank() == 0:
        _keep_answers(run, name, rows, completions)
    parts = {
        "": {str(steps): result.value for steps, result in results.items()},
        "_interval": {str(steps): [result.low, result.high] for steps, result in results.items()},
        "_unscored": {str(steps): result.unscored for steps, result in results.items()},
        "_backslide": {str(steps): vars(result.backslide) for steps, result in results.items() if result.backslide},
        "_quality": {steps: values for steps, values in quality.items() if values},
        **watch.read("", run.device),
    }
    optional = ("_backslide", "_quality")
    return {f"{name}{suffix}": part for suffix, part in parts.items() if part or suffix not in optional}


def _keep_answers(run: Run, name: str, rows: list[Example], completions: Mapping[int, list[Generation]]) -> None:
    """The first answers at every step count, whatever they are worth, to answers/NAME.jsonl."""
    lines = [
        {"steps": steps, "prompt": shown_prompt(row["prompt"]), "completion": made.completion, "reward": made.reward}
        for steps, answers in completions.items()
        for row, made in list(zip(rows, answers, strict=True))[: run.config.eval.keep_answers]
    ]
    path = run.folder / "answers" / f"{name}.jsonl"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def _overflows(updater: Updater) -> int:
    return sum(learner.overflows for learner in updater.learners.values())


def _goal(run: Run, summary: dict[str, Any]) -> dict[str, Any] | None:
    goal = run.config.goal
    if goal is None:
        return None
    key = str(goal.steps)
    met = summary["before"][key] <= goal.before_max and summary["after"][key] >= goal.after_min
    return {"metric": key, "before_max": goal.before_max, "after_min": goal.after_min, "met": met}


def _views(run: Run, heldout: list[Example], step: int) -> list[dict[str, Any]]:
    """Step-by-step views of the first held-out prompts after `step` RL steps (rank 0 decodes them all)."""
    rows = heldout[: run.config.eval.viewer_items]
    if not rows or distributed.rank() != 0:
        return []
    steps = run.config.eval.viewer_steps or run.modality.options().num_inference_steps
    engine = run.engine(run.model, run.modality.evaluation_options(steps))
    trajectories = engine.generate(run.modality.requests(rows, [[i] for i in range(len(rows))], None))
    _, table = run.judge.score(rows, trajectories, verifier=True)
    views = run.modality.views(rows, trajectories, table.values)
    items = [
        {
            "prompt": shown_prompt(row["prompt"]),
            "answer": None if row.get("answer") is None else shown_prompt(row["answer"]),
            "view": view | {"value": value, "parts": part},
        }
        for row, view, value, part in zip(rows, views, table.values, table.by_completion(), strict=True)
    ]
    run.callbacks.tell("on_views", items=items, step=step, grid=run.task.grid)
    return items


def _log_samples(run: Run, step: int, samples: list[dict[str, Any]]) -> None:
    """Append samples of a step to samples.jsonl."""
    if distributed.rank() != 0:
        return
    path = run.folder / "samples.jsonl"
    with writing(path), path.open("a") as file:
        for sample in samples:
            file.write(json.dumps({"step": step, **sample}) + "\n")


def _drop_samples(run: Run, step: int) -> None:
    """Drop the samples of later steps, which a resumed run draws again."""
    path = run.folder / "samples.jsonl"
    if distributed.rank() == 0 and path.is_file():
        # A kill in the middle of a write leaves a last line without its end.
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_whole(path, "".join(line for line in whole if json.loads(line)["step"] <= step))
