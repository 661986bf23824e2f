"""ReDiff: what an expert corrects, where the correction is read, and drafts that are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards.sudoku import corrected, solutions
from rl.estimators.revision import correction_of, corrections_of, revision_rows
from rl.tasks.char_tokenizer import char_tokenizer
from rl.tasks.experts import expert_texts
from rl.tasks.sudoku import all_grids
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from tests.runs import lines, tiny_config, train_here

GRID = "1234341221434321"


def test_solutions_are_the_grids_that_keep_the_givens() -> None:
    for puzzle in ("0" * 16, "1000000000000000", "1230000000000004", GRID):
        right = [g for g in all_grids() if all(a in ("0", b) for a, b in zip(puzzle, g, strict=True))]
        assert sorted(solutions(puzzle)) == sorted(right)
    assert list(solutions("11" + "0" * 14)) == []
    nine = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
    (only,) = solutions(nine)
    assert only.startswith("534678912") and only.endswith("345286179")


def test_the_expert_takes_the_nearest_solution_or_none() -> None:
    draft = "2" + GRID[1:]
    puzzles = ["0" * 16 + "=", GRID[:4] + "0" * 12, "11" + "0" * 14, "0" * 16, "what"]
    texts = corrected(puzzles, [draft, GRID, draft, "123", draft])
    assert texts == [GRID, GRID, None, None, None]
    # Of all 288 grids the one with most cells in common, wherever it stands among them.
    for grid in all_grids()[::60]:
        assert corrected(["0" * 16], [grid[:15] + "0"]) == [grid]


@pytest.mark.parametrize(
    ("draft", "text", "places", "tokens"),
    [
        ([5, 6, 7], [5, 8, 7], [1], [8]),
        ([5, 6, 7], [5, 6, 7], [], []),
        # Of unequal lengths: 6 becomes 8, what is put in between has no place in the draft.
        ([5, 6, 7, 1, 2], [5, 8, 7, 9, 1, 2], [1], [8]),
        ([1, 2, 3], [1, 4, 5, 3], [], []),
    ],
)
def test_corrections_of_as_many_tokens_count(
    draft: list[int], text: list[int], places: list[int], tokens: list[int]
) -> None:
    found = correction_of(draft, text)
    assert (found.places.tolist(), found.tokens.tolist()) == (places, tokens)


@pytest.mark.parametrize(
    ("draft", "text", "places", "tokens"),
    [
        ([5, 6, 7], [5, 8, 7], [0, 1, 2], [5, 8, 7]),
        ([5, 6], [5, 6], [0, 1], [5, 6]),
        # 9 is put in: what stands on both sides of it has a place in the draft.
        ([5, 6, 7, 1, 2], [5, 8, 7, 9, 1, 2], [0, 1, 2, 3, 4], [5, 8, 7, 1, 2]),
        # Two tokens for one: nobody can say which of them stands in its place.
        ([1, 2, 3], [1, 4, 5, 3], [0, 2], [1, 3]),
    ],
)
def test_all_tokens_of_a_correction_are_those_with_a_place(
    draft: list[int], text: list[int], places: list[int], tokens: list[int]
) -> None:
    found = correction_of(draft, text, every=True)
    assert (found.places.tolist(), found.tokens.tolist()) == (places, tokens)


def drafts(model: Any, count: int = 3) -> list[Any]:
    options = SamplerOptions(gen_length=8, num_inference_steps=4, block_length=model.block_length)
    return InProcessEngine(model, options, eos_token_id=None).generate(
        [Request([1, 2, 3], seed=s) for s in range(count)]
    )


def test_right_drafts_and_those_without_a_correction_are_told_apart(make_model) -> None:
    tokenizer = char_tokenizer("0123456789")
    own = drafts(make_model("gpt2-full"))
    for trajectory, answer in zip(own, ([1, 2, 11], [1, 2, 11], [3, 4, 5]), strict=True):
        trajectory.token[trajectory.position.argsort()[:3]] = answer
        trajectory.stop_length = 3
    assert tokenizer.eos_token_id == 11
    # The end token of a draft belongs to its correction.
    found, right, uncorrected = corrections_of(own, ["72", "12", None], tokenizer)
    assert list(found) == [0] and (right, uncorrected) == (1, 1)
    assert found[0].places.tolist() == [0] and found[0].tokens.tolist() == [7]
    # A draft is read whole, and so is one that is right; one whose mistake has no place is not.
    own[2].token[own[2].position.argsort()[:3]] = [1, 2, 11]
    found, right, uncorrected = corrections_of(own, ["72", "12", "152"], tokenizer, every=True)
    assert {i: c.tokens.tolist() for i, c in found.items()} == {0: [7, 2, 11], 1: [1, 2, 11]}
    assert (right, uncorrected) == (1, 1)


def read(model: Any, canvas: torch.Tensor, place: int) -> torch.Tensor:
    """Logits [V] at a place of a canvas [1, L] whose last block is being revised."""
    if not getattr(model, "context_causal", False):
        return model(canvas)[0, place]
    # The blocks before it see what is to their left, as finished ones do.
    visible = torch.ones(1, canvas.shape[1], canvas.shape[1], dtype=torch.bool).tril()
    visible[:, -model.block_length :] = True
    return model.token_logits(model.hidden_states(canvas, visible=visible))[0, place]


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2-full", "gpt2-full-shifted", "qwen3-block4", "qwen3-block4-shifted-causal"])
def test_corrections_are_read_in_the_finished_draft(make_model, family: str) -> None:
    model = make_model(family)
    own = drafts(model)
    corrections = [correction_of(t.response_ids().tolist(), [(i + 1) % 9 for i in t.response_ids()]) for t in own]
    rows = revision_rows(own, corrections, model)
    expected = []
    for trajectory, (places, tokens) in zip(own, corrections, strict=True):
        canvas = torch.from_numpy(trajectory.final_canvas())[None]
        at = trajectory.prompt_length + places
        logits = []
        for place in at:
            # The block of the place is the last that is there: it sees itself whole, and what came before.
            size = model.block_length
            end = None if size is None else (place // size + 1) * size
            logits.append(read(model, canvas[:, :end], place - model.logit_shift))
        chosen = torch.stack(logits).log_softmax(-1)[torch.arange(len(at)), torch.from_numpy(tokens)]
        expected.append(chosen)
        assert (canvas[0, at] != torch.from_numpy(tokens)).all()
    torch.testing.assert_close(rows.score(model).logprob, torch.cat(expected), rtol=0, atol=1e-9)


EXPERT = """
from pathlib import Path

