"""What sharing the forwards of equal canvases saves, in one run against the same code without it.

    python scripts/bench_sharing.py MODEL_FOLDER [repeats]

MODEL_FOLDER is a quickstart policy (warm_start or a checkpoint's hf folder). Sampling and scoring of 32 prompts x 8
rollouts are timed with and without sharing, alternating, and the medians compared; the numbers are checked to be equal.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from rl.config import load_config
from rl.estimators.trace_rows import remask_rows
from rl.train.rollouts import request_seed
from rl.train.run import Run
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.engines.shared import SharedForwards


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python scripts/bench_sharing.py MODEL_FOLDER [repeats]", file=sys.stderr)
        return 2
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    config = load_config("configs/quickstart.yaml", [f"model.path={sys.argv[1]}", "sft.steps=0"])
    opened = Run.open(config, write=False)
    rows = opened.task.train_examples(0, 0, 32)
    prompts = opened.tokenizer([row["prompt"] for row in rows], add_special_tokens=False).input_ids
    requests = [Request(ids, request_seed(1, i, g)) for i, ids in enumerate(prompts) for g in range(8)]
    times: dict[str, list[float]] = {}

    def timed(name, work, argument):  # type: ignore[no-untyped-def]
        started = time.perf_counter()
        result = work(argument)
        times.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def sample(model):  # type: ignore[no-untyped-def]
        engine = InProcessEngine(model, config.sampler)
        return engine.generate(requests), engine.stats.sequence_forwards / engine.stats.rows_asked

    def learn(scored_rows):  # type: ignore[no-untyped-def]
        opened.model.zero_grad()
        logprob = scored_rows.score(opened.model).logprob
        logprob.mean().backward()
        return logprob.detach()

    shares = {}
    for _ in range(repeats):
        a, run = timed("sample shared", sample, SharedForwards(opened.model))
        b, _ = timed("sample plain", sample, opened.model)
        assert all((x.token == y.token).all() for x, y in zip(a, b, strict=True))
        plain = remask_rows(b)
        merged = plain.distinct()
        c = timed("learn shared", learn, merged)
        d = timed("learn plain", learn, plain)
        torch.testing.assert_close(c, d, rtol=0, atol=1e-5)
        shares = {"sample": run, "learn": len(merged.input_ids) / len(plain.input_ids)}
    print("| stage | plain, s | shared, s | ratio | distinct rows |\n|---|---|---|---|---|")
    for stage in ("sample", "learn"):
        slow, fast = (statistics.median(times[f"{stage} {how}"]) for how in ("plain", "shared"))
        print(f"| {stage} | {slow:.3f} | {fast:.3f} | {slow / fast:.2f} | {shares[stage]:.0%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
