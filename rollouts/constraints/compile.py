"""Constraints that a user writes, as automata over tokens. No torch at import.

Regular expressions go through `outlines_core` (Willard and Louf 2023, arXiv 2307.09702: the states of the character
automaton, with an edge for every token whose characters lead from one to another). It is an optional package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollouts.constraints.automaton import Edges, TokenAutomaton, edges_of, from_edges
from rollouts.constraints.schema import LAST, schema_regex
from rollouts.samplers.sub_options import ConstraintOptions

# What a slot of a scaffold holds when it does not say: text without quotes, backslashes and line breaks.
_ANY = r'[^"\\\n]*'
_SLOT = re.compile(r"<(\d+)(?::((?:\\.|[^>\\])*))?>")


@dataclass(frozen=True)
class Tokens:
    """What a compiler needs to know of a tokenizer.

    Attributes:
        texts: id -> the bytes that a token adds to a text; special tokens have none.
        first: id -> the bytes that a token begins a text with, where decoding drops a space there (sentencepiece).
        vocab_size: V.
        ids: token, as the tokenizer names it -> id.
        encode: text -> ids, without special tokens.
        end: the end token, None where every response has the full length.
        pad: what fills a slot of a scaffold up, None where there is no such token.
        excluded: int64, tokens that the model cannot predict.
    """

    texts: Mapping[int, bytes]
    first: Mapping[int, bytes]
    vocab_size: int
    ids: Mapping[str, int]
    encode: Callable[[str], list[int]]
    end: int | None
    pad: int | None
    excluded: np.ndarray


def compile_constraint(options: ConstraintOptions, tokens: Tokens) -> TokenAutomaton:
    """The automaton of a constraint.

    Raises:
        ValueError: one line with the option: it is no expression, schema, scaffold or graph that can be used, or the
            package is missing.
    """
    if options.scaffold is not None:
        edges, start, finals = _scaffold(options.scaffold, tokens)
    elif options.graph is not None:
        graph = _of_file(options.graph, "graph")
        edges, start, finals = _graph(graph, tokens)
    elif options.json_schema is not None:
        pattern = schema_regex(_of_file(options.json_schema, "json_schema"))
        edges, start, finals = _regex(pattern, tokens, "json_schema")
    else:
        assert options.regex is not None
        edges, start, finals = _regex(options.regex, tokens, "regex")
    return from_edges(edges, start, finals, tokens.vocab_size, tokens.end, tokens.excluded)


def _of_file(given: Any, name: str) -> Any:
    """The value itself, or what the JSON file holds that it is the path of."""
    if not isinstance(given, str):
        return given
    try:
        with open(given, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"sampler.constraint.{name} {given!r} is not a file of JSON: {error}") from None


def _regex(pattern: str, tokens: Tokens, name: str, begins: bool = True) -> tuple[Edges, int, set[int]]:
    """Edges, start and finals of an expression; `begins` says that the response begins with it."""
    try:
        from outlines_core import Index, Vocabulary
    except ImportError:
        raise ValueError(
            f"sampler.constraint.{name} needs outlines_core: pip install 'denoise-rl[constraints]'"
        ) from None
    by_text: dict[bytes, list[int]] = {}
    for index, text in tokens.texts.items():
        if text:
            by_text.setdefault(text, []).append(index)
    over, last = tokens.vocab_size, tokens.vocab_size + 1
    # What a token is as the first of a response stands beside the vocabulary.
    first = {last + 1 + number: index for number, index in enumerate(tokens.first if begins else ())}
    for number, index in first.items():
        if tokens.first[index]:
            by_text.setdefault(tokens.first[index], []).append(number)
    try:
        index = Index(f"(?:{pattern}){LAST}", Vocabulary(over, {**by_text, LAST.encode(): [last]}))
    except ValueError as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        hint = " (the whole response has to match: leave ^ and $ out)" if "anchored" in reason else ""
        raise ValueError(f"sampler.constraint.{name} cannot be compiled for this tokenizer: {reason}{hint}") from None
    transitions, ends = index.get_transitions(), set(index.get_final_states())
    finals = {state for state, own in transitions.items() if own.get(last) in ends}
    edges = {state: {t: own[t] for t in own if t < over} for state, own in transitions.items()}
    start = begin = index.get_initial_state()
    if first:
        start = max(*transitions, *ends) + 1
        after = {first[t]: target for t, target in transitions.get(begin, {}).items() if t in first}
        after |= {t: begin for t, text in tokens.first.items() if not text}
        edges[start] = {t: s for t, s in edges.get(begin, {}).items() if t not in tokens.first} | after
        finals |= {start} if begin in finals else set()
    return edges_of(edges), start, finals


def _scaffold(text: str, tokens: Tokens) -> tuple[Edges, int, set[int]]:
    """Fixed tokens, and slots of a fixed number of tokens: the value's own, then pad tokens (S3, arXiv 2507.04504)."""
    name = "sampler.constraint.scaffold"
    if tokens.pad is None or tokens.pad == tokens.end or tokens.pad in tokens.excluded:
        raise ValueError(f"{name} fills slots up with pad tokens: the tokenizer needs one that the model may predict")
    if not _SLOT.search(text):
        raise ValueError(f"{name} has no slot, such as <4>: there is nothing to fill in")
    found: list[tuple[int, int, int]] = []
    state = last = 0
    fresh = 1

    def place(piece: str) -> None:
        nonlocal state, fresh
        ids = tokens.encode(piece) if piece else []
        texts = [tokens.texts.get(i, b"") for i in ids]
        if ids and not found:
            texts[0] = tokens.first.get(ids[0], texts[0])
        if b"".join(texts) != piece.encode():
            raise ValueError(f"{name}: the tokenizer does not write {piece!r} as it is")
        for token in ids:
            found.append((state, token, fresh))
            state, fresh = fresh, fresh + 1

    for match in _SLOT.finditer(text):
        place(text[last : match.start()])
        last, size = match.end(), int(match[1])
        pattern = _ANY if match[2] is None else re.sub(r"\\>", ">", match[2])
        (source, token, target), start, finals = _regex(pattern, tokens, "scaffold", begins=not found)
        edges = list(zip(source.tolist(), token.tolist(), target.tolist(), strict=True))
        # Behind a value come pad tokens only: state None. The slot's last token leads to one state.
        edges += [(final, tokens.pad, None) for final in finals] + [(None, tokens.pad, None)]
        layer, behind = {start: state}, fresh
        fresh += 1
        for place_in_slot in range(size):
            ends, following = place_in_slot == size - 1, {}
            for before, token_id, after in edges:
                if before not in layer or (ends and after is not None and after not in finals):
                    continue
                if not ends and after not in following:
                    following[after], fresh = fresh, fresh + 1
                found.append((layer[before], token_id, behind if ends else following[after]))
            layer = following
        if not found or found[-1][2] != behind:
            raise ValueError(f"{name}: no value fits the slot {match[0]} of {size} tokens: give it more")
        state = behind
    place(text[last:])
    source, token, target = np.array(found, dtype=np.int64).T
    return (source, token, target), 0, {state}