def known(prompts, completions, answer, **columns):
    # Two drafts in three have a correction, and one in three is right as it is.
    log = Path(__file__).with_name("asked")
    log.write_text(str(int(log.read_text()) + len(prompts) if log.exists() else len(prompts)))
    return [[None, draft, right][i % 3] for i, (draft, right) in enumerate(zip(completions, answer))]

def few(prompts, completions, **columns):
    return completions[1:]

def number(prompts, completions, **columns):
    return [None, 3] * (len(prompts) // 2)

def text(prompts, completions, **columns):
    return "1" * len(prompts)

def nothing(prompts, completions, **columns):
    pass
"""


@pytest.mark.parametrize(("fit", "drafts"), [("wrong", 4), ("all", 8)])
def test_a_run_imitates_corrections_and_counts_the_rest(tmp_path: Path, fit: str, drafts: int) -> None:
    algorithm = f"algorithm={{name: rediff, expert: '{tmp_path}/experts.py:known', fit: {fit}}}"
    config = tiny_config(
        tmp_path, algorithm, "filters.drop_zero_variance=false", "sft.errors=0.2", "model.never_generate=[special]",
        "train.steps=2", "train.prompts_per_step=6", "train.micro_batch_size=4", "eval.viewer_items=0",
    )  # fmt: skip
    (tmp_path / "experts.py").write_text(EXPERT)
    train_here(config)
    steps = lines(tmp_path / "run", "train")
    assert [(line["filters/right"], line["filters/uncorrected"]) for line in steps] == [(4, 4), (4, 4)]
    assert all(line["policy/revision_nll"] > 0 and line["loss/total"] > 0 for line in steps)
    # Both passes over a step read the wrong tokens of four drafts, or all 16 of those and of the four right ones.
    counts = [line["policy/decisions"] for line in steps]
    assert all(0 < n <= 2 * 4 * 16 for n in counts) if fit == "wrong" else counts == [2 * drafts * 16] * 2
    assert (tmp_path / "asked").read_text() == "24"


def test_a_bad_expert_is_refused(tmp_path: Path, run: Any) -> None:
    (tmp_path / "experts.py").write_text(EXPERT)
    for expert, command, message in [
        ("nobody", "check", "algorithm.expert 'nobody'"),
        (f"{tmp_path}/experts.py:few", "train", "gave 15 texts for 16 drafts"),
    ]:
        overrides = [
            f"algorithm={{name: rediff, expert: '{expert}'}}",
            "filters.drop_zero_variance=false",
            "sft.steps=0",
        ]
        code, _, err = run(command, *tiny_config(tmp_path, *overrides))
        assert code == 2 and message in err, err
    for name, what in [
        ("text", "str, not a list of texts"),
        ("nothing", "NoneType, not a list of texts"),
        ("number", "int for draft 1, not a text or None"),
    ]:
        with pytest.raises(ValueError, match=f"gave a {what}"):
            expert_texts(f"{tmp_path}/experts.py:{name}", [{"prompt": "1", "id": "a"}] * 2, ["2"] * 2)
    code, _, err = run(
        "check", *tiny_config(tmp_path, "sft.errors=0.1", "sft.loss_weight=effective", "sft.masking=semi_ar")
    )
    assert code == 2 and "sft" in err


def test_drafts_without_any_correction_leave_the_policy_as_it_is(make_model) -> None:
    model = make_model("gpt2-full")
    own = drafts(model)
    rows = revision_rows(own, [correction_of([1], [1])] * len(own), model)
    assert len(rows.target) == 0 and np.isfinite(rows.input_ids.numpy()).all()
