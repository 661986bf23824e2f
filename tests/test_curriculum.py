"""Block-size curriculum, refill, two rewards and the value model, through the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl.config import load_config
from rl.estimators.documents import whole_blocks
from rl.estimators.trace_rows import packed_rows
from rl.sections import TrainConfig
from rl.tasks.base import split_of
from rl.tasks.countdown import CountdownTask
from rl.train.plan import check_run
from rl.train.rollouts import RolloutSource
from rl.train.run import Run
from rl.train.update import PolicyUpdater
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions

CONFIG = """
run: {num_threads: 1}
model:
  attention: block_causal
  block_length: 4
  backbone: {model_type: qwen3, hidden_size: 24, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
             num_key_value_heads: 1, head_dim: 12, max_position_embeddings: 64}
task: {name: countdown, params: {max_number: 9}}
sampler: {gen_length: 16, num_inference_steps: 8, block_length: 4}
reward:
  functions:
    - {name: countdown, params: {valid_reward: 0.1}, normalize: group}
    - {name: tokens_per_forward, weight: 0.1, params: {full_speed: 4}, normalize: group}
sft: {steps: 30, batch_size: 32, optimizer: {lr: 0.01, warmup_steps: 5}}
algorithm: {name: tracerl, old_logprob: recompute, value: {lam: 0.9}}
filters: {refill_rounds: 2, drop_zero_variance: false}
train:
  steps: 3
  prompts_per_step: 4
  group_size: 4
  block_schedule: [{from_step: 0, rollout: 4, train: 8}, {from_step: 2, rollout: 8, train: 8}]
eval: {num_prompts: 8, num_inference_steps: [8], viewer_items: 1}
"""


def test_every_stage_of_the_curriculum_scores_what_it_says(tmp_path: Path) -> None:
    """Training blocks of 8 on rollouts in blocks of 4 score other states; equal sizes score the sampled ones."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    run = tmp_path / "run"
    words = [sys.executable, "-m", "rl.cli", "train", "--config", str(config), f"run.output_dir={run}"]
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["stage"] == "train"]
    gaps = [line["policy/logprob_gap_max"] for line in train]
    assert gaps[0] > 1e-3 and gaps[1] > 1e-3
    assert gaps[2] < 1e-5
    assert all(line["value/loss"] > 0 for line in train)
    assert all("reward/tokens_per_forward/mean" in line and "reward/countdown/mean" in line for line in train)
    # The saved model decodes with the block length it was last sampled with.
    assert json.loads((run / "checkpoints" / "step_3" / "hf" / "config.json").read_text())["block_length"] == 8


def test_schedule_is_checked() -> None:
    with pytest.raises(ValueError, match="begin at from_step 0"):
        TrainConfig(block_schedule=[{"from_step": 3, "rollout": 4, "train": 4}])
    with pytest.raises(ValueError, match="must be a multiple of rollout"):
        TrainConfig(block_schedule=[{"from_step": 0, "rollout": 4, "train": 6}])
    stages = TrainConfig(
        block_schedule=[{"from_step": 0, "rollout": 4, "train": 8}, {"from_step": 60, "rollout": 8, "train": 8}]
    )
    assert [stages.blocks_at(step).rollout for step in (0, 59, 60, 99)] == [4, 4, 8, 8]


def test_curriculum_refuses_log_probs_of_other_states(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    config = load_config(path, [f"run.output_dir={tmp_path / 'run'}", "algorithm.old_logprob=sampler"])
    with pytest.raises(ValueError, match=r"algorithm\.old_logprob to recompute"):
        check_run(config)


def test_covered_adds_only_positions_that_were_never_revealed(make_model: Callable[..., Any]) -> None:
    model = make_model("qwen3-block4")
    engine = InProcessEngine(model, SamplerOptions(gen_length=4, num_inference_steps=2, block_length=4))
    trajectories = engine.generate([Request([1, 2, 3], seed=0)])
    assert trajectories[0].length == 8
    wider = whole_blocks(trajectories, 16)
    assert wider[0].length == 16 and trajectories[0].length == 8
    rows = packed_rows(wider, 1, 16)
    assert len(rows.target) == len(trajectories[0].token)
    assert (rows.input_ids[0, rows.column] == model.mask_token_id).all()


def test_countdown_answers_are_right_and_splits_are_disjoint() -> None:
    from rewards.countdown import countdown

    task = CountdownTask(count=3, max_number=10, max_target=50)
    train, test, validation = task.train_examples(0, 0, 300), task.heldout_examples(200), task.validation_examples(200)
    rows = [*train, *test, *validation]
    columns = {name: [row[name] for row in rows] for name in ("numbers", "target")}
    scores = countdown([row["prompt"] for row in rows], [row["answer"] for row in rows], **columns)
    assert [score.value for score in scores] == [1.0] * len(rows)
    keys = [{f"{sorted(r['numbers'])} {r['target']}" for r in part} for part in (train, test, validation)]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert {split_of(key) for key in keys[1]} == {"test"}
    assert task.train_examples(0, 0, 5) == train[:5]


def test_countdown_prompts_of_fixed_width_hold_the_same_problems(tmp_path: Path) -> None:
    plain, fixed = (
        CountdownTask(max_number=20, max_target=120, fixed_width=w).heldout_examples(50) for w in (False, True)
    )
    assert {len(row["prompt"]) for row in fixed} == {len("03,07,12=045:")}
    assert len({len(row["prompt"]) for row in plain}) > 3
    for one, other in zip(plain, fixed, strict=True):
        *numbers, target = [int(n) for n in other["prompt"].rstrip(":").replace("=", ",").split(",")]
        assert (numbers, target, other["answer"]) == (one["numbers"], one["target"], one["answer"])
    file = tmp_path / "problems.jsonl"
    file.write_text('{"input": "3,200,7", "output": 21}\n')
    assert CountdownTask().file_examples(str(file))[0]["prompt"] == "3,200,7=21:"
    with pytest.raises(ValueError, match=r"problems\.jsonl: row 1: larger than task\.params\.fixed_width has room for"):
        CountdownTask(fixed_width=True).file_examples(str(file))


def test_countdown_operators_are_those_asked_for() -> None:
    rows = CountdownTask(count=3, operators="-/").train_examples(0, 0, 200)
    assert {sign for row in rows for sign in row["answer"] if not sign.isalnum()} == {"-", "/", "(", ")"}
    for operators in ("", "+x"):
        with pytest.raises(ValueError, match=r"task\.params\.operators '.*' must be some of \+ - \* /"):
            CountdownTask(operators=operators)


def test_a_run_that_is_resumed_at_its_end_decodes_with_the_blocks_of_its_last_step(tmp_path: Path) -> None:
    """Step 2 would sample in blocks of 8. The weights after two steps were last sampled in blocks of 4."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    config = load_config(path, [f"run.output_dir={tmp_path / 'run'}"])
    with Run.open(config, write=False) as run:
        updater = PolicyUpdater(RolloutSource(run), config.algorithm, total_updates=4)
        for steps, length in ((2, 4), (3, 8)):
            updater.resumed(steps)
            assert run.model.config.block_length == run.modality.rollout_block == length
