"""Decoders that an autoregressive model guides: the law of EDLM by enumeration, and what guided diffusion reveals."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import rl
from rewards.causal_lm import CausalReader, Reading
from rl.config import load_config
from rl.estimators.trace_rows import packed_rows, remask_rows
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rl.tasks.char_tokenizer import char_tokenizer
from rl.train.plan import check_run, engine_needs
from rollouts.engines.base import RAY_WORKERS, require
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from rollouts.search.tokens import TokenSampler
from tests.tabular import PROMPT, TabularModel

WORDS = list(itertools.product(range(2), repeat=3))
END = 0


class TableReader:
    """An autoregressive law over tokens: p(next | the tokens before it in the answer), drawn once and for all."""

    def __init__(self, size: int, seed: int = 0, scale: float = 1.5):
        self.size, self.seed, self.scale = size, seed, scale
        self.known: dict[tuple[int, ...], torch.Tensor] = {}
        self.read_before: dict[tuple[int, ...], Any] = {}

    def logp(self, before: tuple[int, ...]) -> torch.Tensor:
        if before not in self.known:
            generator = torch.Generator().manual_seed(hash((self.seed, *before)) % 2**31)
            drawn = self.scale * torch.randn(self.size, generator=generator, dtype=torch.float64)
            self.known[before] = drawn.log_softmax(0)
        return self.known[before]

    def read(self, prompts: Any, answers: Any, top: int | None = 0) -> list[Reading]:
        for answer in set(map(tuple, answers)) - set(self.read_before):
            laws = torch.stack([self.logp(answer[:i]) for i in range(len(answer))])
            logprob = laws.gather(1, torch.tensor(answer)[:, None])[:, 0]
            self.read_before[answer] = logprob, laws.topk(min(6, self.size), dim=1)
        found = []
        for answer in answers:
            logprob, best = self.read_before[tuple(answer)]
            found.append(Reading(logprob, best.indices[:, :top], best.values[:, :top]) if top else Reading(logprob))
        return found


def options(candidates: int, steps: int = 1, **more: Any) -> SamplerOptions:
    guide = {"model": "a table", "rule": "energy", "candidates": candidates}
    return SamplerOptions(gen_length=3, num_inference_steps=steps, guide=guide, **more)


def guided(model: Any, reader: Any, given: SamplerOptions, count: int = 1, eos: int | None = None) -> Any:
    engine = InProcessEngine(model, given, max_batch_size=count, guide=reader, eos_token_id=eos)
    return engine.generate([Request(PROMPT, seed) for seed in range(count)])


def chosen_law(model: TabularModel, reader: TableReader, state: tuple[int, ...], count: int, ends: bool) -> np.ndarray:
    """P(filling) of one weighed choice among `count` draws, over WORDS: every pair (or more) of draws in turn."""
    logp, law = model.logp(state).detach(), np.zeros(len(WORDS))
    q, weight = [], []
    for word in WORDS:
        over = word.index(END) + 1 if ends and END in word else 3
        fits = all(s in (2, w) for s, w in zip(state, word, strict=True))
        places = [i for i in range(3) if state[i] == 2]
        q.append(float(sum(logp[i, word[i]] for i in places).exp()) if fits else 0.0)
        total = sum(float(reader.logp(word[:i])[word[i]]) for i in range(over))
        weight.append(np.exp(total - float(sum(logp[i, word[i]] for i in places if i < over))))
    for drawn in itertools.product(range(len(WORDS)), repeat=count):
        own = np.array([weight[i] for i in drawn])
        for i, share in zip(drawn, own / own.sum(), strict=True):
            law[i] += np.prod([q[j] for j in drawn]) * share
    return law


@pytest.mark.parametrize("ends", [False, True])
def test_one_step_of_edlm_has_the_law_of_its_importance_weights(ends: bool) -> None:
    """Three draws and one of them by p / q, against all 512 triples; what lies behind an end token is free."""
    model, reader, count = TabularModel(2, 3, seed=1), TableReader(2), 4000
    exact = chosen_law(model, reader, (2, 2, 2), 3, ends)
    assert exact.sum() == pytest.approx(1.0)
    plain = chosen_law(model, reader, (2, 2, 2), 1, ends)
    assert np.abs(exact - plain).sum() > 0.2, "the guide must show"
    drawn = np.zeros(len(WORDS))
    for trajectory in guided(model, reader, options(3), count, END if ends else None):
        drawn[WORDS.index(tuple(trajectory.canvas_at(trajectory.num_steps)[1:].tolist()))] += 1
    np.testing.assert_array_less(np.abs(drawn / count - exact), 4.5 * np.sqrt(exact * (1 - exact) / count) + 1e-4)


def test_with_many_draws_edlm_is_the_autoregressive_law() -> None:
    """A hundred draws in place of the limit: its bias is of the order of 1 / candidates."""
    model, reader = TabularModel(2, 3, seed=1, scale=0.5), TableReader(2, scale=0.8)
    aim = np.exp([sum(float(reader.logp(w[:i])[w[i]]) for i in range(3)) for w in WORDS])
    gaps = [np.abs(chosen_law(model, reader, (2, 2, 2), k, False) - aim).sum() for k in (1, 2, 4)]
    assert gaps[0] > 1.4 * gaps[1] > 1.8 * gaps[2]
    count, drawn = 1000, np.zeros(len(WORDS))
    for trajectory in guided(model, reader, options(100), count):
        drawn[WORDS.index(tuple(trajectory.canvas_at(trajectory.num_steps)[1:].tolist()))] += 1
    np.testing.assert_array_less(np.abs(drawn / count - aim), 4.5 * np.sqrt(aim * (1 - aim) / count) + 0.01)


def test_several_steps_of_edlm_each_weigh_again() -> None:
    """One token a step, the left-most: the law of a token is that of its place in the filling that was taken."""
    model, reader, count = TabularModel(2, 3, seed=3), TableReader(2, seed=5), 3000
    reach = {(2, 2, 2): 1.0}
    for place in range(3):
        after: dict[tuple[int, ...], float] = {}
        for state, chance in reach.items():
            for word, share in zip(WORDS, chosen_law(model, reader, state, 2, False), strict=True):
                following = (*state[:place], word[place], *state[place + 1 :])
                after[following] = after.get(following, 0.0) + chance * share
        reach = after
    exact = np.array([reach[word] for word in WORDS])
    drawn = np.zeros(len(WORDS))
    for trajectory in guided(model, reader, options(2, steps=3, selector="left_most"), count):
        drawn[WORDS.index(tuple(trajectory.canvas_at(trajectory.num_steps)[1:].tolist()))] += 1
    np.testing.assert_array_less(np.abs(drawn / count - exact), 4.5 * np.sqrt(exact * (1 - exact) / count) + 1e-4)


def test_one_candidate_is_no_guide_and_a_share_ends_it(make_model) -> None:
    model, reader = make_model("gpt2-full"), TableReader(12)
    plain = {"gen_length": 6, "num_inference_steps": 3}
    requests = [Request([1, 2], seed) for seed in range(6)]

    def answers(**guide: Any) -> list[list[int]]:
        own = {"guide": {"model": "x", "rule": "energy", **guide}} if guide else {}
        engine = InProcessEngine(model, SamplerOptions(**plain, **own), guide=reader if guide else None)
        return [t.response_ids().tolist() for t in engine.generate(requests)]

    assert answers(candidates=1) == answers()
    assert answers(candidates=6, share=0.34) != answers(candidates=6) != answers()


class Agrees:
    """Says of each answer which of its places it agrees with: a token 9 is refused, 8 is second with half the best."""

    def read(self, prompts: Any, answers: Any, top: int | None = 0) -> list[Reading]:
        assert top == 2
        found = []
        for answer in answers:
            ids = torch.tensor([[10 if t in (8, 9) else t, 8 if t == 8 else 11] for t in answer])
            best = torch.full((len(answer), 2), -1.0, dtype=torch.float64)
            best[:, 1] -= 0.6
            own = torch.tensor([-9.0 if t == 9 else -1.6 if t == 8 else -1.0 for t in answer], dtype=torch.float64)
            found.append(Reading(own, ids, best))
        return found


class Fixed:
    """Predicts one text whatever it sees."""

    attention, block_length, logit_shift, max_length, mask_token_id = "full", None, 0, 64, 12

    def __init__(self, text: list[int]):
        self.table = torch.full((len(text) + 1, 13), -50.0, dtype=torch.float64)
        self.table[torch.arange(len(text)) + 1, torch.tensor(text)] = 50.0

    def hidden_states(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.arange(input_ids.shape[1]).expand(len(input_ids), -1)

    def token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.table[hidden]


@pytest.mark.parametrize(
    ("text", "relative", "eos", "steps"),
    [
        ([1, 2, 3, 4], 0.5, None, [0, 0, 0, 0]),  # the guide agrees with all
        ([1, 2, 9, 4], 0.5, None, [0, 0, 1, 2]),  # up to the third, which then comes alone
        ([9, 9, 3, 9], 0.5, None, [0, 1, 2, 3]),
        ([1, 8, 3, 4], 0.5, None, [0, 0, 0, 0]),  # exp(-0.6) = 0.55 of the likeliest's probability
        ([1, 8, 3, 4], 0.6, None, [0, 1, 2, 2]),
        ([1, 0, 9, 9], 0.5, 0, [0, 0, 0, 0]),  # nothing is asked behind an end token
    ],
)  # fmt: skip
def test_guided_diffusion_reveals_as_far_as_the_guide_agrees(
    text: list[int], relative: float, eos: int | None, steps: list[int]
) -> None:
    given = SamplerOptions(
        gen_length=4, num_inference_steps=4, temperature=0.0, guide={"model": "x", "relative": relative}
    )
    (trajectory,) = InProcessEngine(Fixed(text), given, eos_token_id=eos, guide=Agrees()).generate([Request([5], 0)])
    assert trajectory.canvas_at(trajectory.num_steps)[1:].tolist() == text
    assert trajectory.step[np.argsort(trajectory.position)].tolist() == steps
    assert trajectory.decoder["guide"]["rule"] == "agree"


@pytest.mark.parametrize("family", ["gpt2-full-shifted", "qwen3-block4"])
def test_the_learner_scores_what_a_guide_agreed_with(make_model, family: str) -> None:
    model, reader = make_model(family), TableReader(12, scale=0.5)
    given = SamplerOptions(
        gen_length=8, num_inference_steps=8, temperature=1.3, guide={"model": "x", "top": 6, "relative": 0.1}
    )
    requests = [Request([(3 * i + n) % 11 for i in range(n)], seed=n) for n in range(1, 7)]
    engine = InProcessEngine(model, given, eos_token_id=0, max_batch_size=4, guide=reader)
    trajectories = engine.generate(requests)
    assert 1 < np.mean([len(t.token) / t.num_steps for t in trajectories]) < 6
    rows = packed_rows(trajectories) if "block" in family else remask_rows(trajectories, 1, model.logit_shift)
    with torch.no_grad():
        scored = rows.score(model).logprob.numpy()
    np.testing.assert_allclose(scored, np.concatenate([t.logprob for t in trajectories]), rtol=0, atol=1e-9)
    alone = InProcessEngine(model, given, eos_token_id=0, max_batch_size=1, guide=reader).generate(requests)
    assert [t.token.tolist() for t in alone] == [t.token.tolist() for t in trajectories]


def test_a_model_of_transformers_guides(tmp_path) -> None:
    """Through `rl.sample`: the folder is loaded, and the fillings it likes better are taken more often."""

    tokenizer = char_tokenizer("abcdefgh")
    size = len(tokenizer)
    torch.manual_seed(0)
    backbone = {"model_type": "gpt2", "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": size}
    model = DiffusionLM(DiffusionLMConfig(backbone=backbone, mask_token_id=tokenizer.mask_token_id, attention="full"))
    causal = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    causal.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    guide = {"model": str(tmp_path), "rule": "energy", "candidates": 12, "dtype": "float32"}
    decoder = {"gen_length": 4, "num_inference_steps": 1}
    reader = CausalReader(causal.eval())
    means = []
    for own in ({}, {"guide": guide}):
        found = rl.sample(model, ["ab"], tokenizer=tokenizer, decoder={**decoder, **own}, num_samples=40)
        answers = [t.response_ids().tolist() for t in found]
        read = reader.read([found[0].prompt_ids.tolist()] * len(answers), answers)
        means.append(np.mean([float(one.logprob.sum()) for one in read]))
    assert means[1] > means[0] + 0.2
    other = char_tokenizer("hgfedcba")
    with pytest.raises(ValueError, match=r"sampler\.guide\.model .* has another vocabulary than the policy"):
        rl.sample(model, ["ab"], tokenizer=other, decoder={**decoder, "guide": guide}, num_samples=1)


def test_what_does_not_go_with_a_guide_is_refused(make_model) -> None:
    guide = {"model": "x"}
    for changed in ({"preset": "rcr"}, {"record_x0": True}, {"constraint": {"regex": "a"}}, {"verify": True}):
        with pytest.raises(ValueError, match=r"sampler\.guide does not go with"):
            SamplerOptions(guide=guide, **changed)
    with pytest.raises(ValueError, match=r"set sampler\.temperature above 0"):
        SamplerOptions(temperature=0.0, guide={**guide, "rule": "energy"})
    model, given = make_model("gpt2-full"), SamplerOptions(guide=guide)
    with pytest.raises(ValueError, match=r"sampler\.guide needs its model"):
        InProcessEngine(model, given)
    with pytest.raises(ValueError, match="a search has no guide"):
        TokenSampler(InProcessEngine(model, given, guide=TableReader(12)), [[1]])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["sampler.guide={model: /nowhere.gguf, rule: energy}"], "no recipe learns from them"),
        (["sampler.guide={model: 'package:nothing/x.gguf'}"], "there is no installed package"),
    ],
)
def test_a_run_says_what_is_wrong_with_its_guide(changes: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_run(load_config("configs/quickstart.yaml", changes))


def test_an_engine_without_guides_is_refused() -> None:
    needs = engine_needs(load_config("configs/quickstart.yaml", ["sampler.guide={model: x}"]))
    require("ray", RAY_WORKERS, needs)
    with pytest.raises(ValueError, match=r"guides \(guides\), which sampler\.guide needs"):
        require("server", replace(RAY_WORKERS, guides=False), needs)
