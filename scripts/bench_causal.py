"""Tokens per second of a converted model against the autoregressive one: `python scripts/bench_causal.py MODEL`.

The autoregressive model runs transformers' `generate` with its key-value cache, the converted one the in-process engine
with a block at a forward. Weights are equal and untrained, end tokens are ignored. Both run in one process; the
figures are CPU seconds of the process, so that a loaded machine changes little.
"""

from __future__ import annotations

import argparse
import time
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
        speed: dict[str, float] = {}
        for _ in range(2):
            for name in ("converted", "autoregressive"):
                begin = time.process_time()
                if name == "converted":
                    engine.generate(requests)
                else:
                    causal.generate(
                        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, use_cache=True,
                        min_new_tokens=args.tokens, max_new_tokens=args.tokens, pad_token_id=0,
                    )  # fmt: skip
                speed[name] = max(speed.get(name, 0.0), batch * args.tokens / (time.process_time() - begin))
        ratio = speed["converted"] / speed["autoregressive"]
        print(
            f"{args.dtype} batch {batch:3d}: converted {speed['converted']:.0f}, autoregressive "
            f"{speed['autoregressive']:.0f} tokens per CPU second, ratio {ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
