"""The updater of a run, with its own wiring, against a plain loop in torch that is written from the formulas."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.config import load_config
from rl.train.rollouts import RolloutSource, request_seed, step_seed
from rl.train.run import Run
from rl.train.update import PolicyUpdater
from tests import runs

CLIP, KL_COEF, ENTROPY_COEF, EPOCHS, UPDATES, LR, MAX_NORM, RTOL = 0.2, 0.3, 0.01, 2, 2, 0.05, 0.02, 1e-4
OPTIONS = [
    "sft.steps=0", "algorithm.old_logprob=recompute", "algorithm.kl_to=reference", f"algorithm.kl_coef={KL_COEF}",
    f"train.epochs={EPOCHS}", f"train.updates_per_step={UPDATES}", "train.max_logprob_gap=1e-4",
    f"train.optimizer.lr={LR}", f"train.optimizer.max_grad_norm={MAX_NORM}", "train.optimizer.warmup_steps=0",
    "train.optimizer.weight_decay=0.1",
]  # fmt: skip


def plain_scores(model: Any, trajectory: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """logprob [E] and entropy [E] of what a rollout revealed, each token in the canvas before its step."""
    canvas = torch.full((trajectory.length,), model.mask_token_id)
    canvas[: len(trajectory.prompt_ids)] = torch.as_tensor(trajectory.prompt_ids)
    step, position, token = (torch.as_tensor(getattr(trajectory, name)) for name in ("step", "position", "token"))
    logprobs, entropies = [], []
    for t in step.unique():
        now = step == t
        logits = model.token_logits(model.hidden_states(canvas[None].clone()))[0, position[now].long()]
        log_p = torch.log_softmax(logits, -1)
        logprobs.append(log_p.gather(1, token[now, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p.clamp(min=-1e9)).sum(1))
        canvas[position[now].long()] = token[now]
    return torch.cat(logprobs), torch.cat(entropies)


def plain_step(model: Any, reference: Any, optimizer: torch.optim.Optimizer, rollouts: Any) -> tuple[list, list]:
    """An RL step of clipped policy gradient with a KL to the reference; losses and gradient norms of its updates."""
    reward, group = rollouts.reward, rollouts.group
    with torch.no_grad():
        old = [plain_scores(model, t)[0] for t in rollouts.trajectories]
        ref = [plain_scores(reference, t)[0] for t in rollouts.trajectories]
    losses, norms = [], []
    for _ in range(EPOCHS):
        for update in range(UPDATES):
            members = [i for i in range(len(reward)) if group[i] % UPDATES == update]
            # Groups of equal rewards are not learned from, and stay in the mean.
            decisions = sum(len(rollouts.trajectories[i].token) for i in members)
            loss = torch.zeros(())
            for i in members:
                mine = reward[group == group[i]]
                if (mine == mine[0]).all():
                    continue
                advantage = float(reward[i] - mine.mean())
                logprob, entropy = plain_scores(model, rollouts.trajectories[i])
                ratio, log_r = (logprob - old[i]).exp(), ref[i] - logprob
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
                kl = log_r.exp() - 1 - log_r
                loss = loss + (-surrogate + KL_COEF * kl - ENTROPY_COEF * entropy).sum() / decisions
            optimizer.zero_grad()
            loss.backward()
            norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
            for p in model.parameters():
                if p.grad is not None:
                    p.grad *= torch.clamp(MAX_NORM / (norm + 1e-6), max=1.0)
            optimizer.step()
            losses.append(loss.item())
            norms.append(float(norm))
    return losses, norms


@pytest.mark.parametrize("coef", [0.5, 2.0])
def test_the_value_loss_of_a_shared_backbone_is_weighted(tmp_path: Path, coef: float) -> None:
    """Before the first update every ratio is 1 and every value 0.

    So the policy's loss is minus the mean advantage, which is the mean return, and the value loss half its mean square.
    """
    value = f"algorithm.value={{share_backbone: true, coef: {coef}}}"
    once = [
        "sft.steps=0",
        "train.steps=1",
        "train.epochs=1",
        "algorithm.entropy_coef=0",
        "filters.drop_zero_variance=false",
    ]
    runs.train_here(runs.tiny_config(tmp_path, value, "algorithm.value_reward=raw", *once))
    (line,) = runs.lines(tmp_path / "run", "train")
    # A return is the reward of the rollout: GAE with lambda 1, no discount, 16 tokens each.
    assert line["loss/total"] == pytest.approx(-line["reward/mean"] + coef * line["value/loss"], rel=1e-5)
    assert line["value/loss"] > 1e-3


def test_the_updater_takes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    """Two RL steps of two epochs of two updates, some groups flat.

    In the second step the frozen reference, the weights before the first update and those being trained all differ.
    """
    arguments = runs.tiny_config(tmp_path, *OPTIONS)
    config = load_config(arguments[1], arguments[2:])
    with Run.open(config, write=False) as run:
        plain, reference = copy.deepcopy(run.model), copy.deepcopy(run.model)
        optimizer = torch.optim.AdamW(plain.parameters(), lr=LR, eps=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
        assert config.train.optimizer.betas == (0.9, 0.95)
        source = RolloutSource(run)
        updater = PolicyUpdater(source, config.algorithm, total_updates=8)
        for step in range(2):
            rollouts = source.sample(step, updater.learner.updates)
            flat = [len(rollouts.reward[rollouts.group == g].unique()) == 1 for g in range(8)]
            assert 0 < sum(flat) < 8
            metrics = updater.step(step).metrics
            losses, norms = plain_step(plain, reference, optimizer, rollouts)
            assert metrics["loss/total"] == pytest.approx(sum(losses) / len(losses), rel=RTOL)
            assert metrics["policy/grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=RTOL)
            # Both clips act.
            assert metrics["policy/clip_fraction"] > 0.05 and max(norms) > MAX_NORM
            theirs = dict(run.model.named_parameters())
            for name, parameter in plain.named_parameters():
                torch.testing.assert_close(theirs[name], parameter, rtol=RTOL, atol=1e-5, msg=f"{name}, step {step}")


def test_every_epoch_of_a_random_estimator_has_masks_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = runs.tiny_config(
        tmp_path, "algorithm={name: unigrpo}", "sft.steps=0", "filters.drop_zero_variance=false"
    )
    config = load_config(arguments[1], arguments[2:])
    seen: list[torch.Tensor] = []
    plain = PolicyUpdater.policy_loss

    def noted(self: PolicyUpdater, batch: Any) -> torch.Tensor:
        seen.append(batch.rows.input_ids)
        return plain(self, batch)

    monkeypatch.setattr(PolicyUpdater, "policy_loss", noted)
    with Run.open(config, write=False) as run:
        updater = PolicyUpdater(RolloutSource(run), config.algorithm, total_updates=2)
        updater.step(0)
    # Eight micro-batches of two rollouts in each of two epochs.
    assert len(seen) == 16
    assert any(one.shape != other.shape or (one != other).any() for one, other in zip(seen[:8], seen[8:], strict=True))


def test_no_two_rollouts_share_a_seed() -> None:
    """Of two runs, four steps, three prompts and two rollouts each; a step's seeds would repeat its rollouts."""
    seeds = {
        request_seed(step_seed(run, step), prompt, sample)
        for run in range(2) for step in range(4) for prompt in range(3) for sample in range(2)
    }  # fmt: skip
    assert len(seeds) == 2 * 4 * 3 * 2 and min(seeds) >= 0
