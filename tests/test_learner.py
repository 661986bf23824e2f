"""An update of the learner is what plain torch would do with the sum of its losses, for every ZeRO stage.

One rank, in this process; two ranks are in test_distributed.py.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from rl import distributed
from rl.sections import OptimizerConfig
from rl.train.deepspeed_json import BUILT_IN, read_deepspeed_config
from rl.train.learner import Learner, TrainingError, rate_factor
from tests import runs

CPU = torch.device("cpu")
UPDATES = 4
# Warm-up of two updates to 0.05, then linearly down to 0 behind the last one.
RATES = [0.05 / 3, 0.05 * 2 / 3, 0.05, 0.05 / 2]


class Regression(nn.Module):
    """Sum of squared errors of a small network; dropout must be off, or no two forwards would agree."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return (self.net(rows[:, :3]) - rows[:, 3:]).square().sum()


def data(update: int, count: int = 6) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(update))


def learner(stage: int = 0, **options: object) -> Learner:
    settings = {"lr": 0.05, "warmup_steps": 2, "schedule": "linear", "weight_decay": 0.1, "max_grad_norm": 1.0}
    return Learner(Regression(), runs.ZERO[stage], OptimizerConfig(**{**settings, **options}), UPDATES, CPU)  # type: ignore[arg-type]


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def sampled(trained: Learner) -> dict[str, torch.Tensor]:
    """Weights as the sampling copy gets them; under ZeRO 3 the learner's own parameters are empty."""
    plain = Regression()
    trained.copy_weights_into(plain)
    return weights(plain)


@pytest.mark.parametrize("stage", runs.ZERO)
@pytest.mark.parametrize("cuts", [[6], [1, 2, 3]], ids=["one", "three"])
def test_updates_equal_plain_torch(stage: int, cuts: list[int]) -> None:
    """Clipping is at work (the norms exceed it), the rate warms up and decays, moments carry over.

    Defects W4 (an optimizer step for every micro-batch, whatever the accumulation says) and W5 (moments and schedule
    begin anew at every RL step).
    """
    reference = Regression().eval()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    trained = learner(stage)
    for update, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        rows = data(update)
        optimizer.zero_grad()
        reference(rows).backward()
        expected = float(nn.utils.clip_grad_norm_(reference.parameters(), 1.0))
        optimizer.step()
        # One rank has nothing to fill up, and never looks at the spare one.
        norm = trained.update(rows.split(cuts), trained.forward, None)
        assert expected > 1.5
        assert norm == pytest.approx(expected, rel=1e-5)
        assert trained.learning_rate() == pytest.approx(rate)
    assert trained.updates == UPDATES
    for name, value in weights(reference).items():
        # Only the order of sums differs from plain torch, about 1e-7 of a weight of size 1.
        torch.testing.assert_close(sampled(trained)[name], value, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant_with_warmup", [1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 1 / 2, 0]),
        ("cosine", [1 / 3, 2 / 3, 1, 1 / 2, 0]),
    ],
)
def test_learning_rate_by_hand(schedule: str, factors: list[float]) -> None:
    """Warm-up over 2 of 4 updates; no update of the plan has rate 0."""
    options = OptimizerConfig(lr=0.05, warmup_steps=2, schedule=schedule)  # type: ignore[arg-type]
    assert [rate_factor(options, update, UPDATES) for update in range(5)] == pytest.approx(factors)


@pytest.mark.parametrize("stage", runs.ZERO)
def test_an_update_without_data_leaves_everything_alone(stage: int) -> None:
    """Adam would move the weights on by its momentum, and the schedule would skip an update."""
    trained = learner(stage)
    trained.update([data(0)], trained.forward, data(0))
    trained.update([data(1)], trained.forward, data(0))
    before = sampled(trained)
    assert trained.update([], lambda batch: pytest.fail("nothing to fill up"), None) == 0.0
    assert trained.updates == 2
    assert trained.schedule.get_last_lr() == [pytest.approx(RATES[2])], "the schedule skipped an update"
    after = sampled(trained)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("stage", runs.ZERO)
