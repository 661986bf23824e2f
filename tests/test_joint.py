"""Several steps a forward by a joint head: what it reads, what it is fitted to, and the law of two tokens with it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl.cli import main
from rl.config import load_config
from rl.estimators.masking import random_mask_rows
from rl.estimators.taught import JointRows
from rl.model_section import ModelConfig
from rl.models.load import load_policy
from rl.train.plan import check_run, engine_needs
from rollouts.engines.base import RAY_WORKERS, require
from rollouts.engines.in_process import Request
from rollouts.engines.tokens import token_engine
from rollouts.samplers.options import SamplerOptions
from rollouts.search.tokens import TokenSampler
from tests.runs import tiny_config

FAMILIES = ["gpt2-full", "qwen3-full", "qwen3-full-shifted"]
REQUESTS = [Request([1 + (3 * i + n) % 9 for i in range(1 + n % 4)], seed=n) for n in range(8)]


@pytest.fixture
def headed(make_model: Any) -> Any:
    """A model with a joint head: as it is added, or with weights that change much."""

    def make(family: str = "gpt2-full", random: bool = True, **settings: Any) -> Any:
        model = make_model(family, **settings)
        model.add_joint_head(0)
        if random:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for weight in (p for p in model.joint_head.parameters() if p.dim() > 1):
                    weight.normal_(0.0, min(weight.shape) ** -0.5, generator=generator)
        return model

    return make


def options(**changed: Any) -> SamplerOptions:
    return SamplerOptions(**{"gen_length": 8, "num_inference_steps": 8, "joint_steps": 2, **changed})


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_untrained_head_says_what_the_model_said(headed: Any, family: str) -> None:
    """Bit for bit, whatever was revealed; a trained one looks at what was revealed and not behind the padding."""
    model, other = headed(family, random=False), headed(family)
    canvas = torch.tensor([[1, 2, 11, 11, 11, 11], [1, 2, 3, 11, 11, 11]])
    visible = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])[:, None]
    hidden = model.hidden_states(canvas, visible=visible)
    now = canvas.clone()
    now[:, 3] = torch.tensor([4, 5])
    assert torch.equal(model.joint_states(hidden, now, now != canvas, visible=visible), hidden)
    states = other.joint_states(hidden, now, now != canvas, visible=visible)
    assert ((states - hidden).abs().amax(-1) > 1e-3).all()
    hidden[1, 4:] = 7.0
    now[0, 0] = now[1, 5] = 9
    shown = torch.zeros_like(now, dtype=torch.bool)
    shown[:, 3] = True
    again = other.joint_states(hidden, now, shown, visible=visible)
    torch.testing.assert_close(again[0], states[0], rtol=0, atol=0)
    torch.testing.assert_close(again[1, :4], states[1, :4])
    now[:, 3] = 6
    assert ((other.joint_states(hidden, now, shown, visible=visible) - again)[:, :3].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize(
    ("family", "changed"),
    list(zip(FAMILIES, [{"selector": "threshold"}, {"block_length": 4, "num_inference_steps": 4}, {}], strict=True)),
)
def test_each_step_is_drawn_from_the_last_forward_and_the_head(headed: Any, family: str, changed: Any) -> None:
    """Recorded log-probs against a loop over single canvases; slots are used again, and prompts differ in length."""
    model, given = headed(family), options(**changed)
    trajectories = token_engine(model, given, max_batch_size=3).generate(REQUESTS)
    alone = token_engine(model, given, max_batch_size=1).generate(REQUESTS)
    assert [t.token.tolist() for t in alone] == [t.token.tolist() for t in trajectories]
    for trajectory in trajectories:
        trajectory.validate()
        assert not trajectory.exact and trajectory.decoder["joint_steps"] == 2
        forwards, block, block_step = 0, -1, 0
        for step in range(trajectory.num_steps):
            canvas = torch.from_numpy(trajectory.canvas_at(step))[None]
            at = np.flatnonzero(trajectory.step == step)
            own = (trajectory.position[at[0]] - trajectory.prompt_length) // (given.block_length or 8)
            block, block_step = own, 0 if own != block else block_step + 1
            with torch.no_grad():
                if block_step % 3 == 0:
                    seen, hidden = canvas, model.hidden_states(canvas)
                    states, forwards = hidden, forwards + 1
                else:
                    states = model.joint_states(hidden, canvas, canvas != seen)
                law = model.token_logits(states[0]).log_softmax(-1)
            position, token = trajectory.position[at] - model.logit_shift, trajectory.token[at]
            np.testing.assert_allclose(trajectory.logprob[at], law[position, token], rtol=0, atol=1e-9)
        assert forwards == trajectory.decoder["forwards"] < trajectory.num_steps


def test_the_head_is_fitted_to_the_model_that_sees_more(headed: Any) -> None:
    """KL by hand; masks that are revealed are no decisions, and no forward of the model has a gradient."""
    model = headed("qwen3-full-shifted")
    answers = [np.random.default_rng(n).integers(0, 9, 9) for n in range(6)]
    plain, w = random_mask_rows(answers, [3] * 6, 11, np.random.default_rng(0), logit_shift=1)
    rows, weight = random_mask_rows(answers, [3] * 6, 11, np.random.default_rng(0), logit_shift=1, joint=True)
    assert isinstance(rows, JointRows) and torch.equal(rows.input_ids, plain.input_ids)
    still = rows.shown.input_ids == 11
    assert 0 < int(still.sum()) == len(rows.target) < len(plain.target) == len(w)
    clean = torch.from_numpy(np.stack(answers))
    assert torch.equal(rows.shown.input_ids, torch.where(still, 11, clean)) and bool(still[rows.row, rows.column].all())
    assert torch.equal(weight, w[still[plain.row, plain.column]])
    for frozen in (model.lm_head, model.get_input_embeddings()):
        frozen.requires_grad_(False)
    kl = rows.score(model).kl
    assert kl is not None
    with torch.no_grad():
        for n, (row, column) in enumerate(zip(rows.row.tolist(), rows.column.tolist(), strict=True)):
            before, after = rows.input_ids[row][None], rows.shown.input_ids[row][None]
            states = model.joint_states(model.hidden_states(before), after, before != after)
            head, full = (model.token_logits(s)[0, column - 1, :11].log_softmax(-1) for s in
                          (states, model.hidden_states(after)))  # fmt: skip
            assert float(kl[n].detach()) == pytest.approx(float((full.exp() * (full - head)).sum()), abs=1e-9)
    kl.sum().backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"joint_head"}


def test_two_equal_tokens_in_one_forward(make_model: Any) -> None:
    """aa and bb, each 1/2. A forward for both tokens makes ab or ba in half the cases; with the head it hardly does."""
    model = make_model("gpt2-full", vocab_size=4, scale=0.3)
    empty, answers = torch.tensor([[2, 3, 3]]), [np.array([2, a, a]) for a in (0, 1)] * 48

    def fit(joint: bool) -> None:
        trained = model.joint_head if joint else model
        optimizer = torch.optim.Adam(trained.parameters(), 0.02)
        rows, weight = random_mask_rows(answers, [1] * len(answers), 3, np.random.default_rng(0), joint=joint)
        for _ in range(80):
            scores = rows.score(model)
            loss = (weight * (scores.kl if joint else -scores.logprob)).sum() / len(answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def law(how: str) -> np.ndarray:
        """[3, 3] of both tokens, the left one first: the second by a forward of its own, the first's, or the head."""
        hidden, found = model.hidden_states(empty), np.zeros((3, 3))
        for a, b in itertools.product(range(3), repeat=2):
            now = torch.tensor([[2, a, 3]])
            states = {"own": lambda now=now: model.hidden_states(now), "first": lambda: hidden,
                      "head": lambda now=now: model.joint_states(hidden, now, now != empty)}[how]()  # fmt: skip
            first, second = (model.token_logits(s)[0].softmax(-1) for s in (hidden, states))
            found[a, b] = first[1, a] * second[2, b]
        assert found.sum() == pytest.approx(1.0)
        return found

    def unequal(table: np.ndarray) -> float:
        return 1.0 - float(np.trace(table))

    fit(joint=False)
    model.add_joint_head(0)
    assert unequal(law("own")) < 0.05, "the model knows"
    assert unequal(law("head")) == unequal(law("first")) > 0.4, "an untrained head is no help"
    for parameter in set(model.parameters()) - set(model.joint_head.parameters()):
        parameter.requires_grad_(False)
    fit(joint=True)
    exact, drawn = law("head"), np.zeros((3, 3))
    assert unequal(exact) < 0.05 and min(exact[0, 0], exact[1, 1]) > 0.35
    given = options(gen_length=2, num_inference_steps=2, joint_steps=1, selector="left_most")
    for trajectory in token_engine(model, given, max_batch_size=500).generate([Request([2], s) for s in range(500)]):
        drawn[tuple(trajectory.response_ids())] += 1 / 500
        assert (trajectory.num_steps, trajectory.decoder["forwards"]) == (2, 1)
    np.testing.assert_array_less(np.abs(drawn - exact), 4.5 * np.sqrt(exact * (1 - exact) / 500) + 1e-3)


