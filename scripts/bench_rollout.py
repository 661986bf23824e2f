"""Rollout speed: the engine against a plain loop per prompt and a batched loop without cache, and SDAR's with one.

All decode the same requests with the same model and the same draws, so their token ids must be
equal, request by request. Draws depend on (seed, step, position) only; what is left is rounding. It can
turn a draw or a tie of confidences over once in about 10^6 decisions in float32, so equality is asserted
in float64 (untimed) and counted in float32 (timed).

    OMP_NUM_THREADS=2 python scripts/bench_rollout.py --model small --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from rl.models.compiled import compiled
from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rollouts.engines.block_cache import BlockCache
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions
from rollouts.samplers.parts import even_quota
from rollouts.samplers.step import StepState, denoise_step
from rollouts.visibility import block_causal_visibility

# name -> (hidden size, layers, attention heads, key-value heads, feed-forward width, vocabulary)
SIZES = {"small": (128, 3, 4, 2, 256, 512), "modality": (384, 6, 6, 6, 1024, 2048)}


def build_model(size: str, block_length: int | None, max_length: int, seed: int = 0) -> DiffusionLM:
    """A random Qwen3 (`block_length` None: full attention) whose predictions are peaked, so that confidences differ."""
    width, layers, heads, kv_heads, ffn, vocab = SIZES[size]
    torch.manual_seed(seed)
    config = DiffusionLMConfig(
        backbone={
            "model_type": "qwen3", "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width // heads,
            "max_position_embeddings": max_length, "vocab_size": vocab, "bos_token_id": None, "eos_token_id": None,
        },
        mask_token_id=vocab - 1,
        attention="full" if block_length is None else "block_causal",
        block_length=block_length,
    )  # fmt: skip
    model = DiffusionLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.0 if "embed" in name else min(parameter.shape) ** -0.5)
        model.lm_head.weight.mul_(3.0)
    return model


class Row:
    """A request under plain decoding: its canvas and where it stands."""

    def __init__(self, request: Request, options: SamplerOptions, mask_token_id: int):
        block = options.block_length
        assert block is not None
        self.seed, self.prompt_length = request.seed, len(request.prompt_ids)
        self.length = -(-(self.prompt_length + options.gen_length) // block) * block
        self.canvas = torch.full((self.length,), mask_token_id)
        self.canvas[: self.prompt_length] = torch.as_tensor(request.prompt_ids)
        self.block, self.mask_token_id = block, mask_token_id
        self.steps_per_block = options.steps_per_block(request.num_inference_steps)
        self.start, self.step = self.prompt_length // block * block, 0
        self.enter()

    def enter(self) -> None:
        self.end, self.block_step = self.start + self.block, 0
        self.num_masked = int((self.canvas[self.start : self.end] == self.mask_token_id).sum())

    def after_step(self) -> None:
        self.step += 1
        self.block_step += 1
        if not (self.canvas[self.start : self.end] == self.mask_token_id).any():
            self.start = self.end
            if self.start < self.length:
                self.enter()

    @property
    def done(self) -> bool:
        return self.start == self.length


@torch.no_grad()
def plain_step(model: DiffusionLM, rows: list[Row], options: SamplerOptions) -> int:
    """One forward of whole canvases, as far as any row can see, and one decision; returns tokens forwarded."""
    width = max(row.end for row in rows)
    ids = torch.full((len(rows), width), model.mask_token_id)
    for i, row in enumerate(rows):
        ids[i, : min(width, row.length)] = row.canvas[:width]
    positions = torch.arange(width).expand(len(rows), -1)
    start, end = (torch.tensor([[getattr(row, name)] for row in rows]) for name in ("start", "end"))
    eligible = (ids == model.mask_token_id) & (positions >= start) & (positions < end)
    visible = block_causal_visibility(positions, width, rows[0].block)
    hidden = model.hidden_states(ids, visible=visible, position_ids=positions)
    total, steps, block_step, step, seed = (
        torch.tensor([getattr(row, name) for row in rows])
        for name in ("num_masked", "steps_per_block", "block_step", "step", "seed")
    )
    state = StepState(ids, eligible, eligible, even_quota(total, steps.minimum(total), block_step), seed, step)
    # Logits at masked positions only, as in the engine: the baselines lose nothing there.
    result = denoise_step(state, model.token_logits(hidden[eligible]), options)
    revealed = (x[result.reveal].tolist() for x in (result.row, result.position, result.token))
    for i, position, token in zip(*revealed, strict=True):
        rows[i].canvas[position] = token
    for row in rows:
        row.after_step()
    return ids.numel()


def plain_loop(model: DiffusionLM, requests: list[Request], options: SamplerOptions, batch: int) -> dict[str, Any]:
    """Decode `batch` requests at a time, without cache; a finished request leaves the batch."""
    canvases, forwards, tokens, sequences = [], 0, 0, 0
    for first in range(0, len(requests), batch):
        rows = [Row(request, options, model.mask_token_id) for request in requests[first : first + batch]]
        active = rows
        while active:
            tokens += plain_step(model, active, options)
            forwards += 1
            sequences += len(active)
            active = [row for row in active if not row.done]
        canvases += [row.canvas.tolist() for row in rows]
    return {"ids": canvases, "forwards": forwards, "sequences": sequences, "tokens": tokens}


@torch.no_grad()
def published_loop(model: DiffusionLM, requests: list[Request], options: SamplerOptions) -> dict[str, Any]:
    """SDAR's published generation: a request at a time, its blocks with cache, logits at every position of the block.

    Each block takes its denoising forwards, and one more that stores it when it is finished.
    """
    canvases, forwards, tokens = [], 0, 0
    for request in requests:
        row = Row(request, options, model.mask_token_id)
        cache = BlockCache(1, row.length)

        def forward(start: int, end: int, row: Row = row, cache: BlockCache = cache) -> torch.Tensor:
            nonlocal forwards, tokens
            positions = torch.arange(start, end)[None]
            cache.aim([0], positions, end)
            visible = block_causal_visibility(positions, end, row.block)
            forwards, tokens = forwards + 1, tokens + end - start
            ids = row.canvas[None, start:end]
            return model.hidden_states(ids, visible=visible, position_ids=positions, cache=cache)

        if row.start:
            forward(0, row.start)
        while not row.done:
            start, end = row.start, row.end
            logits = model.token_logits(forward(start, end))[0]
            ids = row.canvas[None, :end]
            eligible = (ids == row.mask_token_id) & (torch.arange(end) >= start)
            total, steps, block_step, step, seed = (
                torch.tensor([x]) for x in (row.num_masked, row.steps_per_block, row.block_step, row.step, row.seed)
            )
            state = StepState(ids, eligible, eligible, even_quota(total, steps.minimum(total), block_step), seed, step)
            result = denoise_step(state, logits[eligible[0, start:]], options)
            row.canvas[result.position[result.reveal]] = result.token[result.reveal]
            row.after_step()
            if row.start != start:
                forward(start, end)
        canvases.append(row.canvas.tolist())
    return {"ids": canvases, "forwards": forwards, "sequences": forwards, "tokens": tokens}


def engine_run(
    model: DiffusionLM, requests: list[Request], options: SamplerOptions, batch: int, cache: Any = "none"
) -> dict[str, Any]:
    engine = InProcessEngine(model, options, max_batch_size=batch, approximate_cache=cache)
    trajectories = engine.generate(requests)
    stats = engine.stats
    return {
        "ids": [t.final_canvas().tolist() for t in trajectories],
        "forwards": stats.forwards,
        "sequences": stats.sequence_forwards,
        "tokens": stats.query_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--prompts", type=int, default=64, help="requests to decode")
    parser.add_argument("--plain-prompts", type=int, default=None, help="of them, for the plain loop; default all")
    parser.add_argument("--gen-length", type=int, default=256)
    parser.add_argument("--block-length", type=int, default=8)
    parser.add_argument("--steps-per-block", type=int, default=4)
    parser.add_argument("--selector", choices=("top_n", "dynamic"), default="top_n")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=64, help="requests decoded together (engine and batched loop)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--cache", default="none", help="full attention and this approximate cache, at batch 1 and more"
    )
    parser.add_argument("--full", action="store_true", help="full attention without a cache")
    parser.add_argument("--compile", action="store_true", help="also the engine with `rollout.compile`")
    parser.add_argument("--skip", nargs="*", default=[], help="layouts that are not run, such as 'plain loop'")
    parser.add_argument("--no-check", action="store_true", help="skip the float64 comparison of token ids")
    args = parser.parse_args()

    options = SamplerOptions(
        gen_length=args.gen_length,
        block_length=args.block_length,
        num_inference_steps=args.gen_length // args.block_length * args.steps_per_block,
        selector=args.selector,
        threshold=args.threshold,
    )
    longest = 128
    model = build_model(
        args.model,
        args.block_length if args.cache == "none" and not args.full else None,
        longest + args.gen_length + args.block_length,
    )
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, longest + 1, (args.prompts,), generator=generator).tolist()
    requests = [
        Request(torch.randint(0, model.mask_token_id, (n,), generator=generator).tolist(), seed=i)
        for i, n in enumerate(lengths)
    ]
    some = requests[: args.plain_prompts]
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "plain loop": lambda: plain_loop(model, some, options, 1),
        "published SDAR loop": lambda: published_loop(model, some, options),
        "batched loop": lambda: plain_loop(model, requests, options, args.batch),
        "engine": lambda: engine_run(model, requests, options, args.batch),
    }
    if args.cache != "none":
        # At batch 1 the engine's forwards are those of Fast-dLLM's published loop.
        runs = {
            "engine, batch 1": lambda: engine_run(model, some, options, 1, args.cache),
            "engine": lambda: engine_run(model, requests, options, args.batch, args.cache),
        }
    if args.compile:
        fast = compiled(model)
        runs["engine, compiled"] = lambda: engine_run(fast, requests, options, args.batch, args.cache)
    for name in args.skip:
        del runs[name]
    if args.compile and args.no_check:
        started = time.process_time()
        runs["engine, compiled"]()
        print(f"first compiled rollout: {time.process_time() - started:.0f} CPU seconds")
    if not args.no_check:
        model.double()
        ids = {name: run()["ids"] for name, run in runs.items()}
        model.float()
        for name, own in ids.items():
            assert own == ids["engine"][: len(own)], f"token ids differ between engine and {name}"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, dict[str, Any]] = {}
    for _ in range(args.repeats):
        for name, run in runs.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            results[name] = run()
            seconds[name].append(time.perf_counter() - started)
            cpu_seconds[name].append(time.process_time() - cpu_started)

    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{args.model} model, {parameters / 1e6:.2f} M parameters, {len(requests)} prompts of {min(lengths)} to "
        f"{max(lengths)} tokens, {args.gen_length} new tokens in blocks of {args.block_length}, {args.selector}, "
        f"{args.steps_per_block} steps per block, batch {args.batch}, {torch.get_num_threads()} thread(s), "
        f"median of {args.repeats} interleaved runs"
    )
    print("token ids in float64: " + ("not compared" if args.no_check else f"all requests equal in all {len(runs)}"))
    print()
    first = next(iter(runs))
    print(f"| | seconds | tokens/s | times {first} | CPU seconds | times {first} (CPU) | forwards | ", end="")
    print("tokens per forward of a sequence | tokens forwarded | ids equal in float32 |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rates: list[tuple[float, float]] = []
    for name, result in results.items():
        count = len(result["ids"])
        made = sum(len(canvas) for canvas in result["ids"]) - sum(lengths[:count])
        elapsed, cpu = statistics.median(seconds[name]), statistics.median(cpu_seconds[name])
        rates.append((made / elapsed, made / cpu))
        equal = sum(a == b for a, b in zip(result["ids"], results["engine"]["ids"], strict=False))
        print(
            f"| {name} ({count} prompts) | {elapsed:.2f} | {rates[-1][0]:.0f} | {rates[-1][0] / rates[0][0]:.1f} | "
            f"{cpu:.2f} | {rates[-1][1] / rates[0][1]:.1f} | {result['forwards']} | {made / result['sequences']:.2f} | "
            f"{result['tokens']} | {equal} of {count} |"
        )


if __name__ == "__main__":
    main()
