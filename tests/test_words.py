"""The task `words`: an exact split of pairs, its judge and reward by hand, and nats read as a plain loop reads them."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from rewards import fluency, keywords
from rewards.fluency import AnswerNats, Fluency, fluency_of
from rewards.keywords import KeywordFluency, KeywordSentence, forms, found, words_of
from rl.tasks.base import split_of
from rl.tasks.load import load_task
from rl.tasks.words import NOUNS, WordsTask


def test_a_pair_of_nouns_is_in_one_split_in_either_order() -> None:
    task = load_task("words", {})
    parts = {
        "train": task.train_examples(seed=0, step=3, count=2000),
        "validation": task.validation_examples(200),
        "test": task.heldout_examples(300),
    }
    pairs = {name: {frozenset(row["keywords"]) for row in rows} for name, rows in parts.items()}
    assert len(pairs["test"]) == 300 and len(pairs["validation"]) == 200
    for one, other in itertools.combinations(pairs.values(), 2):
        assert not one & other
    # Exact: every pair there is has its split from its own two words, whatever their order.
    every = [frozenset(pair) for pair in itertools.combinations(NOUNS, 2)]
    test = {pair for pair in every if split_of(" ".join(sorted(pair))) == "test"}
    assert pairs["test"] <= test and not pairs["train"] & test
    assert {tuple(row["keywords"]) == tuple(sorted(row["keywords"])) for row in parts["test"]} == {True, False}
    assert task.train_examples(0, 3, 2000) == parts["train"] != task.train_examples(0, 4, 2000)
    with pytest.raises(ValueError, match="test pairs of nouns where 8000 are asked for"):
        task.heldout_examples(8000)


def test_the_prompt_names_the_keywords_and_no_noun_is_a_form_of_another() -> None:
    row = WordsTask().heldout_examples(1)[0]
    a, b = row["keywords"]
    assert row["prompt"] == f'Write one short sentence with the words "{a}" and "{b}".'
    assert len(NOUNS) == len(set(NOUNS))
    assert not any(forms(a) & forms(b) for a, b in itertools.combinations(NOUNS, 2))


@pytest.mark.parametrize(
    "text, count",
    [
        ("The wolf met a fairy.", 2),
        ("WOLVES and fairies sing.", 2),
        ("A wolfhound is unfairylike.", 0),
        ("The wolf's den.", 1),
        ("A wolf-like fairys.", 2),
        ("", 0),
    ],
)
def test_words_count_whole_or_as_plurals(text: str, count: int) -> None:
    assert found(["wolf", "fairy"], words_of(text)) == count


def test_plurals() -> None:
    assert {"benches", "bench"} <= forms("Bench") and "knives" in forms("knife") and "pianos" in forms("piano")
    assert "valleys" in forms("valley") and "ben" not in forms("bench")


@pytest.fixture
def read_as(monkeypatch):
    """Answers have the nats that the test says; no model is loaded."""
    known: dict[str, float] = {}

    def nats(prompts, completions):
        return [known[text] for text in completions]

    monkeypatch.setattr(keywords, "answer_nats", lambda model, dtype: nats)
    monkeypatch.setattr(fluency, "answer_nats", lambda model, dtype: nats)
    return known


RIGHT = "A grey wolf played the old piano."  # 7 words


def test_the_judge_wants_both_words_a_length_and_fluency(read_as) -> None:
    judge = KeywordSentence("m", max_nats=2.0)
    texts = [RIGHT, RIGHT + "!", "The wolf ate a piano.", "A grey wolf played the old drum.", "wolf piano " * 11]
    read_as |= dict(zip(texts, [2.0, 2.01, 1.0, 1.0, 1.0], strict=True))
    scores = judge(["p"] * 5, texts, keywords=[["wolf", "piano"]] * 5)
    assert [score.value for score in scores] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert [score.metrics["words"] for score in scores] == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert scores[4].metrics["num_words"] == 22 and scores[1].metrics["nats"] == 2.01


def test_the_reward_is_words_times_fluency_times_length(read_as) -> None:
    reward = KeywordFluency("m", floor=2.0, ceiling=8.0, power=2.0)
    texts = [RIGHT, "A grey wolf played the old drum.", "wolf piano sings", "wolf piano " * 15, "x" * 9]
    read_as |= dict(zip(texts, [5.0, 5.0, 2.0, 1.0, 9.0], strict=True))
    values = [score.value for score in reward(["p"] * 5, texts, keywords=[["wolf", "piano"]] * 5)]
    # (8 - 5) / 6 = 0.5, squared 0.25; one word of two; 3 words of 6; 30 words where 20 are the most: 2 - 1.5; nothing.
    assert values == pytest.approx([0.25, 0.125, 0.5, 0.5, 0.0])


def test_a_text_that_repeats_itself_is_paid_less(read_as) -> None:
    """The chorus that TraceRL found on SmolLM2: 6 of its 11 words stood before."""
    texts = [RIGHT, "A wolf is a piano and a piano is a wolf.", "piano wolf wolf wolf wolf wolf"]
    read_as |= dict.fromkeys(texts, 2.0)
    asked = {"prompts": ["p"] * 3, "completions": texts, "keywords": [["wolf", "piano"]] * 3}
    assert [score.value for score in KeywordFluency("m")(**asked)] == [1.0, 1.0, 1.0]
    scores = KeywordFluency("m", max_repetition=0.2)(**asked)
    assert [score.metrics["repetition"] for score in scores] == pytest.approx([0.0, 6 / 11, 4 / 6])
    assert [score.value for score in scores] == pytest.approx([1.0, (5 / 11) / 0.8, (2 / 6) / 0.8])
    with pytest.raises(ValueError, match="max_repetition is a share"):
        KeywordFluency("m", max_repetition=2)


def test_fluency_alone_has_a_slope_up_to_its_ceiling(read_as) -> None:
    read_as |= {"a": 6.0, "b": 6.5}
    first, second = Fluency("m")(["p", "p"], ["a", "b"])
    assert first.value == pytest.approx((2 / 6) ** 2) and second.value == pytest.approx((1.5 / 6) ** 2)
    assert (fluency_of(1.0, 2, 8, 2), fluency_of(9.0, 2, 8, 2)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="floor 8"):
        Fluency("m", floor=8.0, ceiling=8.0)


def test_measures_that_are_not_the_reward() -> None:
    rows = [{"keywords": ["wolf", "piano"]}, {"keywords": ["moon", "key"]}, {"keywords": ["cat", "dog"]}]
    texts = ["The wolf likes the piano.", "The moon likes the keys!", "a cat a cat"]
    measured = WordsTask().measure(rows, texts, {"nats": 1.5})
    # Two sentences are one frame; "the" comes again once in five words, twice two words in four.
    assert measured == pytest.approx({"nats": 1.5, "distinct_frames": 2 / 3, "repetition": (0.2 + 0.2 + 0.5) / 3})


def test_files_with_keywords(tmp_path) -> None:
    file = tmp_path / "words.jsonl"
    file.write_text(json.dumps({"keywords": "wolf, piano"}) + "\n" + json.dumps({"keywords": ["moon"]}) + "\n")
    prompts = [row["prompt"] for row in WordsTask().file_examples(str(file))]
    assert prompts[0].endswith('words "wolf" and "piano".') and prompts[1].endswith('words "moon".')
    file.write_text(json.dumps({"keywords": ""}) + "\n")
    with pytest.raises(ValueError, match="row 1 needs keywords"):
        WordsTask().file_examples(str(file))


@pytest.fixture(scope="module")
def causal_folder(tmp_path_factory):
    """A random Llama with a tokenizer of whole words and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<end>", "<user>", "<model>", "the", "wolf", "plays", "piano", "old", "a", "<mask>"]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", mask_token="<mask>")
    tokenizer.chat_template = "<user> {{ messages[0]['content'] }} <model> "
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, initializer_range=0.8,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("causal")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_nats_are_those_of_a_plain_loop_over_prefixes(causal_folder) -> None:
    from transformers import LlamaForCausalLM

    nats = AnswerNats(str(causal_folder), "float32")
    texts = ["the wolf plays", "", "piano"]
    got = nats(["the old piano", "wolf", [{"role": "user", "content": "wolf"}]], texts)
    model = LlamaForCausalLM.from_pretrained(causal_folder).eval()
    prompts = [[1, 3, 7, 6, 2], [1, 4, 2], [1, 4, 2]]
    for prompt, answer, value in zip(prompts, [[3, 4, 5, 0], [0], [6, 0]], got, strict=True):
        total = 0.0
        for place, token in enumerate(answer):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer[:place]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[token])
        assert value == pytest.approx(total / len(answer), abs=1e-5)


