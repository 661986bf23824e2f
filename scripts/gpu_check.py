"""Tests, one RL step of every kind, and speed on this machine's GPU; small sizes on a CPU. See scripts/gpu_check.sh.

Rollouts and updates are compared with the card's own rate at large square matrix products. The share is the operations
of the model's matrices per second (2 per weight and token forward, 6 forward and backward; attention is not counted)
over that rate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEEDED = {
    "torch",
    "transformers",
    "tokenizers",
    "deepspeed",
    "datasets",
    "accelerate",
    "peft",
    "safetensors",
    "pydantic",
}
NEEDED |= {"numpy", "yaml", "rich", "matplotlib", "jinja2", "PIL", "diffusers", "sklearn", "pytest", "pytest_timeout"}

# device: (width, layers, vocabulary, new tokens, prompts, side of the square matrices)
SIZES = {"cuda": (1024, 16, 32768, 256, 128, 8192), "cpu": (64, 2, 512, 16, 4, 512)}


def rl_step(config: str, folder: Path, overrides: list[str]) -> str:
    """One RL step of `denoise-rl train`; its seconds and how far sampler and learner agree."""
    from rl.cli import main

    common = ["sft.steps=1", "train.steps=1", "eval.num_prompts=4", "eval.every=0", "eval.viewer_items=0"]
    words = [*common, "sft.batch_size=8", f"run.output_dir={folder}", *overrides]
    if main(["train", "--config", f"configs/{config}.yaml", *words]):
        raise RuntimeError("the run failed, see above")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (step,) = (line for line in lines if line["stage"] == "train")
    seconds = f"rollout {step['time/rollout']:.2f} s, update {step['time/learn']:.2f} s"
    return f"{seconds}, log-prob gap {step['policy/logprob_gap_max']:.1e}"


def matmul_rate(device: str, size: int) -> float:
    """Operations per second of a square product in the precision that models are trained in here."""
    import torch

    one, other = (torch.randn(size, size, device=device, dtype=precision(device)) for _ in range(2))
    return 2 * size**3 / fastest(lambda: one @ other, device)


def precision(device: str):  # type: ignore[no-untyped-def]
    import torch

    return torch.bfloat16 if device == "cuda" else torch.float32


def fastest(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Seconds of the fastest of `repeats` calls, after one that is not counted."""
    import torch

    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def sampled(attention: str, device: str):  # type: ignore[no-untyped-def]
    """An engine with a random Qwen3, and requests for it."""
    import torch

    from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
    from rollouts.engines.in_process import InProcessEngine, Request
    from rollouts.samplers.options import SamplerOptions

    width, layers, vocab, new, prompts, _ = SIZES[device]
    backbone = {
        "model_type": "qwen3", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 32, "num_key_value_heads": width // 64, "head_dim": 32, "vocab_size": vocab,
        "max_position_embeddings": 128 + new, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    block = 8 if attention == "block_causal" else None
    torch.manual_seed(0)
    config = DiffusionLMConfig(backbone=backbone, mask_token_id=vocab - 1, attention=attention, block_length=block)
    model: Any = DiffusionLM(config)
    model = model.to(device, precision(device)).eval()
    engine = InProcessEngine(
        model, SamplerOptions(gen_length=new, block_length=block, num_inference_steps=new // 2, score="random"),
        device=device,
    )  # fmt: skip
    return engine, [Request(torch.randint(0, vocab - 1, (64,)).tolist(), seed=i) for i in range(prompts)]


def compiled_speed(attention: str, device: str) -> str:
    """The same rollouts with `rollout.compile`, against those without."""
    from rl.models.compiled import compiled

    engine, requests = sampled(attention, device)
    plain, seconds = engine.generate(requests), fastest(lambda: engine.generate(requests), device, 1)
    engine.model = compiled(engine.model)
    ratio = seconds / fastest(lambda: engine.generate(requests), device, 1)
    pairs = zip(plain, engine.generate(requests), strict=True)
    same = sum(one.token.tolist() == own.token.tolist() for one, own in pairs)
    return f"{ratio:.2f} times as fast, the same tokens in {same} of {len(requests)} rollouts"


def speed(attention: str, device: str, rate: float) -> dict[str, str]:
    """Rollouts and update of a random Qwen3: tokens per second, and the share of `rate` their matrix products take."""
    import torch

    from rl.estimators.trace_rows import trace_rows

    engine, requests = sampled(attention, device)
    model, new, prompts = engine.model, engine.options.gen_length, len(requests)
    head = sum(p.numel() for p in model.lm_head.parameters())
    body = sum(p.numel() for p in model.backbone.parameters()) - head  # the embedding is as large, and only looked up
    seconds = fastest(lambda: engine.generate(requests), device, 1)
    stats, trajectories = engine.stats, engine.generate(requests)[: max(2, prompts // 8)]
    work = 2 * (body * stats.query_tokens + head * new * prompts)
    rollouts = f"{stats.generated_tokens / seconds:,.0f} new tokens/s, {work / seconds / rate:.1%} of the matmul rate"

    rows = [trace_rows([trajectory], model).to(device) for trajectory in trajectories[: prompts // 8 or 1]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def update() -> None:
        optimizer.zero_grad()
        for part in rows:
            (-part.score(model).logprob.sum()).backward()
        optimizer.step()

    seconds = fastest(update, device, 1)
    tokens, decisions = sum(part.num_tokens for part in rows), sum(len(part.target) for part in rows)
    work = 6 * (body * tokens + head * decisions)
    learned = f"{decisions / seconds:,.0f} decisions/s, {work / seconds / rate:.1%} of the matmul rate"
    name = "full attention" if attention == "full" else "block attention"
    return {f"{name}: rollouts": rollouts, f"{name}: update": learned}


def device_tests() -> str:
    options = ["-m", "device", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    files = [str(path) for path in Path("tests").glob("test_*.py") if "mark.device" in path.read_text()]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *files], capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1].strip("= ")
    if done.returncode:
        print(done.stdout[-6000:])
        raise RuntimeError(last)
    return last


def write(path: Path, name: str, table: list[str]) -> None:
    """Put a section `## name` at the end of a page, in place of one of that name."""
    text = path.read_text() if path.is_file() else "# On a GPU\n"
    text = re.sub(rf"\n## {re.escape(name)}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    path.write_text(text.rstrip() + f"\n\n## {name}\n\n" + "\n".join(table) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, default=Path("docs/gpu.md"), help="page that gets the table")
    args = parser.parse_args()
    missing = sorted(name for name in NEEDED if importlib.util.find_spec(name) is None)
    print(
        f"needs Python 3.11 and: {', '.join(sorted(NEEDED))}; no network. `make lint` installs all of it.", flush=True
    )
    if missing:
        print(f"missing: {', '.join(missing)}")
        return 2
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s), small sizes"
    )
    rate = matmul_rate(device, SIZES[device][-1])
    table = ["| what | result |", "|---|---|"]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    table.append(f"| versions | {versions} |")
    table.append(f"| matrix product, {precision(device)} | {rate / 1e12:,.2f} TFLOP/s |")
    failed = 0

    def part(what: str, work: Callable[[], str | dict[str, str]]) -> None:
        nonlocal failed
        started = time.perf_counter()
        try:
            result = work()
        except Exception as error:
            traceback.print_exc()
            failed += 1
            result = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
        results = {what: result} if isinstance(result, str) else result
        table.extend(f"| {left} | {right} |" for left, right in results.items())
        print(f"{what}: {result} ({time.perf_counter() - started:.0f} s)", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        reward = Path(folder, "reward.py")
        reward.write_text(
            "def ones(prompts, completions, **columns):\n    return [c.count('1') / 16 for c in completions]\n"
        )
        small = [] if device == "cuda" else ["train.prompts_per_step=4", "run.num_threads=1"]
        text = [
            *small,
            f"reward.functions=[{{name: '{reward}:ones'}}]",
            "eval.num_inference_steps=[4]",
            "train.mixed_steps=[4]",
        ]
        text += ["train.deepspeed=zero0_bf16", "train.max_logprob_gap=null"] if device == "cuda" else []
        qwen3 = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        qwen3 |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64}
        block = [f"model.backbone={json.dumps(qwen3)}", "model.attention=block_causal", "model.block_length=4"]
        part("tests on the device", device_tests)
        part("RL step, full attention", lambda: rl_step("quickstart", Path(folder, "full"), text))
        part("RL step, block attention", lambda: rl_step("quickstart", Path(folder, "block"), [*text, *block]))
        part("RL step, images", lambda: rl_step("digits_b2", Path(folder, "images"), small))
        part("speed, full attention", lambda: speed("full", device, rate))
        part("speed, block attention", lambda: speed("block_causal", device, rate))
        part("block attention: rollouts, compiled", lambda: compiled_speed("block_causal", device))
    write(args.write, name, table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
