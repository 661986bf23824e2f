"""Every published decoder, written out slowly and on its own, against the preset that assembles it from parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers import noise
from rollouts.samplers.distribution import draw, sampling_logprobs
from rollouts.samplers.options import SamplerOptions, preset_parts, with_changes
from rollouts.samplers.parts import consistent_positions, step_quota
from rollouts.samplers.presets import PRESETS
from rollouts.trajectory import TokenTrajectory

VOCAB, EOS = 7, 0
MASK = VOCAB - 1


class Known:
    """A full-attention model whose logits are a fixed function of the canvas and the position.

    "distinct" gives every state its own distribution; "ties" has three distributions in all, so that many positions
    are exactly equally confident; "saturated" gives one token all the probability there is: confidence exactly 1.0.
    """

    attention, block_length, mask_token_id, max_length = "full", None, MASK, 32

    def __init__(self, kind: str = "distinct", logit_shift: int = 0):
        self.kind, self.logit_shift = kind, logit_shift
        generator = torch.Generator().manual_seed(5)
        self.mixing = torch.randn(self.max_length + 1, VOCAB, generator=generator, dtype=torch.float64)
        self.patterns = torch.randn(3, VOCAB, generator=generator, dtype=torch.float64)
        self.prompts_seen: list[list[int]] = []

    def hidden_states(self, input_ids, *, visible=None, position_ids=None, cache=None):
        batch, queries = input_ids.shape
        seen = input_ids if visible is None else torch.where(visible[:, 0], input_ids, -1)
        canvas = torch.full((batch, self.max_length), -1)
        canvas[:, :queries] = seen
        self.prompts_seen += canvas[:, :2].tolist()
        index = torch.arange(queries).expand(batch, -1)[..., None]
        return torch.cat([canvas[:, None].expand(-1, queries, -1), index], dim=-1)

    def token_logits(self, hidden):
        if self.kind == "ties":
            logits = self.patterns[(hidden.sum(-1)) % 3]
        else:
            logits = 2 * torch.sin(hidden.double() @ self.mixing)
        logits = logits.clone()
        logits[:, MASK] = -1e9
        if self.kind == "saturated":
            logits = torch.nn.functional.one_hot(logits.argmax(-1), VOCAB).double() * 1e4
        return logits


@dataclass
class Guess:
    """What a pass predicts at a position: the draw, and the distributions it and its score come from."""

    token: int
    logprob: float
    sampling: torch.Tensor
    model: torch.Tensor

    def p(self, of: str = "model") -> float:
        """Confidence of the draw."""
        return math.exp(getattr(self, of)[self.token])

    def top(self, k: int, of: str = "model") -> list[float]:
        return sorted(getattr(self, of).exp().tolist(), reverse=True)[:k]

    def entropy(self, of: str = "model") -> float:
        probs = getattr(self, of).double().exp()
        return -float(torch.special.xlogy(probs, probs).sum())


class Board:
    """One request on its canvas; each pass is one forward of the whole canvas."""

    def __init__(self, model: Any, prompt: list[int], seed: int, gen: int, block: int | None, options: SamplerOptions):
        self.model, self.prompt, self.seed, self.options = model, prompt, seed, options
        self.first = len(prompt)
        end, start = self.first + gen, self.first
        self.grid = 1
        if model.attention == "block_causal":
            block = self.grid = model.block_length
            start, end = self.first // block * block, -(-end // block) * block
        self.canvas = [*prompt, *[model.mask_token_id] * (end - self.first)]
        self.bounds = [(a, min(a + (block or gen), end)) for a in range(start, end, block or gen)]
        self.step = 0
        self.edits: list[tuple[int, int, int, float]] = []

    def blocks(self) -> Iterator[list[int]]:
        """The positions of every block, until an end token stands in the response when one is done."""
        for a, b in self.bounds:
            self.block_size = b - a
            yield [p for p in range(a, b) if p >= self.first]
            if EOS in self.canvas[self.first : b]:
                return

    def masks(self, places: list[int]) -> list[int]:
        return [p for p in places if self.canvas[p] == self.model.mask_token_id]

    def logits(self, canvas: list[int]) -> torch.Tensor:
        ids, size = torch.tensor([canvas]), self.grid
        visible = None
        if size > 1:
            visible = torch.tensor([[[k // size <= q // size for k in range(len(canvas))] for q in range(len(canvas))]])
        with torch.no_grad():
            logits = self.model.token_logits(self.model.hidden_states(ids, visible=visible)[0])
        return logits.roll(self.model.logit_shift, 0)

    def look(self, places: list[int]) -> dict[int, Guess]:
        """A forward, and a draw at every place."""
        options = self.options
        logits = self.logits(self.canvas)
        if options.cfg_scale:
            blank = [self.model.mask_token_id] * self.first + self.canvas[self.first :]
            without = self.logits(blank)
            logits = without + (options.cfg_scale + 1) * (logits - without)
        model = logits.log_softmax(-1)
        # Greedy tokens are ranked by the untempered distribution after its filter (Dream's sample_tokens).
        sampling = sampling_logprobs(logits, options.temperature or 1.0, options.top_p)
        guesses = {}
        for p in places:
            if options.temperature:
                token = int(draw(sampling[p : p + 1], self.u(p, noise.TOKEN_STREAM)[None]))
            else:
                token = int(logits[p].argmax())
            guesses[p] = Guess(token, float(sampling[p, token]) if options.temperature else 0.0, sampling[p], model[p])
        return guesses

    def u(self, position: int, stream: int) -> torch.Tensor:
        return noise.uniform(torch.tensor(self.seed), torch.tensor(self.step), torch.tensor(position), stream)

    def write(self, reveal: dict[int, Guess], back: Any = ()) -> None:
        """End the pass: tokens that appear, tokens that become masks."""
        changes = [(p, g.token, g.logprob) for p, g in reveal.items()]
        changes += [(p, self.model.mask_token_id, 0.0) for p in back]
        for p, token, logprob in sorted(changes):
            assert p >= self.first
            self.canvas[p] = token
            self.edits.append((self.step, p, token, logprob))
        self.step += 1


Key = Callable[[Guess], float]


def best(seen: dict[int, Guess], n: int, key: Key) -> dict[int, Guess]:
    """The n highest; of equal ones the left-most."""
    return {p: seen[p] for p in sorted(seen, key=lambda p: (-key(seen[p]), p))[:n]}


def even(masks: int, steps: int) -> list[int]:
    """LLaDA's quotas: a floor split, the remainder one each to the first passes."""
    steps = min(masks, steps)
    return [masks // steps + (1 if i < masks % steps else 0) for i in range(steps)]


def of_block(board: Board, block: list[int], steps: int) -> list[int]:
    """SDAR's quotas: the whole block's length over the steps; the passes end with the last mask."""
    shares, left = [board.block_size // steps + (i < board.block_size % steps) for i in range(steps)], len(block)
    quotas = []
    while left:
        quotas.append(min(shares[len(quotas)], left))
        left -= quotas[-1]
    return quotas


def straight(masks: int, steps: int) -> list[int]:
    """MDPO's quotas: masks left on a straight line, rounded down."""
    left = [int(Fraction(masks * (steps - i), steps)) for i in range(steps + 1)]
    return [a - b for a, b in itertools.pairwise(left)]


def llada(board: Board, steps: int) -> None:
    for block in board.blocks():
        for n in even(len(block), steps):
            board.write(best(board.look(board.masks(block)), n, Guess.p))


def sdar_static(board: Board, steps: int) -> None:
    for block in board.blocks():
        for n in of_block(board, block, steps):
            board.write(best(board.look(board.masks(block)), n, lambda g: g.p("sampling")))


def mdpo(board: Board, steps: int) -> None:
    for block in board.blocks():
        for n in straight(len(block), steps):
            if board.masks(block):
                board.write(best(board.look(board.masks(block)), n, lambda g: g.p("sampling")))


def llada_random(board: Board, steps: int) -> None:
    for block in board.blocks():
        for n in even(len(block), steps):
            seen = board.look(board.masks(block))
            order = sorted(seen, key=lambda p: -board.u(p, noise.ORDER_STREAM))
            board.write({p: seen[p] for p in order[:n]})


def dream(board: Board, steps: int, key: Key) -> None:
    t = np.linspace(1, 1e-3, steps + 1)
    for block in board.blocks():
        for i in range(steps):
            seen = board.look(board.masks(block))
            n = int(len(seen) * (1 - t[i + 1] / t[i])) if i < steps - 1 else len(seen)
            board.write(best(seen, n, key))


def dream_origin(board: Board, steps: int) -> None:
    t = np.linspace(1, 1e-3, steps + 1)
    for block in board.blocks():
        for i in range(steps):
            if not board.masks(block):
                break
            seen = board.look(board.masks(block))
            chance = 1 - t[i + 1] / t[i] if i < steps - 1 else 1
            board.write({p: g for p, g in seen.items() if board.u(p, noise.ORDER_STREAM) < chance})


def sdar_sequential(board: Board, steps: int) -> None:
    for block in board.blocks():
        for n in of_block(board, block, steps):
            seen = board.look(board.masks(block))
            board.write({p: seen[p] for p in sorted(seen)[:n]})


def dynamic(board: Board, steps: int, threshold: float) -> None:
    for block in board.blocks():
        for n in of_block(board, block, steps):
            if not board.masks(block):
                break
            seen = board.look(board.masks(block))
            above = {p: g for p, g in seen.items() if g.p("sampling") > threshold}
            board.write(above if len(above) >= n else best(seen, n, lambda g: g.p("sampling")))


def until_full(board: Board, choose: Callable[[dict[int, Guess]], dict[int, Guess]]) -> None:
    for block in board.blocks():
        while board.masks(block):
            board.write(choose(board.look(board.masks(block))))


def entropy_sum(seen: dict[int, Guess], bound: float, of: str, without_largest: bool) -> dict[int, Guess]:
    """Positions of ascending entropy while the bound holds, at least one."""
    order = sorted(seen, key=lambda p: (seen[p].entropy(of), p))
    for n in range(len(order), 1, -1):
        entropies = [seen[p].entropy(of) for p in order[:n]]
        if sum(entropies) - max(entropies) <= bound if without_largest else sum(entropies) < bound:
            return {p: seen[p] for p in order[:n]}
    return {order[0]: seen[order[0]]}


def fast_dllm_threshold(seen: dict[int, Guess]) -> dict[int, Guess]:
    return {p: g for p, g in seen.items() if g.p() > 0.9} or best(seen, 1, Guess.p)


def dcd(board: Board) -> None:
    """Of the left-most masks, as many as the window holds, those above 0.9, at least one."""
    for block in board.blocks():
        while board.masks(block):
            seen = board.look(board.masks(block)[: board.options.window])
            confident = {p: g for p, g in seen.items() if g.p("sampling") > 0.9}
            board.write(confident or best(seen, 1, lambda g: g.p("sampling")))


def ccd(board: Board, steps: int) -> None:
    """All that were among the best before and are now, with one and the same likeliest token, or the quota's best."""
    memory = board.options.memory
    for block in board.blocks():
        before: dict[int, int] = {}
        for n in even(len(block), steps):
            if not board.masks(block):
                break
            seen = board.look(board.masks(block))
            order = list(best(seen, len(seen), lambda g: -g.entropy("sampling")))
            now = {p: int(seen[p].sampling.argmax()) for p in order}
            same = [p for p in order[:memory] if before.get(p) == now[p]]
            chosen = same if len(same) >= n and before.keys() & set(order[:n]) else order[:n]
            board.write({p: seen[p] for p in chosen})
            before = {p: now[p] for p in [p for p in order if p not in chosen][:memory]}


def fast_dllm_factor(seen: dict[int, Guess]) -> dict[int, Guess]:
    """The largest n with (n + 1)(1 - n-th confidence) < 1."""
    confidence = sorted((g.p() for g in seen.values()), reverse=True)
    fitting = [n for n in range(1, len(confidence) + 1) if (n + 1) * (1 - confidence[n - 1]) < 1]
    return best(seen, max(fitting, default=1), Guess.p)


def llada2_1(board: Board, threshold: float, edit: float) -> None:
    """One joint rule for masks and tokens; a block without masks is looked at while it still changes."""
    for block in board.blocks():
        post = 0
        while True:
            masks = board.masks(block)
            if not masks:
                post += 1
            if post > board.options.max_post_steps:
                break
            seen = board.look(block)
            open_ones = {p: seen[p] for p in masks}
            reveal = {p: g for p, g in open_ones.items() if g.p("sampling") > threshold}
            if masks and not reveal:
                reveal = best(open_ones, 1, lambda g: g.p("sampling"))
            edits = {
                p: g
                for p, g in seen.items()
                if p not in masks and g.token != board.canvas[p] and g.p("sampling") > edit
            }
            board.write(reveal | edits)
            if not masks and not edits:
                break


def rcr(board: Board, steps: int, keep_max: bool, of: str) -> None:
    """Fill every mask up to the block's end, then mask the least confident of all that is filled."""
    running: dict[int, float] = {}
    for block in board.blocks():
        quotas = straight(len(block), steps)
        reach = range(board.first, block[-1] + 1)
        for i in range(len(quotas)):
            masks = board.masks(list(reach))
            if not masks:
                break
            assert len(masks) == sum(quotas[i:])
            seen = board.look(masks)
            for p, guess in seen.items():
                now = guess.p(of)
                running[p] = max(running.get(p, now), now) if keep_max else now
            # Of equal ones the right-most goes first.
            lowest = set(sorted(reach, key=lambda p: (running[p], -p))[: sum(quotas[i + 1 :])])
            board.write({p: g for p, g in seen.items() if p not in lowest}, [p for p in lowest if p not in masks])


def remdm(board: Board, steps: int, cap: float) -> None:
    t = [1 - (1 - 1e-3) * i / steps for i in range(steps)] + [0.0]
    for block in board.blocks():
        for i in range(steps):
            alpha_t, alpha_s = 1 - t[i], 1 - t[i + 1]
            sigma = min(cap, (1 - alpha_s) / alpha_t) if i else cap
            seen = board.look(board.masks(block))
            back = [p for p in block if p not in seen and board.u(p, noise.REVISE_STREAM) < sigma]
            chance = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
            board.write({p: g for p, g in seen.items() if board.u(p, noise.ORDER_STREAM) < chance}, back)


def ascending(board: Board, steps: int, gamma: float = 1.0, double: bool = True) -> None:
    """1, 2, 4, ... positions; the confidence of an end token is scaled by a factor that rises to 1."""
    for block in board.blocks():
        steps_here = min(steps, len(block))
        quotas = even(len(block), steps)
        for i in range(steps_here):
            if not board.masks(block):
                break
            factor = gamma + (1 - gamma) * (i / (steps_here - 1) if steps_here > 1 else 1.0)
            seen = board.look(board.masks(block))
            n = quotas[i] if not double else 2**i if i < steps_here - 1 else len(seen)
            board.write(best(seen, n, lambda g, f=factor: g.p() * (f if g.token == EOS else 1.0)))


REFERENCES: dict[str, Callable[[Board, int], None]] = {
    "llada": llada,
    "llada_random": llada_random,
    "dream_origin": dream_origin,
    "dream_maskgit_plus": lambda b, s: dream(b, s, lambda g: g.p("sampling")),
    "dream_topk_margin": lambda b, s: dream(b, s, lambda g: g.top(2, "sampling")[0] - g.top(2, "sampling")[1]),
    "dream_entropy": lambda b, s: dream(b, s, lambda g: -g.entropy("sampling")),
    "sdar_sequential": sdar_sequential,
    "sdar_static": sdar_static,
    "sdar_dynamic": lambda b, s: dynamic(b, s, 0.9),
    "sdar_entropy": lambda b, s: until_full(b, lambda seen: entropy_sum(seen, 0.1, "sampling", False)),
    "entropy_bound": lambda b, s: until_full(b, lambda seen: entropy_sum(seen, 0.1, "model", True)),
    "fast_dllm_threshold": lambda b, s: until_full(b, fast_dllm_threshold),
    "fast_dllm_factor": lambda b, s: until_full(b, fast_dllm_factor),
    "dcd": lambda b, s: dcd(b),
    "ccd": ccd,
    "llada2": lambda b, s: dynamic(b, s, 0.95),
    "llada2_1_quality": lambda b, s: llada2_1(b, 0.7, 0.5),
    "llada2_1_speed": lambda b, s: llada2_1(b, 0.5, 0.0),
    "mdpo": mdpo,
    "rcr": lambda b, s: rcr(b, s, True, "model"),
    "rcr_last": lambda b, s: rcr(b, s, False, "sampling"),
    "remdm": lambda b, s: remdm(b, s, 0.02),
    "ass": ascending,
    "eoser": lambda b, s: ascending(b, s, 0.4, double=False),
    "eoser_ass": lambda b, s: ascending(b, s, 0.01),
}
# Two prompt lengths, so that a batch is padded, and several seeds.
PROMPTS = [[1, 2], [3, 1, 4], [2, 2], [5, 3, 2], [1, 1]]


def compare(trajectory: TokenTrajectory, board: Board) -> None:
    columns = (trajectory.step, trajectory.position, trajectory.token, trajectory.logprob)
    ours = sorted(zip(*(c.tolist() for c in columns), strict=True))
    assert [edit[:3] for edit in ours] == [edit[:3] for edit in board.edits]
    np.testing.assert_allclose([e[3] for e in ours], [e[3] for e in board.edits], rtol=0, atol=1e-12)
    assert trajectory.num_steps == board.step
    assert trajectory.final_canvas().tolist() == board.canvas[: trajectory.length]
    assert trajectory.canvas_at(0)[: board.first].tolist() == board.prompt
    trajectory.validate()


def both(model: Any, name: str, seed: int = 0, prompts: Any = PROMPTS, **settings: Any) -> list[TokenTrajectory]:
    """Decode with the preset and with its reference, and compare; returns the trajectories."""
    options = SamplerOptions(preset=name, **{"gen_length": 8, "num_inference_steps": 4, **settings})
    requests = [Request(prompt, seed=100 * seed + i) for i, prompt in enumerate(prompts)]
    trajectories = InProcessEngine(model, options, eos_token_id=EOS, max_batch_size=3).generate(requests)
    for request, trajectory in zip(requests, trajectories, strict=True):
        board = Board(model, list(request.prompt_ids), request.seed, options.gen_length, options.block_length, options)
        blocks = 1 if options.block_length is None else options.gen_length // options.block_length
        REFERENCES[name](board, options.num_inference_steps // blocks)
        compare(trajectory, board)
        assert trajectory.decoder["preset"] == name
    return trajectories


def test_every_preset_has_a_reference() -> None:
    assert REFERENCES.keys() == PRESETS.keys()


@pytest.mark.parametrize("kind", ["distinct", "ties", "saturated"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_published_decoder(name: str, kind: str) -> None:
    """One block and two, remainders (3 steps for 8 positions), more steps than positions, greedy and filtered."""
    model = Known(kind)
    for settings in (
        {},
        {"num_inference_steps": 3, "temperature": 0.7, "top_p": 0.9, "max_post_steps": 2},
        {"num_inference_steps": 12, "temperature": 1.5, "max_post_steps": 1},
        {"block_length": 4, "num_inference_steps": 8, "max_post_steps": 3},
        {"block_length": 4, "num_inference_steps": 6, "temperature": 0.0},
        {"block_length": 4, "num_inference_steps": 4, "temperature": 0.0, "top_p": 0.6},
        {"num_inference_steps": 1, "max_post_steps": 0},
    ):
        # A window is read where it is narrower than the block.
        both(model, name, **settings, **({"window": 3} if name == "dcd" else {}))


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith(("sdar", "llada2", "fast"))])
def test_block_causal_presets_with_prompts_that_share_a_block(make_model, name: str) -> None:
    """Prompts of 1 to 9 tokens on a grid of 4: the first block has 1 to 4 masks, the cache stores what is final."""
    model = make_model("gpt2-block4", vocab_size=VOCAB)
    prompts = [[1 + (3 * i + n) % 5 for i in range(n)] for n in range(1, 10)]
    both(model, name, prompts=prompts, block_length=4, max_post_steps=3)
    both(model, name, prompts=prompts, block_length=4, num_inference_steps=6)


def test_predictions_that_did_not_change_are_revealed_together() -> None:
    """Worked out by hand: memory 2, quota 1, and position 0 is no mask any more; the docstring's three cases."""
    eligible, quota = torch.tensor([[False, True, True, True]]), torch.tensor([1])
    before = torch.tensor([[-1.0, 5.0, 6.0, -1.0]])
    for scores, likely, chosen, kept in (
        # The best two are 1 and 2, both with their old tokens; 3 is remembered.
        ([9, 3, 2, 1], [0, 5, 6, 7], [1, 2], [-1, -1, -1, 7]),
        # The best two are 1 and 3: 1 alone stays what it was.
        ([9, 3, 1, 2], [0, 5, 6, 7], [1], [-1, -1, 6, 7]),
        # The best is new, so that it alone is revealed, although 1 did not change.
        ([9, 2, 1, 3], [0, 5, 6, 7], [3], [-1, 5, 6, -1]),
        # Another token than before.
        ([9, 3, 2, 1], [0, 4, 4, 7], [1], [-1, -1, 4, 7]),
    ):
        given = (torch.tensor([scores]).double(), eligible, quota, torch.tensor([likely]).double(), before, 2)
        now, after = consistent_positions(*given)
        assert now.nonzero()[:, 1].tolist() == chosen and after.tolist() == [kept]


@pytest.mark.parametrize("name", ["dream_origin", "dream_entropy", "llada", "rcr"])
def test_presets_with_a_logit_shift(name: str) -> None:
    both(Known(logit_shift=1), name)


def test_a_response_ends_with_the_block_that_holds_the_end_token() -> None:
    ended = 0
    for name in ("llada", "dream_entropy", "rcr", "llada2_1_speed", "remdm", "sdar_dynamic"):
        for trajectory in both(Known(), name, seed=1, block_length=2, num_inference_steps=8):
            final = trajectory.final_canvas()
            if (final == MASK).any():
                ended += 1
                assert EOS in trajectory.response_ids()
    assert ended > 10


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llada", "llada_random", "rcr", "dream_entropy"])
def test_guidance_combines_the_model_with_and_without_its_prompt(name: str) -> None:
    model = Known()
    guided = both(model, name, cfg_scale=1.5)
    assert guided[0].sampler == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "cfg_scale": 1.5}
    assert {tuple(prompt) for prompt in model.prompts_seen} > {(MASK, MASK), (1, 2)}
    plain = both(model, name)
    assert "cfg_scale" not in plain[0].sampler
    assert any((a.final_canvas() != b.final_canvas()).any() for a, b in zip(guided, plain, strict=True))


def test_guidance_is_refused_where_a_cache_holds_the_prompt(make_model) -> None:
    options = SamplerOptions(cfg_scale=1.0, gen_length=8, num_inference_steps=4, block_length=4)
    for model, cache in ((make_model("gpt2-block4"), "none"), (Known(), "dual")):
        with pytest.raises(ValueError, match=r"sampler\.cfg_scale needs forwards of the whole canvas"):
            InProcessEngine(model, options, approximate_cache=cache)


# --- running-confidence remasking -------------------------------------------------------------------------------------


def published_sentinel_rcr(board: Board, steps: int) -> list[int]:
    """The defect: eligibility is the value 1.0. Returns the masks left after every pass, prompt and all."""
    running = [0.0] * len(board.canvas)
    counts = []
    for block in board.blocks():
        quotas = even(len(block), steps)
        for i in range(len(quotas)):
            seen = board.look([p for p in board.masks(list(range(len(board.canvas)))) if p <= block[-1]])
            for p, guess in seen.items():
                board.canvas[p], running[p] = guess.token, guess.p("sampling")
            ranked = sorted(range(len(board.canvas)), key=lambda p: (running[p] or 1.0, p))
            for p in ranked[: sum(quotas[i + 1 :])] if i < len(quotas) - 1 else ():
                board.canvas[p] = MASK
            counts.append(board.canvas.count(MASK))
    return counts


@pytest.mark.parametrize(("name", "top_p"), [("rcr", 1.0), ("rcr", 0.95), ("rcr_last", 1.0), ("rcr_last", 0.95)])
@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("kind", ["distinct", "ties", "saturated"])
def test_rcr_follows_the_schedule_and_leaves_the_prompt(
    name: str, top_p: float, block_length: int | None, kind: str
) -> None:
    """Also when every confidence is exactly 1.0, which is where the published rule masks prompts."""
    settings = {"gen_length": 16, "num_inference_steps": 8, "block_length": block_length, "top_p": top_p}
    trajectories = both(Known(kind), name, seed=2, temperature=0.4, **settings)
    counts = list(range(14, -1, -2)) if block_length is None else [14, 12, 10, 8, 6, 4, 2, 0]
    for trajectory in trajectories:
        after = [int((trajectory.canvas_at(step + 1) == MASK).sum()) for step in range(trajectory.num_steps)]
        assert after == counts[: len(after)]
        for step in range(trajectory.num_steps + 1):
            prompt = trajectory.canvas_at(step)[: trajectory.prompt_length]
            assert prompt.tolist() == trajectory.prompt_ids.tolist()
    if kind == "saturated":
        assert all((t.confidence[t.is_reveal] == 1.0).all() for t in trajectories)


def test_the_sentinel_that_is_not_used_here_does_mask_prompts() -> None:
    """The invariants above can fail: the published rule breaks both in the very same setting."""
    options = SamplerOptions(preset="rcr_last", gen_length=16, num_inference_steps=8, temperature=0.4, top_p=0.95)
    board = Board(Known("saturated"), [1, 2], 0, 16, None, options)
    counts = published_sentinel_rcr(board, 8)
    assert counts != list(range(14, -1, -2)) or board.canvas[:2] != [1, 2]


def test_rcr_takes_tokens_back_and_the_two_running_confidences_differ() -> None:
    remasks = {}
    for name in ("rcr", "rcr_last"):
        trajectories = both(Known(), name, seed=3, gen_length=16, num_inference_steps=8, temperature=1.5)
        remasks[name] = [int((~t.is_reveal).sum()) for t in trajectories]
        assert sum(remasks[name]) > 5
    assert remasks["rcr"] != remasks["rcr_last"]


def test_the_scope_decides_whether_earlier_blocks_are_taken_back() -> None:
    settings = {"gen_length": 16, "num_inference_steps": 16, "block_length": 4, "temperature": 1.5}
    crossed = 0
    for trajectory in both(Known(), "rcr_last", seed=4, **settings):
        crossed += int((np.diff(trajectory.block_of(trajectory.position)) < 0).sum())
    assert crossed > 0
    options = SamplerOptions(preset="rcr_last", revise_scope="block", **settings)
    requests = [Request(prompt, seed=400 + i) for i, prompt in enumerate(PROMPTS)]
    within = InProcessEngine(Known(), options).generate(requests)
    assert sum(int((~t.is_reveal).sum()) for t in within) > 0
    for trajectory in within:
        assert (np.diff(trajectory.block_of(trajectory.position)) >= 0).all()


def test_reaching_back_is_refused_where_a_cache_holds_earlier_blocks(make_model) -> None:
    options = SamplerOptions(preset="rcr", gen_length=8, num_inference_steps=4, block_length=4)
    for model, cache in ((make_model("gpt2-block4"), "none"), (Known(), "prefix")):
        with pytest.raises(ValueError, match=r"sampler\.revise_scope all_previous .* set it to block"):
            InProcessEngine(model, options, approximate_cache=cache)


@pytest.mark.parametrize("name", ["rcr", "rcr_last", "remdm", "llada2_1_speed", "dream_origin"])
def test_fills_are_right_when_tokens_are_taken_back(name: str) -> None:
    """x0_hat is the canvas the model saw, with that step's draw in every mask and in every token it replaced."""
    model = Known()
    options = SamplerOptions(preset=name, gen_length=8, num_inference_steps=4, block_length=4, record_x0=True)
    requests = [Request(prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
    trajectories = InProcessEngine(model, options).generate(requests)
    plain = InProcessEngine(model, options.model_copy(update={"record_x0": False})).generate(requests)
    replaced = 0
    for trajectory, without in zip(trajectories, plain, strict=True):
        assert trajectory.final_canvas().tolist() == without.final_canvas().tolist()
        trajectory.validate()
        for step in range(trajectory.num_steps):
            canvas, after = trajectory.canvas_at(step), trajectory.canvas_at(step + 1)
            now = (trajectory.step == step) & trajectory.is_reveal
            drawn = canvas == MASK
            drawn[trajectory.position[now]] = True
            replaced += int((drawn & (canvas != MASK)).sum())
            fill = trajectory.x0_hat[step]
            assert fill[~drawn].tolist() == canvas[~drawn].tolist() and (fill != MASK).all()
            assert fill[trajectory.position[now]].tolist() == after[trajectory.position[now]].tolist()
            assert (np.isnan(trajectory.x0_logprob[step]) == ~drawn).all()
            logprobs = model.token_logits(model.hidden_states(torch.from_numpy(canvas)[None])[0]).log_softmax(-1)
            expected = logprobs.numpy()[drawn, fill[drawn]]
            np.testing.assert_allclose(trajectory.x0_logprob[step, drawn], expected, rtol=0, atol=1e-12)
    assert replaced > 0 or name != "llada2_1_speed"


# --- token editing ----------------------------------------------------------------------------------------------------


def test_token_editing_is_recorded_as_edits_from_token_to_token() -> None:
    edited = 0
    for trajectory in both(Known(), "llada2_1_speed", block_length=4):
        for step, position, token in zip(trajectory.step, trajectory.position, trajectory.token, strict=True):
            before = trajectory.canvas_at(step)[position]
            assert token != MASK and token != before
            edited += before != MASK
    assert edited > 20


def test_without_post_steps_a_block_ends_with_its_last_mask() -> None:
    for trajectory in (
        InProcessEngine(Known(), SamplerOptions(preset="llada2_1_speed", gen_length=8, max_post_steps=0))
        .generate([Request(prompt, seed=i) for i, prompt in enumerate(PROMPTS)])
    ):  # fmt: skip
        assert (trajectory.canvas_at(trajectory.num_steps - 1) == MASK).any()


# --- quotas and random orders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "masked", "steps", "quotas"),
    [
        ("block", 16, 4, [4, 4, 4, 4]),
        ("block", 3, 4, [2, 1, 0, 0]),  # a block of 8, of which the prompt has 5: 8 / 4 at each step (SDAR)
        ("block", 8, 3, [3, 3, 2]),
        ("linear", 6, 4, [2, 1, 2, 1]),  # left: 4.5, 3, 1.5, 0
        ("linear", 5, 5, [1, 1, 1, 1, 1]),  # floor(5 x (1 - 4/5)) in floating point is 0: the published code skips one
        ("linear", 2, 4, [1, 0, 1, 0]),
        ("cosine", 16, 4, [2, 3, 5, 6]),  # left: 16 cos(pi/8) = 14.8, 11.3, 6.1, 0
        ("cosine", 8, 3, [2, 2, 4]),  # left: 6.9, 4, 0; in float32 8 cos(pi/3) is below 4
        ("cosine", 4, 4, [1, 1, 1, 1]),
        ("cosine", 8, 8, [1] * 8),
        ("cosine", 9, 1, [9]),
        ("dream", 16, 4, [3, 4, 4, 5]),  # 16 x 0.24975, 13 x 0.33289, 9 x 0.49900, the rest
        ("dream", 4, 8, [0, 0, 0, 0, 0, 1, 1, 2]),  # 4 x 0.125, 4 x 0.143, ..., 4 x 0.333 = 1.3
        ("doubling", 16, 5, [1, 2, 4, 8, 1]),
        ("doubling", 16, 3, [1, 2, 13]),
        ("doubling", 4, 4, [1, 2, 1, 0]),
    ],
)
def test_quotas_by_hand(kind: str, masked: int, steps: int, quotas: list[int]) -> None:
    left, seen = masked, []
    for step in range(steps):
        block = 8 if masked < 8 else masked
        seen.append(int(step_quota(kind, *(torch.tensor([x]) for x in (masked, left, steps, step, block)))))
        left -= seen[-1]
    assert seen == quotas and left == 0


def test_cosine_quotas_add_up_rise_and_never_stall() -> None:
    for masked, steps in itertools.product(range(1, 70), range(1, 70)):
        if steps <= masked:
            left, total = torch.full((steps,), masked), torch.full((steps,), masked)
            quotas = step_quota("cosine", total, left, torch.full((steps,), steps), torch.arange(steps), total)[:-1]
            assert (quotas >= 1).all() and int(quotas.sum()) < masked


def test_order_temperature_draws_positions_as_a_multinomial_without_replacement() -> None:
    """Dream's alg_temp: softmax(score / temperature), two of three positions, against the exact probabilities."""
    model = Known()
    options = SamplerOptions(
        preset="dream_entropy",
        order_temperature=0.5,
        gen_length=3,
        num_inference_steps=2,
        temperature=0.0,
        quota="even",
    )
    requests = [Request([1, 2], seed=i) for i in range(4000)]
    trajectories = InProcessEngine(model, options, max_batch_size=4000).generate(requests)
    first = [tuple(sorted((t.position[t.step == 0] - 2).tolist())) for t in trajectories]
    board = Board(model, [1, 2], 0, 3, None, options)
    weights = [math.exp(-board.look([2, 3, 4])[p].entropy() / 0.5) for p in (2, 3, 4)]
    total = sum(weights)
    for i, j in itertools.combinations(range(3), 2):
        a, b = weights[i], weights[j]
        exact = a / total * b / (total - a) + b / total * a / (total - b)
        # Standard error at most 0.008.
        assert abs(first.count((i, j)) / 4000 - exact) < 0.03
    assert len(set(first)) == 3


def test_remdm_keeps_the_share_of_masks() -> None:
    """Remasking is made up for: after step i of T a share 1 - (i + 1)/T is masked, with remasking and without."""
    shares = {}
    for name in ("dream_origin", "remdm"):
        options = SamplerOptions(preset=name, gen_length=24, num_inference_steps=6, remdm_cap=0.4)
        trajectories = InProcessEngine(Known(), options, max_batch_size=200).generate(
            [Request([1, 2], seed=i) for i in range(200)]
        )
        shares[name] = [
            np.mean([(t.canvas_at(step + 1)[2:] == MASK).mean() for t in trajectories]) for step in range(6)
        ]
        remasked = sum(int((~t.is_reveal).sum()) for t in trajectories)
        assert (remasked > 1000) == (name == "remdm")
    # 4,800 positions: standard error at most 0.0073.
    np.testing.assert_allclose(shares["remdm"], 1 - 0.999 * np.arange(1, 7) / 6, atol=0.03)
    np.testing.assert_allclose(shares["dream_origin"], shares["remdm"], atol=0.04)


# --- options ----------------------------------------------------------------------------------------------------------


def test_a_preset_is_a_choice_of_parts_and_explicit_options_win() -> None:
    options = SamplerOptions(preset="sdar_dynamic", threshold=0.6)
    assert (options.selector, options.score_from, options.threshold) == ("dynamic", "sampling", 0.6)
    # What is saved is resolved, and loads to the same.
    assert SamplerOptions.model_validate(options.model_dump()) == options
    assert SamplerOptions(preset="llada").decoder() == {**SamplerOptions().decoder(), "preset": "llada"}
    # Laid over resolved options, a preset leaves nothing of the one before.
    assert with_changes(options, {"preset": "rcr"}) == SamplerOptions(preset="rcr")
    assert with_changes(options, {"top_k": 3}) == SamplerOptions(preset="sdar_dynamic", threshold=0.6, top_k=3)


def test_the_parts_of_every_preset_are_options() -> None:
    for name, parts in PRESETS.items():
        assert parts.keys() <= preset_parts(name).keys()
        SamplerOptions(preset=name, gen_length=8, block_length=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "lada"}, r"sampler\.preset 'lada' does not exist: did you mean 'llada'\?"),
        ({"score": "neg_entropy", "selector": "factor"}, r"sampler\.threshold compares probabilities"),
        ({"selector": "entropy_bound"}, r"set sampler\.score to neg_entropy"),
        ({"order_temperature": 0.1, "selector": "threshold"}, r"sampler\.order_temperature .* needs selector top_n"),
        ({"order_temperature": 0.1, "reviser": "rcr"}, r"sampler\.order_temperature"),
        ({"eos_confidence": 0.4, "score": "neg_entropy"}, r"sampler\.eos_confidence scales probabilities"),
        ({"reviser": "rcr", "selector": "dynamic"}, r"sampler\.reviser rcr .* set sampler\.selector to top_n"),
        ({"reviser": "remdm"}, r"sampler\.reviser remdm .* set sampler\.selector to bernoulli"),
        ({"cfg_scale": -1.0}, "cfg_scale"),
    ],
)
def test_parts_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerOptions(**settings)


def test_the_end_token_ramp_needs_an_end_token() -> None:
    with pytest.raises(ValueError, match=r"sampler\.eos_confidence needs an end token"):
        InProcessEngine(Known(), SamplerOptions(preset="eoser"))


def test_a_prompt_with_the_mask_token_is_refused() -> None:
    with pytest.raises(ValueError, match="request 0 has the mask token 6 in its prompt"):
        InProcessEngine(Known(), SamplerOptions()).generate([Request([1, MASK], seed=0)])