def test_a_loss_that_is_not_finite_takes_no_step(stage: int) -> None:
    trained = learner(stage)
    before = sampled(trained)
    with pytest.raises(TrainingError, match="the loss of update 0 is not finite; no step was taken"):
        trained.update([data(0), data(1) * torch.nan], trained.forward, None)
    after = sampled(trained)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("stage", runs.ZERO)
def test_a_gradient_that_is_not_finite_stops_the_run(stage: int) -> None:
    """The loss is 0, its gradient infinite: d sqrt(x) / dx at x = 0, times the inner derivative 0, is NaN."""
    trained = learner(stage)
    rows = data(0)
    with pytest.raises(TrainingError, match=r"the gradient norm of update \d is (nan|inf): go back to a checkpoint"):
        trained.update([rows], lambda batch: (trained.forward(batch) * 0.0).sqrt(), None)


def test_the_module_given_stays_as_it_was() -> None:
    """A copy is trained, so the sampler's module is never wrapped, sharded or in training mode."""
    module = Regression()
    start = copy.deepcopy(module)
    trained = Learner(module, runs.ZERO[3], OptimizerConfig(lr=0.1, warmup_steps=0), UPDATES, CPU)
    trained.update([data(0)], trained.forward, None)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), start.parameters(), strict=True))
    moved = max(float((sampled(trained)[name] - value).abs().max()) for name, value in weights(start).items())
    assert moved == pytest.approx(0.1, rel=1e-3), "Adam's first step has the size of the learning rate"


def test_dropout_is_off_while_learning() -> None:
    trained = learner()
    assert float(trained.forward(data(0)).detach()) == float(trained.forward(data(0)).detach())


def test_numbers_are_reduced_over_one_rank() -> None:
    assert distributed.reduce_number(2.5, "max") == 2.5
    assert distributed.sum_metrics({"a": 1.0}) == {"a": 1.0}
    assert distributed.gather_objects("x") == ["x"]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not valid JSON"),
        ('{"train_batch_size": 8}', "sets 'train_batch_size': remove it, batch sizes come from the config"),
        ('{"optimizer": {}}', "sets 'optimizer': remove it, the optimizer section decides it"),
        ('{"fp16": {"enabled": true}}', "sets fp16 without ZeRO: set stage 1 or more, or bf16"),
        ('{"gradient_accumulation_steps": 8}', "sets 'gradient_accumulation_steps': remove it"),
    ],
)
def test_bad_deepspeed_json(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_deepspeed_config(str(path))
    assert str(error.value).startswith(f"train.deepspeed file {path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage", runs.ZERO)
def test_shipped_deepspeed_jsons_name_their_stage(stage: int) -> None:
    assert read_deepspeed_config(runs.ZERO[stage])["zero_optimization"]["stage"] == stage


def test_gpu_without_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"run\.device is cuda, but torch sees no GPU: set run.device to cpu"):
        distributed.pick_device("cuda")
    assert distributed.pick_device("auto") == CPU


def test_norm_is_that_of_the_sum_not_of_the_parts() -> None:
    """Two micro-batches whose gradients cancel: the norm of the update is 0, by hand."""
    trained = learner()
    rows = data(0)
    norm = trained.update([1, -1], lambda sign: sign * trained.forward(rows), None)
    assert norm < 1e-6
    assert not math.isnan(norm)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_configs_are_the_files_shipped(name: str) -> None:
    """A name works from an installed package, its file is there to start from: they must say the same."""
    file = runs.ROOT / "configs" / "deepspeed" / f"{name}.json"
    assert read_deepspeed_config(str(file)) == read_deepspeed_config(name)
    assert {path.stem for path in file.parent.iterdir()} == set(BUILT_IN)