def test_the_stage_trains_the_head_alone(tmp_path: Path, run: Any) -> None:
    short = ["sft.steps=2", "train.steps=0"]
    assert main(["sft", *tiny_config(tmp_path / "a", *short)]) == 0
    path = f"model.path={tmp_path / 'a' / 'run' / 'model'}"
    joint = [*short, path, "model.backbone={}", "sft.joint=true", "sft.micro_batch_size=3"]
    code, _, err = run("sft", *tiny_config(tmp_path / "b", *joint))
    assert code == 2 and "set model.joint_head to true" in err
    arguments = tiny_config(tmp_path / "c", *joint, "model.joint_head=true")
    assert main(["sft", *arguments]) == 0
    old, new = (load_policy(ModelConfig(path=str(tmp_path / n / "run" / "model")), None, 0) for n in "ac")
    assert old.joint_head is None and not any(p.requires_grad for p in new.joint_head.parameters())
    assert new.joint_head.out.weight.abs().max() > 0
    own = new.state_dict()
    for name, weight in old.state_dict().items():
        assert torch.equal(own.pop(name), weight)
    assert own and all(name.startswith("joint_head.") for name in own)
    again = load_policy(ModelConfig(path=str(tmp_path / "c" / "run" / "model"), joint_head=True), None, 0)
    torch.testing.assert_close(again.joint_head.state_dict(), new.joint_head.state_dict())
    rollout = tiny_config(tmp_path / "d", *short, f"model.path={tmp_path / 'c' / 'run' / 'model'}", "model.backbone={}",
                          "sampler.joint_steps=1", "sampler.num_inference_steps=8")  # fmt: skip
    assert main(["rollout", *rollout, "--num-prompts", "2", "--output", str(tmp_path / "out")]) == 0


