"""Constraints: what an automaton allows, the law of constrained sampling, and that the learner scores the same law."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rl.estimators.masked_copies import copy_rows
from rl.estimators.trace_rows import packed_rows, remask_rows
from rl.models.vocabulary import compiled_constraint, token_bytes
from rl.tasks.char_tokenizer import char_tokenizer
from rollouts.constraints.automaton import TokenAutomaton, edges_of, from_edges
from rollouts.constraints.reach import Constraint
from rollouts.constraints.schema import schema_regex
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.presets import PRESETS
from rollouts.samplers.sub_options import ConstraintOptions
from rollouts.trajectory import load_trajectories, save_trajectories
from tests.tabular import PROMPT, TabularModel

pytest.importorskip("outlines_core")

NONE = np.zeros(0, dtype=np.int64)
ABC = char_tokenizer("abc", ends=False)  # a, b, c are 0, 1, 2, and the mask is 3
ENDED = char_tokenizer("abc")  # and 4 is the end token, 5 the pad token


def automaton(pattern: str, tokenizer: Any = ABC) -> TokenAutomaton:
    return compiled_constraint(ConstraintOptions(regex=pattern), tokenizer, [])


def words(pattern: str, length: int) -> list[tuple[int, ...]]:
    """All matches of one length over a, b, c, by Python's own expressions."""
    everything = itertools.product("abc", repeat=length)
    return [tuple("abc".index(c) for c in word) for word in everything if re.fullmatch(pattern, "".join(word))]


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    if depth == 0:
        return rng.choice(["a", "b", "c", "[ab]", "[^a]", "."])
    kind, parts = rng.random(), [random_pattern(rng, depth - 1) for _ in range(2)]
    if kind < 0.5:
        return "".join(parts)
    return f"({parts[0]}|{parts[1]})" if kind < 0.7 else f"({parts[0]}){rng.choice(['?', '*', '+', '{1,2}'])}"


# --- what is allowed --------------------------------------------------------------------------------------------------


def test_allowed_tokens_are_those_of_some_completion() -> None:
    """Against all words, on canvases with any positions decided, in any order."""
    rng, length, tried = random.Random(0), 5, 0
    while tried < 40:
        pattern = random_pattern(rng)
        matches = words(pattern, length)
        found = automaton(pattern)
        assert (found.refusal(length) is None) == bool(matches), pattern
        if not matches:
            continue
        tried += 1
        constraint = Constraint(found, length, mask_token_id=3)
        word = rng.choice(matches)
        canvas = torch.tensor([[9, *(t if rng.random() < 0.4 else 3 for t in word)] for _ in range(4)])
        row, position = (canvas == 3).nonzero(as_tuple=True)
        allowed = constraint.tokens(
            constraint.reach(canvas, torch.ones(4, dtype=torch.int64)).allowed(row, position), 4
        )
        for r, p, own in zip(row.tolist(), position.tolist(), allowed, strict=True):
            fits = [w for w in matches if all(x in (3, y) for x, y in zip(canvas[r, 1:].tolist(), w, strict=True))]
            assert set(own.nonzero().flatten().tolist()) == {w[p - 1] for w in fits}, (pattern, canvas[r])


def test_the_end_token_follows_a_whole_match_and_fills_the_rest() -> None:
    found = automaton("ab|b", ENDED)
    constraint = Constraint(found, 3, mask_token_id=3)
    every = constraint.reach(torch.full((1, 3), 3), torch.zeros(1, dtype=torch.int64))
    allowed = constraint.tokens(every.allowed(torch.zeros(3, dtype=torch.int64), torch.arange(3)), 6)
    assert [row.nonzero().flatten().tolist() for row in allowed] == [[0, 1], [1, 4], [4]]
    assert constraint.forced().tolist() == [[2, 4]]


def test_excluded_tokens_cut_the_words_that_need_them() -> None:
    """Without b, only c c is left of (a b | c c); its first token is then forced, not left to a dead end."""
    found = compiled_constraint(ConstraintOptions(regex="ab|cc|ca"), ABC, [[1, 2]])
    assert [place for place, _ in Constraint(found, 2, 3).forced()] == [0]
    nothing = compiled_constraint(ConstraintOptions(regex="ab"), ABC, [[1, 2]])
    assert "no sequence of the tokens" in str(nothing.refusal(2))
    with pytest.raises(ValueError, match=r"sampler\.constraint cannot be met: no sequence"):
        Constraint(nothing, 2, 3)


