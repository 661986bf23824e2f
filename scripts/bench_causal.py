"""Tokens per second of a converted model against the autoregressive one: `python scripts/bench_causal.py MODEL`.

The autoregressive model runs transformers' `generate` with its key-value cache, the converted one the in-process engine
with a block at a forward. Weights are equal and untrained, end tokens are ignored. Both run in one process; the
figures are CPU seconds of the process, so that a loaded machine changes little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rewards.causal_lm import plain_folder
from rl.model_section import ModelConfig
from rl.models.load import load_policy
from rollouts.engines.in_process import InProcessEngine, Request
from rollouts.samplers.options import SamplerOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, hub name, .gguf file or package: address")
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24, help="to generate, a multiple of the block")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of every prompt")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 48])
    parser.add_argument("--profile", type=int, default=0, help="also print this many of the costliest operators")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    config: dict[str, Any] = {"path": args.model, "convert": {"block_length": args.block, "mask_token": 16}}
    policy = load_policy(ModelConfig(**config), None, seed=0).to(dtype)
    causal = AutoModelForCausalLM.from_pretrained(plain_folder(args.model), dtype=dtype).eval()
    options = SamplerOptions(
        gen_length=args.tokens, num_inference_steps=args.tokens // args.block, temperature=1.0, block_length=args.block
    )
    for batch in args.batch:
        prompts = torch.randint(20, 1000, (batch, args.prompt), generator=torch.Generator().manual_seed(0))
        requests = [Request(row.tolist(), seed=i) for i, row in enumerate(prompts)]
        engine = InProcessEngine(policy, options, max_batch_size=batch)
        decoders: dict[str, Callable[[], Any]] = {
            "converted": lambda engine=engine, requests=requests: engine.generate(requests),
            "autoregressive": lambda prompts=prompts: causal.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, use_cache=True,
                min_new_tokens=args.tokens, max_new_tokens=args.tokens, pad_token_id=0,
            ),
        }  # fmt: skip
        speed = dict.fromkeys(decoders, 0.0)
        for _ in range(2):
            for name, decode in decoders.items():
                begin = time.process_time()
                decode()
                speed[name] = max(speed[name], batch * args.tokens / (time.process_time() - begin))
        ratio = speed["converted"] / speed["autoregressive"]
        print(
            f"{args.dtype} batch {batch:3d}: converted {speed['converted']:.0f}, autoregressive "
            f"{speed['autoregressive']:.0f} tokens per CPU second, ratio {ratio:.2f}",
            flush=True,
        )
        for name, decode in decoders.items() if args.profile else []:
            print(f"    {name}: {costliest(decode, args.profile)}", flush=True)


def costliest(decode: Callable[[], Any], count: int) -> str:
    """Seconds of one call under the profiler, and the operators in which it spends most of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        decode()
    found = sorted(trace.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in found)
    shares = [f"{row.key} {row.self_cpu_time_total / total:.0%} ({row.count})" for row in found[:count]]
    return f"{total / 1e6:.1f} s, {', '.join(shares)}"


if __name__ == "__main__":
    main()
