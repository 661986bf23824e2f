"""A finite automaton over tokens: which sequences of tokens a response may be. No torch at import.

Regular expressions, JSON schemas, scaffolds and graphs (`compile.py`) all become one. `reach.py` asks it, for a canvas
some of whose positions are decided, which tokens every open position may still take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

# (state, token, state after it), int64 [E] each.
Edges = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class TokenAutomaton:
    """S states, and C classes of tokens that it does not tell apart.

    Example: the words `ab` and `abb` over the tokens a (0) and b (1), with the end token 2. States: 0 at the start, 1
    after a, 2 after ab, 3 after abb, 4 behind the end token. Token 2 has a class of its own, as have 0 and 1.

    Attributes:
        classes: int64 [V], class of every token. Class 0 holds the tokens that may stand nowhere.
        after: int64 [C, S], state after a token of a class; S where it may not stand.
        start: the state before the first token.
        accepting: bool [S], states in which a response may be over.
    """

    classes: np.ndarray
    after: np.ndarray
    start: int
    accepting: np.ndarray

    @property
    def num_states(self) -> int:
        return len(self.accepting)

    def steps(self) -> np.ndarray:
        """bool [S, S]: whether some token leads from a state (first axis) to a state."""
        found = np.zeros((self.num_states, self.num_states + 1), dtype=bool)
        found[np.arange(self.num_states), self.after] = True
        return found[:, :-1]

    def refusal(self, length: int) -> str | None:
        """Why no response of `length` tokens matches, None where one does."""
        steps: np.ndarray = self.steps()
        reached: np.ndarray = np.zeros(self.num_states, dtype=bool)
        if not self.accepting.any():
            return "no sequence of the tokens that the model may predict matches it"
        reached[self.start] = True
        shortest = None
        for count in range(max(length, self.num_states) + 1):
            accepted = bool((reached & self.accepting).any())
            if accepted and shortest is None:
                shortest = count
            if count == length and accepted:
                return None
            reached = steps[reached].any(0)
        assert shortest is not None, "every state of a trimmed automaton leads to an accepting one"
        if shortest > length:
            return f"its shortest match has {shortest} tokens, and sampler.gen_length is {length}: raise it"
        return (
            f"no match has exactly sampler.gen_length {length} tokens, and there is no end token that may follow a "
            "shorter one"
        )


def from_edges(
    edges: Edges, start: int, finals: Iterable[int], vocab_size: int, end: int | None, excluded: np.ndarray
) -> TokenAutomaton:
    """The automaton of some edges, without the states from which no response can be completed.

    Args:
        edges: between any state numbers; a state has at most one edge for each token.
        finals: states in which the text may be over. The end token may follow it, and itself up to the last position.
        end: the end token; None where every response has the full length.
        excluded: int64, tokens that the model cannot predict, which are taken out.
    """
    final = np.unique(np.fromiter(finals, dtype=np.int64))
    parts = [[np.asarray(part, dtype=np.int64)] for part in edges]
    over = max(start, *(int(part.max(initial=0)) for part in (final, edges[0], edges[2]))) + 1
    if end is not None:
        closing = np.append(final, over)
        for part, values in zip(parts, (closing, np.full_like(closing, end), np.full_like(closing, over)), strict=True):
            part.append(values)
        final = closing
    source, token, target = (np.concatenate(part) for part in parts)
    kept = ~np.isin(token, excluded)
    source, token, target = source[kept], token[kept], target[kept]
    useful = _reached(source, target, [start], over + 1) & _reached(target, source, final.tolist(), over + 1)
    useful[start] = True
    number = np.cumsum(useful) - 1
    kept = useful[source] & useful[target]
    source, token, target = number[source[kept]], token[kept], number[target[kept]]
    size = int(useful.sum())
    # Tokens with the same edges share a class.
    order = np.lexsort((source, token))
    pairs = np.stack([source, target], axis=1)[order]
    names, first = np.unique(token[order], return_index=True)
    found: dict[bytes, int] = {}
    after = [np.full(size, size, dtype=np.int64)]
    classes = np.zeros(vocab_size, dtype=np.int64)
    for name, own in zip(names, np.split(pairs, first)[1:], strict=True):
        if own.tobytes() not in found:
            found[own.tobytes()] = len(after)
            column = after[0].copy()
            column[own[:, 0]] = own[:, 1]
            after.append(column)
        classes[name] = found[own.tobytes()]
    accepting = np.zeros(size, dtype=bool)
    accepting[number[final[useful[final]]]] = True
    return TokenAutomaton(classes, np.stack(after), int(number[start]), accepting)


def _reached(source: np.ndarray, target: np.ndarray, begin: list[int], size: int) -> np.ndarray:
    """bool [size]: states that are reached over the edges from some states."""
    reached = np.zeros(size, dtype=bool)
    reached[begin] = True
    count = 0
    while count != (count := int(reached.sum())):
        reached[target[reached[source]]] = True
    return reached


def edges_of(transitions: Mapping[int, Mapping[int, int]]) -> Edges:
    """Edges from {state: {token: state after it}}."""
    source = np.repeat(np.fromiter(transitions, dtype=np.int64), [len(own) for own in transitions.values()])
    flat = [(token, target) for own in transitions.values() for token, target in own.items()]
    token, target = np.array(flat, dtype=np.int64).reshape(-1, 2).T
    return source, token, target
