"""Time and mismatch of every cache that an image model can have, as a table.

python scripts/latent_caches.py runs/words_image/warm_start --prompts chat toad one
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from rl.estimators.gaussian_step import gaussian_rows
from rl.models.class_policy import ClassPolicy
from rollouts.engines.base import SampleRequest
from rollouts.engines.latent import LatentEngine
from rollouts.samplers.latent_options import LatentSamplerOptions

CACHES = (
    {"name": "first_block", "threshold": 0.3},
    {"name": "mag_cache"},
    {"name": "pab", "spatial_attention_timestep_skip_range": [0, 1000]},
    {"name": "taylor_seer", "cache_interval": 3},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a built-in image model")
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=64, help="rollouts of every prompt")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = ClassPolicy.from_pretrained(arguments.model)
    requests = [SampleRequest(prompt, i) for i, prompt in enumerate(arguments.prompts * arguments.count)]
    print("| `sampler.cache` | CPU s | pixels | log-prob of a step, mean | largest |\n|---|---|---|---|---|")
    exact = torch.zeros(0)
    for cache in (None, *(cache for cache in CACHES if cache["name"] in policy.caches)):
        options = LatentSamplerOptions(num_inference_steps=arguments.steps, min_std=0.02, cache=cache)
        engine = LatentEngine(policy, options)
        engine.generate(requests[:1])  # imports
        started = time.process_time()
        found = engine.generate(requests)
        seconds = time.process_time() - started
        with torch.no_grad():
            images = policy.decode(torch.from_numpy(np.stack([t.latents[-1] for t in found])))
            rows = gaussian_rows(found, reduce="sum")
            gap = (rows.score(policy).logprob - rows.sampler_logprob).abs()
        exact = images if cache is None else exact
        pixels = float((images - exact).abs().mean())
        shown = "none" if cache is None else json.dumps(cache).replace('"', "")
        print(f"| `{shown}` | {seconds:.2f} | {pixels:.4f} | {float(gap.mean()):.3f} | {float(gap.max()):.2f} |")


if __name__ == "__main__":
    main()