def _graph(graph: Mapping[str, list[str]], tokens: Tokens) -> tuple[Edges, int, set[int]]:
    """A token may follow another where the graph says so (TrajDLM's road network); state i is behind token i - 1."""
    if not isinstance(graph, dict) or not all(isinstance(own, list) for own in graph.values()):
        raise ValueError("sampler.constraint.graph must be a mapping from tokens to lists of tokens")
    followed = {name for own in graph.values() for name in own}
    if "<start>" in followed or "<end>" in graph:
        raise ValueError("sampler.constraint.graph: nothing comes before <start> or behind <end>")
    names = followed | set(graph)
    for name in sorted(names - {"<start>", "<end>"}):
        if name not in tokens.ids:
            raise ValueError(f"sampler.constraint.graph: {name!r} is no token of the tokenizer")
        if tokens.ids[name] == tokens.end:
            raise ValueError(f"sampler.constraint.graph: {name!r} is the end token: write <end> where it may follow")
    state = {name: tokens.ids[name] + 1 for name in names if name in tokens.ids} | {"<start>": 0}
    start = graph.get("<start>", sorted(names - {"<start>", "<end>"}))
    ends = [name for name, own in graph.items() if "<end>" in own] or [name for name in state if name != "<start>"]
    found = [
        (state[name], tokens.ids[other], state[other])
        for name, own in {**graph, "<start>": start}.items()
        for other in dict.fromkeys(own)
        if other != "<end>"
    ]
    source, token, target = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return (source, token, target), 0, {state[name] for name in ends}
