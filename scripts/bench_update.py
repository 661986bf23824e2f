"""Cost of one update (forward, backward, optimizer step) on the same trajectories in five layouts.

* shared rows: ours with `algorithm.pack_to`, all trajectories in one row, a prompt once for its rollouts (`--group`),
  attention inside of documents alone.
* packed: ours, `[clean | noisy copies of all rounds]`, one row per trajectory, hidden states gathered before
  the output head.
* rounds, gathered: one row `[clean | noisy copy]` per round, but gathered as ours: what packing alone is worth.
* rounds (published): the layout of the published TraceRL trainer, logits over every position, one row per
  micro-batch as in its configuration (arXiv 2509.06949, github.com/Gen-Verse/dLLM-RL).
* step by step: one forward of the canvas per denoising step.

All score the same decisions in the same states, so log-probs and gradients must agree; that is asserted.
Peak memory is the growth of the resident set over one update in a process of its own.

    OMP_NUM_THREADS=2 python scripts/bench_update.py --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl.batch import DecisionBatch
from rl.estimators.base import Scores
from rl.estimators.documents import Reads, noisy_document
from rl.estimators.rows import TokenRows, assemble
from rl.estimators.trace_rows import packed_rows, remask_rows
from rl.losses.aggregate import weighted_sum
from rl.losses.policy_gradient import clipped_policy_loss
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from rollouts.trajectory import TokenTrajectory, load_trajectories, save_trajectories

Scorer = Callable[[TokenRows, DiffusionLM], Scores]


def build_model(args: argparse.Namespace) -> DiffusionLM:
    torch.manual_seed(0)
    config = DiffusionLMConfig(
        backbone={
            "model_type": "qwen3", "hidden_size": args.width, "intermediate_size": args.width * 8 // 3 // 64 * 64,
            "num_hidden_layers": args.layers, "num_attention_heads": args.width // 64,
            "num_key_value_heads": max(1, args.width // 128), "head_dim": 64, "vocab_size": args.vocab,
            "max_position_embeddings": 128 + args.gen_length + args.block_length,
            "bos_token_id": None, "eos_token_id": None,
        },
        mask_token_id=args.vocab - 1,
        attention="block_causal",
        block_length=args.block_length,
    )  # fmt: skip
    return DiffusionLM(config).eval()


def sample(model: DiffusionLM, args: argparse.Namespace) -> list[TokenTrajectory]:
    num_steps = args.gen_length // args.block_length * args.rounds
    options = SamplerOptions(
        gen_length=args.gen_length, block_length=args.block_length, num_inference_steps=num_steps, score="random"
    )
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(0, args.vocab - 1, int(rng.integers(40, 129))).tolist()
        for _ in range(args.trajectories // args.group)
    ]
    requests = [Request(prompt, seed=i) for i, prompt in enumerate(p for p in prompts for _ in range(args.group))]
    return InProcessEngine(model, options).generate(requests)


def round_rows(trajectory: TokenTrajectory) -> tuple[TokenRows, torch.Tensor]:
    """One row per round: the clean canvas, then every block as it was before its r-th step.

    Returns:
        rows, and int64 [N]: the edit that each decision is.
    """
    size = trajectory.block_length
    final, block = trajectory.final_canvas(), trajectory.position // size
    rank = trajectory.step - np.array([trajectory.step[block == b].min() for b in block])
    documents, reads, order = [], [], []
    for r in range(int(rank.max()) + 1):
        noisy, mine = final.copy(), np.flatnonzero(rank == r)
        noisy[trajectory.position[rank >= r]] = trajectory.mask_token_id
        document, shift = noisy_document(final, noisy, size, trajectory.prompt_length // size)
        documents.append(document)
        reads.append(Reads(0, trajectory.position[mine] + shift, trajectory.token[mine], trajectory.step[mine]))
        order.append(mine)
    return assemble(documents, reads), torch.from_numpy(np.concatenate(order))


def one_row_each(rows: TokenRows) -> Iterator[tuple[TokenRows, torch.Tensor]]:
    """Micro-batches of one row, and the decisions [n] that each scores."""
    for r in range(len(rows.input_ids)):
        mine = (rows.row == r).nonzero().squeeze(1)
        layout = {k: getattr(rows, k)[r : r + 1] for k in ("input_ids", "position_ids", "document", "segment", "block")}
        flat = {k: getattr(rows, k)[mine] for k in ("column", "read", "target", "trajectory", "step")}
        yield replace(rows, row=torch.zeros_like(mine), **layout, **flat), mine


def score_everywhere(rows: TokenRows, model: DiffusionLM) -> Scores:
    """Logits and log-probs of every position, of which the decisions are then picked: the published order."""
    logprobs = torch.log_softmax(model.token_logits(rows.hidden(model)), dim=-1)
    logprob = logprobs[rows.row, rows.column, rows.target]
    return Scores(logprob, torch.zeros_like(logprob))


def micro_batches(layout: str, trajectories: list[TokenTrajectory]) -> Iterator[tuple[TokenRows, torch.Tensor, Scorer]]:
    """(rows, the decisions of all trajectories that they score, scorer)."""
    if layout == "shared rows":
        total = sum(len(t.step) for t in trajectories)
        yield packed_rows(trajectories, pack_to=10**9), torch.arange(total), TokenRows.score
        return
    begin = 0
    for trajectory in trajectories:
        everything = begin + torch.arange(len(trajectory.step))
        if layout == "packed":
            yield packed_rows([trajectory]), everything, TokenRows.score
        elif layout == "rounds, gathered":
            rows, order = round_rows(trajectory)
            yield rows, everything[order], TokenRows.score
        elif layout == "rounds (published)":
            whole, order = round_rows(trajectory)
            for rows, mine in one_row_each(whole):
                yield rows, everything[order[mine]], score_everywhere
        else:
            for rows, mine in one_row_each(remask_rows([trajectory], block_length=trajectory.block_length)):
                yield rows, everything[mine], TokenRows.score
        begin += len(everything)


LAYOUTS = ("packed", "shared rows", "rounds, gathered", "rounds (published)", "step by step")


def update(
    model: DiffusionLM, optimizer: torch.optim.Optimizer, layout: str, trajectories: list[TokenTrajectory]
) -> dict[str, Any]:
    """One update; log-probs of all decisions, gradient norm, and the tokens and passes it took."""
    optimizer.zero_grad()
    old = torch.from_numpy(np.concatenate([t.logprob for t in trajectories])).float()
    # Any advantages will do, as long as every layout gets the same.
    advantage = torch.cat([torch.full((len(t.step),), 1.0 if i % 2 else -0.5) for i, t in enumerate(trajectories)])
    logprobs = torch.zeros_like(old)
    tokens = passes = 0
    for rows, mine, scorer in micro_batches(layout, trajectories):
        logprob, entropy, *_ = scorer(rows, model)
        batch = DecisionBatch(
            logprob=logprob,
            entropy=entropy,
            old_logprob=old[mine],
            ref_logprob=None,
            advantage=advantage[mine],
            weight=torch.full_like(logprob, 1.0 / len(old)),
        )
        weighted_sum(clipped_policy_loss(batch).loss, batch.weight).backward()
        logprobs[mine] = logprob.detach()
        tokens += rows.num_tokens
        passes += 1
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    return {"logprob": logprobs, "norm": float(norm), "tokens": tokens, "passes": passes}


def peak_memory(layout: str, path: str, argv: list[str]) -> float:
    """MiB that one update adds to the resident set of a fresh process."""
    command = [sys.executable, __file__, *argv, "--only", layout, "--load", path]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.strip().splitlines()[-1])["mib"])


def resident_peak() -> float:
    """MiB. Not `ru_maxrss`, in which a process begins with the peak of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def only(layout: str, path: str, args: argparse.Namespace) -> None:
    model = build_model(args)
    trajectories = load_trajectories(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    # Gradients and moments are there in any layout: they do not count.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    before = resident_peak()
    update(model, optimizer, layout, trajectories)
    print(json.dumps({"mib": resident_peak() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--gen-length", type=int, default=256)
    parser.add_argument("--block-length", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4, help="denoising steps per block, R")
    parser.add_argument("--trajectories", type=int, default=4)
    parser.add_argument("--group", type=int, default=1, help="trajectories of one prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=LAYOUTS, help="layouts to leave out")
    parser.add_argument("--only", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return only(args.only, args.load, args)

    model = build_model(args)
    trajectories = sample(model, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    layouts = [layout for layout in LAYOUTS if layout not in args.skip]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    seconds: dict[str, list[float]] = {layout: [] for layout in layouts}
    cpu_seconds: dict[str, list[float]] = {layout: [] for layout in layouts}
    results: dict[str, dict[str, Any]] = {}
    for repeat in range(args.repeats):
        for layout in layouts:
            if layout == "step by step" and repeat:
                continue
            model.load_state_dict(weights)
            started, cpu_started = time.perf_counter(), time.process_time()
            results[layout] = update(model, optimizer, layout, trajectories)
            seconds[layout].append(time.perf_counter() - started)
            cpu_seconds[layout].append(time.process_time() - cpu_started)
    first = results[layouts[0]]
    for layout, result in results.items():
        gap = float((result["logprob"] - first["logprob"]).abs().max())
        assert gap < 1e-4, f"{layout}: log-probs differ from {layouts[0]} by {gap}"
        assert abs(result["norm"] / first["norm"] - 1) < 1e-3, f"{layout}: gradient norm {result['norm']}"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trajectories.npz")
        save_trajectories(path, trajectories)
        memory = {layout: peak_memory(layout, path, sys.argv[1:]) for layout in layouts}

    parameters = sum(p.numel() for p in model.parameters())
    prompts = [t.prompt_length for t in trajectories]
    print(
        f"{parameters / 1e6:.0f} M parameters ({args.layers} layers of width {args.width}, vocabulary {args.vocab}), "
        f"{len(trajectories)} trajectories of {args.gen_length} tokens in blocks of {args.block_length}, "
        f"{args.group} of a prompt, R = {args.rounds}, "
        f"prompts of {min(prompts)} to {max(prompts)} tokens, {torch.get_num_threads()} thread(s), "
        f"float32, median of {args.repeats} interleaved runs (step by step: 1)"
    )
    gap = max(float((r["logprob"] - first["logprob"]).abs().max()) for r in results.values())
    print(f"largest difference of a log-prob between layouts: {gap:.1e}\n")
    print(
        "| layout | seconds | times packed | CPU seconds | times packed (CPU) | tokens forwarded | passes | peak MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    wall0, cpu0 = (statistics.median(x[layouts[0]]) for x in (seconds, cpu_seconds))
    for layout in layouts:
        wall, cpu = statistics.median(seconds[layout]), statistics.median(cpu_seconds[layout])
        print(
            f"| {layout} | {wall:.2f} | {wall / wall0:.2f} | {cpu:.2f} | {cpu / cpu0:.2f} | "
            f"{results[layout]['tokens']} | {results[layout]['passes']} | {memory[layout]:.0f} |"
        )


if __name__ == "__main__":
    main()