def test_what_it_cannot_do_is_refused(headed: Any, make_model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"sampler\.joint_steps needs a trained joint head: set model\.joint_head to true"
    ):
        token_engine(make_model("gpt2-full"), options())
    for family, settings in (("gpt2-full", {"approximate_cache": "dual"}), ("qwen3-block4", {})):
        with pytest.raises(ValueError, match=r"sampler\.joint_steps is for full attention and rollout"):
            token_engine(headed(family), options(), **settings)
    for changed in ({"preset": "rcr"}, {"record_x0": True}, {"constraint": {"regex": "a"}}, {"verify": True},
                    {"guide": {"model": "x"}}, {"choose": {"block_length": [1, 2]}}, {"cfg_scale": 1.0}):  # fmt: skip
        with pytest.raises(ValueError, match=r"sampler\.joint_steps does not go with"):
            options(**changed)
    with pytest.raises(ValueError, match=r"a search makes a forward at every step"):
        TokenSampler(token_engine(headed(), options()), [[1]])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["model.joint_head=true", "sampler.joint_steps=1"], "no recipe learns from them"),
        (["train.steps=0", "sampler.joint_steps=1"], r"set model\.joint_head to true"),
        (["model.joint_head=true", "sft.joint=true", "sft.consistency=0.5"], r"sft\.joint reveals masks of answers"),
        (["model.noise=uniform", "train.steps=0", "sft.joint=true"], r"sft\.joint needs masks"),
        (["model.noise=uniform", "train.steps=0", "sampler.joint_steps=1"], r"sampler\.joint_steps is for absorbing"),
    ],
)
def test_a_run_says_what_does_not_go_together(changes: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_run(load_config("configs/quickstart.yaml", changes))


def test_an_engine_without_a_joint_head_is_refused() -> None:
    needs = engine_needs(load_config("configs/quickstart.yaml", ["sampler.joint_steps=1"]))
    with pytest.raises(ValueError, match=r"its joint head says \(choices\), which sampler\.joint_steps needs"):
        require("ray", RAY_WORKERS, needs)
