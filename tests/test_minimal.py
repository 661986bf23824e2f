"""scripts/minimal_tracerl.py against the framework: same weights and rollouts, hence same losses and gradients."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rewards.sudoku import sudoku
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rl.models.load import save_policy
from rl.tasks.char_tokenizer import char_tokenizer
from rl.tasks.sudoku import all_grids
from rollouts.engines.in_process import InProcessEngine
from rollouts.trajectory import TokenTrajectory
from scripts import minimal_tracerl as minimal
from tests import runs


def test_two_updates_have_the_loss_and_gradients_of_the_framework(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One RL step of two updates by `denoise-rl train`, from the script's weights; the script scores its rollouts."""
    torch.manual_seed(0)
    model = minimal.Denoiser()
    # Peaked predictions: at GPT-2's own initialisation they are nearly uniform, and gradients nearly zero.
    model.lm_head.weight.data.mul_(8)
    save(model, tmp_path / "policy")
    rollouts: list[list[TokenTrajectory]] = []
    updates: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    sampled: list[list[TokenTrajectory]] = []
    generate = InProcessEngine.generate

    def recorded(self: InProcessEngine, *args: Any) -> list[TokenTrajectory]:
        rollouts.append(generate(self, *args))
        return rollouts[-1]

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        updates.append([(parameter.detach().clone(), parameter.grad.clone()) for parameter in trained])
        sampled.append(rollouts[-1])

    monkeypatch.setattr(InProcessEngine, "generate", recorded)
    handle = register_optimizer_step_pre_hook(note)
    folder = tmp_path / "policy"
    try:
        runs.train_here(
            runs.tiny_config(
                tmp_path, f"model={{path: {folder}, tokenizer: {folder}}}", "sft.steps=0", "train.steps=1",
                "train.group_size=4", "train.optimizer.lr=2e-4", "train.optimizer.max_grad_norm=1e9",
                "algorithm.entropy_coef=0",
            )
        )  # fmt: skip
    finally:
        handle.remove()
    assert len(updates) == 2 and sampled[0] is sampled[1]
    trajectories = sampled[0]
    assert len(trajectories) == 32 and {t.num_steps for t in trajectories} == {4}

    final = torch.from_numpy(np.stack([t.final_canvas() for t in trajectories]))
    scope: dict[str, Any] = {}
    exec(runs.REWARD, scope)
    texts = ["".join("01234="[token] for token in row) for row in final.tolist()]
    reward = torch.tensor(scope["dense"]([t[:17] for t in texts], [t[17:] for t in texts])).view(-1, 4)
    advantage = (reward - reward.mean(1, keepdim=True)).flatten()
    # With flat groups, a loss that left them out of the mean would differ.
    assert 0 < int((reward.std(1) == 0).sum()) < 8
    losses = []
    for update in updates:
        for parameter, (value, _) in zip(model.parameters(), update, strict=True):
            parameter.data.copy_(value)
        model.zero_grad()
        loss = minimal.policy_loss(model, final, [step_of(trajectories, step) for step in range(4)], advantage)
        loss.backward()
        losses.append(float(loss.detach()))
        for parameter, (_, gradient) in zip(model.parameters(), update, strict=True):
            assert float((parameter.grad - gradient).abs().max()) < 1e-6
        assert max(float(gradient.abs().max()) for _, gradient in update) > 5e-3
    # Every first ratio is 1 and advantages sum to 0; after the first step some are clipped.
    assert abs(losses[0]) < 1e-6 < 1e-4 < abs(losses[1])
    (logged,) = runs.series(tmp_path / "run", "train", "loss/total")
    assert logged == pytest.approx(sum(losses) / 2, rel=1e-4)


def save(model: minimal.Denoiser, folder: Path) -> None:
    """The script's model as a policy of the framework."""
    backbone = model.backbone.config.to_dict()
    policy = DiffusionLM(DiffusionLMConfig(backbone=backbone, mask_token_id=minimal.MASK))
    policy.load_state_dict(model.state_dict())
    save_policy(policy, char_tokenizer("01234=", ends=False), folder)


def step_of(trajectories: list[TokenTrajectory], step: int) -> tuple[torch.Tensor, ...]:
    """Step `step` of the framework's trajectories as the script records one."""
    canvas = np.stack([t.canvas_at(step) for t in trajectories])
    logprob = np.full(canvas.shape, np.nan)
    for row, t in enumerate(trajectories):
        here = t.step == step
        logprob[row, t.position[here]] = t.logprob[here]
    revealed = ~np.isnan(logprob)
    return torch.from_numpy(canvas), torch.from_numpy(revealed), torch.from_numpy(logprob[revealed]).float()


def test_the_verifier_is_the_frameworks() -> None:
    """Right grids, grids with one cell changed, and right grids that change a given."""
    assert ["".join(map(str, grid)) for grid in minimal.GRIDS] == all_grids()
    rng = random.Random(0)
    canvas = minimal.puzzles(rng, 60)
    canvas[20:40, 17 + rng.randrange(16)] = torch.tensor([rng.randint(0, 4) for _ in range(20)])
    canvas[40:, 17:] = canvas[40:, 17:].roll(1, dims=0)
    rows = ["".join(map(str, row)) for row in canvas.tolist()]
    theirs = [score.value for score in sudoku([row[:16] for row in rows], [row[17:] for row in rows])]
    assert minimal.verify(canvas).tolist() == theirs
    assert sum(theirs[:20]) == 20 and 0 < sum(theirs[20:]) < 20


def test_the_sampler_reveals_its_likeliest_draws_and_the_trace_replays() -> None:
    torch.manual_seed(0)
    model = minimal.Denoiser()
    final, trace = minimal.sample(model, minimal.puzzles(random.Random(0), 5)[:, :17])
    assert torch.equal(sum(revealed.long() for _, revealed, _ in trace), (trace[0][0] == minimal.MASK).long())
    for canvas, revealed, logprob in trace:
        assert revealed.sum(1).tolist() == [4] * 5 and bool((canvas[revealed] == minimal.MASK).all())
        now = model(canvas).log_prob(final).detach()[revealed]
        assert float((now - logprob).abs().max()) < 1e-5
    assert bool((final != minimal.MASK).all())


def test_the_script_runs_and_prints_its_reward() -> None:
    command = [runs.sys.executable, "scripts/minimal_tracerl.py", "warm=3", "steps=2", "num_puzzles=4", "tests=8"]
    done = runs.execute(command)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["warm start", "step 1", "step 2", "after RL"]
    assert all(line.split(": reward ")[1].startswith("0.") for line in lines[1:3])