@pytest.mark.parametrize(
    ("pattern", "length", "reason"),
    [
        ("abc", 2, "its shortest match has 3 tokens, and sampler.gen_length is 2"),
        ("a|abc", 2, "no match has exactly sampler.gen_length 2 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(pattern: str, length: int, reason: str) -> None:
    assert reason in str(automaton(pattern).refusal(length))


def test_a_canvas_that_contradicts_the_constraint_is_named() -> None:
    constraint = Constraint(automaton("ab."), 3, 3)
    reach = constraint.reach(torch.tensor([[0, 3, 3], [1, 3, 3]]), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="leaves no token for position 1 of response 1"):
        reach.allowed(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 1, 2]))


# --- the law ----------------------------------------------------------------------------------------------------------


def law(model: TabularModel, matches: list[tuple[int, ...]], order: str, quota: int) -> dict[tuple[int, ...], float]:
    """The law of constrained sampling, step by step, with every set of allowed tokens found among all words."""
    size, mask = model.num_free, model.num_tokens
    model.requires_grad_(False)

    def allowed(state: tuple[int, ...], place: int) -> list[int]:
        fits = [w for w in matches if all(x in (mask, y) for x, y in zip(state, w, strict=True))]
        return sorted({w[place] for w in fits})

    def within(state: tuple[int, ...], decided: tuple[int, ...], place: int) -> dict[int, float]:
        """The model's law at a place of the state before the step, renormalised over what the decided ones leave."""
        logp, tokens = model.logp(state)[place].exp(), allowed(decided, place)
        total = float(logp[tokens].sum())
        return {token: float(logp[token]) / total for token in tokens}

    reach = {(mask,) * size: 1.0}
    while any(mask in state for state in reach):
        after: dict[tuple[int, ...], float] = {}
        for state, chance in reach.items():
            places = [i for i, token in enumerate(state) if token == mask]
            if order == "max_probability":
                places.sort(key=lambda i: -max(within(state, state, i).values()))
            branches = {state: chance}
            for place in sorted(places[:quota]):
                branches = {
                    (*decided[:place], token, *decided[place + 1 :]): p * share
                    for decided, p in branches.items()
                    for token, share in within(state, decided, place).items()
                }
            for decided, p in branches.items():
                after[decided] = after.get(decided, 0.0) + p
        reach = after
    return reach


@pytest.mark.parametrize(
    ("pattern", "settings", "order", "quota"),
    [
        ("ab*c|b[ac]*|ca+b", {"selector": "left_most", "num_inference_steps": 2}, "left", 2),
        ("(ab|ba)(c[ab]|bc)", {"score": "max_probability", "num_inference_steps": 2}, "max_probability", 2),
        ("(aa|bb|cc)+", {"score": "max_probability", "num_inference_steps": 1}, "max_probability", 4),
    ],
)
def test_constrained_sampling_has_the_law_of_its_steps(
    pattern: str, settings: dict[str, Any], order: str, quota: int
) -> None:
    """Positions of one step are dependent through the automaton: (aa|bb|cc)+ in one step would often pair a and b."""
    matches, model = words(pattern, 4), TabularModel(3, 4, seed=3, scale=1.5)
    exact = law(model, matches, order, quota)
    assert set(exact) <= set(matches) and sum(exact.values()) == pytest.approx(1.0)
    options = SamplerOptions(gen_length=4, constraint={"regex": pattern}, **settings)
    engine = InProcessEngine(model, options, max_batch_size=5000, constraint=automaton(pattern))
    count = 5000
    trajectories = engine.generate([Request(PROMPT, seed) for seed in range(count)])
    drawn: dict[tuple[int, ...], int] = {}
    for trajectory in trajectories:
        word = tuple(trajectory.response_ids().tolist())
        drawn[word] = drawn.get(word, 0) + 1
        # The path to a word is one here: places are chosen by the state, and the steps' tokens are the word's.
        if order == "left" or quota == 4:
            assert np.exp(trajectory.logprob.sum()) == pytest.approx(exact[word], rel=1e-9)
    for word, chance in exact.items():
        assert abs(drawn.get(word, 0) / count - chance) < 4.5 * (chance * (1 - chance) / count) ** 0.5 + 1e-4


def test_greedy_decoding_is_valid_too() -> None:
    pattern, model = "(ab|bc|ca)+", TabularModel(3, 4, seed=1)
    options = SamplerOptions(gen_length=4, num_inference_steps=1, temperature=0.0, constraint={"regex": pattern})
    (trajectory,) = InProcessEngine(model, options, constraint=automaton(pattern)).generate([Request(PROMPT, 0)])
    assert tuple(trajectory.response_ids().tolist()) in words(pattern, 4)


# --- the learner ------------------------------------------------------------------------------------------------------


def neighbours(vocab_size: int, seed: int = 0) -> TokenAutomaton:
    """Each token may be followed by five others; 0 is the end token."""
    rng = np.random.default_rng(seed)
    transitions = {
        state: {int(t): int(t) for t in rng.choice(np.arange(1, vocab_size - 1), 5, replace=False)}
        for state in range(vocab_size)
    }
    return from_edges(edges_of(transitions), 0, range(1, vocab_size - 1), vocab_size - 1, 0, NONE)


def constrained(model: Any, lengths: range, **settings: Any) -> Any:
    settings = {"gen_length": 8, "num_inference_steps": 4, "constraint": {"regex": "."}, **settings}
    requests = [
        Request([(3 * i + n) % 11 for i in range(n)], seed=100 * n + copy) for n in lengths for copy in range(2)
    ]
    engine = InProcessEngine(
        model, SamplerOptions(**settings), eos_token_id=0, max_batch_size=5, constraint=neighbours(12)
    )
    return engine.generate(requests)


PLAIN = [name for name, parts in PRESETS.items() if parts.get("reviser", "none") == "none"][::2]


@pytest.mark.parametrize("family", ["gpt2-full", "qwen3-full", "gpt2-full-shifted", "qwen3-block4", "gpt2-block4"])
def test_learner_and_sampler_give_equal_log_probs_under_a_constraint(make_model, family: str) -> None:
    """For every decoder without a reviser, temperatures and filters among them."""
    model, block = make_model(family), family.endswith("block4")
    filters = [{"temperature": 1.3}, {"temperature": 0.7, "top_p": 0.85}, {"temperature": 1.2, "top_k": 3}]
    for index, preset in enumerate(PLAIN):
        block_length = 4 if block or index % 2 else None
        trajectories = constrained(
            model, range(1, 4, 2), preset=preset, block_length=block_length, **filters[index % len(filters)]
        )
        for trajectory in trajectories:
            trajectory.validate()
        rows = packed_rows(trajectories) if block else remask_rows(trajectories, 1, model.logit_shift)
        with torch.no_grad():
            scores = rows.score(model)
        recorded = np.concatenate([t.logprob[t.is_reveal] for t in trajectories])
        np.testing.assert_allclose(scores.logprob.numpy(), recorded, rtol=0, atol=1e-9, err_msg=preset)
        with torch.no_grad():
            free = replace(rows, allowed=None, allowed_at=None).score(model).logprob
        assert (free - scores.logprob).abs().max() > 0.05, "the constraint must show"
        assert torch.isfinite(scores.entropy).all()


def test_the_gradient_is_that_of_the_renormalised_softmax(make_model) -> None:
    model = make_model("gpt2-full")
    rows = remask_rows(constrained(model, range(1, 3)))
    logits = rows.logits(model).detach().requires_grad_()
    logprob, entropy = rows.drawn(logits)
    (logprob.sum() + 0.3 * entropy.sum()).backward()
    assert logits.grad is not None
    plain = logits.detach().clone().requires_grad_()
    assert rows.allowed is not None and rows.allowed_at is not None
    inside = torch.from_numpy(np.unpackbits(rows.allowed.numpy(), axis=1))[rows.allowed_at][:, :12].bool()
    total = torch.zeros(())
    for own, kept, target in zip(plain, inside, rows.target, strict=True):
        law = (own[kept] - own[kept].logsumexp(0)).double()
        total = total + law[int(kept[:target].sum())] - 0.3 * (law.exp() * law).sum()
    total.backward()
    torch.testing.assert_close(logits.grad, plain.grad, rtol=0, atol=1e-9)


def test_sets_survive_the_file(tmp_path, make_model) -> None:
    model = make_model("gpt2-full")
    trajectories = constrained(model, range(1, 4))
    save_trajectories(tmp_path / "t.npz", trajectories[2:])
    loaded = load_trajectories(tmp_path / "t.npz")
    with torch.no_grad():
        before, after = (remask_rows(t).score(model).logprob for t in (trajectories[2:], loaded))
    assert torch.equal(before, after)
    broken = replace(loaded[0], token=np.where(loaded[0].token == loaded[0].token[0], 11, loaded[0].token))
    with pytest.raises(ValueError, match="'allowed' excludes a token that was drawn"):
        broken.validate()


# --- scaffolds, schemas, graphs ---------------------------------------------------------------------------------------


def test_a_scaffold_is_placed_before_the_first_step() -> None:
    """`a<2:b*>a` over 6 positions: a at 0 and 3, then the end tokens; b or pads in the slot."""
    tokenizer = char_tokenizer("abc")
    found = compiled_constraint(ConstraintOptions(scaffold="a<2:b*>a"), tokenizer, [])
    model = TabularModel(7, 6, seed=0)
    model.mask_token_id = 3
    model.hidden_states = (
        lambda input_ids, **_: (  # type: ignore[method-assign]
            0.3
            * torch.arange(8 * 7, dtype=torch.float64)
            .sin()
            .view(8, 7)[: input_ids.shape[1]]
            .expand(len(input_ids), -1, -1)
        )
    )
    options = SamplerOptions(gen_length=6, num_inference_steps=2, constraint={"scaffold": "a<2:b*>a"})
    engine = InProcessEngine(model, options, eos_token_id=4, constraint=found)
    texts = set()
    for trajectory in engine.generate([Request([1], seed) for seed in range(40)]):
        trajectory.validate()
        assert trajectory.canvas_at(0).tolist() == [1, 0, 3, 3, 0, 4, 4]
        assert trajectory.placed.tolist() == [1, 4, 5, 6] and trajectory.num_steps == 2
        assert trajectory.is_reveal.sum() == 2 and set(trajectory.position[trajectory.is_reveal]) == {2, 3}
        assert remask_rows([trajectory]).target.tolist() == trajectory.token[trajectory.is_reveal].tolist()
        copies, _ = copy_rows([trajectory], model, lambda places, *_: [_hide(places)])
        assert copies.input_ids.tolist() == [[1, 0, 3, 3, 0, 4, 4]] and len(copies.target) == 2
        texts.add(tokenizer.decode(trajectory.response_ids(), skip_special_tokens=True))
    assert texts == {"aa", "aba", "abba"}


def _hide(places: np.ndarray) -> Any:
    from rl.estimators.draws import Copy

    return Copy(places, places)


def test_a_graph_says_which_token_follows_which() -> None:
    graph = {"<start>": ["a"], "a": ["b", "c"], "b": ["a", "<end>"], "c": ["c", "b"]}
    found = compiled_constraint(ConstraintOptions(graph=graph), ABC, [])
    model, options = TabularModel(3, 4, seed=2), SamplerOptions(gen_length=4, constraint={"graph": graph})
    trajectories = InProcessEngine(model, options, constraint=found).generate([Request(PROMPT, s) for s in range(300)])
    drawn = {ABC.decode(t.response_ids()) for t in trajectories}
    assert drawn == {"abab", "accb"}


def test_a_schema_is_refused_where_the_expression_would_say_less() -> None:
    cases = [
        ({"type": "integer", "minimum": 3}, r"\$ uses minimum"),
        ({"type": "object", "properties": {"a": {"type": "array"}}}, r"\$\.a is an array of anything"),
        ({"type": "object"}, r"\$ is an object without properties"),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]}, "requires 'b'"),
        ({"type": "string", "pattern": "a.b"}, "allows"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "one of them"),
        ({"type": "string", "format": "date"}, "has format 'date'"),
        ({"oneOf": [{"type": "null"}]}, "has no type, and uses oneOf"),
        ({"enum": [[1]]}, "of texts, numbers"),
        (
            {"$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}}}},
            "nests without bound",
        ),
        ({"$ref": "#/$defs/y"}, "which is not in the schema"),
        (True, "must be a schema"),
    ]
    for schema, reason in cases:
        with pytest.raises(ValueError, match=r"sampler\.constraint\.json_schema: .*" + reason):
            schema_regex(schema)
    # The package writes a pattern as it is: "a|b" would match a quote and an a.
    assert re.fullmatch(schema_regex({"type": "string", "pattern": "a|b"}), '"b"')
    assert not re.fullmatch(schema_regex({"type": "string", "pattern": "a|b"}), '"a')
    # A dollar at the end is an anchor unless a backslash makes it a character; "\\\\" is a backslash itself.
    for pattern, text in [(r"^[0-9]+\$", "12$"), (r"a$", "a"), (r"[0-9]\$$", "1$")]:
        assert re.fullmatch(schema_regex({"type": "string", "pattern": pattern}), f'"{text}"'), pattern
        assert not re.fullmatch(schema_regex({"type": "string", "pattern": pattern}), f'"{text}$"'), pattern


