"""docs/examples/causal_expert.py: corrections token by token, against reading the whole text again at every place."""

from typing import Any

import torch

from docs.examples import causal_expert
from docs.examples.causal_expert import corrected, corrections
from tests.test_convert import pair


def slowly(model: Any, prompt: list[int], draft: list[int], relative: float, never: list[int]) -> list[int]:
    """The same rule with one forward over all that is there for every token."""
    text = list(prompt)
    for token in draft:
        logits = model(torch.tensor([text])).logits[0, -1]
        logits[never] = -torch.inf
        probability = logits.softmax(-1)
        text.append(token if probability[token] >= relative * probability.max() else int(probability.argmax()))
    return text[len(prompt) :]


def test_corrections_are_those_of_a_loop_without_a_cache() -> None:
    model, _ = pair("llama")
    drafts, prompt = [[3, 4, 5, 6, 7], [9], [2, 2, 2], []], [1, 5, 2]
    changed = 0
    for relative in (0.0, 0.3, 0.9):
        found = corrections(model, prompt, drafts, relative, [0])
        assert found == [slowly(model, prompt, draft, relative, [0]) for draft in drafts]
        changed += found != drafts
    # With 0 every token stays; what is put in is never the end token.
    assert corrections(model, prompt, drafts, 0.0, [0]) == drafts and changed == 2
    assert 0 not in {token for draft in corrections(model, prompt, drafts, 1.0, [0]) for token in draft}


def test_texts_are_corrected_each_behind_its_prompt(monkeypatch: Any) -> None:
    class Letters:
        all_special_ids, chat_template = [0], None

        def __call__(self, texts: list[str], add_special_tokens: bool) -> Any:
            return type("Encoded", (), {"input_ids": [[ord(c) - 96 for c in text] for text in texts]})

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(96 + i) for i in ids)

    model, _ = pair("llama")

    class Expert:
        tokenizer = Letters()
        reader = type("Reader", (), {"model": model})

        def prompt(self, prompt: str) -> str:
            return prompt

    monkeypatch.setattr(causal_expert, "answer_nats", lambda *_: Expert())
    monkeypatch.setattr(causal_expert, "RELATIVE", 0.9)
    found = corrected(["ab", "cd", "ab"], ["cde", "f", "gg"])
    apart = [slowly(model, p, d, 0.9, [0]) for p, d in [([1, 2], [3, 4, 5]), ([3, 4], [6]), ([1, 2], [7, 7])]]
    assert found == [Letters().decode(ids) for ids in apart]
