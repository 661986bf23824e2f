"""JustGRPO on an autoregressive model against TRL's own GRPO: its log-probs, its loss, its gradient.

A block-causal model of block length 1 with shifted readout, decoded left to right, is a causal language model. So the
same weights go into a `Qwen3ForCausalLM`, and TRL's code runs on that.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rl.config import load_config
from rl.train.rollouts import RolloutSource, ScoredRollouts
from rl.train.run import Run
from rl.train.update import PolicyUpdater
from tests import runs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
LENGTH, KL_COEF = 8, 0.3
AUTOREGRESSIVE = [
    "sft.steps=0", f"sampler={{gen_length: {LENGTH}, num_inference_steps: {LENGTH}, selector: left_most}}",
    f"model={{attention: block_causal, block_length: 1, logit_shift: 1, backbone: {runs.QWEN3}}}",
    f"eval.num_inference_steps=[{LENGTH}]", "filters.drop_zero_variance=false", "train.epochs=1",
    "train.micro_batch_size=8",
]  # fmt: skip


def causal_lm(model: Any) -> torch.nn.Module:
    """transformers' causal model with the weights of a policy, whose mask token it cannot predict either."""
    config = Qwen3Config(**{**model.backbone.config.to_dict(), "is_causal": True}, attn_implementation="eager")
    causal = Qwen3ForCausalLM(config)
    state = {name.replace("backbone.", "model.", 1): value for name, value in model.state_dict().items()}
    causal.load_state_dict(state)

    class WithoutMask(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.causal = causal

        def forward(self, labels: torch.Tensor, fused_lm_head: bool, **inputs: torch.Tensor) -> Any:
            """What TRL's models give: log-probs of the labels, each read one position before it."""
            logits = self.causal(**inputs).logits[:, :-1]
            logits[..., model.mask_token_id] = -torch.inf
            logprob = logits.log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
            return SimpleNamespace(log_probs=logprob, entropy=torch.zeros_like(logprob))

    return WithoutMask().train()


def trl_gradient(
    model: Any, reference: Any, rollouts: ScoredRollouts, loss_type: str, beta: float, parts: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of TRL's trainer on the rollouts in `parts` micro-batches, and its gradient by our weights' names."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    causal = causal_lm(model)
    trainer = object.__new__(GRPOTrainer)
    # The attributes that `_compute_loss` and `_get_per_token_logps_and_entropies` read, as __init__ sets them.
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=parts)
    accelerator = SimpleNamespace(
        num_processes=1, is_main_process=False, autocast=nullcontext, gather=lambda value: value,
        reduce=lambda value, reduction: value,
    )  # fmt: skip
    vars(trainer).update(
        model=causal, args=args, accelerator=accelerator, loss_type=loss_type, beta=beta, epsilon_low=0.2,
        epsilon_high=0.2, temperature=1.0, max_completion_length=LENGTH, importance_sampling_level="token",
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        current_gradient_accumulation_steps=parts, entropy_coef=0.0, _entropy_bonus_enabled=False,
        model_kwarg_keys=set(), _metrics={"train": defaultdict(list)}, vllm_importance_sampling_correction=False,
        is_peft_model=False, pad_token_id=0,
    )  # fmt: skip
    trajectories = rollouts.trajectories
    mask = torch.tensor([[i < len(t.token) for i in range(LENGTH)] for t in trajectories])
    prompts = torch.tensor([t.prompt_ids.tolist() for t in trajectories])
    inputs = {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_mask": mask.long()}
    for name, of in (("completion_ids", "token"), ("old_per_token_logps", "logprob")):
        rows = [getattr(t, of).tolist() for t in trajectories]
        inputs[name] = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"].float()
    means = torch.stack([rollouts.reward[rollouts.group == g].mean() for g in rollouts.group.unique()])
    inputs["advantages"] = (rollouts.reward - means[rollouts.group]).float()
    ids, everything = (
        torch.cat([prompts, inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], mask.long()], 1),
    )
    with torch.no_grad():
        inputs["ref_per_token_logps"] = trainer._get_per_token_logps_and_entropies(
            causal_lm(reference), ids, everything, LENGTH
        )[0]
    total, size = 0.0, len(trajectories) // parts
    for start in range(0, len(trajectories), size):
        part = {name: value[start : start + size] for name, value in inputs.items()}
        loss = trainer._compute_loss(causal, part | {"num_items_in_batch": mask.sum()})
        loss.backward()
        total += float(loss.detach())
    grads = {name.removeprefix("causal."): p.grad for name, p in causal.named_parameters()}
    return total, {name.replace("model.", "backbone.", 1): grad for name, grad in grads.items()}


@pytest.mark.parametrize(
    ("loss_type", "aggregation", "parts"),
    [("grpo", "trajectory_mean", 2), ("bnpo", "token_mean", 1), ("dr_grpo", "constant", 2), ("dapo", "token_mean", 2)],
)
@pytest.mark.parametrize("beta", [0.0, KL_COEF])
def test_loss_and_gradient_are_trls(tmp_path: Path, loss_type: str, aggregation: str, parts: int, beta: float) -> None:
    """After the weights have moved, so that ratios differ from 1 and both clips act."""
    kl = f", kl_to: reference, kl_coef: {beta}" if beta else ""
    algorithm = f"algorithm={{name: justgrpo, scale: none, aggregation: {aggregation}{kl}}}"
    arguments = runs.tiny_config(tmp_path, *AUTOREGRESSIVE, algorithm)
    config = load_config(arguments[1], arguments[2:])
    with Run.open(config, write=False) as run:
        source = RolloutSource(run)
        updater = PolicyUpdater(source, config.algorithm, total_updates=1)
        rollouts = source.sample(0, 0)
        lengths = {len(t.token) for t in rollouts.trajectories}
        assert len(lengths) > 2 and min(lengths) < LENGTH
        learned = updater.learner.module
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in learned.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.4)
        updater.learner.copy_weights_into(updater.sampling)
        losses: list[float] = []

        def backward(batches: Any, loss_of: Any, spare: Any) -> float:
            loss = sum(loss_of(batch) for batch in batches)
            loss.backward()
            losses.append(float(loss.detach()))
            return 0.0

        # DeepSpeed's engine allows no other backward than its own: the module it holds does.
        updater.learner.update, updater.learner.forward = backward, learned  # type: ignore[method-assign, assignment]
        metrics = updater.update(rollouts, 0)
        theirs, grads = trl_gradient(run.model, updater.reference or run.model, rollouts, loss_type, beta, parts)
        assert metrics["policy/clip_fraction"] > 0.05
        assert losses == [pytest.approx(theirs, rel=1e-4, abs=1e-6)]
        own = {name.removeprefix("model."): p.grad for name, p in learned.named_parameters()}
        assert own.keys() == grads.keys()
        largest = max(float(grad.abs().max()) for grad in grads.values())
        for name, grad in grads.items():
            torch.testing.assert_close(own[name], grad, rtol=1e-3, atol=1e-5 * largest, msg=name)