class Slope(nn.Module):
    """Its gradient is the row, whatever the weights are: every step of Adam has the size of the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return (self.weight * rows).sum().float()


@pytest.mark.parametrize("name", [name for name in BUILT_IN if "bf16" in name or "offload" in name])
def test_small_updates_add_up(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 steps of 1e-4 from 0.5. A bfloat16 weight would stay: its neighbour below is 0.498. Nothing is compiled."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    trained = Learner(Slope(), name, OptimizerConfig(lr=1e-4, warmup_steps=0), 40, CPU)
    row = torch.tensor([1.0, 2.0, 4.0, -8.0], dtype=next(trained.module.parameters()).dtype)
    for _ in range(40):
        trained.update([row], trained.forward, None)
    plain = Slope()
    trained.copy_weights_into(plain)
    expected = torch.tensor([0.496, 0.496, 0.496, 0.504])
    if "bf16" in name:
        expected = expected.bfloat16()
    torch.testing.assert_close(plain.weight.detach(), expected, rtol=0, atol=1e-6)
    assert not list(tmp_path.rglob("*.so"))


class Checkpointed(nn.Module):
    """A policy's backbone with its activations kept or recomputed; counts how often a layer runs."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        torch.manual_seed(0)
        self.net = AutoModel.from_config(AutoConfig.for_model(**runs.QWEN3, vocab_size=8, attention_dropout=0.5))
        if recompute:
            self.net.activation_checkpointing_enable()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.net(ids, use_cache=False).last_hidden_state.square().mean()


@pytest.mark.parametrize("stage", runs.ZERO)
def test_gradient_checkpointing_gives_the_same_numbers(stage: int) -> None:
    """Bit for bit, with dropout still off; the layer runs twice per update and not once."""
    ids = torch.arange(8)[None]
    trained, calls = {}, {True: 0, False: 0}
    for recompute in (False, True):
        one = Learner(Checkpointed(recompute), runs.ZERO[stage], OptimizerConfig(warmup_steps=0), UPDATES, CPU)

        def count(*_: object, key: bool = recompute) -> None:
            calls[key] += 1

        one.module.net.layers[0].mlp.act_fn.register_forward_hook(count)
        for _ in range(UPDATES):
            one.update([ids], one.forward, None)
        plain = Checkpointed(False)
        one.copy_weights_into(plain)
        trained[recompute] = weights(plain)
    assert calls == {False: UPDATES, True: 2 * UPDATES}
    assert all(torch.equal(trained[True][name], value) for name, value in trained[False].items())
    start = weights(Checkpointed(False))
    assert any(not torch.equal(trained[True][name], value) for name, value in start.items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_in_float16_is_skipped_counted_and_lowers_the_scale(stage: int, tmp_path: Path) -> None:
    """A scale of 2^24 times gradients of some 10 is beyond 65,504: updates are skipped until it has come down."""
    path = tmp_path / "fp16.json"
    fp16 = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}, "fp16": fp16, "steps_per_print": 10**9}))
    trained = Learner(Regression(), str(path), OptimizerConfig(lr=0.05), 20, CPU)
    before, norms = sampled(trained), []
    for _update in range(20):
        norms.append(trained.update([data(0).half()], trained.forward, None))
        if not norms[-1]:
            after = sampled(trained)
            assert trained.updates == 0 and all(torch.equal(after[name], before[name]) for name in before)
    skipped = norms.count(0.0)
    assert 3 < skipped < 20 and trained.overflows == skipped and trained.updates == 20 - skipped
    assert norms[:skipped] == [0.0] * skipped and all(0 < norm < 1e4 for norm in norms[skipped:])


@pytest.mark.parametrize(("fp16", "line"), [
    ({"loss_scale": 2.0**30}, "overflowed in 40 updates in a row"),
    ({"initial_scale_power": 22, "min_loss_scale": 2**21, "hysteresis": 1}, "at the smallest loss scale"),
])  # fmt: skip
def test_overflows_without_end_stop_the_run(fp16: dict, line: str, tmp_path: Path) -> None:
    path = tmp_path / "fp16.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, **fp16}}))
    trained = Learner(Regression(), str(path), OptimizerConfig(), 20, CPU)
    with pytest.raises(TrainingError, match=line):
        for _ in range(50):
            trained.update([data(0).half()], trained.forward, None)


def test_a_learner_that_is_loaded_counts_on(tmp_path: Path) -> None:
    """The number of updates is the version of the weights: of rollouts, and in messages."""
    trained = learner()
    for update in range(3):
        trained.update([data(update)], trained.forward, data(update))
    trained.save_state(tmp_path)
    other = learner()
    other.load_state(tmp_path)
    assert (trained.updates, other.updates) == (3, 3)