def test_equal_answers_are_read_once(causal_folder, monkeypatch) -> None:
    nats = AnswerNats(str(causal_folder), "float32")
    asked = []
    read = nats.reader.read
    monkeypatch.setattr(nats.reader, "read", lambda p, a: asked.extend(a) or read(p, a))
    first = nats(["wolf", "wolf", "piano"], ["the wolf", "the wolf", "the wolf"])
    assert nats(["wolf"], ["the wolf"]) == first[:1] and first[0] == first[1] != first[2] and len(asked) == 2
    monkeypatch.setattr(fluency, "_REMEMBERED", 2)
    assert nats(["wolf", "old"], ["the wolf", "a"])[0] == pytest.approx(first[0]) and len(asked) == 4


def test_a_run_judges_the_baseline_and_keeps_answers(causal_folder, tmp_path, monkeypatch) -> None:
    from rl.config import load_config
    from rl.train import loop
    from rl.train.run import Run

    folder = str(causal_folder)
    judge = f"{{name: keyword_sentence, weight: 0, params: {{model: {folder}, max_nats: 9, min_words: 1}}}}"
    config = load_config(
        None,
        [
            f"run.output_dir={tmp_path / 'run'}", "task.name=words", "task.chat=true", f"model.tokenizer={folder}",
            "model.backbone={model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
            "num_attention_heads: 2, max_position_embeddings: 64}",
            "sampler.gen_length=4", f"reward.functions=[{judge}, {{name: fluency, params: {{model: {folder}}}}}]",
            "train.steps=0", "eval.num_inference_steps=[4, 2]", "eval.num_prompts=6", "eval.keep_answers=2",
            f"eval.baseline={folder}", "eval.viewer_items=0",
        ],
    )  # fmt: skip
    with Run.open(config) as run:
        summary = loop.train(run)
    kept = [json.loads(line) for line in (run.folder / "answers" / "baseline.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in kept] == [4, 4] and all(line["prompt"].startswith("Write") for line in kept)
    assert len((run.folder / "answers" / "before.jsonl").read_text().splitlines()) == 4
    assert summary["baseline"].keys() == {"4"} and summary["before"].keys() == {"4", "2"}
    quality = summary["baseline_quality"]["4"]
    assert quality.keys() == {"words", "nats", "num_words", "distinct_frames", "repetition"}
    nats = AnswerNats(folder, "bfloat16")
    examples = run.task.heldout_examples(6)
    other = run.of_baseline()
    engine = other.engine(other.model, other.modality.evaluation_options(4))
    made = engine.generate(other.modality.requests(examples, [[0]] * 6))
    texts = run.tokenizer.batch_decode([t.response_ids() for t in made], skip_special_tokens=True)
    assert [line["completion"] for line in kept] == texts[:2]
    expected = sum(nats([row["prompt"] for row in examples], texts)) / 6
    assert quality["nats"] == pytest.approx(expected, rel=1e-3)
    # A run that resumes does not ask the baseline again.
    monkeypatch.setattr(Run, "of_baseline", None)
    again = config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})
    (run.folder / "before.json").unlink()
    with Run.open(again) as run:
        assert loop.train(run)["baseline_quality"] == summary["baseline_quality"]