# --- validity ---------------------------------------------------------------------------------------------------------


class Noise:
    """A denoiser of random numbers: it knows nothing, so that only the constraint makes an answer valid."""

    attention, block_length, logit_shift, max_length = "full", None, 0, 64

    def __init__(self, vocab_size: int, mask_token_id: int):
        generator = torch.Generator().manual_seed(0)
        self.mask_token_id = mask_token_id
        self.table = 3 * torch.randn(97, vocab_size, generator=generator)
        self.table[:, mask_token_id] = -1e9

    def hidden_states(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return (input_ids.cumsum(1) + 7 * torch.arange(input_ids.shape[1]) + input_ids.sum(1, keepdim=True)) % 97

    def token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.table[hidden]


DECODERS = [
    {"num_inference_steps": 1}, {"num_inference_steps": 4, "score": "random"}, {"num_inference_steps": 8},
    {"selector": "threshold", "threshold": 0.5}, {"num_inference_steps": 10, "block_length": 4, "temperature": 0.0},
    {"preset": "entropy_bound", "top_p": 0.9}, {"preset": "dream_origin", "num_inference_steps": 3},
]  # fmt: skip


def sampled(given: ConstraintOptions, tokenizer: Any, length: int, index: int, count: int = 3) -> list[str]:
    """Answers of the ignorant model; none where no answer of that length matches."""
    found = compiled_constraint(given, tokenizer, [])
    if found.refusal(length) is not None:
        return []
    options = SamplerOptions(gen_length=length, constraint=given, **DECODERS[index % len(DECODERS)])
    model, end = Noise(found.classes.size, tokenizer.mask_token_id), tokenizer.eos_token_id
    try:
        engine = InProcessEngine(model, options, eos_token_id=end, constraint=found)
    except ValueError as error:
        assert "nothing is to decide" in str(error)
        return []
    trajectories = engine.generate([Request([0], 1000 * index + seed) for seed in range(count)])
    return tokenizer.batch_decode([t.response_ids() for t in trajectories], skip_special_tokens=True)


def pieces() -> Any:
    """A tokenizer whose tokens overlap: `":` may be one token or two."""
    letters = [chr(code) for code in range(32, 127)]
    return char_tokenizer_of([*letters, '{"', '":', '": ', ', "', '"}', "tr", "true", "12", "ab", '","', "é"])


def char_tokenizer_of(tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    known = {token: i for i, token in enumerate([*tokens, "<mask>", "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(known))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>", eos_token="<eos>")


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    leaves: list[dict[str, Any]] = [
        {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}, {"const": 'a"b'},
        {"enum": [1, "x.y", None, -2.5]}, {"type": "string", "maxLength": 4}, {"type": "string", "pattern": "^a|b+$"},
        {"type": "string", "minLength": 1, "maxLength": 3},
    ]  # fmt: skip
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice(leaves)
    parts = [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    if kind < 0.45:
        return {"anyOf": parts}
    if kind < 0.65:
        return {"type": "array", "items": parts[0], "minItems": rng.randint(0, 1), "maxItems": rng.randint(1, 3)}
    names = rng.sample(["a", "b.c", "key", "n"], len(parts))
    required = rng.sample(names, rng.randint(0, len(names)))
    return {"type": "object", "properties": dict(zip(names, parts, strict=True)), "required": required}


def check_patterns(count: int, seed: int) -> None:
    rng, tried = random.Random(seed), 0
    for index in range(10 * count):
        pattern = random_pattern(rng)
        answers = sampled(ConstraintOptions(regex=pattern), ENDED, 8, index)
        tried += bool(answers)
        assert all(re.fullmatch(pattern, answer) for answer in answers), (pattern, answers)
        if tried == count:
            return
    raise AssertionError("too few patterns had a match")


def check_schemas(count: int, seed: int) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    rng, tokenizer, tried = random.Random(seed), pieces(), 0
    for index in range(10 * count):
        schema = random_schema(rng)
        answers = sampled(ConstraintOptions(json_schema=schema), tokenizer, 40, index)
        tried += bool(answers)
        for answer in answers:
            jsonschema.validate(json.loads(answer), schema)
        if tried == count:
            return
    raise AssertionError("too few schemas had an answer")


def test_answers_of_an_ignorant_model_are_valid() -> None:
    check_patterns(20, seed=1)
    check_schemas(8, seed=1)


@pytest.mark.release
def test_a_thousand_patterns_and_schemas() -> None:
    check_patterns(500, seed=2)
    check_schemas(500, seed=2)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_options_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"sampler\.constraint takes one of regex, json_schema, scaffold, graph"):
        ConstraintOptions()
    with pytest.raises(ValueError, match=r"takes one of .*, got \['regex', 'scaffold'\]"):
        ConstraintOptions(regex="a", scaffold="<2>")
    for changed in ({"preset": "rcr"}, {"preset": "remdm"}, {"preset": "llada2_1_speed"}, {"record_x0": True}):
        with pytest.raises(ValueError, match=r"sampler\.constraint keeps every token"):
            SamplerOptions(constraint={"regex": "a"}, **changed)
    for given, reason in [
        ({"regex": "(a"}, r"regex cannot be compiled for this tokenizer"),
        ({"regex": "x"}, r"regex cannot be compiled for this tokenizer"),
        ({"scaffold": "abc"}, "has no slot"),
        ({"scaffold": "x<2>"}, "token|write"),
        ({"scaffold": "a<0>"}, "no value fits the slot <0> of 0 tokens"),
        ({"scaffold": "a<2:b{3}>"}, r"no value fits the slot <2:b\{3\}> of 2 tokens"),
        ({"graph": {"a": ["x"]}}, "'x' is no token"),
        ({"graph": {"a": ["<eos>"]}}, "'<eos>' is the end token: write <end>"),
        ({"graph": {"a": ["<start>"]}}, "nothing comes before <start>"),
        ({"graph": {"<end>": ["a"]}}, "behind <end>"),
        ({"json_schema": "/nowhere.json"}, "is not a file of JSON"),
    ]:
        with pytest.raises(ValueError, match=reason):
            compiled_constraint(ConstraintOptions(**given), ENDED, [])
    with pytest.raises(ValueError, match="fills slots up with pad tokens"):
        compiled_constraint(ConstraintOptions(scaffold="a<2>"), ABC, [])


def test_bytes_of_tokens_add_up_to_the_text() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel.alphabet()
    byte_level = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(level))}, merges=[]))
    byte_level.pre_tokenizer, byte_level.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level)
    texts = token_bytes(tokenizer)
    for text in ('{"é": "ß\n"}', "日本 \t"):
        assert b"".join(texts[i] for i in tokenizer(text).input_ids).decode() == text
    byte_level.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="whose tokens are pieces of text"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=byte_level))


def sentencepiece() -> Any:
    """Words with a space before them, as Llama's tokenizer has; decoding drops the first one of a text."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["\u2581", "\u2581ab", "ab", "a", "b", "\u2581\u2581a", "<0x20>", "<mask>", "<eos>", "<pad>"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="<mask>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.mark.parametrize("pattern", ["ab", " ab", " ?ab", "(ab)*( ab)?", " +a", "a? ?b*"])
def test_a_space_that_decoding_drops_is_no_part_of_the_match(pattern: str) -> None:
    """Against all sequences of three pieces: those that the automaton takes are those whose decoded text matches."""
    tokenizer = sentencepiece()
    found = compiled_constraint(ConstraintOptions(regex=pattern), tokenizer, [])
    taken, expected = set(), set()
    for ids in itertools.product(range(7), repeat=3):
        for length in range(4):
            own, state = ids[:length], found.start
            for token in [*own, *[8] * (4 - length)]:
                state = found.after[found.classes[token], state] if state < found.num_states else state
            if state < found.num_states and found.accepting[state]:
                taken.add(own)
            if re.fullmatch(pattern, tokenizer.decode(own)):
                expected.add(own)
    assert taken == expected and len(taken) > 3
