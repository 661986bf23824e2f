"""Log-probs at the edge, and rows that are merged or moved (see test_packing.py for layout and gradients)."""

from __future__ import annotations

import torch

from rl.estimators.logprob import logprob_and_entropy
from rl.estimators.rows import TokenRows
from rl.estimators.trace_rows import remask_rows
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions


def test_a_certain_prediction_has_finite_gradients() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e9], [0.0, 1e4, -1e9]], dtype=torch.float64, requires_grad=True)
    logprob, entropy = logprob_and_entropy(logits, torch.tensor([0, 0]), 1.0)
    assert logprob.tolist() == [0.0, -1e4] and entropy.tolist() == [0.0, 0.0]
    (logprob.sum() + entropy.sum()).backward()
    assert logits.grad.tolist() == [[0, 0, 0], [1, -1, 0]]


def test_merging_equal_rows_keeps_packed_documents_apart(make_model) -> None:
    """Rows are equal only if their documents, positions and grids are; two layouts of the same ids are not."""
    model = make_model("gpt2-full")
    engine = InProcessEngine(model, SamplerOptions(gen_length=4, num_inference_steps=2))
    trajectories = engine.generate([Request([1, 2], seed=s) for s in range(6)])
    plain = remask_rows(trajectories)
    packed = remask_rows(trajectories, pack_to=12).distinct()
    merged = plain.distinct()
    # Six rollouts share their first canvas.
    assert len(merged.input_ids) <= 7 < len(plain.input_ids) == 12
    with torch.no_grad():
        scores = [rows.score(model).logprob for rows in (plain, merged, packed)]
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores[2], scores[0], rtol=0, atol=1e-12)
    twice = TokenRows(
        **{
            **vars(plain),
            "input_ids": plain.input_ids[:1].repeat(2, 1),
            "position_ids": plain.position_ids[:2],
            "document": torch.tensor([[0] * 6, [0] * 5 + [-1]]),
            "segment": plain.segment[:2],
            "block": plain.block[:2],
            "row": plain.row % 2,
        }
    )
    assert len(twice.distinct().input_ids) == 2


def test_rows_move_as_a_whole() -> None:
    names = (
        "trajectory",
        "step",
        "input_ids",
        "position_ids",
        "document",
        "segment",
        "block",
        "row",
        "column",
        "read",
        "target",
    )
    rows = TokenRows(**{n: torch.zeros(1, 2, dtype=torch.int64) for n in names}, temperature=0.7, top_k=3)
    moved = rows.to("cpu")
    assert vars(moved).keys() == vars(rows).keys() and (moved.temperature, moved.top_k) == (0.7, 3)
    assert rows.num_tokens == 2
    meta = rows.to("meta")
    assert all(value.device.type == "meta" for value in vars(meta).values() if isinstance(value, torch.Tensor))
